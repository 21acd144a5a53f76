"""Settings of SAE training: size, variant, losses, optimiser."""

import math
from dataclasses import dataclass

import optax

from qscope_jax.errors import ConfigError


@dataclass(frozen=True)
class SAEConfig:
    """Size and training of the SAEs; one set for all SAEs of a run.

    Defaults that the Qwen-Scope report leaves open are Gao et al.'s (2024, arXiv 2406.04093) and dictionary_learning's.
    """

    num_features: int
    """F; the release uses 16 or 64 times the model's width."""
    k: int
    """Active features a token: exactly so many (`topk`), on average over a batch (`batch_topk`), or the aim (`jumprelu`)."""
    steps: int
    """Optimiser steps; the schedule ends here."""
    activation: str = "topk"
    """`topk`: a token's k largest features are active; `batch_topk`: the batch's k * N largest; `jumprelu`: those above thresholds."""
    max_active: int | None = None
    """Most features that one token may have with `batch_topk` and `jumprelu`; default 4 k. The metric `cut` tells how many tokens reach it."""
    multi_topk_weight: float = 0.0
    """Weight of the loss of the reconstruction from the 4 k largest (Gao et al. use 1/8); 0 leaves it out."""
    learning_rate: float | None = None
    """Peak rate of Adam; default 2e-4 / sqrt(F / 2^14)."""
    warmup_steps: int = 1000
    """Steps of linear warm-up, at most a tenth of the run."""
    decay_share: float = 0.2
    """Share of the run, at its end, over which the rate falls linearly to 0."""
    aux_weight: float = 1 / 32
    """Weight of AuxK."""
    aux_k: int | None = None
    """Dead features that AuxK may use a token; default half the model's width."""
    dead_after_tokens: int = 10_000_000
    """A feature is dead when it has not fired for so many tokens."""
    clip: float = 1.0
    """Largest gradient norm, after the decoder's projection; each SAE by itself."""
    ema: float = 0.0
    """Decay of an average of the parameters, which is then what is exported (OpenAI use 0.999); 0 keeps none."""
    threshold_decay: float = 0.999
    """Decay of the average of the least active value, which becomes `batch_topk`'s threshold at inference."""
    threshold_init: float = 1e-3
    """First thresholds of `jumprelu`, in units of inputs of unit mean squared norm."""
    bandwidth: float = 1e-3
    """Width of the window in which `jumprelu`'s thresholds have a gradient, in the same units."""
    sparsity_weight: float = 1.0
    """Weight of `jumprelu`'s penalty (L0 / k - 1)^2."""
    sparsity_warmup_steps: int = 2000
    """Steps over which that weight grows linearly, at most a tenth of the run."""
    compute_dtype: str = "float32"
    """Precision of the products, float32 or bfloat16; parameters, choice, losses and statistics are float32."""
    micro_batches: int = 1
    """Parts in which a batch is worked through, one after the other, so that temporary arrays are smaller; changes no gradient."""
    num_seeds: int = 1
    """SAEs of each layer, which differ in their first directions."""
    seed: int = 0
    """Of the first of them; the others follow."""

    def __post_init__(self):
        """Check ranges."""
        if not 1 <= self.k <= self.num_features:
            raise ConfigError(f"k is {self.k}, expected 1 to num_features = {self.num_features}")
        if self.steps < 1 or not 0 <= self.decay_share <= 1 or self.dead_after_tokens < 1:
            raise ConfigError("steps and dead_after_tokens must be positive, decay_share between 0 and 1")
        if self.aux_k is not None and self.aux_k < 1:
            raise ConfigError(f"aux_k is {self.aux_k}, expected at least 1; leave AuxK out with aux_weight: 0")
        for name, known in (("activation", ("topk", "batch_topk", "jumprelu")), ("compute_dtype", ("float32", "bfloat16"))):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected one of {', '.join(known)}")
        if self.max_active is not None and not self.k <= self.max_active <= self.num_features:
            raise ConfigError(f"max_active is {self.max_active}, expected k = {self.k} to num_features = {self.num_features}")
        if self.multi_topk_weight and self.activation != "topk":
            raise ConfigError(f"multi_topk_weight is {self.multi_topk_weight}, which goes with activation topk alone, not {self.activation}")
        if not (0 <= self.ema < 1 and 0 <= self.threshold_decay < 1):
            raise ConfigError(f"ema is {self.ema} and threshold_decay {self.threshold_decay}, expected 0 to below 1")
        if self.bandwidth <= 0 or self.threshold_init < 0:
            raise ConfigError(f"bandwidth is {self.bandwidth} and threshold_init {self.threshold_init}, expected positive and non-negative numbers")
        if self.micro_batches < 1 or self.num_seeds < 1:
            raise ConfigError(f"micro_batches is {self.micro_batches} and num_seeds {self.num_seeds}, expected at least 1 each")

    @property
    def slots(self) -> int:
        """Most active features of a token: the width of its sparse code."""
        if self.activation == "topk":
            return self.k
        return min(4 * self.k, self.num_features) if self.max_active is None else self.max_active

    def aux_slots(self, d_model: int) -> int:
        """Width of AuxK's code for streams `d_model` wide."""
        return min(max(d_model // 2, 1) if self.aux_k is None else self.aux_k, self.num_features)

    def schedule(self) -> optax.Schedule:
        """Warm-up, plateau, linear decay to 0."""
        peak = 2e-4 / math.sqrt(self.num_features / 2**14) if self.learning_rate is None else self.learning_rate
        warmup = self._warmup(self.warmup_steps)
        decay = max(int(self.steps * self.decay_share), 1)
        parts = [optax.linear_schedule(0.0, peak, warmup), optax.constant_schedule(peak), optax.linear_schedule(peak, 0.0, decay)]
        return optax.join_schedules(parts, [warmup, max(self.steps - decay, warmup)])

    def sparsity_schedule(self) -> optax.Schedule:
        """Weight of `jumprelu`'s penalty at a step."""
        return optax.linear_schedule(0.0, self.sparsity_weight, self._warmup(self.sparsity_warmup_steps))

    def _warmup(self, steps: int) -> int:
        return min(steps, max(self.steps // 10, 1))
