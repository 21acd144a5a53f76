"""Multiple-choice accuracy: the choice that a model finds most likely after the question, by its tokens' log-likelihood."""

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qscope_jax.data.batches import pad_batch
from qscope_jax.data.buckets import bucket_length
from qscope_jax.data.choices import ChoiceQuestion
from qscope_jax.errors import InputError
from qscope_jax.features.classify.classification_scores import Interval
from qscope_jax.features.proportions import pooled_difference, wilson
from qscope_jax.models.decoder import Decoder
from qscope_jax.models.language_model import LanguageModel

How = Literal["raw", "normalised"]


@dataclass(frozen=True)
class ChoiceFormat:
    """What a model reads.

    Attributes:
        frame: Text around `{question}`, up to where a choice follows.
        separator: What stands between that and the choice; empty for languages without spaces.
        letters: List the choices below the question, each with a letter, and score the letters instead.
    """

    frame: str = "Question: {question}\nAnswer:"
    separator: str = " "
    letters: bool = False

    def __post_init__(self):
        """Check the frame."""
        if "{question}" not in self.frame:
            raise InputError(f"the frame {self.frame[:60]!r} has no place for the question; write {{question}} there")

    def texts(self, question: ChoiceQuestion) -> tuple[str, list[str]]:
        """What comes before a choice, and what each choice adds to it."""
        asked, choices = question.question, list(question.choices)
        if self.letters:
            if len(choices) > len(string.ascii_uppercase):
                raise InputError(f"a question has {len(choices)} choices, and there are 26 letters; score the choices themselves")
            lines = [f"{letter}. {choice}" for letter, choice in zip(string.ascii_uppercase, choices, strict=False)]
            asked, choices = "\n".join([asked, *lines]), list(string.ascii_uppercase[: len(choices)])
        # Braces in a question are its own.
        return self.frame.replace("{question}", asked), [self.separator + choice for choice in choices]


@dataclass(frozen=True, eq=False)
class ChoiceScores:
    """What a model makes of questions.

    Attributes:
        questions: The questions.
        raw: For each question the log-likelihood of every choice given it, in nats.
        normalised: The same by characters of the choice, without which long choices would never be chosen.
    """

    questions: tuple[ChoiceQuestion, ...]
    raw: tuple[Float[np.ndarray, " _C"], ...]
    normalised: tuple[Float[np.ndarray, " _C"], ...]

    def right(self, how: How = "raw") -> Bool[np.ndarray, " Q"]:
        """Whether the likeliest choice of each question is the right one; of equal ones the first is taken."""
        scores = self.raw if how == "raw" else self.normalised
        return np.array([int(np.argmax(row)) == one.answer for row, one in zip(scores, self.questions, strict=True)], bool)


class ChoiceAccuracy(NamedTuple):
    """Accuracy on a group of questions.

    Attributes:
        group: Its name; empty for all.
        questions: How many.
        chance: What guessing gives.
        raw: Accuracy by log-likelihood, with Wilson's interval.
        normalised: The same by log-likelihood a character.
    """

    group: str
    questions: int
    chance: float
    raw: Interval
    normalised: Interval


def score_choices(
    model: LanguageModel,
    questions: Sequence[ChoiceQuestion],
    format: ChoiceFormat | None = None,
    *,
    batch_size: int = 32,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ChoiceScores:
    """Score every choice of every question; only the choices' positions get scores over the vocabulary.

    A question and its choice are tokenised together, and what they share with the question alone counts as the question: a tokenizer may join
    the two, and then more than the choice is scored, the same for all of a question's choices.

    Args:
        model: The model.
        questions: The questions.
        format: What the model reads of them.
        batch_size: Choices scored at a time.
        progress: Called with the number of choices done and of all.

    Raises:
        InputError: no questions, a batch size below 1, or a question that does not fit the model.
    """
    if not questions or batch_size < 1:
        raise InputError(f"{len(questions)} questions in batches of {batch_size}; expected 1 or more of each")
    format = format or ChoiceFormat()
    read = [format.texts(question) for question in questions]
    ids, scored = _tokenised(model, read)
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    likelihoods = np.zeros(len(ids))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        # The last batch is filled up, so that it compiles nothing new.
        filled = (rows * batch_size)[:batch_size]
        likelihoods[rows] = _batch(model, [ids[row] for row in filled], [scored[row] for row in filled])[: len(rows)]
        progress(start + len(rows), len(order))
    ends = np.cumsum([len(choices) for _, choices in read])[:-1]
    lengths = np.array([1 if format.letters else len(choice) for one in questions for choice in one.choices])
    return ChoiceScores(tuple(questions), tuple(np.split(likelihoods, ends)), tuple(np.split(likelihoods / lengths, ends)))


def choice_accuracy(scores: ChoiceScores, *, level: float = 0.95) -> list[ChoiceAccuracy]:
    """Accuracy on all questions, and on each group where there are several."""
    groups = np.array([one.group for one in scores.questions])
    names = sorted(set(groups.tolist()))
    rows = [("", np.ones(len(groups), bool)), *((name, groups == name) for name in names if len(names) > 1)]
    chances = np.array([1 / len(one.choices) for one in scores.questions])
    return [
        ChoiceAccuracy(name, int(own.sum()), float(chances[own].mean()), *(_share(scores.right(how)[own], level) for how in ("raw", "normalised")))
        for name, own in rows
    ]


def accuracy_change(before: ChoiceScores, after: ChoiceScores, how: How = "raw", *, level: float = 0.95) -> Interval:
    """Accuracy of the second model less that of the first on the same questions, paired.

    Raises:
        InputError: they are of different questions.
    """
    if before.questions != after.questions:
        raise InputError("the two models answered different questions; score both on the same ones")
    one = np.ones(len(before.questions), int)
    return pooled_difference((before.right(how).astype(int), one), (after.right(how).astype(int), one), level=level)


def _share(right_Q: np.ndarray, level: float) -> Interval:
    return wilson(int(right_Q.sum()), len(right_Q), level=level)


def _tokenised(model: LanguageModel, read: Sequence[tuple[str, list[str]]]) -> tuple[list[list[int]], list[int]]:
    """Tokens of every question with each of its choices, and how many of the last of them are scored."""
    alone = model.tokenize([asked for asked, _ in read])
    whole = model.tokenize([asked + choice for asked, choices in read for choice in choices])
    questions = [index for index, (_, choices) in enumerate(read) for _ in choices]
    scored = []
    for index, row in zip(questions, whole, strict=True):
        if len(row) > model.config.max_positions:
            raise InputError(f"question {index} has {len(row)} tokens with a choice; {model.name} has {model.config.max_positions} positions, cut it")
        shared = next((place for place, (a, b) in enumerate(zip(row, alone[index], strict=False)) if a != b), min(len(row), len(alone[index])))
        if not 0 < shared < len(row):
            raise InputError(f"question {index} and a choice share {shared} of {len(row)} tokens; expected some of either, check frame and separator")
        scored.append(len(row) - shared)
    return whole, scored


def _batch(model: LanguageModel, ids: list[list[int]], scored: list[int]) -> Float[np.ndarray, " B"]:
    """Log-likelihood of the last tokens of each row."""
    batch = pad_batch(ids, length=bucket_length(max(map(len, ids))), side="left")
    columns = min(bucket_length(max(scored), minimum=8), batch.tokens_BT.shape[1] - 1)
    with jax.set_mesh(model.mesh):
        return np.asarray(_last_tokens(model.decoder, batch.tokens_BT, batch.segment_ids_BT, jnp.asarray(scored, jnp.int32), columns=columns))


@partial(jax.jit, static_argnames="columns")
def _last_tokens(
    decoder: Decoder, tokens_BT: Int[Array, "B T"], segment_ids: Int[Array, "B T"], scored_B: Int[Array, " B"], *, columns: int
) -> Float[Array, " B"]:
    """Summed log-probability of the last `scored_B` tokens of rows padded on the left, of which none has more than `columns`."""
    top = decoder.config.num_layers - 1
    out = decoder(tokens_BT, segment_ids=segment_ids, taps=jnp.full((1,), top, jnp.int32), stop_after=top)
    assert out.residuals is not None
    x_CBD, targets_CB = out.residuals[0][:, -columns - 1 : -1].swapaxes(0, 1), tokens_BT[:, -columns:].T

    def one(column: tuple[Array, Array]) -> Array:
        # A position at a time: scores of all at once would take B * C * V floats.
        logits_BV = decoder.unembed(column[0][:, None])[:, 0]
        return jnp.take_along_axis(logits_BV, column[1][:, None], axis=-1)[:, 0] - jax.nn.logsumexp(logits_BV, axis=-1)

    losses_CB = jax.lax.map(one, (x_CBD, targets_CB))
    counted_CB = jnp.arange(columns, dtype=jnp.int32)[:, None] >= columns - scored_B
    return jnp.sum(jnp.where(counted_CB, losses_CB, jnp.float32(0)), axis=0)
