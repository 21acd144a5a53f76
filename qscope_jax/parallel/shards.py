"""What one device does with its share of a batch and of a dictionary: the mesh axes that a per-device function adds up over."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Num


@dataclass(frozen=True)
class Shards:
    """Mesh axes over which tokens and features are split inside a `jax.shard_map`; none of them on one device.

    Attributes:
        tokens: Axis of the tokens, or none.
        features: Axis of the features, or none.
        every: All axes of the mesh along which devices may differ.
    """

    tokens: str | None = None
    features: str | None = None
    every: tuple[str, ...] = ()

    @classmethod
    def of(cls, mesh: Mesh) -> "Shards":
        """Tokens over `data`, features over `tensor`; axes of size 1 are none."""
        split = tuple(name for name in mesh.axis_names if mesh.shape[name] > 1)
        return cls("data" if "data" in split else None, "tensor" if "tensor" in split else None, split)

    def sum_tokens(self, x: Num[Array, "..."]) -> Num[Array, "..."]:
        """Sum over the shards of tokens."""
        return jax.lax.psum(x, self.tokens) if self.tokens else x

    def sum_features(self, x: Num[Array, "..."]) -> Num[Array, "..."]:
        """Sum over the shards of features."""
        return jax.lax.psum(x, self.features) if self.features else x

    def sum(self, x: Num[Array, "..."]) -> Num[Array, "..."]:
        """Sum over the shards of tokens and of features."""
        axes = tuple(axis for axis in (self.tokens, self.features) if axis)
        return jax.lax.psum(x, axes) if axes else x

    def largest(self, x: Num[Array, ""]) -> Num[Array, ""]:
        """The largest of all devices: what a branch that holds collectives must be chosen by."""
        return jax.lax.pmax(x, self.every) if self.every else x

    def any_token(self, x: Bool[Array, "..."]) -> Bool[Array, "..."]:
        """Whether it is so on any shard of tokens."""
        return jax.lax.pmax(x.astype(jnp.int32), self.tokens) > 0 if self.tokens else x

    def gather_features(self, x_NK: Num[Array, "N K"]) -> Num[Array, "N SK"]:
        """Columns of all shards of features, behind each other in the shards' order."""
        return jax.lax.all_gather(x_NK, self.features, axis=1, tiled=True) if self.features else x_NK

    def earlier_tokens(self, total: Num[Array, ""]) -> Num[Array, ""]:
        """Sum of a number over the shards of tokens before this one."""
        if not self.tokens:
            return jnp.zeros_like(total)
        totals = jax.lax.all_gather(total, self.tokens)
        return jnp.sum(jnp.where(jnp.arange(totals.shape[0], dtype=jnp.int32) < jax.lax.axis_index(self.tokens), totals, jnp.zeros_like(totals)))

    def all_tokens(self, own: int) -> int:
        """Tokens of all shards, where each has `own`."""
        return own * (jax.lax.axis_size(self.tokens) if self.tokens else 1)

    def all_features(self, own: int) -> int:
        """Features of all shards, where each has `own`."""
        return own * (jax.lax.axis_size(self.features) if self.features else 1)

    @property
    def feature_shard(self) -> Num[Array, ""]:
        """Place of this device among the shards of features."""
        return jax.lax.axis_index(self.features) if self.features else jnp.int32(0)
