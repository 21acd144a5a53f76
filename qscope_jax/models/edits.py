"""Interventions on the residual stream: where they act, and the two that need nothing but a direction.

An edit is a pytree whose layer, direction, strength, positions and phase are arrays, so that changing any of them compiles nothing
new. Edits that read an SAE live in `qscope_jax.features.edits`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qscope_jax.errors import InputError

PHASES = ("prefill", "decode", "both")
MAX_RANGES = 8
_END = np.iinfo(np.int32).max


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EditContext:
    """Which tokens a call holds, as edits see them.

    Attributes:
        positions_BT: Position of each token in its document, 0 at the first.
        lengths_BT: Length of the prompt (or packed document) that the token belongs to; resolves negative positions.
        valid_BT: False at padding.
        decoding: Whether this call continues a cache.
    """

    positions_BT: Int[Array, "B T"]
    lengths_BT: Int[Array, "B T"]
    valid_BT: Bool[Array, "B T"]
    decoding: Bool[Array, ""]


class Edit(Protocol):
    """An intervention applied to the residual stream right after a layer."""

    def touches(self, layer: Int[Array, ""]) -> Bool[Array, ""]:
        """Whether the edit does anything at this layer."""
        ...

    def __call__(self, x_BTD: Float[Array, "B T D"], layer: Int[Array, ""], context: EditContext) -> Float[Array, "B T D"]:
        """The edited residual stream."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Where:
    """Positions and phases at which an edit acts.

    Attributes:
        ranges: Half-open ranges of positions, unused rows empty; negative ends count from the end of the prompt.
        phases: Whether the edit acts while the prompt is read, and while tokens are generated.
    """

    ranges: Int[Array, "8 2"]
    phases: Bool[Array, "2"]

    def mask(self, context: EditContext) -> Bool[Array, "B T"]:
        """True at the tokens of a call where the edit acts."""
        start, stop = self.ranges[:, 0], self.ranges[:, 1]
        position, length = context.positions_BT[..., None], context.lengths_BT[..., None]
        start = jnp.where(start < 0, start + length, start)
        stop = jnp.where(stop < 0, stop + length, stop)
        inside = jnp.any((position >= start) & (position < stop), axis=-1)
        phase = jnp.where(context.decoding, self.phases[1], self.phases[0])
        return inside & context.valid_BT & phase


def where(positions: str | int | Sequence[int] | slice = "all", phase: str = "both") -> Where:
    """Say where an edit acts.

    Args:
        positions: `all`; one position; a sequence of positions; a `slice`; or text such as `5`, `3-7` (both ends included) or
            `0,3-7`. Negative positions count from the end of the prompt; -1 is its last token. Generated tokens continue the
            prompt's numbering.
        phase: `prefill` (while the prompt is read), `decode` (while tokens are generated) or `both`.

    Raises:
        InputError: unreadable positions, more than 8 separate ranges, or an unknown phase.
    """
    if phase not in PHASES:
        raise InputError(f"phase is {phase!r}, expected one of {', '.join(PHASES)}")
    ranges = _merge(_ranges(positions))
    if len(ranges) > MAX_RANGES:
        raise InputError(f"positions {positions!r} make {len(ranges)} separate ranges, at most {MAX_RANGES} are possible")
    table = np.zeros((MAX_RANGES, 2), np.int32)
    table[: len(ranges)] = ranges
    return Where(jnp.asarray(table), jnp.asarray([phase != "decode", phase != "prefill"]))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AddDirections:
    """`h + alpha * d` (Qwen-Scope report, section 3) for W directions at once, each at its own layer and positions.

    Attributes:
        layers_W: Layer of each direction; -1 switches it off.
        directions_WD: What is added, float32.
        strengths_BW: Coefficient for each row of the batch (or one row for all).
        where_W: Positions and phases, each leaf with a leading axis W.
    """

    layers_W: Int[Array, " W"]
    directions_WD: Float[Array, "W D"]
    strengths_BW: Float[Array, "B W"]
    where_W: Where

    def touches(self, layer: Int[Array, ""]) -> Bool[Array, ""]:
        """Whether any direction belongs to this layer."""
        return jnp.any(self.layers_W == layer)

    def __call__(self, x_BTD: Float[Array, "B T D"], layer: Int[Array, ""], context: EditContext) -> Float[Array, "B T D"]:
        """Add every direction of this layer where it applies; elsewhere the stream is untouched to the bit."""
        mask_WBT = jax.vmap(lambda place: place.mask(context))(self.where_W) & (self.layers_W == layer)[:, None, None]
        weights_BTW = jnp.where(mask_WBT.transpose(1, 2, 0), self.strengths_BW[:, None, :], jnp.float32(0))
        shift_BTD = jnp.einsum("btw,wd->btd", weights_BTW, self.directions_WD, precision=jax.lax.Precision.HIGHEST)
        moved_BTD = (x_BTD.astype(jnp.float32) + shift_BTD).astype(x_BTD.dtype)
        return jnp.where(jnp.any(weights_BTW != 0, axis=-1, keepdims=True), moved_BTD, x_BTD)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ProjectOut:
    """Remove a share of the stream's component along a direction: `h - s * (h . u) u` with u the unit direction.

    Attributes:
        layer: Layer after which it acts.
        direction_D: Direction, of any length but zero.
        share_B: Share removed in each row (or one for all): 1 removes all, 2 reflects.
        where: Positions and phases.
    """

    layer: Int[Array, ""]
    direction_D: Float[Array, " D"]
    share_B: Float[Array, " B"]
    where: Where

    def touches(self, layer: Int[Array, ""]) -> Bool[Array, ""]:
        """Whether this is the edit's layer."""
        return self.layer == layer

    def __call__(self, x_BTD: Float[Array, "B T D"], layer: Int[Array, ""], context: EditContext) -> Float[Array, "B T D"]:
        """Project where the edit acts; elsewhere the stream is untouched to the bit."""
        unit_D = self.direction_D * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(self.direction_D)), jnp.float32(1e-30)))
        x32 = x_BTD.astype(jnp.float32)
        along_BT = jnp.einsum("btd,d->bt", x32, unit_D, precision=jax.lax.Precision.HIGHEST)
        moved = (x32 - (self.share_B[:, None] * along_BT)[..., None] * unit_D).astype(x_BTD.dtype)
        active = self.where.mask(context) & (self.share_B[:, None] != 0)
        return jnp.where(active[..., None], moved, x_BTD)


def apply_edits(x_BTD: Array, edits: tuple[Edit, ...], layer: Int[Array, ""], context: EditContext | None) -> Array:
    """Apply every edit that belongs to this layer, in order; a layer without one pays for a comparison, not for a pass."""
    if context is None:
        return x_BTD
    for edit in edits:
        x_BTD = jax.lax.cond(edit.touches(layer), lambda x, e=edit: e(x, layer, context), lambda x: x, x_BTD)
    return x_BTD


def _ranges(positions: str | int | Sequence[int] | slice) -> list[tuple[int, int]]:
    if isinstance(positions, slice):
        if positions.step not in (None, 1):
            raise InputError(f"positions {positions!r}: a step is not possible")
        return [(positions.start or 0, _END if positions.stop is None else positions.stop)]
    if isinstance(positions, int):
        return [_single(positions)]
    if not isinstance(positions, str):
        return [_single(int(position)) for position in positions]
    if positions.strip() == "all":
        return [(0, _END)]
    ranges = []
    for part in positions.replace(" ", "").split(","):
        first, dash, last = part.partition("-") if not part.startswith("-") else (part, "", "")
        try:
            ranges.append((int(first), _single(int(last))[1]) if dash else _single(int(first)))
        except ValueError:
            raise InputError(f"positions {positions!r}: cannot read '{part}'; write all, 5, -1, 3-7 or 0,3-7") from None
        if dash and ranges[-1][1] <= ranges[-1][0]:
            raise InputError(f"positions {positions!r}: the range '{part}' is empty")
    return ranges


def _single(position: int) -> tuple[int, int]:
    return position, _END if position == -1 else position + 1


def _merge(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join neighbouring ranges of positions counted from the same end, so that a long list of positions takes few rows."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(ranges, key=lambda r: (r[0] < 0, r)):
        if merged and (merged[-1][0] < 0) == (start < 0) and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged
