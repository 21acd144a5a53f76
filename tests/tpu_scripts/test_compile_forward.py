import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODEL = {
    "model_type": "qwen3", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
    "max_position_embeddings": 512, "eos_token_id": 0, "dtype": "bfloat16",
}  # fmt: skip
libtpu_only = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


@pytest.fixture
def config(tmp_path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    return tmp_path / "config.json"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the script in a process of its own: it chooses JAX's platform."""
    command = [sys.executable, "-m", "tpu_scripts.compile_forward", *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "TPU_SKIP_MDS_QUERY")}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=240)


def said(done: subprocess.CompletedProcess[str]) -> str:
    """The script's own error line; libtpu may log others."""
    assert done.returncode == 2 and not done.stdout and "Traceback" not in done.stderr, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("compile_forward: error: ")]
    return line


def test_a_topology_that_cannot_be_described_is_one_line_and_status_2(config):
    line = said(run("--config", config, "--topology", "v0z:2x2"))
    assert "topology v0z:2x2: cannot be described (" in line and line.endswith("is libtpu installed?")


def test_a_config_that_is_not_there_is_one_line_and_status_2(tmp_path):
    assert "nothing.json: cannot be read" in said(run("--config", tmp_path / "nothing.json"))


@libtpu_only
def test_a_model_is_compiled_for_chips_that_are_not_there(config):
    done = run("--config", config, "--topology", "v5e:2x2", "--mesh", "data=2,tensor=2", "--batch", "2", "--length", "128")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "qwen3, 4 layers, width 64, on v5e:2x2 (4 of 4 chips, data=2,tensor=2)"
    assert second.startswith("compiled in ") and "GiB of arguments" in second


@libtpu_only
def test_rows_that_do_not_fit_the_mesh_are_refused(config):
    assert "batch 3" in said(run("--config", config, "--mesh", "data=4", "--batch", "3"))
    assert "taps 5" in said(run("--config", config, "--taps", "5"))
