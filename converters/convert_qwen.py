"""Convert model folders between Hugging Face safetensors and Orbax, tensor by tensor, and check what was written.

    python -m converters.convert_qwen SRC DST --to orbax|hf [--dtype bfloat16 --lossy] [--verify] [--overwrite] [--revision REV]

SRC is a Hugging Face folder, an Orbax folder or a hub id, of any supported family. Every tensor keeps its bits, unless --dtype says otherwise.
An interrupted conversion goes on where it was when the same command is given again.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.filesize import decimal

from converters.program import run
from qscope_jax.data.hub import Source, open_source
from qscope_jax.errors import SourceError
from qscope_jax.models.config import DTYPES
from qscope_jax.models.conversion import LAYOUTS, Layout, Progress, StoredModel, convert_model, differing_tensors, narrowed


def main() -> int:
    """Run from the command line; see `converters.program.run` for the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", help="Hugging Face folder, Orbax folder or hub id")
    parser.add_argument("destination", type=Path, help="folder to write")
    parser.add_argument("--to", choices=LAYOUTS, required=True, help="layout to write")
    parser.add_argument("--dtype", choices=DTYPES, help="what the tensors become; by default each keeps its own")
    parser.add_argument("--lossy", action="store_true", help="allow a --dtype that loses precision")
    parser.add_argument("--verify", action="store_true", help="read what was written, compare every bit, and run a prompt through both models")
    parser.add_argument("--overwrite", action="store_true", help="replace a model at the destination")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    options = vars(parser.parse_args())
    return run("convert_qwen", lambda: convert(**options))


def convert(
    source: str,
    destination: Path,
    to: Layout,
    dtype: str | None = None,
    lossy: bool = False,
    verify: bool = False,
    overwrite: bool = False,
    revision: str | None = None,
) -> None:
    """Convert, with a progress bar, and say what was done.

    Raises:
        QscopeError: the source is not sound, the destination cannot be written, or what was written does not read back equal.
    """
    opened = open_source(source, revision)
    model = StoredModel(opened, dtype)
    total = sum(tensor.nbytes for tensor in model.tensors)
    for (own, wanted), count in narrowed(model).items() if lossy else ():
        print(f"{source}: {count} of {len(model.tensors)} tensors are rounded from {own} to {wanted}")

    def check(written: Path) -> None:
        with _bar("verify", total) as progress:
            _verify(opened, open_source(written), dtype, progress)
        print(f"{destination}: every bit is as it should be, and a prompt has the same logits in both models")

    with _bar("convert", total) as progress:
        settings = dict(dtype=dtype, lossy=lossy, overwrite=overwrite)
        convert_model(opened, destination, to, **settings, progress=progress, check=check if verify else None)  # pyright: ignore[reportArgumentType]
    carried = f", {len(model.carried)} of them carried along" if model.carried else ""
    print(f"{destination}: {len(model.tensors)} tensors{carried}, {decimal(total)}")


def _verify(source: Source, written: Source, dtype: str | None, progress: Progress) -> None:
    model = StoredModel(source, dtype)
    if (name := next(differing_tensors(model, StoredModel(written), progress), None)) is not None:
        raise SourceError(f"{source.name}: tensor {name} differs after writing; the disk or the file system is at fault")
    if not np.array_equal(_logits(source, dtype), _logits(written, None)):
        raise SourceError(f"{source.name}: the written model gives other logits; its config.json or the loader is at fault")


def _logits(source: Source, dtype: str | None) -> np.ndarray:
    """Scores at every position of a prompt of arbitrary tokens."""
    from qscope_jax.models.language_model import forward, load_model

    model = load_model(source.folder or source.name, dtype=dtype, revision=source.revision)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, 16)).astype(np.int32)
    return np.asarray(forward(model.decoder, tokens, np.ones_like(tokens)).logits)


@contextlib.contextmanager
def _bar(what: str, total: int) -> Iterator[Progress]:
    """A progress bar with rate and time left, on stderr; takes bytes."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Bar(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda size: bar.advance(task, size)


if __name__ == "__main__":
    sys.exit(main())
