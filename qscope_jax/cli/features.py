"""`qscope features`: which features texts light up."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from qscope_jax.cli.options import Integers, Texts, check_at_least, positional
from qscope_jax.cli.results import check_writable, write_result
from qscope_jax.cli.sources import SAEOptions, check_texts, open_model, open_saes, read_documents, read_layers
from qscope_jax.errors import ConfigError, InputError

if TYPE_CHECKING:
    from qscope_jax.features.readout import Readout
    from qscope_jax.models.language_model import LanguageModel

_BEFORE, _AFTER = 8, 4


@dataclass(frozen=True, kw_only=True)
class Config(SAEOptions):
    """Show which features texts light up, and at which tokens."""

    texts: Texts = positional(())
    """Text to read."""
    file: str = ""
    """Read the documents of this file, folder or hub dataset instead."""
    limit: int | None = None
    """Read at most so many documents of the file."""
    layers: Integers | None = None
    """Layers: all, 3 or 2,4-5; by default all that have an SAE."""
    top: int = 10
    """Features shown for each text and layer."""
    by: Literal["max", "mean"] = "max"
    """Rank features by their largest or their mean activation."""
    tokens: bool = False
    """Also print each text coloured by the strongest feature of each layer."""
    feature: int | None = None
    """Colour texts, here and on the page, by this feature instead of the strongest."""
    keep_first: bool = False
    """Count the first token of a text too."""
    max_norm_multiple: float = 10.0
    """Leave tokens out whose residual norm exceeds this multiple of the median; 0 counts all."""
    page: str = ""
    """HTML file for a page with token heat maps."""
    out: str = ""
    """JSON file for the features."""


def run(config: Config) -> dict[str, Any]:
    """Read the texts; returns for each text and layer its strongest features."""
    if bool(config.texts) == bool(config.file):
        raise ConfigError("give either texts or --file, and not both")
    check_at_least(config, 1, "top", "limit")
    check_writable(config.out)
    check_writable(config.page)
    texts = check_texts(config.texts or read_documents(config.file, config.limit))
    model = open_model(config.model, config.dtype, config.mesh)
    saes = open_saes(config.sae, model)
    readouts = read_layers(model, saes, config.layers, texts, keep_first=config.keep_first, max_norm_multiple=config.max_norm_multiple)
    _check_feature(config.feature, readouts)
    found = [_text_result(model, readouts, row, config) for row in range(len(texts))]
    for row, text in enumerate(found):
        _show(model, readouts, row, text, config)
    if config.page:
        _write_page(model, readouts, found, config)
    result = {"texts": found}
    write_result(config.out, "features", config, result)
    return result


def _check_feature(feature: int | None, readouts: "dict[int, Readout]") -> None:
    for readout in readouts.values():
        if feature is not None and not 0 <= feature < readout.num_features:
            raise InputError(f"feature {feature} is out of range; the SAE of layer {readout.layer} has features 0 to {readout.num_features - 1}")


def _text_result(model: "LanguageModel", readouts: "dict[int, Readout]", row: int, config: Config) -> dict[str, Any]:
    first = next(iter(readouts.values()))
    layers = {}
    for layer, readout in readouts.items():
        top = [_feature_result(model, readout, row, *ranked) for ranked in readout.top(row, config.top, by=config.by)]
        layers[layer] = {"counted_tokens": int(readout.counted[row].sum()), "features": top}
    return {"text": first.texts[row], "tokens": len(first.token_ids[row]), "layers": layers}


def _feature_result(model: "LanguageModel", readout: "Readout", row: int, feature: int, score: float) -> dict[str, Any]:
    activation = readout.activation(row, feature)
    counted = readout.counted[row]
    position = int((activation * counted).argmax() if counted.any() else activation.argmax())
    before, token, after = (
        model.tokenizer.decode(list(readout.token_ids[row][part]))
        for part in (slice(max(position - _BEFORE, 0), position), slice(position, position + 1), slice(position + 1, position + 1 + _AFTER))
    )
    return {"feature": feature, "activation": score, "position": position, "token": token, "before": before, "after": after}


def _shown_feature(text: dict[str, Any], layer: int, config: Config) -> int | None:
    """The feature to colour a text by: the one asked for, or the strongest."""
    top = text["layers"][layer]["features"]
    return config.feature if config.feature is not None else top[0]["feature"] if top else None


def _rows(text: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [
        (str(layer), str(one["feature"]), one["activation"], f"{one['before']}[{one['token']}]{one['after']}".replace("\n", "↵"))
        for layer, found in text["layers"].items()
        for one in found["features"]
    ]


def _show(model: "LanguageModel", readouts: "dict[int, Readout]", row: int, text: dict[str, Any], config: Config) -> None:
    from rich.console import Console

    from qscope_jax.features.readout import token_texts
    from qscope_jax.report.terminal import print_table, tokens_text

    title = text["text"] if len(text["text"]) <= 70 else text["text"][:69] + "…"
    print_table(("layer", "feature", f"{config.by} activation", "strongest token in its context"), _rows(text), title=title.replace("\n", "↵"))
    if config.tokens or config.feature is not None:
        for layer, readout in readouts.items():
            feature = _shown_feature(text, layer, config)
            if feature is not None:
                activation = readout.activation(row, feature)
                print(f"\nlayer {layer}, feature {feature}; the strongest colour is {activation.max():.4g}")
                Console().print(tokens_text(token_texts(model, readout.token_ids[row]), activation), soft_wrap=True)
    print()


def _write_page(model: "LanguageModel", readouts: "dict[int, Readout]", found: list[dict[str, Any]], config: Config) -> None:
    from qscope_jax.features.readout import token_texts
    from qscope_jax.report.page import Page

    page = Page("Features of texts", f"{model.name}, SAEs {config.sae}")
    for row, text in enumerate(found):
        page.heading(text["text"][:80].replace("\n", " "))
        for layer, readout in readouts.items():
            feature = _shown_feature(text, layer, config)
            if feature is not None:
                activation = readout.activation(row, feature)
                page.tokens(token_texts(model, readout.token_ids[row]), activation, label=f"layer {layer}, feature {feature}")
        page.table(("layer", "feature", f"{config.by} activation", "strongest token in its context"), _rows(text))
    page.write(config.page)
