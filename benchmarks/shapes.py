"""Models that benchmarks build: the embedded one, and the released shapes with random weights."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import torch

from qscope_jax.data.hub import open_source
from qscope_jax.demo.embedded import TINY
from qscope_jax.models.config import ModelConfig
from qscope_jax.models.decoder import Decoder
from qscope_jax.models.language_model import LanguageModel
from qscope_jax.models.weights import read_config

QWEN3_0_6B = {
    "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "rope_theta": 1e6, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True, "max_position_embeddings": 40960, "dtype": "float32",
}  # fmt: skip
QWEN3_1_7B = {**QWEN3_0_6B, "hidden_size": 2048, "intermediate_size": 6144, "dtype": "bfloat16"}


def both_sides(name: str) -> tuple[LanguageModel, Any]:
    """The same float32 weights in this library and in transformers: the embedded model (`tiny`) or a random Qwen3-0.6B shape (`0.6b`)."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    hf_config = read_config(open_source(TINY)).to_hf() if name == "tiny" else QWEN3_0_6B
    theirs = (
        Qwen3ForCausalLM(Qwen3Config(**{k: v for k, v in hf_config.items() if k not in ("dtype", "torch_dtype", "architectures")})).float().eval()
    )
    config = replace(ModelConfig.from_hf(hf_config), dtype="float32").unrolled()
    ours = _from_torch(config, theirs)
    return LanguageModel(ours), theirs


def _from_torch(config: ModelConfig, theirs: Any) -> Decoder:
    """Our decoder around copies of a transformers model's weights."""
    from qscope_jax.models.weights import placement

    abstract = jax.eval_shape(lambda: Decoder(config, jax.random.key(0)))
    state = theirs.state_dict()

    def leaf(path: Any, shape: Any) -> jax.Array:
        parts = [state[name].numpy() for name in placement(path, shape.shape, config).names]
        return jax.device_put(np.stack(parts).reshape(shape.shape))

    return jax.tree_util.tree_map_with_path(leaf, abstract)
