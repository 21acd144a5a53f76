import sys
import threading

import numpy as np
import pytest

from qscope_jax.errors import ConfigError
from qscope_jax.training.dapo.rewards import RewardInputs, load_rewards, score
from qscope_jax.training.dapo.shipped_rewards import SHIPPED, chosen_letter


def rewards_of(name, pairs, **options):
    """Rewards of completions, each with its row's answer."""
    completions, answers = zip(*pairs, strict=True)
    ids = [list(range(len(text))) for text in completions]
    inputs = RewardInputs(["?"] * len(pairs), completions, ids, {"answer": answers})
    found = score(load_rewards({name: {"weight": 1.0, **options}}), inputs)
    assert not found.errors
    return found.totals_N


@pytest.mark.parametrize(
    "completion, answer, expected",
    [
        ("The answer is 72.", "72", 1),
        ("The answer is 27.", "72", -1),
        ("so 12 and then 72", 72, 1),
        (r"Thus \boxed{\frac{1}{2}}", "1/2", 1),
        ("0.5", "1/2", 1),
        ("I get $0.5$.", r"\frac{1}{2}", 1),
        ("1,000", "1000", 1),
        ("72", "3 * 24 is what he has. #### 72", 1),
        ("3", "3 * 24 is what he has. #### 72", -1),
        (r"\boxed{2\pi}", r"2\pi", 1),
        (r"\boxed{2}", r"2\pi", -1),
        ("seventy-two", "72", -1),
        ("", "72", -1),
        ("72", "", np.nan),
        ("72", None, np.nan),
        ("72", "#### ", np.nan),
    ],
)
def test_numbers_are_equal_however_they_are_written(completion, answer, expected):
    pytest.importorskip("math_verify")
    np.testing.assert_array_equal(rewards_of("numeric", [(completion, answer)]), [expected])


def test_numbers_are_compared_outside_of_the_main_thread_too():
    pytest.importorskip("math_verify")
    found = []
    thread = threading.Thread(target=lambda: found.append(rewards_of("numeric", [("It is 5.", "5"), ("It is 6.", "5")])))
    thread.start()
    thread.join()
    np.testing.assert_array_equal(found[0], [1, -1])


def test_a_comparison_that_takes_too_long_counts_as_wrong():
    pytest.importorskip("math_verify")
    np.testing.assert_array_equal(rewards_of("numeric", [("9**9**9**9**9", "3")], timeout=1), [-1])


def test_without_the_package_that_compares_numbers_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ConfigError, match="reward numeric: needs the package math-verify, which is not installed; pip install math-verify"):
        load_rewards({"numeric": 1.0})


def test_an_exact_match_ignores_spaces_around_it_alone():
    pairs = [(" ab\n", "ab"), ("a b", "ab"), ("AB", "ab"), ("", "ab"), ("5", 5), ("x", ""), ("x", None)]
    np.testing.assert_array_equal(rewards_of("exact_match", pairs), [1, -1, -1, -1, 1, np.nan, np.nan])
    assert rewards_of("exact_match", [("AB", "ab")], ignore_case=True) == [1]
    np.testing.assert_array_equal(rewards_of("exact_match", pairs[:2], right=5.0, wrong=0.0), [5, 0])


def test_an_exact_match_may_be_looked_for_by_a_pattern_whose_last_match_counts():
    pairs = [("so #### 5 no #### 7", "7"), ("#### 5\nmore", "5"), ("7", "7")]
    np.testing.assert_array_equal(rewards_of("exact_match", pairs, pattern=r"#### (\S+)"), [1, 1, -1])
    assert rewards_of("exact_match", [("ab12", "12")], pattern=r"\d+") == [1]


@pytest.mark.parametrize(
    "completion, letter",
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B) Paris", "B"),
        ("B. Paris, since A is wrong", "B"),
        ("**C**", "C"),
        ("C\nbecause of that", "C"),
        ("The answer is (D).", "D"),
        ("Answer: C", "C"),
        ("The correct answer is: **B**, not A.", "B"),
        ("The answer is A. No, the answer is B.", "B"),
        (r"We choose \boxed{A}. The answer is B", "A"),
        (r"\boxed{\text{E}}", "E"),
        ("I thought about it.\n\nB", "B"),
        ("I choose option B", "B"),
        ("The answer is option C", "C"),
        ("The answer is C because option A is wrong", "C"),
        ("A dog runs.", ""),
        ("The answer is a dog", ""),
        ("The answer is Apple", ""),
        ("The answer isn't B", ""),
        ("no idea", ""),
        ("", ""),
    ],
)
def test_the_letter_of_an_answer_is_found_where_it_is_given(completion, letter):
    assert chosen_letter(completion) == letter


def test_a_choice_is_compared_by_its_letter_or_number():
    pairs = [("B", "B"), ("B", "(b)"), ("B", 1), ("B", "1"), ("B", 0), ("none", "B"), ("B", "Paris"), ("B", 40), ("B", True)]
    np.testing.assert_array_equal(rewards_of("multiple_choice", pairs), [1, 1, 1, 1, -1, -1, np.nan, np.nan, np.nan])


def test_a_share_of_script_is_of_letters():
    np.testing.assert_allclose(rewards_of("script_share", [("你好", ""), ("你ab!", ""), ("12", "")], script="Han"), [1, 1 / 3, 0])


def test_a_format_is_a_regular_expression_over_lines():
    pattern = r"\A<think>.*</think>\s*\S"
    pairs = [("<think>a\nb</think>\n5", ""), ("<think>a</think>", ""), ("x<think>a</think> 5", "")]
    np.testing.assert_array_equal(rewards_of("format", pairs, pattern=pattern), [1, 0, 0])


def test_an_expression_that_searches_for_ever_is_unscorable(monkeypatch):
    monkeypatch.setattr("qscope_jax.training.dapo.shipped_rewards._PATTERN_SECONDS", 0.05)
    hopeless = [("a" * 60 + "!", "x")]
    for name in ("format", "exact_match"):
        assert np.isnan(rewards_of(name, hopeless, pattern=r"(a|aa)+\Z")).all()


def test_shaping_is_there_by_name_and_counts_tokens():
    inputs = RewardInputs(["?"] * 2, ["characters do not count", ""], [[5] * 5, [1, 2, 3]])
    rewards = load_rewards({"ngram_repetition": {"ngram_size": 2}, "length": {"soft_punish_cache": 2}}, max_completion_len=6)
    found = score(rewards, inputs)
    np.testing.assert_allclose(found.components["ngram_repetition"], [-0.75, 0])
    np.testing.assert_allclose(found.components["length"], [-0.5, 0])


def test_every_shipped_reward_takes_no_completions_too():
    options = {"script_share": {"script": "Han"}, "format": {"pattern": "x"}, "length": {"max_completion_len": 4, "soft_punish_cache": 2}}
    for name in SHIPPED:
        if name != "numeric":
            assert SHIPPED[name](**options.get(name, {}))(prompts=[], completions=[], completion_ids=[], answer=[]) == []


def test_the_share_of_a_row_s_own_language_is_sasft_s_reward():
    reward = load_rewards({"script_share": {"language_column": "language"}})
    said = ["plain words", "чай и tea", "", "お茶と茶"]
    inputs = RewardInputs([""] * 4, said, [[1]] * 4, {"language": ["en", "ru", "ko", "ja"]})
    assert score(reward, inputs).components["script_share"].tolist() == pytest.approx([1.0, 4 / 7, 0.0, 1.0])
    with pytest.raises(ConfigError, match="give one of them"):
        load_rewards({"script_share": {"language_column": "language", "script": "Han"}})
