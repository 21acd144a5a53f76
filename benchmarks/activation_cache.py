"""Activations on disk: what writing them adds to the forward pass, and how fast batches are read beside what an SAE step needs.

    python -m benchmarks.activation_cache [--scratch DIR] [--rounds 5]

Targets: caching at most 1.1 times the forward passes alone (a Qwen3-0.6B shape of four layers, two of them cached); reading at least ten
times as fast as an SAE step (D=1024, F=16384, K=50, N=1024) takes batches. Batches are read with the files in the page cache (`warm`) and
after they were dropped from it (`cold`: the disk's speed, where the system honours the request).
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from benchmarks.sae_step import SHAPES, _ours
from benchmarks.shapes import QWEN3_0_6B
from benchmarks.timing import header, paired, report
from qscope_jax.data.batches import BatchConfig
from qscope_jax.data.resumable import ResumableFolder
from qscope_jax.models.config import ModelConfig
from qscope_jax.models.decoder import Decoder
from qscope_jax.models.language_model import LanguageModel
from qscope_jax.training.activation_cache import CacheConfig, cache_activations
from qscope_jax.training.activation_files import DTYPES, FORMAT, VERSION, RowsFile, holds_cache, layer_file, shard_name
from qscope_jax.training.activations import tap
from qscope_jax.training.cached_activations import CachedActivations
from qscope_jax.training.tokens import TokenStream

_ROWS, _LENGTH, _BATCHES = 8, 128, 6
_SHARDS, _SHARD_TOKENS, _READ = 8, 65_536, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scratch", help="folder for 2 GB of activations; default: the system's")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    header("activation_cache")
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        _writing(Path(scratch) / "written", arguments.rounds)
        _reading(Path(scratch) / "read", arguments.rounds)


def _writing(folder: Path, rounds: int) -> None:
    config = ModelConfig.from_hf({**QWEN3_0_6B, "num_hidden_layers": 4, "vocab_size": 1000}).unrolled()
    model = LanguageModel(Decoder(config, jax.random.key(0)))
    settings = CacheConfig((1, 3), shard_tokens=2048, max_norm_multiple=0.0)

    def tokenize(text: str) -> list[int]:
        return np.random.default_rng(int(text)).integers(0, 1000, _LENGTH).tolist()

    def tokens() -> TokenStream:
        return TokenStream([str(seed) for seed in range(_ROWS * _BATCHES)], tokenize, BatchConfig(_ROWS, _LENGTH, epochs=1))

    def alone() -> None:
        stream = tokens()
        while (batch := next(stream, None)) is not None:
            jax.block_until_ready(tap(model.decoder, batch, settings.filter).x_MBTD)

    times = paired(
        {"forward alone": alone, "cached": lambda: cache_activations(model, tokens(), settings, folder, overwrite=True)}, rounds=rounds, warmup=1
    )
    title = f"writing: 4 layers, D=1024, 2 cached, {_BATCHES} batches of {_ROWS} x {_LENGTH} tokens"
    report(title, times, ours="cached", target="at least 0.91", units=_ROWS * _BATCHES * _LENGTH)


def _reading(folder: Path, rounds: int) -> None:
    width, features, k, batch_tokens = SHAPES[0]
    _make(folder, width)
    step = paired(
        {"step": _ours(np.random.default_rng(0).standard_normal((batch_tokens, width)).astype(np.float32), features, k, 1)}, rounds=rounds, warmup=2
    )
    needed = batch_tokens / np.median(step["step"])
    print(f"reading: D={width}, batches of {batch_tokens}; an SAE step with F={features}, K={k} takes {needed:,.0f} tok/s")

    def read(block_tokens: int, *, cold: bool) -> Callable[[], None]:
        def run() -> None:
            if cold:
                _forget(folder)
            stream = CachedActivations(folder, batch_tokens=batch_tokens, block_tokens=block_tokens)
            for _ in range(_READ):
                jax.block_until_ready(next(stream))
            stream.close()

        return run

    sides = {f"{'cold' if cold else 'warm'}, blocks of {block}": read(block, cold=cold) for cold in (False, True) for block in (16, 256)}
    for name, seconds in paired(sides, rounds=rounds, warmup=1).items():
        rate = _READ * batch_tokens / np.median(seconds)
        print(
            f"  {name:<24} {_READ / np.median(seconds):7.0f} batches/s  {rate * width * 2 / 1e9:5.2f} GB/s  "
            f"{rate:12,.0f} tok/s  {rate / needed:6.0f} times the step's need; target at least 10"
        )


def _make(folder: Path, width: int) -> None:
    """A cache of random rows, of one layer."""
    rows = np.random.default_rng(0).standard_normal((_SHARD_TOKENS, width), np.float32).astype(DTYPES["bfloat16"])
    with ResumableFolder(folder, {}, replaceable=holds_cache) as made:
        for shard in range(_SHARDS):
            with made.unit(shard_name(shard)) as path:
                path.mkdir()
                with RowsFile(path / layer_file(0)) as file:
                    file.append(rows)
        tokens = _SHARDS * _SHARD_TOKENS
        made.finish(
            format=FORMAT, format_version=VERSION, model="random", revision=None, layers=[0], d_model=width, dtype="bfloat16", tokens=tokens,
            shard_tokens=_SHARD_TOKENS, seen_tokens=tokens, dropped_tokens=0, damaged_tokens=0, filter={}, statistics={},
        )  # fmt: skip


def _forget(folder: Path) -> None:
    for path in folder.rglob("*.safetensors"):
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


if __name__ == "__main__":
    main()
