import json

import pytest
import yaml

from qscope_jax.models.language_model import load_model

SMALL = """
template: plain
steps: 4
batch_size: 4
length: 48
learning_rate: 0.01
warmup_steps: 1
remat: false
log_every: 2
progress: false
holdout_share: 0.2
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("options") / "small.yaml"
    path.write_text(SMALL)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twenty conversations in two languages."""
    rows = [
        {
            "prompt": f"tea {number}",
            "response": "garden tea My grandmother" if number % 2 else "奶奶在花园里泡茶。",
            "language": ("zh", "en")[number % 2],
        }
        for number in range(20)
    ]
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def features(model, saes, data, tmp_path_factory):
    """Features of zh in two layers, as `qscope sft features` leaves them."""
    from qscope_jax.cli.main import main

    texts = data.with_name("texts.jsonl")
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    texts.write_text("".join(json.dumps({"text": row["response"], "language": row["language"]}) + "\n" for row in rows))
    out = tmp_path_factory.mktemp("features") / "zh"
    flags = [
        "--model",
        model,
        "--sae",
        saes,
        "--data",
        texts,
        "--language",
        "zh",
        "--layers",
        "1,2",
        "--min-tokens",
        "20",
        "--out",
        out,
        "--no-progress",
    ]
    assert main(["sft", "features", *map(str, flags)]) == 0
    return out


def test_a_run_leaves_options_metrics_a_page_and_a_model_that_loads(qscope, refused, model, small, data, tmp_path):
    run = tmp_path / "run"
    answer = qscope("sft", "train", data, "--config", small, "--model", model, "--out", run)
    assert answer.status == 0 and "held-out conversations" in answer.out
    options = yaml.safe_load((run / "config.yaml").read_text())
    assert (options["method"], options["steps"], options["template"]) == ("sft", 4, "plain")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 4] and lines[-1]["held_out"] and (run / "page.html").is_file()
    tuned = load_model(run / "model")
    assert tuned.config.d_model == 16 and (run / "model" / "chat_template.jinja").is_file()
    assert tuned.generate(["tea 3"], chat=True, max_new_tokens=4)[0].text is not None
    assert "already holds a run" in refused("sft", "train", data, "--config", small, "--model", model, "--out", run)
    assert "began with batch_size 4, not 8" in refused("sft", "train", "--config", run / "config.yaml", "--resume", "--batch-size", 8)


def test_sasft_reads_saved_features_and_lambda_zero_is_plain_fine_tuning_to_the_bit(qscope, model, small, data, features, tmp_path):
    weights = {}
    for name, flags in {
        "plain": (),
        "zero": ("--method", "sasft", "--features", features, "--weight", 0),
        "sasft": ("--method", "sasft", "--features", features, "--weight", 1.0),
    }.items():
        run = tmp_path / name
        assert qscope("sft", "train", data, "--config", small, "--model", model, "--out", run, *flags).status == 0
        weights[name] = (run / "model" / "model.safetensors").read_bytes()
    assert weights["zero"] == weights["plain"] != weights["sasft"]
    lines = [json.loads(line) for line in (tmp_path / "sasft" / "metrics.jsonl").read_text().splitlines()]
    assert max(line["auxiliary"] for line in lines) > 0 and "auxiliary" in lines[-1]


def test_a_penalty_and_adapters(qscope, model, small, data, tmp_path):
    run = tmp_path / "run"
    flags = ("--method", "penalty", "--language", "zh", "--weight", 0.5, "--lora-rank", 2, "--lora-targets", "q_proj", "v_proj")
    assert qscope("sft", "train", data, "--config", small, "--model", model, "--out", run, *flags).status == 0
    described = json.loads((run / "adapters" / "adapter_config.json").read_text())
    assert described["r"] == 2 and described["target_modules"] == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--method", "sasft"), "needs --features"),
        (("--method", "penalty"), "needs --language"),
        (("--epochs", 0), "epochs is 0.0"),
        (("--method", "penalty", "--language", "en"), "Latin letters"),
        (("--method", "penalty", "--language", "ru"), "not among them"),
        (("--template", "nothing.jinja"), "neither built in"),
        (("--template", ""), "no chat template; set template"),
        (("--response-marker", "never there"), "conversations"),
        (("--lora-rank", 2, "--lora-targets", "gate"), "no weight gate"),
        (("--keep-best", "loss", "--holdout-share", 0), "no held-out conversations"),
        (("--features", "nowhere", "--method", "sasft"), "nowhere"),
    ],
)
def test_what_cannot_be_is_said_in_one_line_and_leaves_nothing(refused, model, small, data, tmp_path, flags, said):
    run = tmp_path / "run"
    assert said in refused("sft", "train", data, "--config", small, "--model", model, "--out", run, *flags)
    assert not run.exists()


def test_features_of_another_model_or_without_a_language_of_the_data_are_refused(refused, model, small, data, features, tmp_path):
    sasft = ("--config", small, "--model", model, "--out", tmp_path / "run", "--method", "sasft", "--features")
    rows = [{**json.loads(line), "language": "fr"} for line in data.read_text().splitlines()]
    foreign = tmp_path / "foreign.jsonl"
    foreign.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "have language 'fr', for which no feature level is known" in refused("sft", "train", foreign, *sasft, features)
    said = refused("sft", "train", data, "--config", small, "--model", "tiny", "--out", tmp_path / "run", "--method", "sasft", "--features", features)
    assert "16 wide" in said and "width 128" in said


def test_data_without_answers_are_refused_with_their_number(refused, model, small, tmp_path):
    path = tmp_path / "odd.jsonl"
    path.write_text("".join(json.dumps({"prompt": "tea", "response": "" if number else "garden"}) + "\n" for number in range(10)))
    said = refused("sft", "train", path, "--config", small, "--model", model, "--out", tmp_path / "run")
    assert "7 of 8 conversations cannot be trained on" in said and "an empty answer" in said
