"""What a language model is asked about contexts of a feature, and how its answers are read: strictly, with failures counted."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from qscope_jax.features.explain.marked_text import CLOSE, OPEN
from qscope_jax.features.generation.generators import Message, Reply

_EXPLAIN = f"""You study one feature inside a language model: a number that is large at some tokens of a text and zero at all others. \
You are given stretches of text in which it is active, each on a line of its own. The tokens at which it is active are between {OPEN} and {CLOSE}, \
and the number before a line says how strongly, from 1 to 10. ↵ stands for a new line.
Say in one sentence what the marked tokens have in common: what they mean, how they are used, or what surrounds them. Be specific enough that a \
reader could tell such tokens from others, and no more specific than the examples allow. Do not mention the marks or the strengths.
End your answer with one line: Explanation: <the sentence>"""

_DETECT = """You are given an explanation of what makes a feature of a language model active, and numbered stretches of text, each on a line of its \
own. For each stretch decide whether it contains what the explanation describes.
Answer with a JSON list of 0 (no) and 1 (yes), one number for each stretch in order, such as [1, 0, 1], and nothing else."""

_FUZZ = f"""You are given an explanation of what makes a feature of a language model active, and numbered stretches of text, each on a line of its \
own. In each stretch some tokens are marked: those between {OPEN} and {CLOSE}. For each stretch decide whether the marked tokens are those that the \
explanation describes.
Answer with a JSON list of 0 (no) and 1 (yes), one number for each stretch in order, such as [1, 0, 1], and nothing else."""

_LIST = re.compile(r"\[\s*(?:[01]\s*,\s*)*[01]\s*\]")
_SHOWN = 80


class Example(NamedTuple):
    """A context as a line, and what the right answer to a question about it is."""

    line: str
    right: bool


@dataclass(frozen=True)
class JudgeScore:
    """A judge's answers about examples of both kinds.

    Attributes:
        true_positives: Examples with the feature (or rightly marked) that it said yes to.
        false_negatives: Those that it said no to.
        true_negatives: Examples without it (or wrongly marked) that it said no to.
        false_positives: Those that it said yes to.
        unparsable: Examples whose answer could not be read.
        failed: Examples whose question got no answer.
        failure: Why, the first time.
    """

    true_positives: int
    false_negatives: int
    true_negatives: int
    false_positives: int
    unparsable: int = 0
    failed: int = 0
    failure: str = ""

    @property
    def measured(self) -> bool:
        """Whether examples of both kinds were answered."""
        return self.true_positives + self.false_negatives > 0 and self.true_negatives + self.false_positives > 0

    @property
    def balanced_accuracy(self) -> float:
        """Mean of the shares of both kinds that were answered rightly, 0.5 for a guess; NaN where one kind was not answered at all."""
        if not self.measured:
            return float("nan")
        yes = self.true_positives / (self.true_positives + self.false_negatives)
        no = self.true_negatives / (self.true_negatives + self.false_positives)
        return (yes + no) / 2


def explanation_question(lines: Sequence[str]) -> list[Message]:
    """Ask for an explanation of marked lines."""
    return _conversation(_EXPLAIN, "\n".join(lines))


def detection_question(explanation: str, lines: Sequence[str]) -> list[Message]:
    """Ask which lines hold what an explanation describes."""
    return _conversation(_DETECT, _numbered(explanation, lines))


def fuzzing_question(explanation: str, lines: Sequence[str]) -> list[Message]:
    """Ask in which lines the tokens that an explanation describes are marked."""
    return _conversation(_FUZZ, _numbered(explanation, lines))


def read_explanation(reply: Reply) -> tuple[str, str]:
    """The sentence of an answer, or "" and why there is none.

    An answer of one line without the word that should stand before it is taken as it is.
    """
    if reply.error:
        return "", f"no explanation: {reply.error}"
    lines = [line.strip(" *") for line in reply.spoken.splitlines() if line.strip(" *")]
    named = [match[1].strip(" *") for line in lines if (match := re.match(r"explanation\W*:\**(.*)", line, re.IGNORECASE))]
    found = named[-1] if named else lines[0] if len(lines) == 1 else ""
    return (found, "") if found else ("", f"no explanation in the answer {_cut(reply.text)!r}")


def read_answers(reply: Reply, count: int) -> list[bool] | None:
    """The answers to `count` examples; None where the reply is anything but one list of so many 0 and 1."""
    lists = _LIST.findall(reply.spoken)
    answers = [digit == "1" for digit in re.findall("[01]", lists[0])] if len(lists) == 1 else []
    return answers if len(answers) == count else None


def judge_score(examples: Sequence[Sequence[Example]], replies: Sequence[Reply]) -> JudgeScore:
    """Count right and wrong answers: a reply for each group of examples."""
    counts = {(right, said): 0 for right in (True, False) for said in (True, False)}
    unparsable = failed = 0
    failures = []
    for group, reply in zip(examples, replies, strict=True):
        answers = None if reply.error else read_answers(reply, len(group))
        if answers is None:
            failed += len(group) * bool(reply.error)
            unparsable += len(group) * (not reply.error)
            failures.append(reply.error or f"the answer {_cut(reply.text)!r} is no list of {len(group)} numbers 0 and 1")
            continue
        for example, said in zip(group, answers, strict=True):
            counts[example.right, said] += 1
    return JudgeScore(
        counts[True, True], counts[True, False], counts[False, False], counts[False, True], unparsable, failed, failures[0] if failures else ""
    )


def _numbered(explanation: str, lines: Sequence[str]) -> str:
    return "\n".join((f"Explanation: {explanation}", "", *(f"{number}. {line}" for number, line in enumerate(lines, 1))))


def _conversation(rule: str, question: str) -> list[Message]:
    return [{"role": "system", "content": rule}, {"role": "user", "content": question}]


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
