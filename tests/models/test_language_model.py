import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from qscope_jax.errors import ConfigError, InputError, SourceError
from qscope_jax.models.edits import AddDirections, where
from qscope_jax.models.language_model import LanguageModel, forward, load_model

TEXTS = ["5 17 80 33 2 9 61 44 90 12 3", "7 30 4", "66 1 1 58 20 6 19"]
WORDS = ["zero", "one", "two", "three", "<end>"]


@pytest.fixture(scope="module")
def model(tiny_config, random_decoder, number_tokenizer) -> LanguageModel:
    return LanguageModel(random_decoder(tiny_config(max_positions=32)), tokenizer=number_tokenizer)


@pytest.fixture
def folder(make_reference, tmp_path) -> Path:
    """A checkpoint with a tokenizer that knows five words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    copy = Path(shutil.copytree(make_reference("tied").folder, tmp_path / "checkpoint"))
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="zero"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(copy / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "clean_up_tokenization_spaces": False}
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    return copy


def test_a_text_that_begins_with_the_begin_token_gets_no_second_one(tiny_config, random_decoder):
    """As Gemma's and Llama's tokenizers add it, and their chat templates write it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<bos>": 0, "a": 1, "b": 2}, unk_token="b"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(["<bos>"])
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>")
    model = LanguageModel(random_decoder(tiny_config(max_positions=32)), tokenizer=tokenizer)
    assert model.tokenize(["a b", "<bos> a b", "<bos> <bos> a"]) == [[0, 1, 2], [0, 1, 2], [0, 0, 1]]


def test_residuals_come_by_layer_with_padding_on_the_right(model):
    out = model.residuals(TEXTS, [1, 0])
    assert out.values.shape == (2, 3, 16, 32)
    assert out.mask.sum(axis=1).tolist() == [11, 3, 7] and out.mask[1, :3].all()
    assert out.tokens[1, :4].tolist() == [7, 30, 4, 0]
    expected = forward(model.decoder, out.tokens, out.mask.astype(np.int32), taps=jnp.arange(3, dtype=jnp.int32)).residuals
    for got, layer in zip(np.asarray(out.values), (1, 0), strict=True):
        np.testing.assert_allclose(got[out.mask], np.asarray(expected)[layer][out.mask], atol=1e-5)


def test_residuals_and_logits_feel_an_edit(model):
    stacked = jax.tree.map(lambda leaf: leaf[None], where("0"))
    edit = AddDirections(jnp.asarray([0], jnp.int32), jnp.ones((1, 32)), jnp.full((1, 1), 3.0), stacked)
    edited, plain = (np.asarray(model.residuals(TEXTS, [1, 0], edits=edits).values[1]) for edits in ([edit], []))
    np.testing.assert_allclose(edited[:, 0], plain[:, 0] + 3, atol=1e-5)
    assert np.array_equal(edited[:, 1:], plain[:, 1:])
    logits, mask = model.logits(TEXTS, edits=[edit])
    assert logits.shape == (3, 16, 97) and mask.sum() == 21
    weaker, _ = model.logits(TEXTS, edits=[dataclasses.replace(edit, strengths_BW=jnp.zeros((1, 1)))])
    assert not np.array_equal(logits, weaker)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([3], "layer 3 is out of range; in memory has layers 0 to 2"),
        ([-1], "layer -1 is out of range"),
        ([], "give one or more"),
        ([1, 1], "none of them twice"),
    ],
)
def test_layers_that_are_not_there_are_refused(model, layers, message):
    with pytest.raises(InputError, match=message):
        model.residuals(TEXTS, layers)


@pytest.mark.parametrize(("texts", "message"), [([], "non-empty list"), ("5 6", "non-empty list of texts"), (["5", " "], "text 1 is empty")])
def test_texts_without_tokens_are_refused(model, texts, message):
    for call in (model.tokenize, lambda texts: model.residuals(texts, [0]), model.generate):
        with pytest.raises(InputError, match=message):
            call(texts)


def test_one_prompt_in_the_place_of_a_list_is_refused_in_a_chat_too(model):
    with pytest.raises(InputError, match="non-empty list of texts"):
        model.generate("5 6", chat=True)


def test_chat_wraps_each_prompt_in_the_template(model, monkeypatch):
    heard = []
    monkeypatch.setattr(model, "batch", lambda texts, side: heard.append((texts, side)) or LanguageModel.batch(model, []))
    with pytest.raises(InputError):  # what the prompts became is heard; generating from them is tested elsewhere
        model.generate(["5 6", "7"], chat=True)
    assert heard == [(["1 5 6 2 3", "1 7 2 3"], "left")]


def test_a_tokenizer_without_a_template_cannot_chat(folder):
    with pytest.raises(InputError, match="its tokenizer has no chat template; generate without chat"):
        load_model(folder).generate(["one"], chat=True)


def test_what_does_not_fit_the_context_is_refused(model):
    with pytest.raises(InputError, match="11 prompt tokens and 22 new ones exceed the model's 32 positions"):
        model.generate(TEXTS, max_new_tokens=22)


@pytest.mark.parametrize(("settings", "message"), [({"heat": 1}, "unknown generation setting .*heat"), ({"top_p": 2.0}, "top_p is 2.0")])
def test_settings_that_are_unknown_or_out_of_range_are_refused(model, settings, message):
    with pytest.raises(InputError, match=message):
        model.generate(TEXTS, **settings)


def test_text_goes_in_and_text_comes_out(folder):
    model = load_model(folder, scan=True)
    assert model.tokenize(["one three", "two"]) == [[1, 3], [2]]
    # As many prompts and tokens as in the tests of generation, whose program is used again.
    for completion in model.generate(["one three", "two", "three"], max_new_tokens=24):
        assert completion.text.split() == [WORDS[token] for token in completion.token_ids if token < len(WORDS)]
    assert model.name == str(folder) and load_model(folder).tokenizer is not model.tokenizer


def test_a_source_without_a_tokenizer_says_so(make_reference, random_decoder, tiny_config):
    with pytest.raises(SourceError, match="has no tokenizer; put tokenizer.json and tokenizer_config.json there"):
        load_model(make_reference("tied").folder).tokenize(["x"])
    with pytest.raises(SourceError, match="made in memory; pass tokenizer="):
        LanguageModel(random_decoder(tiny_config())).tokenize(["x"])


def test_a_damaged_tokenizer_is_a_source_error(folder):
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(SourceError, match="its tokenizer cannot be read"):
        load_model(folder).tokenize(["x"])


def test_a_cpu_unrolls_layers_unless_told_otherwise(folder):
    assert [load_model(folder, scan=scan).config.repeats for scan in (None, False, True)] == [1, 1, 3]


def test_a_users_explicit_mesh_becomes_ours(folder):
    model = load_model(folder, mesh=jax.make_mesh((2,), ("tensor",)))
    assert model.mesh.shape["tensor"] == 2 and set(model.mesh.axis_types) == {AxisType.Auto}
    with pytest.raises(ConfigError, match="unknown axis 'x'"):
        load_model(folder, mesh="x=2")


def test_a_source_that_is_nowhere_is_refused(tmp_path):
    with pytest.raises(SourceError, match="no such folder, and not a hub id"):
        load_model(tmp_path / "nothing")
