"""Interventions on the residual stream: where they act, and the two that need nothing but a direction.

An edit is a pytree whose layer, direction, strength, positions and phase are arrays, so that changing any of them compiles nothing
new. Edits that read an SAE live in `qscope_jax.sae.edits`.
"""

import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qscope_jax.errors import InputError, ShapeError

PHASES = ("prefill", "decode", "both")
MAX_RANGES = 8
_END = np.iinfo(np.int32).max
_EMPTY = (1, 0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EditContext:
    """Which tokens a call holds, as edits see them.

    Attributes:
        positions_BT: Position of each token in its document, 0 at the first.
        lengths_BT: Length of the prompt (or packed document) that the token belongs to; resolves negative positions.
        valid_BT: False at padding.
    """

    positions_BT: Int[Array, "B T"]
    lengths_BT: Int[Array, "B T"]
    valid_BT: Bool[Array, "B T"]

    @property
    def decoding(self) -> Bool[Array, "B T"]:
        """True at generated tokens, which are those behind the prompt."""
        return self.positions_BT >= self.lengths_BT


@runtime_checkable
class Edit(Protocol):
    """An intervention applied to the residual stream right after a layer."""

    def touches(self, layer: Int[Array, ""]) -> Bool[Array, ""]:
        """Whether the edit does anything at this layer."""
        ...

    def check(self, num_layers: int, d_model: int, rows: int) -> None:
        """Raise where the edit does not fit a model or a batch of so many rows; called on the host, before anything is traced."""
        ...

    def __call__(self, x_BTD: Float[Array, "B T D"], layer: Int[Array, ""], context: EditContext) -> Float[Array, "B T D"]:
        """The edited residual stream."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Where:
    """Positions and phases at which an edit acts; several stacked have a leading axis.

    Attributes:
        ranges: First and last position of each range, both included; negative ones count from the end of the prompt, of which -1 is
            the last token. Unused rows are empty.
        phases: Whether the edit acts while the prompt is read, and while tokens are generated.
    """

    ranges: Int[Array, "*W 8 2"]
    phases: Bool[Array, "*W 2"]

    def mask(self, context: EditContext) -> Bool[Array, "B T"]:
        """True at the tokens of a call where the edit acts."""
        first, last = self.ranges[:, 0], self.ranges[:, 1]
        position, length = context.positions_BT[..., None], context.lengths_BT[..., None]
        first = jnp.where(first < 0, first + length, first)
        last = jnp.where(last < 0, last + length, last)
        inside = jnp.any((position >= first) & (position <= last), axis=-1)
        phase = jnp.where(context.decoding, self.phases[1], self.phases[0])
        return inside & context.valid_BT & phase


def where(positions: str | int | np.integer | Sequence[int] | slice = "all", phase: str = "both") -> Where:
    """Say where an edit acts.

    Args:
        positions: `all`; one position; a sequence of positions; a `slice`; or text such as `5`, `3-7` (both ends included), `-4--1`
            or `0,3-7`. Negative positions count from the end of the prompt; -1 is its last token. Generated tokens continue the
            prompt's numbering; `all` and a slice without an end include them.
        phase: `prefill` (while the prompt is read), `decode` (while tokens are generated) or `both`.

    Raises:
        InputError: unreadable positions, more than 8 separate ranges, or an unknown phase.
    """
    if phase not in PHASES:
        raise InputError(f"phase is {phase!r}, expected one of {', '.join(PHASES)}")
    ranges = _merge(_ranges(positions))
    if len(ranges) > MAX_RANGES:
        raise InputError(f"positions {positions!r} make {len(ranges)} separate ranges, at most {MAX_RANGES} are possible")
    if any(abs(end) > _END for ends in ranges for end in ends):
        raise InputError(f"positions {positions!r} are out of range; no prompt is that long")
    table = np.full((MAX_RANGES, 2), _EMPTY, np.int32)
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

    def check(self, num_layers: int, d_model: int, rows: int) -> None:
        """See `Edit.check`."""
        check_fit(self.layers_W, self.directions_WD.shape[-1], self.strengths_BW.shape[0], num_layers, d_model, rows)

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

    def check(self, num_layers: int, d_model: int, rows: int) -> None:
        """See `Edit.check`."""
        check_fit(self.layer, self.direction_D.shape[-1], self.share_B.shape[0], num_layers, d_model, rows)

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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OnRows:
    """Another edit on some rows of the batch only; the others are untouched to the bit.

    Attributes:
        edit: The edit, of one row for all.
        rows_B: Rows that feel it.
    """

    edit: Edit
    rows_B: Bool[Array, " B"]

    def check(self, num_layers: int, d_model: int, rows: int) -> None:
        """See `Edit.check`; an edit with values for each row of a batch whose rows come and go fits none."""
        self.edit.check(num_layers, d_model, 1)

    def touches(self, layer: Int[Array, ""]) -> Bool[Array, ""]:
        """Whether the edit belongs to this layer, and any row feels it."""
        return self.edit.touches(layer) & jnp.any(self.rows_B)

    def __call__(self, x_BTD: Float[Array, "B T D"], layer: Int[Array, ""], context: EditContext) -> Float[Array, "B T D"]:
        """The stream, edited in the rows that feel it."""
        return jnp.where(self.rows_B[:, None, None], self.edit(x_BTD, layer, context), x_BTD)


def check_fit(layers: Array, width: int, edit_rows: int, num_layers: int, d_model: int, rows: int) -> None:
    """Check an edit's layers, width and rows against a model and a batch.

    Raises:
        InputError: a layer that the model does not have, or values for another number of prompts.
        ShapeError: directions that are not as wide as the residual stream.
    """
    highest = int(np.max(np.asarray(layers)))
    if highest >= num_layers:
        raise InputError(f"an edit acts after layer {highest}; the model has layers 0 to {num_layers - 1}")
    if width != d_model:
        raise ShapeError(f"an edit's directions have width {width}, the model's residual stream {d_model}; it was made for another model")
    if edit_rows not in (1, rows):
        raise InputError(f"an edit has values for {edit_rows} prompts, the batch has {rows}; give one row for all, or one for each prompt")


def apply_edits(x_BTD: Array, edits: tuple[Edit, ...], layer: Int[Array, ""], context: EditContext | None) -> Array:
    """Apply every edit that belongs to this layer, in order; a layer without one pays for a comparison, not for a pass."""
    if context is None:
        return x_BTD
    for edit in edits:
        x_BTD = jax.lax.cond(edit.touches(layer), lambda x, e=edit: e(x, layer, context), lambda x: x, x_BTD)
    return x_BTD


def _ranges(positions: str | int | np.integer | Sequence[int] | slice) -> list[tuple[int, int]]:
    """First and last position of every range that the user wrote."""
    if isinstance(positions, slice):
        if positions.step not in (None, 1):
            raise InputError(f"positions {positions!r}: a step is not possible")
        last = _END if positions.stop is None else positions.stop - 1
        return [(positions.start or 0, last) if positions.stop != 0 else _EMPTY]
    if isinstance(positions, str):
        return _read_ranges(positions)
    try:
        listed = [operator.index(position) for position in positions] if isinstance(positions, Iterable) else [operator.index(positions)]
    except TypeError:
        raise InputError(f"positions {positions!r} are not whole numbers; give all, 5, -1, 3-7, 0,3-7, a list or a slice") from None
    if not listed:
        raise InputError("the list of positions is empty; give at least one, or 'all'")
    return [(position, position) for position in listed]


def _read_ranges(text: str) -> list[tuple[int, int]]:
    if text.strip() == "all":
        return [(0, _END)]
    ranges = []
    for part in text.replace(" ", "").split(","):
        match = re.fullmatch(r"(-?\d{1,9})(?:-(-?\d{1,9}))?", part, re.ASCII)
        if not match:
            raise InputError(f"positions {text!r}: cannot read '{part}'; write all, 5, -1, 3-7, -4--1 or 0,3-7")
        first = int(match[1])
        last = first if match[2] is None else int(match[2])
        if (first < 0) == (last < 0) and last < first:
            raise InputError(f"positions {text!r}: the range '{part}' is empty")
        ranges.append((first, last))
    return ranges


def _merge(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join neighbouring ranges, so that a long list of positions takes few rows.

    Only ranges with both ends counted from the same end of the prompt can be compared.
    """
    merged: list[tuple[int, int]] = []
    for first, last in sorted(ranges, key=lambda r: (r[0] < 0, r[1] < 0, r)):
        if merged and _counted_alike((first, last), merged[-1]) and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return merged


def _counted_alike(*ranges: tuple[int, int]) -> bool:
    return len({end < 0 for ends in ranges for end in ends}) == 1
