"""What features do before and after a switch: their pre-activations token by token, beside answers that stay in their language.

The papers' finding behind their loss: the feature of the unwanted language rises over the tokens before a switch and peaks at it, largely
below the threshold at which it would fire, so that pre-activations show it and activations do not.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from qscope_jax.data.batches import pad_batch
from qscope_jax.data.buckets import bucket_length
from qscope_jax.errors import InputError
from qscope_jax.features.proportions import clustered_mean
from qscope_jax.features.switching.switch_points import SwitchPoint
from qscope_jax.models.language_model import LanguageModel, forward

WINDOW = 16
"""Tokens on either side of a switch."""

Encoder = Callable[[Any], Any]
"""Pre-activations [N, S] of S features for residual streams [N, D], such as `EncoderRows`."""


@dataclass(frozen=True, eq=False)
class Curve:
    """Means over places in answers.

    Attributes:
        mean_OS: Mean pre-activation at each offset, of each feature; NaN where no answer reaches so far.
        error_OS: Its standard error, places in answers to one prompt taken as one; NaN where fewer than two prompts reach so far.
        counts_O: Answers that reach an offset.
    """

    mean_OS: Float[np.ndarray, "O S"]
    error_OS: Float[np.ndarray, "O S"]
    counts_O: Int[np.ndarray, " O"]


@dataclass(frozen=True, eq=False)
class Trace:
    """Features of a layer around a switch.

    Attributes:
        layer: 0-based layer.
        offsets_O: Tokens from the first switched one, which is 0. The state at -1 is that from which it is drawn.
        switched: Answers that have switched.
        baseline: Answers that have not, at the same places.
    """

    layer: int
    offsets_O: Int[np.ndarray, " O"]
    switched: Curve
    baseline: Curve


def switch_traces(
    model: LanguageModel,
    points: Sequence[SwitchPoint],
    baseline: Sequence[SwitchPoint],
    encoders: Mapping[int, Encoder],
    *,
    window: int = WINDOW,
    batch_size: int = 8,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[int, Trace]:
    """Pre-activations around switches; only tokens of the answers count, not those of prompts.

    Args:
        model: The model.
        points: Where answers switched, see `switch_points`.
        baseline: Where others did not, see `matched_points`; may be empty.
        encoders: For each layer what reads its features.
        window: Tokens on either side.
        batch_size: Answers read at a time.
        progress: Called with the number of answers read and of all.

    Raises:
        InputError: no switch, no layer or one out of range, or a window or batch size below 1.
    """
    if not points or not encoders or min(window, batch_size) < 1:
        found = f"{len(points)} switches, {len(encoders)} layers, a window of {window} and batches of {batch_size}"
        raise InputError(f"{found}; expected 1 or more of each")
    for layer in encoders:
        model.check_layer(layer)
    everything = [*points, *baseline]
    values = _read(model, everything, encoders, window, batch_size, progress)
    offsets_O = np.arange(-window, window + 1)
    counted_NO = np.stack([_inside(point, offsets_O) for point in everything])
    prompts_N = np.array([point.prompt for point in everything])
    own = np.arange(len(everything)) < len(points)

    def curve(values_NOS: np.ndarray, rows: Bool[np.ndarray, " N"]) -> Curve:
        return _curve(values_NOS[rows], counted_NO[rows], prompts_N[rows])

    return {layer: Trace(layer, offsets_O, curve(found, own), curve(found, ~own)) for layer, found in values.items()}


def _inside(point: SwitchPoint, offsets_O: np.ndarray) -> Bool[np.ndarray, " O"]:
    """Offsets at which the answer has a token."""
    places = point.place + offsets_O
    return (places >= 0) & (places < len(point.answer_ids))


def _curve(values_NOS: np.ndarray, counted_NO: np.ndarray, prompts_N: np.ndarray) -> Curve:
    pairs = [clustered_mean(values_NOS[counted_NO[:, offset], offset], prompts_N[counted_NO[:, offset]]) for offset in range(counted_NO.shape[1])]
    return Curve(np.stack([mean for mean, _ in pairs]), np.stack([error for _, error in pairs]), counted_NO.sum(axis=0))


def _read(
    model: LanguageModel,
    points: Sequence[SwitchPoint],
    encoders: Mapping[int, Encoder],
    window: int,
    batch_size: int,
    progress: Callable[[int, int], None],
) -> dict[int, Float[np.ndarray, "N O S"]]:
    """Pre-activations at all offsets; void where an answer has no token."""
    layers = list(encoders)
    taps = jnp.asarray(layers, jnp.int32)
    ids = [[*point.prompt_ids, *point.answer_ids[: point.place + window + 1]] for point in points]
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    found: dict[int, list[Any]] = {layer: [None] * len(ids) for layer in layers}
    offsets_O = np.arange(-window, window + 1)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        # The last batch is filled up, so that it compiles nothing new.
        filled = (rows * batch_size)[:batch_size]
        batch = pad_batch([ids[row] for row in filled], length=bucket_length(max(len(ids[row]) for row in filled)))
        first_B = np.array([len(points[row].prompt_ids) + points[row].place for row in filled])
        places_BO = np.clip(first_B[:, None] + offsets_O, 0, batch.tokens_BT.shape[1] - 1)
        with jax.set_mesh(model.mesh):
            out = forward(model.decoder, batch.tokens_BT, batch.segment_ids_BT, (), taps, stop_after=max(layers))
            assert out.residuals is not None
            for layer, x_BTD in zip(layers, out.residuals, strict=True):
                x_ND = jnp.take_along_axis(x_BTD, jnp.asarray(places_BO)[..., None], axis=1).reshape(-1, x_BTD.shape[-1])
                values_BOS = np.asarray(encoders[layer](x_ND)).reshape(*places_BO.shape, -1)
                for row, values in zip(rows, values_BOS, strict=False):
                    found[layer][row] = values
        progress(start + len(rows), len(order))
    return {layer: np.stack(values) for layer, values in found.items()}
