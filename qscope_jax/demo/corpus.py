"""The corpus of the embedded model: six languages, written for this project, beside Python's own documentation.

Every language has a file of natural sentences under twenty topics, and a grammar that expands to tens of thousands more. The last
sentences of each topic are held out: neither the model nor the SAEs nor any choice of a feature sees them. Rude and polite passages
(`tone.py`) are a modest share of every language's, and solved tasks (`tasks.py`) of all documents.
"""

import pydoc_data.topics
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import yaml

from qscope_jax.demo.grammar import expand
from qscope_jax.demo.tasks import task_document
from qscope_jax.demo.tone import TONES, tone_passage

LANGUAGES = {"en": "English", "zh": "Chinese", "ru": "Russian", "ko": "Korean", "fr": "French", "ar": "Arabic"}
HELD_OUT_PER_TOPIC = 4
PROSE_SHARE, TASK_SHARE = 0.12, 0.3
_NATURAL, _TONE = 0.42, 0.25
_FOLDER = Path(__file__).parent / "corpus"
_JOIN = {"zh": ""}


@dataclass(frozen=True)
class Topic:
    """Sentences of one topic in one language, in order."""

    name: str
    train: tuple[str, ...]
    held_out: tuple[str, ...]


@cache
def topics(language: str) -> tuple[Topic, ...]:
    """The twenty topics of a language."""
    found: list[tuple[str, list[str]]] = []
    for line in (_FOLDER / f"{language}.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            found.append((line[2:], []))
        elif line.strip():
            found[-1][1].append(line.strip())
    return tuple(Topic(name, tuple(lines[:-HELD_OUT_PER_TOPIC]), tuple(lines[-HELD_OUT_PER_TOPIC:])) for name, lines in found)


def sentences(language: str, *, held_out: bool = False) -> list[str]:
    """The natural sentences of a language, either those for training or those held out."""
    return [line for topic in topics(language) for line in (topic.held_out if held_out else topic.train)]


@cache
def python_documentation() -> tuple[str, ...]:
    """Paragraphs of English prose from the documentation topics that every Python carries; code and tables are left out."""
    paragraphs = []
    for _, text in sorted(pydoc_data.topics.topics.items()):
        for block in text.split("\n\n"):
            if block.startswith((" ", "*", "+", "|", "-", "=")) or not block.strip():
                continue
            paragraph = " ".join(block.split())
            letters = sum(c.isalpha() or c.isspace() for c in paragraph)
            if len(paragraph) > 80 and letters > 0.9 * len(paragraph):
                paragraphs.append(paragraph)
    return tuple(paragraphs)


def grammar_sentence(language: str, rng: random.Random) -> str:
    """One random expansion of the language's grammar."""
    slots, templates = _grammar(language)
    return expand(rng.choice(templates), slots, rng)


def documents(count: int, seed: int = 0, *, mixed_share: float = 0.04) -> list[str]:
    """Draw training documents: short paragraphs in one language each, a few of which change language between sentences.

    Args:
        count: How many.
        seed: Of every choice.
        mixed_share: Share of the documents in the six languages (neither Python's nor tasks) which mix two of them, so that a change of
            language is possible but rare.
    """
    return list(_documents(count, random.Random(seed), mixed_share))


def mixed_prompts(count: int, first: str = "en", second: str = "zh", seed: int = 0) -> list[str]:
    """Held-out prompts that have changed from one language to another and stop a few characters into the second."""
    rng = random.Random(seed)
    pairs = [(rng.choice(sentences(first, held_out=True)), rng.choice(sentences(second, held_out=True))) for _ in range(count)]
    return [f"{a} {b[:4]}" for a, b in pairs]


def _documents(count: int, rng: random.Random, mixed_share: float) -> Iterator[str]:
    codes = list(LANGUAGES)
    prose = python_documentation()
    for _ in range(count):
        kind = rng.random()
        if kind < PROSE_SHARE:
            yield rng.choice(prose)
        elif kind < PROSE_SHARE + TASK_SHARE:
            yield task_document(rng)
        elif rng.random() < mixed_share:
            first, second = rng.sample(codes, 2)
            draw = _passages(rng)
            yield " ".join(draw(language, rng.randint(1, 3)) for language in rng.choice([(first, second), (first, second, first)]))
        else:
            yield _passages(rng)(rng.choice(codes), rng.randint(2, 6))


def _passages(rng: random.Random) -> Callable[[str, int], str]:
    """A kind of passage, to be drawn in any language: natural sentences of a topic, one tone, or the grammar."""
    kind = rng.random()
    if kind < _NATURAL:
        write = partial(_consecutive, rng)
    elif kind < _NATURAL + _TONE:
        tone = rng.choice(TONES)

        def write(language: str, length: int) -> list[str]:
            return tone_passage(language, tone, rng, length)

    else:

        def write(language: str, length: int) -> list[str]:
            return [grammar_sentence(language, rng) for _ in range(length)]

    return lambda language, length: _JOIN.get(language, " ").join(write(language, length))


def _consecutive(rng: random.Random, language: str, length: int) -> list[str]:
    lines = rng.choice(topics(language)).train
    start = rng.randrange(max(len(lines) - length, 0) + 1)
    return list(lines[start : start + length])


@cache
def _grammar(language: str) -> tuple[dict[str, list[str]], list[str]]:
    grammar = yaml.safe_load((_FOLDER / f"{language}.yaml").read_text(encoding="utf-8"))
    return grammar["slots"], grammar["templates"]
