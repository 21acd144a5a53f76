"""`qscope train-sae`: train SAEs on a model's residual streams."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qscope_jax.cli.options import Integers, check_at_least, same_named
from qscope_jax.cli.sources import cut_texts, open_model
from qscope_jax.cli.training_data import TrainingTextOptions, say_skipped, split_documents, tokenize_documents
from qscope_jax.cli.training_run import RunOptions, check_run, run_to_end
from qscope_jax.errors import ConfigError, SourceError

if TYPE_CHECKING:
    from qscope_jax.cli.training_data import TrainingTexts
    from qscope_jax.models.language_model import LanguageModel
    from qscope_jax.training.sae import ActivationSource, SAETraining
    from qscope_jax.training.sae_config import SAEConfig

_HELD_OUT = 256
_METRICS = {"fvu": "FVU", "fvu_all": "FVU, all tokens", "l0": "L0", "cossim": "cosine", "dead_fraction": "dead"}


@dataclass(frozen=True, kw_only=True)
class Config(RunOptions, TrainingTextOptions):
    """Train SAEs for one or several layers at once, on activations made on the fly or kept on disk."""

    activations: str = ""
    """Folder that `qscope cache-activations` wrote, to train on instead of running the model on `data` (which then gives held-out texts alone)."""
    layers: Integers | None = None
    """Layers: all, 3 or 2,4-5; by default all (that the cache has)."""
    num_features: int | None = None
    """Features of each SAE, by default 16 times the model's width."""
    k: int = 50
    """Active features a token: exactly, on average (batch_topk), or the aim (jumprelu)."""
    activation: Literal["topk", "batch_topk", "jumprelu"] = "topk"
    """Which features are active: a token's k largest, the batch's k a token, or those above thresholds that are learnt."""
    max_active: int | None = None
    """Most active features of one token with batch_topk and jumprelu, by default 4 k."""
    multi_topk_weight: float = 0.0
    """Weight of the loss of a reconstruction from the 4 k largest, beside topk; 0 leaves it out, Gao et al. use 0.125."""
    num_seeds: int = 1
    """SAEs of each layer, with seeds that follow each other."""
    steps: int = 1000
    """Optimiser steps."""
    batch_tokens: int = 2048
    """Tokens of a step."""
    buffer_batches: int = 16
    """Steps' worth of tokens that are mixed at a time."""
    sequence_length: int = 256
    """Tokens of a row of the model's batch; documents share rows and are cut into pieces of this length."""
    model_batch: int = 16
    """Rows of the model's batch."""
    lanes: int = 1
    """Independent streams of documents and parts of the buffer, on a mesh a multiple of its data axis."""
    micro_batches: int = 1
    """Parts in which a step's tokens are worked through, so that temporary arrays are smaller; changes no gradient."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the SAEs' products; their parameters are float32."""
    learning_rate: float | None = None
    """Peak rate of Adam, by default 2e-4 / sqrt(features / 16384)."""
    warmup_steps: int = 1000
    """Steps of linear warm-up, at most a tenth of the run."""
    decay_share: float = 0.2
    """Share of the run, at its end, over which the rate falls to 0."""
    clip: float = 1.0
    """Largest gradient norm of each SAE."""
    ema: float = 0.0
    """Decay of an average of the parameters, which then are the SAEs; 0 keeps none."""
    sparsity_weight: float = 1.0
    """Weight of jumprelu's penalty (L0 / k - 1)^2."""
    bandwidth: float = 1e-3
    """Window in which jumprelu's thresholds learn, in units of inputs of unit mean squared norm."""
    aux_weight: float = 1 / 32
    """Weight of the loss that revives dead features."""
    aux_k: int | None = None
    """Dead features that this loss may use a token, by default half the model's width."""
    dead_after_tokens: int = 10_000_000
    """A feature is dead when it has not fired for so many tokens."""
    keep_first: bool = False
    """Train on the first token of documents too."""
    max_norm_multiple: float = 10.0
    """Leave tokens out whose residual norm exceeds this multiple of the median; 0 keeps all."""
    seed: int = 0
    """Seed of the initial directions, the order of documents and the mixing."""


def run(config: Config) -> dict[str, Any]:
    """Train; returns the last held-out metrics of each layer and where the SAEs are."""
    from qscope_jax.parallel.processes import from_first, is_first, join_processes

    if config.distributed:
        join_processes()
    out = from_first(lambda: _check(config))
    model = open_model(config.model, config.dtype, config.mesh)
    texts, held_out = split_documents(config)
    recipe = _recipe(model, texts, held_out[:_HELD_OUT], config)
    end = run_to_end("train-sae", recipe, config, config.steps)
    if end is None:
        return {"finished": False, "layers": {}}
    recipe.save(end.state, out / "saes")
    result = {
        "finished": True,
        "step": end.step,
        "saes": str(out / "saes"),
        "layers": {layer: {name: end.held_out[name][i] for name in _METRICS} for i, layer in enumerate(recipe.layers) if end.held_out},
    }
    if is_first():
        from qscope_jax.report.run_page import write_run_page

        result["page"] = str(write_run_page(out))
        _show(result, out)
        say_skipped(texts)
    return result


def sae_config(config: Config, d_model: int) -> "SAEConfig":
    """Size and training of the SAEs, for streams `d_model` wide: the options of the same names."""
    from qscope_jax.training.sae_config import SAEConfig

    given = same_named(SAEConfig, config)
    return SAEConfig(**{**given, "num_features": 16 * d_model if config.num_features is None else config.num_features})


def _check(config: Config) -> Path:
    """The run's folder; what can be wrong is found before anything is loaded."""
    if config.keep_best and not config.keeps_some:
        option = "held_out_documents" if config.stream else "holdout_share"
        raise ConfigError(f"keep_best is {config.keep_best}, but {option} 0 keeps no documents to choose by")
    check_at_least(config, 1, "model_batch", "limit", "num_features")
    check_at_least(config, 2, "sequence_length")
    return check_run(config)


def _recipe(model: "LanguageModel", texts: "TrainingTexts", held_out: Sequence[str], config: Config) -> "SAETraining":
    from qscope_jax.training.sae import SAETraining

    held_out = cut_texts(model, [text for text in held_out if text.strip()], config.sequence_length)
    size = sae_config(config, model.config.d_model)
    layers, activations = _cached(model, config) if config.activations else _on_the_fly(model, texts, config)
    return SAETraining(model, layers, activations, size, held_out)


def _on_the_fly(model: "LanguageModel", texts: "TrainingTexts", config: Config) -> tuple[tuple[int, ...], Callable[[], "ActivationSource"]]:
    from qscope_jax.data.batches import BatchConfig
    from qscope_jax.training.activations import ActivationConfig, ActivationStream
    from qscope_jax.training.tokens import TokenStream

    layers = tuple(range(model.config.num_layers)) if config.layers is None else config.layers
    settings = ActivationConfig(**{**same_named(ActivationConfig, config), "layers": layers, "drop_first": not config.keep_first})

    def activations() -> ActivationStream:
        rows = BatchConfig(config.model_batch, config.sequence_length, seed=config.seed)
        tokens = TokenStream(texts, tokenize_documents(model), rows, lanes=config.lanes, mesh=model.mesh)
        return ActivationStream(model.decoder, tokens, settings, model.mesh)

    return layers, activations


def _cached(model: "LanguageModel", config: Config) -> tuple[tuple[int, ...], Callable[[], "ActivationSource"]]:
    from qscope_jax.training.cached_activations import CachedActivations

    def activations() -> CachedActivations:
        return CachedActivations(
            Path(config.activations).expanduser(), config.layers, config.batch_tokens, seed=config.seed, buffer_batches=config.buffer_batches,
            mesh=model.mesh, d_model=model.config.d_model,
        )  # fmt: skip

    first = activations()
    if first.cache.model != model.name:
        raise SourceError(f"{config.activations}: holds streams of {first.cache.model}, but the model is {model.name}; pass its --model")
    return first.layers, activations


def _show(result: dict[str, Any], out: Path) -> None:
    from qscope_jax.report.terminal import print_table

    if result["layers"]:
        rows = [(str(layer), *found.values()) for layer, found in result["layers"].items()]
        print_table(("layer", *_METRICS.values()), rows, title="held-out documents")
    print(f"SAEs: {out / 'saes'}   metrics: {out / 'metrics.jsonl'}   curves: {result['page']}")
