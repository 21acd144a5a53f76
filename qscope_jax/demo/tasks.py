"""Twelve small tasks in five families, as benchmarks for the embedded model, whose redundancy is known by construction.

Tasks of a family share their material and their frame (the same numbers and `=`, the same letters and `:`, the same words and `->`, the same
verbs and subjects), so that they overlap by construction; families share nothing but who asks.

A task is some questions, each asked by some people: `Anna : in French , house ->`. Who asks has no bearing on the answer, and so a task whose
few questions are asked by many is redundant, while one of many questions that are asked once each is not. From the first rung of `_RUNGS` to
the last, questions grow from 6 to 40 as askers fall from 40 to 1. The rungs are dealt in the order of size that the tasks had before questions
were counted, so that every family of three has a redundant, a middling and a varied task.

Difficulty is graded within every task. Its questions are in order, from easy to hard where that can be told (the size of the numbers, how many
letters, regular verbs before irregular ones), and training asks them the more rarely the later they stand: the first `_RARITY / K` times as
often as the last of K, whatever the task. Wrong options are answers to other questions of the task where it can be so, and an option is read
to the end of its line: without that, one that begins another (`walk`, `walks`) is always the likelier.

The tasks were written down before a model was trained on them, and were measured once; the rungs are shaped after the better of ten that had
been tried on simulated answers, with learning curves as the earlier model's. Measured: Spearman 0.89 of R-hat with redundancy by scores. Size
grows with redundancy on these rungs, and the number of samples alone gives 0.92; with size taken out 0.18 is left.

Two earlier sets of tasks had given -0.15 (most tasks were never learnt) and -0.47 (tasks were learnt all at once or not at all, so that
redundancy by scores told the shape of a learning curve; a third of the verbs' samples could not be answered, for the reason above).
Checkpoints are evenly spread, because the earlier run learnt its tasks between a fifth and four fifths of its steps.

No prompt begins with what it asks about, since a model's first token is no guide to meaning. Solved samples of the same questions are in the
training documents: these benchmarks ask what was learnt, not how far it carries.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import yaml

_MATERIAL = Path(__file__).parent / "corpus" / "tasks.yaml"
_OPTIONS = 4
_SOLVED = 6
_RARITY = 400
_ALPHABET = "bcdfghkmptvz"
_RUNGS = ((6, 40), (8, 27), (10, 19), (12, 13), (15, 9), (18, 6), (22, 4), (26, 3), (30, 2), (34, 1), (37, 1), (40, 1))
"""Questions of a task, and people who ask each of them."""


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
        samples: Its questions, each as often as it has askers.
        askers: How many ask each question.
    """

    name: str
    family: str
    samples: tuple[Sample, ...]
    askers: int = 1


@cache
def tasks() -> tuple[Task, ...]:
    """The twelve benchmarks, always the same."""
    return tuple(_task(name, family, *_RUNGS[rung]) for name, (family, rung, _) in _rules().items())


def task_document(rng: random.Random) -> str:
    """A training document: a few solved samples of one task, a line each, the easier ones more often."""
    name, (_, rung, _) = rng.choice(list(_rules().items()))
    questions = _questions(name, _RUNGS[rung][0])
    drawn = rng.choices(questions, weights=np.geomspace(_RARITY / len(questions), 1, len(questions)).tolist(), k=_SOLVED)
    asked = [_asked(question, rng.choice(_material()["askers"])) for question in drawn]
    return "\n".join(f"{sample.prompt} {sample.answer}" for sample in asked)


def _task(name: str, family: str, questions: int, askers: int) -> Task:
    rng = random.Random(name)
    people = _material()["askers"]
    asked = [_asked(question, person) for question in _questions(name, questions) for person in rng.sample(people, askers)]
    return Task(name, family, tuple(asked), askers)


def _asked(question: Sample, asker: str) -> Sample:
    return Sample(f"{asker} : {question.prompt}", question.answer, question.options)


@cache
def _material() -> dict:
    return yaml.safe_load(_MATERIAL.read_text(encoding="utf-8"))


@cache
def _questions(name: str, count: int) -> tuple[Sample, ...]:
    """A task's questions, from the easiest on."""
    questions = tuple(_rules()[name][2](count, random.Random(name)))
    assert len({question.prompt for question in questions}) == count
    return questions


@cache
def _rules() -> dict[str, tuple[str, int, Callable[[int, random.Random], Iterable[Sample]]]]:
    """For each task its family, its rung and what makes so many questions."""
    known = _material()
    french, opposites = known["french"], known["opposites"] | {b: a for a, b in known["opposites"].items()}
    english = {b: a for a, b in french.items()}
    return {
        "addition": ("arithmetic", 1, partial(_arithmetic, "+", ("add {} + {} =", "sum of {} and {} =", "count {} and {} more =", "plus {} {} ="))),
        "subtraction": ("arithmetic", 5, partial(_arithmetic, "-", ("take {} - {} =", "from {} take {} ="))),
        "comparison": ("arithmetic", 10, _comparison),
        "copying": ("letters", 2, partial(_letters, "copy", (2, 3, 4))),
        "reversal": ("letters", 6, partial(_letters, "reverse", (2, 3))),
        "last letter": ("letters", 9, partial(_letters, "last", (2, 3, 4))),
        "into French": ("words", 3, partial(_lookup, ("in French , {} ->", "the French word for {} ->", "say {} in French ->"), french)),
        "into English": ("words", 7, partial(_lookup, ("in English , {} ->", "the English word for {} ->", "say {} in English ->"), english)),
        "opposites": ("words", 11, partial(_lookup, ("the opposite of {} ->", "not {} but ->", "the other of {} ->"), opposites)),
        "agreement": ("verbs", 0, partial(_agreement, known["verbs"][:6], known["nouns"][:6])),
        "tense": ("verbs", 4, partial(_tense, known["verbs"], known["nouns"])),
        "facts": ("facts", 8, partial(_facts, known["facts"])),
    }


def _sample(prompt: str, answer: str, wrong: Iterable[str], rng: random.Random) -> Sample:
    others = sorted(set(wrong) - {answer})
    return Sample(prompt, answer, tuple(sorted([answer, *rng.sample(others, min(_OPTIONS - 1, len(others)))])))


def _arithmetic(sign: str, frames: Sequence[str], count: int, rng: random.Random) -> list[Sample]:
    """Small numbers first."""
    pairs = rng.sample([(a, b) for a in range(10) for b in range(1, 5) if sign == "+" or a >= b], count)
    found = []
    for number, (a, b) in enumerate(sorted(pairs, key=sum)):
        result = a + b if sign == "+" else a - b
        near = [str(result + step) for step in (-3, -2, -1, 1, 2, 3) if result + step >= 0]
        found.append(_sample(frames[number % len(frames)].format(a, b), str(result), near, rng))
    return found


def _comparison(count: int, rng: random.Random) -> list[Sample]:
    """Two numbers before three."""
    found: dict[str, Sample] = {}
    while len(found) < count:
        numbers = rng.sample(range(10), 2 if len(found) < count // 2 else 3)
        word, choose = rng.choice([("largest", max), ("smallest", min)])
        wrong = [str(number) for number in numbers if number != choose(numbers)]
        wrong += rng.sample([str(number) for number in range(10) if number not in numbers], _OPTIONS - 1 - len(wrong))
        sample = _sample(f"{word} of {' , '.join(map(str, numbers))} =", str(choose(numbers)), wrong, rng)
        found.setdefault(sample.prompt, sample)
    return list(found.values())


def _letters(order: str, lengths: Sequence[int], count: int, rng: random.Random) -> list[Sample]:
    """Few letters first."""
    found: dict[str, Sample] = {}
    while len(found) < count:
        letters = rng.sample(_ALPHABET, lengths[len(found) * len(lengths) // count])
        answer = {"copy": letters, "reverse": letters[::-1], "last": letters[-1:]}[order]
        wrong = [answer[::-1], rng.sample(_ALPHABET, len(answer))]
        wrong += [[*answer[:place], rng.choice(_ALPHABET), *answer[place + 1 :]] for place in range(len(answer)) for _ in range(3)]
        sample = _sample(f"{order} {' '.join(letters)} :", " ".join(answer), map(" ".join, wrong), rng)
        if len(sample.options) == _OPTIONS:
            found.setdefault(sample.prompt, sample)
    return list(found.values())


def _lookup(frames: Sequence[str], table: dict[str, str], count: int, rng: random.Random) -> list[Sample]:
    """Words in the order of the table."""
    words = list(table)[:count]
    answers = [table[word] for word in words]
    return [_sample(frames[number % len(frames)].format(word), table[word], answers, rng) for number, word in enumerate(words)]


def _agreement(verbs: Sequence[Sequence[str]], nouns: Sequence[Sequence[str]], count: int, rng: random.Random) -> list[Sample]:
    """Plural subjects, which take the verb as it is given, before singular ones."""
    found = []
    for number, (verb, noun) in enumerate(zip(rng.sample(verbs, count), rng.sample(nouns, count), strict=True)):
        one = int(number >= count // 2)
        found.append(_sample(f"to {verb[0]} ; today the {noun[1 - one]}", verb[one], verb, rng))
    return found


def _tense(verbs: Sequence[Sequence[str]], nouns: Sequence[Sequence[str]], count: int, rng: random.Random) -> list[Sample]:
    """Regular verbs first."""
    found = []
    for verb in sorted(rng.sample(verbs, count), key=lambda verb: not verb[2].endswith("ed")):
        when = rng.choice(["yesterday", "last year", "long ago"])
        found.append(_sample(f"to {verb[0]} ; {when} the {rng.choice(rng.choice(nouns))}", verb[2], verb, rng))
    return found


def _facts(facts: dict[str, dict[str, str]], count: int, rng: random.Random) -> list[Sample]:
    """A first fact of every kind, then a second, and so on."""
    ranked = sorted((place, kind, about) for kind, (_, known) in enumerate(facts.items()) for place, about in enumerate(known))
    frames = list(facts)
    kinds = [(frames[kind], about) for _, kind, about in ranked[:count]]
    return [_sample(frame.format(about), facts[frame][about], facts[frame].values(), rng) for frame, about in kinds]
