"""Makes README's table of what holds for which family from the tests that ran: `pytest tests --support write`, or `check` to compare.

A cell is `yes` where every test behind it ran for the family's shapes and passed.
"""

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).parent.parent / "README.md"
_BEGIN, _END = "<!-- support: made by pytest --support write -->\n", "<!-- /support -->\n"

FAMILIES = {
    "Qwen3": ("tied", "untied", "one key/value head"),
    "Qwen3-MoE": ("experts", "experts in some layers"),
    "Qwen3.5": ("delta", "delta, tied, wrapped"),
    "Qwen3.5-MoE": ("delta, experts",),
    "Llama 3.1": ("llama", "llama, scaled"),
    "Gemma 2": ("gemma",),
}
"""Family -> shapes of `tests/models/conftest.py`."""

CLAIMS = {
    "parity": "test_every_layer_and_the_logits_equal_those_of_transformers",
    "packed, padded": "test_padded_rows_and_packed_documents_equal_documents_alone",
    "decoding": "test_cached_decoding_equals_full_recomputation",
    "edits": "test_an_edit_moves_its_layer_and_those_above",
    "gradients": "test_remat_changes_no_gradient_and_every_weight_has_one",
    "mesh": "test_a_mesh_changes_neither_logits_nor_gradients_nor_an_optimiser_step",
    "read, written": "test_transformers_reads_what_is_saved",
    "Orbax": "test_there_and_back_changes_no_bit",
}
"""Column -> the test behind it."""


class SupportTable:
    """Collects results while tests run, and compares or writes the table at the end."""

    def __init__(self, mode: str):
        """Mode is `check` or `write`."""
        self.mode = mode
        self.passed: dict[tuple[str, str], bool] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
        """Mark the report of a test behind a claim, so that it is known where reports arrive, be it in another process."""
        report = yield
        name = getattr(item, "originalname", item.name)
        if name in CLAIMS.values() and (report.when == "call" or report.outcome != "passed"):
            parameters = item.callspec.params if hasattr(item, "callspec") else {}  # pyright: ignore[reportAttributeAccessIssue]
            for shape in (value for key, value in parameters.items() if key in ("shape", "folder", "reference")):
                report.user_properties.append(("claim", (name, shape)))
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note the outcome of a test behind a claim."""
        for name, shape in (value for key, value in report.user_properties if key == "claim"):
            self.passed[name, shape] = self.passed.get((name, shape), True) and report.outcome == "passed"

    def table(self) -> str:
        """The table in Markdown."""
        lines = ["| | " + " | ".join(CLAIMS) + " |", "|---" * (len(CLAIMS) + 1) + "|"]
        for family, shapes in FAMILIES.items():
            cells = []
            for name in CLAIMS.values():
                results = [self.passed[name, shape] for shape in shapes if (name, shape) in self.passed]
                cells.append("yes" if results and all(results) else "no" if results else "not run")
            lines.append(f"| {family} | " + " | ".join(cells) + " |")
        return "\n".join(lines) + "\n"

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write the table, or fail the run where README says something else."""
        if hasattr(session.config, "workerinput"):
            return  # one of several processes; the one that started them has all reports
        text = README.read_text(encoding="utf-8")
        before, rest = text.split(_BEGIN)
        old, after = rest.split(_END)
        if self.mode == "write":
            README.write_text(before + _BEGIN + self.table() + _END + after, encoding="utf-8")
        elif old != self.table():
            print(f"\nREADME.md's table of support is not what ran; expected\n{self.table()}write it with: pytest tests --support write")
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
