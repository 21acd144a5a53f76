import numpy as np
import pytest

from qscope_jax.errors import ConfigError, InputError
from qscope_jax.features.explain.contexts import TextFacts, Window, firing_texts, read_contexts, read_silent_contexts
from tests.features.made_store import make_store

TEXTS = 9
LANGUAGES = ["English", "French", "Latin"] * 3


@pytest.fixture(scope="module")
def readout(readout_of):
    """Nine texts of 2 to 10 tokens; 5 features of which the last never fires, activations that bfloat16 holds exactly, feature 3 at first tokens."""
    rng = np.random.default_rng(0)
    texts = []
    for text in range(TEXTS):
        activation = rng.integers(1, 200, (2 + text, 5)) * (rng.random((2 + text, 5)) < 0.3)
        activation[:, 4] = 0
        activation[0, 3] = 1000
        texts.append(activation)
    return readout_of(*texts, layer=6)


@pytest.fixture(scope="module")
def store(readout, tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("s") / "store", readout, columns={"language": LANGUAGES, "list": [[1]] * 9, "long": ["x" * 300] * 9})


def truth(readout, feature: int) -> dict[int, tuple[float, int]]:
    """Maximum and firing tokens of each text in which a feature fires."""
    found = {text: readout.activation(text, feature) * readout.counted[text] for text in range(TEXTS)}
    return {text: (float(a.max()), int((a > 0).sum())) for text, a in found.items() if a.max() > 0}


@pytest.mark.parametrize("entries", [1, 7, 10**6])
def test_firing_texts_are_those_of_the_codes_however_many_are_read_at_once(store, readout, entries):
    found = list(firing_texts(store, 6, [4, 2, 0, 3], entries=entries))
    assert [one.feature for one in found] == [4, 2, 0, 3]
    for one in found:
        rows = zip(one.texts.tolist(), zip(one.maxima.tolist(), one.counts.tolist(), strict=True), strict=True)
        assert dict(rows) == truth(readout, one.feature)
        assert (np.diff(one.maxima) <= 0).all()
    assert [one.feature for one in firing_texts(store, 6)] == list(range(5))


@pytest.mark.parametrize("texts", [[5], range(TEXTS)], ids=["text by text", "shard by shard"])
def test_a_context_is_the_stretch_around_the_highest_counted_token(store, readout, texts, monkeypatch):
    monkeypatch.setattr("qscope_jax.features.explain.contexts._ONE_BY_ONE", 2)
    pairs = [(feature, text) for feature in range(4) for text in texts if text in truth(readout, feature)]
    contexts = read_contexts(store, 6, *zip(*pairs, strict=True), Window(2, 1))
    assert len(contexts) == len(pairs)
    for (feature, text), context in zip(pairs, contexts, strict=True):
        activation = readout.activation(text, feature) * readout.counted[text]
        peak, length = int(activation.argmax()), len(activation)
        stretch = range(max(peak - 2, 0), min(peak + 2, length))
        assert (context.text, context.start, context.start + context.peak) == (text, stretch[0], peak)
        assert context.activations == tuple(float(activation[i]) for i in stretch)
        assert context.token_ids == tuple(readout.token_ids[text][i] for i in stretch)
        assert context.about["language"] == LANGUAGES[text]


def test_what_a_text_is_known_by_is_short_and_plain(store):
    about = TextFacts(store)(1)
    assert set(about) == {"language", "long"} and about["long"] == "x" * 99 + "…"


def test_silent_contexts_hold_no_token_at_which_the_feature_fires_counted_or_not(store, readout):
    """Feature 3 fires at every first token, which does not count."""
    drawn = [
        context for seed in range(20) for context in read_silent_contexts(store, 6, 3, range(TEXTS), 4, Window(1, 1), np.random.default_rng(seed))
    ]
    assert len(drawn) > 20 and len(read_silent_contexts(store, 6, 4, range(TEXTS), 4, Window(), np.random.default_rng(0))) == 4
    for context in drawn:
        stretch = slice(context.start, context.start + len(context.token_ids))
        assert context.start > 0 and set(context.activations) == {0.0} and len(context.token_ids) <= 3
        assert not readout.activation(context.text, 3)[stretch].any()
        assert context.token_ids == readout.token_ids[context.text][stretch]


def test_bad_requests_are_refused(store, readout, tmp_path):
    with pytest.raises(InputError, match="feature 5 is out of range; layer 6"):
        firing_texts(store, 6, [0, 5])
    with pytest.raises(InputError, match="given twice"):
        firing_texts(store, 6, [1, 1])
    with pytest.raises(InputError, match="has no layer 2"):
        firing_texts(store, 2)
    with pytest.raises(InputError, match="text 9 is out of range"):
        read_contexts(store, 6, [0], [9], Window())
    with pytest.raises(ConfigError, match="0 or more"):
        Window(-1)
    bare = make_store(tmp_path / "bare", readout, codes=False)
    with pytest.raises(InputError, match="keeps no token's code"):
        read_contexts(bare, 6, [0], [1], Window())
