"""The Qwen-Scope report's 17 benchmarks: where their public rows are, and how a row becomes the prompt that a model sees.

Sources and columns are those of the public data sets; the report states neither prompts nor templates. A prompt is the question and, where
there are options, a lettered line for each. No answer, instruction or few-shot example is added.
"""

import random
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qscope_jax.errors import InputError

EVERY = "*"
"""In the place of a configuration: all that the data set has."""


@dataclass(frozen=True)
class Adapter:
    """How rows of a public data set become prompts.

    Attributes:
        title: The benchmark's name in print.
        parts: Columns that make up the text, in order; `a|b` is the first of them that a row has, and a list is a line for each item.
        sources: Data sets on the hub, `owner/name` or `owner/name:configuration`, or `owner/name:*` for all configurations; none where the
            benchmark is a folder of files to download by hand.
        split: Split of them.
        options: Columns of the options, one for each, or one that holds a list.
        shuffled: Whether options are put in an order that depends on the row alone, because the first column is always the right one.
        joint: What stands between the parts.
        files: Where set, sources are not loaded as data sets: these files of theirs are read, such as `*/sample.jsonl`.
        archive: A zip file of the source that holds the files.
        lookup: Columns taken from a second file in the same folder: its name, the column here, the column there that it equals.
    """

    title: str
    parts: tuple[str, ...]
    sources: tuple[str, ...] = ()
    split: str = "test"
    options: tuple[str, ...] = ()
    shuffled: bool = False
    joint: str = "\n"
    files: tuple[str, ...] = ()
    archive: str = ""
    lookup: tuple[str, str, str] | None = None

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether a row has the columns, those looked up left aside."""
        return not self._missing(row)

    def prompt(self, row: Mapping[str, Any], where: str) -> str:
        """The prompt of a row.

        Args:
            row: Column name -> value.
            where: Where it stands, for messages.

        Raises:
            InputError: a column is missing, or holds something else than texts.
        """
        if missing := self._missing(row):
            there = ", ".join(map(repr, row)) or "none"
            raise InputError(f"{where}: has no column {missing[0]!r}, which {self.title} needs; the columns there are {there}")
        texts = [_text(row[name], where, name) for name in (_there(part, row) for part in self.parts) if name is not None]
        body = self.joint.join(texts)
        options = [text for name in self.options for text in _texts(row[name], where, name)]
        if self.shuffled:
            random.Random(body).shuffle(options)
        return "\n".join([body, *(f"{letter}. {option}" for letter, option in zip(string.ascii_uppercase, options, strict=False))])

    def _missing(self, row: Mapping[str, Any]) -> list[str]:
        return [part for part in (*self.parts, *self.options) if _there(part, row) is None]


def find_adapter(name: str) -> Adapter | None:
    """The adapter of a benchmark by its name, in any spelling: `GPQA-Diamond` and `gpqa_diamond` are one."""
    return _BY_NAME.get(_spelled(name))


ADAPTERS: dict[str, Adapter] = {
    "mmlu": Adapter("MMLU", ("question",), ("cais/mmlu:all",), options=("choices",)),
    "mmlu_redux": Adapter("MMLU-Redux", ("question",), ("edinburgh-dawg/mmlu-redux:*",), options=("choices",)),
    "mmlu_pro": Adapter("MMLU-Pro", ("question",), ("TIGER-Lab/MMLU-Pro",), options=("options",)),
    "supergpqa": Adapter("SuperGPQA", ("question",), ("m-a-p/SuperGPQA",), split="train", options=("options",)),
    "ceval": Adapter("C-Eval", ("question",), ("ceval/ceval-exam:*",), options=("A", "B", "C", "D")),
    # The hub holds CMMLU as a zip file with a loading script, which `datasets` no longer runs.
    "cmmlu": Adapter("CMMLU", ("Question",), ("haonan-li/cmmlu",), options=("A", "B", "C", "D"), files=("test/*.csv",), archive="cmmlu_v1_0_1.zip"),
    "gsm8k": Adapter("GSM8K", ("question",), ("openai/gsm8k:main",)),
    "math": Adapter("MATH", ("problem",), ("EleutherAI/hendrycks_math:*",)),
    "gpqa_diamond": Adapter(
        "GPQA-Diamond", ("Question",), ("Idavidrein/gpqa:gpqa_diamond",), split="train", shuffled=True,
        options=("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"),
    ),
    "theoremqa": Adapter("TheoremQA", ("Question",), ("TIGER-Lab/TheoremQA",)),
    "mbpp": Adapter("MBPP", ("text", "test_list"), ("google-research-datasets/mbpp:full",)),
    "evalplus": Adapter("EvalPlus", ("prompt",), ("evalplus/humanevalplus", "evalplus/mbppplus")),
    "multipl_e": Adapter(
        "MultiPL-E", ("prompt",), tuple(f"nuprl/MultiPL-E:humaneval-{code}" for code in ("cpp", "java", "php", "ts", "cs", "sh", "js")),
    ),
    "mmmlu": Adapter("MMMLU", ("Question",), ("openai/MMMLU:default",), options=("A", "B", "C", "D")),
    "include": Adapter(
        "INCLUDE", ("question",), ("CohereLabs/include-base-44:*",), options=("option_a", "option_b", "option_c", "option_d"),
    ),
    "kor_bench": Adapter(
        "KOR-Bench", ("rule_content", "question"), ("m-a-p/KOR-Bench",), joint="\n\n",
        files=("*/sample.jsonl",), lookup=("rule.jsonl", "rule_id", "idx"),
    ),
    # Its tasks are files of the authors' repository (github.com/yiye3/ICLEval, data/tasks_data), of which no data set is on the hub.
    "icleval": Adapter("ICLEval", ("content|examples", "prompt"), joint="", files=("*.json",)),
}  # fmt: skip
"""The 17, by name."""


def _spelled(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


_BY_NAME = {_spelled(name): adapter for name, adapter in ADAPTERS.items()}


def _there(part: str, row: Mapping[str, Any]) -> str | None:
    """The first of the columns `a|b` that a row has."""
    return next((name for name in part.split("|") if row.get(name) is not None), None)


def _texts(value: Any, where: str, column: str) -> list[str]:
    """The items of a column; an option may be a number."""
    items = value if isinstance(value, list | tuple) else [value]
    if wrong := [item for item in items if isinstance(item, bool) or not isinstance(item, str | int | float)]:
        raise InputError(f"{where}: column {column} holds {type(wrong[0]).__name__}, expected text or a list of texts; choose another column")
    return [str(item) for item in items]


def _text(value: Any, where: str, column: str) -> str:
    return "\n".join(_texts(value, where, column))
