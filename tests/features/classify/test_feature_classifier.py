import json
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.errors import InputError, ShapeError, SourceError
from qscope_jax.features.classify.classification import RuleConfig
from qscope_jax.features.classify.feature_classifier import load_classifier
from qscope_jax.features.classify.fit_classifier import ClassifierConfig, classifier_from_tables, fit_classifier
from qscope_jax.features.classify.labelled_data import label_data
from qscope_jax.features.classify.text_reading import ReadingConfig, read_texts
from qscope_jax.sae.autoencoder import SparseAutoencoder
from qscope_jax.sae.layer_sae import LayerSAE

READING = ReadingConfig(batch_size=8)


@pytest.fixture(scope="module")
def labelled():
    """Texts of small letters, half of them with a capital in their middle."""
    rng = np.random.default_rng(3)
    texts = ["".join(rng.choice(list("aeinorst"), rng.integers(9, 15))) for _ in range(60)]
    return [text[:4] + "Q" + text[5:] if i % 2 else text for i, text in enumerate(texts)], ["shout" if i % 2 else "calm" for i in range(60)]


@pytest.fixture(scope="module")
def shout_saes(character_model, saes, labelled):
    """The random SAEs; feature 9 of layer 1 reads what capitals have and small letters lack."""
    sae = saes[1].autoencoder
    streams = [np.asarray(character_model.residuals([text], [1]).values[0, 0, : len(text)], np.float64) for text in labelled[0]]
    x, is_capital = np.concatenate(streams), np.array([c == "Q" for text in labelled[0] for c in text])
    inputs, heft = np.c_[x, np.ones(len(x))], np.where(is_capital, 20.0, 1.0)
    weights = np.linalg.lstsq(inputs * heft[:, None], is_capital * heft, rcond=None)[0]
    edge = (inputs @ weights)[~is_capital].max()
    W, b = np.asarray(sae.W_enc[...]).copy(), np.asarray(sae.b_enc[...]).copy()
    W[9], b[9] = 1000 * weights[:-1], 1000 * (weights[-1] - edge)
    changed = SparseAutoencoder(jnp.asarray(W), sae.W_dec[...], jnp.asarray(b), sae.b_dec[...], k=sae.k)
    return [saes[0], LayerSAE(changed, 1), saes[2]]


@pytest.fixture(scope="module")
def fitted(character_model, shout_saes, labelled):
    return fit_classifier(character_model, shout_saes, *labelled, config=ClassifierConfig(RuleConfig(k=1)), reading=READING, positive="shout")


def test_a_feature_of_the_class_is_found_and_tells_texts_held_out(fitted):
    assert [(term.layer, term.feature) for term in fitted.rule.terms] == [(1, 9)]
    assert (fitted.positive, fitted.negative, fitted.reading) == ("shout", "calm", "top_k")
    assert fitted.facts["evaluation_texts"] == 12 and fitted.facts["evaluation"]["f1"]["value"] == 1


def test_a_stream_is_answered_lazily_with_the_token_that_fires(fitted, character_model, shout_saes, labelled):
    asked = []

    def stream():
        for text in labelled[0]:
            asked.append(text)
            yield text

    answers = fitted.predict(character_model, stream(), shout_saes)
    first = next(answers)
    assert len(asked) == READING.batch_size and (first.label, first.positive, first.firings) == ("calm", False, ())
    rest = list(answers)
    assert [one.label for one in (first, *rest)] == labelled[1] and [one.text for one in (first, *rest)] == labelled[0]
    assert all((one.score > 0) == one.positive for one in rest)
    loud = rest[0].firings[0]
    assert (loud.layer, loud.feature, loud.position) == (1, 9, 4) and loud.activation > 0


def test_one_pass_says_what_the_tables_say(character_model, saes, labelled):
    texts = [*labelled[0][:20], "ab~defgh", "~~", "x"]
    data = label_data(*labelled)
    tables = {layer: found.features for layer, found in read_texts(character_model, saes, data.texts, READING).items()}
    classifier = classifier_from_tables(tables, data, saes.__getitem__, config=ClassifierConfig(RuleConfig(k=3, layers=2)), reading=READING)
    assert len(classifier.rule.terms) == 6 and len(classifier.rule.layers) == 2
    new = {layer: found.features for layer, found in read_texts(character_model, saes, texts, READING).items()}
    expected = classifier.rule.activations(new)
    found = np.concatenate([values for values, _ in classifier.activations(character_model, texts, saes)])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert [one.positive for one in classifier.predict(character_model, texts, saes)] == classifier.rule.predict(expected).tolist()


def test_pre_activations_need_no_sae_and_are_never_below_firing(character_model, shout_saes, fitted, labelled):
    by_rows = fitted.by_pre_activation(character_model, *_discovery(labelled))
    assert [one.label for one in by_rows.predict(character_model, labelled[0])] == labelled[1]
    rows, firing = (np.concatenate([v for v, _ in c.activations(character_model, labelled[0], s)]) for c, s in ((by_rows, ()), (fitted, shout_saes)))
    assert (rows >= firing - 1e-3).all() and np.allclose(rows[firing > 0], firing[firing > 0], rtol=1e-5)
    x = np.asarray(character_model.residuals([labelled[0][1]], [1]).values[0, 0, 1 : len(labelled[0][1])])
    expected = np.maximum(np.asarray(shout_saes[1].autoencoder.pre_activations(jnp.asarray(x), jnp.asarray([9]))), 0).max()
    assert rows[1, 0] == pytest.approx(expected, rel=1e-5)


def _discovery(labelled):
    return labelled[0][:40], np.array([label == "shout" for label in labelled[1][:40]])


@pytest.mark.parametrize("reading", ["top_k", "pre_activation"])
def test_what_is_saved_answers_the_same(reading, character_model, shout_saes, labelled, tmp_path):
    config = ClassifierConfig(RuleConfig(k=2, layers=2, thresholds="f1"), reading, samples=10)
    classifier = fit_classifier(character_model, shout_saes, *labelled, config=config, reading=READING)
    classifier.save(tmp_path / "shout")
    again = load_classifier(tmp_path / "shout")
    assert again.rule == classifier.rule and again.texts == READING and again.facts == json.loads(json.dumps(classifier.facts))
    one, other = (list(c.predict(character_model, labelled[0], shout_saes)) for c in (classifier, again))
    assert one == other and sum(file.stat().st_size for file in (tmp_path / "shout").iterdir()) < 6000
    again.save(tmp_path / "shout")


def test_one_program_serves_a_stream(character_model, fitted, shout_saes, labelled, count_compilations):
    list(fitted.predict(character_model, labelled[0][:8], shout_saes))
    with count_compilations() as compiled:
        list(fitted.predict(character_model, labelled[0][:11], shout_saes))
    assert compiled.count == 0


def test_another_model_or_sae_than_that_of_the_fit_is_refused(character_model, fitted, saes, shout_saes, labelled):
    text = labelled[0][:1]
    with pytest.raises(ShapeError, match="is another SAE of layer 1 than that of the fit"):
        list(fitted.predict(character_model, text, saes))
    with pytest.raises(InputError, match="layer 1 as its SAE does; give the SAE"):
        list(fitted.predict(character_model, text, saes[:1]))
    with pytest.raises(InputError, match="text 0 is empty"):
        list(fitted.predict(character_model, [""], shout_saes))
    deep = replace(fitted, rows={7: fitted.rows[1]})
    with pytest.raises(InputError, match="layer 7 is out of range"):
        list(deep.predict(character_model, text, shout_saes))
    narrow = replace(fitted, rows={1: replace(fitted.rows[1], W_SD=fitted.rows[1].W_SD[:, :8])})
    with pytest.raises(ShapeError, match="8 wide .*has width 32"):
        list(narrow.predict(character_model, text, shout_saes))


def test_folders_that_hold_no_sound_classifier_are_refused(fitted, tmp_path):
    with pytest.raises(SourceError, match="holds no classifier"):
        load_classifier(tmp_path)
    fitted.save(tmp_path / "c")
    path = tmp_path / "c" / "classifier.json"
    for damage, said in (({"terms": [{"layer": 1}]}, "is damaged"), ({"format_version": 9}, "version 9, expected"), ({"reading": "x"}, "is damaged"),
                         ({"terms": []}, "is damaged")):  # fmt: skip
        fitted.save(tmp_path / "c")
        path.write_text(json.dumps(json.loads(path.read_text()) | damage))
        with pytest.raises(SourceError, match=said):
            load_classifier(tmp_path / "c")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(SourceError, match="exists and is no classifier"):
        fitted.save(tmp_path / "mine")
