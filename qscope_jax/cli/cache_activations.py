"""`qscope cache-activations`: write residual streams to disk, for training on them."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qscope_jax.cli.options import Integers, check_at_least
from qscope_jax.cli.progress import token_progress
from qscope_jax.cli.results import check_writable
from qscope_jax.cli.sources import open_model
from qscope_jax.cli.training_data import TrainingTextOptions, say_skipped, split_documents, tokenize_documents

if TYPE_CHECKING:
    from qscope_jax.cli.training_data import TrainingTexts
    from qscope_jax.models.language_model import LanguageModel
    from qscope_jax.training.activation_files import ActivationCache
    from qscope_jax.training.tokens import TokenStream


@dataclass(frozen=True, kw_only=True)
class Config(TrainingTextOptions):
    """Run a model over documents once and keep its residual streams on disk. The same command resumes what was interrupted."""

    out: str
    """Folder of the cache; appears when it is complete."""
    layers: Integers | None = None
    """Layers: all, 3 or 2,4-5; by default all."""
    max_tokens: int | None = None
    """Stop after so many kept tokens; by default at the end of the documents, of a stream too."""
    shard_tokens: int = 131_072
    """Tokens of a shard; an interruption loses at most one."""
    disk_dtype: Literal["bfloat16", "float32", "float16", "model"] = "bfloat16"
    """Type of the streams on disk; `model` is the model's own."""
    sequence_length: int = 256
    """Tokens of a row of the model's batch; documents share rows and are cut into pieces of this length."""
    model_batch: int = 16
    """Rows of the model's batch."""
    keep_first: bool = False
    """Keep the first token of documents too."""
    max_norm_multiple: float = 10.0
    """Leave tokens out whose residual norm exceeds this multiple of the median; 0 keeps all."""
    seed: int = 0
    """Seed of the order of documents."""
    overwrite: bool = False
    """Replace a cache that is in the folder."""
    progress: bool = True
    """Show a progress bar with rate and time left."""


def run(config: Config) -> dict[str, Any]:
    """Cache; returns counts, bytes, rate and the statistics of each layer."""
    from qscope_jax.training.activation_cache import CacheConfig, cache_activations

    check_at_least(config, 1, "model_batch", "limit", "max_tokens", "shard_tokens")
    check_at_least(config, 2, "sequence_length")
    check_writable(config.out, folder=True)
    texts, _ = split_documents(config)
    model = open_model(config.model, config.dtype, config.mesh)
    settings = CacheConfig(
        tuple(range(model.config.num_layers)) if config.layers is None else config.layers, max_tokens=config.max_tokens,
        shard_tokens=config.shard_tokens, dtype=config.disk_dtype, max_norm_multiple=config.max_norm_multiple, drop_first=not config.keep_first,
    )  # fmt: skip
    tokens, began = _tokens(model, texts, config), []
    with token_progress("caching", config.max_tokens, config.progress) as advance:

        def report(kept: int) -> None:
            if not began:
                print(_announcement(settings.token_bytes(model), config.max_tokens, kept))
                began.append((time.monotonic(), kept))
            advance(kept)

        cache = cache_activations(model, tokens, settings, config.out, data=_described(config), overwrite=config.overwrite, report=report)
    (start, resumed) = began[0]
    say_skipped(texts)
    return _show(cache, resumed, time.monotonic() - start)


def _tokens(model: "LanguageModel", texts: "TrainingTexts", config: Config) -> "TokenStream":
    from qscope_jax.data.batches import BatchConfig
    from qscope_jax.training.tokens import TokenStream

    return TokenStream(texts, tokenize_documents(model), BatchConfig(config.model_batch, config.sequence_length, seed=config.seed, epochs=1))


def _described(config: Config) -> dict[str, Any]:
    """What the documents are, for telling whether an unfinished cache is of the same."""
    from qscope_jax.data.resumable import source_fingerprint

    names = ("data", "column", "split", *(("shuffle_buffer", "held_out_documents") if config.stream else ("limit", "holdout_share")))
    return {name: getattr(config, name) for name in names} | {"files": source_fingerprint(Path(config.data))}


def _announcement(token_bytes: int, max_tokens: int | None, resumed: int) -> str:
    known = f"{max_tokens:,} tokens take {max_tokens * token_bytes / 1e9:,.2f} GB on disk, " if max_tokens else "A token takes "
    return f"{known}{token_bytes:,} bytes{' each' if max_tokens else ' on disk'}" + (f"; {resumed:,} tokens are there already." if resumed else ".")


def _show(cache: "ActivationCache", resumed: int, seconds: float) -> dict[str, Any]:
    from qscope_jax.report.terminal import print_kv, print_table

    result = {name: getattr(cache, name) for name in ("tokens", "seen", "dropped", "damaged", "shards")}
    result |= {"bytes": cache.nbytes, "seconds": seconds, "tokens_per_second": (cache.tokens - resumed) / seconds}
    print_kv({name.replace("_per_", "/"): value for name, value in result.items()}, title=str(cache.folder))
    print()
    rows = [(str(layer), facts["mean_squared_norm"], facts["median_norm"]) for layer, facts in cache.statistics.items()]
    print_table(("layer", "mean squared norm", "median norm"), rows)
    return {**result, "layers": cache.statistics, "cache": str(cache.folder)}
