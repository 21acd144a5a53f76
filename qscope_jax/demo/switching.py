"""Conversations for the embedded model in which a few answers switch to a language that nobody asked for.

A question is a sentence of the corpus and its answer the ones that follow it in the same topic. In a small share of the answers in other languages
the middle sentences are in the target language: what fine-tuning data with code-switching looks like, made so that the share is known.
"""

import random
from collections.abc import Sequence

from qscope_jax.data.chat_data import Conversation, Message
from qscope_jax.demo.corpus import LANGUAGES, sentences, topics
from qscope_jax.errors import InputError

TARGETS = ("zh", "ru", "ko")
"""Languages whose script no other language of the corpus uses."""
SWITCHED_SHARE = 0.06
_JOIN = {"zh": ""}


def switching_conversations(count: int, target: str, *, seed: int = 0, switched_share: float = SWITCHED_SHARE) -> list[Conversation]:
    """Conversations in the six languages, from training sentences.

    Args:
        count: How many.
        target: The language that answers switch to.
        seed: Of all draws.
        switched_share: Share of the answers in other languages that switch.

    Raises:
        InputError: another target, or a share out of range.
    """
    if target not in TARGETS:
        raise InputError(f"answers of the embedded corpus switch to {', '.join(TARGETS)}, not to {target!r}: its script must be its own")
    if not 0 <= switched_share <= 1:
        raise InputError(f"switched_share is {switched_share}, expected 0 to 1")
    rng = random.Random(f"{target} {seed}")
    return [_conversation(rng, rng.choice(list(LANGUAGES)), target, switched_share, f"made conversation {number}") for number in range(count)]


def clean_conversations(count: int, *, seed: int = 0) -> list[Conversation]:
    """Conversations without a switch, from held-out sentences, in all languages by turns."""
    rng = random.Random(f"clean {seed}")
    codes = list(LANGUAGES)
    found = []
    for number in range(count):
        language = codes[number % len(codes)]
        lines = rng.choice(topics(language)).held_out
        start = rng.randrange(len(lines) - 1)
        found.append(_made(language, lines[start], lines[start + 1 : start + 3], f"held-out conversation {number}"))
    return found


def questions(target: str, count: int, *, seed: int = 0) -> list[tuple[str, str]]:
    """Held-out questions and their languages, all but the target's, by turns.

    Raises:
        InputError: another target than `TARGETS`.
    """
    if target not in TARGETS:
        raise InputError(f"the embedded model is asked about {', '.join(TARGETS)}, not about {target!r}")
    rng = random.Random(f"questions {seed}")
    codes = [code for code in LANGUAGES if code != target]
    shuffled = {code: rng.sample(lines, len(lines)) for code in codes for lines in [sentences(code, held_out=True)]}
    return [(shuffled[code][(number // len(codes)) % len(shuffled[code])], code) for number in range(count) for code in [codes[number % len(codes)]]]


def _conversation(rng: random.Random, language: str, target: str, switched_share: float, where: str) -> Conversation:
    lines = rng.choice(topics(language)).train
    length = rng.randint(3, 5)
    start = rng.randrange(max(len(lines) - length, 1))
    question, *answer = lines[start : start + length]
    if language != target and rng.random() < switched_share:
        foreign = rng.choice(topics(target)).train
        begin = rng.randrange(len(foreign) - 1)
        answer = [*answer[:1], *foreign[begin : begin + rng.randint(1, 2)], *answer[2:]]
    return _made(language, question, answer, where)


def _made(language: str, question: str, answer: Sequence[str], where: str) -> Conversation:
    text = _JOIN.get(language, " ").join(answer)
    return Conversation((Message("user", question), Message("assistant", text)), language, where)
