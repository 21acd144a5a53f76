from pathlib import Path

import pytest

from qscope_jax.cli.explain import Config
from qscope_jax.cli.options import parse

FILES = sorted((Path(__file__).parents[2] / "configs" / "explain").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_config_is_read_and_its_header_says_how_it_is_run(file):
    config = parse("explain", Config, ["--config", str(file)])
    assert bool(config.features) != config.all and config.store.startswith("runs/store/")
    header = file.read_text(encoding="utf-8").split("store:")[0]
    assert f"qscope explain --config configs/explain/{file.name}" in header and f"--out {config.store}" in header
    assert f"--layers {config.layer}" in header
