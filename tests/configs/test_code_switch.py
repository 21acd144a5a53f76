from pathlib import Path

import pytest

from qscope_jax.cli.code_switch import Config, _prompts
from qscope_jax.cli.options import parse
from qscope_jax.features.scripts import language_scripts
from qscope_jax.features.switching.code_switching import target_script
from qscope_jax.features.switching.switch_prompts import check_prompts

FOLDER = Path(__file__).parents[2] / "configs" / "code_switch"


def read(name: str) -> Config:
    return parse("code-switch measure", Config, ["--config", str(FOLDER / name)])


@pytest.mark.parametrize("name", [path.name for path in sorted(FOLDER.glob("*.yaml"))])
def test_every_config_keeps_its_answers_for_the_commands_of_its_header(name):
    found, header = read(name), (FOLDER / name).read_text(encoding="utf-8")
    for action in ("trace", "ablate"):
        assert f"qscope code-switch {action} {found.responses}" in header
    assert found.responses.startswith("runs/code_switch/") and (found.samples, found.temperature, found.top_p) == (8, 1.0, 0.8)


def test_the_papers_sources_do_not_share_the_targets_script():
    found = read("qwen3_1.7b_zh.yaml")
    assert found.max_new_tokens == 0 and found.languages == ("ar", "th", "vi") and len(found.models) == 2
    assert target_script(found.language) not in {script for code in found.languages for script in language_scripts(code)}


def test_the_embedded_corpus_asks_in_five_languages():
    prompts = _prompts(read("tiny_zh.yaml"))
    assert len(prompts) == 400 and {one.language for one in prompts} == {"en", "ru", "ko", "fr", "ar"} and check_prompts(prompts, "Han") == 0
