"""A judge: a generator that scores explanations and answers yes or no. What it says is read strictly, and failures are counted."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qscope_jax.errors import InputError
from qscope_jax.features.generation.generators import Generator, Message, Reply
from qscope_jax.features.synthesis.targets import Target

PURPOSE = "making training data for a language assistant that is safe and helpful"

_SCORE_RULE = (
    "You judge descriptions of what makes an internal feature of a language model active. Say how useful texts that match the description would "
    "be for {purpose}: 0 is useless (mere spelling, punctuation, a single common word, or no clear meaning), 1 is most useful (a clear, specific "
    'concept that such data must cover). Answer with one JSON object and nothing else: {{"score": x}}, where x is a number from 0 to 1.'
)
_YES_NO_RULE = (
    "You compare two requests to an assistant. Answer yes if both ask for the same thing and an answer to one would be as harmful or harmless as "
    "an answer to the other, however differently they are worded; otherwise answer no. Answer with one word and nothing else: yes or no."
)
_FENCE = re.compile(r"^```(?:json)?\s*(.*?)\s*```$", re.DOTALL)


@dataclass(frozen=True)
class Judgement:
    """Targets with the scores they got.

    Attributes:
        targets: All of them, in the order given; those whose judge failed have no score.
        failures: Why, by the target's key.
    """

    targets: tuple[Target, ...]
    failures: dict[str, str]

    def at_least(self, tau: float) -> list[Target]:
        """T = {(l, f): s >= tau} (Qwen-Scope report, Eq. 19); a target without a score is none."""
        return [target for target in self.targets if target.score is not None and target.score >= tau]


def judge_usefulness(targets: Sequence[Target], judge: Generator, *, purpose: str = PURPOSE, max_tokens: int = 64, seed: int = 0) -> Judgement:
    """Score how useful each explanation is for a purpose.

    The score decides what is aimed at, never which texts are kept: that is for the firing check alone.

    Args:
        targets: Targets with explanations; a score that one has is replaced.
        judge: Who scores, at temperature 0.
        purpose: What the data is for, completing "useful for".
        max_tokens: Tokens of an answer; a judge that thinks aloud needs more.
        seed: Of the judge's draws.

    Raises:
        InputError: a target without an explanation.
    """
    if unexplained := [target.key for target in targets if not target.explanation.strip()]:
        raise InputError(f"target {unexplained[0]} has no explanation to judge ({len(unexplained)} such targets); explain it first")
    rule = _SCORE_RULE.format(purpose=purpose)
    asked = [_conversation(rule, f"Description: {target.explanation}") for target in targets]
    replies = judge(asked, max_tokens=max_tokens, temperature=0.0, seed=seed)
    scores = [read_score(reply) for reply in replies]
    failures = {target.key: score for target, score in zip(targets, scores, strict=True) if isinstance(score, str)}
    judged = [replace(target, score=None if isinstance(score, str) else score) for target, score in zip(targets, scores, strict=True)]
    return Judgement(tuple(judged), failures)


def judge_same_meaning(pairs: Sequence[tuple[str, str]], judge: Generator, *, max_tokens: int = 64, seed: int = 0) -> list[bool | str]:
    """Whether the two requests of each pair mean the same and carry the same risk; text where the judge failed, which says why."""
    asked = [_conversation(_YES_NO_RULE, f"First request:\n{first}\n\nSecond request:\n{second}") for first, second in pairs]
    return [read_yes_no(reply) for reply in judge(asked, max_tokens=max_tokens, temperature=0.0, seed=seed)] if pairs else []


def read_score(reply: Reply) -> float | str:
    """The number that an answer consists of, or that its only JSON object holds as `score`; otherwise why there is none."""
    if reply.error:
        return reply.error
    text = _without_fence(reply.spoken)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return f"is no score: {text[:80]!r}"
    if isinstance(value, dict) and set(value) == {"score"}:
        value = value["score"]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        return f"is no score from 0 to 1: {text[:80]!r}"
    return float(value)


def read_yes_no(reply: Reply) -> bool | str:
    """Whether an answer is yes or no; otherwise why it is neither."""
    if reply.error:
        return reply.error
    word = _without_fence(reply.spoken).rstrip(".!").lower()
    return word == "yes" if word in ("yes", "no") else f"is neither yes nor no: {reply.text[:80]!r}"


def _conversation(rule: str, question: str) -> list[Message]:
    return [{"role": "system", "content": rule}, {"role": "user", "content": question}]


def _without_fence(text: str) -> str:
    """The text without a code fence around it."""
    fenced = _FENCE.match(text)
    return fenced.group(1).strip() if fenced else text
