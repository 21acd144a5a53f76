"""What an SAE has learnt after equal tokens, beside sparsify's and dictionary_learning's: the same batches, width, k, rate, Adam and AuxK.

    pip install -e '.[peers]'
    python -m benchmarks.sae_quality [--steps 1500] [--seeds 3]

The streams are the embedded model's, of one layer, scaled to unit mean squared norm for every side. Fraction of variance unexplained and the
share of features that never fire are measured on tokens that none has seen. Target: FVU at most 1 % above the others', no more dead features.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.sae_peers import DictionaryLearning, Sparsify
from benchmarks.timing import header
from qscope_jax.data.batches import BatchConfig
from qscope_jax.demo.corpus import documents
from qscope_jax.demo.embedded import tiny_model
from qscope_jax.sae.autoencoder import densify
from qscope_jax.training.activations import ActivationConfig, ActivationStream, mean_squared_norm
from qscope_jax.training.sae import SAETraining
from qscope_jax.training.sae_config import SAEConfig
from qscope_jax.training.sae_step import exported
from qscope_jax.training.tokens import TokenStream

FEATURES, K, BATCH, RATE, DEAD_AFTER, HELD_OUT = 2048, 32, 1024, 1e-3, 50_000, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--layer", type=int, default=3)
    arguments = parser.parse_args()
    header("sae_quality")
    model = tiny_model()

    def stream(held_out: bool = False) -> Any:
        texts = documents(4000, seed=99 if held_out else 1)
        tokens = TokenStream(texts, lambda text: model.tokenize([text])[0], BatchConfig(16, 128))
        return ActivationStream(model.decoder, tokens, ActivationConfig((arguments.layer,), batch_tokens=BATCH), model.mesh)

    scale = jnp.sqrt(mean_squared_norm(stream().peek()[0]))
    held = [np.asarray(next(source)[0] / scale) for source in [stream(held_out=True)] for _ in range(HELD_OUT)]
    found: dict[str, list[tuple[float, float]]] = {}
    for seed in range(arguments.seeds):
        sides = {"qscope_jax": _ours(model, arguments.layer, stream, arguments.steps, seed)} | _theirs(model.config.d_model, arguments.steps, seed)
        source = stream()
        for _ in range(arguments.steps):
            batch = next(source)
            for side in sides.values():
                side.step(np.asarray(batch[0] / scale))
        for name, side in sides.items():
            found.setdefault(name, []).append(_measure(side, held))
    ours = np.array(found["qscope_jax"])
    print(f"layer {arguments.layer}, D={model.config.d_model} F={FEATURES} K={K}, {arguments.steps} steps of {BATCH} tokens, {arguments.seeds} seeds")
    for name, values in found.items():
        fvu, dead = np.array(values).T
        line = f"  {name:<24} held-out FVU {fvu.mean():.4f} (sd {fvu.std():.4f})   dead {dead.mean():.2%}"
        print(line if name == "qscope_jax" else f"{line}   ours / theirs {np.mean(ours[:, 0] / fvu):.4f}; target at most 1.01")


class _Ours:
    def __init__(self, recipe: SAETraining):
        self.recipe, self.state = recipe, recipe.init()

    def step(self, x: np.ndarray) -> None:
        # The state divides by its own scale, so that it sees what the others see.
        self.state, _ = self.recipe.step(self.state, jnp.asarray(x)[None] * self.state.scale[0])

    def codes(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sae = exported(jax.tree.map(lambda leaf: leaf[0], self.state), self.recipe.config)
        code = sae.encode(jnp.asarray(x))
        return np.asarray(sae.decode(code)), np.asarray(densify(code, FEATURES))


class _Torch:
    def __init__(self, side: Any, scheduler: Any = None):
        self.side, self.scheduler = side, scheduler

    def step(self, x: np.ndarray) -> None:
        import torch

        self.side.step(torch.tensor(x))
        if self.scheduler is not None:
            self.scheduler.step()

    def codes(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        import torch

        return self.side.codes(torch.tensor(x))


def _ours(model: Any, layer: int, stream: Any, steps: int, seed: int) -> _Ours:
    config = SAEConfig(FEATURES, K, steps, learning_rate=RATE, dead_after_tokens=DEAD_AFTER, seed=seed)
    return _Ours(SAETraining(model, (layer,), stream, config))


def _theirs(width: int, steps: int, seed: int) -> dict[str, _Torch]:
    import torch

    torch.set_num_threads(2)
    torch.manual_seed(seed)
    sparsify = Sparsify(width, FEATURES, K, RATE, "adam", aux=True, dead_after=DEAD_AFTER)
    schedule = SAEConfig(FEATURES, K, steps, learning_rate=1.0).schedule()
    same = torch.optim.lr_scheduler.LambdaLR(sparsify.optimizer, lambda step: np.asarray(schedule(step)).item())
    peer = DictionaryLearning(width, FEATURES, K, RATE, "adam", dead_after=DEAD_AFTER, steps=steps)
    return {"sparsify": _Torch(sparsify, same), "dictionary_learning": _Torch(peer)}


def _measure(side: Any, held: list[np.ndarray]) -> tuple[float, float]:
    """FVU and the share of features that never fired, over all held-out tokens."""
    mean, errors, spread, fired = np.mean(np.concatenate(held), axis=0), 0.0, 0.0, np.zeros(FEATURES, bool)
    for x in held:
        rebuilt, code = side.codes(x)
        errors += float(np.sum(np.square(x - rebuilt, dtype=np.float64)))
        spread += float(np.sum(np.square(x - mean, dtype=np.float64)))
        fired |= (code > 0).any(axis=0)
    return errors / spread, 1 - fired.mean()


if __name__ == "__main__":
    main()
