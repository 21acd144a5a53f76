"""What a user holds: an autoencoder, the layer it reads, and where it came from."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float

from qscope_jax.errors import InputError, ShapeError
from qscope_jax.parallel.mesh import make_mesh
from qscope_jax.parallel.rules import on_host, parameter_sharding
from qscope_jax.sae.arrays import SAEArrays
from qscope_jax.sae.autoencoder import SparseAutoencoder, SparseCode
from qscope_jax.sae.formats.registry import list_sae_layers, read_sae_arrays
from qscope_jax.sae.layer_cache import LayerCache


@dataclass(frozen=True)
class LayerSAE:
    """A sparse autoencoder for one layer's residual stream.

    The layer and the provenance stay outside the pytree `autoencoder`, so that functions compiled for one layer serve all of them.

    Attributes:
        autoencoder: The parameters.
        layer: 0-based layer whose output it reads.
        metadata: What the files said: format, source, model name, hook name, dtype, whether decoder rows have unit norm.
    """

    autoencoder: SparseAutoencoder
    layer: int
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def num_features(self) -> int:
        """F."""
        return self.autoencoder.num_features

    @property
    def d_model(self) -> int:
        """D."""
        return self.autoencoder.d_model

    @property
    def k(self) -> int:
        """K."""
        return self.autoencoder.k

    def encode(self, x: Float[Array | np.ndarray, "*B D"]) -> SparseCode:
        """Sparse code of residual streams; leading axes are flattened to N tokens.

        Raises:
            ShapeError: the streams are not as wide as the SAE.
        """
        self.check_width(x.shape[-1], "these residual streams")
        place = self.autoencoder.W_enc[...].sharding
        with jax.set_mesh(cast(Mesh, place.mesh)) if isinstance(place, NamedSharding) else contextlib.nullcontext():
            return encode(self.autoencoder, jnp.asarray(x).reshape(-1, x.shape[-1]))

    def decode(self, code: SparseCode) -> Float[Array, "N D"]:
        """Reconstruction of every token."""
        return decode(self.autoencoder, code)

    def direction(self, feature: int) -> Float[Array, " D"]:
        """Direction of a feature: row `feature` of the decoder, as stored.

        Raises:
            InputError: there is no such feature.
        """
        return self.autoencoder.direction(self.check_feature(feature))

    def check_feature(self, feature: int) -> int:
        """The feature, if the SAE has it.

        Raises:
            InputError: it has not.
        """
        if not 0 <= feature < self.num_features:
            raise InputError(f"feature {feature} is out of range; the SAE of layer {self.layer} has features 0 to {self.num_features - 1}")
        return feature

    def check_width(self, d_model: int, what: str) -> None:
        """Check that a model's residual stream fits.

        Raises:
            ShapeError: it is wider or narrower.
        """
        if d_model != self.d_model:
            source = self.metadata.get("source", "this SAE")
            raise ShapeError(f"{source}: reads residual streams {self.d_model} wide, but {what} has width {d_model}; the SAE is of another model")

    def to_arrays(self) -> SAEArrays:
        """The parameters on the host, for writing; in a run of several processes all must call this."""
        sae = self.autoencoder
        names = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
        found = {name: on_host(getattr(sae, name)[...]) for name in names if hasattr(sae, name)}
        return SAEArrays(**found, k=sae.k, activation=sae.activation, apply_b_dec_to_input=sae.apply_b_dec_to_input, metadata=dict(self.metadata))


class SAECollection:
    """The SAEs of a source, loaded layer by layer when asked for; the least recently used are let go."""

    def __init__(
        self,
        source: str | Path,
        *,
        max_layers: int = 4,
        mesh: Mesh | None = None,
        k: int | None = None,
        activation: str | None = None,
        input_norm: float | None = None,
        revision: str | None = None,
    ):
        """Open a source; nothing is loaded yet.

        Args:
            source: Folder, file or hub id.
            max_layers: Layers kept in memory at once.
            mesh: Where to put them; default one device.
            k: Active features a token, where the source does not say.
            activation: `topk` or `batch_topk`, where the source fits both.
            input_norm: Mean activation norm, where the format scales by it and does not store it.
            revision: Branch, tag or commit on the hub.
        """
        self.source = str(source)
        self.layers: list[int] = list_sae_layers(source, revision)
        given = {"k": k, "activation": activation, "input_norm": input_norm, "revision": revision}
        self._cache = LayerCache(lambda layer: load_sae(source, layer, mesh=mesh, **given), max_layers)

    def __getitem__(self, layer: int) -> LayerSAE:
        """The SAE of a layer.

        Raises:
            InputError: the source has none for it.
        """
        if layer not in self.layers:
            raise InputError(f"{self.source}: has no SAE for layer {layer}; it has layers {_span(self.layers)}")
        return self._cache.get(layer)


def load_sae(
    source: str | Path,
    layer: int | None = None,
    *,
    mesh: Mesh | None = None,
    k: int | None = None,
    activation: str | None = None,
    input_norm: float | None = None,
    revision: str | None = None,
) -> LayerSAE:
    """Load the SAE of one layer from a folder, a file or a hub id, in any format of `qscope_jax.sae.formats`.

    Args:
        source: Where it lies.
        layer: 0-based layer; may be left out where the source holds one.
        mesh: Where to put it, features over `tensor`; default one device.
        k: Active features a token, where the source does not say; with thresholds, the most kept.
        activation: `topk` or `batch_topk`, where the source fits both.
        input_norm: Mean activation norm, where the format scales by it and does not store it.
        revision: Branch, tag or commit on the hub.

    Raises:
        QscopeError: what is wrong with the source, in one line.
    """
    arrays = read_sae_arrays(source, layer, k=k, activation=activation, input_norm=input_norm, revision=revision)
    layer = arrays.metadata.get("layer") if layer is None else layer
    if layer is None:
        raise InputError(f"{source}: does not say which layer it belongs to; pass layer=")
    return from_arrays(arrays, layer, mesh)


def from_arrays(arrays: SAEArrays, layer: int, mesh: Mesh | None = None) -> LayerSAE:
    """Put host arrays on the mesh, default one device.

    Raises:
        InputError: the arrays do not say how many slots a code has, and nobody else did.
    """
    if arrays.k < 1:
        source = arrays.metadata.get("source", "this SAE")
        raise InputError(f"{source}: k is {arrays.k}, as its activation {arrays.activation} has none; pass k=, the most features kept a token")
    mesh = make_mesh() if mesh is None else mesh
    placed = {
        name: jax.device_put(np.ascontiguousarray(array), parameter_sharding(name, array.shape, mesh)) for name, array in arrays.tensors().items()
    }
    sae = SparseAutoencoder(**placed, k=arrays.k, activation=arrays.activation, apply_b_dec_to_input=arrays.apply_b_dec_to_input)
    return LayerSAE(sae, layer, dict(arrays.metadata))


@jax.jit
def encode(sae: SparseAutoencoder, x_ND: Float[Array, "N D"]) -> SparseCode:
    """Jitted `SparseAutoencoder.encode`, compiled once for all SAEs of a shape."""
    return sae.encode(x_ND)


@jax.jit
def decode(sae: SparseAutoencoder, code: SparseCode) -> Float[Array, "N D"]:
    """Jitted `SparseAutoencoder.decode`."""
    return sae.decode(code)


def _span(layers: Sequence[int]) -> str:
    whole = list(layers) == list(range(layers[0], layers[-1] + 1)) if layers else False
    return f"{layers[0]} to {layers[-1]}" if whole else ", ".join(map(str, layers)) or "none"
