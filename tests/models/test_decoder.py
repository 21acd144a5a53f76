import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.errors import InputError
from qscope_jax.models.cache import init_cache
from qscope_jax.models.decoder import Decoder
from qscope_jax.models.language_model import forward, load_model
from qscope_jax.parallel.mesh import make_mesh
from qscope_jax.parallel.rules import batch_sharding, leaf_name, parameter_sharding

ALL = jnp.arange(3, dtype=jnp.int32)
LENGTH = 24


@pytest.fixture(scope="module")
def scanned(tiny_config, random_decoder):
    return random_decoder(tiny_config())


@pytest.fixture(scope="module")
def unrolled(tiny_config, random_decoder):
    return random_decoder(tiny_config().unrolled())


@pytest.fixture(scope="module")
def tokens() -> jax.Array:
    return jnp.asarray(np.random.default_rng(2).integers(0, 97, (7, LENGTH)), jnp.int32)


@pytest.fixture(scope="module")
def outputs(scanned, tokens) -> SimpleNamespace:
    """Of the scanned decoder, all layers tapped. Most tests run this very program, since compiling another costs a second."""
    return run(scanned, tokens)


def run(decoder, tokens, ids=None, taps: jax.Array | None = ALL, **settings) -> SimpleNamespace:
    """A forward pass with its results in NumPy, which slices and compares them without compiling."""
    out = forward(decoder, tokens, np.ones(tokens.shape, np.int32) if ids is None else ids, taps=taps, **settings)
    results = {"logits": out.logits, "residuals": out.residuals}
    return SimpleNamespace(**{name: None if value is None else np.asarray(value) for name, value in results.items()})


def assert_close(got, expected, tolerance):
    """The largest difference is at most `tolerance` of the largest magnitude."""
    got, expected = np.asarray(got, np.float32), np.asarray(expected, np.float32)
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("scan", [True, False])
def test_every_layer_and_the_logits_equal_those_of_transformers(reference, scan):
    decoder = load_model(reference.folder, scan=scan).decoder
    logits, residuals = reference.outputs
    out = run(decoder, reference.tokens, taps=jnp.arange(len(residuals), dtype=jnp.int32))
    for layer in range(len(residuals)):
        assert_close(out.residuals[layer], residuals[layer], 1e-4)
    assert_close(out.logits, logits, 1e-4)


def test_padded_rows_and_packed_documents_equal_documents_alone(scanned, tokens):
    tokens = np.asarray(tokens)
    documents = {9: tokens[0, :9], 15: tokens[1, :15]}
    alone = {n: run(scanned, row[None]) for n, row in documents.items()}
    # Lengths of the documents of each row, from the left; negative is padding, here of tokens that must not matter.
    layouts = [[9, -15], [-15, 9], [9, 15], [15, 9], [-6, 9, -9], [15, -9], [-9, 15]]
    rows, ids, places = [], [], []
    for row, layout in enumerate(layouts):
        rows.append(np.concatenate([documents[n] if n > 0 else tokens[3, :-n] for n in layout]))
        ids.append(np.concatenate([np.full(abs(n), index + 1 if n > 0 else 0, np.int32) for index, n in enumerate(layout)]))
        places += [(row, sum(map(abs, layout[:index])), n) for index, n in enumerate(layout) if n > 0]
    out = run(scanned, np.stack(rows), np.stack(ids))
    for row, start, length in places:
        assert_close(out.residuals[:, row, start : start + length], alone[length].residuals[:, 0], 1e-5)
        assert_close(out.logits[row, start : start + length], alone[length].logits[0], 1e-5)


def test_the_future_does_not_reach_the_past(scanned, tokens, outputs):
    changed = np.where(np.arange(LENGTH) < 10, tokens, (np.asarray(tokens) + 1) % 97)
    other = run(scanned, changed).residuals
    assert np.array_equal(outputs.residuals[:, :, :10], other[:, :, :10])
    assert not np.array_equal(outputs.residuals[:, :, 10], other[:, :, 10])


def test_scan_and_unrolled_layers_compute_the_same(unrolled, tokens, outputs):
    out = run(unrolled, tokens)
    assert_close(out.residuals, outputs.residuals, 1e-6)
    assert_close(out.logits, outputs.logits, 1e-6)


@pytest.mark.parametrize("stacking", ["scanned", "unrolled"])
def test_taps_that_are_constants_of_the_program_give_the_same_streams(stacking, request, tokens, outputs):
    order = np.array([2, 0], np.int32)
    decoder = request.getfixturevalue(stacking)
    found = jax.jit(lambda decoder, tokens: decoder(tokens, taps=order).residuals)(decoder, jnp.asarray(tokens))
    assert_close(found, outputs.residuals[order], 1e-6)
    below = jax.jit(lambda decoder, tokens: decoder(tokens, taps=order, stop_after=1).residuals)(decoder, jnp.asarray(tokens))
    assert_close(below[1], outputs.residuals[0], 1e-6)
    assert not np.any(below[0])


def test_taps_come_in_the_order_asked_for(scanned, unrolled, tokens, outputs):
    order = np.asarray([2, 0, 1], np.int32)
    for decoder in (scanned, unrolled):
        assert_close(run(decoder, tokens, taps=jnp.asarray(order)).residuals, outputs.residuals[order], 1e-6)


def test_the_last_tap_is_what_the_logits_are_made_of(scanned, outputs):
    assert_close(jax.jit(lambda decoder, x: decoder.unembed(x))(scanned, outputs.residuals[2]), outputs.logits, 1e-6)


@pytest.mark.parametrize(("stacking", "layer"), [("scanned", 1), ("unrolled", 0)])
def test_stop_after_gives_the_same_taps_without_logits(stacking, layer, request, tokens, outputs):
    out = run(request.getfixturevalue(stacking), tokens, taps=jnp.asarray([layer], jnp.int32), stop_after=layer)
    assert out.logits is None
    assert_close(out.residuals[0], outputs.residuals[layer], 1e-6)


def test_stop_after_computes_nothing_above(scanned, unrolled, tokens):
    def program(decoder, stop_after):
        return jax.jit(lambda d, t: d(t, taps=ALL[:1], stop_after=stop_after)).trace(decoder, tokens)

    assert re.findall(r"length=(\d+)", str(program(scanned, 1).jaxpr)) == ["2"]
    flops = [dict(program(unrolled, layer).lower().cost_analysis() or {})["flops"] for layer in range(3)]
    assert flops[1] > 1.8 * flops[0] and flops[2] > 2.6 * flops[0]


@pytest.mark.parametrize("layer", [-1, 3])
def test_stop_after_a_layer_that_is_not_there_is_refused(scanned, tokens, layer):
    with pytest.raises(InputError, match=f"stop_after={layer} is out of range; the decoder has layers 0 to 2"):
        scanned(tokens, stop_after=layer)


def test_a_period_of_several_layers_changes_nothing(tiny_config, random_decoder, tokens):
    one, two = (random_decoder(tiny_config(layers=4, period=period)) for period in (1, 2))
    taps = jnp.arange(4, dtype=jnp.int32)
    expected = run(one, tokens, taps=taps).residuals
    assert_close(run(two, tokens, taps=taps).residuals, expected, 1e-6)
    for stop in (0, 2):  # half a period; one and a half
        got = run(two, tokens, taps=jnp.asarray([stop], jnp.int32), stop_after=stop).residuals
        assert_close(got[0], expected[stop], 1e-6)


def test_remat_and_scan_change_neither_loss_nor_gradient(tiny_config, random_decoder, by_layer, tokens):
    @jax.jit
    def gradient(decoder):
        return jax.value_and_grad(lambda decoder: jnp.mean(jax.nn.logsumexp(decoder(tokens).logits, axis=-1)))(decoder)

    plain, *others = (random_decoder(config) for config in (tiny_config(2).unrolled(), tiny_config(2, remat=True)))
    value, expected = gradient(plain)
    assert all(np.abs(array).max() > 0 for array in jax.tree.leaves(expected))
    expected = by_layer(expected)
    for decoder in others:
        other_value, grads = gradient(decoder)
        assert abs(float(other_value - value)) < 1e-6
        other = by_layer(grads)
        assert other.keys() == expected.keys()
        for name, array in expected.items():
            assert_close(other[name], array, 1e-5)


def test_remat_recomputes_each_layer(tiny_config, random_decoder, tokens):
    """One checkpoint for each unrolled layer, or one in the body of the scan."""
    for config, count in ((tiny_config(), 0), (tiny_config(remat=True), 1), (tiny_config(remat=True).unrolled(), 3)):
        program = jax.jit(lambda decoder: decoder(tokens).logits).trace(random_decoder(config))
        assert str(program.jaxpr).count("prevent_cse=") == count


@pytest.mark.parametrize(("stacking", "pieces"), [("scanned", [12, 8, 1, 1, 1, 1]), ("unrolled", [12, *[1] * 12])])
def test_cached_decoding_equals_full_recomputation(stacking, pieces, request, scanned, tokens):
    decoder = request.getfixturevalue(stacking)
    ids = np.ones_like(tokens)
    ids[0, :7] = ids[1, :2] = 0
    tokens = np.asarray(tokens)
    expected = run(scanned, tokens, ids).logits
    step = jax.jit(lambda decoder, tokens, ids, cache: decoder(tokens, segment_ids=ids, cache=cache))
    cache, logits, ends = init_cache(decoder.config, len(tokens), LENGTH + 3), [], np.cumsum(pieces)
    for start, stop in zip(ends - pieces, ends, strict=True):
        out = step(decoder, tokens[:, start:stop], ids[:, start:stop], cache)
        cache, logits = out.cache, [*logits, out.logits]
    assert_close(np.concatenate(logits, axis=1)[ids > 0], expected[ids > 0], 1e-4)
    assert int(cache.slot) == LENGTH and cache.lengths_B[:3].tolist() == [17, 22, 24]
    assert cache.prompt_lengths_B[:3].tolist() == [5, 10, 12]


def test_logits_of_the_last_position_alone_equal_those_of_all(scanned, tokens, outputs):
    last = run(scanned, tokens, taps=None, logits="last").logits
    assert last.shape == (7, 1, 97)
    assert_close(last, outputs.logits[:, -1:], 1e-6)


def test_only_differences_of_positions_matter(scanned, tokens, outputs):
    shifted = jax.jit(lambda decoder, positions: decoder(tokens, positions=positions).logits)
    positions = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), tokens.shape)
    assert_close(shifted(scanned, positions), outputs.logits, 1e-6)
    assert_close(shifted(scanned, positions + 100), outputs.logits, 1e-4)
    assert np.abs(np.asarray(shifted(scanned, 2 * positions)) - outputs.logits).max() > 0.1


def test_bfloat16_stays_near_float32_and_scores_in_float32(tiny_config, random_decoder, tokens, outputs):
    out = run(random_decoder(tiny_config(dtype="bfloat16")), tokens)
    assert out.residuals.dtype == jnp.bfloat16 and out.logits.dtype == np.float32
    assert_close(out.logits, outputs.logits, 0.05)


def test_on_an_fsdp_mesh_weights_are_gathered_and_activations_stay(tiny_config, abstract_arrays):
    config, mesh = tiny_config(8, d_model=64, d_ff=96), make_mesh("fsdp=8")

    def place(path, leaf) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=parameter_sharding(leaf_name(path), leaf.shape, mesh))

    with abstract_arrays(), jax.set_mesh(mesh):
        decoder = jax.tree_util.tree_map_with_path(place, jax.eval_shape(lambda: Decoder(config, jax.random.key(0))))
        tokens = jax.ShapeDtypeStruct((16, 24), jnp.int32, sharding=batch_sharding(mesh, 2))
        taps = jnp.arange(8, dtype=jnp.int32)
        text = jax.jit(lambda decoder, tokens: decoder(tokens, taps=taps, stop_after=7).residuals).lower(decoder, tokens).compile().as_text()
    assert " all-gather(" in text and " all-reduce(" not in text
