"""Writing a feature store beside the passes that it needs, and the memory it takes.

    python -m benchmarks.feature_store [--tokens 1000000] [--rounds 3] [--scratch DIR]

Over the embedded model's corpus with the SAEs of four of its layers, turn by turn: the model alone (`stop_after` the highest layer, every
residual stream taken, nothing kept), the model and the SAEs (codes computed and left on the device), and `write_store`, which also packs, makes
the texts' tables and writes everything. Tokenising is done beforehand on neither side: the first two read the same packed batches. Target: the
store at no less than 80 % of the speed of the passes. Memory: the peak of the process for a tenth of the tokens and for all of them, each in
a process of its own.
"""

import argparse
import itertools
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks.timing import header, paired, report
from qscope_jax.data.packing import pack_texts
from qscope_jax.demo.corpus import documents
from qscope_jax.demo.embedded import tiny_model, tiny_saes
from qscope_jax.features.readout import read_codes
from qscope_jax.features.store.feature_store import read_store
from qscope_jax.features.store.store_writer import StoreConfig, write_store
from qscope_jax.models.language_model import forward
from qscope_jax.sae.layer_sae import SAECollection

LAYERS = (2, 3, 4, 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scratch", help="folder for 2 GB; default: the system's")
    parser.add_argument("--peak-of", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of:
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
            _store(arguments.peak_of, Path(scratch) / "store")
        print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
        return
    header("feature_store")
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        _speed(Path(scratch) / "store", arguments.tokens, arguments.rounds)
    peaks = {tokens: _peak(tokens, arguments.scratch) for tokens in (arguments.tokens // 10, arguments.tokens)}
    for tokens, peak in peaks.items():
        print(f"  peak memory, {tokens:,} tokens: {peak / 2**30:.2f} GiB")


def corpus(tokens: int) -> Iterator[str]:
    """Documents of at least so many tokens altogether, drawn as they are asked for; a document has about 95."""
    return itertools.islice(itertools.chain.from_iterable(documents(2_000, seed=seed) for seed in itertools.count(1)), max(tokens // 95, 1))


def _store(tokens: int, folder: Path) -> int:
    model, collection = tiny_model(), SAECollection(tiny_saes(), max_layers=len(LAYERS))
    settings = StoreConfig(max_length=256, batch_size=16, dictionary=0)
    return write_store(model, [collection[layer] for layer in LAYERS], corpus(tokens), folder, settings, overwrite=True).num_tokens


def _speed(folder: Path, tokens: int, rounds: int) -> None:
    model, collection = tiny_model(), SAECollection(tiny_saes(), max_layers=len(LAYERS))
    saes = [collection[layer] for layer in LAYERS]
    ids = [row[:256] for start in [list(corpus(tokens))] for row in model.tokenize(start)]
    batches = pack_texts(ids, batch_size=16, length=256)
    taps = jnp.asarray(LAYERS, jnp.int32)

    def passes(read: bool) -> None:
        waiting = None
        for packed in batches:
            segment_ids = jnp.asarray(packed.batch.segment_ids_BT)
            out = forward(model.decoder, packed.batch.tokens_BT, segment_ids, (), taps, stop_after=max(LAYERS))
            assert out.residuals is not None
            streams = zip(saes, out.residuals, strict=True)
            done = [read_codes(sae.autoencoder, x, segment_ids, 10.0, True) for sae, x in streams] if read else out.residuals
            jax.block_until_ready(waiting)
            waiting = done
        jax.block_until_ready(waiting)

    sides = {"model alone": lambda: passes(False), "model and SAEs": lambda: passes(True), "qscope_jax": lambda: _store(tokens, folder)}
    times = paired(sides, rounds=rounds, warmup=1)
    total = sum(map(len, ids))
    print(f"{total:,} tokens, {len(batches):,} batches of 16 x 256, layers {LAYERS}, F={saes[0].num_features} K={saes[0].k}")
    for name in ("model alone", "model and SAEs"):
        report(name, {name: times[name], "qscope_jax": times["qscope_jax"]}, ours="qscope_jax", target="at least 0.8", units=total)
    size = sum(path.stat().st_size for path in read_store(folder).folder.rglob("*") if path.is_file())
    print(f"  on disk: {size / 1e9:.2f} GB, {size / total:,.0f} bytes a token")


def _peak(tokens: int, scratch: str | None) -> int:
    command = [sys.executable, "-m", "benchmarks.feature_store", "--peak-of", str(tokens)] + (["--scratch", scratch] if scratch else [])
    return int(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]))


if __name__ == "__main__":
    main()
