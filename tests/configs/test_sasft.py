from pathlib import Path

import pytest

from qscope_jax.cli import dapo, language_features, sft
from qscope_jax.cli.options import parse
from qscope_jax.training.dapo.rewards import load_rewards

FOLDER = Path(__file__).parents[2] / "configs" / "sasft"
FEATURES = sorted(FOLDER.glob("features_*.yaml"))
GRPO = FOLDER.parent / "dapo" / "grpo_script_qwen3_1.7b_zh.yaml"
TRAINING = sorted(set(FOLDER.glob("*.yaml")) - set(FEATURES))
MODELS = ("qwen3_1.7b", "qwen3_8b", "gemma2_2b", "gemma2_9b", "llama3.1_8b", "tiny")


def test_every_model_of_the_paper_has_its_three_languages():
    assert {file.stem for file in TRAINING} == {f"{model}_{language}" for model in MODELS for language in ("zh", "ru", "ko")}
    assert {file.stem for file in FEATURES} == {f"features_{model}" for model in MODELS}


@pytest.mark.parametrize("file", TRAINING, ids=lambda file: file.stem)
def test_a_run_is_read_and_its_header_says_how_to_make_what_it_needs(file):
    config = parse("sft train", sft.Config, ["--config", str(file)])
    model, language = file.stem.rsplit("_", 1)
    assert config.method == "sasft" and config.language == language and config.features.endswith(file.stem)
    header = file.read_text(encoding="utf-8").split("\nmodel:")[0]
    assert f"qscope sft features --config configs/sasft/features_{model}.yaml --language {language} --out {config.features}\n" in header
    assert f"qscope sft train --config configs/sasft/{file.name}" in header
    assert f"code-switch measure --model {config.out}/model --language {language}" in header


@pytest.mark.parametrize("file", FEATURES, ids=lambda file: file.stem)
def test_features_are_of_the_last_two_layers_of_the_model_that_is_trained(file):
    config = parse("sft features", language_features.Config, ["--config", str(file)])
    trained = parse("sft train", sft.Config, ["--config", str(FOLDER / f"{file.stem.removeprefix('features_')}_zh.yaml")])
    assert config.model == trained.model and len(config.layers) == 2 and config.count == (16 if config.model == "tiny" else 2)
    assert config.layers[1] == config.layers[0] + 1


def test_the_grpo_baseline_begins_where_plain_fine_tuning_ended_and_asks_for_the_prompts_language():
    config = parse("dapo train", dapo.Config, ["--config", str(GRPO)])
    (reward,) = load_rewards(dapo.read_rewards(config.rewards))
    assert config.loss_type == "grpo" and config.model.endswith("_sft/model") and reward.missing(["language"]) == []
