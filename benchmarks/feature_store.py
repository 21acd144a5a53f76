"""Writing a feature store beside the passes that it needs, and the memory it takes.

    python -m benchmarks.feature_store [--models tiny,0.6b] [--tokens 1000000] [--rounds 3] [--scratch DIR]

Over the embedded model's corpus with the SAEs of four layers, of the embedded model or, for a hundredth of the tokens, of a random Qwen3-0.6B shape
(SAEs of sixteen times its width, K=50), turn by turn: the model alone (`stop_after` the highest layer, every
residual stream taken, nothing kept), the model and the SAEs (codes computed and left on the device), and `write_store`, which also packs, makes
the texts' tables and writes everything. Tokenising is done beforehand on neither side: the first two read the same packed batches. Target: the
store at no less than 80 % of the speed of the passes. Memory: the peak of the process for a tenth of the tokens and for all of them, each in
a process of its own, over the embedded model.
"""

import argparse
import itertools
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks.shapes import QWEN3_0_6B
from benchmarks.timing import header, paired, report
from qscope_jax.data.packing import pack_texts
from qscope_jax.demo.corpus import documents
from qscope_jax.demo.embedded import tiny_model, tiny_saes
from qscope_jax.features.readout import read_codes
from qscope_jax.features.store.feature_store import read_store
from qscope_jax.features.store.store_writer import StoreConfig, write_store
from qscope_jax.models.config import ModelConfig
from qscope_jax.models.decoder import Decoder
from qscope_jax.models.language_model import LanguageModel, forward
from qscope_jax.sae.autoencoder import SparseAutoencoder
from qscope_jax.sae.layer_sae import LayerSAE, SAECollection

LAYERS = {"tiny": (2, 3, 4, 5), "0.6b": (6, 13, 20, 27)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default="tiny")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scratch", help="folder for 2 GB; default: the system's")
    parser.add_argument("--peak-of", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of:
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
            _store(*_model_and_saes("tiny"), arguments.peak_of, Path(scratch) / "store")
        print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
        return
    header("feature_store")
    for name in arguments.models.split(","):
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
            _speed(name, Path(scratch) / "store", arguments.tokens if name == "tiny" else arguments.tokens // 100, arguments.rounds)
    if "tiny" not in arguments.models:
        return
    peaks = {tokens: _peak(tokens, arguments.scratch) for tokens in (arguments.tokens // 10, arguments.tokens)}
    for tokens, peak in peaks.items():
        print(f"  peak memory, {tokens:,} tokens: {peak / 2**30:.2f} GiB")


def corpus(tokens: int) -> Iterator[str]:
    """Documents of at least so many tokens altogether, drawn as they are asked for; a document has about 73."""
    return itertools.islice(itertools.chain.from_iterable(documents(2_000, seed=seed) for seed in itertools.count(1)), max(tokens // 73, 1))


def _model_and_saes(name: str) -> tuple[LanguageModel, list[LayerSAE]]:
    """The embedded model or a random Qwen3-0.6B shape, which reads the embedded model's tokens, and the SAEs of `LAYERS`."""
    if name == "tiny":
        collection = SAECollection(tiny_saes(), max_layers=len(LAYERS[name]))
        return tiny_model(), [collection[layer] for layer in LAYERS[name]]
    config = replace(ModelConfig.from_hf(QWEN3_0_6B), dtype="float32").unrolled()
    model = LanguageModel(jax.jit(lambda key: Decoder(config, key))(jax.random.key(0)), tokenizer=tiny_model().tokenizer)
    width = config.d_model

    def sae(layer: int) -> LayerSAE:
        W = jax.random.normal(jax.random.key(layer), (16 * width, width)) / width**0.5
        return LayerSAE(SparseAutoencoder(W, W, jnp.zeros(16 * width), jnp.zeros(width), k=50), layer)

    return model, [sae(layer) for layer in LAYERS[name]]


def _store(model: LanguageModel, saes: list[LayerSAE], tokens: int, folder: Path) -> int:
    settings = StoreConfig(max_length=256, batch_size=16, dictionary=0)
    return write_store(model, saes, corpus(tokens), folder, settings, overwrite=True).num_tokens


def _speed(name: str, folder: Path, tokens: int, rounds: int) -> None:
    model, saes = _model_and_saes(name)
    layers = LAYERS[name]
    ids = [row[:256] for start in [list(corpus(tokens))] for row in model.tokenize(start)]
    batches = pack_texts(ids, batch_size=16, length=256)
    taps = jnp.asarray(layers, jnp.int32)

    def passes(read: bool) -> None:
        waiting = None
        for packed in batches:
            segment_ids = jnp.asarray(packed.batch.segment_ids_BT)
            out = forward(model.decoder, packed.batch.tokens_BT, segment_ids, (), taps, stop_after=max(layers))
            assert out.residuals is not None
            streams = zip(saes, out.residuals, strict=True)
            done = [read_codes(sae.autoencoder, x, segment_ids, 10.0, True) for sae, x in streams] if read else out.residuals
            jax.block_until_ready(waiting)
            waiting = done
        jax.block_until_ready(waiting)

    sides = {"model alone": lambda: passes(False), "model and SAEs": lambda: passes(True), "qscope_jax": lambda: _store(model, saes, tokens, folder)}
    times = paired(sides, rounds=rounds, warmup=1)
    total = sum(map(len, ids))
    print(f"{name}: {total:,} tokens, {len(batches):,} batches of 16 x 256, layers {layers}, F={saes[0].num_features} K={saes[0].k}")
    for side in ("model alone", "model and SAEs"):
        report(side, {side: times[side], "qscope_jax": times["qscope_jax"]}, ours="qscope_jax", target="at least 0.8", units=total)
    size = sum(path.stat().st_size for path in read_store(folder).folder.rglob("*") if path.is_file())
    print(f"  on disk: {size / 1e9:.2f} GB, {size / total:,.0f} bytes a token")


def _peak(tokens: int, scratch: str | None) -> int:
    command = [sys.executable, "-m", "benchmarks.feature_store", "--peak-of", str(tokens)] + (["--scratch", scratch] if scratch else [])
    return int(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]))


if __name__ == "__main__":
    main()
