"""Which files a folder or a hub repository holds, without downloading any of them."""

import os

from qscope_jax.data.hub import Source
from qscope_jax.errors import SourceError

_DEPTH = 3


def source_files(source: Source) -> list[str]:
    """Names of the files in a source, with `/` between folders, sorted; a local folder is searched three folders deep.

    Raises:
        SourceError: the hub cannot be reached, or does not have the repository.
    """
    if source.folder is not None:
        found = []
        for root, folders, files in os.walk(source.folder):
            inner = os.path.relpath(root, source.folder)
            parts = () if inner == os.curdir else tuple(inner.split(os.sep))
            found += ["/".join((*parts, file)) for file in files]
            folders[:] = [folder for folder in folders if not folder.startswith(".")] if len(parts) < _DEPTH else []
        return sorted(found)
    from huggingface_hub import list_repo_files
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return sorted(list_repo_files(source.name, revision=source.revision))
    except RepositoryNotFoundError as error:
        raise SourceError(f"{source.name}: no such folder, and no such repository on the hub (or no access to it)") from error
    except Exception as error:  # the hub's HTTP library, whose errors pass through, has changed between its releases
        raise SourceError(f"{source.name}: its files cannot be listed ({type(error).__name__}); connect to the hub or give a local folder") from error
