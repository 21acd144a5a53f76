import json
from pathlib import Path

from qscope_jax.sae.formats.qwen_scope import RELEASES


def test_every_released_backbone_is_listed_with_its_saes(qscope, tmp_path):
    answer = qscope("models", "--out", tmp_path / "o.json")
    saved = json.loads((tmp_path / "o.json").read_text())
    assert answer.status == 0 and not answer.err and saved["verb"] == "models"
    listed = {row["name"]: row for row in saved["models"]}
    assert sorted(group for row in listed.values() for group in row["saes"]) == sorted(release.repository for release in RELEASES)
    for release in RELEASES:
        row = listed[release.backbone.removesuffix("-Base")]
        assert (row["size"]["d_model"], row["size"]["num_layers"]) == (release.d_model, release.num_layers)
    assert {"Llama-3.1-8B", "Gemma-2-2B", "Gemma-2-9B"} < listed.keys()
    assert all(name in answer.out for name in listed) and "W128K/100" in answer.out


def test_a_model_of_one_s_own_is_counted_from_its_config(qscope, model, tmp_path):
    answer = qscope("models", "--model", model, "--out", tmp_path / "o.json")
    (row,) = json.loads((tmp_path / "o.json").read_text())["models"]
    assert answer.status == 0 and row["size"]["num_layers"] == 3 and row["size"]["d_model"] == 16 and row["saes"] == []
    # Two bytes for keys and for values of every layer, head and number.
    assert row["size"]["cache_bytes_per_token"] == 2 * 2 * 3 * 8 * json.loads(Path(model, "config.json").read_text())["num_key_value_heads"]


def test_mistakes_are_one_line(refused, tmp_path):
    assert "no such folder" in refused("models", "--model", tmp_path / "none")
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    assert "mamba" in refused("models", "--model", tmp_path)
    assert "cannot be written" in refused("models", "--out", "/proc/none/out.json")
