"""Qwen models and their sparse autoencoders in JAX: read features, steer with them, train them.

Names are imported when they are first used, so that `import qscope_jax` costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "qscope_jax.errors": ("QscopeError",),
    "qscope_jax.parallel.mesh": ("make_mesh",),
    "qscope_jax.data.chat_data": ("load_conversations",),
    "qscope_jax.data.chat_templates": ("ChatFormat",),
    "qscope_jax.data.chat_tokens": ("chat_rows",),
    "qscope_jax.data.tables": ("load_table",),
    "qscope_jax.data.text_stream": ("TextStream",),
    "qscope_jax.data.texts": ("load_texts",),
    "qscope_jax.models.config": ("ModelConfig",),
    "qscope_jax.models.decoder": ("Decoder", "DecoderOutput"),
    "qscope_jax.models.language_model": ("Completion", "LanguageModel", "load_model"),
    "qscope_jax.models.rollouts": ("Rollout", "RolloutSampler"),
    "qscope_jax.models.sampling": ("SamplingConfig",),
    "qscope_jax.sae.autoencoder": ("SparseAutoencoder", "SparseCode"),
    "qscope_jax.sae.layer_sae": ("LayerSAE", "SAECollection", "load_sae"),
    "qscope_jax.sae.metrics": ("evaluate_sae",),
    "qscope_jax.features.readout": ("Readout", "read_features", "token_texts"),
    "qscope_jax.features.compare": ("compare",),
    "qscope_jax.features.languages": ("monolinguality",),
    "qscope_jax.features.steering": (
        "ablate",
        "add_directions",
        "clamp",
        "combine",
        "dose_sweep",
        "project_out",
        "random_control",
        "random_features",
        "residual_norms",
        "sign_flipped",
        "steer",
    ),
    "qscope_jax.features.text_features": ("TextFeatures", "text_features"),
    "qscope_jax.features.store.feature_store": ("FeatureStore", "read_store"),
    "qscope_jax.features.store.store_writer": ("StoreConfig", "write_store"),
    "qscope_jax.features.explain.explanation": ("explain_features",),
    "qscope_jax.features.classify.fit_classifier": ("fit_classifier",),
    "qscope_jax.features.classify.feature_classifier": ("FeatureClassifier", "load_classifier"),
    "qscope_jax.features.benchmarks.benchmark_comparison": ("compare_benchmarks",),
    "qscope_jax.features.repetition.endless_repetition": ("endless_repetition",),
    "qscope_jax.features.repetition.repetition_features": ("find_repetition_features",),
    "qscope_jax.features.switching.find_language_features": ("find_language_features",),
    "qscope_jax.features.switching.language_features": ("LanguageFeatures",),
    "qscope_jax.features.synthesis.coverage": ("coverage",),
    "qscope_jax.features.synthesis.synthesis": ("synthesize",),
    "qscope_jax.features.generation.endpoint": ("EndpointGenerator",),
    "qscope_jax.features.generation.local_generator": ("LocalGenerator",),
    "qscope_jax.training.activations": ("ActivationConfig",),
    "qscope_jax.training.dapo.dapo": ("DAPO", "PromptTask"),
    "qscope_jax.training.dapo.dapo_config": ("DAPOConfig",),
    "qscope_jax.training.dapo.rewards": ("load_rewards",),
    "qscope_jax.training.lora": ("attach", "init_adapters", "load_adapters", "merge", "save_adapters"),
    "qscope_jax.training.loop": ("LoopConfig", "train"),
    "qscope_jax.training.sae": ("SAETraining",),
    "qscope_jax.training.sae_config": ("SAEConfig",),
    "qscope_jax.training.sasft": ("SASFTConfig", "feature_ceiling", "script_penalty"),
    "qscope_jax.training.sft": ("SFT", "SFTConfig"),
    "qscope_jax.training.tokens": ("TokenStream",),
    "qscope_jax.demo.embedded": ("tiny_model", "tiny_saes"),
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted(_MODULE_OF)

if TYPE_CHECKING:
    from qscope_jax.data.chat_data import load_conversations
    from qscope_jax.data.chat_templates import ChatFormat
    from qscope_jax.data.chat_tokens import chat_rows
    from qscope_jax.data.tables import load_table
    from qscope_jax.data.text_stream import TextStream
    from qscope_jax.data.texts import load_texts
    from qscope_jax.demo.embedded import tiny_model, tiny_saes
    from qscope_jax.errors import QscopeError
    from qscope_jax.features.benchmarks.benchmark_comparison import compare_benchmarks
    from qscope_jax.features.classify.feature_classifier import FeatureClassifier, load_classifier
    from qscope_jax.features.classify.fit_classifier import fit_classifier
    from qscope_jax.features.compare import compare
    from qscope_jax.features.explain.explanation import explain_features
    from qscope_jax.features.generation.endpoint import EndpointGenerator
    from qscope_jax.features.generation.local_generator import LocalGenerator
    from qscope_jax.features.languages import monolinguality
    from qscope_jax.features.readout import Readout, read_features, token_texts
    from qscope_jax.features.repetition.endless_repetition import endless_repetition
    from qscope_jax.features.repetition.repetition_features import find_repetition_features
    from qscope_jax.features.steering import (
        ablate,
        add_directions,
        clamp,
        combine,
        dose_sweep,
        project_out,
        random_control,
        random_features,
        residual_norms,
        sign_flipped,
        steer,
    )
    from qscope_jax.features.store.feature_store import FeatureStore, read_store
    from qscope_jax.features.store.store_writer import StoreConfig, write_store
    from qscope_jax.features.switching.find_language_features import find_language_features
    from qscope_jax.features.switching.language_features import LanguageFeatures
    from qscope_jax.features.synthesis.coverage import coverage
    from qscope_jax.features.synthesis.synthesis import synthesize
    from qscope_jax.features.text_features import TextFeatures, text_features
    from qscope_jax.models.config import ModelConfig
    from qscope_jax.models.decoder import Decoder, DecoderOutput
    from qscope_jax.models.language_model import Completion, LanguageModel, load_model
    from qscope_jax.models.rollouts import Rollout, RolloutSampler
    from qscope_jax.models.sampling import SamplingConfig
    from qscope_jax.parallel.mesh import make_mesh
    from qscope_jax.sae.autoencoder import SparseAutoencoder, SparseCode
    from qscope_jax.sae.layer_sae import LayerSAE, SAECollection, load_sae
    from qscope_jax.sae.metrics import evaluate_sae
    from qscope_jax.training.activations import ActivationConfig
    from qscope_jax.training.dapo.dapo import DAPO, PromptTask
    from qscope_jax.training.dapo.dapo_config import DAPOConfig
    from qscope_jax.training.dapo.rewards import load_rewards
    from qscope_jax.training.loop import LoopConfig, train
    from qscope_jax.training.lora import attach, init_adapters, load_adapters, merge, save_adapters
    from qscope_jax.training.sae import SAETraining
    from qscope_jax.training.sae_config import SAEConfig
    from qscope_jax.training.sasft import SASFTConfig, feature_ceiling, script_penalty
    from qscope_jax.training.sft import SFT, SFTConfig
    from qscope_jax.training.tokens import TokenStream


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'qscope_jax' has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
