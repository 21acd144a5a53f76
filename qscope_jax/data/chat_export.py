"""What a model that has learnt a chat format needs beside its weights: the template that its prompts are written by, and where it stops."""

from pathlib import Path
from typing import Any

from qscope_jax.data.chat_templates import BUILT_IN, ChatFormat, read_template
from qscope_jax.data.chat_tokens import turn_end_ids
from qscope_jax.data.files import atomic_path, read_json, write_json


def write_chat_settings(folder: Path, tokenizer: Any, format: ChatFormat, eos_token_ids: tuple[int, ...]) -> None:
    """Complete a Hugging Face folder: `chat_template.jinja` where the format brought its own, and stop tokens in `generation_config.json`.

    A base model stops at the end of a text; one that was trained with ChatML stops at `<|im_end|>` as well, where that is one token.

    Args:
        folder: The exported model.
        tokenizer: Its tokenizer.
        format: How its conversations were written.
        eos_token_ids: Stop tokens of the model that it began as.

    Raises:
        SourceError: a file cannot be read or written.
    """
    if format.template:
        text = BUILT_IN.get(format.template) or read_template(format.template)
        with atomic_path(folder / "chat_template.jinja") as temporary:
            temporary.write_text(text, encoding="utf-8")
    end = turn_end_ids(tokenizer, format)
    stops = list(dict.fromkeys((*(end if len(end) == 1 else ()), *eos_token_ids)))
    if not stops:
        return
    path = folder / "generation_config.json"
    settings = read_json(path) if path.is_file() else {}
    write_json(path, {**settings, "eos_token_id": stops if len(stops) > 1 else stops[0]})
