from pathlib import Path

import pytest

from qscope_jax.cli.benchmarks import Config
from qscope_jax.cli.options import parse
from qscope_jax.data.benchmark_adapters import find_adapter
from qscope_jax.sae.formats.qwen_scope import RELEASES

FOLDER = Path(__file__).parents[2] / "configs" / "benchmarks"
FILES = sorted(FOLDER.glob("*.yaml"))


def read(path: Path) -> Config:
    return parse("benchmarks", Config, ["--config", str(path)])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_benchmarks_of_a_config_have_public_data_sets(path):
    names = read(path).benchmarks
    adapters = [find_adapter(name) for name in names if name != "tiny"]
    assert len(set(names)) == len(names) and all(adapter is not None and adapter.sources for adapter in adapters)


@pytest.mark.parametrize("path", [path for path in FILES if path.stem != "tiny"], ids=lambda path: path.stem)
def test_the_middle_layer_of_the_released_saes_with_fifty_active_features_is_among_those_read(path):
    config = read(path)
    (release,) = [one for one in RELEASES if one.repository == config.sae]
    assert release.k == 50 and config.model == f"Qwen/{release.backbone}" and release.num_layers // 2 in config.layers


def test_the_pair_study_and_all_on_the_hub_are_there():
    assert len(read(FOLDER / "qwen3_1.7b.yaml").benchmarks) == 8 and len(read(FOLDER / "qwen3_1.7b_layers.yaml").benchmarks) == 16
