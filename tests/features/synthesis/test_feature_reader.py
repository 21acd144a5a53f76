import numpy as np
import pytest

from qscope_jax.errors import InputError
from qscope_jax.features import readout
from qscope_jax.features.readout import read_features
from qscope_jax.features.synthesis import feature_reader as module
from qscope_jax.features.synthesis.feature_reader import feature_reader
from qscope_jax.features.text_features import text_features

TEXTS = ["a longer one", "one", "x", "in the middle", "another"]


@pytest.mark.parametrize("count", [1, 3, 5])
def test_tables_are_those_of_the_texts_in_their_order(character_model, saes, count):
    read = feature_reader(character_model, saes[:2], max_norm_multiple=0.0)
    found = read(TEXTS[:count])
    assert sorted(found) == [0, 1]
    for layer, readouts in read_features(character_model, saes[:2], TEXTS[:count], max_norm_multiple=0.0).items():
        expected = text_features(readouts)
        np.testing.assert_array_equal(found[layer].counted_tokens, expected.counted_tokens)
        for name in ("maxima", "firing_counts", "last"):
            np.testing.assert_allclose(getattr(found[layer], name).toarray(), getattr(expected, name).toarray(), rtol=1e-4, atol=1e-4)


def test_many_texts_are_read_some_batches_at_a_time(character_model, saes, monkeypatch):
    texts, sizes = [f"text {i} {'long ' * (i % 3)}" for i in range(40)], []
    whole = feature_reader(character_model, saes[:1])(texts)[0]
    counting = lambda model, saes, texts, **settings: sizes.append(len(texts)) or read_features(model, saes, texts, **settings)  # noqa: E731
    monkeypatch.setattr(module, "_BATCHES", 1)
    monkeypatch.setattr(module, "read_features", counting)
    found = feature_reader(character_model, saes[:1])(texts)[0]
    assert sizes == [32, 8]
    np.testing.assert_array_equal(found.counted_tokens, whole.counted_tokens)
    for name in ("maxima", "firing_counts", "last"):
        np.testing.assert_array_equal(getattr(found, name).toarray(), getattr(whole, name).toarray())


def test_other_numbers_of_texts_compile_nothing_new(character_model, saes, count_compilations):
    read = feature_reader(character_model, saes[:1])
    read(TEXTS[:4])
    with count_compilations() as compiled:
        read(TEXTS[1:4])
        read(TEXTS[2:5])
    assert compiled.count == 0


def test_no_text_is_refused(character_model, saes):
    assert readout.BATCH_TEXTS & (readout.BATCH_TEXTS - 1) == 0
    with pytest.raises(InputError, match="non-empty list"):
        feature_reader(character_model, saes)([])
