"""Make the embedded model: tokenizer and weights, from the corpus alone.

    python -m qscope_jax.demo.recipe --out qscope_jax/demo/tiny

A byte-level BPE of 3,072 tokens and a Qwen3 of 1.6 million parameters, written as a Hugging Face folder in bfloat16 (3.4 MB). The file
`recipe.json` beside the weights records the settings, the held-out loss, the machine and the versions of the run that made them.
"""

import argparse
import json
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import jax
import jax.numpy as jnp

from qscope_jax.data.files import write_json
from qscope_jax.data.hub import open_source
from qscope_jax.demo.corpus import LANGUAGES, documents, python_documentation, sentences
from qscope_jax.errors import QscopeError
from qscope_jax.models.config import ModelConfig
from qscope_jax.models.weights import save_decoder
from qscope_jax.training.causal_lm import CausalLM, CausalLMConfig
from qscope_jax.training.loop import LoopConfig, train

END = "<|endoftext|>"
VOCABULARY = 3072
DOCUMENTS = 60_000
MODEL = {
    "model_type": "qwen3",
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "max_position_embeddings": 1024,
    "eos_token_id": 0,
    "dtype": "float32",
}
TRAINING = CausalLMConfig(batch_size=32, length=128, steps=700, learning_rate=3e-3, warmup_steps=100, weight_decay=0.2)


def make_tokenizer(folder: Path, texts: Sequence[str]) -> None:
    """Train a byte-level BPE in Qwen's manner (no begin-of-sequence token) and write its Hugging Face files."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END, "clean_up_tokenization_spaces": False}
    write_json(folder / "tokenizer_config.json", settings)


def make_model(out: Path, config: CausalLMConfig = TRAINING, run_dir: str = "") -> dict[str, float]:
    """Train tokenizer and model, write the folder `out`, and return the held-out metrics."""
    from tokenizers import Tokenizer

    texts = documents(DOCUMENTS, seed=config.seed)
    held_out = [text for language in LANGUAGES for text in sentences(language, held_out=True)]
    with tempfile.TemporaryDirectory() as scratch:
        # Every language weighs the same in the merges; the documentation's share of English stays out of them.
        sample = [line for language in LANGUAGES for line in sentences(language)] + texts[:12_000] + list(python_documentation())
        make_tokenizer(Path(scratch), sample)
        tokenizer = Tokenizer.from_file(f"{scratch}/tokenizer.json")

        def tokenize(text: str) -> list[int]:
            return [*tokenizer.encode(text).ids, 0]

        model = ModelConfig.from_hf(MODEL)
        recipe = CausalLM(model, config, texts, tokenize, held_out=[tokenize(text) for text in held_out])
        state = train(recipe, LoopConfig(steps=config.steps, run_dir=run_dir, log_every=50, eval_every=200, checkpoint_every=200 if run_dir else 0))
        metrics = dict(recipe.evaluate(state))
        half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.decoder)
        half.config = replace(model, dtype="bfloat16")
        save_decoder(half, out, carry_from=open_source(scratch))
    record = {"training": asdict(config), "documents": DOCUMENTS, "metrics": metrics, "backend": jax.devices()[0].device_kind,
              "jax": jax.__version__, "python": platform.python_version()}  # fmt: skip
    write_json(out / "recipe.json", record)
    return metrics


def main() -> None:
    """Run the recipe from the command line."""
    parser = argparse.ArgumentParser(description="Make the embedded model from its corpus.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=TRAINING.steps, help="optimiser steps")
    parser.add_argument("--run-dir", default="", help="folder for metrics and checkpoints")
    arguments = parser.parse_args()
    try:
        metrics = make_model(arguments.out, replace(TRAINING, steps=arguments.steps), arguments.run_dir)
    except QscopeError as error:
        parser.error(str(error))
    print(json.dumps(metrics))


if __name__ == "__main__":
    main()
