"""Chapter: which features a small data set leaves dark, and texts written to light them."""

from collections.abc import Mapping, Sequence

import numpy as np

from qscope_jax.demo.corpus import LANGUAGES, sentences
from qscope_jax.demo.tour import Chapter, Check, Tour
from qscope_jax.features.coverage import coverage
from qscope_jax.features.steered_writer import SteeredWriter
from qscope_jax.features.steering import residual_norms
from qscope_jax.features.synthesis import SynthesisConfig, synthesize
from qscope_jax.features.synthesis_baselines import natural_sampling, random_synthesis, synthesis_curve
from qscope_jax.features.targets import alive_targets
from qscope_jax.features.text_features import TextFeatures
from qscope_jax.features.text_reading import read_texts
from qscope_jax.report.figures import curves
from qscope_jax.report.page import Page

TITLE = "Find what a data set misses, and write it"
TARGETS, SEED_TEXTS = 128, 24
# Every text fires most of a dictionary this small a little, so that a target counts as fired from half its largest activation on.
STRENGTH, LEAST_TEXTS = 0.5, 3
CONFIG = SynthesisConfig(attempts=16, at_once=64)
_EVERY = 4


def run(tour: Tour) -> Chapter:
    """Targets from natural sentences, those that a small English set misses, and texts for them beside two baselines at equal budget."""
    sae = tour.saes[len(tour.saes) // 2]

    def read(texts: Sequence[str]) -> Mapping[int, TextFeatures]:
        return {layer: reading.features for layer, reading in read_texts(tour.model, [sae], texts).items()}

    pool = [line for code in LANGUAGES for line in sentences(code)[::_EVERY]]
    tables = read(pool)
    inventory = alive_targets(tables, least=LEAST_TEXTS, strength=STRENGTH)
    seed_set = sentences("en")[1:: max(len(sentences("en")) // SEED_TEXTS, 1)][:SEED_TEXTS]  # fmt: skip
    before = coverage(inventory, read(seed_set))
    missing = before.missing or inventory
    targets = [missing[i] for i in np.unique(np.linspace(0, len(missing) - 1, TARGETS).astype(int))]
    norms = residual_norms(tour.model, seed_set, [sae.layer])
    writer = SteeredWriter(tour.model, {sae.layer: sae}, norms, tour.prompts)
    made = synthesize(targets, writer, read, CONFIG)
    random, natural = random_synthesis(targets, writer, read, made.written), natural_sampling(targets, pool, tables)
    by_random, by_natural = random.coverage(made.written), natural.coverage(made.written)
    after = coverage(inventory, read([*seed_set, *(one.text for one in made.kept)])) if made.kept else before
    checks = [
        Check("targets that synthesis covers", made.coverage, "at least 0.99", made.coverage >= 0.99),
        Check("the same, random synthesis at equal budget", by_random, "less", by_random < made.coverage),
    ]
    summary = (
        f"{len(inventory)} features of layer {sae.layer} fire in natural sentences of the six languages; {len(seed_set)} English sentences light "
        f"{before.share:.0%} of them. For {len(targets)} of the others the model itself writes, steered by each one's direction, and what does not "
        f"fire its own target is thrown away: {made.written} texts written, {len(made.kept)} kept, {made.coverage:.1%} of the targets covered. "
        f"As many texts of the unsteered model cover {by_random:.1%}, natural sentences {by_natural:.1%}. With the texts that were kept, the "
        f"English set lights {after.share:.0%} of all features."
    )

    def draw(page: Page) -> None:
        budgets = sorted({int(b) for b in np.geomspace(1, made.written, 24)})
        written = synthesis_curve(made) / len(targets)
        lines = {"feature-driven": [float(written[b]) for b in budgets]}
        lines |= {one.name: [one.coverage(b) for b in budgets] for one in (random, natural)}
        page.figure(curves(budgets, lines, title="Coverage of the targets", x_title="texts written", y_title="share", log_x=True))
        page.table(("target", "text that fires it"), [(one.key, one.text) for one in made.kept[:12]], caption="Some of the texts that were kept")

    data = {
        "layer": sae.layer,
        "inventory": len(inventory),
        "covered_before": before.share,
        "covered_after": after.share,
        "targets": [target.feature for target in targets],
        "written": made.written,
        "kept": len(made.kept),
        "coverage": {"feature-driven": made.coverage, "random": by_random, "natural": by_natural},
        "missed": [target.feature for target in made.missed],
    }
    return Chapter(TITLE, summary, checks, data, draw)
