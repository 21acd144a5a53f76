"""Numbers and other table cells as a reader wants them: few digits, the same number of decimals down a column."""

import math
import numbers
from collections.abc import Iterable
from typing import Any

_DIGITS = 4  # significant digits of a number on its own
_SPREAD = 4  # powers of ten that one number of decimals can serve
_MAX_DECIMALS = 4


def format_number(value: Any) -> str:
    """One cell as text: `1,234,567`, `0.1235`, `1.2e-05`, `yes`, `–` for None; anything that is no number as `str` has it."""
    number = as_number(value)
    if number is None:
        return _other(value)
    if isinstance(number, int):
        return f"{number:,}"
    if not math.isfinite(number):
        return "nan" if math.isnan(number) else ("∞" if number > 0 else "-∞")
    if number == 0:
        return "0"
    if not 1e-4 <= abs(number) < 1e7:
        return f"{number:.3g}"
    decimals = max(_DIGITS - 1 - _exponent(number), 0)
    text = f"{number:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if decimals else text


def format_change(share: float) -> str:
    """A relative change: `-55 %`, or a dash where it is not known."""
    return f"{100 * share:+.0f} %" if math.isfinite(share) else "–"


def format_points(low: float, high: float) -> str:
    """An interval of a change of shares, in points of a hundred: `-0.52 to +0.10`, or a dash where it is not known."""
    return f"{100 * low:+.2f} to {100 * high:+.2f}" if math.isfinite(low) and math.isfinite(high) else "–"


def format_column(values: Iterable[Any]) -> list[str]:
    """The cells of a column as text; its floats share a number of decimals where their sizes allow it."""
    values = list(values)
    floats = [number for number in map(as_number, values) if isinstance(number, float) and math.isfinite(number)]
    decimals = _shared_decimals(floats)
    if decimals is None:
        return [format_number(value) for value in values]
    return [_with_decimals(value, decimals) for value in values]


def is_numeric(values: Iterable[Any]) -> bool:
    """Whether a column holds numbers (and None, for a missing one) only."""
    present = [value for value in values if value is not None]
    return bool(present) and all(as_number(value) is not None for value in present)


def as_number(value: Any) -> int | float | None:
    """The int or float that `value` is (Python's, NumPy's, or a JAX or ml_dtypes scalar), or None if it is no number."""
    if isinstance(value, (bool, str)):
        return None
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    dtype = getattr(value, "dtype", None)
    if dtype is None or getattr(value, "ndim", None) != 0 or dtype.kind not in "iufV":
        return None
    # bfloat16 and the float8 types are of kind "V" for NumPy, yet turn into floats.
    return int(value) if dtype.kind in "iu" else float(value)


def _other(value: Any) -> str:
    if value is None:
        return "–"
    dtype = getattr(value, "dtype", None)
    if isinstance(value, bool) or (dtype is not None and dtype.kind == "b" and value.ndim == 0):
        return "yes" if value else "no"
    return str(value)


def _shared_decimals(floats: list[float]) -> int | None:
    """Decimals that suit every one of `floats`, or None where each is better off with its own."""
    sizes = [_exponent(number) for number in floats if number]
    if not sizes or max(sizes) - min(sizes) > _SPREAD or max(sizes) > 6 or min(sizes) < -_MAX_DECIMALS:
        return None
    decimals = min(max(2 - min(sizes), 0), _MAX_DECIMALS)
    texts = [f"{number:.{decimals}f}" for number in floats]
    # 0.500 and 0.250 say no more than 0.50 and 0.25; a small float keeps one decimal, to be told from a count.
    fewest = 0 if max(sizes) >= 3 else 1
    while decimals > fewest and all(text.endswith("0") for text in texts):
        decimals -= 1
        texts = [text[:-1] for text in texts]
    return decimals


def _with_decimals(value: Any, decimals: int) -> str:
    number = as_number(value)
    return f"{number:,.{decimals}f}" if isinstance(number, float) and math.isfinite(number) else format_number(value)


def _exponent(number: float) -> int:
    """Power of ten of the first digit, of a finite number other than 0."""
    return math.floor(math.log10(abs(number)))
