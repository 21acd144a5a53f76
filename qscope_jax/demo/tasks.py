"""Twelve small tasks in five families, as benchmarks for the embedded model.

Tasks of a family share their material and their frame (the same numbers and `=`, the same letters and `:`, the same words and `->`, the same
verbs and subjects), so that they overlap by construction; families share nothing. How redundant a benchmark is should follow from how many
samples it has and how much they vary. The sizes were fixed before anything was correlated: a geometric ladder from 10 to 200, dealt out so that
every family of three has a large, a middle and a small task. The material was made less, once, after a first model had left most tasks at chance
(and its correlation, -0.15, had been seen): it is as little as a model of this size can learn most of in its few hundred steps, and the larger a
task the less it has for its size, as benchmarks made from templates do. No prompt begins with what it asks about, since a model's first
token is no guide to meaning. Solved samples of the same rules are in the training documents: these benchmarks ask what was learnt, not how
far it carries.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import yaml

_MATERIAL = Path(__file__).parent / "corpus" / "tasks.yaml"
_OPTIONS = 4
_SOLVED = 6


@dataclass(frozen=True)
class Sample:
    """A question.

    Attributes:
        prompt: What the model reads.
        answer: What should follow, after a space.
        options: The answer among wrong ones, in alphabetical order.
    """

    prompt: str
    answer: str
    options: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """A benchmark of distinct samples.

    Attributes:
        name: Its name.
        family: What it has in common with others.
        samples: Its questions.
    """

    name: str
    family: str
    samples: tuple[Sample, ...]


@cache
def tasks() -> tuple[Task, ...]:
    """The twelve benchmarks, always the same."""
    return tuple(Task(name, family, _distinct(draw, size, random.Random(name))) for name, (family, size, draw) in _rules().items())


def task_document(rng: random.Random) -> str:
    """A training document: a few solved samples of one task, a line each."""
    _, _, draw = rng.choice(list(_rules().values()))
    return "\n".join(f"{sample.prompt} {sample.answer}" for sample in (draw(rng) for _ in range(_SOLVED)))


@cache
def _rules() -> dict[str, tuple[str, int, Callable[[random.Random], Sample]]]:
    """For each task its family, its size and how to draw a sample."""
    known = yaml.safe_load(_MATERIAL.read_text(encoding="utf-8"))
    french, opposites = known["french"], known["opposites"] | {b: a for a, b in known["opposites"].items()}
    english = {b: a for a, b in french.items()}
    return {
        "addition": ("arithmetic", 160, partial(_arithmetic, "+", ("add {} + {} =", "sum of {} and {} =", "count {} and {} more =", "plus {} {} ="))),
        "subtraction": ("arithmetic", 53, partial(_arithmetic, "-", ("take {} - {} =", "from {} take {} ="))),
        "comparison": ("arithmetic", 13, _comparison),
        "copying": ("letters", 121, partial(_letters, "copy", "bcdfghkmptvz", (2,))),
        "reversal": ("letters", 40, partial(_letters, "reverse", "bcdfghkmptvz", (2,))),
        "last letter": ("letters", 17, partial(_letters, "last", "bcdfghkmptvz", (2, 3, 4))),
        "into French": ("words", 92, partial(_lookup, ("in French , {} ->", "the French word for {} ->", "say {} in French ->"), french)),
        "into English": ("words", 30, partial(_lookup, ("in English , {} ->", "the English word for {} ->", "say {} in English ->"), english)),
        "opposites": ("words", 10, partial(_lookup, ("the opposite of {} ->", "not {} but ->", "the other of {} ->"), opposites)),
        "agreement": ("verbs", 200, partial(_agreement, known["verbs"][:20], known["nouns"][:6])),
        "tense": ("verbs", 70, partial(_tense, known["verbs"], known["nouns"])),
        "facts": ("facts", 23, partial(_fact, known["facts"])),
    }


def _distinct(draw: Callable[[random.Random], Sample], size: int, rng: random.Random) -> tuple[Sample, ...]:
    found: dict[str, Sample] = {}
    while len(found) < size:
        sample = draw(rng)
        found.setdefault(sample.prompt, sample)
    return tuple(found.values())


def _sample(prompt: str, answer: str, wrong: list[str], rng: random.Random) -> Sample:
    others = sorted(set(wrong) - {answer})
    return Sample(prompt, answer, tuple(sorted([answer, *rng.sample(others, min(_OPTIONS - 1, len(others)))])))


def _arithmetic(sign: str, frames: tuple[str, ...], rng: random.Random) -> Sample:
    a, b = rng.randint(0, 9), rng.randint(0, 4)
    if sign == "-":
        a, b = max(a, b), min(a, b)
    result = a + b if sign == "+" else a - b
    near = [str(result + step) for step in (-3, -2, -1, 1, 2, 3) if result + step >= 0]
    return _sample(rng.choice(frames).format(a, b), str(result), near, rng)


def _comparison(rng: random.Random) -> Sample:
    a, b = rng.sample(range(10), 2)
    frame, choose = rng.choice([("larger of {} and {} =", max), ("smaller of {} and {} =", min), ("of {} or {} the larger =", max)])
    return _sample(frame.format(a, b), str(choose(a, b)), [str(a), str(b)], rng)


def _letters(order: str, alphabet: str, lengths: tuple[int, ...], rng: random.Random) -> Sample:
    letters = [rng.choice(alphabet) for _ in range(rng.choice(lengths))]
    prompt = f"{order} {' '.join(letters)} :"
    if order == "last":
        return _sample(prompt, letters[-1], letters + rng.sample(alphabet, _OPTIONS), rng)
    answer = letters if order == "copy" else letters[::-1]
    wrong = [answer[::-1], [rng.choice(alphabet), answer[1]], [answer[0], rng.choice(alphabet)], rng.sample(alphabet, 2)]
    return _sample(prompt, " ".join(answer), [" ".join(pair) for pair in wrong], rng)


def _lookup(frames: tuple[str, ...], table: dict[str, str], rng: random.Random) -> Sample:
    word = rng.choice(list(table))
    return _sample(rng.choice(frames).format(word), table[word], list(table.values()), rng)


def _agreement(verbs: list[list[str]], nouns: list[list[str]], rng: random.Random) -> Sample:
    base, singular, _ = rng.choice(verbs)
    noun, number = rng.choice(nouns), rng.randint(0, 1)
    return _sample(f"to {base} ; today the {noun[number]}", (singular, base)[number], [singular, base], rng)


def _tense(verbs: list[list[str]], nouns: list[list[str]], rng: random.Random) -> Sample:
    base, singular, past = rng.choice(verbs)
    noun = rng.choice(rng.choice(nouns))
    when = rng.choice(["yesterday", "last year", "long ago"])
    return _sample(f"to {base} ; {when} the {noun}", past, [base, singular, past], rng)


def _fact(facts: dict[str, dict[str, str]], rng: random.Random) -> Sample:
    frame = rng.choice(list(facts))
    about = rng.choice(list(facts[frame]))
    return _sample(frame.format(about), facts[frame][about], list(facts[frame].values()), rng)
