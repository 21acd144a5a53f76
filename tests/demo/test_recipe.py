import json
from dataclasses import replace

import jax.numpy as jnp
import pytest

from qscope_jax.demo import recipe
from qscope_jax.demo.corpus import LANGUAGES, sentences
from qscope_jax.demo.task_scores import read_scores
from qscope_jax.demo.tasks import tasks
from qscope_jax.models.language_model import load_model
from qscope_jax.training.causal_lm import CausalLMConfig

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8, "vocab_size": 600}


@pytest.fixture
def small(small_corpus, monkeypatch) -> CausalLMConfig:
    """A model of one layer and a vocabulary of 600, two steps."""
    monkeypatch.setattr(recipe, "MODEL", recipe.MODEL | SMALL)
    monkeypatch.setattr(recipe, "VOCABULARY", 600)
    monkeypatch.setattr(recipe, "DOCUMENTS", 200)
    monkeypatch.setattr(recipe, "tasks", lambda: tasks()[-1:])
    return CausalLMConfig(batch_size=4, length=32, steps=2, warmup_steps=1)


def test_a_short_run_writes_a_folder_that_loads(small, tmp_path):
    out = tmp_path / "new" / "tiny"
    metrics = recipe.make_model(out, small)
    model = load_model(out)
    assert (model.config.num_layers, model.config.d_model, model.config.dtype) == (1, 32, "bfloat16")
    assert all(array.dtype == jnp.bfloat16 for array in (model.decoder.embedding[...], model.decoder.final_norm[...]))
    assert len(model.tokenizer) == 600 and model.config.eos_token_ids == (0,)
    assert jnp.isfinite(model.logits(["Good morning"])[0]).all()
    record = json.loads((out / "recipe.json").read_text(encoding="utf-8"))
    assert record["training"]["steps"] == 2 and record["documents"] == 200 and record["metrics"] == metrics
    # Untrained, every token is about as likely as any other: log 600.
    assert 5 < metrics["held_out_loss"] < 9


def test_every_checkpoint_answers_the_tasks(small, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "CHECKPOINTS", 2)
    metrics = recipe.make_model(tmp_path / "tiny", replace(small, steps=5))
    scores = read_scores(tmp_path / "tiny" / recipe.SCORES)
    # After every second step, and at the end.
    assert scores.steps.tolist() == [2, 4, 5] and list(scores.correct) == ["facts"]
    assert scores.correct["facts"].shape == (3, 60) and scores.correct["facts"].dtype == bool
    assert metrics["accuracy facts"] == scores.correct["facts"][-1].mean() and metrics["held_out_loss"] == scores.losses[-1]


def test_the_tokenizer_gives_back_every_text_and_begins_none_with_a_special_token(small_model):
    for line in [line for language in LANGUAGES for line in sentences(language)] + ["naïve 𝕏 \n\t  ok"]:
        (ids,) = small_model.tokenize([line])
        assert small_model.tokenizer.decode(ids) == line and 0 not in ids


def test_the_embedded_model_is_small_enough_to_be_embedded():
    config = recipe.MODEL
    width, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"] + config["num_key_value_heads"]
    layer = 3 * width * inner + 2 * width * heads * config["head_dim"]
    assert 2 * (config["vocab_size"] * width + config["num_hidden_layers"] * layer) < 4e6
    assert config["vocab_size"] == recipe.VOCABULARY


def test_a_folder_of_something_else_is_refused_in_one_line(small, tmp_path, monkeypatch, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    monkeypatch.setattr("sys.argv", ["recipe", "--out", str(tmp_path), "--steps", "1"])
    with pytest.raises(SystemExit) as stop:
        recipe.main()
    assert stop.value.code == 2 and "choose a new or empty one" in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
