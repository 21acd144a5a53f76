"""What the site of features loads: a small index of all cards, and their details in blocks, as scripts that hand over JSON.

A page opened from disk may not read files beside it, but it may load scripts; so each file is one call, `qscopeData(name, "...")`.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from qscope_jax.features.explain.feature_card import Context, FeatureCard
from qscope_jax.report.token_heat import Kind, pieces

LISTED_TOKENS = 5
"""Tokens of each kind that the list shows of a feature, and that its search knows."""

_SURROGATES = re.compile("[\ud800-\udfff]")
# What would end the string or the line; JSON itself has no raw control characters.
_UNSAFE = {"\\": "\\\\", "'": "\\'", "\u2028": "\\u2028", "\u2029": "\\u2029"}
_UNSAFE_PATTERN = re.compile(r"[\\'\u2028\u2029]")
_VISIBLE = {"space": " ", "newline": "↵", "tab": "⇥", "partial": "□"}
_DIGITS = 4  # significant digits of a number: bfloat16 has three
_REMEMBERED = 1 << 18  # tokens: the same ones recur in every block

TokenText = Callable[[int], str]


def data_script(name: str, value: Any) -> str:
    """A script that hands `value` over under `name`. No text in it can end the script, a string or a line of it."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # UTF-8 has no halves of surrogate pairs; JSON has.
    text = _SURROGATES.sub(lambda match: f"\\u{ord(match.group()):04x}", text)
    return f"qscopeData('{name}','{_UNSAFE_PATTERN.sub(lambda match: _UNSAFE[match.group()], text)}')\n"


class IndexPart:
    """Columns of what the list shows of consecutive cards, and what its search, filters and orders need."""

    def __init__(self, token_text: TokenText) -> None:
        self._token_text = token_text
        self.columns: dict[str, list[Any]] = {
            name: [] for name in ("features", "densities", "maxima", "explanations", "tokens", "promoted")
        }  # fmt: skip

    def __len__(self) -> int:
        return len(self.columns["features"])

    def add(self, card: FeatureCard) -> None:
        """Add a card's row."""
        peaks = (context.token_ids[context.peak] for context in card.top)
        row = (
            int(card.feature), _short(card.density), _short(card.maximum), card.explanation, self._labels(peaks),
            self._labels(token for token, _ in card.promoted),
        )  # fmt: skip
        for column, value in zip(self.columns.values(), row, strict=True):
            column.append(value)

    def _labels(self, tokens: Iterable[int]) -> list[str]:
        """The first different tokens, as labels."""
        labels: dict[str, None] = {}
        for token in tokens:
            labels.setdefault(token_label(self._token_text(token)))
            if len(labels) == LISTED_TOKENS:
                break
        return list(labels)


class Block:
    """Details of consecutive cards; each token's text is kept once."""

    def __init__(self, token_text: TokenText) -> None:
        self._token_text = token_text
        self._places: dict[int, int] = {}
        self._tokens: list[str | list[Any]] = []
        self._cards: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return len(self._cards)

    def add(self, card: FeatureCard) -> None:
        """Add a card's details."""
        unit = _unit(card.maximum)
        self._cards.append(
            {
                "feature": int(card.feature),
                "textRate": _short(card.text_rate),
                "meanMaximum": _short(card.mean_maximum),
                "histogram": [[_short(low), _short(high), int(texts)] for low, high, texts in card.histogram],
                "groups": [
                    [column, [[rate.group, int(rate.texts), *map(_short, (rate.text_rate, rate.density, rate.mean))] for rate in rates]]
                    for column, rates in card.groups.items()
                ],
                "unit": unit,
                "top": [self._context(context, unit) for context in card.top],
                "quantiles": [
                    [_short(part.low), _short(part.high), int(part.texts), [self._context(context, unit) for context in part.contexts]]
                    for part in card.quantiles
                ],
                "promoted": self._logits(card.promoted),
                "suppressed": self._logits(card.suppressed),
                "neighbours": [[int(feature), _short(cosine)] for feature, cosine in card.neighbours],
                "cofiring": [[int(feature), _short(share)] for feature, share in card.cofiring],
                "scores": [[name, _short(score)] for name, score in card.scores.items()],
            }
        )

    def value(self) -> dict[str, Any]:
        """The block in JSON's terms.

        `tokens` are texts, or pairs of a text and its pieces where some of these need more than a space's mark; `cards` refer to them by their
        place. Activations are whole numbers of the card's `unit`.
        """
        return {"tokens": self._tokens, "cards": self._cards}

    def _context(self, context: Context, unit: float) -> dict[str, Any]:
        return {
            "text": int(context.text),
            "start": int(context.start),
            "peak": int(context.peak),
            "tokens": [self._place(token) for token in context.token_ids],
            "activations": _in_units(context.activations, unit),
            "about": [[name, value] for name, value in context.about.items()],
        }

    def _logits(self, logits: Sequence[tuple[int, float]]) -> list[list[Any]]:
        return [[self._place(token), _short(logit)] for token, logit in logits]

    def _place(self, token: int) -> int:
        place = self._places.get(token)
        if place is None:
            place = self._places[token] = len(self._tokens)
            self._tokens.append(_entry(self._token_text(token)))
        return place


@lru_cache(maxsize=_REMEMBERED)
def token_label(token: str) -> str:
    """A token as a word in a list: without spaces around it, what cannot be seen by a mark."""
    text = "".join(_mark(kind, piece) for kind, piece in pieces(token))
    return text.strip() or "·" * len(text)


def _mark(kind: Kind, piece: str) -> str:
    if kind == "text":
        return piece
    return _VISIBLE.get(kind, f"[{piece}]") * (len(piece) if kind == "space" else 1)


@lru_cache(maxsize=_REMEMBERED)
def _entry(token: str) -> str | list[Any]:
    found = pieces(token)
    return token if all(kind in ("text", "space") for kind, _ in found) else [token, [list(piece) for piece in found]]


def _unit(maximum: float) -> float:
    """The power of ten of which the maximum has a thousand or some thousands."""
    return 10.0 ** (math.floor(math.log10(maximum)) - _DIGITS + 1) if maximum > 0 and math.isfinite(maximum) else 1.0


def _in_units(values: Sequence[float], unit: float) -> list[int | None]:
    """Whole numbers of units: a site has millions of activations, and most are 0."""
    scaled = np.rint(np.asarray(values, np.float64) / unit)
    finite = np.isfinite(scaled)
    whole = np.where(finite, scaled, 0).astype(np.int64).tolist()
    return whole if finite.all() else [value if there else None for value, there in zip(whole, finite.tolist(), strict=True)]


def _short(value: float) -> float | int | None:
    """The number in a few digits; None where it is not finite, which JSON has no word for."""
    if not math.isfinite(value):
        return None
    number = float(f"{value:.{_DIGITS}g}")
    return int(number) if number == int(number) else number
