import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.errors import InputError
from qscope_jax.models.sampling import Sampler, SamplingConfig, log_probabilities, penalise, sample

VOCABULARY = 12
DRAWS = 20_000


@pytest.fixture(scope="module")
def draw():
    """Tokens drawn from logits [B, V], one a row. Rows and vocabulary are filled up, so that a single program serves all tests."""
    drawn = jax.jit(sample)

    def run(logits, step: int | np.ndarray = 0, seen=(), **settings) -> np.ndarray:
        filled, marked = np.full((DRAWS, VOCABULARY), -1e9, np.float32), np.zeros((DRAWS, VOCABULARY), bool)
        rows, vocabulary = np.shape(logits)
        filled[:rows, :vocabulary] = logits
        marked[: len(seen), :vocabulary] = seen or False
        sampler = Sampler.make(SamplingConfig(**settings), (), DRAWS)
        return np.asarray(drawn(jnp.asarray(filled), jnp.asarray(marked), sampler, jnp.asarray(step, jnp.int32)))[:rows]

    return run


@pytest.fixture(scope="module")
def logits() -> np.ndarray:
    """Of one distribution, no token of which is rare; the most probable token is not the first."""
    return np.random.default_rng(0).permutation(np.linspace(-1, 1.2, VOCABULARY)).astype(np.float32)


def expected_distribution(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Plainly: the k most probable tokens; of these, renormalised, the fewest whose probability reaches p; renormalised."""
    probabilities = np.exp(np.float64(logits) / temperature)
    order = np.argsort(-probabilities)
    kept = order[: top_k or None]
    total = 0.0
    for count, token in enumerate(kept, 1):
        total += probabilities[token] / probabilities[kept].sum()
        if total >= top_p and top_p < 1:
            kept = kept[:count]
            break
    result = np.zeros(len(logits))
    result[kept] = probabilities[kept] / probabilities[kept].sum()
    return result


def test_greedy_takes_the_most_probable_token_and_the_first_of_equals(draw):
    assert draw([[0.0, 3.0, 1.0], [2.0, 5.0, 5.0]]).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1, 0, 1), (0.5, 0, 1), (2, 0, 1), (1, 4, 1), (1, 50, 1), (1, 0, 0.6), (0.7, 0, 1e-6), (1.5, 6, 0.5), (1, 1, 1)],
)
def test_draws_follow_the_restricted_distribution(draw, logits, temperature, top_k, top_p):
    drawn = draw(np.tile(logits, (DRAWS, 1)), temperature=float(temperature), top_k=top_k, top_p=float(top_p))
    expected = expected_distribution(logits, temperature, top_k, top_p)
    frequencies = np.bincount(drawn, minlength=VOCABULARY) / DRAWS
    # Every token that is kept has a probability of at least 0.3 %, so that it is surely drawn: the kept set is compared exactly.
    assert expected[expected > 0].min() > 0.003
    assert np.array_equal(frequencies > 0, expected > 0)
    assert np.abs(frequencies - expected).max() < 4 * np.sqrt(0.25 / DRAWS)


def test_ties_at_the_edge_of_top_k_keep_k_tokens(draw):
    assert set(draw(np.tile([0.0, 1.0, 1.0, 1.0], (2000, 1)), temperature=1.0, top_k=2).tolist()) == {1, 2}


def test_a_row_draws_by_its_own_seed_whatever_its_neighbours(draw, logits):
    rows = np.stack([np.roll(logits, shift) for shift in range(8)])
    others = np.random.default_rng(1).standard_normal(rows.shape)
    for settings in ({}, {"top_k": 5}):
        settings = {"temperature": 1.5, "seed": 7, **settings}
        drawn = [draw(np.where(np.arange(8)[:, None] == row, rows, others), **settings)[row] for row in range(8)]
        assert draw(rows, **settings).tolist() == drawn


def test_seed_step_and_row_each_change_the_draw(draw, logits):
    many = np.tile(logits, (64, 1))
    first = draw(many, temperature=1.0)
    assert np.array_equal(first, draw(many, temperature=1.0))
    assert len(set(first)) > 1
    assert not np.array_equal(first, draw(many, temperature=1.0, seed=1))
    assert not np.array_equal(first, draw(many, temperature=1.0, step=1))


def test_each_row_may_be_at_a_step_of_its_own(draw, logits):
    many = np.tile(logits, (64, 1))
    steps = np.arange(DRAWS, dtype=np.int32) % 2
    mixed = draw(many, step=steps, temperature=1.0)
    assert mixed.tolist() == np.where(steps[:64] == 0, draw(many, temperature=1.0), draw(many, step=1, temperature=1.0)).tolist()


@pytest.mark.parametrize(("temperature", "divisor"), [(1.0, 1.0), (0.5, 0.5), (0.0, 1.0)])
def test_log_probabilities_are_those_of_the_softmax_at_the_temperature(logits, temperature, divisor):
    rows = np.stack([logits, -logits, 1000 * logits])
    tokens = np.asarray([0, 3, int(np.argmax(logits))], np.int32)
    scaled = rows.astype(np.float64) / divisor
    expected = scaled - np.log(np.exp(scaled - scaled.max(axis=1, keepdims=True)).sum(axis=1, keepdims=True)) - scaled.max(axis=1, keepdims=True)
    got = log_probabilities(jnp.asarray(rows), jnp.asarray(tokens), jnp.float32(temperature))
    np.testing.assert_allclose(got, expected[np.arange(3), tokens], rtol=1e-6, atol=1e-6)


def test_penalty_equals_that_of_transformers(logits):
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    tokens = [[3, 3, 8, 1], [0, 11, 5, 5]]
    scores = np.stack([logits, -logits])
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.LongTensor(tokens), torch.FloatTensor(scores)).numpy()
    seen = np.zeros(scores.shape, bool)
    np.put_along_axis(seen, np.asarray(tokens), True, axis=1)
    np.testing.assert_allclose(penalise(jnp.asarray(scores), jnp.asarray(seen), jnp.float32(1.3)), expected, rtol=1e-6)


def test_penalty_turns_the_choice_away_from_a_seen_token(draw):
    logits, seen = [[2.0, 1.9, -1.0]], [[True, False, False]]
    assert draw(logits, seen=seen).tolist() == [0]
    assert draw(logits, seen=seen, repetition_penalty=1.2).tolist() == [1]


def test_settings_are_values_and_compile_nothing(draw, logits, count_compilations):
    many = np.tile(logits, (8, 1))
    draw(many)
    with count_compilations() as compilations:
        for settings in ({"temperature": 0.3}, {"top_k": 3, "temperature": 1.0}, {"top_p": 0.4, "temperature": 2.0}):
            draw(many, **settings, repetition_penalty=2.0, seed=5)
    assert compilations.count == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("repetition_penalty", 0.0),
        ("max_new_tokens", 0),
        ("seed", -1),
        ("seed", 2**32),
        ("stop_token_ids", tuple(range(17))),
    ],
)
def test_settings_out_of_range_are_named(name, value):
    with pytest.raises(InputError, match=f"{name} is .*, expected"):
        SamplingConfig(**{name: value})


def test_the_largest_seed_is_a_seed():
    assert Sampler.make(SamplingConfig(seed=2**32 - 1), (), 2).keys_B.shape == (2,)


def test_stop_tokens_are_the_models_unless_given():
    def stops(config: SamplingConfig) -> list[int]:
        return [token for token in Sampler.make(config, (7, 8), 1).stop_ids.tolist() if token >= 0]

    assert stops(SamplingConfig()) == [7, 8]
    assert stops(SamplingConfig(stop_token_ids=())) == []
    assert stops(SamplingConfig(stop_token_ids=(1, 2, 3))) == [1, 2, 3]


def test_a_model_with_too_many_stop_tokens_is_refused():
    with pytest.raises(InputError, match="the model has 17 stop tokens; choose at most 16"):
        Sampler.make(SamplingConfig(), tuple(range(17)), 1)
