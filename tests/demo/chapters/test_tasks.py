import json
from collections.abc import Iterator

import numpy as np
import pytest

from qscope_jax.data.files import plain
from qscope_jax.demo.chapters import tasks as chapter_module
from qscope_jax.demo.task_scores import CheckpointScores
from qscope_jax.demo.tasks import tasks
from qscope_jax.features.benchmarks.benchmark_performance import performance_redundancy
from qscope_jax.report.page import Page

NAMES = [task.name for task in tasks()]


@pytest.fixture(scope="module")
def scores() -> Iterator[CheckpointScores]:
    """Eight checkpoints that get better at random, in place of the embedded model's; few subsets."""
    rng = np.random.default_rng(0)
    correct = {task.name: rng.random((8, len(task.samples))) < np.linspace(0.2, 0.9, 8)[:, None] for task in tasks()}
    found = CheckpointScores(np.arange(1, 9) * 10, np.linspace(7, 5, 8), correct)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chapter_module, "read_scores", lambda path: found)
        patch.setattr(chapter_module, "SUBSETS", 10)
        yield found


@pytest.fixture(scope="module")
def chapter(with_saes, scores):
    return chapter_module.run(with_saes)


def test_each_task_has_its_redundancy_by_features_and_by_scores(chapter, scores):
    rows = {row["task"]: row for row in chapter.data["tasks"]}
    assert list(rows) == NAMES
    for task in tasks():
        row = rows[task.name]
        assert row["samples"] == len(task.samples) and row["askers"] == task.askers and 0 < row["features"] <= 64
        assert row["redundancy by scores"] == performance_redundancy(scores.correct[task.name], subsets=10).value
        assert row["accuracy"] == scores.correct[task.name][-1].mean()
    json.dumps(plain(chapter.data))


def test_the_checks_are_met_only_as_far_as_the_numbers_go(chapter):
    rho, families = chapter.checks
    assert rho.value == chapter.data["spearman"]["value"] and rho.met == (rho.value >= 0.8)
    assert families.met == (families.value > 1)
    # The number never stands without what the sizes alone give.
    alone = f"{chapter.data['spearman_of_size']:.2f}"
    assert f"of size alone {alone}" in rho.name and f"number of samples by itself gives {alone}" in chapter.summary


def test_ranks_that_are_those_of_size_leave_nothing_once_size_is_taken_out():
    size, other = np.arange(12.0), np.random.default_rng(0).permutation(12).astype(float)
    assert np.isnan(chapter_module._given(np.exp(size), other, size))
    assert chapter_module._given(other, other**3, size) == pytest.approx(1)


def test_the_page_shows_overlaps_and_advice_for_every_task(chapter):
    page = Page("tour")
    chapter.draw(page)
    text = page.html()
    assert all(name in text for name in NAMES) and {one["action"] for one in chapter.data["advice"]} <= {"keep", "merge", "drop"}
    assert len(chapter.data["advice"]) == 12
