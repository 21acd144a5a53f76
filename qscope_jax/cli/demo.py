"""`qscope demo`: the guided tour."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qscope_jax.cli.results import check_writable


@dataclass(frozen=True, kw_only=True)
class Config:
    """Take the guided tour: train the embedded model's SAEs, read its features, steer with them, and write a page."""

    text: str = ""
    """File whose text is read, explained and continued beside the corpus."""
    out: str = "runs/demo"
    """Folder for report.html, results.json and the trained SAEs."""


def run(config: Config) -> dict[str, Any]:
    """Run the tour; returns its checks."""
    from qscope_jax.demo.tour import make_tour, run_tour

    out = Path(config.out).expanduser()
    check_writable(str(out / "results.json"))
    checks = run_tour(make_tour(config.text or None), out)
    return {"checks": [vars(check) for check in checks]}
