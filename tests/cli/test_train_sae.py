import json
import shutil
from pathlib import Path

import pytest
import yaml

from qscope_jax.sae.layer_sae import load_sae

SMALL = """
num_features: 24
k: 3
steps: 4
batch_tokens: 16
buffer_batches: 3
sequence_length: 16
model_batch: 4
learning_rate: 0.01
log_every: 2
progress: false
layers: [0, 2]
limit: 30
holdout_share: 0.1
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("options") / "small.yaml"
    path.write_text(SMALL)
    return path


def test_a_run_leaves_its_options_metrics_and_saes(qscope, refused, model, small, tmp_path):
    run = tmp_path / "runs/one"
    answer = qscope("train-sae", "--config", small, "--model", model, "--out", run)
    assert answer.status == 0 and "held-out documents" in answer.out
    options = yaml.safe_load((run / "config.yaml").read_text())
    assert (options["k"], options["layers"], options["model"], options["aux_weight"]) == (3, [0, 2], model, 1 / 32)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 4] and len(lines[-1]["fvu"]) == 2
    sae = load_sae(run / "saes", 2)
    assert (sae.num_features, sae.k, sae.d_model) == (24, 3, 16)

    assert "already holds a run" in refused("train-sae", "--config", small, "--model", model, "--out", run)
    assert "began with k 3, not 4" in refused("train-sae", "--config", run / "config.yaml", "--resume", "--k", 4)
    # Nothing is left to do, and the same SAEs come out.
    before = (run / "saes/layer2.safetensors").read_bytes()
    assert qscope("train-sae", "--config", run / "config.yaml", "--resume").status == 0
    assert (run / "saes/layer2.safetensors").read_bytes() == before


def test_a_run_on_a_stream_that_was_interrupted_ends_as_one_that_was_not(qscope, model, small, tmp_path):
    data = tmp_path / "texts"
    data.mkdir()
    for name in "abc":
        rows = [f"{name}{number} " + "tea in the garden " * (number % 5 + 1) for number in range(15)]
        (data / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    config = tmp_path / "stream.yaml"
    options = f"data: {data}\nstream: true\nshuffle_buffer: 10\nheld_out_documents: 4\nlanes: 2\ncheckpoint_every: 20\n"
    config.write_text(SMALL.replace("limit: 30\n", "").replace("steps: 4", "steps: 40") + options)
    command = ("train-sae", "--config", config, "--model", model)
    for name in ("whole", "stopped"):
        answer = qscope(*command, "--out", tmp_path / name)
        assert answer.status == 0 and "held-out documents" in answer.out
    shutil.rmtree(tmp_path / "stopped/checkpoints/40")
    shutil.rmtree(tmp_path / "stopped/saes")
    assert qscope(*command, "--out", tmp_path / "stopped", "--resume").status == 0
    lines = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("whole", "stopped")]
    assert lines[0][-1]["fvu"] == lines[1][-1]["fvu"]
    whole, stopped = ((tmp_path / name / "saes/layer2.safetensors").read_bytes() for name in ("whole", "stopped"))
    assert whole == stopped


def test_the_best_saes_are_exported_when_asked_for(qscope, model, small, tmp_path):
    """By the greatest FVU, so that the best is not the last."""
    run = tmp_path / "run"
    often = ("--steps", 6, "--eval-every", 2, "--checkpoint-every", 2, "--keep-checkpoints", 1)
    assert qscope("train-sae", "--config", small, "--model", model, "--out", run, *often, "--keep-best", "fvu", "--keep-best-mode", "max").status == 0
    values = {line["step"]: sum(line["fvu"]) for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if line.get("held_out")}
    best = max(values, key=lambda step: (values[step], step))
    assert len(values) == 3 and best < 6
    assert sorted(int(path.name) for path in (run / "checkpoints").iterdir()) == [best, 6]
    options = ("--config", small, "--model", model, "--steps", 6)
    assert qscope("train-sae", *options, "--out", tmp_path / "last").status == 0
    exported, last = ((folder / "saes/layer2.safetensors").read_bytes() for folder in (run, tmp_path / "last"))
    assert exported != last


def test_a_stopped_run_writes_no_saes_and_says_how_to_continue(qscope, model, small, tmp_path, monkeypatch):
    def stopped(recipe, loop):
        (Path(loop.run_dir) / "metrics.jsonl").write_text('{"step": 2}\n')

    monkeypatch.setattr("qscope_jax.training.loop.train", stopped)
    answer = qscope("train-sae", "--config", small, "--model", model, "--out", tmp_path / "run")
    assert answer.status == 0 and f"--config {tmp_path / 'run/config.yaml'} --resume" in " ".join(answer.out.split())
    assert not (tmp_path / "run/saes").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--k", "25"], "k is 25, expected 1 to num_features = 24"),
        (["--layers", "5"], "layer 5 is out of range"),
        (["--layers", "1,1"], "none of them twice"),
        (["--holdout-share", "1"], "holdout_share is 1.0"),
        (["--holdout-share", "0", "--keep-best", "fvu"], "keep_best is fvu, but holdout_share 0 keeps no documents"),
        (["--stream", "--held-out-documents", "0", "--keep-best", "fvu"], "held_out_documents 0 keeps no documents"),
        (["--keep-best", "fvu", "--keep-best-mode", "least"], "keep_best_mode is least, expected min or max"),
        (["--data", "none.txt"], "none.txt: no such file"),
        (["--limit", "1"], "leaves none"),
        (["--steps", "0"], "steps is 0"),
        (["--sequence-length", "1"], "sequence_length is 1, expected 2 or more"),
    ],
)
def test_bad_requests_are_refused_and_leave_nothing(refused, model, small, tmp_path, arguments, said):
    assert said in refused("train-sae", "--config", small, "--model", model, "--out", tmp_path / "run", *arguments)
    assert not list(tmp_path.iterdir())


def test_a_run_needs_a_folder_that_can_be_written(refused, model, small, tmp_path):
    (tmp_path / "file").write_text("")
    assert "--out is missing" in refused("train-sae", "--config", small)
    assert "cannot be written" in refused("train-sae", "--config", small, "--model", model, "--out", tmp_path / "file")
