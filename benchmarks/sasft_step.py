"""What SASFT's loss costs: an optimiser step of fine-tuning with and without it, in time and in memory.

    python -m benchmarks.sasft_step [--models tiny,0.6b] [--rounds 15]

Two features at each of the last two layers, in the paper's form. `0.6b` is the shape of Qwen3-0.6B with eight of its layers and random weights.
Memory is what the compiled step takes beside its arguments. Target: at most 5 % of a step's time, and no more memory than the tapped layers.
"""

import argparse
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.shapes import QWEN3_0_6B
from benchmarks.timing import header, paired
from qscope_jax.data.chat_batches import ChatBatch
from qscope_jax.data.chat_tokens import ChatRow
from qscope_jax.demo.embedded import tiny_model
from qscope_jax.models.config import ModelConfig
from qscope_jax.models.decoder import Decoder
from qscope_jax.models.language_model import LanguageModel
from qscope_jax.sae.encoder_rows import EncoderRows
from qscope_jax.training.auxiliary import FeatureCeiling
from qscope_jax.training.sft import SFT, SFTConfig

SHAPES = {"tiny": (16, 128), "0.6b": (2, 128)}
FEATURES = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default="tiny,0.6b")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    header("sasft_step")
    for name in arguments.models.split(","):
        model = tiny_model() if name == "tiny" else _random_model()
        rows, length = SHAPES[name]
        config = SFTConfig(steps=1000, batch_size=rows, length=length, remat=False)
        plain, sasft = (SFT(model, [_row()], config, languages=("en", "zh"), auxiliary=loss) for loss in (None, ceiling(model)))
        times = paired({"plain": _stepping(plain), "sasft": _stepping(sasft)}, rounds=arguments.rounds)
        ratios = times["sasft"] / times["plain"]
        taps = 2 * rows * length * model.config.d_model * 4
        extra = _temporary(sasft) - _temporary(plain)
        print(f"{name}, {rows} x {length} tokens: SASFT costs {np.median(ratios) - 1:+.2%} of a step (p10 {np.percentile(ratios, 10) - 1:+.2%}, "
              f"p90 {np.percentile(ratios, 90) - 1:+.2%}; plain {np.median(times['plain']) * 1e3:.0f} ms), target at most 5 %; "
              f"memory {extra / 2**20:+.2f} MiB, its two tapped layers {taps / 2**20:.2f} MiB")  # fmt: skip


def ceiling(model: LanguageModel) -> FeatureCeiling:
    """A loss on random features of the last two layers."""
    width, last = model.config.d_model, model.config.num_layers - 1
    rows = tuple(EncoderRows(jax.random.normal(jax.random.key(layer), (FEATURES, width)), jnp.zeros(FEATURES)) for layer in range(2))
    return FeatureCeiling(rows, jnp.zeros((2, 2, FEATURES)), jnp.int32(1), layers=(last - 1, last), weight=0.01)


def _random_model() -> LanguageModel:
    config = replace(ModelConfig.from_hf({**QWEN3_0_6B, "num_hidden_layers": 8}), dtype="float32").unrolled()
    return LanguageModel(jax.jit(lambda key: Decoder(config, key))(jax.random.key(0)))


def _row() -> ChatRow:
    return ChatRow(np.ones(4, np.int32), np.ones(4, bool), "en")


def _batch(recipe: SFT) -> ChatBatch:
    shape = (recipe.config.batch_size, recipe.config.length)
    tokens = np.random.default_rng(0).integers(1, recipe.model.config.vocab_size, shape).astype(np.int32)
    ones = np.ones(shape, np.int32)
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    return ChatBatch(tokens, ones, positions, positions > shape[1] // 4, 0 * ones)


def _stepping(recipe: SFT) -> Any:
    held, batch = {"state": recipe.init()}, _batch(recipe)

    def run() -> None:
        held["state"], metrics = recipe.step(held["state"], batch)
        jax.block_until_ready((held["state"], metrics))

    return run


def _temporary(recipe: SFT) -> int:
    memory: Any = recipe.lower().compile().memory_analysis()
    return memory.temp_size_in_bytes


if __name__ == "__main__":
    main()
