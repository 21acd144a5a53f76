"""A base model as a writer: it continues texts while the target's direction is added to its residual stream."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qscope_jax.errors import InputError
from qscope_jax.features.generation.generators import Reply
from qscope_jax.features.generation.local_generator import BATCH_SIZE, continue_prompts, stable_seed
from qscope_jax.features.synthesis.writers import Request
from qscope_jax.models.edits import AddDirections, where
from qscope_jax.models.language_model import Completion, LanguageModel
from qscope_jax.models.sampling import SamplingConfig
from qscope_jax.sae.layer_sae import LayerSAE

DOSES = (1.0, 0.5, 0.25, 1.5)
"""Strengths tried in turn, as multiples of the layer's median residual norm."""


@dataclass(frozen=True, eq=False)
class SteeredWriter:
    """Continues texts, each row of a batch steered by the direction of its own target; a batch of any targets compiles once.

    A target's attempts take the doses in turn. Where contexts of a target are known, each attempt continues one of them and keeps what was
    added, so that nothing of the context is copied; otherwise it continues a neutral prompt, drawn at random, and keeps both.

    Attributes:
        model: The model.
        saes: SAE of each layer that has targets.
        norms: Median norm of the residual stream after each of these layers, see `residual_norms`.
        prompts: Neutral prompts.
        contexts: Texts that fire a target, strongest first, by its key.
        doses: Strengths in units of those norms.
        max_tokens: Tokens that are added to a prompt.
        temperature: Of the draws.
        top_p: Of the draws.
        separator: What stands between a context and what continues it.
        batch_size: Texts written at a time.
        whole_batches: Whether fewer are filled up to as many, so that no other number of rows is compiled: for a small model, whose rows cost
            less than a compilation.
        steered: Whether anything is added; without, it is the control.
    """

    model: LanguageModel
    saes: Mapping[int, LayerSAE]
    norms: Mapping[int, float]
    prompts: Sequence[str]
    contexts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    doses: Sequence[float] = DOSES
    max_tokens: int = 32
    temperature: float = 1.0
    top_p: float = 1.0
    separator: str = " "
    batch_size: int = BATCH_SIZE
    whole_batches: bool = False
    steered: bool = True

    def __post_init__(self):
        """Check prompts, doses and norms."""
        if not self.prompts or not all(prompt.strip() for prompt in self.prompts):
            raise InputError("a steered writer needs neutral prompts to continue, none of them blank")
        if not self.doses or not all(0 < dose < np.inf for dose in self.doses):
            raise InputError(f"doses are {list(self.doses)}, expected positive numbers, one at least")
        if missing := sorted(set(self.saes) - set(self.norms)):
            raise InputError(f"no residual norm for layer {missing[0]}; measure it with residual_norms(model, texts, layers)")
        if self.batch_size < 1:
            raise InputError(f"batch_size is {self.batch_size}, expected 1 or more")

    @property
    def name(self) -> str:
        """The model, and whether it is steered."""
        return f"{self.model.name}, {'steered' if self.steered else 'untargeted'}"

    def untargeted(self) -> "SteeredWriter":
        """The same model, prompts and draws with nothing added."""
        return replace(self, steered=False)

    def dose(self, request: Request) -> float:
        """The dose that an attempt takes."""
        return self.doses[request.attempt % len(self.doses)] if self.steered else 0.0

    def __call__(self, requests: Sequence[Request], *, seed: int = 0) -> list[Reply]:
        """A text for each request.

        Raises:
            InputError: a target whose layer has no SAE here, or whose feature the SAE lacks.
        """
        for request in requests:
            if request.target.layer not in self.saes:
                raise InputError(f"target {request.target.key}: no SAE of layer {request.target.layer} is loaded")
            self.saes[request.target.layer].check_feature(request.target.feature)
        seeds = [stable_seed(request.target.key, request.attempt) for request in requests]
        prompts = [self._prompt(request, number, seed) for request, number in zip(requests, seeds, strict=True)]
        config = SamplingConfig(self.max_tokens, self.temperature, top_p=self.top_p, seed=seed)
        made = continue_prompts(
            self.model,
            prompts,
            config,
            row_seeds=seeds,
            edits=lambda rows: [self._edit([requests[row] for row in rows])] if self.steered else [],
            batch_size=self.batch_size,
            whole_batches=self.whole_batches,
        )
        return [self._reply(request, answer) for request, answer in zip(requests, made, strict=True)]

    def _contexts(self, request: Request) -> Sequence[str]:
        return self.contexts.get(request.target.key, ()) if self.steered else ()

    def _prompt(self, request: Request, number: int, seed: int) -> str:
        if contexts := self._contexts(request):
            return contexts[request.attempt % len(contexts)].rstrip() + self.separator
        # By the attempt and the seed alone, so that the control continues the same prompts.
        return self.prompts[stable_seed("prompt", number, seed) % len(self.prompts)]

    def _reply(self, request: Request, answer: Completion) -> Reply:
        ids = answer.token_ids[:-1] if answer.stopped else answer.token_ids
        added = self.model.tokenizer.decode(list(ids), skip_special_tokens=True)
        text = added if self._contexts(request) else answer.prompt + added
        # A cut inside a character leaves the replacement sign at the end. Nothing at all is an answer too: asking again would give the same.
        return Reply(text.rstrip("\ufffd").strip())

    def _edit(self, requests: Sequence[Request]) -> AddDirections:
        """An addition with a direction for each row, whose strengths are zero for all other rows."""
        layers = [request.target.layer for request in requests]
        features = jnp.asarray([request.target.feature for request in requests], jnp.int32)
        directions = np.zeros((len(requests), self.model.config.d_model), np.float32)
        for layer in sorted(set(layers)):
            here = np.asarray(layers) == layer
            sae = self.saes[layer]
            directions[here] = np.asarray(_rows(sae.autoencoder.W_dec[...], jnp.minimum(features, sae.num_features - 1)))[here]
        lengths = np.maximum(np.linalg.norm(directions, axis=1), 1e-12)
        doses = np.asarray([self.dose(request) * self.norms[request.target.layer] for request in requests], np.float32)
        return AddDirections(
            layers_W=jnp.asarray(layers, jnp.int32),
            directions_WD=jnp.asarray(directions),
            strengths_BW=jnp.asarray(np.diag(doses / lengths), jnp.float32),
            where_W=jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(requests), *leaf.shape)), where("all", "both")),
        )


@jax.jit
def _rows(W_FD: Float[Array, "F D"], features: Array) -> Float[Array, "W D"]:
    """Directions of features, gathered on the device that has them."""
    return W_FD[features].astype(jnp.float32)
