"""Writing systems: of a text, by Unicode script; of a language, by its code."""

import re
from collections.abc import Sequence
from functools import cache

import regex

from qscope_jax.errors import InputError

SCRIPTS = (
    "Latin", "Han", "Cyrillic", "Hangul", "Arabic", "Hiragana", "Katakana", "Thai", "Devanagari", "Hebrew", "Greek", "Bengali", "Tamil", "Telugu",
    "Gujarati", "Gurmukhi", "Kannada", "Malayalam", "Sinhala", "Oriya", "Khmer", "Lao", "Myanmar", "Georgian", "Armenian", "Ethiopic", "Tibetan",
    "Mongolian",
)  # fmt: skip
"""Scripts by their Unicode names; several together are written with a plus, `Hiragana+Katakana`."""

_WRITTEN_IN = {
    "Latin": "af az bs ca ceb cs cy da de en eo es et eu fi fil fo fr ga gd gl ha haw hr ht hu id ig is it jv ku la lb lt lv mg mi ms mt nb nl nn no "
    "ny oc pl pt qu rn ro rw sk sl sm sn so sq st su sv sw tk tl tr uz vi wo xh yo zu",
    "Cyrillic": "be bg ba ce cv kk ky mk mn ru tg tt uk",
    "Arabic": "ar arz ary ckb fa ps sd ug ur",
    "Devanagari": "bho hi mai mr ne sa",
    "Bengali": "as bn",
    "Hebrew": "he iw yi",
    "Ethiopic": "am ti",
    "Greek": "el",
    "Gujarati": "gu",
    "Armenian": "hy",
    "Georgian": "ka",
    "Khmer": "km",
    "Kannada": "kn",
    "Hangul": "ko",
    "Lao": "lo",
    "Malayalam": "ml",
    "Myanmar": "my",
    "Oriya": "or",
    "Gurmukhi": "pa",
    "Sinhala": "si",
    "Tamil": "ta",
    "Telugu": "te",
    "Thai": "th",
    "Tibetan": "bo dz",
    "Han": "zh lzh wuu yue",
}
# Serbian is written in either script, and Japanese in three.
_BY_LANGUAGE: dict[str, tuple[str, ...]] = {
    **{code: (script,) for script, codes in _WRITTEN_IN.items() for code in codes.split()},
    "sr": ("Cyrillic", "Latin"),
    "ja": ("Hiragana", "Katakana", "Han"),
}
# What benchmarks call them instead: three-letter codes of Flores and others, which may carry the script.
_LONG_CODES = {
    "ara": "ar", "arb": "ar", "ben": "bn", "deu": "de", "ell": "el", "eng": "en", "fas": "fa", "fra": "fr", "heb": "he", "hin": "hi", "ind": "id",
    "ita": "it", "jpn": "ja", "kor": "ko", "nld": "nl", "pes": "fa", "pol": "pl", "por": "pt", "rus": "ru", "spa": "es", "swh": "sw", "tam": "ta",
    "tel": "te", "tha": "th", "tur": "tr", "ukr": "uk", "urd": "ur", "vie": "vi", "zho": "zh", "cmn": "zh",
}  # fmt: skip
_SCRIPT_CODES = {
    "latn": ("Latin",), "hans": ("Han",), "hant": ("Han",), "cyrl": ("Cyrillic",), "hang": ("Hangul",), "arab": ("Arabic",), "thai": ("Thai",),
    "deva": ("Devanagari",), "beng": ("Bengali",), "jpan": ("Hiragana", "Katakana", "Han"), "kore": ("Hangul",), "hebr": ("Hebrew",),
    "grek": ("Greek",), "taml": ("Tamil",), "telu": ("Telugu",),
}  # fmt: skip
_LETTER = regex.compile(r"\p{L}")


def script_share(texts: str | Sequence[str], script: str) -> float:
    """Share of a script among the letters of one or several texts; 0 when there are no letters.

    Args:
        texts: One text, or several that are counted together.
        script: One of `SCRIPTS`, or several joined by a plus.

    Raises:
        InputError: another script.
    """
    # Scripts have digits and signs of their own, which are no letters.
    pattern = _pattern(script, letters=True)
    joined = texts if isinstance(texts, str) else "\n".join(texts)
    letters = len(_LETTER.findall(joined))
    return len(pattern.findall(joined)) / letters if letters else 0.0


def find_script(text: str, script: str) -> int:
    """Place of the first character of a script in a text, whether a letter or not; -1 where there is none.

    Punctuation and digits that several scripts share belong to none of them: `。` is not Han.

    Raises:
        InputError: an unknown script.
    """
    found = _pattern(script).search(text)
    return found.start() if found else -1


def split_by_script(text: str, script: str) -> list[tuple[str, bool]]:
    """The text in pieces, each with whether it is of the script; joined they are the text.

    Raises:
        InputError: an unknown script.
    """
    pieces: list[tuple[str, bool]] = []
    place = 0
    for found in _pattern(script, run=True).finditer(text):
        if found.start() > place:
            pieces.append((text[place : found.start()], False))
        pieces.append((found[0], True))
        place = found.end()
    return pieces + [(text[place:], False)] * (place < len(text))


def language_scripts(language: str) -> tuple[str, ...]:
    """The scripts that a language is written in; none where that is not known.

    Args:
        language: A code such as `zh`, `zh-TW`, `pt_BR` or `zho_Hans`; a script in it decides.
    """
    first, *rest = re.split(r"[-_]", language.strip().lower())
    named = next((_SCRIPT_CODES[part] for part in rest if part in _SCRIPT_CODES), None)
    return _BY_LANGUAGE.get(_LONG_CODES.get(first, first), ()) if named is None else named


@cache
def _pattern(script: str, *, letters: bool = False, run: bool = False) -> "regex.Pattern[str]":
    names = script.split("+")
    if unknown := [name for name in names if name not in SCRIPTS]:
        raise InputError(f"script is {unknown[0]!r}, expected one of {', '.join(SCRIPTS)}")
    characters = "[" + "".join(rf"\p{{Script={name}}}" for name in names) + "]"
    return regex.compile((r"(?=\p{L})" if letters else "") + characters + ("+" if run else ""))
