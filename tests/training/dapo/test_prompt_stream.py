import pytest

from qscope_jax.errors import InputError
from qscope_jax.training.checkpoint import StreamState
from qscope_jax.training.dapo.prompt_stream import PromptStream, draw_seeds


def test_every_pass_has_each_prompt_once_in_an_order_of_its_own():
    stream = PromptStream(6, 4, seed=1)
    drawn = [next(stream) for _ in range(6)]
    prompts = [prompt for batch in drawn for prompt in batch.prompts]
    passes = [prompts[start : start + 6] for start in range(0, 24, 6)]
    assert all(sorted(one) == list(range(6)) for one in passes) and len({tuple(one) for one in passes}) > 1
    assert [draw for batch in drawn for draw in batch.draws] == list(range(24))


def test_a_place_is_returned_to():
    stream, other = PromptStream(5, 3, seed=2), PromptStream(5, 3, seed=2)
    for _ in range(3):
        next(stream)
    other.set_state(stream.get_state())
    assert [next(stream) for _ in range(4)] == [next(other) for _ in range(4)]


def test_a_place_among_other_prompts_is_refused():
    with pytest.raises(InputError, match="had 6 prompts, now there are 5"):
        PromptStream(5, 3).set_state(StreamState({}, {"drawn": 3, "prompts": 6}))
    with pytest.raises(InputError, match="0 prompts in batches of 3"):
        PromptStream(0, 3)


def test_seeds_differ_between_draws_and_runs_and_are_those_of_the_sampler_s_range():
    seeds = draw_seeds(0, range(1000))
    assert len(set(seeds)) == 1000 and all(0 <= seed < 2**32 for seed in seeds)
    assert seeds[5] == draw_seeds(0, [5])[0] != draw_seeds(1, [5])[0]
