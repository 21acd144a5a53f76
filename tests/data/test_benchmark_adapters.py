import pytest

from qscope_jax.data.benchmark_adapters import ADAPTERS, find_adapter
from qscope_jax.errors import InputError

CHOICE = {"question": "What is 2 + 2?", "choices": ["3", "4"], "answer": 1, "subject": "arithmetic"}
CAPITAL = {"Question": "2 + 2 = ?", "A": "3", "B": "4", "C": "5", "D": "6", "Answer": "B"}

# A row of each public data set, cut to what matters, and the prompt that it becomes.
ROWS = {
    "mmlu": (CHOICE, "What is 2 + 2?\nA. 3\nB. 4"),
    "mmlu_redux": (CHOICE | {"error_type": "ok"}, "What is 2 + 2?\nA. 3\nB. 4"),
    "mmlu_pro": ({"question": "Q", "options": list("vwxyz"), "answer_index": 2}, "Q\nA. v\nB. w\nC. x\nD. y\nE. z"),
    "supergpqa": ({"question": "Q", "options": ["x", "y"], "answer_letter": "A"}, "Q\nA. x\nB. y"),
    "ceval": ({"id": 0, "question": "Q", "A": "w", "B": "x", "C": "y", "D": "z", "answer": ""}, "Q\nA. w\nB. x\nC. y\nD. z"),
    "cmmlu": ({"": "0"} | CAPITAL, "2 + 2 = ?\nA. 3\nB. 4\nC. 5\nD. 6"),
    "gsm8k": ({"question": "Ann has 2 tins.", "answer": "#### 2"}, "Ann has 2 tins."),
    "math": ({"problem": "Solve $x=1$.", "level": "Level 1", "solution": "1"}, "Solve $x=1$."),
    "theoremqa": ({"Question": "Is it?", "Answer": "True", "Picture": None}, "Is it?"),
    "mbpp": (
        {"task_id": 1, "text": "Add.", "code": "...", "test_list": ["assert f(1) == 2", "assert f(2) == 3"]},
        "Add.\nassert f(1) == 2\nassert f(2) == 3",
    ),
    "evalplus": ({"task_id": "HumanEval/0", "prompt": "def f(x):\n", "entry_point": "f"}, "def f(x):\n"),
    "multipl_e": ({"name": "f", "language": "cpp", "prompt": "int f(", "tests": ""}, "int f("),
    "mmmlu": (CAPITAL | {"Subject": "arithmetic"}, "2 + 2 = ?\nA. 3\nB. 4\nC. 5\nD. 6"),
    "include": (
        {"question": "Q", "option_a": "w", "option_b": "x", "option_c": "y", "option_d": "z", "answer": 0, "language": "Greek"},
        "Q\nA. w\nB. x\nC. y\nD. z",
    ),
    "kor_bench": ({"idx": "1", "rule_id": "3", "rule_content": "Shift by 3.", "question": "Encode ABC."}, "Shift by 3.\n\nEncode ABC."),
    "icleval": ({"uid": 1, "examples": "1 -> 2\n", "prompt": "2 -> ", "label": "3", "content": None}, "1 -> 2\n2 -> "),
}


def test_all_seventeen_are_there():
    assert len(ADAPTERS) == 17 and set(ADAPTERS) == {*ROWS, "gpqa_diamond"}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_becomes_its_prompt(name):
    row, prompt = ROWS[name]
    assert ADAPTERS[name].fits(row) and ADAPTERS[name].prompt(row, "row 0") == prompt


def test_the_order_of_gpqas_options_depends_on_the_row_alone():
    names = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
    prompts = [ADAPTERS["gpqa_diamond"].prompt({"Question": f"Q{i}"} | dict(zip(names, "wxyz", strict=True)), "row 0") for i in range(40)]
    again = [ADAPTERS["gpqa_diamond"].prompt({"Question": f"Q{i}"} | dict(zip(names, "wxyz", strict=True)), "row 9") for i in range(40)]
    assert prompts == again and all(sorted(line[3:] for line in prompt.splitlines()[1:]) == list("wxyz") for prompt in prompts)
    first = [prompt.splitlines()[1] for prompt in prompts]
    assert {"A. w", "A. x", "A. y", "A. z"} == set(first)


def test_names_are_found_in_any_spelling():
    assert find_adapter("GPQA-Diamond") is ADAPTERS["gpqa_diamond"] and find_adapter("multiple") is ADAPTERS["multipl_e"]
    assert find_adapter("KOR Bench") is ADAPTERS["kor_bench"] and find_adapter("my own") is None


def test_unknown_columns_are_named():
    with pytest.raises(InputError, match="row 3: has no column 'choices', which MMLU needs; the columns there are 'question', 'answers'"):
        ADAPTERS["mmlu"].prompt({"question": "Q", "answers": []}, "row 3")
    with pytest.raises(InputError, match="row 3: column choices holds dict, expected text or a list of texts"):
        ADAPTERS["mmlu"].prompt({"question": "Q", "choices": [{}]}, "row 3")
