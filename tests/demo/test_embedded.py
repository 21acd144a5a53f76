import json

import numpy as np
import pytest

from qscope_jax.demo import embedded
from qscope_jax.demo.corpus import sentences
from qscope_jax.demo.embedded import END_TOKEN, TINY, TinySAESettings, sae_training, save_saes, tiny_model, tiny_saes
from qscope_jax.errors import SourceError
from qscope_jax.features.scripts import script_share
from qscope_jax.sae.layer_sae import LayerSAE, SAECollection
from qscope_jax.training.activations import ActivationStream
from qscope_jax.training.loop import LoopConfig, train

embedded_model = pytest.mark.skipif(not (TINY / "model.safetensors").is_file(), reason="the embedded model is not there")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@embedded_model
def test_the_folder_is_at_most_four_megabytes():
    files = [path for path in TINY.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 4_000_000
    assert {"config.json", "model.safetensors", "recipe.json", "tokenizer.json"} <= {path.name for path in files}


@embedded_model
def test_it_loads_as_it_was_made(model):
    record = json.loads((TINY / "recipe.json").read_text(encoding="utf-8"))
    assert model.config.num_layers == 6 and model.config.d_model == 128 and model.config.dtype == "float32"
    assert model.config.eos_token_ids == (END_TOKEN,) and len(model.tokenizer) == model.config.vocab_size
    # As likely as any other, a token would cost log 3072 = 8.03.
    assert record["metrics"]["held_out_loss"] < 5.0


@embedded_model
@pytest.mark.parametrize(
    ("script", "prompts"),
    [
        ("Latin", [" ".join(line.split()[:4]) for line in sentences("en", held_out=True)[::5]]),
        ("Han", [line[:6] for line in sentences("zh", held_out=True)[::5]]),
    ],
)
def test_it_goes_on_in_the_language_of_the_prompt(model, script, prompts):
    completions = model.generate(prompts, max_new_tokens=24)
    # Mostly: the training documents change language now and then.
    assert len(prompts) == 16 and script_share([completion.text for completion in completions], script) > 0.7


SMALL = TinySAESettings(num_features=16, k=2, steps=1, batch_tokens=16)


def test_training_makes_an_sae_for_every_layer(small_corpus, small_model):
    recipe = sae_training(small_model, sentences("en"), SMALL)
    saes = recipe.export(train(recipe, LoopConfig(steps=1, progress=False)))
    assert [(sae.layer, sae.num_features, sae.k, sae.d_model) for sae in saes] == [(0, 16, 2, 32), (1, 16, 2, 32)]


def test_documents_end_with_the_end_token(small_corpus, small_model):
    stream = sae_training(small_model, ["Good morning."], SMALL).activations()
    assert isinstance(stream, ActivationStream)
    tokens = next(stream.tokens).tokens_BT
    assert END_TOKEN in tokens and END_TOKEN not in small_model.tokenize(["Good morning."])[0]


@pytest.fixture
def stand_in(tmp_path, monkeypatch, small_model, small_corpus) -> None:
    """The small model in the place of the embedded one, and an empty cache."""
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setattr(embedded, "TINY", tmp_path / "tiny")
    monkeypatch.setattr(embedded, "TinySAESettings", lambda: SMALL)
    monkeypatch.setattr(embedded, "tiny_model", lambda: small_model)
    monkeypatch.setattr(embedded, "documents", lambda count, seed: sentences("en"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_the_saes_are_trained_once_for_each_model_and_kept(stand_in, tmp_path, monkeypatch):
    said: list[str] = []
    folder = tiny_saes(said.append)
    assert folder.is_relative_to(tmp_path / "cache" / "qscope_jax") and len(said) == 1 and str(folder) in said[0]
    assert SAECollection(folder).layers == [0, 1] and SAECollection(folder)[1].num_features == 16
    with monkeypatch.context() as patch:
        patch.setattr(embedded, "train", None)
        assert tiny_saes(said.append) == folder and len(said) == 1
    (tmp_path / "tiny" / "model.safetensors").write_bytes(b"other weights")
    assert tiny_saes(said.append) != folder and len(said) == 2


def test_saes_are_written_as_they_are_and_never_over_a_file(tmp_path, small_model, small_corpus):
    recipe = sae_training(small_model, sentences("en"), SMALL)
    saes = recipe.export(recipe.init())
    save_saes(tmp_path / "saes", saes)
    back: LayerSAE = SAECollection(tmp_path / "saes")[1]
    for name, array in saes[1].to_arrays().tensors().items():
        np.testing.assert_array_equal(back.to_arrays().tensors()[name], array)
    (tmp_path / "file").write_text("x")
    with pytest.raises(SourceError, match="is a file, expected a folder"):
        save_saes(tmp_path / "file", saes)
