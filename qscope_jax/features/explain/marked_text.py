"""Contexts as one line of plain text with some tokens marked, for whoever cannot be shown colours: a language model, a log."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from qscope_jax.features.explain.feature_card import Context

# Rare in any corpus, unlike << and [[ which are code.
OPEN, CLOSE = "⟦", "⟧"

_PART = "\ufffd"
# Whole tokens after an unfinished character that together tell where it ends.
_LANDMARKS = 8


class TokenGroup(NamedTuple):
    """Tokens that read as something together: one, or the several that make up a character.

    Attributes:
        text: What they read as; with replacement signs where that cannot be told.
        start: Index of the first.
        end: Index after the last.
    """

    text: str
    start: int
    end: int


def token_groups(text: str, tokens: Sequence[str]) -> list[TokenGroup]:
    """Tokens with what they are of a text, in order.

    A token that is part of a character reads as the replacement sign by itself; what several of them spell is found in the text, between
    the tokens around them.

    Args:
        text: The text, which may go on after the last token.
        tokens: What each of its tokens reads as by itself.
    """
    groups: list[TokenGroup] = []
    at = start = 0
    while start < len(tokens):
        end = start + 1
        if _PART in tokens[start]:
            while end < len(tokens) and _PART in tokens[end]:
                end += 1
            read = _between(text, at, tokens, start, end)
        else:
            read = tokens[start]
        at = _behind(text, at, read)
        groups.append(TokenGroup(read, start, end))
        start = end
    return groups


def marked_text(groups: Sequence[TokenGroup], context: Context, marked: Collection[int]) -> str:
    """The stretch that a context shows, with the tokens at some positions of its text between `OPEN` and `CLOSE`; neighbours share a pair.

    Args:
        groups: The whole text's tokens.
        context: The stretch.
        marked: Positions in the text; of a character in parts, any of them marks it.
    """
    line, inside = "", False
    for read, start, end in groups:
        if end <= context.start or start >= context.start + len(context.token_ids):
            continue
        now = any(position in marked for position in range(start, end))
        line += (OPEN if now else CLOSE) if now != inside else ""
        line, inside = line + read, now
    return (line + CLOSE * inside).replace("\r\n", "↵").replace("\n", "↵")


def _between(text: str, at: int, tokens: Sequence[str], start: int, end: int) -> str:
    """What tokens `start` to `end` spell: the text from `at` to where the whole tokens after them stand."""
    unknown = _PART * (end - start)
    # No token holds more characters than it shows.
    longest = sum(map(len, tokens[start:end]))
    after = ""
    for token in tokens[end : end + _LANDMARKS]:
        if _PART in token:
            break
        after += token
    stop = text.find(after, at + 1, at + longest + len(after)) if after else len(text)
    return text[at:stop] if at < stop <= at + longest else unknown


def _behind(text: str, at: int, read: str) -> int:
    """The place after what was read; the same place where it does not stand here, as a token added before the text does not."""
    return at + len(read) if text.startswith(read, at) else at
