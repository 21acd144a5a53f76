"""Losses beside cross-entropy: SASFT's ceiling on another language's features, and a penalty on its tokens.

Each is a pytree that gives, for a (micro-)batch, a sum, and for the whole optimiser step the count to divide it by. They hold arrays and no model;
nothing of a sparse autoencoder is trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qscope_jax.sae.encoder_rows import EncoderRows
from qscope_jax.training.losses import predicted_mask

FORMS = ("paper", "code")
AIMS = ("reduce", "raise")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Rows of conversations on the devices.

    Attributes:
        tokens_BT: Token ids.
        segment_ids: Conversation of each token, 0 for padding.
        trained_BT: Tokens of answers.
        languages_BT: Index of the language of the conversation, -1 where there is none.
    """

    tokens_BT: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]
    trained_BT: Bool[Array, "B T"]
    languages_BT: Int[Array, "B T"]


@runtime_checkable
class Auxiliary(Protocol):
    """A loss that is added to the cross-entropy, `weight * total / count`."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers whose residual streams it reads."""
        ...

    @property
    def unwanted(self) -> Bool[Array, " V"] | None:
        """Tokens whose probability it reads."""
        ...

    @property
    def weight(self) -> float:
        """Lambda."""
        ...

    def count(self, batch: Batch) -> Float[Array, ""]:
        """What the sum over the whole optimiser step is divided by, unless it is 0."""
        ...

    def total(self, residuals: Sequence[Float[Array, "B T D"]], penalty_BT: Float[Array, "B T"], batch: Batch) -> Float[Array, ""]:
        """The sum over a (micro-)batch.

        Args:
            residuals: Streams after its layers.
            penalty_BT: `-log(1 - p)` of the unwanted tokens at each predicting position.
            batch: The (micro-)batch.
        """
        ...


@partial(jax.tree_util.register_dataclass, data_fields=("rows", "alpha_MKS", "target"), meta_fields=("layers", "weight", "form", "aim"))
@dataclass(frozen=True)
class FeatureCeiling:
    """SASFT's loss (arXiv 2507.14894; Qwen-Scope report, Eq. 26 and 27): features S of language L stay at their usual level in other languages.

        f = W_enc x + b_enc of the features, before any activation function: most of the rise before a switch lies below it
        paper: sum over layers, answer tokens not in L, and features of relu(f - alpha[language]), divided by those tokens
        code:  what the authors' code computes: per micro-batch and layer, the same sum / (answer tokens in any language * |S| + 1)

    Answer tokens are those at whose own position the state is read (the authors' mask, which is not shifted). `aim="raise"` is their ablation:
    relu(alpha[L] - f) on answers in L. The gradient reaches the streams alone.

    Attributes:
        rows: Encoder rows of the features of each layer.
        alpha_MKS: Mean pre-activation of each feature on each language, before training.
        target: Index of L among the languages.
        layers: The layers; each counts in full.
        weight: Lambda. In the code's form it counts for every micro-batch anew, as it does there.
        form: `paper` or `code`.
        aim: `reduce` or `raise`.
    """

    rows: tuple[EncoderRows, ...]
    alpha_MKS: Float[Array, "M K S"]
    target: Int[Array, ""]
    layers: tuple[int, ...]
    weight: float
    form: str = "paper"
    aim: str = "reduce"

    @property
    def unwanted(self) -> None:
        """It reads no probabilities."""
        return None

    def counted(self, batch: Batch) -> Bool[Array, "B T"]:
        """Answer tokens whose features count."""
        in_target = batch.languages_BT == self.target
        wanted = in_target if self.aim == "raise" else ~in_target
        return batch.trained_BT & (batch.segment_ids > 0) & wanted

    def count(self, batch: Batch) -> Float[Array, ""]:
        """Answer tokens of the optimiser step that count; 1 in the code's form, which divides by itself."""
        return jnp.ones((), jnp.float32) if self.form == "code" else jnp.sum(self.counted(batch), dtype=jnp.float32)

    def total(self, residuals: Sequence[Float[Array, "B T D"]], penalty_BT: Float[Array, "B T"], batch: Batch) -> Float[Array, ""]:
        """The sum over layers, tokens and features."""
        counted_N = self.counted(batch).reshape(-1, 1)
        languages_N = jnp.maximum(batch.languages_BT, 0).reshape(-1)
        total = jnp.zeros((), jnp.float32)
        for x_BTD, rows, alpha_KS in zip(residuals, self.rows, self.alpha_MKS, strict=True):
            f_NS = jax.lax.stop_gradient(rows)(x_BTD.reshape(-1, x_BTD.shape[-1]))
            excess_NS = f_NS - jax.lax.stop_gradient(alpha_KS)[languages_N]
            excess_NS = -excess_NS if self.aim == "raise" else excess_NS
            total += jnp.sum(jnp.where(counted_N, jax.nn.relu(excess_NS), jnp.float32(0)))
        if self.form == "code":
            labels = jnp.sum(batch.trained_BT & (batch.segment_ids > 0), dtype=jnp.float32)
            total /= labels * self.alpha_MKS.shape[-1] + 1
        return total


@partial(jax.tree_util.register_dataclass, data_fields=("unwanted", "target"), meta_fields=("weight",))
@dataclass(frozen=True)
class ScriptPenalty:
    """The penalty baseline: mean of -log(1 - p_L) over the predicted answer tokens of conversations that are not in L.

    p_L is the probability of all tokens with a character of L's script. SASFT names such a baseline without its formula; this one is ours.

    Attributes:
        unwanted: Those tokens.
        target: Index of L among the languages.
        weight: Lambda.
    """

    unwanted: Bool[Array, " V"]
    target: Int[Array, ""]
    weight: float

    @property
    def layers(self) -> tuple[int, ...]:
        """It reads no streams."""
        return ()

    def counted(self, batch: Batch) -> Bool[Array, "B T"]:
        """Predicting positions that count."""
        return predicted_mask(batch.trained_BT, batch.segment_ids) & (batch.languages_BT != self.target)

    def count(self, batch: Batch) -> Float[Array, ""]:
        """Such positions of the optimiser step."""
        return jnp.sum(self.counted(batch), dtype=jnp.float32)

    def total(self, residuals: Sequence[Float[Array, "B T D"]], penalty_BT: Float[Array, "B T"], batch: Batch) -> Float[Array, ""]:
        """The sum over positions."""
        return jnp.sum(jnp.where(self.counted(batch), penalty_BT, jnp.float32(0)))
