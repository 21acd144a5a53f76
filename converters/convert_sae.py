"""Convert SAEs between Qwen-Scope's files and this project's safetensors, bit for bit, and check what was written.

    python -m converters.convert_sae SRC DST --to safetensors|qwen_scope [--layers 0-27] [--k 50] [--overwrite]

SRC is a folder, a file or a hub id. A Qwen-Scope destination should be named like the release (SAE-Res-MODEL-W32K-L0_50): its files do
not hold k.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from qscope_jax.data.hub import open_source
from qscope_jax.errors import InputError, QscopeError, SourceError
from qscope_jax.sae import qwen_scope, safetensors_format
from qscope_jax.sae.arrays import SAEArrays
from qscope_jax.sae.formats import list_sae_layers, read_sae_arrays


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
    if destination.exists() and not overwrite:
        raise SourceError(f"{destination}: exists; pass --overwrite to replace it")
    available = list_sae_layers(source)
    chosen = available if layers == "all" else _parse(layers)
    if missing := sorted(set(chosen) - set(available)):
        raise InputError(f"{source}: has no layer {missing[0]}; it has {available[0]} to {available[-1]}")
    if to == "safetensors":
        safetensors_format.write_folder(destination, _Layers(source, chosen, k))
    for layer in chosen:
        arrays = read_sae_arrays(source, layer, k=k)
        if to == "qwen_scope":
            qwen_scope.write_layer(destination / f"layer{layer}.sae.pt", arrays)
        written = (
            safetensors_format.read_layer(open_source(destination), layer)
            if to == "safetensors"
            else qwen_scope.read_layer(open_source(destination), layer, k=arrays.k)
        )
        _verify(arrays, written, f"{destination}: layer {layer}")
        print(f"layer {layer}: {arrays.num_features} features of width {arrays.d_model}, k {arrays.k}, read back equal")
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


def _verify(expected: SAEArrays, written: SAEArrays, where: str) -> None:
    for name, array in expected.tensors().items():
        if not np.array_equal(array, written.tensors()[name]):
            raise SourceError(f"{where}: {name} differs after writing; the disk or the file system is at fault")


def _parse(layers: str) -> list[int]:
    try:
        ranges = [part.split("-") for part in layers.split(",")]
        return sorted({layer for part in ranges for layer in range(int(part[0]), int(part[-1]) + 1)})
    except ValueError:
        raise InputError(f"--layers {layers!r}: write all, 5, 0-3 or 0-3,7") from None


if __name__ == "__main__":
    sys.exit(main())
