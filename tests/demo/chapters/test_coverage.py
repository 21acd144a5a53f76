import json

import pytest

from qscope_jax.data.files import plain
from qscope_jax.demo.chapters import coverage
from qscope_jax.demo.corpus import LANGUAGES, sentences
from qscope_jax.report.page import Page


@pytest.fixture(scope="module")
def chapter(with_saes):
    return coverage.run(with_saes)


def test_what_is_kept_and_covered_is_counted(chapter):
    data = chapter.data
    assert 1 <= len(data["targets"]) <= coverage.TARGETS and data["kept"] <= data["written"] <= 3 * len(data["targets"])
    share, random = chapter.checks
    assert share.value == data["coverage"] and share.met == (share.value >= 0.99)
    assert random.value == data["coverage_of_as_many_texts"]["random"] and random.met == (random.value < share.value)
    assert len(data["uncovered"]) == round((1 - data["coverage"]) * len(data["targets"])) and set(data["uncovered"]) <= set(data["missed"])
    assert data["covered_after"] >= data["covered_before"]
    json.dumps(plain(data))


def test_more_texts_of_a_baseline_cover_no_less(chapter):
    for name in ("random", "natural"):
        assert chapter.data["coverage_of_as_many_texts"][name] <= chapter.data["coverage_of_as_many_written"][name] + 1e-12


def test_the_page_shows_texts_that_fired(chapter):
    page = Page("tour")
    chapter.draw(page)
    assert "Coverage of the targets" in page.html()


def test_the_control_begins_in_every_language(small_corpus):
    prompts = coverage._beginnings()
    for code in LANGUAGES:
        assert any(line.startswith(prompt) for prompt in prompts for line in sentences(code, held_out=True))
