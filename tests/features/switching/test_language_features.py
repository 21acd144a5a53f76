import json
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.data.hub import Source
from qscope_jax.errors import InputError, ShapeError, SourceError
from qscope_jax.features.switching.language_features import ARRAYS_FILE, CONFIG_FILE, LanguageFeatures
from qscope_jax.models.language_model import LanguageModel
from qscope_jax.sae.encoder_rows import EncoderRows
from qscope_jax.sae.formats.mapped_tensors import map_safetensors, write_safetensors


@pytest.fixture
def found() -> LanguageFeatures:
    """Two features at each of two layers of the character model, levels on three languages."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    return LanguageFeatures(
        language="zh",
        languages=("en", "zh", "ru"),
        layers=(1, 2),
        features_MS=np.array([[5, 3], [0, 20]]),
        scores_MS=draw(2, 2),
        alpha_MKS=draw(2, 3, 2),
        tokens_K=np.array([100, 200, 300]),
        model="in memory",
        sae="saes",
        rows=tuple(EncoderRows(jnp.asarray(draw(2, 32)), jnp.asarray(draw(2))) for _ in range(2)),
        facts={"chosen": "monolinguality"},
    )


def arrays_of(features: LanguageFeatures) -> list[np.ndarray]:
    rows = [np.asarray(array) for one in features.rows for array in (one.W_SD, one.b_S)]
    return [features.features_MS, features.scores_MS, features.alpha_MKS, features.tokens_K, *rows]


def names_of(features: LanguageFeatures) -> tuple:
    return features.language, features.languages, features.layers, features.model, features.sae, features.facts


def test_what_is_saved_comes_back_bit_for_bit_and_replaces_what_was_there(found, tmp_path):
    replace(found, language="ru").save(tmp_path / "f")
    found.save(tmp_path / "f")
    back = LanguageFeatures.load(tmp_path / "f")
    assert names_of(back) == names_of(found) and back.d_model == 32
    for ours, theirs in zip(arrays_of(found), arrays_of(back), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f"]
    assert sorted(path.name for path in (tmp_path / "f").iterdir()) == [CONFIG_FILE, ARRAYS_FILE]


def test_a_layer_and_a_feature_can_be_selected(found):
    one = found.select(layers=[2], count=1)
    assert one.layers == (2,) and one.features_MS.tolist() == [[0]]
    np.testing.assert_array_equal(one.alpha_MKS, found.alpha_MKS[1:, :, :1])
    np.testing.assert_array_equal(one.rows[0].W_SD, found.rows[1].W_SD[:1])
    turned = found.select([2, 1])
    np.testing.assert_array_equal(turned.scores_MS, found.scores_MS[::-1])
    np.testing.assert_array_equal(turned.rows[0].b_S, found.rows[1].b_S)
    with pytest.raises(InputError, match="no language features of layer 0; there are those of 1, 2"):
        found.select([0])
    for count in (0, 3):
        with pytest.raises(InputError, match=f"{count} features of a layer; there are 2"):
            found.select(count=count)


def test_another_model_is_refused(found, character_model, tiny_config):
    found.check_model(character_model)
    with pytest.raises(InputError, match="measured on Qwen/base, this model is in memory"):
        replace(found, model="Qwen/base").check_model(character_model)
    replace(found, model="Qwen/base").check_model(character_model, any_name=True)
    with pytest.raises(InputError, match="layer 3 is out of range"):
        replace(found, layers=(1, 3)).check_model(character_model)
    narrow = tuple(replace(rows, W_SD=rows.W_SD[:, :16]) for rows in found.rows)
    with pytest.raises(ShapeError, match=r"16 wide \(in memory\), but in memory has width 32"):
        replace(found, rows=narrow).check_model(character_model)


def test_a_hub_id_and_a_folder_called_like_it_are_one_model(found, character_model):
    model = LanguageModel(character_model.decoder, Source("/models/Qwen3-1.7B-Base/"))
    replace(found, model="Qwen/Qwen3-1.7B-Base").check_model(model)
    with pytest.raises(InputError, match="measured on Qwen/Qwen3-1.7B, this"):
        replace(found, model="Qwen/Qwen3-1.7B").check_model(model)


def test_parts_that_do_not_belong_together_are_refused(found, abstract_arrays):
    cases = [
        (InputError, r"layers \[\]", {"layers": ()}),
        (InputError, r"languages \['en', 'en'\]", {"languages": ("en", "en")}),
        (InputError, "levels of en, ru; expected zh", {"languages": ("en", "ru")}),
        (InputError, "and other languages", {"languages": ("zh",)}),
        (InputError, "none of them twice", {"features_MS": np.array([[5, 5], [0, 20]])}),
        (ShapeError, r"alpha_MKS has shape \[2, 2, 2\], expected \[2, 3, 2\]", {"alpha_MKS": found.alpha_MKS[:, :2]}),
        (ShapeError, r"scores_MS has shape \[2, 1\]", {"scores_MS": found.scores_MS[:, :1]}),
        (ShapeError, r"tokens_K has shape \[2\]", {"tokens_K": found.tokens_K[:2]}),
        (ShapeError, r"encoder rows have shapes \[\[2, 32\]\]", {"rows": found.rows[:1]}),
        (ShapeError, r"encoder rows have shapes .*\[2, 16\]", {"rows": (found.rows[0], replace(found.rows[1], W_SD=jnp.ones((2, 16))))}),
    ]
    for kind, line, changes in cases:
        with abstract_arrays(), pytest.raises(kind, match=line):
            replace(found, **changes)


@pytest.fixture
def folder(found, tmp_path):
    found.save(tmp_path / "f")
    return tmp_path / "f"


def test_a_missing_or_foreign_folder_is_refused_in_one_line(found, folder, tmp_path):
    with pytest.raises(SourceError, match="none: holds no language features; find them with qscope sft features"):
        LanguageFeatures.load(tmp_path / "none")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(SourceError, match="other: exists and holds no language features; choose a new folder"):
        found.save(tmp_path / "other")
    for changes, line in (({"format_version": 2}, "version 2, expected .* version 1"), ({"format": "qscope_jax classifier"}, "classifier version 1")):
        said = json.loads((folder / CONFIG_FILE).read_text())
        (folder / CONFIG_FILE).write_text(json.dumps(said | changes))
        with pytest.raises(SourceError, match=line):
            LanguageFeatures.load(folder)
        (folder / CONFIG_FILE).write_text(json.dumps(said))


def said_otherwise(**changes):
    def damage(folder):
        said = json.loads((folder / CONFIG_FILE).read_text()) | changes
        (folder / CONFIG_FILE).write_text(json.dumps({key: value for key, value in said.items() if value is not None}))

    return damage


def held_otherwise(**changes):
    def damage(folder):
        tensors = {name: np.array(array) for name, array in map_safetensors(folder / ARRAYS_FILE).items()}
        changed = tensors | {name: change(tensors[name]) for name, change in changes.items()}
        write_safetensors(folder / ARRAYS_FILE, {name: array for name, array in changed.items() if array is not None})

    return damage


def cut(folder):
    data = (folder / ARRAYS_FILE).read_bytes()
    (folder / ARRAYS_FILE).write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (cut, "truncated|shorter|ends"),
        (lambda folder: (folder / ARRAYS_FILE).unlink(), ARRAYS_FILE),
        (lambda folder: (folder / CONFIG_FILE).write_text("{"), "not valid JSON"),
        (said_otherwise(languages=None), "damaged .*languages"),
        (said_otherwise(languages=["en", "zh"]), "damaged .*alpha_MKS"),
        (said_otherwise(languages=["en", "zh", 3]), "names are not text"),
        (said_otherwise(layers=[1, -2]), r"layers are \[1, -2\]"),
        (said_otherwise(layers=[1, 7]), "damaged .*layer7.W"),
        (held_otherwise(alpha=lambda a: None), "damaged .*alpha"),
        (held_otherwise(alpha=lambda a: a * np.nan), "NaN or infinity"),
        (held_otherwise(features=lambda a: a.astype(np.float32)), "features holds float32"),
        (held_otherwise(alpha=lambda a: a[0]), r"alpha holds float32 \[3, 2\]"),
        (held_otherwise(**{"layer2.W": lambda a: a[:, :16].copy()}), r"damaged .*\[2, 16\]"),
        (held_otherwise(**{"layer2.b": lambda a: a[:1].copy()}), "encoder rows have shapes"),
    ],
)
def test_damage_is_told_in_one_line(folder, damage, line):
    damage(folder)
    with pytest.raises(SourceError, match=line) as caught:
        LanguageFeatures.load(folder)
    assert "\n" not in str(caught.value)
