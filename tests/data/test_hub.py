from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from qscope_jax.data.hub import Source, open_source
from qscope_jax.errors import SourceError, UnsafeFileError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def offline_cache(tmp_path, monkeypatch) -> Path:
    """The cache that `huggingface_hub` would have after downloading config.json and sub/weights.bin of owner/name."""
    repository = tmp_path / "hub" / "models--owner--name"
    snapshot = repository / "snapshots" / COMMIT
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "etag").write_text("{}")
    (snapshot / "sub").mkdir(parents=True)
    (snapshot / "config.json").symlink_to(Path("..", "..", "blobs", "etag"))
    (snapshot / "sub" / "weights.bin").write_bytes(b"\1\2")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return snapshot


@pytest.fixture
def failing_download(monkeypatch):
    """A hub whose every download ends with the given error."""

    def install(error: Exception) -> Source:
        def fail(*args, **keywords):
            raise error

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
        return open_source("owner/name", "v9")

    return install


def hub_error(kind: str) -> Exception:
    """An error of huggingface_hub without the HTTP response that its constructor wants."""
    error_class = getattr(errors, kind)
    return error_class.__new__(error_class)


def test_file_of_a_folder_is_found_in_place(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "config.json").write_text("{}")
    source = open_source(tmp_path, "a-branch")
    assert source.path("sub/config.json") == tmp_path / "sub" / "config.json"
    assert source.has("sub/config.json") and not source.has("config.json") and not source.has("sub")
    assert source.revision is None


def test_folder_wins_over_a_hub_id_of_the_same_name(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert open_source("owner/name").folder == Path("owner/name")


def test_home_folder_is_expanded(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_source("~/model").folder == tmp_path / "model"


def test_missing_file_of_a_folder_names_both(tmp_path):
    with pytest.raises(SourceError, match="has no file config.json") as caught:
        open_source(tmp_path).path("config.json")
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("file", ["../secret", "sub/../../secret", "/etc/passwd"])
def test_file_outside_the_folder_is_refused(tmp_path, file):
    (tmp_path / "secret").write_text("")
    (tmp_path / "model" / "sub").mkdir(parents=True)
    for source in (open_source(tmp_path / "model"), open_source("owner/name")):
        with pytest.raises(UnsafeFileError, match="outside"):
            source.path(file)


def test_cached_file_is_found_offline(offline_cache):
    source = open_source("owner/name")
    assert source.folder is None
    assert source.path("config.json") == offline_cache / "config.json"
    assert source.path("sub/weights.bin").read_bytes() == b"\1\2"
    assert source.has("config.json") and not source.has("model.safetensors")


def test_cached_file_is_found_by_commit(offline_cache):
    assert open_source("owner/name", COMMIT).path("config.json") == offline_cache / "config.json"


@pytest.mark.parametrize(("name", "revision"), [("owner/name", None), ("owner/other", None), ("owner/name", "v2")])
def test_what_is_not_cached_is_a_source_error_offline(offline_cache, name, revision):
    file = "config.json" if (name, revision) != ("owner/name", None) else "model.safetensors"
    with pytest.raises(SourceError, match=f"{name}: {file} is neither in the local cache nor reachable") as caught:
        open_source(name, revision).path(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["", " ", "just-a-name", "a/b/c", "./a", "../a", "/a/b", "a b/c", "owner/", "owner/-x", "owner/a--b", "owner/a.git"])
def test_what_is_neither_a_folder_nor_an_id_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError):
        open_source(name)


def test_file_in_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "model.bin").write_text("")
    with pytest.raises(SourceError, match="is a file, expected a folder"):
        open_source(tmp_path / "model.bin")


@pytest.mark.parametrize(
    ("kind", "complaint"),
    [
        ("RemoteEntryNotFoundError", "has no file config.json"),
        ("RepositoryNotFoundError", "no such repository"),
        ("GatedRepoError", "no access"),
        ("RevisionNotFoundError", "has no revision v9"),
        ("HfHubHTTPError", "could not be downloaded"),
    ],
)
def test_answers_of_the_hub_become_source_errors(failing_download, kind, complaint):
    with pytest.raises(SourceError, match=complaint):
        failing_download(hub_error(kind)).path("config.json")


def test_lost_connection_becomes_a_source_error(failing_download):
    class TimeoutWithoutResponseError(Exception):
        """As the HTTP library raises it in the middle of a download: no OSError."""

    with pytest.raises(SourceError, match="could not be downloaded .TimeoutWithoutResponseError."):
        failing_download(TimeoutWithoutResponseError()).path("config.json")


def test_failed_request_is_not_taken_for_a_missing_file(failing_download):
    assert not failing_download(hub_error("RemoteEntryNotFoundError")).has("config.json")
    with pytest.raises(SourceError, match="could not be downloaded"):
        failing_download(hub_error("HfHubHTTPError")).has("config.json")
    with pytest.raises(SourceError, match="no such repository"):
        failing_download(hub_error("RepositoryNotFoundError")).has("config.json")
