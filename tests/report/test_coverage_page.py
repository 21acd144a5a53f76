import numpy as np
import pytest
from scipy.sparse import csc_array

from qscope_jax.features.synthesis.coverage import Coverage
from qscope_jax.features.synthesis.synthesis import Candidate, Synthesis
from qscope_jax.features.synthesis.synthesis_baselines import Baseline
from qscope_jax.features.synthesis.targets import Target
from qscope_jax.report.coverage_page import write_coverage_page, write_synthesis_page

TARGETS = (Target(0, 1, "rude <words>", 0.75), Target(0, 2), Target(3, 4))


@pytest.fixture
def found() -> Coverage:
    return Coverage(TARGETS, np.array([0, 2, 9]), np.array([0, 1.5, 3], np.float32), 12)


def test_a_page_says_what_is_covered_missing_and_weak(found, tmp_path):
    page = write_coverage_page(tmp_path / "p.html", found, weak=5, subtitle="12 texts").read_text()
    assert "2 of 3 targets are fired by at least one of 12 texts: 66.67%" in page
    assert "1 are missing, and 1 are fired by fewer than 5 texts" in page
    assert "rude &lt;words&gt;" in page and "Weakly covered targets" in page and "Share of targets covered" in page


def test_a_page_shows_what_was_made_beside_the_baselines(found, tmp_path):
    candidates = [
        Candidate(0, 1, 0, "vanilla", "missed it", 0.0, False, False),
        Candidate(0, 1, 1, "vanilla", "a rude text", 2.0, True, True, ("0/1",)),
    ]
    result = Synthesis(TARGETS[:2], tuple(candidates), ("0/2 attempt 0: HTTP 500",), 0)
    baseline = Baseline("random synthesis", ("a", "b"), csc_array(np.array([[False, True], [False, False]])))
    page = write_synthesis_page(tmp_path / "p.html", found, result, [baseline], weak=2).read_text()
    assert "2 texts were written for 2 targets; 1 fire their own target and were kept" in page
    assert "cover 50.00%. 1 requests were not answered" in page
    assert "a rude text" in page and "missed it" not in page and "random synthesis" in page and "Targets without a text" in page


def test_nothing_made_and_nothing_covered_still_make_a_page(tmp_path):
    none = Coverage(TARGETS[:1], np.array([0]), np.zeros(1, np.float32), 0)
    page = write_synthesis_page(tmp_path / "p.html", none, Synthesis(TARGETS[:1], (), (), 0), [], weak=2).read_text()
    assert "0 texts were written for 1 targets" in page
