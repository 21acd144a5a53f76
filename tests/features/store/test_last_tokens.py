import numpy as np
import pytest

from qscope_jax.errors import InputError
from qscope_jax.features.readout import read_features
from qscope_jax.features.store.last_tokens import read_last_tokens
from qscope_jax.features.text_features import text_features

TEXTS = ["the last", "a", "some longer text than that", "of them", "and one more"]


def test_last_codes_are_those_of_a_whole_reading(character_model, saes):
    seen = []
    found = read_last_tokens(character_model, saes[1:], TEXTS, batch_size=2, progress=seen.append)
    whole = read_features(character_model, saes[1:], TEXTS)
    assert list(found) == [1, 2] and seen == [2, 4, 5]
    for layer, table in found.items():
        assert table.shape == (5, 24)
        np.testing.assert_allclose(table.toarray(), text_features(whole[layer]).last.toarray(), rtol=1e-4, atol=1e-5)


def test_of_a_long_text_the_end_is_read(character_model, saes):
    cut, alone = (read_last_tokens(character_model, saes[:1], [text], max_tokens=5)[0] for text in ("some longer text", " text"))
    np.testing.assert_allclose(cut.toarray(), alone.toarray(), rtol=1e-4)


def test_no_more_is_read_than_the_model_has_positions(character_model, saes):
    text = "ab" * character_model.config.max_positions
    whole, cut = (read_last_tokens(character_model, saes[:1], [one], max_tokens=10**6)[0] for one in (text, text[len(text) // 2 :]))
    np.testing.assert_allclose(whole.toarray(), cut.toarray(), rtol=1e-4)


def test_bad_requests_are_refused(character_model, saes):
    with pytest.raises(InputError, match=r"SAEs of layers \[1, 1\]: give one or more, of each layer one"):
        read_last_tokens(character_model, [saes[1], saes[1]], TEXTS)
    with pytest.raises(InputError, match="text 0 is empty"):
        read_last_tokens(character_model, saes, [""])
