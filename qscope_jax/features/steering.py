"""Edits made from features: steer, clamp, ablate, project out; strengths, doses and controls.

`steer` is the paper's operation (Qwen-Scope report, section 3): `h + alpha * d` after the SAE's layer, with d the raw decoder row.
Edits are passed to `LanguageModel.generate`, `.logits` or `.residuals`; every number in them may change without a compilation.
"""

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qscope_jax.errors import InputError, ShapeError
from qscope_jax.models.edits import AddDirections, Edit, ProjectOut, where
from qscope_jax.models.language_model import Completion, LanguageModel
from qscope_jax.models.sampling import SamplingConfig
from qscope_jax.sae.edits import ClampFeatures
from qscope_jax.sae.layer_sae import LayerSAE

UNITS = ("raw", "residual")
Positions = str | int | Sequence[int] | slice


def steer(
    sae: LayerSAE,
    features: int | Sequence[int],
    strength: float | Sequence[float] | Float[np.ndarray, "B W"],
    *,
    unit: str = "raw",
    residual_norm: float | None = None,
    positions: Positions = "all",
    phase: str = "both",
) -> AddDirections:
    """Add feature directions to the residual stream; a negative strength suppresses.

    Args:
        sae: SAE of the layer to act on.
        features: One feature or several.
        strength: One number for all features, one for each, or an array with a row for each prompt of the batch.
        unit: `raw`: alpha multiplies the decoder row as stored. `residual`: alpha is chosen so that what is added has `strength` times
            the norm `residual_norm`, which makes strengths comparable across layers and models.
        residual_norm: Median norm of the layer's residual stream, see `residual_norms`; needed for `residual`.
        positions: Where to act; see `qscope_jax.models.edits.where`.
        phase: `prefill`, `decode` or `both`.

    Raises:
        InputError: a feature out of range, strengths that do not match the features or are not finite, an unknown unit, a norm that is
            missing or not positive.
    """
    chosen = _chosen(sae, features)
    directions_WD = jnp.stack([sae.direction(feature) for feature in chosen])
    strengths_BW = _strengths(strength, len(chosen))
    if unit not in UNITS:
        raise InputError(f"unit is {unit!r}, expected one of {', '.join(UNITS)}")
    if unit == "residual":
        if residual_norm is None or not 0 < residual_norm < np.inf:
            raise InputError(f"unit 'residual' needs residual_norm, got {residual_norm}; measure it with residual_norms(model, texts, layers)")
        strengths_BW = strengths_BW * residual_norm / np.maximum(np.linalg.norm(np.asarray(directions_WD), axis=1), 1e-12)
    return add_directions(sae.layer, directions_WD, strengths_BW, positions=positions, phase=phase)


def add_directions(
    layer: int,
    directions_WD: Float[Array, "W D"] | Float[np.ndarray, "W D"],
    strength: float | Sequence[float] | Float[np.ndarray, "B W"],
    *,
    positions: Positions = "all",
    phase: str = "both",
) -> AddDirections:
    """Add any directions after a layer. Their number is rounded up to a power of two, so that adding one rarely compiles.

    Raises:
        InputError: a negative layer, or strengths that do not match the directions or are not finite.
        ShapeError: the directions are not rows of a matrix.
    """
    directions = np.asarray(directions_WD, np.float32)
    if directions.ndim != 2 or not directions.size:
        raise ShapeError(f"directions have shape {directions.shape}, expected one row for each: [W, D]")
    if layer < 0:
        raise InputError(f"layer is {layer}, expected 0 or more")
    count, width = directions.shape
    room = 1 << (count - 1).bit_length()
    strengths_BW = _strengths(strength, count)
    place = where(positions, phase)
    return AddDirections(
        layers_W=jnp.asarray([layer] * count + [-1] * (room - count), jnp.int32),
        directions_WD=jnp.asarray(np.concatenate([directions, np.zeros((room - count, width), np.float32)])),
        strengths_BW=jnp.asarray(np.pad(strengths_BW, ((0, 0), (0, room - count))), jnp.float32),
        where_W=jax.tree.map(lambda x: jnp.broadcast_to(x, (room, *x.shape)), place),
    )


def clamp(
    sae: LayerSAE, features: int | Sequence[int], value: float | Sequence[float], *, positions: Positions = "all", phase: str = "both"
) -> ClampFeatures:
    """Set feature activations to given values, keeping the part of the stream that the SAE does not explain.

    Raises:
        InputError: a feature out of range or given twice, or values that do not match the features or are not finite.
    """
    chosen = _chosen(sae, features)
    if len(set(chosen)) != len(chosen):
        raise InputError(f"features {chosen}: one of them is given twice, and would be clamped twice")
    targets = jnp.asarray(_strengths(value, len(chosen)), jnp.float32)
    return ClampFeatures(sae.autoencoder, jnp.int32(sae.layer), jnp.asarray(chosen, jnp.int32), targets, where(positions, phase))


def ablate(sae: LayerSAE, features: int | Sequence[int], *, positions: Positions = "all", phase: str = "both") -> ClampFeatures:
    """Clamp features to 0: remove what they contribute where they are active, and nothing elsewhere."""
    return clamp(sae, features, 0.0, positions=positions, phase=phase)


def project_out(sae: LayerSAE, feature: int, *, share: float = 1.0, positions: Positions = "all", phase: str = "both") -> ProjectOut:
    """Remove the stream's component along a feature's direction, whether or not the feature is active."""
    (chosen,) = _chosen(sae, [feature])
    return ProjectOut(jnp.int32(sae.layer), sae.direction(chosen), jnp.asarray(_strengths(share, 1)[:, 0]), where(positions, phase))


def combine(edits: Sequence[AddDirections]) -> AddDirections:
    """Several additions as one edit; they may sit at different layers and positions.

    Raises:
        InputError: no edits, or edits for batches of different sizes.
        ShapeError: directions of different widths.
    """
    if not edits:
        raise InputError("no edits to combine")
    rows = max(edit.strengths_BW.shape[0] for edit in edits)
    if sizes := sorted({edit.strengths_BW.shape[0] for edit in edits} - {1, rows}):
        raise InputError(f"edits have strengths for {sizes[0]} and for {rows} prompts; give one row for all, or one for each prompt")
    if len(widths := sorted({edit.directions_WD.shape[1] for edit in edits})) > 1:
        raise ShapeError(f"edits have directions of width {widths[0]} and of {widths[-1]}; they are of different models")
    strengths = [jnp.broadcast_to(edit.strengths_BW, (rows, edit.strengths_BW.shape[1])) for edit in edits]
    return AddDirections(
        jnp.concatenate([edit.layers_W for edit in edits]),
        jnp.concatenate([edit.directions_WD for edit in edits]),
        jnp.concatenate(strengths, axis=1),
        jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *(edit.where_W for edit in edits)),
    )


def sign_flipped(edit: AddDirections) -> AddDirections:
    """Control: the same edit with every strength negated."""
    return AddDirections(edit.layers_W, edit.directions_WD, -edit.strengths_BW, edit.where_W)


def random_control(edit: AddDirections, rng: np.random.Generator) -> AddDirections:
    """The same strengths along random directions, each as long as the one in whose place it stands: the control of steering."""
    directions_WD = np.asarray(edit.directions_WD)
    drawn_WD = rng.standard_normal(directions_WD.shape)
    drawn_WD *= np.linalg.norm(directions_WD, axis=1, keepdims=True) / np.linalg.norm(drawn_WD, axis=1, keepdims=True)
    return replace(edit, directions_WD=jnp.asarray(drawn_WD, jnp.float32))


def random_features(sae: LayerSAE, count: int, *, seed: int = 0, exclude: Sequence[int] = (), alive: Any = None) -> list[int]:
    """Control: features drawn at random.

    Args:
        sae: The SAE.
        count: How many, all different.
        seed: Of the draw.
        exclude: Features not to draw, such as the one under test.
        alive: Optional mask [F]; only features where it is true are drawn.

    Raises:
        InputError: fewer are left to draw from, none is asked for, or a feature to exclude is out of range.
        ShapeError: the mask is not of this SAE.
    """
    allowed = np.ones(sae.num_features, bool) if alive is None else np.array(alive, bool)
    if allowed.shape != (sae.num_features,):
        raise ShapeError(f"alive has shape {allowed.shape}, expected a mask of the SAE's {sae.num_features} features")
    allowed[[sae.check_feature(int(feature)) for feature in exclude]] = False
    pool = np.flatnonzero(allowed)
    if not 1 <= count <= len(pool):
        raise InputError(f"cannot draw {count} features; {len(pool)} are left to draw from")
    return sorted(int(f) for f in np.random.default_rng(seed).choice(pool, count, replace=False))


def residual_norms(model: LanguageModel, texts: Sequence[str], layers: Sequence[int]) -> dict[int, float]:
    """Median norm of the residual stream after each layer over the texts' tokens, their first ones left out."""
    residuals = model.residuals(texts, layers)
    mask = residuals.mask.copy()
    mask[:, 0] &= mask.sum(axis=1) < 2
    norms = np.linalg.norm(np.asarray(residuals.values, np.float32), axis=-1)
    return {layer: float(np.median(row[mask])) for layer, row in zip(layers, norms, strict=True)}


def dose_sweep(
    model: LanguageModel,
    prompts: Sequence[str],
    sae: LayerSAE,
    features: int | Sequence[int],
    strengths: Sequence[float],
    *,
    sampling: SamplingConfig | None = None,
    edits: Sequence[Edit] = (),
    **settings: Any,
) -> dict[float, list[Completion]]:
    """Continue every prompt at every strength, all of them in one batch; a prompt draws with the same seed at every strength.

    Args:
        model: The model.
        prompts: Texts.
        sae: SAE of the layer to act on.
        features: Feature or features, which share each dose.
        strengths: Doses; 0 is the unsteered control.
        sampling: How to draw.
        edits: Further edits, applied to every row.
        **settings: `unit`, `residual_norm`, `positions`, `phase` of `steer`.

    Raises:
        InputError: no strengths, one that is not finite or given twice, no list of prompts, or as `steer` and `LanguageModel.generate`.
    """
    if isinstance(prompts, str):
        raise InputError("expected a non-empty list of texts")
    doses = _strengths(strengths, len(strengths))[0]
    if not len(doses) or len(set(strengths)) < len(strengths):
        raise InputError(f"strengths {list(strengths)}: give one or more, none of them twice")
    doses_BW = np.tile(np.repeat(doses, len(prompts))[:, None], len(_chosen(sae, features)))
    edit = steer(sae, features, doses_BW, **settings)
    row_seeds = list(range(len(prompts))) * len(strengths)
    rows = model.generate(list(prompts) * len(strengths), sampling, edits=(edit, *edits), row_seeds=row_seeds)
    return {float(dose): rows[i * len(prompts) : (i + 1) * len(prompts)] for i, dose in enumerate(strengths)}


def _chosen(sae: LayerSAE, features: int | Sequence[int]) -> list[int]:
    """Features as a list, each of them one that the SAE has."""
    try:
        chosen = [operator.index(feature) for feature in ([features] if isinstance(features, int | np.integer) else features)]
    except TypeError:
        raise InputError(f"features {features!r} are not whole numbers") from None
    if not chosen:
        raise InputError("no feature given; give at least one")
    return [sae.check_feature(feature) for feature in chosen]


def _strengths(strength: Any, count: int) -> Float[np.ndarray, "B W"]:
    """Strengths as [rows, features]; one row serves the whole batch."""
    try:
        array = np.asarray(strength, np.float32)
    except (TypeError, ValueError):
        raise InputError(f"strengths {strength!r} are not numbers, or not as many for each prompt") from None
    if array.ndim == 0:
        array = np.full((1, count), array, np.float32)
    elif array.ndim == 1:
        array = array[None]
    if array.ndim != 2 or array.shape[1] != count:
        raise InputError(f"strengths have shape {np.shape(strength)}, expected one number, or one for each of {count} features (and prompt)")
    if not np.isfinite(array).all():
        raise InputError("strengths must be finite numbers")
    return array
