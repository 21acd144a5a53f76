import json

import pytest

from qscope_jax.data.files import plain
from qscope_jax.demo.chapters import repetition
from qscope_jax.report.page import Page


@pytest.fixture(scope="module")
def chapter(with_saes):
    return repetition.run(with_saes)


def test_both_arms_are_measured_before_and_after(chapter):
    data = chapter.data
    arms = [data[name] for name in ("DAPO", "DAPO with steered negatives")]
    assert all(set(arm) == {"right", "open", "prone"} and all(len(shares) == 2 for shares in arm.values()) for arm in arms)
    assert arms[0]["right"][0] == arms[1]["right"][0], "both begin at the same model"
    gain, ratio = chapter.checks
    assert gain.value == pytest.approx(arms[0]["right"][1]["value"] - arms[0]["right"][0]["value"])
    if not arms[0]["prone"][1]["value"]:
        assert not ratio.met
    json.dumps(plain(data))


def test_the_page_has_the_comparison_and_the_curve(chapter):
    page = Page("tour")
    chapter.draw(page)
    assert "repeating: prone questions" in page.html() and "Reward of answers that are not steered" in page.html()
