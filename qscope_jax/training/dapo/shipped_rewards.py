"""The reward functions that are there by name; each is made from its options.

Those of answers give `right` (1) or `wrong` (-1), as the DAPO paper does. All compare with a column of the data rows, by default `answer`; a row
whose answer is missing or cannot be read is unscorable.
"""

import re
import string
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from numbers import Integral
from typing import Any

import numpy as np
import regex

from qscope_jax.errors import ConfigError
from qscope_jax.features.scripts import language_scripts
from qscope_jax.features.scripts import script_share as share_of_script
from qscope_jax.training.dapo.shaping import check_ngrams, check_overlong, ngram_repetition_penalty, soft_overlong_punishment

Function = Callable[..., list[float]]

_PATTERN_SECONDS = 1.0
_OPEN, _CLOSE = r"[*$(\[\s]*", r"[*$)\].\s]*"
# How a letter is given as the answer, surest first; of several mentions the last counts. The article "A" is none of them.
_CHOICE = (
    re.compile(r"\\boxed\{\s*(?:\\text\{)?\s*\(?([A-Z])\)?\s*\}"),
    re.compile(rf"(?i:\banswer)(?:\s+is|\s*[:=])+\s*(?i:option\s|choice\s)?{_OPEN}([A-Z])(?![A-Za-z'])"),
    re.compile(rf"\A{_OPEN}([A-Z])(?:[)\].:,*$]|\s*\Z|[ \t]*\n)"),
    re.compile(rf"\n{_OPEN}([A-Z]){_CLOSE}\Z"),
    re.compile(rf"(?i:\b(?:option|choice))\s+{_OPEN}([A-Z])(?![A-Za-z'])"),
)


@dataclass(frozen=True)
class AnswerReward:
    """Compares each completion with the answer of its row.

    Attributes:
        column: Column of the answers.
        compare: Reward of a completion, given the answer.
    """

    column: str
    compare: Callable[[str, Any], float]

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that it needs."""
        return (self.column,)

    def __call__(self, *, completions: list[str], **columns: list[Any]) -> list[float]:
        """A reward for each completion."""
        answers = columns[self.column]
        return [np.nan if _blank(answer) else self.compare(said, answer) for said, answer in zip(completions, answers, strict=True)]


def numeric(*, column: str = "answer", right: float = 1.0, wrong: float = -1.0, timeout: int = 3) -> AnswerReward:
    """Whether the number or formula that a completion ends in equals the row's, by the package math-verify.

    The row's answer may be a number, text or LaTeX; of text with `####`, as in GSM8K, what follows it.

    Args:
        column: Column of the answers.
        right: Reward of an equal one.
        wrong: Of another, or of none.
        timeout: Seconds after which a comparison counts as wrong; without effect outside of the main thread.

    Raises:
        ConfigError: the package is not installed.
    """
    try:
        verifier = import_module("math_verify")
    except ImportError:
        raise ConfigError("needs the package math-verify, which is not installed; pip install math-verify") from None

    @lru_cache(maxsize=4096)  # answers to a prompt come together
    def wanted(answer: str, seconds: int | None) -> Any:
        text = answer.rpartition("####")[2].strip()
        # Bare LaTeX is read as such between signs only.
        return verifier.parse(text if "$" in text or "\\boxed" in text else f"${text}$", parsing_timeout=seconds)

    def compare(completion: str, answer: Any) -> float:
        # Timeouts are signals, and those reach the main thread alone.
        seconds = timeout if threading.current_thread() is threading.main_thread() else None
        gold = wanted(str(answer), seconds)
        if not gold:
            return np.nan
        return right if verifier.verify(gold, verifier.parse(completion, parsing_timeout=seconds), timeout_seconds=seconds) else wrong

    return AnswerReward(column, compare)


def exact_match(*, column: str = "answer", pattern: str = "", ignore_case: bool = False, right: float = 1.0, wrong: float = -1.0) -> AnswerReward:
    """Whether a completion is the row's answer, but for spaces around either.

    Args:
        column: Column of the answers.
        pattern: Regular expression whose first group (or whole match) is the answer inside the completion; the last match counts.
        ignore_case: Take upper and lower case as equal.
        right: Reward of an equal one.
        wrong: Of another, or of none.

    Raises:
        ConfigError: the pattern is no regular expression.
    """
    compiled = _compiled(pattern) if pattern else None

    def compare(completion: str, answer: Any) -> float:
        said, wanted = completion, str(answer)
        if compiled is not None:
            try:
                found = list(compiled.finditer(completion, timeout=_PATTERN_SECONDS))
            except TimeoutError:
                return np.nan
            said = (found[-1][1 if compiled.groups else 0] or "") if found else None
        if said is not None and ignore_case:
            said, wanted = said.casefold(), wanted.casefold()
        return right if said is not None and said.strip() == wanted.strip() else wrong

    return AnswerReward(column, compare)


def multiple_choice(*, column: str = "answer", right: float = 1.0, wrong: float = -1.0) -> AnswerReward:
    r"""Whether the letter that a completion gives is the row's.

    A letter is given in `\boxed{B}`; after `answer is` or `answer:`; at the beginning, if it stands alone or before punctuation; by itself in the
    last line; after `option` or `choice`. The first of these that is there decides.

    Args:
        column: Column of the answers: a letter, or the number of the choice from 0. Anything else is unscorable.
        right: Reward of the same letter.
        wrong: Of another, or of none.
    """

    def compare(completion: str, answer: Any) -> float:
        wanted = _letter(answer)
        return np.nan if not wanted else right if chosen_letter(completion) == wanted else wrong

    return AnswerReward(column, compare)


@dataclass(frozen=True)
class LanguageShare:
    """Share of the letters of each completion that are of its row's own language: SASFT's reward against switching, by letters.

    Attributes:
        column: Column of the languages' codes.
    """

    column: str

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that it needs."""
        return (self.column,)

    def __call__(self, *, completions: list[str], **columns: list[Any]) -> list[float]:
        """A share for each completion; NaN where the script of the language is not known."""
        scripts = ["+".join(language_scripts(str(code))) for code in columns[self.column]]
        return [share_of_script(said, own) if own else np.nan for said, own in zip(completions, scripts, strict=True)]


def script_share(*, script: str = "", language_column: str = "") -> Callable[..., list[float]]:
    """Share of a script among the letters of a completion; 0 without letters. A negative weight keeps the script down.

    Args:
        script: One of `qscope_jax.features.scripts.SCRIPTS`, or several joined by a plus.
        language_column: In its place the column of each row's language, whose scripts are meant.

    Raises:
        ConfigError: both are given, or neither.
        InputError: another script.
    """
    if bool(script) == bool(language_column):
        raise ConfigError(f"script is {script!r} and language_column {language_column!r}; give one of them")
    if language_column:
        return LanguageShare(language_column)
    share_of_script("", script)
    return lambda *, completions, **columns: [share_of_script(completion, script) for completion in completions]


def format_match(*, pattern: str, right: float = 1.0, wrong: float = 0.0) -> Function:
    r"""Whether a regular expression is found in a completion; `.` matches line ends too, and `\A` and `\Z` tie it to the ends.

    Args:
        pattern: The expression.
        right: Reward where it is found.
        wrong: Where it is not. An expression that searches for over a second is unscorable.

    Raises:
        ConfigError: the pattern is no regular expression.
    """
    compiled = _compiled(pattern)

    def found(completion: str) -> float:
        try:
            return right if compiled.search(completion, timeout=_PATTERN_SECONDS) else wrong
        except TimeoutError:
            return np.nan

    return lambda *, completions, **columns: [found(completion) for completion in completions]


def ngram_repetition(*, ngram_size: int = 3, max_penalty: float = -1.0) -> Function:
    """Penalty of repeated n-grams of tokens; see `shaping.ngram_repetition_penalty`."""
    check_ngrams(ngram_size, max_penalty)
    return lambda *, completion_ids, **columns: [
        ngram_repetition_penalty(ids, ngram_size=ngram_size, max_penalty=max_penalty) for ids in completion_ids
    ]


def length(*, max_completion_len: int, soft_punish_cache: int) -> Function:
    """Punishment of long completions; see `shaping.soft_overlong_punishment`."""
    check_overlong(max_completion_len, soft_punish_cache)

    def reward(*, completion_ids: list[list[int]], **columns: list[Any]) -> list[float]:
        lengths_N = np.array([len(ids) for ids in completion_ids], np.int64)
        return soft_overlong_punishment(lengths_N, max_completion_len=max_completion_len, soft_punish_cache=soft_punish_cache).tolist()

    return reward


SHIPPED: Mapping[str, Callable[..., Function]] = {
    "numeric": numeric,
    "exact_match": exact_match,
    "multiple_choice": multiple_choice,
    "script_share": script_share,
    "format": format_match,
    "ngram_repetition": ngram_repetition,
    "length": length,
}
"""Name -> what makes the function from its options."""


def chosen_letter(completion: str) -> str:
    """The letter that a completion gives as its answer, empty where it gives none. See `multiple_choice`."""
    for pattern in _CHOICE:
        if found := pattern.findall(completion):
            return found[-1]
    return ""


def _letter(answer: Any) -> str:
    """The letter of a row's answer; empty where it is none."""
    text = str(answer).strip().strip("()[].").upper()
    if (isinstance(answer, Integral) or text.isdecimal()) and not isinstance(answer, bool):
        return string.ascii_uppercase[int(text)] if int(text) < 26 else ""
    return text if len(text) == 1 and text in string.ascii_uppercase else ""


def _blank(answer: Any) -> bool:
    return answer is None or (isinstance(answer, str) and not answer.strip())


def _compiled(pattern: str) -> "regex.Pattern[str]":
    try:
        return regex.compile(pattern, regex.DOTALL)
    except regex.error as error:
        raise ConfigError(f"its pattern {pattern!r} is no regular expression ({error}); mend it") from error
