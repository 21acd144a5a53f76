import json

import pytest

from qscope_jax.data.chat_data import Message
from qscope_jax.data.prompt_rows import load_prompt_rows
from qscope_jax.errors import InputError


def written(tmp_path, rows):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_prompts_come_as_texts_or_turns_with_all_other_columns(tmp_path):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    rows = load_prompt_rows(written(tmp_path, [{"prompt": "1 + 1?", "answer": 2}, {"messages": turns, "answer": 4, "level": "easy"}]))
    assert rows[0].messages == (Message("user", "1 + 1?"),) and rows[0].columns == {"answer": 2, "level": None}
    assert rows[1].messages == (Message("system", "Be brief."), Message("user", "2 + 2?"))
    assert rows[1].columns == {"answer": 4, "level": "easy"} and rows[1].where.endswith("line 2")
    (row,) = load_prompt_rows(written(tmp_path, [{"question": turns[:2]}]), column="question")
    assert row.messages[-1].content == "2 + 2?" and row.columns == {}


@pytest.mark.parametrize(
    ("row", "said"),
    [({"text": "x"}, "expected prompt or messages"), ({"prompt": "  "}, "asks nothing"), ({"prompt": 3}, "holds int, expected text"),
     ({"messages": [{"role": "assistant", "content": "x"}]}, "asks nothing"), ({"messages": [{"role": "judge", "content": "x"}]}, "role 'judge'")],
)  # fmt: skip
def test_rows_that_ask_nothing_are_refused_with_their_place(tmp_path, row, said):
    with pytest.raises(InputError, match=said) as caught:
        load_prompt_rows(written(tmp_path, [{"prompt": "fine"}, row]))
    assert "line 2" in str(caught.value)
