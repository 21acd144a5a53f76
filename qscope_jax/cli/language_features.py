"""`qscope sft features`: find the features of a language, and measure how active they usually are on others."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qscope_jax.cli.options import Integers, Texts, check_at_least, read_integers, same_named
from qscope_jax.cli.progress import token_progress
from qscope_jax.cli.results import check_writable, write_result
from qscope_jax.cli.sources import TINY, SAEOptions, check_layers, open_model, open_saes
from qscope_jax.errors import ConfigError, InputError

if TYPE_CHECKING:
    from qscope_jax.features.switching.language_corpus import Corpus, CorpusConfig
    from qscope_jax.features.switching.language_features import LanguageFeatures
    from qscope_jax.models.language_model import LanguageModel

SUMMARY_FILE, PAGE_FILE = "summary.json", "report.html"
_LAST = 2


@dataclass(frozen=True, kw_only=True)
class Config(SAEOptions):
    """Find the features of a language and their usual level on others, for SASFT."""

    data: str = TINY
    """Texts with their languages: a .jsonl, .parquet or .csv file, a hub dataset, or `tiny` for the embedded corpus' training sentences."""
    language: str
    """The unwanted language, by its label in the data."""
    out: str
    """Folder for the features, with a page and a summary."""
    layers: Integers = ()
    """Layers: 3 or 2,4-5; by default the model's last two."""
    count: int = 2
    """Features of each layer, those of highest monolinguality."""
    features: Texts | None = None
    """Features by hand instead, as layer:features, such as 26:104,77 27:9,31."""
    random_seed: int | None = None
    """Control: draw features that belong to no language, with this seed, instead."""
    column: str = "text"
    """Column of the texts."""
    language_column: str = "language"
    """Column of their languages, also of the alpha data."""
    split: str = "train"
    """Split of a hub dataset."""
    per_language: int | None = None
    """Use at most so many texts of each language, drawn at random."""
    seed: int = 0
    """Of that draw."""
    alpha_data: str = ""
    """Texts or conversations to measure levels on, such as the training data; by default the same texts."""
    alpha_kind: Literal["text", "chat"] = "text"
    """What the alpha data hold: texts in --column, or conversations, read as they are trained on (also of `tiny`, which has made ones)."""
    template: str = ""
    """Of conversations: chatml, gemma, llama3, plain, a Jinja file, or by default the tokenizer's own."""
    response_marker: str = ""
    """Text after which an answer begins, where the template should not be asked."""
    turn_end: str = ""
    """Text that ends an answer, with a response_marker."""
    max_refused_share: float = 0.05
    """Largest share of conversations that may be left out, because no answer is found in them."""
    min_tokens: int = 1000
    """Tokens of each language that must count."""
    max_tokens: int = 512
    """Read at most so many tokens of a text."""
    max_norm_multiple: float = 10.0
    """Leave tokens out whose residual norm exceeds this multiple of their text's median; 0 counts all but first ones."""
    batch_tokens: int = 8192
    """Tokens of a forward pass."""
    progress: bool = True
    """Show a progress bar with the rate."""


def run(config: Config) -> dict[str, Any]:
    """Find and save; returns the table that is printed."""
    from qscope_jax.features.switching.find_language_features import find_language_features
    from qscope_jax.features.switching.language_corpus import CorpusConfig, check_corpus
    from qscope_jax.features.switching.language_features import check_language_features_folder
    from qscope_jax.report.language_features_page import write_language_features_page

    check_at_least(config, 1, "count", "per_language")
    settings, given = CorpusConfig(**same_named(CorpusConfig, config)), _given(config.features)
    check_language_features_folder(config.out)
    check_writable(config.out, folder=True)
    texts = _texts(config.data, config)
    check_corpus(texts, config.language)
    model = open_model(config.model, config.dtype, config.mesh)
    saes = open_saes(config.sae, model)
    layers = check_layers(saes, _layers(config, model, given), model)
    with token_progress("reading", None, config.progress) as advance:
        found = find_language_features(
            model, (saes[layer] for layer in layers), texts, config.language, count=config.count, features=given, random_seed=config.random_seed,
            level_texts=_level_texts(config, model, settings), sae_name=config.sae, config=settings, report=_adding(advance),
        )  # fmt: skip
    out = Path(config.out).expanduser()
    found.save(out)
    origin = config.data if not config.alpha_data else f"{config.data}, levels on {config.alpha_data}"
    page = write_language_features_page(out / PAGE_FILE, found, subtitle=f"{found.model}, SAEs {found.sae}; {origin}")
    result = {"features": _rows(found), "levels": _levels(found)}
    write_result(str(out / SUMMARY_FILE), "sft features", config, result)
    _show(found, config, str(page))
    return result


def _given(features: Texts | None) -> dict[int, tuple[int, ...]] | None:
    """Features by layer, from texts such as 26:104,77."""
    if features is None:
        return None
    found: dict[int, tuple[int, ...]] = {}
    for text in features:
        layer, _, chosen = text.partition(":")
        try:
            if not (layer.isdecimal() and layer.isascii()) or int(layer) in found or not (numbers := read_integers(chosen)):
                raise ValueError
        except ValueError as error:
            raise ConfigError(f"features has {text!r}, expected layer:features such as 26:104,77, each layer once") from error
        found[int(layer)] = numbers
    return found


def _layers(config: Config, model: "LanguageModel", given: dict[int, tuple[int, ...]] | None) -> Integers:
    """The layers asked for, those of features by hand, or the last two."""
    if given is None:
        depth = model.config.num_layers
        return config.layers or tuple(range(max(depth - _LAST, 0), depth))
    if config.layers and set(config.layers) != set(given):
        raise ConfigError(f"layers is {','.join(map(str, config.layers))}, but features are given for {','.join(map(str, sorted(given)))}")
    return config.layers or tuple(sorted(given))


def _texts(source: str, config: Config) -> "Corpus":
    if source == TINY:
        from qscope_jax.demo.corpus import LANGUAGES, sentences

        return _drawn([(code, text) for code in LANGUAGES for text in sentences(code)], config)
    from qscope_jax.data.labels import load_labelled_texts

    found = load_labelled_texts(source, column=config.column, label_column=config.language_column, split=config.split)
    return _drawn(list(zip(found.labels, found.texts, strict=True)), config)


def _level_texts(config: Config, model: "LanguageModel", settings: "CorpusConfig") -> "Corpus | None":
    """What levels are measured on, where it is not what features are found by."""
    if config.alpha_kind == "text":
        return _texts(config.alpha_data, config) if config.alpha_data else None
    from qscope_jax.data.chat_data import load_conversations
    from qscope_jax.data.chat_tokens import ChatFormat, chat_rows
    from qscope_jax.demo.switching import switching_conversations

    if not config.alpha_data:
        raise ConfigError("alpha_kind is chat, which needs --alpha-data, the conversations")
    if config.alpha_data == TINY:
        found = switching_conversations(2000, config.language, seed=config.seed)
    else:
        found = load_conversations(config.alpha_data, split=config.split, language_column=config.language_column)
    if unlabelled := [one.where for one in found if not one.language]:
        raise InputError(f"{unlabelled[0]}: has no language in column {config.language_column}; label all conversations or leave them out")
    chosen = _drawn([(one.language, one) for one in found], config)
    kept = [one for conversations in chosen.values() for one in conversations]
    rows = chat_rows(kept, model.tokenizer, ChatFormat(**same_named(ChatFormat, config)), length=settings.max_tokens)
    if rows.refused:
        print(f"{config.alpha_data}: left out " + "; ".join(f"{count}: {reason}" for reason, count in rows.refused.items()), file=sys.stderr)
    corpus: dict[str, list[Any]] = {language: [] for language in chosen}
    for row in rows:
        corpus[row.language].append(row.tokens)
    return corpus


def _drawn(labelled: Sequence[tuple[str, Any]], config: Config) -> dict[str, list[Any]]:
    """Texts by language, in their order: all, or so many of each."""
    import numpy as np

    corpus: dict[str, list[Any]] = {}
    for language, text in labelled:
        corpus.setdefault(language, []).append(text)
    if config.per_language is None:
        return corpus
    rng = np.random.default_rng(config.seed)
    kept = {language: sorted(rng.permutation(len(texts))[: config.per_language].tolist()) for language, texts in corpus.items()}
    return {language: [texts[place] for place in kept[language]] for language, texts in corpus.items()}


def _adding(advance: Callable[[int], None]) -> Callable[[int], None]:
    done = 0

    def add(tokens: int) -> None:
        nonlocal done
        done += tokens
        advance(done)

    return add


def _rows(found: "LanguageFeatures") -> list[dict[str, Any]]:
    """Each feature, with its score and the language that it is second most active on."""
    return [
        {
            "layer": layer,
            "rank": rank,
            "feature": int(found.features_MS[m, rank]),
            "monolinguality": float(found.scores_MS[m, rank]),
            "runner_up": found.facts["runner_up"][m][rank],
        }
        for m, layer in enumerate(found.layers)
        for rank in range(found.features_MS.shape[1])
    ]


def _levels(found: "LanguageFeatures") -> list[dict[str, Any]]:
    """Each language, with its counted tokens and the level of every feature, by layer and rank."""
    return [
        {"language": language, "tokens": int(found.tokens_K[k]), "alpha": found.alpha_MKS[:, k].tolist()}
        for k, language in enumerate(found.languages)
    ]


def _show(found: "LanguageFeatures", config: Config, page: str) -> None:
    from qscope_jax.report.terminal import print_table

    rows = [(str(row["layer"]), str(row["rank"]), str(row["feature"]), row["monolinguality"], row["runner_up"]) for row in _rows(found)]
    how = {"monolinguality": f"Features of language {found.language}", "given": "Features by hand", "random": "Features of no language"}
    print_table(("layer", "rank", "feature", "monolinguality", "runner-up"), rows, title=how[found.facts["chosen"]])
    print()
    names = [f"{layer}/{feature}" for layer, features in zip(found.layers, found.features_MS.tolist(), strict=True) for feature in features]
    levels = [(row["language"], row["tokens"], *(value for layer in row["alpha"] for value in layer)) for row in _levels(found)]
    print_table(("language", "tokens", *names), levels, title="Mean pre-activation (alpha), by layer/feature")
    print()
    print(f"Features: {config.out}   page: {page}")
