"""`qscope compare`: which features tell two texts or files apart."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from qscope_jax.cli.options import Integers, check_at_least, positional
from qscope_jax.cli.results import check_writable, write_result
from qscope_jax.cli.sources import SAEOptions, open_model, open_saes, read_layers, texts_of


@dataclass(frozen=True, kw_only=True)
class Config(SAEOptions):
    """Find the features that tell two texts or files apart, over the tokens of either side."""

    a: str = positional()
    """Text, or a file or folder of texts."""
    b: str = positional()
    """Text, or a file or folder of texts, to compare it with."""
    limit: int | None = None
    """Read at most so many documents of each file."""
    layers: Integers | None = None
    """Layers: all, 3 or 2,4-5; by default all that have an SAE."""
    top: int = 10
    """Features shown for each layer."""
    by: Literal["mean", "rate"] = "mean"
    """Rank features by the difference of their mean activation or of their firing rate."""
    keep_first: bool = False
    """Count the first token of a text too."""
    max_norm_multiple: float = 10.0
    """Leave tokens out whose residual norm exceeds this multiple of the median; 0 counts all."""
    out: str = ""
    """JSON file for the differences."""


def run(config: Config) -> dict[str, Any]:
    """Compare; returns for each layer the features of the largest difference."""
    from qscope_jax.features.compare import compare

    check_at_least(config, 1, "top", "limit")
    check_writable(config.out)
    sides = [texts_of(side, config.limit) for side in (config.a, config.b)]
    model = open_model(config.model, config.dtype, config.mesh)
    saes = open_saes(config.sae, model)
    readouts = [
        read_layers(model, saes, config.layers, texts, keep_first=config.keep_first, max_norm_multiple=config.max_norm_multiple) for texts in sides
    ]
    comparisons = {layer: compare(readouts[0][layer], readouts[1][layer]) for layer in readouts[0]}
    result = {
        "texts": [len(texts) for texts in sides],
        "layers": {
            layer: {"counted_tokens": found.tokens, "features": [asdict(one) for one in found.top(config.top, by=config.by)]}
            for layer, found in comparisons.items()
        },
    }
    _show(result, config)
    write_result(config.out, "compare", config, result)
    return result


def _show(result: dict[str, Any], config: Config) -> None:
    from qscope_jax.report.terminal import print_table

    rows = [
        (str(layer), str(one["feature"]), one["mean_a"], one["mean_b"], one["rate_a"], one["rate_b"])
        for layer, found in result["layers"].items()
        for one in found["features"]
    ]
    title = f"Largest differences by {config.by} (A: {_short(config.a)}, B: {_short(config.b)})"
    print_table(("layer", "feature", "mean A", "mean B", "rate A", "rate B"), rows, title=title)


def _short(text: str) -> str:
    return (text if len(text) <= 24 else text[:23] + "…").replace("\n", " ")
