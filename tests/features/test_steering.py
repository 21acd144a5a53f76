from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.errors import InputError, ShapeError
from qscope_jax.features.steering import (
    ablate,
    add_directions,
    clamp,
    combine,
    dose_sweep,
    project_out,
    random_control,
    random_features,
    residual_norms,
    sign_flipped,
    steer,
)
from qscope_jax.models.sampling import SamplingConfig
from qscope_jax.sae.autoencoder import densify

TEXTS = ["steer this", "and that one", "x"]
# Every generation has six rows, so that they share a program.
PROMPTS, DOSES = ["up", "or down"], [0.0, 4.0, -4.0]
SHORT = SamplingConfig(max_new_tokens=6)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AddByHand:
    """`h + shift` after a layer, a shift for each row of the batch."""

    layer: jax.Array
    shift_BD: jax.Array

    def check(self, num_layers, d_model, rows):
        assert self.shift_BD.shape == (rows, d_model)

    def touches(self, layer):
        return self.layer == layer

    def __call__(self, x_BTD, layer, context):
        return x_BTD + self.shift_BD[:, None]


@pytest.fixture
def logits(character_model):
    """Logits of the texts under edits, at their tokens."""

    def run(*edits, texts=TEXTS) -> np.ndarray:
        values, mask = character_model.logits(texts, edits=edits)
        return np.asarray(values)[mask]

    return run


@pytest.fixture
def streams(character_model):
    """Residual streams [M, tokens, D] of the texts after all three layers, under edits."""

    def run(*edits) -> np.ndarray:
        found = character_model.residuals(TEXTS, [0, 1, 2], edits=edits)
        return np.asarray(found.values)[:, found.mask]

    return run


def by_hand(layer: int, shift) -> AddByHand:
    return AddByHand(jnp.int32(layer), jnp.broadcast_to(jnp.asarray(shift, jnp.float32), (len(TEXTS), 32)))


def assert_close(got, expected):
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())


def test_steering_adds_alpha_times_the_decoder_row_after_the_saes_layer(logits, saes):
    expected = logits(by_hand(1, 3.0 * saes[1].direction(7)))
    assert_close(logits(steer(saes[1], 7, 3.0)), expected)
    assert np.abs(expected - logits()).max() > 0.1 * np.abs(expected).max()


def test_several_features_add_up_each_with_its_own_strength(logits, saes):
    sae = saes[0]
    shift = 2.0 * sae.direction(3) - 1.0 * sae.direction(4) + 0.5 * sae.direction(9)
    assert_close(logits(steer(sae, [3, 4, 9], [2.0, -1.0, 0.5])), logits(by_hand(0, shift)))
    assert_close(logits(steer(sae, [3, 4], 2.0)), logits(by_hand(0, 2.0 * (sae.direction(3) + sae.direction(4)))))


def test_strengths_of_each_row_equal_separate_runs(logits, character_model, saes):
    strengths = np.array([[1.0, 0.0], [-2.0, 3.0], [0.0, 0.0]], np.float32)
    together, mask = character_model.logits(TEXTS, edits=[steer(saes[1], [2, 5], strengths)])
    for row, strength in enumerate(strengths):
        alone, _ = character_model.logits(TEXTS, edits=[steer(saes[1], [2, 5], np.tile(strength, (3, 1)))])
        np.testing.assert_array_equal(together[row][mask[row]], alone[row][mask[row]])
    np.testing.assert_array_equal(together[2], character_model.logits(TEXTS)[0][2])


def test_in_residual_units_what_is_added_has_strength_times_the_norm(streams, saes):
    norm = 40.0
    for strength, features in ((0.5, 3), (-2.0, 11)):
        added = (streams(steer(saes[1], features, strength, unit="residual", residual_norm=norm)) - streams())[1]
        np.testing.assert_allclose(np.linalg.norm(added, axis=-1), abs(strength) * norm, rtol=1e-3)
        direction = np.asarray(saes[1].direction(features))
        np.testing.assert_allclose(added @ direction / np.linalg.norm(direction), strength * norm, rtol=1e-3)


def test_the_residual_norm_is_the_median_over_tokens_but_the_first(character_model, streams):
    lengths = [len(text) for text in TEXTS]
    # A text of one token has nothing but its first.
    later = np.concatenate([np.arange(length) > 0 if length > 1 else [True] for length in lengths])
    expected = np.median(np.linalg.norm(streams(), axis=-1)[:, later], axis=1)
    norms = residual_norms(character_model, TEXTS, [2, 0])
    assert list(norms) == [2, 0]
    np.testing.assert_allclose([norms[0], norms[2]], expected[[0, 2]], rtol=1e-5)


def test_edits_combined_over_layers_equal_edits_one_after_the_other(logits, saes):
    edits = [
        steer(saes[0], [1, 2, 3], 1.0, positions="2-4"),
        steer(saes[2], 6, np.array([[1.0], [2.0], [-3.0]])),
        steer(saes[0], 8, -2.0, phase="prefill"),
    ]
    combined = combine(edits)
    assert combined.directions_WD.shape == (6, 32) and combined.strengths_BW.shape == (3, 6)
    assert_close(logits(combined), logits(*edits))
    np.testing.assert_array_equal(logits(combine(edits[:1])), logits(edits[0]))


def test_positions_and_phase_reach_the_edit(character_model, streams, saes):
    moved = np.abs((streams(steer(saes[0], 1, 5.0, positions=[0, 1])) - streams())[0]).max(axis=-1) > 1e-3
    assert moved.tolist() == [i < 2 for text in TEXTS for i in range(len(text))]
    assert not np.any(streams(steer(saes[0], 1, 5.0, phase="decode")) != streams())


def test_the_sign_flipped_control_is_the_negative_strength(logits, saes):
    edit = steer(saes[1], [2, 3], [1.0, -2.0])
    np.testing.assert_array_equal(logits(sign_flipped(edit)), logits(steer(saes[1], [2, 3], [-1.0, 2.0])))


def test_the_random_control_keeps_lengths_and_strengths_and_no_direction(saes):
    edit = steer(saes[1], [1, 4, 6], [1.0, 2.0, -1.0], positions=-1, phase="decode")
    drawn = random_control(edit, np.random.default_rng(0))
    lengths = [np.linalg.norm(one.directions_WD, axis=1) for one in (edit, drawn)]
    np.testing.assert_allclose(lengths[1], lengths[0], rtol=1e-6)
    assert lengths[1][3] == 0 and np.abs(np.sum(edit.directions_WD * drawn.directions_WD, axis=1)[:3] / lengths[0][:3] ** 2).max() < 0.9
    for name in ("layers_W", "strengths_BW"):
        np.testing.assert_array_equal(getattr(drawn, name), getattr(edit, name))
    assert drawn.where_W is edit.where_W
    again, other = random_control(edit, np.random.default_rng(0)), random_control(edit, np.random.default_rng(1))
    np.testing.assert_array_equal(again.directions_WD, drawn.directions_WD)
    assert np.any(other.directions_WD != drawn.directions_WD)


def test_rounding_the_number_of_directions_up_changes_no_result(logits, saes):
    three = steer(saes[1], [1, 4, 6], [1.0, 2.0, -1.0])
    assert [steer(saes[1], list(range(n)), 1.0).directions_WD.shape[0] for n in (1, 2, 3, 4, 5, 9)] == [1, 2, 4, 4, 8, 16]
    unrounded = jax.tree.map(lambda leaf: leaf[:, :3] if leaf.shape == (1, 4) else leaf[:3], three)
    assert unrounded.strengths_BW.shape == (1, 3) and unrounded.where_W.ranges.shape[0] == 3
    assert_close(logits(three), logits(unrounded))
    assert_close(logits(three), logits(add_directions(1, jnp.stack([saes[1].direction(f) for f in (1, 4, 6)]), [1.0, 2.0, -1.0])))


def activations(stream, sae) -> np.ndarray:
    return np.asarray(densify(sae.encode(stream[sae.layer]), sae.num_features))


def test_clamping_adds_what_is_missing_along_the_feature(streams, saes):
    sae, plain = saes[1], streams()
    before = activations(plain, sae)
    edited = streams(clamp(sae, [2, 9], [0.0, 30.0]))[1]
    expected = plain[1] - before[:, [2]] * np.asarray(sae.direction(2)) + (30.0 - before[:, [9]]) * np.asarray(sae.direction(9))
    assert_close(edited, expected)
    np.testing.assert_array_equal(streams(clamp(sae, 9, 30.0, positions=99)), plain)


def test_ablation_removes_a_feature_where_it_is_active_and_touches_nothing_else(streams, saes):
    sae, plain = saes[1], streams()
    before = activations(plain, sae)
    feature = int(np.argmax((before > 0).sum(axis=0) * ((before == 0).any(axis=0))))
    active = before[:, feature] > 0
    assert active.any() and not active.all()
    edited = streams(ablate(sae, feature))[1]
    assert_close(edited[active], (plain[1] - before[:, [feature]] * np.asarray(sae.direction(feature)))[active])
    np.testing.assert_array_equal(edited[~active], plain[1][~active])


def test_projecting_out_leaves_nothing_along_the_direction(streams, saes):
    direction = np.asarray(saes[1].direction(4))
    plain, all_of_it, half = streams()[1], streams(project_out(saes[1], 4))[1], streams(project_out(saes[1], 4, share=0.5))[1]
    scale = np.abs(plain @ direction).max()
    assert np.abs(all_of_it @ direction).max() < 1e-4 * scale
    np.testing.assert_allclose(half @ direction, 0.5 * plain @ direction, atol=1e-4 * scale)


def test_random_features_are_drawn_from_those_alive_and_never_those_excluded(saes):
    alive = np.arange(24) % 2 == 0
    draws = [random_features(saes[0], 4, seed=seed, exclude=[0, 2], alive=alive) for seed in range(20)]
    assert all(len(set(draw)) == 4 and not {0, 2} & set(draw) and alive[draw].all() for draw in draws)
    assert len({tuple(draw) for draw in draws}) > 10
    assert random_features(saes[0], 4, seed=3) == random_features(saes[0], 4, seed=3)
    assert random_features(saes[0], 24) == list(range(24))
    assert random_features(saes[0], 10, exclude=[0, 2], alive=alive) == list(range(4, 24, 2))
    assert alive.sum() == 12


def texts_of(completions) -> list[str]:
    return [completion.text for completion in completions]


def test_dose_zero_is_the_unsteered_generation_and_every_dose_its_own_run(character_model, saes):
    sweep = dose_sweep(character_model, PROMPTS, saes[1], [3, 5], DOSES, sampling=SHORT)
    assert list(sweep) == DOSES
    assert texts_of(sweep[0.0]) == texts_of(character_model.generate(PROMPTS * 3, SHORT))[:2]
    for dose in DOSES:
        edit = steer(saes[1], [3, 5], np.full((6, 2), dose, np.float32))
        assert texts_of(sweep[dose]) == texts_of(character_model.generate(PROMPTS * 3, SHORT, edits=[edit]))[:2]
    assert len({tuple(texts_of(rows)) for rows in sweep.values()}) == 3
    assert [completion.prompt for completion in sweep[4.0]] == PROMPTS


def test_a_sweep_takes_the_settings_of_steer_and_further_edits(character_model, saes):
    settings, further = {"unit": "residual", "residual_norm": 50.0, "phase": "decode"}, ablate(saes[2], 1)
    sweep = dose_sweep(character_model, PROMPTS, saes[1], 3, [0.0, 1.5, 2.0], sampling=SHORT, edits=[further], **settings)
    edit = steer(saes[1], 3, np.full((6, 1), 1.5, np.float32), **settings)
    alone = texts_of(character_model.generate(PROMPTS * 3, SHORT, edits=[edit, further]))[:2]
    assert texts_of(sweep[1.5]) == alone != texts_of(sweep[0.0])


def test_another_feature_strength_layer_or_place_compiles_nothing(character_model, saes, count_compilations):
    def run(sae, features, strengths, **settings) -> list[str]:
        edit = steer(sae, features, np.tile(np.asarray(strengths, np.float32), (6, 1)), **settings)
        return texts_of(character_model.generate(PROMPTS * 3, SHORT, edits=[edit]))

    results = [run(saes[0], [1, 2], [3.0, 1.0])]
    with count_compilations() as compilations:
        results.append(run(saes[2], [17, 5], [-9.0, 20.0]))
        results.append(run(saes[1], [0, 23], [40.0, 40.0], positions="1-2,-1", phase="prefill"))
    assert compilations.count == 0
    assert len({tuple(result) for result in results}) == 3


def test_an_edit_that_does_not_fit_the_model_or_the_batch_is_refused_before_anything_runs(character_model, saes):
    width = character_model.config.d_model
    beyond = add_directions(character_model.config.num_layers, np.ones((1, width)), 1.0)
    narrow = add_directions(0, np.ones((1, width - 1)), 1.0)
    for edit, error, told in (
        (beyond, InputError, "acts after layer 3"),
        (narrow, ShapeError, "made for another model"),
        (steer(saes[0], 1, np.ones((5, 1))), InputError, "values for 5 prompts, the batch has 2"),
    ):
        with pytest.raises(error, match=told):
            character_model.generate(PROMPTS, SHORT, edits=[edit])
        with pytest.raises(error, match=told):
            character_model.logits(PROMPTS, edits=[edit])


def test_a_prompt_draws_with_the_same_seed_at_every_dose(character_model, saes):
    drawn = dose_sweep(character_model, PROMPTS, saes[1], 3, [0.0, 1e-9, 1e-8], sampling=SamplingConfig(max_new_tokens=6, temperature=1.0))
    first, *others = ([completion.token_ids for completion in rows] for rows in drawn.values())
    assert all(other == first for other in others)


def test_what_cannot_be_steered_is_refused_in_one_line(character_model, saes):
    sae, other = saes[0], steer(saes[0], 1, np.ones((3, 1), np.float32))
    wide = add_directions(0, np.ones((1, 8), np.float32), 1.0)
    cases = [
        (InputError, "feature 24 is out of range", lambda: steer(sae, 24, 1.0)),
        (InputError, "feature -1 is out of range", lambda: steer(sae, [-1], 1.0)),
        (InputError, "no feature given", lambda: steer(sae, [], 1.0)),
        (InputError, r"strengths have shape \(2,\), expected one number, or one for each of 3", lambda: steer(sae, [1, 2, 3], [1.0, 2.0])),
        (InputError, "must be finite", lambda: steer(sae, 1, float("nan"))),
        (InputError, "unit is 'norm', expected one of raw, residual", lambda: steer(sae, 1, 1.0, unit="norm")),
        (InputError, "needs residual_norm, got None", lambda: steer(sae, 1, 1.0, unit="residual")),
        (InputError, "needs residual_norm, got 0.0", lambda: steer(sae, 1, 1.0, unit="residual", residual_norm=0.0)),
        (InputError, "phase is 'later'", lambda: steer(sae, 1, 1.0, phase="later")),
        (InputError, "cannot read 'five'", lambda: steer(sae, 1, 1.0, positions="five")),
        (InputError, "layer is -1", lambda: add_directions(-1, np.ones((1, 8), np.float32), 1.0)),
        (InputError, "given twice", lambda: clamp(sae, [1, 1], 0.0)),
        (InputError, "feature 99 is out of range", lambda: ablate(sae, 99)),
        (InputError, "feature 99 is out of range", lambda: project_out(sae, 99)),
        (InputError, "must be finite", lambda: project_out(sae, 1, share=float("inf"))),
        (InputError, "no edits", lambda: combine([])),
        (InputError, "for 2 and for 3 prompts", lambda: combine([other, steer(sae, 1, np.ones((2, 1), np.float32))])),
        (ShapeError, "width 8 and of 32", lambda: combine([other, wide])),
        (InputError, "cannot draw 25 features; 24 are left", lambda: random_features(sae, 25)),
        (InputError, "cannot draw 23 features; 22 are left", lambda: random_features(sae, 23, exclude=[3, 4])),
        (InputError, "feature 24 is out of range", lambda: random_features(sae, 1, exclude=[24])),
        (ShapeError, r"alive has shape \(3,\)", lambda: random_features(sae, 1, alive=np.ones(3, bool))),
        (InputError, "give one or more, none of them twice", lambda: dose_sweep(character_model, TEXTS, sae, 1, [])),
        (InputError, "give one or more, none of them twice", lambda: dose_sweep(character_model, TEXTS, sae, 1, [1.0, 1.0])),
        (InputError, "non-empty list", lambda: dose_sweep(character_model, [], sae, 1, [1.0])),
        (InputError, "non-empty list", lambda: dose_sweep(character_model, "one text", sae, 1, [1.0])),
    ]
    for kind, line, call in cases:
        with pytest.raises(kind, match=line) as caught:
            call()
        assert "\n" not in str(caught.value)
