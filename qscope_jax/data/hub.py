"""Files from a local folder or from the Hugging Face hub, behind one interface.

Hub access goes through `huggingface_hub`, so its cache, tokens, mirrors and offline mode (`HF_HUB_OFFLINE=1`) all apply.
"""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from qscope_jax.errors import SourceError, UnsafeFileError


@dataclass(frozen=True)
class Source:
    """A folder of files, local or on the hub; a hub file is downloaded when its path is asked for, not before.

    Attributes:
        name: What the user wrote: a folder or `owner/repository`.
        revision: Branch, tag or commit on the hub; ignored for a folder.
        folder: The local folder, or None for a hub repository.
    """

    name: str
    revision: str | None = None
    folder: Path | None = None

    def path(self, file: str) -> Path:
        """Local path of `file`, downloaded first where it lives on the hub.

        Raises:
            SourceError: there is no such file, or the hub cannot be reached and the cache does not hold it.
            UnsafeFileError: `file`, which may come from an index file, leads out of the folder.
        """
        parts = PurePosixPath(file)
        if parts.is_absolute() or ".." in parts.parts:
            raise UnsafeFileError(f"{self.name}: asks for the file {file}, which lies outside it; do not use this checkpoint")
        if self.folder is not None:
            local = self.folder / file
            if not local.is_file():
                raise SourceError(f"{self.folder}: has no file {file}; the folder is not a complete checkpoint of the expected kind")
            return local
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

        try:
            return Path(hf_hub_download(self.name, file, revision=self.revision))
        except LocalEntryNotFoundError as error:
            raise SourceError(f"{self.name}: {file} is neither in the local cache nor reachable; connect to the hub or give a folder") from error
        except EntryNotFoundError as error:
            raise SourceError(f"{self.name}: the repository has no file {file}") from error
        except RepositoryNotFoundError as error:
            raise SourceError(f"{self.name}: no such folder, and no such repository on the hub (or no access to it)") from error
        except RevisionNotFoundError as error:
            raise SourceError(f"{self.name}: the repository has no revision {self.revision}; give a branch, tag or commit of it") from error
        except Exception as error:  # a download can also fail with the errors of the hub's HTTP library, whose names vary with its version
            raise SourceError(f"{self.name}: {file} could not be downloaded ({type(error).__name__}); try again or give a folder") from error

    def has(self, file: str) -> bool:
        """Whether `file` exists; a hub repository is asked, and the file downloaded, unless the cache holds it.

        Raises:
            SourceError: the repository does not exist, or a download failed, so that nobody knows. (Offline, what is not cached is not there.)
        """
        if self.folder is not None:
            return (self.folder / file).is_file()
        from huggingface_hub.errors import EntryNotFoundError

        try:
            self.path(file)
        except SourceError as error:
            if isinstance(error.__cause__, EntryNotFoundError):
                return False
            raise
        return True


def open_source(name: str | Path, revision: str | None = None) -> Source:
    """Tell a local folder from a hub id.

    Raises:
        SourceError: `name` is neither an existing folder nor of the form `owner/repository`.
    """
    text = str(name)
    if not text.strip():
        raise SourceError("the name of the source is empty; give a folder or a hub id (owner/name)")
    folder = Path(text).expanduser()
    if folder.is_dir():
        return Source(text, None, folder)
    if folder.exists():
        raise SourceError(f"{text}: is a file, expected a folder or a hub id (owner/name)")
    if not _is_repository(text):
        raise SourceError(f"{text}: no such folder, and not a hub id of the form owner/name")
    return Source(text, revision, None)


def _is_repository(text: str) -> bool:
    if text.count("/") != 1:
        return False
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True
