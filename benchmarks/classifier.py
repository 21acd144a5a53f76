"""What classifying adds to a forward pass that stops at the classifier's layer.

    python -m benchmarks.classifier [--models tiny,0.6b] [--rounds 25]

Target: reading features by their encoder rows adds under 5 %. Reading them as the SAE does computes all of its pre-activations, which is shown
beside it, and so is the whole forward pass, which stopping early saves.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.shapes import both_sides
from benchmarks.timing import header, paired
from qscope_jax.features.classify.classification import FeatureRule, Term
from qscope_jax.features.classify.feature_classifier import FiringFeatures, classify_batch
from qscope_jax.features.classify.text_reading import ReadingConfig
from qscope_jax.models.language_model import forward
from qscope_jax.sae.autoencoder import SparseAutoencoder
from qscope_jax.sae.encoder_rows import EncoderRows

# Texts, tokens of each, features of the SAE, its k.
SHAPES = {"tiny": (16, 64, 768, 56), "0.6b": (2, 64, 32_768, 50)}
FEATURES = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default="tiny,0.6b")
    parser.add_argument("--rounds", type=int, default=25)
    arguments = parser.parse_args()
    header("classifier")
    for name in arguments.models.split(","):
        _measure(name, arguments.rounds if name == "tiny" else 9)


def _measure(name: str, rounds: int) -> None:
    model, _ = both_sides(name)
    batch, length, num_features, k = SHAPES[name]
    config = model.config
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, config.vocab_size, (batch, length)).astype(np.int32)
    segments = np.ones_like(tokens)
    layer = config.num_layers // 2
    W, W_dec = (jnp.asarray(rng.standard_normal((num_features, config.d_model)), jnp.float32) for _ in range(2))
    sae = SparseAutoencoder(W, W_dec, jnp.zeros(num_features), jnp.zeros(config.d_model), k=k)
    features = np.arange(FEATURES)
    rows = EncoderRows(W[features], jnp.zeros(FEATURES))
    rule = FeatureRule(tuple(Term(layer, int(feature), 1.0) for feature in features))
    settings = ReadingConfig()
    taps = jnp.asarray([layer], jnp.int32)

    def stopped() -> None:
        jax.block_until_ready(forward(model.decoder, tokens, segments, (), taps, stop_after=layer))

    def whole() -> None:
        jax.block_until_ready(forward(model.decoder, tokens, segments))

    def classified(encoder: Any) -> None:
        found = classify_batch(
            model.decoder, (encoder,), tokens, segments, taps, stop_after=layer, max_norm_multiple=settings.max_norm_multiple,
            drop_first=settings.drop_first,
        )  # fmt: skip
        values, _ = map(np.asarray, found)
        rule.predict(values)

    firing = FiringFeatures(sae, jnp.asarray(features, jnp.int32))
    sides = {"stopped": stopped, "pre_activation": lambda: classified(rows), "top_k": lambda: classified(firing), "whole pass": whole}
    times = paired(sides, rounds=rounds)
    for side in ("pre_activation", "top_k", "whole pass"):
        ratios = times[side] / times["stopped"]
        target = "; target under 5 %" if side == "pre_activation" else ""
        what = "takes" if side == "whole pass" else f"({FEATURES} of {num_features:,} features) adds"
        print(f"{name}, {batch} x {length}, layer {layer} of {config.num_layers}: {side} {what} {np.median(ratios) - 1:+.2%} "
              f"(p10 {np.percentile(ratios, 10) - 1:+.2%}, p90 {np.percentile(ratios, 90) - 1:+.2%}; stopped pass "
              f"{np.median(times['stopped']) * 1e3:.1f} ms){target}")  # fmt: skip


if __name__ == "__main__":
    main()
