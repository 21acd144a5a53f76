"""SIGKILL at any moment and resume is as if nothing had happened."""

import json

from tests.processes import run_program


def test_a_run_that_is_killed_again_and_again_equals_the_one_that_is_not(tmp_path):
    done = run_program("tests.training.killed", tmp_path)
    assert done.status == 0, done
    found = [json.loads(line) for line in done.out.splitlines()]
    # Kills fell into saves under way, and into the time between them.
    assert len(found) == 6
    assert any("tmp" in name for names in found for name in names) and any("tmp" not in "".join(names) for names in found)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert (killed / "state").read_bytes() == (whole / "state").read_bytes()
    assert (killed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    # The best, the newest two, and what was torn, if anything; nothing half-written is left.
    names = sorted(path.name for path in (whole / "checkpoints").iterdir())
    assert sorted(path.name for path in (killed / "checkpoints").iterdir() if not path.name.startswith("torn-")) == names
