"""`qscope models`: which backbones there are, which SAEs explain them, and what they take."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from qscope_jax.cli.results import check_writable, write_result
from qscope_jax.cli.sources import TINY

if TYPE_CHECKING:
    from qscope_jax.models.catalogue import ModelSize

_COLUMNS = ("model", "layers", "parameters", "weights", "cache", "SAEs")
_TITLE = "Parameters (1e9), weights in bfloat16 (GB), cache (kB a token), SAEs as width/k"


@dataclass(frozen=True, kw_only=True)
class Config:
    """List the published models that run here, their SAEs and sizes, or the size of one model of yours."""

    model: str = ""
    """Count this folder or hub id instead (`tiny` is the embedded model); only its config is read."""
    out: str = ""
    """JSON file for the table."""


def run(config: Config) -> dict[str, Any]:
    """Print the table; returns its rows."""
    from qscope_jax.models.catalogue import published_sizes
    from qscope_jax.report.terminal import print_table

    check_writable(config.out)
    sizes = {config.model: _own(config.model)} if config.model else published_sizes()
    saes = _released_saes()
    print_table(_COLUMNS, [_cells(name, size, saes.get(name, [])) for name, size in sizes.items()], title=_TITLE)
    models = [{"name": name, "size": asdict(size), "saes": saes.get(name, [])} for name, size in sizes.items()]
    result = {"models": models}
    write_result(config.out, "models", config, result)
    return result


def _own(name: str) -> "ModelSize":
    from qscope_jax.data.hub import open_source
    from qscope_jax.models.catalogue import model_size
    from qscope_jax.models.weights import read_config

    if name == TINY:
        from qscope_jax.demo.embedded import TINY as EMBEDDED

        return model_size(name, read_config(open_source(EMBEDDED)))
    return model_size(name, read_config(open_source(name)))


def _released_saes() -> dict[str, list[str]]:
    """Repositories of the released groups of SAEs by the backbone's name, base or not."""
    from qscope_jax.sae.formats.qwen_scope import RELEASES

    groups: dict[str, list[str]] = {}
    for release in RELEASES:
        groups.setdefault(release.backbone.removesuffix("-Base"), []).append(release.repository)
    return groups


def _cells(name: str, size: "ModelSize", saes: list[str]) -> tuple[Any, ...]:
    groups = ", ".join(repository.rsplit("-", 2)[-2] + "/" + repository.rsplit("_", 1)[-1] for repository in saes) or None
    amounts = (size.parameters / 1e9, size.bytes_bfloat16 / 1e9, size.cache_bytes_per_token / 1e3)
    return (name, size.num_layers, *amounts, groups)
