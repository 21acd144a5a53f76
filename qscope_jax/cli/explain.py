"""`qscope explain`: what features stand for."""

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qscope_jax.cli.endpoints import EndpointOptions, open_endpoint
from qscope_jax.cli.options import Integers, Texts, check_at_least
from qscope_jax.cli.results import check_writable, write_result
from qscope_jax.errors import ConfigError

if TYPE_CHECKING:
    from qscope_jax.features.explain.explanation import ExplainConfig
    from qscope_jax.features.explain.feature_card import FeatureCard
    from qscope_jax.features.explain.feature_labels import FeatureLabel
    from qscope_jax.features.generation.generators import Generator
    from qscope_jax.features.store.feature_store import FeatureStore

    Labels = dict[tuple[int, int], FeatureLabel]

T = TypeVar("T")

# Seconds after which finished explanations are written down.
_SECONDS = 10
_DENSE = 0.1
_JSON_LINES = (".jsonl", ".json")


@dataclass(frozen=True, kw_only=True)
class Config(EndpointOptions):
    """Show where features fire, for whom, what they write and what is near them; explain them by a language model; make a site of a layer."""

    store: str
    """Folder that qscope store wrote."""
    layer: int
    """Layer."""
    features: Integers = ()
    """Features, such as 17 or 2,4-5."""
    all: bool = False
    """All features of the layer, for a site, an export or a table of them."""
    top: int = 10
    """Contexts of highest activation."""
    quantiles: int = 4
    """Ranges of activation, with as many texts in each."""
    per_quantile: int = 2
    """Contexts drawn from each of them."""
    before: int = 24
    """Tokens before the strongest one that a context shows."""
    after: int = 12
    """Tokens after it."""
    by: Texts | None = None
    """Columns of the store to compare firing by, such as language; by default all with few values."""
    cofiring: int = 10
    """Features that fire at the same tokens; 0 looks for none."""
    seed: int = 0
    """Seed of all draws."""
    explanations: str = ""
    """JSON-lines file of explanations. What stands there is shown; what --endpoint finds is kept there."""
    endpoint: str = ""
    """URL of an OpenAI-compatible endpoint, such as http://localhost:8000/v1, that explains features and scores that."""
    endpoint_model: str = ""
    """Name of the model that explains, as the endpoint knows it."""
    judge_model: str = ""
    """Name of the model that scores; by default the same."""
    max_tokens: int = 512
    """Tokens of an answer; a model that thinks aloud needs some thousands."""
    site: str = ""
    """Folder for a site that browses and searches the features."""
    neuronpedia: str = ""
    """Folder for files that Neuronpedia imports."""
    neuronpedia_model: str = ""
    """Neuronpedia's name of the model; by default the last part of the store's, in lower case."""
    neuronpedia_set: str = ""
    """Neuronpedia's name of the set of SAEs; by default made from the store's."""
    page: str = ""
    """HTML file with the features asked for."""
    out: str = ""
    """JSON file: whole cards of the features asked for, or a line of facts for each with --all."""


def run(config: Config) -> dict[str, Any]:
    """Explain; returns the cards, or the facts of each feature."""
    from qscope_jax.features.explain.contexts import check_features
    from qscope_jax.features.store.feature_store import read_store

    _check(config)
    _settings(config)
    store = read_store(config.store)
    check_features(store, config.layer, config.features)
    labels = _labels(config)
    if config.endpoint:
        labels = _interpret(store, labels, config)
    cards = _Cards(store, labels, config)
    found = _every(cards, config) if config.all else _some(cards, config)
    if config.site:
        _write_site(cards, config)
    if config.neuronpedia:
        _write_neuronpedia(cards, config)
    result = {"store": config.store, "features": found}
    write_result(config.out, "explain", config, result)
    return result


def _check(config: Config) -> None:
    """All that can be wrong with options, before anything is read."""
    if bool(config.features) == config.all:
        raise ConfigError("give either --features or --all, and not both")
    if config.all and config.page:
        raise ConfigError("a page shows features one by one and cannot hold a layer; use --site with --all")
    if config.endpoint and not config.endpoint_model:
        raise ConfigError("--endpoint-model is missing; an endpoint needs the name of a model")
    if config.endpoint and not config.explanations:
        raise ConfigError("--explanations is missing; what an endpoint finds needs a file to be kept in")
    if config.endpoint and Path(config.explanations).suffix.lower() not in _JSON_LINES:
        raise ConfigError(f"--explanations is {config.explanations}; what an endpoint finds is kept in JSON lines, so give a file of .jsonl")
    if not config.endpoint and (config.endpoint_model or config.judge_model):
        raise ConfigError("--endpoint is missing; a model that explains needs the URL of an endpoint")
    check_at_least(config, 1, "concurrency", "max_tokens")
    for path in (config.out, config.page, config.explanations):
        check_writable(path)
    for path in (config.site, config.neuronpedia):
        check_writable(path, folder=True)


def _settings(config: Config) -> "ExplainConfig":
    from qscope_jax.features.explain.contexts import Window
    from qscope_jax.features.explain.explanation import ExplainConfig

    return ExplainConfig(
        config.top, config.quantiles, config.per_quantile, Window(config.before, config.after), columns=config.by, cofiring=config.cofiring,
        seed=config.seed,
    )  # fmt: skip


class _Cards:
    """Cards with their explanations: those of chosen features are kept, those of a whole layer made again each time."""

    def __init__(self, store: "FeatureStore", labels: "Labels", config: Config) -> None:
        self.store, self._labels, self._config = store, labels, config
        self._kept = None if config.all else list(self._made(_settings(config)))

    def __iter__(self) -> "Iterator[FeatureCard]":
        total = self.store.num_features[self._config.layer]
        return iter(self._kept) if self._kept is not None else _progress(self._made(_settings(self._config)), "features", total)

    def facts(self) -> "Iterator[FeatureCard]":
        """Cards without contexts, which takes seconds for a whole layer."""
        from qscope_jax.features.explain.explanation import ExplainConfig

        return self._made(ExplainConfig(top=0, quantiles=0, cofiring=0, bins=1, columns=()))

    def explained_by(self) -> dict[int, str]:
        """Who explained each feature, as its label says, which may be older than this run."""
        return {feature: label.by for (layer, feature), label in self._labels.items() if layer == self._config.layer}

    def text(self, token: int) -> str:
        """What a token reads as."""
        return self.store.vocabulary[token]

    def _made(self, settings: "ExplainConfig") -> "Iterator[FeatureCard]":
        from qscope_jax.features.explain.explanation import explain_features
        from qscope_jax.features.explain.feature_labels import labelled

        features = None if self._config.all else self._config.features
        cards = explain_features(self.store, self._config.layer, features, settings)
        return (labelled(card, self._labels) for card in cards)


def _labels(config: Config) -> "Labels":
    from qscope_jax.features.explain.feature_labels import read_labels

    path = Path(config.explanations).expanduser()
    there = config.explanations and (path.exists() or not config.endpoint) and not (path.is_file() and not path.stat().st_size)
    return read_labels(path) if there else {}


def _interpret(store: "FeatureStore", labels: "Labels", config: Config) -> "Labels":
    """Explain what is not explained and score what is not scored; what is finished is kept, however this ends."""
    from qscope_jax.features.explain.feature_labels import write_labels
    from qscope_jax.features.explain.interpretation import InterpretConfig, interpret_features

    generator, judge = _generators(config)
    chosen = range(store.num_features[config.layer]) if config.all else config.features
    known = {feature: labels[config.layer, feature] for feature in chosen if (config.layer, feature) in labels}
    wanted = [feature for feature in chosen if feature not in known or known[feature].score is None]
    found = interpret_features(
        store, config.layer, wanted, generator, judge=judge, explanations={feature: label.explanation for feature, label in known.items()},
        config=InterpretConfig(max_tokens=config.max_tokens, seed=config.seed),
    )  # fmt: skip
    labels, problems, written = dict(labels), {}, time.monotonic()
    try:
        for one in _progress(found, "explaining", len(wanted)):
            if one.problem:
                problems[one.feature] = one.problem
            if one.explanation:
                by = known[one.feature].by if one.feature in known else generator.name
                labels[config.layer, one.feature] = one.label(by)
            if time.monotonic() - written > _SECONDS:
                write_labels(config.explanations, labels.values())
                written = time.monotonic()
    finally:
        write_labels(config.explanations, labels.values())
    _show_problems(problems, len(wanted))
    return labels


def _generators(config: Config) -> "tuple[Generator, Generator]":
    judge = config.judge_model or config.endpoint_model
    explains, judges = (open_endpoint(config.endpoint, model, config, flag="--endpoint-model") for model in (config.endpoint_model, judge))
    return explains, judges


def _show_problems(problems: dict[int, str], asked: int) -> None:
    """Say what is missing and why, each reason once."""
    if not problems:
        return
    print(f"{len(problems)} of {asked} features lack an explanation or a score; the same command tries them again:", file=sys.stderr)
    for reason in dict.fromkeys(problems.values()):
        features = [feature for feature, why in problems.items() if why == reason]
        more = f" and {len(features) - 5} more" if len(features) > 5 else ""
        print(f"  feature {', '.join(map(str, features[:5]))}{more}: {reason}", file=sys.stderr)


def _some(cards: _Cards, config: Config) -> list[dict[str, Any]]:
    """Show the features asked for; whole cards."""
    from qscope_jax.report.feature_terminal import print_card

    for card in cards:
        print_card(card, cards.text)
        print()
    if config.page:
        from qscope_jax.report.explanation_page import write_explanation_page

        write_explanation_page(config.page, cards, token_text=cards.text, subtitle=_subtitle(cards.store))
        print(f"Page: {config.page}")
    return [asdict(card) | {"promoted": _words(card.promoted, cards), "suppressed": _words(card.suppressed, cards)} for card in cards]


def _every(cards: _Cards, config: Config) -> list[dict[str, Any]]:
    """Sum up a layer; a few facts of each feature."""
    from qscope_jax.report.terminal import print_kv

    rows = [
        {"feature": card.feature, "density": card.density, "text_rate": card.text_rate, "maximum": card.maximum, "explanation": card.explanation,
         "scores": dict(card.scores), "promoted": [word for word, _ in _words(card.promoted, cards)]}
        for card in cards.facts()
    ]  # fmt: skip
    counts = {
        "features": len(rows),
        "silent": sum(row["maximum"] == 0 for row in rows),
        f"at more than {_DENSE:.0%} of tokens": sum(row["density"] > _DENSE for row in rows),
        "explained": sum(bool(row["explanation"]) for row in rows),
    }
    print_kv(counts, title=f"Layer {config.layer} of {config.store}")
    return rows


def _write_site(cards: _Cards, config: Config) -> None:
    from qscope_jax.report.feature_site import write_site

    store = cards.store
    about = {"model": store.model, "SAEs": store.sae, "layer": config.layer, "texts": store.num_texts, "tokens": store.num_tokens}
    write_site(
        config.site, cards, title=f"Features of layer {config.layer}", subtitle=_subtitle(store), token_text=cards.text, about=about
    )  # fmt: skip
    print(f"Site: {Path(config.site) / 'index.html'}")


def _write_neuronpedia(cards: _Cards, config: Config) -> None:
    from qscope_jax.features.explain.neuronpedia import source_of, write_neuronpedia

    source = source_of(
        cards.store, config.layer, config.before + config.after + 1, model_id=config.neuronpedia_model, sae_set=config.neuronpedia_set
    )  # fmt: skip
    write_neuronpedia(config.neuronpedia, cards, source, token_text=cards.text, explained_by=cards.explained_by())
    print(f"Neuronpedia: {config.neuronpedia}, model {source.model_id}, source {source.layer}-{source.sae_set}")


def _words(pairs: Iterable[tuple[int, float]], cards: _Cards) -> list[tuple[str, float]]:
    return [(cards.text(token), logit) for token, logit in pairs]


def _subtitle(store: "FeatureStore") -> str:
    return f"{store.model}, SAEs {store.sae}, {store.num_texts:,} texts with {store.num_tokens:,} tokens"


def _progress(items: Iterable[T], doing: str, total: int) -> Iterator[T]:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return iter(track(items, doing, total=total, console=console, disable=not sys.stderr.isatty(), transient=True))
