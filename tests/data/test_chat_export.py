import json

import pytest

from qscope_jax.data.chat_export import write_chat_settings
from qscope_jax.data.chat_templates import BUILT_IN, ChatFormat
from qscope_jax.demo.embedded import tiny_model


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_model().tokenizer


def test_a_format_s_own_template_and_its_stop_token_go_with_the_model(tokenizer, tmp_path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7, "temperature": 0.6}')
    write_chat_settings(tmp_path, tokenizer, ChatFormat(template="plain"), (7,))
    assert (tmp_path / "chat_template.jinja").read_text() == BUILT_IN["plain"]
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": [0, 7], "temperature": 0.6}


def test_an_end_of_several_tokens_is_no_stop_token(tokenizer, tmp_path):
    write_chat_settings(tmp_path, tokenizer, ChatFormat(template="chatml"), (0,))
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": 0}
