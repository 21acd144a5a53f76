from pathlib import Path

import pytest

from qscope_jax.cli.classify import FitConfig, ReportConfig
from qscope_jax.cli.labelled import check_labelled
from qscope_jax.cli.options import parse

FOLDER = Path(__file__).parents[2] / "configs" / "classify"


@pytest.mark.parametrize("name", [path.name for path in sorted(FOLDER.glob("*.yaml"))])
def test_every_config_is_one_of_the_action_that_its_header_names(name):
    header = (FOLDER / name).read_text(encoding="utf-8")
    kind, config = ("fit", FitConfig) if name.endswith("_fit.yaml") else ("report", ReportConfig)
    found = parse(f"classify {kind}", config, ["--config", str(FOLDER / name)])
    check_labelled(found)
    assert found.out.startswith("runs/classify/") and f"classify {kind} --config configs/classify/{name}" in header


def test_the_reports_set_up_keeps_all_positions_and_the_papers_sizes():
    found = parse("classify report", ReportConfig, ["--config", str(FOLDER / "qwen3_1.7b.yaml")])
    assert found.keep_first and found.max_norm_multiple == 0 and len(found.splits) == 13
    assert (found.per_class * 2 * (1 - found.share), found.per_class * 2 * found.share) == (4000, 1000)
