import pytest
from huggingface_hub import constants

from qscope_jax.data.hub import Source, open_source
from qscope_jax.errors import SourceError
from qscope_jax.sae.formats.source_files import source_files


def test_a_folder_is_listed_three_folders_deep_and_without_hidden_folders(tmp_path):
    for name in ("b.pt", "a/b/c/d.npz", "a/b/c/d/too_deep", ".cache/x", "a/z"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert source_files(open_source(tmp_path)) == ["a/b/c/d.npz", "a/z", "b.pt"]


def test_a_repository_is_listed_without_downloading(monkeypatch):
    asked = []

    def listing(repository, revision=None):
        asked.append((repository, revision))
        return ["b", "a"]

    monkeypatch.setattr("huggingface_hub.list_repo_files", listing)
    assert source_files(Source("someone/sae", "v1")) == ["a", "b"]
    assert asked == [("someone/sae", "v1")]


def test_an_unreachable_hub_is_one_clear_error(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match=r"^someone/sae: its files cannot be listed"):
        source_files(Source("someone/sae"))
