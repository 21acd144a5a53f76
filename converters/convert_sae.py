"""Convert SAEs between Qwen-Scope's files and this project's safetensors, bit for bit, and check what was written.

    python -m converters.convert_sae SRC DST --to safetensors|qwen_scope [--layers 0-27] [--k 50] [--overwrite]

SRC is a folder, a file or a hub id. A Qwen-Scope destination should be named like the release (SAE-Res-MODEL-W32K-L0_50): its files do
not hold k.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from qscope_jax.data.files import atomic_path
from qscope_jax.data.hub import open_source
from qscope_jax.errors import InputError, QscopeError, SourceError
from qscope_jax.sae import qwen_scope, safetensors_format
from qscope_jax.sae.arrays import SAEArrays
from qscope_jax.sae.formats.registry import list_sae_layers, read_sae_arrays


def main() -> int:
    """Run from the command line; exit status 2 is a mistake of the user, said in one line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", help="folder, file or hub id")
    parser.add_argument("destination", type=Path, help="folder to write")
    parser.add_argument("--to", choices=("safetensors", "qwen_scope"), required=True, help="format to write")
    parser.add_argument("--layers", default="all", help="all, or such as 0-3,7")
    parser.add_argument("--k", type=int, help="active features a token, where the source does not say")
    parser.add_argument("--overwrite", action="store_true", help="replace what is at the destination")
    arguments = parser.parse_args()
    try:
        convert(arguments.source, arguments.destination, arguments.to, arguments.layers, arguments.k, arguments.overwrite)
    except QscopeError as error:
        print(f"convert_sae: error: {error}", file=sys.stderr)
        return 2
    return 0


def convert(source: str, destination: Path, to: str, layers: str = "all", k: int | None = None, overwrite: bool = False) -> list[int]:
    """Convert layers one at a time, so that memory holds one; return those written.

    Raises:
        QscopeError: the source cannot be read, a layer is not there, the destination exists, or what was written does not read back equal.
    """
    if destination.exists():
        _check_replaceable(destination, Path(source).expanduser().resolve(), overwrite)
    available = list_sae_layers(source)
    chosen = available if layers == "all" else _parse(layers)
    if missing := sorted(set(chosen) - set(available)):
        raise InputError(f"{source}: has no layer {missing[0]}; it has {', '.join(map(str, available))}")
    if to == "safetensors":
        safetensors_format.write_folder(destination, _Layers(source, chosen, k))
        for layer in chosen:
            written = safetensors_format.read_layer(open_source(destination), layer)
            _verify(read_sae_arrays(source, layer, k=k), written, f"{destination}: layer {layer}")
        return chosen
    with atomic_path(destination, directory=True) as folder:
        for layer in chosen:
            arrays = read_sae_arrays(source, layer, k=k)
            _check_name(destination, arrays)
            qwen_scope.write_layer(folder / f"layer{layer}.sae.pt", arrays)
            _verify(arrays, qwen_scope.read_layer(open_source(folder), layer, k=arrays.k), f"{destination}: layer {layer}")
    return chosen


class _Layers(Mapping[int, SAEArrays]):
    """Layers of a source, read when they are asked for."""

    def __init__(self, source: str, layers: list[int], k: int | None):
        self._source, self._layers, self._k = source, layers, k

    def __getitem__(self, layer: int) -> SAEArrays:
        return read_sae_arrays(self._source, layer, k=self._k)

    def __iter__(self) -> Iterator[int]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


def _check_replaceable(destination: Path, source: Path, overwrite: bool) -> None:
    if not overwrite:
        raise SourceError(f"{destination}: exists; pass --overwrite to replace it")
    if source.exists() and destination.resolve() in (source, *source.parents):
        raise InputError(f"{destination}: holds the source, which would be lost; choose another folder")
    if destination.is_dir() and not any(destination.iterdir()):
        return
    try:
        list_sae_layers(destination)
    except QscopeError as error:
        raise SourceError(f"{destination}: does not hold SAEs, so it is not replaced; choose another folder") from error


def _check_name(destination: Path, arrays: SAEArrays) -> None:
    """Check that a folder named like a release will be read as what it holds."""
    name = qwen_scope.ReleaseName.parse(destination)
    if name is not None and (name.num_features, name.k) != (arrays.num_features, arrays.k):
        raise InputError(
            f"{destination}: says {name.num_features} features and k {name.k}, the SAEs have {arrays.num_features} and {arrays.k}; rename the folder"
        )


def _verify(expected: SAEArrays, written: SAEArrays, where: str) -> None:
    settings = ("k", "activation", "apply_b_dec_to_input")
    differing = [name for name in settings if getattr(expected, name) != getattr(written, name)]
    for name, array in expected.tensors().items():
        back = written.tensors()[name]
        # Qwen-Scope's files are float32, which holds narrower types exactly. Compared as bytes: 0.0 equals -0.0.
        if not np.array_equal(_bytes(array.astype(back.dtype, casting="safe", copy=False)), _bytes(back)):
            differing.append(name)
    if differing:
        raise SourceError(f"{where}: {differing[0]} differs after writing; the disk or the file system is at fault")
    print(f"{where}: {expected.num_features} features of width {expected.d_model}, k {expected.k}, read back equal")


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint8)


def _parse(layers: str) -> list[int]:
    chosen: set[int] = set()
    for part in layers.split(","):
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part.strip(), re.ASCII)
        span = range(int(match[1]), int(match[2] or match[1]) + 1) if match else ()
        if not span:
            raise InputError(f"--layers {layers!r}: write all, 5, 0-3 or 0-3,7")
        chosen.update(span)
    return sorted(chosen)


if __name__ == "__main__":
    sys.exit(main())
