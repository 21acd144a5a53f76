import pytest

from qscope_jax.errors import InputError
from qscope_jax.features.repetition.repetition_strength import find_repetition_strength


def test_the_smallest_strength_at_which_most_completions_repeat_is_taken():
    tried = []

    def repeats(alpha):
        tried.append(alpha)
        return [alpha >= threshold for threshold in (5.0, 10.0, 20.0, 20.0, 30.0)]

    found = find_repetition_strength(repeats, 10.0, multiples=(0.5, 1.0, 2.0, 3.0))
    assert (found.alpha, found.multiple, tried) == (20.0, 2.0, [5.0, 10.0, 20.0])
    assert found.shares == {0.5: 0.2, 1.0: 0.4, 2.0: 0.8}


def test_what_is_added_has_the_multiple_of_the_stream_s_norm_however_long_the_direction():
    found = find_repetition_strength(lambda alpha: [alpha * 4.0 >= 20.0], 10.0, direction_norm=4.0, multiples=(1.0, 2.0))
    assert (found.alpha, found.multiple) == (5.0, 2.0)


def test_where_no_strength_is_enough_one_line_says_how_far_it_went():
    with pytest.raises(InputError, match="no strength up to 3 times the residual norm makes 80% of completions repeat, at most 50% at 2") as caught:
        find_repetition_strength(lambda alpha: [alpha == 2.0, False], 1.0, multiples=(1.0, 2.0, 3.0))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes, line",
    [
        ({"residual_norm": 0.0}, "norms of the stream, 0.0"),
        ({"direction_norm": float("nan")}, "of the direction, nan"),
        ({"multiples": ()}, r"multiples are \[\]"),
        ({"multiples": (2.0, 1.0)}, r"multiples are \[2.0, 1.0\]"),
        ({"multiples": (0.0, 1.0)}, r"multiples are \[0.0, 1.0\]"),
        ({"share": 0.0}, "must repeat is 0.0"),
        ({"repeats": lambda alpha: []}, "no completions of probe prompts"),
    ],
)
def test_what_cannot_be_searched_is_refused_in_one_line(changes, line):
    given = {"repeats": lambda alpha: [True], "residual_norm": 1.0, **changes}
    with pytest.raises(InputError, match=line) as caught:
        find_repetition_strength(**given)
    assert "\n" not in str(caught.value)
