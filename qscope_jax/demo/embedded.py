"""The embedded model and its SAEs: what `tiny` means wherever a model or SAE is asked for."""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from qscope_jax.data.batches import BatchConfig
from qscope_jax.demo.corpus import documents
from qscope_jax.errors import SourceError
from qscope_jax.models.language_model import LanguageModel, load_model
from qscope_jax.sae.formats.own_format import write_folder
from qscope_jax.sae.layer_sae import LayerSAE
from qscope_jax.training.activations import ActivationConfig, ActivationStream
from qscope_jax.training.loop import LoopConfig, train
from qscope_jax.training.sae import SAETraining
from qscope_jax.training.sae_config import SAEConfig
from qscope_jax.training.tokens import TokenStream

TINY = Path(__file__).parent / "tiny"
END_TOKEN = 0


@dataclass(frozen=True)
class TinySAESettings:
    """Size and training of the embedded model's SAEs."""

    num_features: int = 768
    """F, six times the model's width."""
    k: int = 56
    """Active features a token."""
    steps: int = 400
    """Optimiser steps."""
    batch_tokens: int = 1024
    """Tokens a step."""
    learning_rate: float = 6e-3
    """Peak rate; the released SAEs' rule is for runs a thousand times longer."""
    dead_after_tokens: int = 40_960
    """A feature is dead when it has not fired for so many tokens: 40 batches."""


def tiny_model(dtype: str = "float32") -> LanguageModel:
    """The embedded model."""
    return load_model(TINY, dtype=dtype)


def sae_training(model: LanguageModel, texts: Sequence[str], settings: TinySAESettings, held_out: Sequence[str] = ()) -> SAETraining:
    """The recipe that trains SAEs for every layer of a small model on texts."""
    activations = ActivationConfig(tuple(range(model.config.num_layers)), batch_tokens=settings.batch_tokens)

    def stream() -> ActivationStream:
        tokens = TokenStream(texts, lambda text: [*model.tokenize([text])[0], END_TOKEN], BatchConfig(16, 128))
        return ActivationStream(model.decoder, tokens, activations, model.mesh)

    config = SAEConfig(
        num_features=settings.num_features,
        k=settings.k,
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        dead_after_tokens=settings.dead_after_tokens,
    )
    return SAETraining(model, activations.layers, stream, config, held_out)


def tiny_saes(say: Callable[[str], None] = lambda text: None) -> Path:
    """Folder with the SAEs of the embedded model; they are trained once, in about two minutes, and kept in the user's cache.

    Args:
        say: Called with a sentence before the training begins.
    """
    settings = TinySAESettings()
    key = hashlib.sha256((TINY / "model.safetensors").read_bytes() + repr(asdict(settings)).encode()).hexdigest()[:12]
    folder = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "qscope_jax" / f"tiny-saes-{key}"
    if not (folder / "sae.json").is_file():
        say(f"Training the SAEs of the embedded model once; they are kept in {folder}.")
        recipe = sae_training(tiny_model(), documents(4000, seed=1), settings)
        save_saes(folder, recipe.export(train(recipe, LoopConfig(steps=settings.steps))))
    return folder


def save_saes(folder: Path, saes: Sequence[LayerSAE]) -> None:
    """Write SAEs in the project's own format.

    Raises:
        SourceError: the folder cannot be written.
    """
    if folder.is_file():
        raise SourceError(f"{folder}: is a file, expected a folder to write SAEs to")
    write_folder(folder, {sae.layer: sae.to_arrays() for sae in saes})
