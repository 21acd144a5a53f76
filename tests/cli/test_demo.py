from pathlib import Path

from qscope_jax.demo.tour import Check


def test_the_tour_gets_the_text_and_the_folder(qscope, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("qscope_jax.demo.tour.make_tour", lambda text: seen.append(text) or "tour")
    monkeypatch.setattr("qscope_jax.demo.tour.run_tour", lambda tour, out: seen.append((tour, out)) or [Check("a", 1.0, "at least 0", True)])
    assert qscope("demo", "--text", "my.txt", "--out", tmp_path / "tour").status == 0
    assert seen == ["my.txt", ("tour", Path(tmp_path / "tour"))]
    assert qscope("demo").status == 0 and seen[2:] == [None, ("tour", Path("runs/demo"))]


def test_a_folder_that_cannot_be_written_is_refused_before_the_tour(refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused("demo", "--out", tmp_path / "file/tour")


def test_a_missing_text_is_refused(refused, tmp_path):
    assert "no such file" in refused("demo", "--text", "none.txt", "--out", tmp_path / "tour")
