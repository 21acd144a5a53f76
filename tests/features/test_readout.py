import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.errors import InputError, ShapeError
from qscope_jax.features import readout as module
from qscope_jax.features.readout import read_features, read_token_features, token_texts
from qscope_jax.sae.autoencoder import SparseAutoencoder, densify
from qscope_jax.sae.layer_sae import LayerSAE

# Rows of 16 tokens when alone, but for the second.
TEXTS = ["one", "longer than others", "x", "in~the~middle"]


@pytest.fixture
def readout(readout_of):
    """Two texts and three features; the first token of each does not count."""
    return readout_of([[9, 9, 9], [2, 0, 1], [4, 0, 0]], [[9, 0, 0], [0, 3, 0]])


def test_activation_is_that_of_the_feature_at_every_token(readout):
    np.testing.assert_array_equal(readout.activation(0, 0), [9, 2, 4])
    np.testing.assert_array_equal(readout.activation(1, 2), [0, 0])
    assert len(readout) == 2


def test_sums_count_activations_and_firing_tokens_of_each_text(readout):
    sums, fires, tokens = readout.text_sums()
    np.testing.assert_array_equal(sums, [[6, 0, 1], [0, 3, 0]])
    np.testing.assert_array_equal(fires, [[2, 0, 1], [0, 1, 0]])
    np.testing.assert_array_equal(tokens, [2, 1])
    np.testing.assert_array_equal(readout.text_means(), [[3, 0, 0.5], [0, 3, 0]])


def test_means_and_rates_are_over_tokens_not_over_texts(readout):
    means, rates = readout.means()
    np.testing.assert_allclose(means, [2, 1, 1 / 3])
    np.testing.assert_allclose(rates, [2 / 3, 1 / 3, 1 / 3])
    assert readout.counted_tokens == 3


def test_a_slot_without_an_activation_counts_for_no_feature(readout):
    void = dataclasses.replace(readout, indices=tuple(np.where(v == 0, 1, i) for v, i in zip(readout.values, readout.indices, strict=True)))
    for before, after in zip(readout.text_sums(), void.text_sums(), strict=True):
        np.testing.assert_array_equal(before, after)
    assert void.top(0, 3) == readout.top(0, 3)


def test_top_ranks_by_the_largest_or_the_mean_activation(readout_of):
    readout = readout_of([[9, 9, 9, 9], [3, 2, 0, 0], [0, 2, 0, 0], [0, 2, 0, 0]])
    assert readout.top(0, 4, by="max") == [(0, 3.0), (1, 2.0)]
    assert readout.top(0, 4, by="mean") == [(1, 2.0), (0, 1.0)]
    assert readout.top(0, 1) == [(0, 3.0)]


def test_top_of_a_text_of_one_token_is_over_that_token(readout_of):
    assert readout_of([[0, 5, 1]]).top(0, 3) == [(1, 5.0), (2, 1.0)]


def test_a_readout_of_nothing_that_counts_has_means_of_zero(readout_of):
    readout = readout_of([[1, 2, 3]])
    assert not readout.text_means().any() and not readout.means()[0].any()


def test_every_token_reads_as_the_sae_encodes_its_residual_stream(character_model, saes):
    readouts = read_features(character_model, saes[::-1], TEXTS)
    assert list(readouts) == [2, 1, 0]
    for row, text in enumerate(TEXTS):
        alone = character_model.residuals([text], [0, 1, 2]).values[:, 0]
        for sae in saes:
            readout, x = readouts[sae.layer], alone[sae.layer]
            dense = np.zeros((len(text), sae.num_features), np.float32)
            np.add.at(dense, (np.arange(len(text))[:, None], readout.indices[row]), readout.values[row])
            expected = np.asarray(densify(sae.encode(x), sae.num_features))[: len(text)]
            np.testing.assert_allclose(dense, expected, atol=1e-4 * expected.max())
            np.testing.assert_allclose(readout.norms[row], np.linalg.norm(x, axis=-1)[: len(text)], rtol=1e-4)
            assert (readout.layer, readout.num_features, readout.texts) == (sae.layer, 24, tuple(TEXTS))
            assert readout.token_ids[row] == tuple(ord(c) - 30 for c in text)
            assert {len(column[row]) for column in (readout.values, readout.indices, readout.norms, readout.counted)} == {len(text)}
    assert any(np.abs(a - b).max() > 1 for a, b in zip(readouts[0].values, readouts[1].values, strict=True))


def test_tokens_read_as_their_text_does(character_model, saes):
    ids = [[ord(character) - 30 for character in text] for text in TEXTS]
    by_tokens, by_text = read_token_features(character_model, saes, ids), read_features(character_model, saes, TEXTS)
    assert by_tokens[2].texts == tuple(TEXTS) and by_tokens[2].token_ids == by_text[2].token_ids
    for layer in range(3):
        for ours, theirs in zip(by_tokens[layer].values, by_text[layer].values, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_several_batches_read_as_one(character_model, saes, monkeypatch):
    whole = read_features(character_model, saes, TEXTS)
    monkeypatch.setattr(module, "BATCH_TEXTS", 2)
    parts = read_features(character_model, saes, TEXTS)
    for layer in (0, 2):
        assert whole[layer].token_ids == parts[layer].token_ids
        for a, b in zip(whole[layer].values, parts[layer].values, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


def test_first_tokens_and_outliers_of_the_norm_are_not_counted_by_default(character_model, saes):
    counted = read_features(character_model, saes, TEXTS)[0].counted
    for text, row in zip(TEXTS, counted, strict=True):
        assert row.tolist() == [i > 0 and character != "~" for i, character in enumerate(text)]
    every = read_features(character_model, saes, TEXTS, drop_first=False, max_norm_multiple=0.0)[0].counted
    assert all(row.all() for row in every)
    first = read_features(character_model, saes, TEXTS, drop_first=False)[0].counted
    assert [row.sum() for row in first] == [len(text) - text.count("~") for text in TEXTS]


def test_tokens_show_as_text(character_model):
    assert token_texts(character_model, [ord("h") - 30, ord("i") - 30]) == ["h", "i"]


def test_what_cannot_be_read_is_refused_in_one_line(character_model, saes, readout):
    narrow = LayerSAE(SparseAutoencoder(jnp.ones((8, 16)), jnp.ones((8, 16)), jnp.zeros(8), jnp.zeros(16), k=2), 0)
    cases = [
        (ShapeError, "16 wide", lambda: read_features(character_model, [narrow], TEXTS)),
        (InputError, "layer 3 is out of range", lambda: read_features(character_model, [dataclasses.replace(saes[0], layer=3)], TEXTS)),
        (InputError, r"layers \[1, 1\]", lambda: read_features(character_model, [saes[1], saes[1]], TEXTS)),
        (InputError, "no SAE", lambda: read_features(character_model, [], TEXTS)),
        (InputError, "non-empty list", lambda: read_features(character_model, saes, [])),
        (InputError, "non-empty list", lambda: read_features(character_model, saes, "a text")),
        (InputError, "text 40 is empty", lambda: read_features(character_model, saes, ["a"] * 40 + [""])),
        (InputError, "text 1 has token id 97", lambda: read_token_features(character_model, saes, [[1], [97]])),
        (InputError, "text 0 has token id -1", lambda: read_token_features(character_model, saes, [[1, -1]])),
        (InputError, "none of one text", lambda: read_token_features(character_model, saes, [[1], []])),
        (InputError, "no token ids to read", lambda: read_token_features(character_model, saes, [])),
        (InputError, "'max' or 'mean'", lambda: readout.top(0, 1, by="median")),
        (InputError, "feature 3 is out of range", lambda: readout.activation(0, 3)),
    ]
    for kind, line, call in cases:
        with pytest.raises(kind, match=line) as caught:
            call()
        assert "\n" not in str(caught.value)
