import io
import json
import sys

import pytest

PROMPT = "My grandmother made"


def test_prompts_are_continued_and_saved(qscope, model, tmp_path):
    out = tmp_path / "new/out.json"
    answer = qscope("generate", PROMPT, "tea", "--model", model, "--max-new-tokens", 5, "--temperature", 0.9, "--seed", 3, "--out", out)
    assert answer.status == 0 and not answer.err and PROMPT in answer.out
    saved = json.loads(out.read_text())
    assert saved["verb"] == "generate" and saved["config"]["seed"] == 3 and saved["config"]["prompts"] == [PROMPT, "tea"]
    assert [one["prompt"] for one in saved["completions"]] == [PROMPT, "tea"]
    assert all(1 <= len(one["token_ids"]) <= 5 for one in saved["completions"])


def test_a_stop_token_ends_a_row_and_is_not_part_of_the_text(qscope, model, tmp_path):
    def completion(*arguments) -> dict:
        assert qscope("generate", PROMPT, *arguments, "--model", model, "--max-new-tokens", 5, "--out", tmp_path / "o.json").status == 0
        return json.loads((tmp_path / "o.json").read_text())["completions"][0]

    free = completion()
    first = free["token_ids"][0]
    assert not free["stopped"] and completion("--stop", first) | {"prompt": ""} == {"prompt": "", "text": "", "token_ids": [first], "stopped": True}


def test_a_terminal_sees_the_tokens_come(qscope, model, monkeypatch):
    plain = qscope("generate", PROMPT, "--model", model, "--max-new-tokens", 9, "--no-stream")
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert qscope("generate", PROMPT, "--model", model, "--max-new-tokens", 9).status == 0
    assert isinstance(sys.stdout, Terminal) and len(sys.stdout.pieces) > 3
    text = "".join(sys.stdout.pieces)
    assert text.startswith(PROMPT) and text.removeprefix(PROMPT).strip() in plain.out


class Terminal(io.StringIO):
    """A terminal that remembers what was written piece by piece."""

    def __init__(self):
        super().__init__()
        self.pieces: list[str] = []

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.pieces.append(text)
        return len(text)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no prompt given"),
        ([""], "a prompt is empty"),
        (["\udcff"], "is not UTF-8"),
        (["tea", "--top-p", "0"], "top_p is 0.0, expected above 0"),
        (["tea", "--max-new-tokens", "500"], "exceed the model's 128 positions"),
        (["tea", "--stop", "made tea in"], "tokens; give a text that is one token"),
        (["tea", "--stop", "320"], "stop token 320 is out of range; the vocabulary has 320 tokens"),
        (["tea", "--chat"], "has no chat template"),
        (["tea", "--mesh", "rows=2"], "unknown axis 'rows'"),
        (["tea", "--out", "/proc/none/out.json"], "cannot be written"),
    ],
)
def test_bad_requests_are_refused(refused, model, arguments, said):
    assert said in refused("generate", *arguments, "--model", model)


def test_a_missing_model_is_refused(refused, tmp_path):
    assert "no such folder" in refused("generate", "tea", "--model", tmp_path / "none")


def test_an_unknown_architecture_is_refused(refused, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    assert "mamba" in refused("generate", "tea", "--model", tmp_path)
