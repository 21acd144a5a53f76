import numpy as np
import pytest
from scipy.sparse import csr_array
from sklearn.exceptions import ConvergenceWarning

from qscope_jax.errors import ConfigError, InputError, ShapeError
from qscope_jax.sae import probing
from qscope_jax.sae.arrays import SAEArrays
from qscope_jax.sae.layer_sae import from_arrays
from qscope_jax.sae.probing import ProbingConfig, best_columns, fit_probe, probe_saes, split_texts, text_means

D = 32
CONFIG = ProbingConfig(batch_size=4)


def test_every_class_is_held_out_in_its_share_and_no_text_is_in_both_halves():
    texts, labels = [f"text {index}" for index in range(37)], ["a"] * 20 + ["b"] * 12 + ["c"] * 5
    split = split_texts(texts, labels, ProbingConfig(test_share=0.25))
    counts = {label: sum(labels[index] == label for index in split.test) for label in "abc"}
    assert counts == {"a": 5, "b": 3, "c": 1} and (split.repeated, split.contradictory) == (0, 0)
    assert sorted([*split.train, *split.test]) == list(range(37))
    again, other = (split_texts(texts, labels, ProbingConfig(test_share=0.25, seed=seed)) for seed in (0, 1))
    assert again.test.tolist() == split.test.tolist() != other.test.tolist()


def test_repeated_texts_stay_once_and_those_of_two_classes_not_at_all():
    texts = [*"abcdefghij", "a", " a\n", "b", "k", "k"]
    labels = [*"xyxyxyxyxy", "x", "x", "y", "x", "y"]
    split = split_texts(texts, labels, ProbingConfig())
    assert (split.repeated, split.contradictory) == (3, 2)
    assert sorted([*split.train, *split.test]) == list(range(10))


def test_columns_are_chosen_on_the_training_split_only():
    rng = np.random.default_rng(0)
    positive = np.arange(40) % 2 == 0
    train, test = np.arange(30), np.arange(30, 40)
    columns = rng.standard_normal((40, 6))
    columns[:, 4] += 3 * positive
    columns[:, 2] -= 2 * positive
    assert best_columns(columns, positive, train, 2).tolist() == [4, 2]
    columns[30:, 0] = 1000 * positive[30:]
    assert best_columns(columns, positive, train, 2).tolist() == best_columns(csr_array(columns), positive, train, 2).tolist() == [4, 2]
    # The fit does not see the test split either: what decides there has no weight.
    assert fit_probe("a", "sae", columns, positive, train, test, np.array([0])).accuracy < 1
    assert best_columns(np.ones((4, 3)), np.array([True, False, True, False]), np.arange(4), 3).tolist() == [0, 1, 2]


def test_a_probe_is_scored_by_accuracy_and_f1_of_its_class():
    positive = np.array([True] * 6 + [False] * 10)
    columns = positive[:, None] * np.array([[0, 10.0]])
    columns[[4, 6], 1] = (0, 10)
    train, test = np.array([0, 1, 2, 3, 10, 11, 12, 13]), np.array([4, 5, 6, 7, 8])
    probe = fit_probe("a", "sae", csr_array(columns), positive, train, test, np.array([1]))
    # Of two in the class one is found, beside one that is not in it.
    assert (probe.accuracy, probe.f1, probe.k, probe.columns, probe.converged) == (pytest.approx(0.6), 0.5, 1, (1,), True)


def test_scaling_makes_a_probe_blind_to_the_unit_of_activations():
    rng = np.random.default_rng(0)
    positive = np.arange(60) % 3 == 0
    columns = csr_array(positive[:, None] * rng.uniform(0.5, 1, (60, 1)))
    halves = np.arange(40), np.arange(40, 60)
    for unit in (1e-4, 1e4):
        scaled, raw = (fit_probe("a", "sae", columns * unit, positive, *halves, np.array([0]), standardize=one) for one in (True, False))
        assert scaled.accuracy == 1 and raw.accuracy == (1 if unit > 1 else np.mean(~positive[40:]))
    # A column that is the same in all of the training split says nothing, and breaks nothing.
    assert fit_probe("a", "sae", np.ones((60, 1)), positive, *halves, np.array([0])).accuracy == np.mean(~positive[40:])


def test_the_test_split_does_not_move_the_scale():
    positive = np.arange(30) % 2 == 0
    columns = np.where(positive, 1.0, -1.0)[:, None] * np.linspace(0.9, 1.1, 30)[:, None]
    far = columns.copy()
    far[25:] = 1e6  # were they part of the scale, the training split would shrink to nothing
    for read in (columns, far):
        assert fit_probe("a", "sae", read, positive, np.arange(20), np.arange(20, 25), np.array([0])).accuracy == 1
    assert fit_probe("a", "sae", far, positive, np.arange(20), np.arange(20, 30), np.array([0])).accuracy == pytest.approx(0.7)


def test_a_fit_that_does_not_converge_says_so_without_a_warning():
    rng = np.random.default_rng(0)
    columns, positive = rng.standard_normal((60, 40)) * 10.0 ** rng.uniform(-4, 5, 40), rng.random(60) < 0.5
    with pytest.MonkeyPatch.context() as patch:
        from sklearn.linear_model import LogisticRegression

        whole = LogisticRegression.fit
        patch.setattr(LogisticRegression, "fit", lambda self, *arguments: whole(self.set_params(max_iter=2), *arguments))
        assert not fit_probe("a", "dense", columns, positive, np.arange(40), np.arange(40, 60), None).converged
    assert issubclass(ConvergenceWarning, Warning)


@pytest.fixture(scope="module")
def labelled():
    """Texts of eight letters, half of them with a tilde in their middle."""
    rng = np.random.default_rng(3)
    texts = ["".join(rng.choice(list("aeinorst"), rng.integers(9, 17))) for _ in range(24)]
    return [text[:4] + "~" + text[5:] if index % 2 else text for index, text in enumerate(texts)], ["yes" if i % 2 else "no" for i in range(24)]


def code_of(sae, x):
    z = np.asarray(x, np.float64) @ sae.W_enc.T.astype(np.float64) + sae.b_enc
    order = np.argsort(-z, axis=1, kind="stable")[:, : sae.k]
    code = np.zeros_like(z)
    np.put_along_axis(code, order, np.maximum(np.take_along_axis(z, order, axis=1), 0), axis=1)
    return code


def test_a_text_is_the_mean_over_the_tokens_behind_its_first(character_model, random_sae, labelled):
    texts = [*labelled[0][:5], "x"]
    sae = random_sae()
    means = text_means(character_model, [from_arrays(sae, 0), from_arrays(random_sae(1), 2)], texts, CONFIG)
    codes, streams, tokens = means[0]
    assert isinstance(codes, csr_array) and codes.shape == (6, 64) and means[2][0].shape == (6, 64) and codes.nnz < 6 * 64
    assert tokens.tolist() == [len(text) - 1 for text in texts]
    for row, text in enumerate(texts[:5]):
        x = np.asarray(character_model.residuals([text], [0]).values[0, 0, 1 : len(text)])
        np.testing.assert_allclose(codes.toarray()[row], code_of(sae, x).mean(axis=0), atol=1e-5)
        np.testing.assert_allclose(streams[row], x.mean(axis=0), atol=1e-5)
    assert not codes.toarray()[5].any() and not streams[5].any()


@pytest.fixture(scope="module")
def tilde_sae(character_model, random_sae, labelled):
    """Its feature 9 fires on tildes after layer 0 and on nothing else."""
    sae = random_sae()
    streams = [np.asarray(character_model.residuals([text], [0]).values[0, 0, : len(text)], np.float64) for text in labelled[0]]
    x, is_tilde = np.concatenate(streams), np.array([character == "~" for text in labelled[0] for character in text])
    # Least squares in which the few tildes weigh as much as all else, so that the feature is about as active at each of them.
    inputs, heft = np.c_[x, np.ones(len(x))], np.where(is_tilde, 20.0, 1.0)
    weights = np.linalg.lstsq(inputs * heft[:, None], is_tilde * heft, rcond=None)[0]
    scores = inputs @ weights
    edge = scores[~is_tilde].max()
    assert scores[is_tilde].min() > 1.2 * edge
    sae.W_enc[9], sae.b_enc[9] = 1000 * weights[:-1], 1000 * (weights[-1] - edge)
    return sae


def test_one_feature_tells_classes_apart_that_differ_in_one_token(character_model, tilde_sae, labelled):
    texts, labels = labelled
    result = probe_saes(character_model, [from_arrays(tilde_sae, 0)], [*texts, texts[0], texts[1]], [*labels, "no", "yes"], CONFIG)[0]
    assert (result.train, result.test, result.repeated, result.contradictory, result.unread) == (20, 4, 2, 0, 0)
    assert {(probe.label, probe.source, probe.k) for probe in result.probes} == {
        (label, source, k)
        for label in ("no", "yes")
        for source, k in (*(("sae", k) for k in (1, 2, 5)), *(("residual", k) for k in (1, 2, 5)), ("dense", D))
    }
    one = [probe for probe in result.probes if probe.source == "sae" and probe.k == 1]
    assert all(probe.columns == (9,) and probe.accuracy == probe.f1 == 1 for probe in one)
    assert result.mean("sae", 1) == (1, 1) and result.majority == {"no": 0.5, "yes": 0.5}
    assert all(len(probe.columns) == (0 if probe.source == "dense" else probe.k) for probe in result.probes)


def test_several_classes_are_told_apart_one_against_the_rest(character_model, tilde_sae, labelled):
    texts, labels = labelled
    labels = ["other" if label == "no" and index < 12 else label for index, label in enumerate(labels)]
    result = probe_saes(character_model, [from_arrays(tilde_sae, 0)], texts, labels, CONFIG)[0]
    scores = {probe.label: probe.accuracy for probe in result.probes if probe.source == "sae" and probe.k == 1}
    assert set(scores) == {"no", "yes", "other"} and scores["yes"] == 1
    assert result.majority["other"] == pytest.approx(3 / 4) and result.mean("sae", 1)[0] == pytest.approx(np.mean(list(scores.values())))


def test_the_sparse_codes_are_never_made_dense_but_for_the_chosen_columns(character_model, tilde_sae, labelled, monkeypatch):
    shapes = []
    whole = csr_array.toarray
    monkeypatch.setattr(csr_array, "toarray", lambda self, *a, **k: shapes.append(self.shape) or whole(self, *a, **k))
    monkeypatch.setattr(probing.csr_array, "todense", None)
    probe_saes(character_model, [from_arrays(tilde_sae, 0)], *labelled, CONFIG)
    assert {columns for _, columns in shapes} == {1, 2, 5}


def test_what_cannot_be_probed_is_refused(character_model, random_sae, labelled):
    texts, labels = labelled
    sae = [from_arrays(random_sae(), 0)]
    with pytest.raises(InputError, match="24 texts came with 23 labels"):
        probe_saes(character_model, sae, texts, labels[1:])
    with pytest.raises(InputError, match=r"24 texts \(0 repeated and 0 contradictory ones removed\) have 1 class"):
        probe_saes(character_model, sae, texts, ["same"] * 24)
    with pytest.raises(InputError, match=r"class 'few' has 4 texts \(0 repeated.*expected 5 or more"):
        probe_saes(character_model, sae, texts, ["few"] * 4 + ["many"] * 20)
    with pytest.raises(InputError, match="k 33 exceeds the 64 features or 32 dimensions of layer 0"):
        probe_saes(character_model, sae, texts, labels, ProbingConfig(ks=(33,)))
    with pytest.raises(InputError, match="layer 5 is out of range"):
        probe_saes(character_model, [from_arrays(random_sae(), 5)], texts, labels)
    narrow = from_arrays(SAEArrays(*(np.ones(shape, np.float32) for shape in ((8, 4), (8, 4), 8, 4)), k=2), 0)
    with pytest.raises(ShapeError, match="4 wide"):
        probe_saes(character_model, [narrow], texts, labels)
    for wrong in (dict(ks=()), dict(ks=(0,)), dict(test_share=0.0), dict(test_share=1.0)):
        with pytest.raises(ConfigError, match="expected numbers of 1 or more"):
            ProbingConfig(**wrong)
