"""How well a model does the twelve tasks: sample by sample, for one model or for the checkpoints of the embedded model's training."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qscope_jax.data.batches import pad_batch
from qscope_jax.data.buckets import bucket_length
from qscope_jax.data.files import atomic_path
from qscope_jax.demo.tasks import Task
from qscope_jax.errors import SourceError
from qscope_jax.models.decoder import Decoder
from qscope_jax.models.scoring import token_losses

_ROWS = 128


@dataclass(frozen=True, eq=False)
class CheckpointScores:
    """What the checkpoints of a run did on every task.

    Attributes:
        steps: [C], optimiser steps that each had taken.
        losses: [C], held-out loss of each, in nats a token.
        correct: For each task [C, N], whether a checkpoint answered a sample rightly.
    """

    steps: Int[np.ndarray, " C"]
    losses: Float[np.ndarray, " C"]
    correct: Mapping[str, Bool[np.ndarray, "C _N"]]


def answered(decoder: Decoder, tokenize: Callable[[str], Sequence[int]], task: Task) -> Bool[np.ndarray, " N"]:
    """For each sample whether the answer is likelier after the prompt than every other option, by the sum of its tokens' log-probabilities.

    The end of the line, which follows every answer in training, counts among an option's tokens: else an option that begins another always wins.
    """
    rows, starts, sample_of = [], [], []
    for number, sample in enumerate(task.samples):
        prompt = list(tokenize(sample.prompt))
        for option in sample.options:
            rows.append([*prompt, *tokenize(f" {option}\n")])
            starts.append(len(prompt))
            sample_of.append(number)
    length = bucket_length(max(map(len, rows)))
    parts = [_option_losses(decoder, rows[at : at + _ROWS], starts[at : at + _ROWS], length) for at in range(0, len(rows), _ROWS)]
    losses = np.concatenate(parts)
    best = [min(np.flatnonzero(np.array(sample_of) == number), key=lambda row: losses[row]) for number in range(len(task.samples))]
    first = np.searchsorted(sample_of, np.arange(len(task.samples)))
    return np.array([sample.options[row - start] == sample.answer for sample, row, start in zip(task.samples, best, first, strict=True)])


def write_scores(path: Path, scores: CheckpointScores) -> None:
    """Write the scores of checkpoints as one small file."""
    arrays = {f"correct {name}": correct for name, correct in scores.correct.items()}
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, steps=scores.steps, losses=scores.losses, **arrays)  # pyright: ignore[reportArgumentType]


def read_scores(path: Path) -> CheckpointScores:
    """Read what `write_scores` wrote.

    Raises:
        SourceError: the file is missing or is something else.
    """
    try:
        with np.load(path) as arrays:
            correct = {name.removeprefix("correct "): arrays[name] for name in arrays.files if name.startswith("correct ")}
            return CheckpointScores(arrays["steps"], arrays["losses"], correct)
    except (OSError, EOFError, ValueError, KeyError, BadZipFile) as error:
        raise SourceError(f"{path}: not the scores of checkpoints ({error}); make them with python -m qscope_jax.demo.recipe") from error


def _option_losses(decoder: Decoder, rows: list[list[int]], starts: list[int], length: int) -> Float[np.ndarray, " R"]:
    """Summed loss of the tokens from `starts` on, in batches of one shape."""
    missing = _ROWS - len(rows)
    batch = pad_batch([*rows, *[[0, 0]] * missing], length=length)
    starts_B = jnp.asarray([*starts, *[1] * missing], jnp.int32)
    return np.asarray(_losses_after(decoder, batch.tokens_BT, batch.segment_ids_BT, starts_B))[: len(rows)]


def _sum_after(decoder: Decoder, tokens_BT: Int[Array, "B T"], segment_ids: Int[Array, "B T"], starts_B: Int[Array, " B"]) -> Float[Array, " B"]:
    out = decoder(tokens_BT, segment_ids=segment_ids)
    assert out.logits is not None
    losses_BT, mask_BT = token_losses(out.logits, tokens_BT, segment_ids)
    option_BT = mask_BT & (jnp.arange(1, tokens_BT.shape[1]) >= starts_B[:, None])
    return jnp.sum(jnp.where(option_BT, losses_BT, 0.0), axis=1)


_losses_after = jax.jit(_sum_after)
