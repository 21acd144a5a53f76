import json

import numpy as np
import pytest

from qscope_jax.cli.main import main
from qscope_jax.cli.switch_effects import AblateConfig, EffectOptions, TraceConfig
from qscope_jax.features.switching.language_features import LanguageFeatures
from qscope_jax.features.switching.switch_ablation import AblationConfig
from qscope_jax.features.switching.switch_traces import WINDOW
from qscope_jax.sae.encoder_rows import encoder_rows
from qscope_jax.sae.layer_sae import load_sae

ONE = ("--layer", 2, "--feature", "3,7")


@pytest.fixture(scope="module")
def answers(model, tmp_path_factory):
    """Answers to two prompts, some of which have switched."""
    folder = tmp_path_factory.mktemp("answers")
    lines = [json.dumps({"prompt": prompt, "language": "en"}) for prompt in ("My grandmother", "made tea in")]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    options = ["--max-new-tokens", "8", "--samples", "8", "--responses", str(folder / "a.jsonl"), "--model", model]
    assert main(["code-switch", "measure", "--prompts", str(folder / "prompts.jsonl"), *options]) == 0
    return folder / "a.jsonl"


@pytest.fixture(scope="module")
def language_features(model, saes, tmp_path_factory):
    """Factory of folders with features 3 and 7 (or others) of layers 1 and 2, as those of a language."""

    def make(language: str, *features: int):
        chosen = features or (3, 7)
        rows = tuple(encoder_rows(load_sae(saes, layer), chosen) for layer in (1, 2))
        scores, levels = np.ones((2, len(chosen)), np.float32), np.zeros((2, 2, len(chosen)), np.float32)
        names = (language, ("zh", "en"), (1, 2), np.array([chosen, chosen]))
        found = LanguageFeatures(*names, scores, levels, np.array([9, 9]), "its base", saes, rows)
        folder = tmp_path_factory.mktemp("features") / language
        found.save(folder)
        return folder

    return make


@pytest.fixture
def done(qscope, answers, model, tmp_path):
    """Run an action, and read what it wrote."""

    def run(action: str, *arguments) -> dict:
        files = ("--out", tmp_path / "o.json", "--page", tmp_path / "p.html")
        answer = qscope("code-switch", action, answers, "--model", model, *arguments, *files)
        assert answer.status == 0, answer.err
        assert "Plotly" in (tmp_path / "p.html").read_text(encoding="utf-8")
        return json.loads((tmp_path / "o.json").read_text()) | {"said": answer.out}

    return run


def test_features_are_traced_by_number_and_by_folder_alike(done, saes, language_features):
    by_number = done("trace", "--sae", saes, *ONE, "--window", 3)
    by_folder = done("trace", "--features", language_features("zh"), "--window", 3)
    assert list(by_number["layers"]) == ["2"] and list(by_folder["layers"]) == ["1", "2"]
    found = by_folder["layers"]["2"]
    assert found["features"] == [3, 7] and found["offsets"] == [-3, -2, -1, 0, 1, 2, 3] and by_folder["script"] == "Han"
    assert found["switched"]["counts_O"][3] == by_folder["switches"] > 0 and len(found["baseline"]["mean_OS"]) == 7
    np.testing.assert_allclose(found["switched"]["mean_OS"][3], by_number["layers"]["2"]["switched"]["mean_OS"][3], rtol=1e-4)
    assert "Layer 2: mean pre-activation around a switch" in by_number["said"]


def test_some_switches_are_traced(done, saes):
    assert done("trace", "--sae", saes, *ONE, "--limit", 2, "--matches", 1)["switches"] == 2


def test_directions_are_taken_away_beside_controls(done, saes, language_features):
    options = ("--doses", "0,5", "--random", 2, "--draws", 2, "--draw-tokens", 2)
    by_number = done("ablate", "--sae", saes, *ONE, "--control", 5, *options)
    assert by_number["layer"] == 2 and by_number["doses"] == [0, 5] and by_number["residual_norm"] > 0
    names = ["feature 3", "feature 7", "control feature 5", "2 random features"]
    assert list(by_number["features"]) == names == list(by_number["measures"]["probability"])
    assert not {3, 5, 7} & set(by_number["features"]["2 random features"])
    assert list(by_number["measures"]) == ["probability", "drawn", "observed", "resampled"]
    curve = by_number["measures"]["probability"]["feature 3"]
    assert len(curve["mean"]) == 2 and 0 < curve["mean"][0] < 1 and curve["mean"][0] != curve["mean"][1]
    folders = ("--features", language_features("zh"), "--control-features", language_features("en", 5))
    by_folder = done("ablate", *folders, *options)
    assert list(by_folder["features"])[:3] == ["zh feature 3", "zh feature 7", "en feature 5"]
    np.testing.assert_allclose(by_folder["measures"]["observed"]["zh feature 3"]["mean"], by_number["measures"]["observed"]["feature 3"]["mean"])
    assert done("ablate", "--features", language_features("zh"), "--layer", 1, "--random", 0, "--doses", "0,1")["layer"] == 1


@pytest.mark.parametrize(
    ("action", "arguments", "said"),
    [
        ("trace", [], "give either --features, a folder, or --feature with --layer"),
        ("trace", ["--feature", "3"], "--feature needs --layer"),
        ("trace", ["--feature", "99", "--layer", 2], "feature 99 is out of range"),
        ("trace", ["--feature", "3", "--layer", 7], "layer 7 is out of range"),
        ("trace", ["--features", "nowhere"], "nowhere: holds no language features"),
        ("trace", [*ONE, "--language", "th"], "answers contains Thai"),
        ("trace", [*ONE, "--window", 0], "window is 0, expected 1 or more"),
        ("trace", [*ONE, "--batch-size", 0], "batch_size is 0"),
        ("ablate", [*ONE, "--doses", "1,1"], "none of them twice"),
        ("ablate", [*ONE, "--random", 99], "cannot draw 99 features"),
        ("ablate", [*ONE, "--draws", -1], "draws is -1"),
    ],
)
def test_what_has_no_effect_to_show_is_refused(refused, answers, model, saes, action, arguments, said):
    assert said in refused("code-switch", action, answers, "--model", model, "--sae", saes, *arguments)


def test_answers_of_another_model_are_refused(refused, answers, saes, tmp_path):
    assert "has answers of" in refused("code-switch", "trace", answers, *ONE, "--sae", saes)
    assert "no such file; sample answers first" in refused("code-switch", "trace", tmp_path / "none", *ONE, "--sae", saes)
    assert "FILE is missing" in refused("code-switch", "ablate", *ONE)


def test_defaults_are_the_library_s():
    assert TraceConfig.window == WINDOW and EffectOptions.batch_size == AblationConfig.batch_size
    assert [getattr(AblateConfig, name) for name in ("doses", "unit", "draws", "draw_tokens")] == [
        getattr(AblationConfig, name) for name in ("doses", "unit", "draws", "draw_tokens")
    ]
