"""`qscope eval-sae`: how faithful SAEs are."""

import sys
from dataclasses import dataclass
from typing import Any

from qscope_jax.cli.options import Integers, check_at_least
from qscope_jax.cli.results import check_writable, write_result
from qscope_jax.cli.sources import SAEOptions, cut_texts, open_model, open_saes, read_documents, sae_groups

_COLUMNS = {"fvu": "FVU", "l0": "L0", "cossim": "cosine", "dead_fraction": "dead"}
_SCORES = {"ce_loss_score": "CE score", "kl_div_score": "KL score"}


@dataclass(frozen=True, kw_only=True)
class Config(SAEOptions):
    """Measure how faithfully SAEs rebuild residual streams, and what the model loses when it runs on what they rebuilt."""

    data: str = "tiny"
    """File, folder or hub dataset of texts, or `tiny` for the embedded corpus's held-out sentences."""
    column: str = "text"
    """Column or key of the data that holds the text."""
    split: str = "train"
    """Split of a hub dataset."""
    limit: int | None = 512
    """Read at most so many documents."""
    sequence_length: int = 512
    """Cut documents off at so many tokens."""
    layers: Integers | None = None
    """Layers: all, 3 or 2,4-5; by default all that have an SAE."""
    batch_size: int = 16
    """Texts in a forward pass."""
    keep_first: bool = False
    """Count the first token of a text as ordinary."""
    max_norm_multiple: float = 10.0
    """Tokens are outliers whose residual norm exceeds this multiple of the median; 0 has none."""
    splice: bool = True
    """Also run the model on the reconstruction, for the CE and KL scores."""
    out: str = ""
    """JSON file for all metrics."""


def run(config: Config) -> dict[str, Any]:
    """Evaluate; returns the metrics of each layer."""
    from rich.console import Console
    from rich.progress import track

    from qscope_jax.sae.metrics import EvaluationConfig, evaluate_sae

    check_at_least(config, 1, "batch_size", "limit")
    check_at_least(config, 2, "sequence_length")
    check_writable(config.out)
    texts = _texts(config)
    model = open_model(config.model, config.dtype, config.mesh)
    saes = open_saes(config.sae, model)
    texts = cut_texts(model, texts, config.sequence_length)
    settings = EvaluationConfig(config.batch_size, drop_first=not config.keep_first, max_norm_multiple=config.max_norm_multiple)
    layers: dict[int, dict[str, float]] = {}
    groups = track(
        sae_groups(saes, config.layers, model), "layers", total=None, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True
    )
    for group in groups:
        layers |= evaluate_sae(model, group, texts, settings, splice=config.splice)
    _show(layers, len(texts))
    result = {"texts": len(texts), "layers": layers}
    write_result(config.out, "eval-sae", config, result)
    return result


def _texts(config: Config) -> list[str]:
    if config.data != "tiny":
        return read_documents(config.data, config.limit, column=config.column, split=config.split)
    from qscope_jax.demo.corpus import LANGUAGES, sentences

    return [line for language in LANGUAGES for line in sentences(language, held_out=True)][: config.limit]


def _show(layers: dict[int, dict[str, float]], texts: int) -> None:
    from qscope_jax.report.terminal import print_table

    for suffix, title in (("", "without first tokens and outliers"), ("_all", "all tokens")):
        scores = {} if suffix else {name: label for name, label in _SCORES.items() if name in next(iter(layers.values()))}
        names = [*(name + suffix for name in _COLUMNS), *scores]
        rows = [(str(layer), int(found["tokens" + suffix]), *(found[name] for name in names)) for layer, found in layers.items()]
        print_table(("layer", "tokens", *_COLUMNS.values(), *scores.values()), rows, title=f"{texts} texts, {title}")
        print()
