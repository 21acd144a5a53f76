import json
import subprocess
import sys

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

from qscope_jax.data.chat_data import Message, load_conversations
from qscope_jax.errors import InputError, SourceError

TURNS = (Message("user", "2 + 2?"), Message("assistant", "Four."))
LAYOUTS = {
    "messages": {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "Four."}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "Four."}]},
    "mixed names": {"conversations": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "Four."}]},
    "pair": {"prompt": "2 + 2?", "response": "Four."},
    "completion": {"prompt": "2 + 2?", "completion": "Four."},
    "instruction": {"instruction": "2 + 2?", "output": "Four."},
    "blank input": {"instruction": "2 + 2?", "input": " ", "output": "Four."},
}


def write(path, *rows):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_in_every_kind_of_file_gives_the_same_turns(tmp_path, layout, kind):
    path = write(tmp_path / f"chat.{kind}", {**LAYOUTS[layout], "language": "en"}, {**LAYOUTS[layout], "language": None})
    first, second = load_conversations(path)
    assert first.messages == second.messages == TURNS and (first.language, second.language) == ("en", "")
    assert first.where == f"{path} {dict(jsonl='line 1', json='item 0', parquet='row 0')[kind]}"
    assert load_conversations(path, limit=1) == [first]


def test_an_input_goes_below_its_instruction(tmp_path):
    path = write(tmp_path / "a.jsonl", {"instruction": "Translate.", "input": "chat", "output": "cat"})
    assert load_conversations(path)[0].messages[0] == Message("user", "Translate.\n\nchat")


def test_messages_come_before_a_prompt_that_repeats_them(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "2 + 2?", "response": "no", **LAYOUTS["messages"]})
    assert load_conversations(path)[0].messages == TURNS


def test_a_system_text_comes_first_and_turns_need_not_alternate(tmp_path):
    roles = ["system", "human", "human", "gpt", "gpt"]
    path = write(tmp_path / "a.jsonl", {"conversations": [{"from": role, "value": role} for role in roles]})
    assert [message.role for message in load_conversations(path)[0].messages] == ["system", "user", "user", "assistant", "assistant"]


def test_a_folder_is_read_file_by_file_and_layouts_may_differ(tmp_path):
    write(tmp_path / "a.jsonl", LAYOUTS["messages"], LAYOUTS["pair"])
    write(tmp_path / "b.parquet", LAYOUTS["sharegpt"])
    found = load_conversations(tmp_path)
    assert [conversation.messages for conversation in found] == [TURNS] * 3
    assert [conversation.where for conversation in found] == [
        f"{tmp_path} {place}" for place in ("a.jsonl line 1", "a.jsonl line 2", "b.parquet row 0")
    ]


def test_labels_may_stand_in_another_column(tmp_path):
    path = write(tmp_path / "a.jsonl", {**LAYOUTS["pair"], "lang": " ko ", "language": "en"})
    assert load_conversations(path, language_column="lang")[0].language == "ko"


def turns(*pairs):
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "a", "label": 1}, "has the columns 'text', 'label'; expected messages or conversations or prompt and response"),
        ({"prompt": "a"}, "has the columns 'prompt'; expected"),
        ({"prompt": "a", "response": 3}, "column response holds int, expected text"),
        ({"prompt": [{"role": "user"}], "response": "b"}, "column prompt holds list, expected text"),
        ({"prompt": "a", "response": "\ud800"}, "column response holds .* which is not a character"),
        ({"prompt": "a", "response": "b", "language": 4}, "column language holds int, expected text"),
        ({"messages": "hello"}, "column messages holds str, expected a list of turns"),
        ({"messages": None}, "column messages holds NoneType, expected a list of turns"),
        ({"messages": ["hello"]}, "turn 1 of messages has str; expected role and content"),
        ({"messages": [{"role": "user", "text": "a"}]}, "turn 1 of messages has 'role', 'text'; expected role and content"),
        ({"messages": [{}]}, "turn 1 of messages has nothing; expected role and content"),
        ({"messages": []}, "has no assistant turn among 0"),
        (turns(("user", "a"), ("tool", "b")), "turn 2 of messages has the role 'tool'; expected system, user or assistant"),
        (turns(("user", "a"), (["assistant"], "b")), r"turn 2 of messages has the role \['assistant'\]; expected"),
        (turns(("user", "a"), ("system", "b")), "turn 2 of messages is a system text; expected one at the beginning"),
        (turns(("user", "a"), ("assistant", ["b"])), "turn 2 of messages holds list as its content, expected text"),
        (turns(("user", "a"), ("assistant", None)), "turn 2 of messages holds NoneType as its content, expected text"),
        (turns(("user", "a"), ("assistant", "\udc00")), "turn 2: column messages holds .* which is not a character"),
        (turns(("system", "a"), ("user", "b")), "has no assistant turn among 2; expected at least one answer"),
    ],
)  # fmt: skip
def test_a_row_that_is_no_conversation_is_refused_by_file_and_place(tmp_path, row, said):
    path = write(tmp_path / "chat.jsonl", LAYOUTS["pair"], row)
    with pytest.raises(InputError, match=said) as error:
        load_conversations(path)
    assert str(error.value).startswith(f"{path} line 2") and "\n" not in str(error.value)


def test_a_source_without_rows_is_refused(tmp_path):
    with pytest.raises(SourceError, match="holds no rows"):
        load_conversations(write(tmp_path / "chat.jsonl"))
    with pytest.raises(SourceError, match="no such file"):
        load_conversations(tmp_path / "none.jsonl")


def test_a_hub_dataset_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match="no-such-owner/none: no such file or folder, and split test cannot be loaded"):
        load_conversations("no-such-owner/none", split="test")


def test_a_hub_dataset_is_read_like_a_file(monkeypatch):
    rows = datasets.Dataset.from_list([LAYOUTS["messages"] | {"language": "en"}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **settings: rows)
    (found,) = load_conversations("owner/chats")
    assert found.messages == TURNS and found.language == "en" and found.where == "owner/chats row 0"


def test_import_brings_none_of_the_heavy_libraries():
    program = "import sys, qscope_jax.data.chat_batches; assert not {'datasets', 'torch', 'transformers', 'pyarrow', 'jinja2'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
