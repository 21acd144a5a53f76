"""Rude and polite sentences in the six languages: everyday manners, labelled, for the classifiers of the tour.

Every language has, for either tone, sentences written by hand and a grammar of some thousands more. The last sentences and the last values
of every slot are held out: a held-out sentence is written by hand or holds at least one word that no training sentence of its grammar has.
They were written after the rule of the tour was chosen, and before a model was trained beside them: F1 0.820 in English. Those that had been
held out until then (0.825) are now for training.
"""

import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from qscope_jax.demo.grammar import expand

TONES = ("polite", "rude")
REACTIONS = {"polite": ":)", "rude": ":("}
HELD_OUT_SENTENCES, HELD_OUT_VALUES = 8, 2
_FOLDER = Path(__file__).parent / "corpus"


@dataclass(frozen=True)
class ToneSentence:
    """A labelled sentence.

    Attributes:
        text: The sentence.
        tone: `rude` or `polite`.
        language: Its language's code.
        split: `train` or `held_out`.
    """

    text: str
    tone: str
    language: str
    split: str


def tone_sentences(languages: Sequence[str], *, train: int = 240, held_out: int = 100, seed: int = 0) -> list[ToneSentence]:
    """Distinct labelled sentences, as many of either tone: those written by hand first, then expansions of the grammar.

    Args:
        languages: Codes of languages.
        train: Training sentences of either tone in every language.
        held_out: Held-out sentences of either tone in every language.
        seed: Of the expansions.
    """
    found = []
    for language in languages:
        for tone in TONES:
            for split, count in (("train", train), ("held_out", held_out)):
                rng = random.Random(f"{seed} {language} {tone} {split}")
                texts = dict.fromkeys(_written(language, tone, split)[:count])
                while len(texts) < count:
                    texts[_expansion(language, tone, split, rng)] = None
                found += [ToneSentence(text, tone, language, split) for text in texts]
    return found


def tone_passage(language: str, tone: str, rng: random.Random, length: int) -> list[str]:
    """Training sentences of one tone, some written by hand and most from the grammar, and after more than half of them a reader's reaction.

    Reactions are the same signs in all languages, so that a model must tell tone by the end of a sentence. Labelled sentences have none.
    """
    written = _written(language, tone, "train")
    lines = [rng.choice(written) if rng.random() < 0.3 else _expansion(language, tone, "train", rng) for _ in range(length)]
    return [f"{line} {REACTIONS[tone]}" if rng.random() < 0.6 else line for line in lines]


def _written(language: str, tone: str, split: str) -> list[str]:
    lines = _tables(language)[tone]["sentences"]
    return lines[:-HELD_OUT_SENTENCES] if split == "train" else lines[-HELD_OUT_SENTENCES:]


def _expansion(language: str, tone: str, split: str, rng: random.Random) -> str:
    """A sentence of the grammar; one that is held out has a held-out value in one of its slots, at least."""
    tables = _tables(language)
    template = rng.choice(tables[tone]["templates"])
    slots = {name: values[:-HELD_OUT_VALUES] for name, values in tables["slots"].items()}
    if split == "held_out":
        new = rng.choice(sorted({name for _, name, _, _ in string.Formatter().parse(template) if name}))
        slots = tables["slots"] | {new: tables["slots"][new][-HELD_OUT_VALUES:]}
    sentence = expand(template, slots, rng)
    return sentence[:1].upper() + sentence[1:]


@cache
def _tables(language: str) -> dict:
    return yaml.safe_load((_FOLDER / f"tone-{language}.yaml").read_text(encoding="utf-8"))
