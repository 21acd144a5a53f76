"""The small model whose runs are planned, and what a planning program answers."""

from typing import NamedTuple

MODEL = {
    "model_type": "qwen3", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
    "max_position_embeddings": 512, "eos_token_id": 0, "dtype": "bfloat16",
}  # fmt: skip
# Elements of its matrices: embedding, and of four layers attention and feed-forward.
MATRICES = 256 * 64 + 4 * (64 * (64 + 32 + 32) + 64 * 64 + 3 * 64 * 128)
GIB = 2**30


class Answer(NamedTuple):
    """What a run of the program gave."""

    status: int
    out: str
    err: str
