import pytest
from hypothesis import given
from hypothesis import strategies as st

from qscope_jax.features.explain.feature_card import Context
from qscope_jax.features.explain.marked_text import marked_text, token_groups


def tokens_of(text: str, cuts: list[int]) -> list[str]:
    """What pieces of a text's bytes read as by themselves."""
    data = text.encode()
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b].decode(errors="replace") for a, b in zip(edges, edges[1:], strict=False)]


def context(start: int, length: int) -> Context:
    return Context(0, 0, start, (0,) * length, (0.0,) * length)


@pytest.mark.parametrize(
    ("text", "tokens", "read"),
    [
        ("tea 奶奶 and", ["tea", " ", "\ufffd", "\ufffd", "\ufffd", "奶", " and"], ["tea", " ", "奶", "奶", " and"]),
        ("tea 茶", ["tea", " \ufffd", "\ufffd"], ["tea", " 茶"]),
        ("tea 茶 with more", ["tea", " \ufffd", "\ufffd"], ["tea", "\ufffd\ufffd"]),  # cut, so that nobody knows where it ends
        ("tea", ["<bos>", "tea"], ["<bos>", "tea"]),
        ("茶", ["<bos>", "\ufffd", "\ufffd", "\ufffd"], ["<bos>", "茶"]),
    ],
)
def test_parts_of_a_character_read_as_the_character(text, tokens, read):
    groups = token_groups(text, tokens)
    assert [group.text for group in groups] == read
    assert [group.start for group in groups] + [len(tokens)] == [0] + [group.end for group in groups]


@given(text=st.permutations("abcd é茶🙂ع奶水").map("".join), cuts=st.lists(st.integers(0, 80), max_size=20))
def test_every_token_is_in_one_group_and_what_they_spell_is_the_text(text, cuts):
    tokens = tokens_of(text, cuts)
    groups = token_groups(text, tokens)
    assert [i for group in groups for i in range(group.start, group.end)] == list(range(len(tokens)))
    if not any("\ufffd" in group.text for group in groups):
        assert "".join(group.text for group in groups) == text


def test_neighbours_share_a_pair_of_marks():
    groups = token_groups("a b c d", ["a", " b", " c", " d"])
    assert marked_text(groups, context(0, 4), {1, 2}) == "a⟦ b c⟧ d"
    assert marked_text(groups, context(1, 3), {0, 3}) == " b c⟦ d⟧"
    assert marked_text(groups, context(0, 4), set()) == "a b c d"


def test_a_marked_part_marks_its_character_and_lines_stay_one():
    groups = token_groups("x\n茶", ["x", "\n", "\ufffd", "\ufffd"])
    assert marked_text(groups, context(0, 4), {3}) == "x↵⟦茶⟧"
