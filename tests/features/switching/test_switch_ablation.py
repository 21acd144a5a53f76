from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.errors import InputError, ShapeError
from qscope_jax.features.steering import add_directions
from qscope_jax.features.switching.switch_ablation import AblationConfig, ablate_switches, next_probabilities
from qscope_jax.features.switching.switch_points import switch_points
from qscope_jax.models.sampling import Sampler, SamplingConfig, sample
from tests.features.switching.planted import D, planted_embedding, planted_head

PROMPTS = ["?", "?? and", "???"]
LAST = 2
CONFIG = AblationConfig(doses=(0.0, 1.0, 4.0), batch_size=2)
LETTERS = np.array([chr(token + 30).isalpha() for token in range(97)])


def unit(place: int) -> np.ndarray:
    return np.eye(1, D, place, dtype=np.float32)


@pytest.fixture
def points(planted_model, answered):
    return switch_points(planted_model, PROMPTS, answered((0, "0123a"), (1, "59b"), (0, "7c")), "Latin")


def by_hand(digit: int, shift: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    """Next-token probabilities of the planted model after a digit, when something is added to its last state."""
    x = planted_embedding()[digit + ord("0") - 30] + shift
    logits = planted_head() @ (x / np.sqrt(np.mean(x**2) + eps))
    return np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()


def test_the_planted_direction_lowers_the_script_as_the_formula_says(planted_model, points):
    found = ablate_switches(planted_model, points, LAST, {"own": unit(0), "control": unit(7)}, "Latin", CONFIG)
    assert found.prompts_N.tolist() == [0, 1, 0] and found.doses == (0.0, 1.0, 4.0)
    for name, place in (("own", 0), ("control", 7)):
        expected = [[by_hand(digit, -dose * unit(place)[0])[LETTERS].sum() for digit in (3, 9, 7)] for dose in CONFIG.doses]
        np.testing.assert_allclose(found.values["probability"][name], expected, rtol=1e-5)
    observed = [by_hand(digit, -4 * unit(0)[0])[ord(letter) - 30] for digit, letter in ((3, "a"), (9, "b"), (7, "c"))]
    np.testing.assert_allclose(found.values["observed"]["own"][2], observed, rtol=1e-5)
    own, control = found.values["probability"]["own"], found.values["probability"]["control"]
    assert (np.diff(own, axis=0) < 0).all() and (own[2] < control[2]).all()
    assert found.residual_norm == pytest.approx(np.sqrt(7**2 + 1))


def test_dose_zero_is_the_model_itself_and_a_negative_one_adds(planted_model, points):
    found = ablate_switches(planted_model, points, LAST, {"own": unit(0)}, "Latin", AblationConfig(doses=(-4.0, 0.0)))
    np.testing.assert_allclose(
        found.values["probability"]["own"][1], [by_hand(digit, 0 * unit(0)[0])[LETTERS].sum() for digit in (3, 9, 7)], rtol=1e-5
    )
    assert (found.values["probability"]["own"][0] > found.values["probability"]["own"][1]).all()


def test_directions_of_one_name_are_tried_one_by_one_and_averaged(planted_model, points):
    both = np.concatenate([unit(0), unit(7)])
    found = ablate_switches(planted_model, points, LAST, {"pair": both, "own": unit(0), "other": unit(7)}, "Latin", CONFIG).values["probability"]
    np.testing.assert_allclose(found["pair"], (found["own"] + found["other"]) / 2, rtol=1e-6)


def test_doses_in_units_of_the_states_norm_do_not_depend_on_a_directions_length(planted_model, points):
    config = replace(CONFIG, unit="residual", doses=(0.0, 0.5))
    found = ablate_switches(planted_model, points, LAST, {"short": 0.1 * unit(0), "long": 9 * unit(0)}, "Latin", config)
    np.testing.assert_allclose(found.values["probability"]["short"], found.values["probability"]["long"], rtol=1e-4)
    expected = [by_hand(digit, -0.5 * found.residual_norm * unit(0)[0])[LETTERS].sum() for digit in (3, 9, 7)]
    np.testing.assert_allclose(found.values["probability"]["long"][1], expected, rtol=1e-5)


def test_only_the_last_token_is_changed_and_batches_change_nothing(character_model, answered):
    """On a model whose layers do something, an edit below the last layer acts at one position alone."""
    points = switch_points(character_model, PROMPTS, answered((0, "0123a"), (1, "59b"), (2, "7c")), "Latin")
    direction = np.random.default_rng(0).standard_normal((1, D)) * 20
    found = ablate_switches(character_model, points, 1, {"own": direction}, "Latin", CONFIG)
    alone = ablate_switches(character_model, points[1:2], 1, {"own": direction}, "Latin", replace(CONFIG, batch_size=1))
    np.testing.assert_allclose(found.values["probability"]["own"][:, 1], alone.values["probability"]["own"][:, 0], rtol=1e-3)
    text = "?? and59"
    edit = add_directions(1, direction, -4.0, positions=len(text) - 1)
    logits, _ = character_model.logits([text], edits=[edit])
    row = np.asarray(logits[0, len(text) - 1], np.float64)
    share = np.exp(row - row.max())[LETTERS].sum() / np.exp(row - row.max()).sum()
    assert found.values["probability"]["own"][2, 1] == pytest.approx(share, rel=1e-3)


def test_a_sweep_compiles_once_whatever_its_doses_and_directions(planted_model, points, count_compilations):
    ablate_switches(planted_model, points, LAST, {"own": unit(0)}, "Latin", CONFIG)
    with count_compilations() as compiled:
        ablate_switches(planted_model, points, LAST, {"a": unit(3), "b": 2 * unit(5)}, "Latin", replace(CONFIG, doses=(0.0, 3.0, 7.0, 9.0)))
    assert compiled.count == 0


def test_what_is_drawn_with_temperature_and_top_p_is_known_exactly():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.standard_normal((1, 12)) * 2, jnp.float32)
    mask = jnp.asarray(rng.random(12) < 0.4)
    for settings in ({"temperature": 1.0, "top_p": 0.8}, {"temperature": 1.5, "top_k": 4}, {"temperature": 0.0}):
        rows = 4000
        sampler = Sampler.make(SamplingConfig(**settings), (), rows)
        drawn = np.asarray(sample(jnp.repeat(logits, rows, axis=0), jnp.zeros((rows, 12), bool), sampler, jnp.int32(0)))
        share = np.asarray(mask)[drawn].mean()
        found = np.asarray(next_probabilities(logits, mask, jnp.asarray([3]), Sampler.make(SamplingConfig(**settings), (), 1)))[:, 0]
        assert found[1] == pytest.approx(share, abs=4 * np.sqrt(0.25 / rows))
        plain = np.exp(np.asarray(logits[0])) / np.exp(np.asarray(logits[0])).sum()
        np.testing.assert_allclose(found[[0, 2]], [plain[np.asarray(mask)].sum(), plain[3]], rtol=1e-5)


def test_continuations_drawn_anew_switch_as_often_as_the_probability_says(planted_model, points):
    config = AblationConfig(doses=(0.0, 4.0), sampling=SamplingConfig(temperature=1.0), draws=60, draw_tokens=1, batch_size=4)
    found = ablate_switches(planted_model, points, LAST, {"own": unit(0)}, "Latin", config)
    np.testing.assert_allclose(found.values["resampled"]["own"], found.values["drawn"]["own"], atol=4 * np.sqrt(0.25 / 60))
    longer = ablate_switches(planted_model, points, LAST, {"own": unit(0)}, "Latin", replace(config, draw_tokens=6))
    assert (longer.values["resampled"]["own"] >= found.values["resampled"]["own"]).all()


def test_a_curve_is_a_mean_over_switches_with_prompts_as_clusters(planted_model, points):
    found = ablate_switches(planted_model, points, LAST, {"own": unit(0)}, "Latin", CONFIG)
    mean, error = found.curve("probability", "own")
    values = found.values["probability"]["own"]
    np.testing.assert_allclose(mean, values.mean(axis=1))
    sums = np.stack([values[:, 0] + values[:, 2] - 2 * mean, values[:, 1] - mean])
    np.testing.assert_allclose(error, np.sqrt(2 * (sums**2).sum(axis=0)) / 3)


def test_progress_counts_passes(planted_model, points):
    told = []
    directions = {"own": unit(0), "pair": np.concatenate([unit(2), unit(3)])}
    ablate_switches(planted_model, points, LAST, directions, "Latin", CONFIG, progress=lambda *n: told.append(n))
    assert told[-1] == (7, 7) and len(told) == 7


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"doses": ()}, InputError, "doses are"),
        ({"doses": (1.0, 1.0)}, InputError, "none of them twice"),
        ({"doses": (float("nan"),)}, InputError, "finite"),
        ({"unit": "metres"}, InputError, "unit is 'metres', expected one of raw, residual"),
        ({"draws": -1}, InputError, "-1 draws"),
        ({"batch_size": 0}, InputError, "batches of 0"),
    ],
)
def test_sweeps_out_of_range_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        replace(CONFIG, **change)


def test_what_cannot_be_taken_away_is_refused(planted_model, points):
    with pytest.raises(ShapeError, match=r"directions 'own' have shape \(1, 5\).*\[W, 32\]"):
        ablate_switches(planted_model, points, LAST, {"own": np.ones((1, 5))}, "Latin")
    with pytest.raises(InputError, match="'own' has length 0"):
        ablate_switches(planted_model, points, LAST, {"own": np.zeros((1, D))}, "Latin")
    with pytest.raises(InputError, match="layer 3 is out of range"):
        ablate_switches(planted_model, points, 3, {"own": unit(0)}, "Latin")
    with pytest.raises(InputError, match="0 switches and 1 directions"):
        ablate_switches(planted_model, [], LAST, {"own": unit(0)}, "Latin")
