"""`qscope classify`: tell classes of texts apart by the features that fire on them."""

import contextlib
import json
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qscope_jax.cli.labelled import LabelledOptions, check_labelled, mark_tokens, read_activations, read_labelled
from qscope_jax.cli.options import Integers, Numbers, Texts, check_at_least, positional
from qscope_jax.cli.results import check_writable, write_result
from qscope_jax.cli.sources import ModelOptions, check_texts, open_model, open_saes, read_documents
from qscope_jax.errors import ConfigError, InputError

if TYPE_CHECKING:
    from qscope_jax.cli.labelled import Activations
    from qscope_jax.features.classify.classification import RuleConfig
    from qscope_jax.features.classify.classification_study import Study
    from qscope_jax.features.classify.feature_classifier import FeatureClassifier, Prediction
    from qscope_jax.features.store.feature_store import FeatureStore

_SHOWN = 20
_STANDARD_INPUT = "-"
_SCORES = ("precision", "recall", "f1", "accuracy", "auc")


@dataclass(frozen=True, kw_only=True)
class RuleOptions(LabelledOptions):
    """How a rule is chosen."""

    k: int | None = None
    """Features of each layer; by default 1, 2, 5 or 10, whichever is best on discovery texts."""
    use_layers: int = 1
    """Layers used together."""
    by: Literal["difference", "f1"] = "difference"
    """Choose layers by the largest difference of firing rates, or by the F1 of their own rules, on discovery texts."""
    thresholds: Literal["zero", "f1", "balanced"] = "zero"
    """What a feature must exceed: 0, or what is best on discovery texts for F1 or balanced accuracy."""
    samples: int = 1000
    """Bootstrap samples behind intervals; 0 gives none."""


@dataclass(frozen=True, kw_only=True)
class FitConfig(RuleOptions):
    """Fit a classifier to labelled texts, and score it on texts held out."""

    out: str
    """Folder for the classifier."""
    reading: Literal["top_k", "pre_activation"] = "top_k"
    """Read features as the SAE does, which predicting then needs too, or by their encoder rows alone, which the classifier carries."""
    languages: Texts | None = None
    """Fit to texts of these languages only."""


@dataclass(frozen=True, kw_only=True)
class PredictConfig(ModelOptions):
    """Classify texts with a fitted classifier, in one pass that stops at its highest layer."""

    classifier: str = positional()
    """Folder of the classifier."""
    texts: Texts = positional(())
    """Text to classify."""
    model: str = ""
    """Model, by default the one it was fitted with."""
    sae: str = ""
    """SAEs of a top_k classifier, by default those it was fitted with."""
    file: str = ""
    """Classify the documents of this file, folder or hub dataset instead, or with - the lines of standard input as they come, a batch at a time."""
    column: str = "text"
    """Column or key that holds the text."""
    label_column: str = ""
    """Column or key of the file that holds the class; answers are then scored."""
    split: str = "train"
    """Split of a hub dataset."""
    limit: int | None = None
    """Read at most so many documents of the file."""
    batch_size: int | None = None
    """Texts in a forward pass, by default as in the fit; 1 answers each line of standard input at once."""
    out: str = ""
    """JSON-lines file for the answers."""


@dataclass(frozen=True, kw_only=True)
class ReportConfig(RuleOptions):
    """Report how features classify: by layer and number of features, by language, with little data, and beside baselines."""

    ks: Integers = (1, 2, 5, 10)
    """Numbers of features in the sweep over layers."""
    top: int = 10
    """Features of each language that are compared between languages."""
    shares: Numbers = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
    """Shares of the discovery texts that the curve of little data has; the last is 1."""
    draws: int = 5
    """Draws of each share."""
    baselines: bool = True
    """Also fit a difference of means and a regression on residual streams, and a bag of words."""
    examples: int = 3
    """Texts shown of each kind: found, false alarms and missed."""
    page: str = ""
    """HTML file for tables and figures."""
    out: str = ""
    """JSON file for the results."""


def fit(config: FitConfig) -> dict[str, Any]:
    """Fit and save a classifier; returns what its file says."""
    from qscope_jax.features.classify.feature_classifier import check_classifier_folder
    from qscope_jax.features.classify.fit_classifier import ClassifierConfig, classifier_from_tables

    check_labelled(config)
    rule = _rule(config)
    check_classifier_folder(config.out)
    check_writable(config.out, folder=True)
    data, store = read_labelled(config)
    if config.languages is not None:
        data = data.only(config.languages)
    if store is not None and config.reading == "pre_activation":
        raise ConfigError("--reading pre_activation reads the texts by the model; give DATA instead of --store")
    found = read_activations(config, data, store)
    settings = ClassifierConfig(rule, config.reading, "balanced" if config.thresholds == "balanced" else "f1", config.samples, config.seed)
    names = {"model_name": found.model_name, "sae_name": found.sae_name}
    classifier = classifier_from_tables(found.tables, data, found.sae_of, config=settings, reading=found.reading, model=found.model, **names)
    classifier.save(config.out)
    _show_fit(classifier, config.out)
    return {"classifier": config.out, "terms": [asdict(term) for term in classifier.rule.terms], **classifier.facts}


def predict(config: PredictConfig) -> dict[str, Any]:
    """Classify; returns how many texts are of each class, and scores where classes are known."""
    from dataclasses import replace

    from qscope_jax.features.classify.feature_classifier import load_classifier

    if bool(config.texts) == bool(config.file):
        raise ConfigError("give either texts or --file, and not both")
    if config.label_column and config.file in ("", _STANDARD_INPUT):
        raise ConfigError("--label-column is a column of --file; give a file with columns")
    check_at_least(config, 1, "limit", "batch_size")
    check_writable(config.out)
    classifier = load_classifier(config.classifier)
    if config.batch_size is not None:
        classifier = replace(classifier, texts=replace(classifier.texts, batch_size=config.batch_size))
    texts, labels = _texts(config, classifier)
    model = open_model(config.model or classifier.model, config.dtype, config.mesh)
    classifier.check_model(model)
    saes = []
    if classifier.reading == "top_k":
        collection = open_saes(config.sae or classifier.sae, model)
        saes = [collection[layer] for layer in classifier.rule.layers]
    answers: list[tuple[bool, float]] = []
    # Answers are remembered only where they will be scored: standard input may never end.
    classes = _write_answers(config, classifier.predict(model, texts, saes), None if labels is None else answers)
    result: dict[str, Any] = {"texts": classes.total(), "classes": dict(classes)}
    if labels is not None:
        result["scores"] = _scored(answers, [label == classifier.positive for label in labels])
    return result


def report(config: ReportConfig) -> dict[str, Any]:
    """Study the data; returns what was found."""
    from qscope_jax.features.classify.classification_study import StudyConfig, study

    check_labelled(config)
    check_at_least(config, 1, "top", "draws")
    check_at_least(config, 0, "examples")
    if not config.ks or min(config.ks) < 1:
        raise ConfigError(f"ks is {config.ks}, expected numbers of 1 or more")
    check_writable(config.out)
    check_writable(config.page)
    settings = StudyConfig(config.ks, _rule(config), config.top, config.shares, config.draws, config.baselines, config.samples, config.seed)
    data, store = read_labelled(config)
    found = read_activations(config, data, store)
    study_ = study(found.tables, data, found.streams, settings)
    _show_report(study_)
    if config.page:
        from qscope_jax.report.classification_page import write_classification_page

        subtitle = f"{found.model_name}, SAEs {found.sae_name}, {config.store or config.data}"
        write_classification_page(config.page, study_, _examples(config, study_, found, store), subtitle=subtitle)
        print(f"Page: {config.page}")
    result = study_.plain()
    write_result(config.out, "classify report", config, result)
    return result


ACTIONS = {"fit": (FitConfig, fit), "predict": (PredictConfig, predict), "report": (ReportConfig, report)}


def _rule(config: RuleOptions) -> "RuleConfig":
    from qscope_jax.features.classify.classification import RuleConfig

    check_at_least(config, 0, "samples")
    return RuleConfig(config.k, config.use_layers, config.by, config.thresholds)


def _texts(config: PredictConfig, classifier: "FeatureClassifier") -> tuple[Iterable[str], tuple[str, ...] | None]:
    """Texts to classify, and their classes where they are known."""
    if config.texts:
        return check_texts(config.texts), None
    if config.file == _STANDARD_INPUT:
        return (line.rstrip("\r\n") for line in sys.stdin if line.strip()), None
    if not config.label_column:
        return read_documents(config.file, config.limit, column=config.column, split=config.split), None
    from qscope_jax.data.labels import load_labelled_texts

    found = load_labelled_texts(config.file, column=config.column, label_column=config.label_column, split=config.split, limit=config.limit)
    if len(classes := set(found.labels)) < 2 or classifier.positive not in classes:
        raise InputError(f"{config.file}: classes are {', '.join(map(repr, sorted(classes)[:6]))}; expected {classifier.positive!r} and another")
    return found.texts, found.labels


def _write_answers(config: PredictConfig, predictions: "Iterable[Prediction]", kept: list[tuple[bool, float]] | None) -> Counter[str]:
    """Print and write answers as they come, and keep whether each is positive and its score, if asked to; the texts of each class."""
    from qscope_jax.data.files import atomic_path
    from qscope_jax.report.terminal import print_table

    classes: Counter[str] = Counter()
    rows = []
    with contextlib.ExitStack() as stack:
        file = None
        if config.out:
            file = stack.enter_context(open(stack.enter_context(atomic_path(Path(config.out).expanduser())), "w", encoding="utf-8"))
        for one in predictions:
            classes[one.label] += 1
            if kept is not None:
                kept.append((one.positive, one.score))
            line = json.dumps(
                {"label": one.label, "score": one.score, "text": one.text, "firings": [asdict(f) for f in one.firings]}, ensure_ascii=False
            )
            if file is not None:
                file.write(line + "\n")
            if config.file == _STANDARD_INPUT:
                print(line, flush=True)
            elif len(rows) < _SHOWN:
                fired = ", ".join(f"{firing.feature} of layer {firing.layer}" for firing in one.firings)
                rows.append((one.label, one.score, fired or None, _short(one.text)))
    if rows:
        count = classes.total()
        print_table(("class", "score", "features", "text"), rows, title=f"{count:,} texts" + (f", the first {_SHOWN}" if count > _SHOWN else ""))
    return classes


def _scored(answers: list[tuple[bool, float]], truth: list[bool]) -> dict[str, Any]:
    import numpy as np

    from qscope_jax.features.classify.classification_scores import binary_scores
    from qscope_jax.report.terminal import print_kv

    found = binary_scores(np.array(truth), *map(np.array, zip(*answers, strict=True)))
    print()
    print_kv({name: str(getattr(found, name)) for name in _SCORES}, title="Scores, with intervals of 95 %")
    return found.plain()


def _show_fit(classifier: "FeatureClassifier", out: str) -> None:
    from qscope_jax.report.terminal import print_kv, print_table

    facts = classifier.facts
    rows = [(str(term.layer), str(term.feature), term.difference, term.threshold) for term in classifier.rule.terms]
    print_table(("layer", "feature", "difference of firing rates", "threshold"), rows, title=f"{classifier.positive!r} where any of these fires")
    print()
    halves = [(half, facts[f"{half}_texts"], *(_interval(facts[half][name]) for name in _SCORES)) for half in ("discovery", "evaluation")]
    print_table(("texts of", "number", *_SCORES), halves)
    print_kv({"left out": facts["left_out"] or "no text", "classifier": out})


def _interval(found: dict[str, float]) -> str:
    from qscope_jax.features.classify.classification_scores import Interval

    return str(Interval(**found))


def _show_report(found: "Study") -> None:
    from qscope_jax.report.terminal import print_kv, print_table

    for name, language in found.languages.items():
        rows = [
            (one.name, ", ".join(map(str, one.layers)) or None, one.features, *(str(getattr(one.scores, score)) for score in ("f1", "auc")))
            for one in language.methods
        ]
        print_table(("how", "layers", "features", "F1", "AUC"), rows, title=f"{name}: {found.data.positive!r} on texts held out")
        layer, k = language.sweep.chosen("hindsight")
        print(f"Best in hindsight: layer {layer}, {k} features, F1 {language.sweep.evaluation_f1.max():.3f}\n")
    if found.transfer is not None:
        rows = [(source, *row) for source, row in zip(found.transfer.languages, found.transfer.f1.tolist(), strict=True)]
        print_table(("found on", *found.transfer.languages), rows, title="F1 of a rule found on one language and applied to another")
        print()
    curve = found.efficiency
    rows = [(budget, float(curve.chosen[p].mean()), curve.kept(p), float(curve.hindsight[p].mean())) for p, budget in enumerate(curve.budgets)]
    print_table(
        ("texts of a class", "F1", "share kept", "F1, layer in hindsight"), rows, title=f"With fewer texts to choose {found.efficiency_k} features on"
    )
    print_kv({"left out": found.data.split.removed() or "no text"})


def _examples(config: ReportConfig, found: "Study", activations: "Activations", store: "FeatureStore | None") -> dict[str, list[Any]]:
    """Of each language some texts of each kind, token by token."""
    from qscope_jax.features.classify.classification_study import example_texts
    from qscope_jax.report.classification_page import Example

    shown: dict[str, list[Any]] = {}
    for name, halves in found.data.by_language.items():
        rule = found.languages[name].rule
        if rule is None or not config.examples:
            continue
        picked = [(kind, row) for kind, rows in example_texts(rule, activations.tables, halves, config.examples).items() for row in rows]
        strongest = [rule.strongest(activations.tables, row) for _, row in picked]
        marked = mark_tokens(activations, found.data, store, [(row, *which) for (_, row), which in zip(picked, strongest, strict=True)])
        shown[name] = [Example(kind, *one, *which) for (kind, _), one, which in zip(picked, marked, strongest, strict=True)]
    return shown


def _short(text: str) -> str:
    return (text if len(text) <= 60 else text[:59] + "…").replace("\n", "↵")
