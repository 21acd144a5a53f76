"""Convert SAEs between formats: exactly, checked, resumable; what cannot be exact is refused, or done with --lossy, which says what changes.

    python -m converters.convert_sae SRC DST --to orbax|qwen_scope|sae_lens|sparsify|dictionary_learning|safetensors
        [--layers 0-27] [--dtype float32|bfloat16|float16] [--k 50] [--activation topk|batch_topk] [--input-norm X]
        [--lossy] [--no-verify] [--overwrite]

SRC is a folder, a file or a hub id, in any format that `qscope_jax.load_sae` reads. Every layer is read back and compared unless --no-verify is
given. DST appears when it is complete, with a manifest.json of sizes and SHA-256; after an interruption the same command resumes. A Qwen-Scope
destination should be named like the release (SAE-Res-MODEL-W32K-L0_50): its files do not hold k.
"""

import argparse
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from converters.program import run
from qscope_jax.errors import InputError
from qscope_jax.sae.conversion import DTYPES, ConversionConfig, ConvertedLayer, convert
from qscope_jax.sae.formats.registry import list_sae_layers
from qscope_jax.sae.formats.writers import WRITERS


def main() -> int:
    """Run from the command line; see `converters.program.run` for the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", help="folder, file or hub id")
    parser.add_argument("destination", type=Path, help="folder to write")
    parser.add_argument("--to", choices=sorted(WRITERS), required=True, help="format to write")
    parser.add_argument("--layers", default="all", help="all, or such as 0-3,7")
    parser.add_argument("--dtype", choices=DTYPES, help="element type to write; a narrower one needs --lossy")
    parser.add_argument("--k", type=int, help="active features a token, where the source does not say")
    parser.add_argument("--activation", choices=("topk", "batch_topk"), help="where the source fits both")
    parser.add_argument("--input-norm", type=float, help="mean activation norm, where the format scales by it and does not store it")
    parser.add_argument("--lossy", action="store_true", help="allow what changes codes (thresholds to top-k, a narrower dtype) and print it")
    parser.add_argument("--verify", action=argparse.BooleanOptionalAction, default=True, help="read every layer back and compare")
    parser.add_argument("--overwrite", action="store_true", help="replace SAEs that are at the destination")
    options = vars(parser.parse_args())
    source, destination, layers = (options.pop(name) for name in ("source", "destination", "layers"))
    return run("convert_sae", lambda: _run(source, destination, layers, ConversionConfig(**options)))


def _run(source: str, destination: Path, layers: str, config: ConversionConfig) -> None:
    chosen = None if layers == "all" else _parse(layers)
    with _progress(len(chosen) if chosen else len(list_sae_layers(source))) as report:
        written = convert(source, destination, config, chosen, report)
    print(f"{destination}: {len(written)} layers in the {config.to} format, with checksums in manifest.json")


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
               TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
    start, done = time.monotonic(), 0
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("layers", total=total, rate="")

        def report(layer: ConvertedLayer) -> None:
            nonlocal done
            done += not layer.resumed
            elapsed = time.monotonic() - start
            rate = f"{60 * done / elapsed:,.1f} layers/min" if done and elapsed else ""
            bar.update(task, advance=1, rate=rate)
            print(_sentence(layer), flush=True)

        yield report


def _sentence(layer: ConvertedLayer) -> str:
    if layer.resumed:
        return f"layer {layer.layer}: finished by an earlier run"
    folds = f", folds: {', '.join(layer.folds)}" if layer.folds else ""
    changes = "".join(f"\n  changed: {change}" for change in layer.changes)
    return f"layer {layer.layer}: {layer.shape[0]} features of width {layer.shape[1]}, k {layer.k}{folds}; {layer.outcome}{changes}"


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
