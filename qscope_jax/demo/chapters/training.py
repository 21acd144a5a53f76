"""Chapter: train an SAE for every layer, live, and measure them on held-out sentences."""

import numpy as np

from qscope_jax.demo.embedded import sae_training
from qscope_jax.demo.tour import Chapter, Check, Tour
from qscope_jax.report.figures import curves
from qscope_jax.report.page import Page
from qscope_jax.sae.metrics import evaluate_sae
from qscope_jax.training.loop import LoopConfig, train

TITLE = "Train a sparse autoencoder for every layer"
_SPLICED_TEXTS = 48


def run(tour: Tour) -> Chapter:
    """Train, then evaluate on sentences that neither model nor SAEs have seen."""
    settings, model = tour.settings, tour.model
    recipe = sae_training(model, tour.documents, settings)
    state = train(recipe, LoopConfig(steps=settings.steps))
    tour.saes = recipe.export(state)
    for sae, since_F in zip(tour.saes, np.asarray(state.tokens_since_fired), strict=True):
        tour.alive[sae.layer] = since_F < settings.dead_after_tokens
    metrics = evaluate_sae(model, tour.saes, tour.held_out, splice=False)
    spliced = evaluate_sae(model, tour.saes, tour.held_out[:: max(len(tour.held_out) // _SPLICED_TEXTS, 1)])
    rows = []
    for layer, values in metrics.items():
        values["dead_in_training"] = float(1 - tour.alive[layer].mean())
        values |= {name: value for name, value in spliced[layer].items() if name.startswith(("ce_", "kl_"))}
        rows.append(
            (layer, values["fvu"], values["l0"], values["cossim"], values["dead_in_training"], values["dead_fraction"], values["ce_loss_score"])
        )
    worst_fvu = max(values["fvu"] for values in metrics.values())
    worst_dead = max(values["dead_in_training"] for values in metrics.values())
    tokens = settings.steps * settings.batch_tokens
    summary = (
        f"{len(rows)} SAEs of {settings.num_features} features, {settings.k} active a token, saw {tokens:,} tokens each, all from one model pass. "
        f"On {int(next(iter(metrics.values()))['tokens']):,} tokens of held-out sentences they leave at most {worst_fvu:.1%} of the variance "
        f"unexplained; at most {worst_dead:.1%} of features were silent over the last {settings.dead_after_tokens:,} tokens of training."
    )
    columns = ("layer", "FVU", "L0", "cosine", "dead in training", "silent on held-out", "CE recovered")

    def draw(page: Page) -> None:
        page.table(columns, rows, caption="Held-out sentences; first tokens and outliers of the norm left out")
        layers = [row[0] for row in rows]
        page.figure(
            curves(
                layers, {"FVU": [r[1] for r in rows], "CE recovered": [r[6] for r in rows]}, title="Fidelity by layer", x_title="layer", y_title=""
            )
        )

    checks = [
        Check("held-out FVU, worst layer", worst_fvu, "at most 0.20", worst_fvu <= 0.20),
        Check("dead features, worst layer", worst_dead, "at most 0.05", worst_dead <= 0.05),
    ]
    return Chapter(TITLE, summary, checks, {"layers": metrics, "tokens": tokens}, draw)
