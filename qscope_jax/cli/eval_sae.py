"""`qscope eval-sae`: how faithful SAEs are."""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qscope_jax.cli.options import Integers, check_at_least
from qscope_jax.cli.results import check_writable, write_result
from qscope_jax.cli.sources import TINY, SAEOptions, cut_texts, open_model, open_saes, read_documents, sae_groups

if TYPE_CHECKING:
    from qscope_jax.data.labels import LabelledTexts
    from qscope_jax.models.language_model import LanguageModel
    from qscope_jax.sae.layer_sae import LayerSAE
    from qscope_jax.sae.probing import ProbingResult

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
    geometry: bool = False
    """Also compare each SAE's directions with each other, which takes long for many features."""
    probe: str = ""
    """File of labelled texts (.jsonl or .parquet) to probe features with: how well few of them tell the classes apart."""
    label_column: str = "label"
    """Column or key of that file that holds the class; its texts are in the column of the data's."""
    probe_limit: int | None = None
    """Read at most so many rows of that file."""
    probe_seed: int = 0
    """Seed of the split into texts to learn from and texts held out."""
    probe_standardize: bool = True
    """Scale what a probe reads to unit variance; without it the penalty depends on the unit of activations."""
    page: str = ""
    """HTML file for tables and figures; for the SAEs of a training run, with the run's curves."""
    out: str = ""
    """JSON file for all metrics."""


def run(config: Config) -> dict[str, Any]:
    """Evaluate; returns the metrics of each layer."""
    from rich.console import Console
    from rich.progress import track

    from qscope_jax.sae.metrics import EvaluationConfig, evaluate_sae

    check_at_least(config, 1, "batch_size", "limit", "probe_limit")
    check_at_least(config, 2, "sequence_length")
    check_writable(config.out)
    check_writable(config.page)
    labelled = _labelled(config)
    texts = _texts(config)
    model = open_model(config.model, config.dtype, config.mesh)
    saes = open_saes(config.sae, model)
    texts = cut_texts(model, texts, config.sequence_length)
    settings = EvaluationConfig(
        config.batch_size, drop_first=not config.keep_first, max_norm_multiple=config.max_norm_multiple, densities=True, geometry=config.geometry
    )
    layers: dict[int, dict[str, Any]] = {}
    probing: dict[int, ProbingResult] = {}
    groups = track(
        sae_groups(saes, config.layers, model), "layers", total=None, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True
    )
    for group in groups:
        layers |= evaluate_sae(model, group, texts, settings, splice=config.splice)
        if labelled:
            probing |= _probe(model, group, labelled, config)
    _show(layers, len(texts))
    if probing:
        _show_probing(probing)
    if config.page:
        _write_page(config, f"{model.name}, SAEs {config.sae}, {len(texts):,} texts of {config.data}", layers, probing)
    result: dict[str, Any] = {"texts": len(texts), "layers": layers}
    if probing:
        result["probing"] = {layer: asdict(found) for layer, found in probing.items()}
    write_result(config.out, "eval-sae", config, result)
    return result


def _texts(config: Config) -> list[str]:
    if config.data != "tiny":
        return read_documents(config.data, config.limit, column=config.column, split=config.split)
    from qscope_jax.demo.corpus import LANGUAGES, sentences

    return [line for language in LANGUAGES for line in sentences(language, held_out=True)][: config.limit]


def _labelled(config: Config) -> "LabelledTexts | None":
    """Texts to probe with; read, like all else that can be wrong, before the model is loaded."""
    if not config.probe:
        return None
    from qscope_jax.data.labels import load_labelled_texts
    from qscope_jax.sae.probing import ProbingConfig, split_texts

    labelled = load_labelled_texts(config.probe, column=config.column, label_column=config.label_column, limit=config.probe_limit)
    split_texts(labelled.texts, labelled.labels, ProbingConfig())
    return labelled


def _probe(model: "LanguageModel", saes: "list[LayerSAE]", labelled: "LabelledTexts", config: Config) -> "dict[int, ProbingResult]":
    from qscope_jax.sae.probing import ProbingConfig, probe_saes

    settings = ProbingConfig(
        seed=config.probe_seed,
        standardize=config.probe_standardize,
        batch_size=config.batch_size,
        drop_first=not config.keep_first,
        max_norm_multiple=config.max_norm_multiple,
    )
    # Texts that differ behind the cut only are repeats, so they are cut before they are split.
    return probe_saes(model, saes, cut_texts(model, labelled.texts, config.sequence_length), labelled.labels, settings)


def _write_page(config: Config, subtitle: str, layers: dict[int, dict[str, Any]], probing: "dict[int, ProbingResult]") -> None:
    from qscope_jax.report.evaluation_page import write_evaluation_page
    from qscope_jax.report.run_page import write_run_page

    path = Path(config.page).expanduser()
    run = Path(config.sae).expanduser().resolve().parent
    if config.sae != TINY and (run / "metrics.jsonl").is_file():
        write_run_page(run, layers, path=path, probing=probing)
    else:
        write_evaluation_page(path, layers, subtitle=subtitle, probing=probing)
    print(f"Page: {config.page}")


def _show_probing(probing: "dict[int, ProbingResult]") -> None:
    from qscope_jax.report.terminal import print_table

    first = next(iter(probing.values()))
    kinds = dict.fromkeys((probe.source, None if probe.source == "dense" else probe.k) for probe in first.probes)
    names = [f"{source}{'' if k is None else f' {k}'}" for source, k in kinds]
    rows = [(str(layer), *(result.mean(*kind)[0] for kind in kinds)) for layer, result in probing.items()]
    classes = len(first.majority)
    print_table(("layer", *names), rows, title=f"Probes of {classes} classes: accuracy on {first.test} texts held out, mean over classes")
    print()


def _show(layers: dict[int, dict[str, Any]], texts: int) -> None:
    from qscope_jax.report.terminal import print_table

    for suffix, title in (("", "without first tokens and outliers"), ("_all", "all tokens")):
        scores = {} if suffix else {name: label for name, label in _SCORES.items() if name in next(iter(layers.values()))}
        names = [*(name + suffix for name in _COLUMNS), *scores]
        rows = [(str(layer), int(found["tokens" + suffix]), *(found[name] for name in names)) for layer, found in layers.items()]
        print_table(("layer", "tokens", *_COLUMNS.values(), *scores.values()), rows, title=f"{texts} texts, {title}")
        print()
