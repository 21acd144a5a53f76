"""Chapter: which features a small data set leaves dark, and texts written to light them."""

from collections.abc import Mapping, Sequence

import numpy as np

from qscope_jax.demo.corpus import LANGUAGES, sentences
from qscope_jax.demo.tour import Chapter, Check, Tour
from qscope_jax.features.classify.text_reading import ReadingConfig, read_texts
from qscope_jax.features.steering import residual_norms
from qscope_jax.features.synthesis.coverage import coverage
from qscope_jax.features.synthesis.steered_writer import SteeredWriter
from qscope_jax.features.synthesis.synthesis import SynthesisConfig, synthesize
from qscope_jax.features.synthesis.synthesis_baselines import natural_sampling, random_synthesis, synthesis_curve
from qscope_jax.features.synthesis.targets import Target, alive_targets
from qscope_jax.features.text_features import TextFeatures
from qscope_jax.report.figures import curves
from qscope_jax.report.page import Page

TITLE = "Find what a data set misses, and write it"
TARGETS, SEED_TEXTS = 100, 24
# Every text fires most of a dictionary this small a little, so that a target counts as fired from half its largest activation on. What more
# than a twentieth of natural sentences fire would be covered by any few texts.
STRENGTH, LEAST_TEXTS, HIGHEST_RATE = 0.5, 3, 0.05
# Targets have three doses times eight contexts to themselves. Those that no kept text fires then are the hard ones, which one text in a hundred
# fires or fewer: seven more rounds find four in five of such.
CONFIG = SynthesisConfig(attempts=24, attempts_uncovered=192, at_once=64)
_READING = ReadingConfig(batch_size=64)
_DOSES, _CONTEXTS, _TOKENS = (0.5, 0.25, 1.0), 8, 16
_ROWS = 16
_EVERY = 4


def run(tour: Tour) -> Chapter:
    """Targets from natural sentences, those that a small English set misses, and texts for them beside two baselines at equal budget."""
    sae = tour.saes[len(tour.saes) // 2]

    def read(texts: Sequence[str]) -> Mapping[int, TextFeatures]:
        return {layer: reading.features for layer, reading in read_texts(tour.model, [sae], texts, _READING).items()}

    pool = [line for code in LANGUAGES for line in sentences(code)[::_EVERY]]
    tables = read(pool)
    inventory = alive_targets(tables, least=LEAST_TEXTS, highest_rate=HIGHEST_RATE, strength=STRENGTH)
    seed_set = sentences("en")[1 :: len(sentences("en")) // SEED_TEXTS][:SEED_TEXTS]
    before = coverage(inventory, read(seed_set))
    missing = before.missing or inventory
    targets = [missing[i] for i in np.unique(np.linspace(0, len(missing) - 1, TARGETS).astype(int))]
    writer = SteeredWriter(
        tour.model,
        {sae.layer: sae},
        residual_norms(tour.model, seed_set, [sae.layer]),
        _beginnings(),
        contexts=_contexts(targets, pool, tables[sae.layer]),
        doses=_DOSES,
        max_tokens=_TOKENS,
        batch_size=_ROWS,
        whole_batches=True,
    )
    made = synthesize(targets, writer, read, CONFIG)
    baselines = {"random": random_synthesis(targets, writer, read, made.written), "natural": natural_sampling(targets, pool, tables)}
    # A data set is as large as the texts in it; what was thrown away was paid for as well, so that both sizes are reported.
    shares = {name: (one.coverage(len(made.kept)), one.coverage(made.written)) for name, one in baselines.items()}
    after = coverage(inventory, read([*seed_set, *(one.text for one in made.kept)]))
    as_large = shares["random"][0]
    fired = {key for one in made.kept for key in one.fires}
    checks = [
        Check("targets that synthesis covers", made.coverage, "at least 0.99", made.coverage >= 0.99),
        Check("the same, as many texts of random synthesis", as_large, f"under {made.coverage:.3f}", as_large < made.coverage),
    ]
    summary = (
        f"{len(inventory)} features of layer {sae.layer} fire seldom in natural sentences of the six languages; {len(seed_set)} English sentences "
        f"light {before.share:.0%} of them. For {len(targets)} of the others the model writes itself, steered by each one's direction, and what does "
        f"not fire its own target is thrown away: {made.written} texts written, {len(made.kept)} kept, {made.coverage:.1%} of the targets covered. "
        f"{len(made.kept)} texts of the unsteered model cover {as_large:.1%}, natural sentences {shares['natural'][0]:.1%}; all {made.written} would "
        f"cover {shares['random'][1]:.1%} and {shares['natural'][1]:.1%}. With the texts that were kept, the English set lights {after.share:.0%} of "
        f"those features."
    )

    def draw(page: Page) -> None:
        budgets = sorted({int(b) for b in np.geomspace(1, made.written, 24)})
        written = synthesis_curve(made) / len(targets)
        lines = {"feature-driven": [float(written[b]) for b in budgets]}
        lines |= {one.name: [one.coverage(b) for b in budgets] for one in baselines.values()}
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
        "coverage": made.coverage,
        "coverage_of_as_many_texts": {name: share for name, (share, _) in shares.items()},
        "coverage_of_as_many_written": {name: share for name, (_, share) in shares.items()},
        "missed": [target.feature for target in made.missed],
        "uncovered": [target.feature for target in targets if target.key not in fired],
    }
    return Chapter(TITLE, summary, checks, data, draw)


def _beginnings() -> list[str]:
    """First words of held-out sentences in all languages, for texts about anything."""
    lines = {code: sentences(code, held_out=True)[::8] for code in LANGUAGES}
    return [line[:4] if code == "zh" else " ".join(line.split()[:3]) for code, chosen in lines.items() for line in chosen]


def _contexts(targets: Sequence[Target], pool: Sequence[str], features: TextFeatures) -> dict[str, list[str]]:
    """For each target the sentences of the pool in which it is strongest."""
    maxima_BT = features.maxima[:, [target.feature for target in targets]].toarray()
    order = np.argsort(-maxima_BT, axis=0, kind="stable")[:_CONTEXTS]
    return {target.key: [pool[int(row)] for row in order[:, place]] for place, target in enumerate(targets)}
