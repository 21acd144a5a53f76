import sys

import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.errors import ConfigError, InputError
from qscope_jax.training.dapo.rewards import Reward, RewardInputs, check_columns, load_rewards, score

INPUTS = RewardInputs(["p", "p", "q"], ["a", "bb", "ccc"], [[1], [1, 2], [1, 2, 3]], {"answer": ["a", "b", "ccc"], "task": ["x", "x", "y"]})

MODULE = """
def lengths(completions, **columns):
    return [len(text) for text in completions]

def only_named(completion_ids, answer):
    return [len(ids) + len(text) for ids, text in zip(completion_ids, answer)]

def scaled(factor):
    return lambda completions, **columns: [factor * len(text) for text in completions]

def counted(texts):
    return len(texts)

class Holder:
    @staticmethod
    def inside(*, completions, **columns):
        return [0.5] * len(completions)

number = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of reward functions that Python finds by the name `their_rewards`."""
    (tmp_path / "their_rewards.py").write_text(MODULE)
    (tmp_path / "broken_rewards.py").write_text("raise RuntimeError('no\\nluck')")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "their_rewards"
    sys.modules.pop("their_rewards", None)


def scores_of(*functions, inputs=INPUTS, weights=None):
    weights = weights or [1.0] * len(functions)
    return score([Reward(f"r{i}", weight, function) for i, (weight, function) in enumerate(zip(weights, functions, strict=True))], inputs)


def test_functions_are_found_by_name_and_by_import_path_and_added_up_by_weight(module):
    rewards = load_rewards({"exact_match": 2, "their_rewards:lengths": {"weight": 0.5}, "their_rewards:Holder.inside": 0.1})
    assert [(reward.name, reward.weight) for reward in rewards] == [
        ("exact_match", 2.0), ("their_rewards:lengths", 0.5), ("their_rewards:Holder.inside", 0.1),
    ]  # fmt: skip
    found = score(rewards, INPUTS)
    np.testing.assert_array_equal(found.components["exact_match"], [1, -1, 1])
    np.testing.assert_array_equal(found.components["their_rewards:lengths"], [1, 2, 3])
    np.testing.assert_allclose(found.totals_N, [2 + 0.5 + 0.05, -2 + 1 + 0.05, 2 + 1.5 + 0.05])
    assert not found.errors and not any(found.unscorable.values())


def test_a_function_gets_what_it_names_and_nothing_else(module):
    (reward,) = load_rewards({"their_rewards:only_named": 1.0})
    np.testing.assert_array_equal(score([reward], INPUTS).totals_N, [2, 3, 6])


def test_options_make_the_function_at_an_import_path(module):
    (reward,) = load_rewards({"their_rewards:scaled": {"weight": 1, "factor": 3}})
    np.testing.assert_array_equal(score([reward], INPUTS).totals_N, [3, 6, 9])


def test_the_longest_completion_is_that_of_the_run_unless_another_is_given():
    own = {"weight": 1, "soft_punish_cache": 2}
    for spec, expected in ((own, [0, -0.5, -1]), ({**own, "max_completion_len": 4}, [0, 0, -0.5])):
        np.testing.assert_allclose(score(load_rewards({"length": spec}, max_completion_len=3), INPUTS).totals_N, expected)


def test_functions_are_called_as_trl_calls_them_and_may_change_what_they_get():
    seen = {}

    def greedy(**given):
        seen.update({name: [list(v) if isinstance(v, list) else v for v in values] for name, values in given.items()})
        for values in given.values():
            if isinstance(values[0], list):
                values[0].append(99)
            values.clear()
        return [0.0] * 3

    scores_of(greedy, greedy)
    assert seen == {
        "prompts": ["p", "p", "q"], "completions": ["a", "bb", "ccc"], "completion_ids": [[1], [1, 2], [1, 2, 3]],
        "answer": ["a", "b", "ccc"], "task": ["x", "x", "y"],
    }  # fmt: skip


@pytest.mark.parametrize(
    "result",
    [[1, 0.5, True], (1, 0.5, 1), np.array([1, 0.5, 1], np.float32), jnp.array([1, 0.5, 1]), [np.float32(1), jnp.float32(0.5), np.bool_(True)]],
)
def test_numbers_may_come_as_any_kind_of_list(result):
    np.testing.assert_array_equal(scores_of(lambda **_: result).totals_N, [1, 0.5, 1])


def test_none_adds_nothing_and_nan_or_infinity_makes_a_completion_unscorable():
    found = scores_of(lambda **_: [1.0, None, None], lambda **_: [None, 2.0, None], weights=[1.0, 10.0])
    np.testing.assert_array_equal(found.totals_N, [1, 20, np.nan])
    assert found.unscorable == {"r0": 0, "r1": 0}
    found = scores_of(lambda **_: [1.0, np.nan, np.inf], lambda **_: [1.0, 1.0, 1.0])
    np.testing.assert_array_equal(found.totals_N, [2, np.nan, np.nan])
    assert found.unscorable == {"r0": 2, "r1": 0}


def test_a_function_that_fails_is_noted_and_its_batch_cannot_be_scored():
    def fails(**_):
        raise ValueError("first line\nsecond line")

    def fails_late(**_):
        yield 1.0
        raise KeyError("x")

    found = scores_of(fails, lambda **_: [1, 2, 3], fails_late)
    assert found.errors == {"r0": "ValueError: first line", "r2": "KeyError: 'x'"}
    assert np.isnan(found.totals_N).all() and np.isnan(found.components["r0"]).all()
    np.testing.assert_array_equal(found.components["r1"], [1, 2, 3])
    assert found.unscorable == {"r0": 3, "r1": 0, "r2": 3}


def test_what_weighs_nothing_is_logged_and_neither_adds_nor_spoils():
    def fails(**_):
        raise ValueError

    found = scores_of(lambda **_: [1, 2, 3], lambda **_: [np.nan] * 3, fails, weights=[1.0, 0.0, 0.0])
    np.testing.assert_array_equal(found.totals_N, [1, 2, 3])
    assert set(found.components) == {"r0", "r1", "r2"} and found.errors == {"r2": "ValueError: ValueError"}


@pytest.mark.parametrize(
    "result, line",
    [
        ([1.0, 2.0], "reward r0 gave 2 rewards for 3 completions"),
        ([1.0, "good", 0.0], r"reward r0 gave 'good' \(str\) for completion 1"),
        (["1", "2", "3"], r"reward r0 gave '1' \(str\) for completion 0"),
        ([1.0, [2.0], 3.0], r"for completion 1, expected a number or None"),
        ("abc", "reward r0 gave str, expected a list of 3 numbers"),
        ({1: 2.0}, "reward r0 gave dict"),
        (0.5, "reward r0 gave float"),
        (np.float64(0.5), "reward r0 gave float"),
        (None, "reward r0 gave NoneType"),
        (np.zeros((3, 2)), "for completion 0, expected a number or None"),
    ],
)
def test_a_wrong_number_of_rewards_or_what_is_no_number_stops_the_run_and_names_the_function(result, line):
    with pytest.raises(InputError, match=line) as caught:
        scores_of(lambda **_: result)
    assert "\n" not in str(caught.value)


def test_a_missing_column_is_named_before_anything_runs(module):
    rewards = load_rewards({"exact_match": {"column": "solution"}})
    with pytest.raises(InputError, match="reward exact_match asks for a column 'solution'; the data have 'answer', 'task'"):
        check_columns(rewards, ["answer", "task"])
    check_columns(rewards, ["solution"])
    with pytest.raises(InputError, match="their_rewards:only_named asks for a column 'answer'; the data have none"):
        score(load_rewards({"their_rewards:only_named": 1.0}), RewardInputs(["p"], ["a"], [[1]]))


def test_inputs_that_do_not_belong_together_are_refused_in_one_line():
    cases = [
        ("1 prompts for 2 completions", lambda: RewardInputs(["p"], ["a", "b"], [[1], [2]])),
        ("1 answer for 2 completions", lambda: RewardInputs(["p"] * 2, ["a", "b"], [[1], [2]], {"answer": ["x"]})),
        ("column 'completions'", lambda: RewardInputs(["p"], ["a"], [[1]], {"completions": ["x"]})),
    ]
    for line, call in cases:
        with pytest.raises(InputError, match=line) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "spec, line",
    [
        ({}, "no reward is given"),
        ({"exactmatch": 1.0}, "reward 'exactmatch' is not known; expected one of numeric, exact_match"),
        ({"no_such_package.x:f": 1.0}, r"reward no_such_package.x:f: cannot be imported \(ModuleNotFoundError"),
        ({"their_rewards:absent": 1.0}, r"their_rewards:absent: cannot be imported \(AttributeError"),
        ({"broken_rewards:f": 1.0}, r"broken_rewards:f: cannot be imported \(RuntimeError: no\)"),
        ({"their_rewards:number": 1.0}, "their_rewards:number: is int, expected a function"),
        ({"exact_match": "1"}, "reward exact_match: its weight is '1'"),
        ({"exact_match": True}, "its weight is True"),
        ({"exact_match": float("nan")}, "its weight is nan"),
        ({"exact_match": 0, "format": {"pattern": "x", "weight": 0}}, "rewards exact_match, format all weigh 0"),
        ({"exact_match": {"colum": "x"}}, "reward exact_match: .*colum.*; its options are column, pattern, ignore_case, right, wrong"),
        ({"script_share": 1.0}, "reward script_share: script is '' and language_column ''; give one of them"),
        ({"script_share": {"script": "Hanzi"}}, "reward script_share: script is 'Hanzi'"),
        ({"script_share": {"script": 5}}, r"reward script_share: refuses its options \("),
        ({"length": {"soft_punish_cache": 8}}, "reward length: missing a required .*argument: 'max_completion_len'"),
        ({"length": {"soft_punish_cache": 8, "max_completion_len": 4}}, "reward length: soft_punish_cache is 8"),
        ({"format": {"pattern": "(a"}}, r"reward format: its pattern '\(a' is no regular expression"),
        ({"their_rewards:counted": {"weight": 1, "texts": []}}, "their_rewards:counted: makes int of its options"),
        ({"their_rewards:scaled": {"faktor": 2}}, "their_rewards:scaled: .*its options are factor"),
        ({"their_rewards:scaled": {"weight": 1, "factor": 2, "more": 1}}, "their_rewards:scaled: .*'more'"),
    ],
)
def test_a_reward_that_cannot_be_made_is_refused_in_one_line(spec, line, module):
    with pytest.raises(ConfigError, match=line) as caught:
        load_rewards(spec)
    assert "\n" not in str(caught.value)
