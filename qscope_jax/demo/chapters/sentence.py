"""Chapter: what one sentence lights up, layer by layer and token by token."""

from qscope_jax.demo.tour import Chapter, Tour
from qscope_jax.features.readout import read_features, token_texts
from qscope_jax.report.page import Page

TITLE = "What a sentence lights up"
_FEATURES = 3


def run(tour: Tour) -> Chapter:
    """Read one sentence through every layer's SAE."""
    readouts = read_features(tour.model, tour.saes, [tour.sentence])
    tokens = token_texts(tour.model, next(iter(readouts.values())).token_ids[0])
    strongest = {
        layer: [
            {"feature": feature, "mean": mean, "activations": readout.activation(0, feature).tolist()}
            for feature, mean in readout.top(0, _FEATURES, by="mean")
        ]
        for layer, readout in readouts.items()
    }
    middle = tour.model.config.num_layers // 2
    summary = f"“{tour.sentence}” becomes {len(tokens)} tokens. The first is read but not counted: its norm is no guide to meaning."
    if strongest[middle] and len(tokens) > 1:
        lead = strongest[middle][0]
        peak = tokens[max(range(1, len(tokens)), key=lambda t: lead["activations"][t])]
        summary += f" At layer {middle} the strongest feature is {lead['feature']}, highest on {peak.strip()!r}."

    def draw(page: Page) -> None:
        for layer, features in strongest.items():
            for item in features:
                page.tokens(tokens, item["activations"], label=f"layer {layer}, feature {item['feature']} (mean {item['mean']:.2f})")

    return Chapter(TITLE, summary, [], {"sentence": tour.sentence, "tokens": tokens, "strongest": strongest}, draw)
