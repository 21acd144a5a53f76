"""FLOPs by formula, a multiply-add counted as two.

XLA's own count takes the body of a loop once, however often it turns, and so misses nearly all of a model whose layers are scanned.
"""

import math
from collections.abc import Sequence

import jax

from qscope_jax.models.config import ModelConfig
from qscope_jax.models.decoder import Decoder


def model_flops(config: ModelConfig, length: int, layers: int) -> float:
    """FLOPs a token of a forward pass through the first `layers` layers, without embedding and output head.

    Matrices count 2 for each element that a token meets: of the experts those that it goes through. Attention counts the keys that a query
    sees on average; the gated delta net counts its state's three products in recurrent form.

    Args:
        config: The decoder.
        length: Tokens of a row, one document.
        layers: How many layers.
    """
    decoder = jax.eval_shape(lambda: Decoder(config, jax.random.key(0)))
    total = 0.0
    for layer in range(layers):
        total += sum(_matrix_flops(path, leaf.shape[1:], config) for path, leaf in _leaves(decoder.layers[layer % config.period]))
        total += _mixer_flops(config, config.mixers[layer], length)
    return total


def sae_flops(num_features: int, d_model: int, k: int, dense: bool) -> float:
    """FLOPs a token of one SAE's training step in which no feature is dead, without optimiser.

    Five products: encoding, decoding, and the gradients of the code, the decoder and the encoder.

    Args:
        num_features: F.
        d_model: D.
        k: Active features a token.
        dense: Whether all five are dense (2 D F each), as on TPUs, or only encoding (the others 2 D K).
    """
    return 2 * d_model * (num_features + 4 * (num_features if dense else k))


def _leaves(layer: object) -> Sequence[tuple[str, jax.ShapeDtypeStruct]]:
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(layer)[0]]


def _matrix_flops(path: str, shape: Sequence[int], config: ModelConfig) -> float:
    if len(shape) < 2:
        return 0.0
    share = config.experts_per_token / config.num_experts if "experts_" in path else 1.0
    return 2.0 * math.prod(shape) * share


def _mixer_flops(config: ModelConfig, mixer: str, length: int) -> float:
    if mixer == "gated_delta":
        return 6.0 * config.delta_value_heads * config.delta_key_dim * config.delta_value_dim
    window = min(config.sliding_window, length) if mixer == "sliding_attention" else length
    keys = (window * (window + 1) / 2 + (length - window) * window) / length
    return 4.0 * config.num_heads * config.head_dim * keys
