import numpy as np
import pytest

from qscope_jax.errors import ConfigError, InputError
from qscope_jax.training.dapo.reward_watch import RewardWatch
from qscope_jax.training.dapo.rewards import Scores


def scores(errors=None, **components):
    arrays = {name: np.array(values, np.float64) for name, values in components.items()}
    return Scores(np.zeros(4), arrays, errors or {}, {})


def heard(watch, *batches):
    return [watch.update(batch) for batch in batches]


def test_a_reward_that_never_varies_is_named_once_after_a_few_steps():
    lines = heard(RewardWatch(2, steps=3), *[scores(same=[0, 0, 0, 0], good=[0, 1, 0, 0])] * 5)
    assert [len(said) for said in lines] == [0, 0, 1, 0, 0]
    assert lines[2][0].startswith("reward same was 0 for all 12 completions that it scored in the first 3 steps; nothing is learnt from it")


def test_a_reward_that_differs_between_prompts_alone_does_not_vary():
    (said,) = heard(RewardWatch(2, steps=1), scores(by_prompt=[1, 1, 5, 5]))
    assert said[0].startswith("reward by_prompt never differed between answers to the same prompt")


def test_a_reward_that_scores_nothing_is_named():
    (said,) = heard(RewardWatch(2, steps=1), scores(none=[np.nan, np.inf, np.nan, np.nan]))
    assert said[0].startswith("reward none scored none of 4 completions in the first 1 steps")


def test_one_group_with_a_difference_at_any_step_is_enough():
    watch = RewardWatch(2, steps=3)
    assert not any(heard(watch, scores(r=[0, 0, 1, 2]), *[scores(r=[0, 0, 0, 0])] * 4))


def test_what_tells_steered_answers_apart_alone_does_not_vary():
    batch = scores(r=[1, -1, 1, -1, 1, -1, 1, -1])
    assert heard(RewardWatch(4, steered=[1, 3], steps=1), batch)[0] and not heard(RewardWatch(4, steered=[1], steps=1), batch)[0]


def test_a_failing_function_is_named_once_and_counted():
    watch = RewardWatch(2)
    lines = heard(watch, *[scores({"r": f"ValueError: {i}"}, r=[np.nan] * 4) for i in range(3)])
    assert lines == [["reward r failed (ValueError: 0); completions of such a batch cannot be scored: mend the function"], [], []]
    assert watch.failures == {"r": 3} and watch.first_errors == {"r": "ValueError: 0"}


def test_settings_out_of_range_are_refused_in_one_line():
    with pytest.raises(ConfigError, match="after 0 steps"):
        RewardWatch(2, steps=0)
    with pytest.raises(InputError, match="member 5"):
        RewardWatch(2, steered=[5])
