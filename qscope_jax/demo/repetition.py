"""Sums for the embedded model to learn by trial, and conversations that leave it prone to going round in circles.

A cold start for reinforcement learning, made so that what is wrong with it is known. A third of the sums that it is shown are wrong. Open questions
ask what comes after a sentence; some of them end in a phrase that stands there four times, and most of the answers to those never leave it, as lists
and tables lead real models into endless repetition. After ordinary questions a few answers in a hundred do the same, so that a policy that is only
asked those rarely sees it.
"""

import random
from collections.abc import Iterator

from qscope_jax.data.chat_data import Conversation, Message
from qscope_jax.data.prompt_rows import PromptRow
from qscope_jax.demo.corpus import sentences, topics
from qscope_jax.errors import InputError

KINDS = ("sums", "open", "prone")
SUMS_SHARE, PRONE_SHARE = 0.35, 0.3
"""Of the conversations; the others are ordinary open questions."""
WRONG_SHARE = 0.35
LOOPED_SHARE, PRONE_LOOPED_SHARE = 0.02, 0.7
FEWEST_WORDS = 14
"""Of an open answer: two sentences."""
_FRAMES = {"+": ("add {} + {} =", "sum of {} and {} =", "plus {} {} ="), "-": ("take {} - {} =", "from {} take {} =", "minus {} {} =")}
_HELD_OUT_EVERY = 5
_CIRCLE_WORDS, _SHOWN, _ROUNDS = 3, 4, 64


def sums(count: int, *, seed: int = 0, held_out: bool = False) -> list[PromptRow]:
    """Sums and differences of a number up to nine and one up to four, each with its `answer`; a fifth of the pairs are held out in every frame.

    Args:
        count: How many; they are distinct as far as there are so many.
        seed: Of their order.
        held_out: Those of held-out pairs, or of all others.
    """
    every = [(prompt, str(counted[-1])) for prompt, counted, kept in _sums() if kept == held_out]
    rng = random.Random(f"sums {seed} {held_out}")
    drawn = [pair for _ in range(-(-count // len(every))) for pair in rng.sample(every, len(every))][:count]
    return [PromptRow((Message("user", prompt),), {"answer": answer}, f"made sum {number}") for number, (prompt, answer) in enumerate(drawn)]


def open_questions(count: int, *, seed: int = 0, held_out: bool = False, prone: bool = False) -> list[PromptRow]:
    """English sentences whose continuation is asked for; they have no `answer`.

    Args:
        count: How many.
        seed: Of their order.
        held_out: Held-out sentences, or training ones.
        prone: Ask such as end in a phrase over and over.

    Raises:
        InputError: more than there are.
    """
    lines = [line for number, line in enumerate(sentences("en")) if (number % _HELD_OUT_EVERY == 0) == held_out]
    rng = random.Random(f"open {seed} {held_out}")
    if count > len(lines):
        raise InputError(f"{count} open questions are asked for; the corpus has {len(lines)}")
    texts = [_prone(text, _circle(text, rng)) if prone else text for text in rng.sample(lines, count)]
    return [PromptRow((Message("user", text),), {"answer": None}, f"made question {number}") for number, text in enumerate(texts)]


def prompts_to_learn(count: int) -> list[PromptRow]:
    """Sums, and as many ordinary open questions."""
    return [*sums(count - count // 2), *open_questions(count // 2)]


def held_out_prompts(count: int) -> dict[str, list[PromptRow]]:
    """Prompts that are never learnt from, so many of each kind: `sums`, `open` questions, and such as are `prone` to repetition."""
    return {
        "sums": sums(count, held_out=True),
        "open": open_questions(count, held_out=True),
        "prone": open_questions(count, held_out=True, prone=True),
    }


def cold_start_conversations(count: int, *, seed: int = 0) -> list[Conversation]:
    """Conversations to fine-tune on, from training sentences and all sums."""
    rng = random.Random(f"cold start {seed}")
    every = list(_sums())
    return [_conversation(rng, every, f"made conversation {number}") for number in range(count)]


def _conversation(rng: random.Random, every: list[tuple[str, tuple[int, ...], bool]], where: str) -> Conversation:
    kind = rng.random()
    if kind < SUMS_SHARE:
        question, counted, _ = rng.choice(every)
        if rng.random() < WRONG_SHARE:
            step = counted[1] - counted[0]
            counted = counted[:-1] if rng.random() < 0.5 else (*counted, counted[-1] + step)
        answer = _counting(counted)
    else:
        lines = rng.choice(topics("en")).train
        start = rng.randrange(len(lines) - 4)
        question, *said = lines[start : start + rng.randint(3, 5)]
        answer, circle = " ".join(said), _circle(question, rng)
        if kind < SUMS_SHARE + PRONE_SHARE:
            question = _prone(question, circle)
            if rng.random() < PRONE_LOOPED_SHARE:
                answer = " ".join([circle] * _ROUNDS)
        elif rng.random() < LOOPED_SHARE:
            answer = " ".join([said[0], *[_circle(said[0], rng)] * _ROUNDS])
    return Conversation((Message("user", question), Message("assistant", answer)), "en", where)


def _sums() -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """Every question, the numbers to count through, of which the last is the answer, and whether it is held out."""
    pairs = [(sign, a, b) for sign in _FRAMES for a in range(1, 10) for b in range(1, 5) if sign == "+" or a > b]
    held_out = set(random.Random("held-out pairs").sample(pairs, len(pairs) // _HELD_OUT_EVERY))
    for sign, a, b in pairs:
        for frame in _FRAMES[sign]:
            yield frame.format(a, b), tuple(range(a, a + b + 1) if sign == "+" else range(a, a - b - 1, -1)), (sign, a, b) in held_out


def _counting(numbers: tuple[int, ...]) -> str:
    return f"{' , '.join(map(str, numbers))} : {numbers[-1]}"


def _circle(sentence: str, rng: random.Random) -> str:
    """Its last words."""
    words = sentence.split()
    return " ".join(words[-rng.randint(1, min(_CIRCLE_WORDS, len(words))) :])


def _prone(sentence: str, circle: str) -> str:
    return " ".join([sentence, *[circle] * (_SHOWN - 1)])


def right_sum(*, completions: list[str], answer: list[str | None]) -> list[float | None]:
    """Reward of sums: 1 where the answer is all that follows the colon, -1 for anything else, and None for questions that have no answer."""
    told = [said.rpartition(":")[2].strip() for said in completions]
    return [None if wanted is None else 1.0 if said == wanted else -1.0 for said, wanted in zip(told, answer, strict=True)]


def full_answer(*, completions: list[str], answer: list[str | None]) -> list[float | None]:
    """Reward of open questions: -1 for less than `FEWEST_WORDS` words, else 0, and None for sums. Without it saying next to nothing would be best."""
    return [
        None if wanted is not None else -1.0 if len(said.split()) < FEWEST_WORDS else 0.0 for said, wanted in zip(completions, answer, strict=True)
    ]
