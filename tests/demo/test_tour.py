import html
import io
import json

import pytest
from rich.console import Console

from qscope_jax.demo.chapters import CHAPTERS
from qscope_jax.demo.tour import make_tour, run_tour
from qscope_jax.errors import SourceError
from qscope_jax.sae.layer_sae import load_sae


def test_the_tour_writes_a_page_its_numbers_and_the_saes(tour, tmp_path):
    # As many rows as the prompts that choose strengths: they share a program.
    tour.prompts = tour.prompts[:2]
    screen, out = io.StringIO(), tmp_path / "new" / "out"
    checks = run_tour(tour, out, Console(file=screen, width=200))
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    names = [chapter.__name__.rsplit(".", 1)[-1] for chapter in CHAPTERS]
    assert list(results) == names
    assert [check for name in names for check in results[name]["checks"]] == [vars(check) for check in checks]
    assert len(checks) >= 8 and {type(check.met) for check in checks} == {bool}
    page = (out / "report.html").read_text(encoding="utf-8")
    told = [chapter.TITLE for chapter in CHAPTERS]
    assert all(text in screen.getvalue() for text in (*told, "SHORT" if not all(check.met for check in checks) else "met"))
    assert all(html.escape(text) in page for text in (*told, *(check.name for check in checks)))
    for layer in (0, 1):
        sae = load_sae(out / "saes", layer)
        assert (sae.num_features, sae.k, sae.layer) == (64, 4, layer)


def test_a_readers_own_text_is_trained_on_explained_and_continued(tour, tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("A short line.\n\nThis is a longer sentence about steering a small model with features.\n\n短句。\n", encoding="utf-8")
    own = make_tour(str(path), tour.settings)
    assert own.own_text and not tour.own_text
    assert own.sentence == "This is a longer sentence about steering a small model with features."
    assert own.prompts[0] == "This is a longer" and len(own.prompts) == len(tour.prompts) > 4
    assert tour.prompts[0] in own.prompts
    added = own.documents[len(tour.documents) :]
    assert own.documents[: len(tour.documents)] == tour.documents and "短句。" in added
    assert 0.05 * len(tour.documents) < len(added) <= 0.1 * len(tour.documents)
    assert own.held_out == tour.held_out


def test_a_text_that_is_not_there_is_said_so(tour):
    with pytest.raises(SourceError, match=r"nothing\.txt: no such file"):
        make_tour("nothing.txt", tour.settings)
