import json

import pytest

from qscope_jax.data.files import plain
from qscope_jax.demo.chapters import switching
from qscope_jax.report.page import Page


@pytest.fixture(scope="module")
def chapter(with_saes):
    return switching.run(with_saes)


def test_both_arms_are_counted_and_compared(chapter):
    data = chapter.data
    assert set(data["switched"]) == set(data["loss"]) == {"plain fine-tuning", "SASFT"} and data["layers"] == (0, 1)
    ratio, loss = chapter.checks
    plain_share, sasft = (data["switched"][name]["value"] for name in ("plain fine-tuning", "SASFT"))
    assert ratio.value == pytest.approx(sasft / plain_share if plain_share else 0.0)
    assert ratio.met == (plain_share > 0 and ratio.value <= 0.5)
    assert loss.value == pytest.approx(data["loss"]["SASFT"] / data["loss"]["plain fine-tuning"] - 1)
    json.dumps(plain(data))


def test_the_page_has_the_comparison(chapter):
    page = Page("tour")
    chapter.draw(page)
    assert "loss on clean text" in page.html()
