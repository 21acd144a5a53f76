from pathlib import Path

import pytest

from qscope_jax.cli.cover import Config
from qscope_jax.cli.coverage_sources import CoverageOptions
from qscope_jax.cli.options import parse
from qscope_jax.cli.synthesize import RunConfig
from qscope_jax.sae.formats.qwen_scope import RELEASES

FOLDER = Path(__file__).parents[2] / "configs"
NAMES = ["qwen3_8b_layer29", "tiny"]


def read(name: str) -> tuple[Config, RunConfig]:
    cover = parse("cover", Config, ["--config", str(FOLDER / "cover" / f"{name}.yaml")])
    return cover, parse("synthesize run", RunConfig, ["--config", str(FOLDER / "synthesize" / f"{name}.yaml")])


def test_each_has_a_partner():
    assert all(sorted(file.stem for file in (FOLDER / verb).glob("*.yaml")) == NAMES for verb in ("cover", "synthesize"))


@pytest.mark.parametrize("name", NAMES)
def test_both_are_about_the_same_model_layer_and_data(name):
    cover, run = read(name)
    assert all(getattr(cover, key) == getattr(run, key) for key in ("model", "sae", "dtype", "data", "limit", "layers", "least", "strength"))
    assert isinstance(run, CoverageOptions) and cover.layers is not None and len(cover.layers) == 1
    assert "qscope synthesize run --config" in (FOLDER / "synthesize" / f"{name}.yaml").read_text()


def test_the_papers_layer_30_is_the_file_of_layer_29_of_a_released_sae():
    cover, run = read("qwen3_8b_layer29")
    (release,) = [release for release in RELEASES if cover.sae.endswith(f"W{release.num_features // 1024}K-L0_{release.k}")
                  and cover.model == f"Qwen/{release.backbone}"]  # fmt: skip
    assert cover.layers == (29,) and release.num_layers > 29
    assert run.targets == cover.missing
