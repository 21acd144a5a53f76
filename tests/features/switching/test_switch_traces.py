import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.errors import InputError
from qscope_jax.features.switching.switch_points import matched_points, switch_points
from qscope_jax.features.switching.switch_traces import switch_traces

PROMPTS = ["?", "?? a long prompt", "???"]


def planted(x_ND):
    """Two features: the planted dimension less 4, and one that is always 1."""
    return jnp.stack([x_ND[:, 0].astype(jnp.float32) - 4, x_ND[:, 1].astype(jnp.float32)], axis=1)


@pytest.fixture
def points(planted_model, answered):
    responses = answered((0, "0123a5"), (1, "789ab"), (0, "00000000"), (1, "2222"), (2, "3333333"))
    switches = switch_points(planted_model, PROMPTS, responses, "Latin")
    return switches, matched_points(planted_model, switches, PROMPTS, responses, "Latin", matches=1, seed=0)


def test_a_planted_feature_is_traced_to_its_peak(planted_model, points):
    found = switch_traces(planted_model, *points, {1: planted}, window=4, batch_size=4)[1]
    assert found.layer == 1 and found.offsets_O.tolist() == [-4, -3, -2, -1, 0, 1, 2, 3, 4]
    # Of "0123a5" and "789ab": nothing of a prompt counts, though one has letters, and nothing lies behind an answer's end.
    assert found.switched.counts_O.tolist() == [1, 2, 2, 2, 2, 2, 0, 0, 0]
    expected = np.array([0, (1 + 7) / 2, (2 + 8) / 2, (3 + 9) / 2, 10, (5 + 10) / 2]) - 4
    np.testing.assert_allclose(found.switched.mean_OS[:6, 0], expected, rtol=1e-6)
    np.testing.assert_allclose(found.switched.mean_OS[:6, 1], 1, rtol=1e-6)
    assert np.isnan(found.switched.mean_OS[6:]).all()
    np.testing.assert_allclose(found.switched.error_OS[1:6, 0], np.array([6, 6, 6, 0, 5]) / 2, rtol=1e-6)
    assert np.isnan(found.switched.error_OS[0]).all()


def test_answers_to_one_prompt_tell_as_much_as_one(planted_model, answered):
    switches = switch_points(planted_model, PROMPTS, answered((0, "3a"), (0, "3a"), (1, "7a"), (1, "7a")), "Latin")
    found = switch_traces(planted_model, switches, [], {1: planted}, window=1)[1].switched
    # As if 3 and 7 were there once each: the error of their mean is half their distance.
    assert found.counts_O[0] == 4 and found.mean_OS[0, 0] == 5 - 4 and found.error_OS[0, 0] == pytest.approx(2)
    alone = switch_traces(planted_model, switches[:2], [], {1: planted}, window=1)[1].switched
    assert alone.mean_OS[0, 0] == 3 - 4 and np.isnan(alone.error_OS).all()


def test_the_baseline_is_at_the_same_places(planted_model, points):
    found = switch_traces(planted_model, *points, {1: planted}, window=4)[1]
    # "00000000" at place 4 and "2222" at place 3: four tokens before either, three and none after them.
    assert found.baseline.counts_O.tolist() == [1, 2, 2, 2, 2, 1, 1, 1, 0]
    np.testing.assert_allclose(found.baseline.mean_OS[:5, 0], np.array([0, 1, 1, 1, 1]) - 4, rtol=1e-6)


def test_neither_batches_nor_layers_beside_change_a_trace(planted_model, character_model, points):
    rng = np.random.default_rng(0)
    W = jnp.asarray(rng.standard_normal((3, 32)), jnp.float32)
    for model in (planted_model, character_model):
        alone = switch_traces(model, *points, {1: lambda x: x @ W.T}, window=3, batch_size=1)[1]
        both = switch_traces(model, *points, {2: planted, 1: lambda x: x @ W.T}, window=3, batch_size=32)
        np.testing.assert_allclose(both[1].switched.mean_OS, alone.switched.mean_OS, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(both[1].baseline.mean_OS, alone.baseline.mean_OS, rtol=1e-3, atol=1e-3)
        assert list(both) == [2, 1] and both[2].switched.mean_OS.shape == (7, 2)


def test_a_trace_is_of_what_the_model_computes_on_the_whole_answer(character_model, points):
    point = points[0][0]
    text = character_model.tokenizer.decode([*point.prompt_ids, *point.answer_ids])
    x = character_model.residuals([text], [2]).values[0, 0]
    found = switch_traces(character_model, [point], [], {2: lambda x: x}, window=2)[2]
    first = len(point.prompt_ids) + point.place
    np.testing.assert_allclose(found.switched.mean_OS[:4], np.asarray(x)[first - 2 : first + 2], rtol=1e-3, atol=1e-3)
    assert found.baseline.counts_O.sum() == 0


def test_progress_counts_the_answers_read(planted_model, points):
    told = []
    switch_traces(planted_model, *points, {0: planted}, window=1, batch_size=3, progress=lambda *n: told.append(n))
    assert told == [(3, 4), (4, 4)]


def test_nothing_to_trace_is_refused(planted_model, points):
    with pytest.raises(InputError, match="0 switches"):
        switch_traces(planted_model, [], [], {0: planted})
    with pytest.raises(InputError, match="0 layers"):
        switch_traces(planted_model, *points, {})
    with pytest.raises(InputError, match="window of 0"):
        switch_traces(planted_model, *points, {0: planted}, window=0)
    with pytest.raises(InputError, match="layer 3 is out of range"):
        switch_traces(planted_model, *points, {3: planted})
