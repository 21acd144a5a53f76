"""Writing systems of a text, by Unicode script."""

from collections.abc import Sequence

import regex

from qscope_jax.errors import InputError

SCRIPTS = ("Latin", "Han", "Cyrillic", "Hangul", "Arabic")
# Scripts have digits and signs of their own, which are no letters.
_PATTERNS = {script: regex.compile(rf"(?=\p{{L}})\p{{Script={script}}}") for script in SCRIPTS}
_LETTER = regex.compile(r"\p{L}")


def script_share(texts: str | Sequence[str], script: str) -> float:
    """Share of a script among the letters of one or several texts; 0 when there are no letters.

    Args:
        texts: One text, or several that are counted together.
        script: One of `SCRIPTS`.

    Raises:
        InputError: another script.
    """
    if script not in SCRIPTS:
        raise InputError(f"script is {script!r}, expected one of {', '.join(SCRIPTS)}")
    joined = texts if isinstance(texts, str) else "\n".join(texts)
    letters = len(_LETTER.findall(joined))
    return len(_PATTERNS[script].findall(joined)) / letters if letters else 0.0
