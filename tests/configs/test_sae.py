import math
from pathlib import Path

import pytest

from qscope_jax.cli.options import parse
from qscope_jax.cli.train_sae import Config
from qscope_jax.models.config import ModelConfig
from qscope_jax.models.published import PUBLISHED
from qscope_jax.parallel.mesh import make_mesh
from qscope_jax.sae.formats.qwen_scope import RELEASES, Release
from tpu_scripts.chips import CHIPS
from tpu_scripts.programs import Run, make_run

FOLDER = Path(__file__).parents[2] / "configs" / "sae"
README = Path(__file__).parents[2] / "tpu_scripts" / "README.md"


def name_of(release: Release) -> str:
    backbone = release.backbone.removesuffix("-Base").lower().replace("-", "_")
    return f"{backbone}_w{release.num_features // 1024}k_l0_{release.k}"


def read(name: str) -> Config:
    return parse("train-sae", Config, ["--config", str(FOLDER / f"{name}.yaml")])


def planned_run(config: Config) -> Run:
    """The run on a mesh of its sizes; the devices are numbers, which nobody asks."""
    sizes = dict(part.split("=") for part in config.mesh.split(","))
    return make_run(config, make_mesh(config.mesh, list(range(math.prod(map(int, sizes.values()))))))


releases = pytest.mark.parametrize("release", RELEASES, ids=name_of)


def test_every_released_group_has_a_config_and_no_other_is_there():
    assert {file.stem for file in FOLDER.glob("*.yaml")} == {*map(name_of, RELEASES), "tiny"}


@releases
def test_a_config_has_the_sizes_of_its_group(release):
    config = read(name_of(release))
    run = planned_run(config)
    assert config.model == f"Qwen/{release.backbone}" and config.activation == "topk"
    assert (config.num_features, config.k) == (release.num_features, release.k)
    assert (run.model.d_model, run.layers) == (release.d_model, tuple(range(release.num_layers)))


@releases
def test_the_rate_follows_the_rule(release):
    run = planned_run(read(name_of(release)))
    peak = 2e-4 / math.sqrt(release.num_features / 2**14)
    assert run.config.learning_rate is None
    assert float(run.sae.schedule()(run.config.warmup_steps)) == pytest.approx(peak, rel=1e-6)
    assert run.config.aux_weight == 1 / 32 and run.config.dead_after_tokens == 10_000_000


@releases
def test_the_header_names_the_commands_the_group_and_the_slice(release):
    name = name_of(release)
    header = [line for line in (FOLDER / f"{name}.yaml").read_text().splitlines() if line.startswith("#")]
    assert f"#   qscope train-sae --config configs/sae/{name}.yaml --resume" in header
    assert any(f"https://huggingface.co/{release.repository}" in line for line in header)
    (planned,) = [line for line in header if line.startswith("# Planned for ")]
    topology = planned.split()[3]
    assert f"#   python -m tpu_scripts.plan --config configs/sae/{name}.yaml --topology {topology}" in header
    (row,) = [line for line in README.read_text().splitlines() if line.startswith(f"| `{name}` |")]
    assert f"| {topology} |" in row and f"`{read(name).mesh}`" in row


@releases
def test_the_mesh_takes_all_chips_of_the_slice(release):
    config = read(name_of(release))
    header = (FOLDER / f"{name_of(release)}.yaml").read_text()
    kind, _, grid = header.split("Planned for ")[1].split()[0].partition(":")
    assert kind in CHIPS and planned_run(config).mesh.size == math.prod(map(int, grid.split("x")))


def test_backbones_are_known_without_the_hub():
    for release in RELEASES:
        model = ModelConfig.from_hf(PUBLISHED[release.backbone.removesuffix("-Base")])
        assert (model.d_model, model.num_layers) == (release.d_model, release.num_layers)
