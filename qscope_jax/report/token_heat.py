"""What a token heat map shows, on a page or in a terminal: which part of a token is visible, and how strong its colour is."""

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Literal, SupportsFloat

from qscope_jax.errors import InputError

Kind = Literal["text", "space", "newline", "tab", "partial", "code"]

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# The replacement character stands for bytes that are no whole character; a lone surrogate does the same.
_PIECES = re.compile(r"(?P<space>[ \xa0]+)|(?P<newline>\r?\n|\r)|(?P<tab>\t)|(?P<partial>[\ufffd\ud800-\udfff]+)|(?P<code>[\x00-\x1f\x7f-\x9f])")


def pieces(token: str) -> list[tuple[Kind, str]]:
    """Cut a token into runs of plain text and of what needs a mark to be seen.

    A byte of an unfinished character (`<0xE4>`, or U+FFFD after decoding) is `partial`. Control characters, and tokens without any
    visible character, are `code`, with text such as `U+200D` or `empty`.
    """
    if _BYTE_TOKEN.fullmatch(token):
        return [("partial", token)]
    if not token:
        return [("code", "empty")]
    if all(unicodedata.category(character) == "Cf" for character in token):
        return [("code", _code(token))]
    found: list[tuple[Kind, str]] = []
    end = 0
    for match in _PIECES.finditer(token):
        if match.start() > end:
            found.append(("text", token[end : match.start()]))
        end = match.end()
        found.append(_marked(match))
    if end < len(token):
        found.append(("text", token[end:]))
    return found


def levels(tokens: Sequence[str], values: Iterable[SupportsFloat], maximum: float | None = None) -> tuple[list[float], list[float], float]:
    """Values as floats, as shares of `maximum` in [-1, 1], and that maximum (by default the largest absolute value).

    A value that is not finite has share 0.

    Raises:
        InputError: tokens and values differ in number, or `maximum` is not a positive number.
    """
    numbers = [float(value) for value in values]
    if len(numbers) != len(tokens):
        raise InputError(f"{len(tokens)} tokens came with {len(numbers)} values; give one value for each token")
    if maximum is None:
        maximum = max((abs(number) for number in numbers if math.isfinite(number)), default=0.0) or 1.0
    if not (maximum > 0 and math.isfinite(maximum)):
        raise InputError(f"the maximum of a token heat map is {maximum}; give a positive number, or none for the largest value")
    shares = [min(max(number / maximum, -1.0), 1.0) if math.isfinite(number) else 0.0 for number in numbers]
    return numbers, shares, float(maximum)


def _marked(match: re.Match[str]) -> tuple[Kind, str]:
    kind = match.lastgroup
    if kind == "space" or kind == "newline" or kind == "tab" or kind == "partial":
        return kind, match.group()
    return "code", _code(match.group())


def _code(text: str) -> str:
    return " ".join(f"U+{ord(character):04X}" for character in text)
