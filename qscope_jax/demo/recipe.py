"""Make the embedded model: tokenizer and weights, from the corpus alone.

    python -m qscope_jax.demo.recipe --out qscope_jax/demo/tiny

A byte-level BPE of 3,072 tokens and a Qwen3 of 1.6 million parameters, written as a Hugging Face folder in bfloat16 (3.2 MB). Beside the
weights, `recipe.json` records the settings, the held-out loss, the machine and the versions of the run that made them, and
`checkpoint_scores.npz` which samples of the twelve tasks each of its checkpoints answered rightly.
"""

import argparse
import json
import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qscope_jax.data.files import write_json
from qscope_jax.data.hub import open_source
from qscope_jax.demo.corpus import LANGUAGES, documents, python_documentation, sentences
from qscope_jax.demo.task_scores import CheckpointScores, answered, write_scores
from qscope_jax.demo.tasks import tasks
from qscope_jax.errors import QscopeError
from qscope_jax.models.config import ModelConfig
from qscope_jax.models.weights import save_decoder
from qscope_jax.training.causal_lm import CausalLM, CausalLMConfig, CausalLMState
from qscope_jax.training.loop import LoopConfig, train

END = "<|endoftext|>"
VOCABULARY = 3072
DOCUMENTS = 60_000
CHECKPOINTS = 24
SCORES = "checkpoint_scores.npz"
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
TRAINING = CausalLMConfig(batch_size=32, length=128, steps=600, learning_rate=3e-3, warmup_steps=100, weight_decay=0.2)


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
        recipe = ScoredLM(model, config, texts, tokenize, held_out=[tokenize(text) for text in held_out])
        every = max(config.steps // CHECKPOINTS, 1)
        state = train(recipe, LoopConfig(steps=config.steps, run_dir=run_dir, log_every=50, eval_every=every))
        metrics = recipe.history[-1]
        half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.decoder)
        half.config = replace(model, dtype="bfloat16")
        save_decoder(half, out, carry_from=open_source(scratch))
    record = {"training": asdict(config), "documents": DOCUMENTS, "metrics": metrics, "backend": jax.devices()[0].device_kind,
              "jax": jax.__version__, "python": platform.python_version()}  # fmt: skip
    write_json(out / "recipe.json", record)
    write_scores(out / SCORES, recipe.scores(every))
    return metrics


class ScoredLM(CausalLM):
    """The recipe, which at every evaluation also notes what the model does on the tasks.

    Attributes:
        history: Metrics of each evaluation: the held-out loss, and the accuracy on each task.
        answers: For each task, which samples each evaluation found answered rightly.
    """

    def __init__(self, *args: Any, **settings: Any):
        """As `CausalLM`."""
        super().__init__(*args, **settings)
        self.history: list[dict[str, float]] = []
        self.answers: dict[str, list[np.ndarray]] = {task.name: [] for task in tasks()}

    def evaluate(self, state: CausalLMState) -> Mapping[str, float]:
        """Held-out loss in nats a token, and the accuracy on each task."""
        metrics = dict(super().evaluate(state))
        for task in tasks():
            right = answered(state.decoder, lambda text: self.tokenize(text)[:-1], task)
            self.answers[task.name].append(right)
            metrics[f"accuracy {task.name}"] = float(right.mean())
        self.history.append(metrics)
        return metrics

    def scores(self, every: int) -> CheckpointScores:
        """All evaluations of a run that evaluated after so many steps each, and at its end."""
        steps = np.minimum(np.arange(1, len(self.history) + 1) * every, self.config.steps)
        losses = np.array([metrics["held_out_loss"] for metrics in self.history])
        return CheckpointScores(steps, losses, {name: np.stack(rows) for name, rows in self.answers.items()})


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
