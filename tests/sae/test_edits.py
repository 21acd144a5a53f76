import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.models.edits import EditContext, where
from qscope_jax.models.language_model import forward
from qscope_jax.sae.autoencoder import SparseAutoencoder, SparseCode, densify
from qscope_jax.sae.edits import ClampFeatures, SpliceReconstruction, feature_activations

B, T, D, K = 2, 6, 16, 4
LAYER = jnp.int32(1)


def context(prompt=T) -> EditContext:
    """Two rows of T tokens, those behind the prompt generated, the last of the second row padding."""
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    valid = jnp.ones((B, T), bool).at[1, -1].set(False)
    return EditContext(positions, jnp.full((B, T), prompt, jnp.int32), valid)


VALID = np.asarray(context().valid_BT)


@pytest.fixture
def orthogonal() -> SparseAutoencoder:
    """D orthonormal directions, so that clamping one leaves the others alone; a bias on the decoder only."""
    rng = np.random.default_rng(0)
    directions = jnp.asarray(np.linalg.qr(rng.standard_normal((D, D)))[0], jnp.float32)
    b_dec = jnp.asarray(rng.standard_normal(D), jnp.float32)
    return SparseAutoencoder(directions, directions, -directions @ b_dec, b_dec, k=K)


@pytest.fixture
def x(orthogonal):
    """Streams that are a code of three features and an error along seven others, too small (and negative) to be selected."""
    rng = np.random.default_rng(1)
    code = np.zeros((B, T, D), np.float32)
    code[..., [2, 5, 7]] = rng.uniform(1, 2, (B, T, 3))
    code[..., 9:] = -rng.uniform(0.1, 0.5, (B, T, D - 9))
    return jnp.asarray(code) @ orthogonal.W_dec[...] + orthogonal.b_dec[...]


def clamp(sae, targets, place=None, layer=LAYER) -> ClampFeatures:
    """Clamp features to values; a value may be one for each row."""
    values = jnp.broadcast_to(jnp.stack([jnp.broadcast_to(jnp.float32(v), (B,)) for v in targets.values()], axis=1), (B, len(targets)))
    return ClampFeatures(sae, layer, jnp.asarray(list(targets), jnp.int32), values, where() if place is None else place)


def codes(sae, x) -> np.ndarray:
    return np.asarray(densify(sae.encode(x.reshape(-1, D)), D)).reshape(B, T, D)


def test_clamping_to_the_present_value_changes_nothing(orthogonal, x):
    value = 1.5
    x = x + (value - jnp.asarray(codes(orthogonal, x))[..., 5:6]) * orthogonal.direction(5)
    edited = clamp(orthogonal, {5: value})(x, LAYER, context())
    assert np.abs(edited - x).max() <= 1e-6
    np.testing.assert_array_equal(clamp(orthogonal, {9: 0.0})(x, LAYER, context()), x)


@pytest.mark.parametrize("target", [0.0, 0.7, 5.0])
def test_clamping_sets_the_activation_and_leaves_the_others(target, orthogonal, x):
    before, after = codes(orthogonal, x), codes(orthogonal, clamp(orthogonal, {5: target})(x, LAYER, context()))
    expected = before.copy()
    expected[VALID, 5] = target
    np.testing.assert_allclose(after, expected, atol=2e-6)
    assert np.all(before[..., 5] >= 1)


def test_a_feature_that_is_not_active_is_raised_by_the_target(orthogonal, x):
    edited = clamp(orthogonal, {0: 3.0})(x, LAYER, context())
    np.testing.assert_allclose(codes(orthogonal, edited)[VALID, 0], 3.0, atol=2e-6)


def test_ablation_removes_the_feature_and_keeps_the_error_term(orthogonal, x):
    edited = clamp(orthogonal, {5: 0.0})(x, LAYER, context())
    assert np.abs(codes(orthogonal, edited)[VALID, 5]).max() <= 2e-6
    error, error_after = (np.asarray(y - orthogonal.decode(orthogonal.encode(y.reshape(-1, D))).reshape(y.shape)) for y in (x, edited))
    assert np.abs(error).max() > 0.1
    np.testing.assert_allclose(error_after, error, atol=5e-6)


def test_the_edited_code_decoded_with_the_error_added_is_the_edited_stream(orthogonal, x):
    targets = {2: 0.0, 7: 4.0, 11: 1.0}
    code = codes(orthogonal, x)
    changed = code.copy()
    for feature, target in targets.items():
        changed[..., feature] = target
    expected = np.where(VALID[..., None], x + (changed - code) @ orthogonal.W_dec[...], x)
    np.testing.assert_allclose(clamp(orthogonal, targets)(x, LAYER, context()), expected, atol=1e-5)


def test_rows_of_a_batch_have_their_own_targets(orthogonal, x):
    after = codes(orthogonal, clamp(orthogonal, {5: np.asarray([0.5, 4.0], np.float32)})(x, LAYER, context()))
    np.testing.assert_allclose(after[0, :, 5], 0.5, atol=2e-6)
    np.testing.assert_allclose(after[1, :-1, 5], 4.0, atol=2e-6)


@pytest.mark.parametrize("place, expected", [
    (where("1,3-4"), [1, 3, 4]), (where(-1), [3]), (where("all", "decode"), [4, 5]), (where(slice(2, None), "prefill"), [2, 3]),
])  # fmt: skip
def test_only_chosen_positions_change_and_the_others_stay_to_the_bit(place, expected, orthogonal, x):
    now = context(prompt=4)
    mean = jnp.mean(x, axis=(0, 1))
    splice = SpliceReconstruction(orthogonal, LAYER, mean, jnp.asarray(True), place, jnp.float32(jnp.inf))
    for edit in (clamp(orthogonal, {5: 9.0}, place), splice):
        moved = np.any(np.asarray(edit(x, LAYER, now)) != np.asarray(x), axis=-1)
        assert np.flatnonzero(moved[0]).tolist() == expected
        assert np.flatnonzero(moved[1]).tolist() == [position for position in expected if position != T - 1]


def test_generated_tokens_obey_their_own_phase(orthogonal, x):
    for phase, moves in (("prefill", False), ("decode", True), ("both", True)):
        edited = clamp(orthogonal, {5: 9.0}, where("all", phase))(x, LAYER, context(prompt=0))
        assert np.any(np.asarray(edited) != np.asarray(x)) == moves


def test_a_bfloat16_stream_keeps_its_dtype_and_its_bits_where_nothing_acts(orthogonal, x):
    x = x.astype(jnp.bfloat16)
    splice = SpliceReconstruction(orthogonal, LAYER, jnp.zeros((D,), jnp.float32), jnp.asarray(False), where(0), jnp.float32(jnp.inf))
    for edit in (clamp(orthogonal, {5: 9.0}, where(0)), splice):
        edited = edit(x, LAYER, context())
        assert edited.dtype == jnp.bfloat16
        np.testing.assert_array_equal(edited[:, 1:], x[:, 1:])
        assert np.any(np.asarray(edited[:, 0] != x[:, 0]))


def test_splicing_leaves_tokens_of_a_large_norm_alone(orthogonal, x):
    x = x.at[0, 2].mul(100)
    splice = SpliceReconstruction(orthogonal, LAYER, jnp.zeros((D,), jnp.float32), jnp.asarray(True), where(), jnp.float32(50))
    expected = np.where(VALID[..., None], 0, x)
    expected[0, 2] = x[0, 2]
    np.testing.assert_array_equal(splice(x, LAYER, context()), expected)


def test_activations_of_chosen_features_ignore_empty_slots():
    code = SparseCode(jnp.asarray([[2.0, 1.0, 0.0], [3.0, 0.0, 0.0]], jnp.float32), jnp.asarray([[4, 0, 0], [1, 4, 4]], jnp.int32))
    np.testing.assert_array_equal(feature_activations(code, jnp.asarray([0, 4, 9], jnp.int32)), [[1, 2, 0], [0, 0, 0]])


# In the model.


@pytest.fixture(scope="module")
def run(character_model, sentences):
    """Logits and the residual streams of all layers at the tokens of three texts, under edits."""
    batch, taps = character_model.batch(sentences(3)), jnp.arange(3, dtype=jnp.int32)
    valid = batch.segment_ids_BT > 0

    def run(*edits) -> tuple[np.ndarray, np.ndarray]:
        out = forward(character_model.decoder, batch.tokens_BT, batch.segment_ids_BT, edits, taps)
        return np.asarray(out.logits)[valid], np.asarray(out.residuals)[:, valid]

    return run


@pytest.fixture(scope="module")
def plain(run) -> tuple[np.ndarray, np.ndarray]:
    return run()


@pytest.fixture(scope="module")
def perfect(character_model) -> SparseAutoencoder:
    """Both signs of every axis: rebuilds every stream to the bit."""
    width = character_model.config.d_model
    signs = jnp.concatenate([jnp.eye(width, dtype=jnp.float32), -jnp.eye(width, dtype=jnp.float32)])
    return SparseAutoencoder(signs, signs, jnp.zeros((2 * width,), jnp.float32), jnp.zeros((width,), jnp.float32), k=width)


def splice_at(sae, layer) -> SpliceReconstruction:
    return SpliceReconstruction(sae, jnp.int32(layer), jnp.zeros((sae.d_model,), jnp.float32), jnp.asarray(False), where(), jnp.float32(jnp.inf))


def test_splicing_in_a_perfect_reconstruction_leaves_the_logits_unchanged(run, plain, perfect):
    np.testing.assert_allclose(run(splice_at(perfect, 1))[0], plain[0], atol=1e-6)
    blank = SparseAutoencoder(perfect.W_enc[...], 0 * perfect.W_dec[...], perfect.b_enc[...], perfect.b_dec[...], k=perfect.k)
    assert np.abs(run(splice_at(blank, 1))[0] - plain[0]).max() > 0.1


def clamp_one(sae, layer, feature, target, *place) -> ClampFeatures:
    return ClampFeatures(sae, jnp.int32(layer), jnp.asarray([feature], jnp.int32), jnp.full((1, 1), target, jnp.float32), where(*place))


def test_an_edit_acts_at_its_layer_and_above_only(run, plain, perfect):
    _, edited = run(clamp_one(perfect, 1, 4, 9))
    np.testing.assert_allclose(edited[0], plain[1][0], atol=1e-6)
    # The axis has a feature for either sign; only that for the positive one is clamped.
    np.testing.assert_allclose(edited[1, :, 4], 9 - np.maximum(-plain[1][1, :, 4], 0), atol=1e-5)
    assert np.abs(edited[2] - plain[1][2]).max(axis=-1).min() > 0


def test_another_feature_target_layer_or_place_compiles_nothing(run, perfect, count_compilations):
    edits = [clamp_one(perfect, 1, 4, 9), clamp_one(perfect, 2, 40, 0, "3-7", "prefill"), clamp_one(perfect, 0, 1, 1, -1)]
    results = [run(edits[0])[0]]
    with count_compilations() as compilations:
        results += [run(edit)[0] for edit in edits[1:]]
    assert compilations.count == 0
    assert not np.array_equal(results[0], results[1]) and not np.array_equal(results[1], results[2])
