"""The formats that are written: what each can hold, how a layer becomes a file or folder, and how that is read back."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qscope_jax.data.orbax_arrays import read_arrays
from qscope_jax.sae.arrays import ACTIVATIONS, SAEArrays
from qscope_jax.sae.formats import dictionary_learning, own_format, qwen_scope, sae_lens, sparsify
from qscope_jax.sae.formats.mapped_tensors import map_safetensors
from qscope_jax.sae.formats.registry import read_sae_arrays

_TOP_K = frozenset({"topk"})


@dataclass(frozen=True)
class Writer:
    """One format.

    Attributes:
        unit: Name of a layer's file or folder, with `{layer}` in it.
        activations: What it can hold.
        apply_b_dec_to_input: The one value of that flag that it can hold; None for either.
        write: Writes a layer, bit-exact, at a path.
        read_back: Reads what was written; takes the path, the layer and what should be there.
        dtype: The one element type that it holds; None for any.
        one_dtype: Whether all tensors must have the same element type, as its readers cast them to that of one.
        storage: How our own format stores tensors; None for the formats of others.
    """

    unit: str
    activations: frozenset[str]
    apply_b_dec_to_input: bool | None
    write: Callable[[Path, SAEArrays], None]
    read_back: Callable[[Path, int, SAEArrays], SAEArrays]
    dtype: str | None = None
    one_dtype: bool = False
    storage: str | None = None


def _own(storage: str) -> Writer:
    def write(path: Path, arrays: SAEArrays) -> None:
        own_format.write_tensors(path, arrays, storage, str(path))

    def read_back(path: Path, layer: int, arrays: SAEArrays) -> SAEArrays:
        return dataclasses.replace(arrays, **(read_arrays if storage == "orbax" else map_safetensors)(path))

    return Writer(own_format.STORAGES[storage], frozenset(ACTIVATIONS), None, write, read_back, storage=storage)


def _reread(path: Path, layer: int, arrays: SAEArrays) -> SAEArrays:
    return read_sae_arrays(path, layer)


WRITERS: dict[str, Writer] = {
    "orbax": _own("orbax"),
    "qwen_scope": Writer(
        "layer{layer}.sae.pt",
        _TOP_K,
        False,
        qwen_scope.write_layer,
        lambda path, layer, arrays: read_sae_arrays(path, layer, k=arrays.k),
        dtype="float32",
    ),
    "sae_lens": Writer("blocks.{layer}.hook_resid_post", frozenset(ACTIVATIONS), None, sae_lens.write_folder, _reread, one_dtype=True),
    "sparsify": Writer("layers.{layer}", _TOP_K, True, sparsify.write_folder, _reread, one_dtype=True),
    "dictionary_learning": Writer("resid_post_layer_{layer}/trainer_0", _TOP_K, True, dictionary_learning.write_folder, _reread, one_dtype=True),
    "safetensors": _own("safetensors"),
}
"""Format -> how it is written."""
