"""Forward and cached decoding of every family beside transformers: random weights, float32, the same tokens and threads.

    python -m benchmarks.families [--families qwen3,qwen3_moe,qwen3_5,qwen3_5_moe,llama,gemma2] [--rounds 7]

Shapes of about 30 million parameters with what makes each family what it is. Prefill is included in decoding on both sides.
Target: forward at least as fast as transformers, decoding at least twice as fast.
"""

import argparse
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks.timing import header, paired, report
from qscope_jax.models.generation import decode, prefill
from qscope_jax.models.language_model import LanguageModel, forward, load_model
from qscope_jax.models.sampling import Sampler, SamplingConfig

_SIZES: dict[str, Any] = dict(
    vocab_size=4096, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4, head_dim=64
)
_EXPERTS: dict[str, Any] = dict(num_experts=16, num_experts_per_tok=4, moe_intermediate_size=256)
_DELTA: dict[str, Any] = dict(linear_num_key_heads=4, linear_num_value_heads=8, linear_key_head_dim=64, linear_value_head_dim=64)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {}),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", _EXPERTS | {"norm_topk_prob": True}),
    "qwen3_5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", _DELTA),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM", _DELTA | _EXPERTS | {"shared_expert_intermediate_size": 256}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {"query_pre_attn_scalar": 64, "sliding_window": 128}),
}
FORWARD, DECODE = ((1, 512), (8, 128)), ((1, 32, 48), (8, 32, 48))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    header("families")
    for family in arguments.families.split(","):
        ours, theirs = _both_sides(family)
        for batch, length in FORWARD:
            _forward(f"{family}, forward, {batch} x {length} tokens", ours, theirs, _tokens(ours, batch, length), arguments.rounds)
        for batch, length, new in DECODE:
            _decode(f"{family}, decoding, {batch} rows, {length} prompt + {new} new tokens", ours, theirs, _tokens(ours, batch, length), new,
                    arguments.rounds)  # fmt: skip


def _both_sides(family: str) -> tuple[LanguageModel, Any]:
    import transformers

    config_name, model_name, settings = FAMILIES[family]
    torch.manual_seed(0)
    theirs = getattr(transformers, model_name)(getattr(transformers, config_name)(**(_SIZES | settings))).float().eval()
    theirs.generation_config.eos_token_id = None
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return load_model(folder), theirs


def _tokens(model: LanguageModel, batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1, model.config.vocab_size, (batch, length)).astype(np.int32)


def _forward(title: str, ours: LanguageModel, theirs: Any, tokens: np.ndarray, rounds: int) -> None:
    segments, torch_tokens = np.ones_like(tokens), torch.tensor(tokens.astype(np.int64))

    def run_theirs() -> np.ndarray:
        with torch.inference_mode():
            return theirs(torch_tokens, use_cache=False).logits.numpy()

    def run_ours() -> np.ndarray:
        return np.asarray(forward(ours.decoder, tokens, segments).logits)

    expected = run_theirs()
    error = np.abs(run_ours() - expected).max() / np.abs(expected).max()
    times = paired({"transformers": run_theirs, "qscope_jax": run_ours}, rounds=rounds, warmup=2)
    report(f"{title}, logits within {error:.0e}", times, ours="qscope_jax", target="at least 1", units=tokens.size)


def _decode(title: str, ours: LanguageModel, theirs: Any, tokens: np.ndarray, new: int, rounds: int) -> None:
    prompt = torch.tensor(tokens.astype(np.int64))
    sampler = Sampler.make(SamplingConfig(max_new_tokens=new, stop_token_ids=()), (), len(tokens))

    def run_theirs() -> np.ndarray:
        with torch.inference_mode():
            mask = torch.ones_like(prompt)
            return theirs.generate(prompt, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0).numpy()

    def run_ours() -> np.ndarray:
        state = prefill(ours.decoder, tokens, np.ones_like(tokens), sampler, (), new_tokens=new)
        return np.asarray(jax.block_until_ready(decode(ours.decoder, state, sampler, (), jnp.int32(new))).tokens_BT)

    same = np.mean(run_theirs()[:, tokens.shape[1] :] == run_ours())
    times = paired({"transformers": run_theirs, "qscope_jax": run_ours}, rounds=rounds, warmup=1)
    report(f"{title}, {same:.0%} of tokens identical", times, ours="qscope_jax", target="at least 2", units=len(tokens) * new)


if __name__ == "__main__":
    main()
