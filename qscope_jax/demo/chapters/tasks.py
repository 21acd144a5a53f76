"""Chapter: which benchmarks say the same, by the features they light up, beside what the model's own checkpoints scored on them."""

from dataclasses import asdict

import numpy as np
from scipy.stats import rankdata

from qscope_jax.demo.embedded import TINY
from qscope_jax.demo.recipe import SCORES
from qscope_jax.demo.task_scores import CheckpointScores, read_scores
from qscope_jax.demo.tasks import tasks
from qscope_jax.demo.tour import Chapter, Check, Tour
from qscope_jax.features.benchmarks.benchmark_advice import advise
from qscope_jax.features.benchmarks.benchmark_clustering import cluster
from qscope_jax.features.benchmarks.benchmark_footprint import Footprint, footprint, overlap_min_matrix
from qscope_jax.features.benchmarks.benchmark_performance import Similarity, partial_correlation, performance_redundancy
from qscope_jax.features.benchmarks.correlation import correlate, correlate_pairs, pearson, spearman
from qscope_jax.features.store.last_tokens import read_last_tokens
from qscope_jax.report.figures import heat_map
from qscope_jax.report.page import Page

TITLE = "Compare benchmarks without running them"
# R(D) from so many random subsets of each size.
SUBSETS = 200


def run(tour: Tour) -> Chapter:
    """Footprints of the tasks from last tokens at the middle layer; redundancy by features against redundancy by scores."""
    sae = tour.saes[len(tour.saes) // 2]
    scores = read_scores(TINY / SCORES)
    names, families = [task.name for task in tasks()], np.array([task.family for task in tasks()])
    footprints = _footprints(tour)
    by_features = np.array([one.redundancy for one in footprints])
    by_scores = np.array([performance_redundancy(scores.correct[name], subsets=SUBSETS).value for name in names])
    sizes, askers = np.array([float(one.samples) for one in footprints]), np.array([float(task.askers) for task in tasks()])
    overlap = overlap_min_matrix(footprints)
    rho = correlate(by_features, by_scores)["spearman"]
    by_size = spearman(sizes, by_scores)
    beside_size = _given(by_features, by_scores, sizes)
    same = families[:, None] == families[None, :]
    inside = float(overlap[same & ~np.eye(len(names), dtype=bool)].mean())
    across = float(overlap[~same].mean())
    similarity = _similarity(scores, names)
    pairs = correlate_pairs(overlap, similarity.values)["spearman"]
    suite = advise(footprints, similarity)
    checks = [
        # Where size alone orders the tasks as well, whoever reads the number must know it.
        Check(f"Spearman of R-hat with redundancy by scores (of size alone {by_size:.2f})", rho.value, "at least 0.80", bool(rho.value >= 0.8)),
        Check("overlap_min inside families / across", inside / across, "over 1", bool(inside > across)),
    ]
    built = [spearman(askers, by_features), spearman(askers, by_scores)]
    summary = (
        f"Twelve tasks in five families, {int(sizes.sum())} samples in all: 6 to 40 questions a task, each asked by 40 people to one. R-hat, "
        f"from the last tokens' features at layer {sae.layer} alone, is to order them as redundancy by the scores of {len(scores.steps)} "
        f"checkpoints does: Spearman {rho.value:.2f} (95 % interval {rho.low:.2f} to {rho.high:.2f}). With how many ask each question R-hat "
        f"correlates at {built[0]:.2f}, and redundancy by scores at {built[1]:.2f}. The number of samples by itself gives "
        f"{by_size:.2f}{' and so does as well as R-hat' if by_size >= rho.value else ''}; with size taken out of both ranks, {beside_size:.2f} is "
        f"left. Tasks of a family share {inside:.0%} of the smaller footprint in the mean, others {across:.0%}; over pairs, overlap and similarity "
        f"of scores correlate at {pairs.value:.2f} ({pairs.low:.2f} to {pairs.high:.2f}). Advice: keep {len(suite.names('keep'))}, "
        f"merge {len(suite.names('merge'))}, drop {len(suite.names('drop'))}."
    )
    final = {name: float(scores.correct[name][-1].mean()) for name in names}
    columns = ("task", "family", "samples", "askers", "features", "R-hat", "redundancy by scores", "accuracy")
    rows = [
        (task.name, task.family, one.samples, task.askers, one.size, one.redundancy, by, final[task.name])
        for task, one, by in zip(tasks(), footprints, by_scores, strict=True)
    ]

    def draw(page: Page) -> None:
        page.table(columns, rows, caption="Tasks; accuracy is that of the last checkpoint")
        order = list(cluster(overlap).order)
        labels = [names[i] for i in order]
        page.figure(heat_map(labels, labels, overlap[np.ix_(order, order)], title="Share of the smaller footprint that both tasks light up"))
        said = [(one.benchmark, one.action, one.partner or "", "; ".join(one.reasons)) for one in suite.advice]
        page.table(("task", "advice", "beside", "why"), said, caption="What to keep, merge or drop")

    data = {
        "tasks": [dict(zip(columns, row, strict=True)) for row in rows],
        "spearman": asdict(rho),
        "spearman_of_askers": built,
        "spearman_of_size": by_size,
        "spearman_given_size": beside_size,
        "overlap_min": overlap,
        "overlap_and_similarity": asdict(pairs),
        "advice": [asdict(one) for one in suite.advice],
    }
    return Chapter(TITLE, summary, checks, data, draw)


def _footprints(tour: Tour) -> list[Footprint]:
    """One for each task, from one reading of all prompts."""
    sae = tour.saes[len(tour.saes) // 2]
    last = read_last_tokens(tour.model, [sae], [sample.prompt for task in tasks() for sample in task.samples], batch_size=64)[sae.layer]
    ends = np.cumsum([0, *(len(task.samples) for task in tasks())])
    return [footprint(task.name, last[start:end]) for task, start, end in zip(tasks(), ends[:-1], ends[1:], strict=True)]


def _similarity(scores: CheckpointScores, names: list[str]) -> Similarity:
    accuracy_CB = np.stack([scores.correct[name].mean(axis=1) for name in names], axis=1)
    values = np.array([[pearson(accuracy_CB[:, i], accuracy_CB[:, j]) for j in range(len(names))] for i in range(len(names))])
    return Similarity(tuple(names), values, np.full(values.shape, len(scores.steps)))


def _given(x: np.ndarray, y: np.ndarray, control: np.ndarray) -> float:
    """Spearman's rho of x and y with the ranks of a third variable taken out."""
    a, b, c = rankdata(x), rankdata(y), rankdata(control)
    return partial_correlation(pearson(a, b), pearson(a, c), pearson(b, c))
