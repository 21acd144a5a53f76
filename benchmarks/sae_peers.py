"""One training step of other libraries' top-k SAEs, as each of them does it, behind one signature.

    pip install -e '.[peers]'

A side is made with `(width, features, k, rate, optimizer)` and holds `step(x)` and `codes(x) -> (reconstruction, activations)`. Steps are
whole: forward, backward, the library's own constraint on the decoder, clipping where its trainer clips, optimiser. AuxK is as each has it by
default, with the same count of tokens after which a feature is dead.
"""

# pyright: reportMissingImports=false

from typing import Any

import numpy as np

DEAD_AFTER = 10_000_000


class Sparsify:
    """EleutherAI sparsify's SparseCoder; AuxK weighs 0 by default there, so `aux` gives it 1/32.

    `optimizer` is "signum", its trainer's default (sign-SGD inside `schedulefree.ScheduleFreeWrapper`, momentum 0.95),
    "sign_sgd", the same without the wrapper and so without moments, or "adam".
    """

    def __init__(self, width: int, features: int, k: int, rate: float, optimizer: str, *, aux: bool = False, dead_after: int = DEAD_AFTER):
        import torch
        from sparsify import SparseCoder, SparseCoderConfig

        self.coder = SparseCoder(width, SparseCoderConfig(num_latents=features, k=k))
        self.aux, self.dead_after, self.started = aux, dead_after, False
        self.since = torch.zeros(features, dtype=torch.long)
        self.optimizer = _optimizer(self.coder.parameters(), rate, optimizer)

    def step(self, x: Any) -> None:
        import torch

        if not self.started:  # as its trainer does with the first batch
            self.coder.b_dec.data = x.mean(0).to(self.coder.b_dec.dtype)
            self.started = True
        dead = self.since > self.dead_after if self.aux else None
        out = self.coder(x, dead_mask=dead)
        (out.fvu + out.auxk_loss / 32).backward()
        if self.aux:
            fired = torch.zeros_like(self.since, dtype=torch.bool)
            fired[out.latent_indices.flatten()] = True
            self.since += x.shape[0]
            self.since[fired] = 0
        self.coder.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.coder.set_decoder_norm_to_unit_norm()

    def codes(self, x: Any) -> tuple[np.ndarray, np.ndarray]:
        import torch

        with torch.no_grad():
            found = self.coder.encode(x)
            rebuilt = self.coder.decode(found.top_acts, found.top_indices).numpy()
        return rebuilt, _dense(found.top_acts.numpy(), found.top_indices.numpy(), self.coder.num_latents)


class DictionaryLearning:
    """dictionary_learning's TopKTrainer, which is a step."""

    def __init__(self, width: int, features: int, k: int, rate: float, optimizer: str, *, dead_after: int = DEAD_AFTER, steps: int = 10_000_000):
        from dictionary_learning.trainers.top_k import TopKTrainer

        if optimizer != "adam":
            raise ValueError("dictionary_learning has Adam alone")
        self.trainer = TopKTrainer(steps, width, features, k, 0, "none", lr=rate, warmup_steps=max(min(1000, steps // 10), 1), seed=0, device="cpu",
                                   decay_start=int(0.8 * steps))  # fmt: skip
        self.trainer.dead_feature_threshold = dead_after
        self.steps = 0

    def step(self, x: Any) -> None:
        self.trainer.update(self.steps, x)
        self.steps += 1

    def codes(self, x: Any) -> tuple[np.ndarray, np.ndarray]:
        import torch

        with torch.no_grad():
            code = self.trainer.ae.encode(x, use_threshold=False)
            return self.trainer.ae.decode(code).numpy(), code.numpy()


class SAELens:
    """SAELens's TopKTrainingSAE with Adam and the clipping of its trainer."""

    def __init__(self, width: int, features: int, k: int, rate: float, optimizer: str):
        from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig

        self.sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=width, d_sae=features, k=k, aux_loss_coefficient=1 / 32, device="cpu"))
        self.optimizer = _optimizer(self.sae.parameters(), rate, optimizer)
        self.steps = 0

    def step(self, x: Any) -> None:
        import torch
        from sae_lens.saes.sae import TrainStepInput

        given = TrainStepInput(x, {}, torch.zeros(self.sae.cfg.d_sae, dtype=torch.bool), self.steps, False)
        self.sae.training_forward_pass(given).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.sae.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1


PEERS = {"sparsify": Sparsify, "dictionary_learning": DictionaryLearning, "SAELens": SAELens}


def _optimizer(parameters: Any, rate: float, name: str) -> Any:
    import torch

    if name == "adam":
        return torch.optim.Adam(parameters, lr=rate)
    from sparsify.sign_sgd import SignSGD

    if name == "sign_sgd":
        return SignSGD(parameters, lr=rate)
    from schedulefree import ScheduleFreeWrapper

    wrapped = ScheduleFreeWrapper(SignSGD(parameters, lr=rate), momentum=0.95)
    wrapped.train()
    return wrapped


def _dense(values: np.ndarray, indices: np.ndarray, features: int) -> np.ndarray:
    code = np.zeros((len(values), features), np.float32)
    np.put_along_axis(code, indices, values, axis=1)
    return code
