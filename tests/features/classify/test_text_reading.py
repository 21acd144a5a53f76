import numpy as np
import pytest

from qscope_jax.errors import InputError, ShapeError
from qscope_jax.features.classify.text_reading import ReadingConfig, read_texts
from qscope_jax.features.readout import read_features
from qscope_jax.features.text_features import text_features

TEXTS = ["abcdefgh", "ijk", "mnop qrst uvwx", "zz", "hello there", "x"]


def assert_equal_tables(one, other):
    for name in ("maxima", "firing_counts", "last"):
        np.testing.assert_allclose(getattr(one, name).toarray(), getattr(other, name).toarray(), atol=1e-5)
    assert one.counted_tokens.tolist() == other.counted_tokens.tolist() and one.layer == other.layer


@pytest.mark.parametrize("drop_first", [True, False])
def test_tables_equal_those_of_a_readout_whatever_the_batches(character_model, saes, drop_first):
    readouts = read_features(character_model, saes, TEXTS, drop_first=drop_first)
    found = read_texts(character_model, saes, TEXTS, ReadingConfig(drop_first=drop_first, batch_size=4))
    for layer, readout in readouts.items():
        assert_equal_tables(found[layer].features, text_features(readout))


def test_a_mean_stream_is_over_the_tokens_that_count(character_model, saes):
    found = read_texts(character_model, saes[1:2], TEXTS, ReadingConfig(batch_size=4))[1]
    for row, text in enumerate(TEXTS):
        x = np.asarray(character_model.residuals([text], [1]).values[0, 0, 1 : len(text)])
        expected = x.mean(axis=0) if len(text) > 1 else np.zeros(x.shape[1])
        np.testing.assert_allclose(found.mean_streams[row], expected, atol=1e-5)


def test_a_text_reads_the_same_alone_and_among_outliers(character_model, saes):
    company = ["ab~defgh", "~~~~~~~~", "a~"]
    alone = read_texts(character_model, saes[:1], company[:1])[0].features
    among = read_texts(character_model, saes[:1], company)[0].features
    assert_equal_tables(among.select([0]), alone)
    # The tilde is 1,000 times as long as its neighbours; where all tokens are, none is an outlier.
    assert among.counted_tokens.tolist() == [6, 7, 1]


def test_long_texts_are_cut(character_model, saes):
    cut = read_texts(character_model, saes[:1], TEXTS, ReadingConfig(max_tokens=4))[0].features
    assert_equal_tables(cut, read_texts(character_model, saes[:1], [text[:4] for text in TEXTS])[0].features)


def test_bad_requests_are_refused(character_model, saes):
    with pytest.raises(InputError, match=r"SAEs of layers \[\]: give one or more"):
        read_texts(character_model, [], TEXTS)
    with pytest.raises(InputError, match=r"SAEs of layers \[0, 0\]"):
        read_texts(character_model, [saes[0], saes[0]], TEXTS)
    with pytest.raises(InputError, match="text 1 is empty"):
        read_texts(character_model, saes, ["a", ""])
    with pytest.raises(InputError, match="batch_size 0"):
        ReadingConfig(batch_size=0)
    with pytest.raises(ShapeError, match="wide"):
        read_texts(character_model, [_narrow()], TEXTS)


def _narrow():
    from qscope_jax.sae.arrays import SAEArrays
    from qscope_jax.sae.layer_sae import from_arrays

    return from_arrays(SAEArrays(*(np.ones(shape, np.float32) for shape in ((8, 4), (8, 4), 8, 4)), k=2), 0)
