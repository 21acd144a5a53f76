import json
import zipfile

import pytest

from qscope_jax.data import benchmark_files
from qscope_jax.data.benchmark_files import Benchmark, draw_prompts, group_texts, load_benchmark, shared_prompts, split_source
from qscope_jax.data.tables import Table
from qscope_jax.errors import InputError, SourceError


def lines(path, *rows) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def test_a_file_of_prompts_is_read_as_it_is(tmp_path):
    path = lines(tmp_path / "b.jsonl", {"text": "one"}, {"text": " "}, {"text": "two"}, {"text": "one"})
    found = load_benchmark("mine", path, suffix=" =")
    assert found.prompts == ("one =", "two =", "one =") and found.rows == (0, 2, 3) and (found.total, found.repeated) == (4, 1)
    assert load_benchmark("mine", lines(tmp_path / "c.jsonl", {"ask": "x"}), column="ask").prompts == ("x",)


def test_rows_of_a_known_benchmark_become_prompts_and_others_are_read_by_their_column(tmp_path):
    rows = lines(tmp_path / "mmlu.jsonl", {"question": "Q", "choices": ["x", "y"]})
    assert load_benchmark("MMLU", rows).prompts == ("Q\nA. x\nB. y",)
    assert load_benchmark("mmlu", lines(tmp_path / "made.jsonl", {"text": "already a prompt"})).prompts == ("already a prompt",)
    with pytest.raises(InputError, match="has no column 'choices', which MMLU needs; the columns there are 'question', 'options'"):
        load_benchmark("mmlu", lines(tmp_path / "other.jsonl", {"question": "Q", "options": []}))
    with pytest.raises(InputError, match="has no column 'text'; the columns there are 'question'"):
        load_benchmark("mine", lines(tmp_path / "q.jsonl", {"question": "Q"}))


def test_a_limit_draws_rows_at_random_and_keeps_their_numbers(tmp_path):
    path = lines(tmp_path / "b.jsonl", *({"text": f"prompt {i}"} for i in range(50)))
    found = load_benchmark("mine", path, limit=10, seed=1)
    assert found.prompts == tuple(f"prompt {row}" for row in found.rows) and list(found.rows) == sorted(set(found.rows))
    assert found.rows != tuple(range(10)) and found.total == 50 and load_benchmark("mine", path, limit=10, seed=1) == found
    assert load_benchmark("mine", path, limit=80).rows == tuple(range(50))


def test_rules_of_kor_bench_are_looked_up_beside_the_questions(tmp_path):
    for kind in ("cipher", "logic"):
        lines(tmp_path / "data" / kind / "rule.jsonl", {"idx": "1", "rule_content": f"The rule of {kind}."})
        lines(tmp_path / "data" / kind / "sample.jsonl", {"idx": "1", "rule_id": "1", "question": f"Which {kind}?"})
    assert load_benchmark("kor-bench", str(tmp_path)).prompts == ("The rule of cipher.\n\nWhich cipher?", "The rule of logic.\n\nWhich logic?")
    lines(tmp_path / "data" / "logic" / "sample.jsonl", {"rule_id": "9", "question": "?"})
    with pytest.raises(SourceError, match="names rule_id '9', which .*rule.jsonl lacks"):
        load_benchmark("kor-bench", str(tmp_path))


def test_cmmlu_is_read_from_its_zip_file(tmp_path):
    with zipfile.ZipFile(tmp_path / "cmmlu_v1_0_1.zip", "w") as file:
        file.writestr("dev/law.csv", ",Question,A,B,C,D,Answer\n0,no,a,b,c,d,A\n")
        for subject in ("law", "art"):
            file.writestr(f"test/{subject}.csv", f",Question,A,B,C,D,Answer\n0,问{subject},甲,乙,丙,丁,A\n")
    assert load_benchmark("cmmlu", str(tmp_path)).prompts == tuple(f"问{subject}\nA. 甲\nB. 乙\nC. 丙\nD. 丁" for subject in ("art", "law"))
    (tmp_path / "cmmlu_v1_0_1.zip").write_bytes(b"PK")
    with pytest.raises(SourceError, match="is not a complete zip file"):
        load_benchmark("cmmlu", str(tmp_path))


def test_icleval_is_files_of_one_list_each(tmp_path):
    for name, key in (("copy", "content"), ("learn", "examples")):
        (tmp_path / f"{name}.json").write_text(json.dumps([{key: f"{name}: ", "prompt": "go", "label": ""}]))
    assert load_benchmark("icleval", str(tmp_path)).prompts == ("copy: go", "learn: go")
    assert load_benchmark("icleval", str(tmp_path / "copy.json")).prompts == ("copy: go",)
    (tmp_path / "learn.json").write_text("[1]")
    with pytest.raises(SourceError, match="item 0: holds a JSON int; expected an object"):
        load_benchmark("icleval", str(tmp_path))


def test_public_data_sets_are_asked_for_by_name_configuration_and_split(monkeypatch):
    asked = []

    def load_table(source, *, split="train"):
        asked.append((source, split))
        return Table(source, ({"question": f"from {source}", "problem": "p", "prompt": "d"},), ("row 0",))

    monkeypatch.setattr(benchmark_files, "load_table", load_table)
    monkeypatch.setattr("datasets.get_dataset_config_names", lambda repository: ["algebra", "geometry"])
    assert load_benchmark("gsm8k").prompts == ("from openai/gsm8k:main",)
    assert len(load_benchmark("math").prompts) == 2 and len(load_benchmark("evalplus").prompts) == 2
    load_benchmark("gsm8k", "hub:me/gsm8k:hard@val")
    load_benchmark("gsm8k", split="train")
    assert asked == [
        ("openai/gsm8k:main", "test"), ("EleutherAI/hendrycks_math:algebra", "test"), ("EleutherAI/hendrycks_math:geometry", "test"),
        ("evalplus/humanevalplus", "test"), ("evalplus/mbppplus", "test"), ("me/gsm8k:hard", "val"), ("openai/gsm8k:main", "train"),
    ]  # fmt: skip


def test_prompts_that_benchmarks_share_are_counted():
    made = [Benchmark(name, tuple(prompts), tuple(range(len(prompts))), len(prompts)) for name, prompts in (("a", "xyzz"), ("b", "zyw"), ("c", "q"))]
    assert shared_prompts(made) == {("a", "b"): 2}


def test_texts_of_several_benchmarks_are_told_apart():
    found = group_texts(["a", "b", "c"], ["x", 7, "x"])
    assert found == {"x": Benchmark("x", ("a", "c"), (0, 1), 2), "7": Benchmark("7", ("b",), (0,), 1)}
    assert draw_prompts(found["x"], 1).total == 2 and draw_prompts(found["x"], 5) is found["x"]


def test_a_hub_source_may_name_its_split():
    assert split_source("hub:a/b:c@val", "test") == ("a/b:c", "val")
    assert split_source("hub:a/b", "test") == ("a/b", "test") and split_source("a@b.jsonl", "test") == ("a@b.jsonl", "test")


def test_bad_requests_are_refused(tmp_path):
    with pytest.raises(InputError, match="benchmark 'mine' needs a source, NAME=FILE or NAME=hub:OWNER/DATASET; those known by name are mmlu, "):
        load_benchmark("mine")
    with pytest.raises(InputError, match="ICLEval is no dataset of the hub; download its files and give their folder, icleval=FOLDER"):
        load_benchmark("icleval")
    with pytest.raises(SourceError, match="is a folder, expected a file for benchmark 'gsm8k'"):
        load_benchmark("gsm8k", str(tmp_path))
    with pytest.raises(SourceError, match="has no files .*sample.jsonl, which KOR-Bench consists of"):
        load_benchmark("kor_bench", str(tmp_path))
    with pytest.raises(SourceError, match="holds no prompt, all 1 rows are blank"):
        load_benchmark("mine", lines(tmp_path / "b.jsonl", {"text": ""}))
    with pytest.raises(InputError, match="limit is 0"):
        load_benchmark("gsm8k", limit=0)


def test_without_the_hub_its_data_sets_are_refused_in_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: (_ for _ in ()).throw(OSError("offline")))
    with pytest.raises(SourceError, match=r"m-a-p/KOR-Bench: its files cannot be loaded from the hub \(offline\); download them"):
        load_benchmark("kor_bench")
