"""A single file without its config, told by the names of its tensors."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from qscope_jax.errors import ArchitectureError, InputError, SourceError
from qscope_jax.sae.arrays import SAEArrays
from qscope_jax.sae.formats import dictionary_learning, gemma_scope, qwen_scope
from qscope_jax.sae.formats.layout import Given, Layout, Provenance, threshold_arrays
from qscope_jax.sae.formats.mapped_tensors import map_safetensors
from qscope_jax.sae.formats.torch_file import read_torch_file, torch_file_kinds

_DECODER = frozenset({"W_dec"})
GOODFIRE = Layout(
    "Goodfire",
    {"W_enc": "encoder_linear.weight", "W_dec": "decoder_linear.weight", "b_enc": "encoder_linear.bias", "b_dec": "decoder_linear.bias"},
    _DECODER,
)
DEEPSEEK = Layout(
    "DeepSeek-R1-Distill",
    {"W_enc": "encoder.weight", "W_dec": "decoder.weight", "b_enc": "encoder.bias", "b_dec": "decoder.bias"},
    _DECODER,
)
"""Both have a relu and an encoder that sees x."""

_NOT_READ: tuple[tuple[str, frozenset[str], str], ...] = (
    (
        "OpenAI's sparse_autoencoder",
        frozenset({"pre_bias", "latent_bias", "encoder.weight"}),
        "it normalises each token's mean and variance, which no linear encoder can hold",
    ),
    ("saex", frozenset({"W_enc", "W_dec", "mean_norm"}), "its input scale is not folded; export it to SAELens with saex"),
    (
        "sparsify",
        frozenset({"encoder.weight", "encoder.bias", "W_dec", "b_dec"}),
        "k is in its cfg.json; put that beside it and call it sae.safetensors",
    ),
    ("Llama Scope R1", frozenset({"encoder.weight", "log_jumprelu_threshold"}), "put its config.json beside it"),
    (
        "Llama Scope",
        frozenset({"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"}),
        "its input scale and threshold are in hyperparams.json; give the folder that holds both",
    ),
    ("Llamascopium", frozenset({"W_E", "W_D"}), "put its config.json beside it"),
    ("SAELens", frozenset({"W_enc", "W_dec", "b_dec"}), "its cfg.json says what the tensors mean; put that beside it"),
    ("Gemma Scope 2", frozenset({"w_enc", "w_dec"}), "call it params.safetensors"),
)
"""Name, tensors that tell it, and what stands in the way."""


def read_single_file(path: Path, layer: int | None, given: Given, formats: str) -> SAEArrays:
    """Read an SAE from one file.

    Args:
        path: A `.pt`, `.npz` or `.safetensors` file.
        layer: 0-based layer, where it is known.
        given: What the caller says.
        formats: The formats that are read, for the error.

    Raises:
        ArchitectureError: the format is recognised and not read from a bare file.
        InputError, ShapeError, SourceError: it needs more than the file, is damaged, or is not recognised.
    """
    if path.suffix == ".npz":
        return gemma_scope.read_file(path, given)
    names: Mapping[str, object] = map_safetensors(path) if path.suffix == ".safetensors" else torch_file_kinds(path)
    if path.suffix != ".safetensors":
        if set(names) == set(qwen_scope.LAYOUT.names.values()):
            return qwen_scope.read_file(path, layer=layer, k=given.k, name=qwen_scope.ReleaseName.parse(path.absolute().parent))
        for layout, format_name in ((GOODFIRE, "goodfire"), (DEEPSEEK, "deepseek")):
            if layout.fits(names):  # the last also fits dictionary_learning's newer standard class, which computes the same
                return _relu(layout, format_name, path, layer, given)
        if dictionary_learning.fits(names):
            return dictionary_learning.read_file(path, given, layer)
    elif GOODFIRE.fits(names):
        return _relu(GOODFIRE, "goodfire", path, layer, given, map_safetensors)
    for format_name, needed, reason in _NOT_READ:
        if needed <= set(names):
            raise ArchitectureError(f"{path}: is in the format of {format_name}, which is not read from this file alone: {reason}")
    raise SourceError(f"{path}: is not recognised as an SAE, it holds {', '.join(list(names)[:10]) or 'no tensors'}; expected {formats}")


def _relu(
    layout: Layout,
    format_name: str,
    path: Path,
    layer: int | None,
    given: Given,
    read: Callable[[Path], dict[str, np.ndarray]] = read_torch_file,
) -> SAEArrays:
    if given.activation is not None:
        raise InputError(f"{path}: is a {layout.format} file, whose activation is relu; leave activation out")
    found = layout.take(read(path), str(path))
    zeros_F = np.zeros(len(found["b_enc"]), found["b_enc"].dtype)
    return threshold_arrays(found, zeros_F, given, False, Provenance(format_name, str(path), layer), str(path))
