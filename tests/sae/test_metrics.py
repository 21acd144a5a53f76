from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.errors import InputError, ShapeError
from qscope_jax.models.language_model import LanguageModel
from qscope_jax.sae.arrays import SAEArrays
from qscope_jax.sae.layer_sae import from_arrays
from qscope_jax.sae.metrics import EvaluationConfig, count_tokens, evaluate_sae, splice_scores

F, D, K = 64, 32, 5


def perfect_sae():
    """Both signs of every axis: rebuilds every stream to the bit."""
    signs = np.concatenate([np.eye(D), -np.eye(D)]).astype(np.float32)
    return SAEArrays(signs, signs.copy(), np.zeros(2 * D, np.float32), np.zeros(D, np.float32), k=D)


def blank_sae():
    """Rebuilds every stream as zero."""
    zeros = np.zeros((F, D), np.float32)
    return SAEArrays(zeros, zeros.copy(), np.zeros(F, np.float32), np.zeros(D, np.float32), k=K)


def test_scores_are_quotients_of_sums_over_tokens():
    sums = {"tokens": 10.0, "ce_clean": 20.0, "ce_sae": 25.0, "ce_zero": 40.0, "ce_mean": 35.0, "kl_sae": 2.0, "kl_zero": 8.0, "kl_mean": 7.0}
    scores = splice_scores(sums)
    assert (scores["ce_clean"], scores["ce_sae"], scores["ce_zero"]) == (2.0, 2.5, 4.0)
    assert scores["ce_loss_score"] == pytest.approx(0.75)
    assert scores["ce_loss_score_mean_ablation"] == pytest.approx(2 / 3)
    assert scores["kl_div_score"] == pytest.approx(0.75)


# On a model. Batches of one size and texts of one bucket, so that few programs are compiled.


@pytest.fixture(scope="module")
def texts(sentences):
    return sentences(6)


@pytest.fixture(scope="module")
def config():
    return EvaluationConfig(batch_size=3)


@pytest.fixture(scope="module")
def results(character_model, random_sae, texts, config):
    """A random SAE at layer 0 and a perfect one at layer 2, in one pass."""
    return evaluate_sae(character_model, [from_arrays(random_sae(), 0), from_arrays(perfect_sae(), 2)], texts, config)


def streams(model, texts) -> list[np.ndarray]:
    """Residual streams of every text alone, after layer 0."""
    halves = [model.residuals(texts[start : start + 3], [0]) for start in (0, 3)]
    return [np.asarray(x)[mask] for half in halves for x, mask in zip(half.values[0], half.mask, strict=True)]


def in_batches(rows: list[np.ndarray]) -> list[np.ndarray]:
    """Streams of texts as the config groups them."""
    return [np.concatenate(rows[start : start + 3]) for start in range(0, len(rows), 3)]


def test_a_model_is_measured_on_the_tokens_behind_the_first_and_on_all(character_model, random_sae, oracle, texts, results):
    rows = streams(character_model, texts)
    ordinary, every = oracle(random_sae(), in_batches([x[1:] for x in rows])), oracle(random_sae(), in_batches(rows))
    expected = ordinary | {f"{name}_all": value for name, value in every.items()}
    expected |= {"first_tokens": 6, "outlier_tokens": 0, "damaged_tokens": 0}
    assert {name: results[0][name] for name in expected} == pytest.approx(expected, rel=1e-4)


def test_a_perfect_sae_scores_1(results):
    perfect = results[2]
    assert perfect["fvu"] == pytest.approx(0, abs=1e-9) and perfect["cossim"] == pytest.approx(1) and perfect["l0"] == pytest.approx(D)
    assert perfect["ce_loss_score"] == perfect["ce_loss_score_mean_ablation"] == pytest.approx(1, abs=1e-4)
    assert perfect["kl_div_score"] == pytest.approx(1, abs=1e-4)
    assert perfect["ce_zero"] != pytest.approx(perfect["ce_clean"], rel=1e-2)


def test_an_sae_that_outputs_zeros_scores_0(character_model, random_sae, texts, config):
    blank = evaluate_sae(character_model, [from_arrays(random_sae(), 0), from_arrays(blank_sae(), 2)], texts, config)[2]
    assert blank["ce_loss_score"] == pytest.approx(0, abs=1e-5) and blank["kl_div_score"] == pytest.approx(0, abs=1e-5)
    assert blank["ce_sae"] == pytest.approx(blank["ce_zero"])
    assert (blank["l0"], blank["dead_fraction"], blank["cossim"]) == (0, 1, 0)


def test_cross_entropies_and_divergences_are_means_over_predicted_tokens(character_model, texts, results):
    ids = character_model.tokenize(texts)
    halves = [character_model.logits(texts[start : start + 3]) for start in (0, 3)]
    clean = [log_softmax(np.asarray(row, np.float64)[kept][:-1]) for logits, mask in halves for row, kept in zip(logits, mask, strict=True)]
    losses = [-row[np.arange(len(row)), i[1:]] for row, i in zip(clean, ids, strict=True)]
    assert results[0]["ce_clean"] == results[2]["ce_clean"] == pytest.approx(np.concatenate(losses).mean(), rel=1e-5)
    # A last layer put to zero predicts every token alike; first tokens keep their stream, and so their prediction.
    uniform = np.log(character_model.config.vocab_size)
    assert results[2]["ce_zero"] == pytest.approx(np.concatenate([[loss[0], *[uniform] * (len(loss) - 1)] for loss in losses]).mean(), rel=1e-5)
    apart = [np.sum(np.exp(row) * (row + uniform), axis=-1) for row in clean]
    assert results[2]["kl_zero"] == pytest.approx(np.concatenate([[0, *row[1:]] for row in apart]).mean(), rel=1e-4)


def log_softmax(x):
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def with_tilde(model, factor) -> LanguageModel:
    """The model with the tilde's embedding multiplied."""
    table = model.decoder.embedding[...].at[ord("~") - 30].mul(factor)
    changed = jax.tree_util.tree_map_with_path(lambda path, w: table if "embedding" in jax.tree_util.keystr(path) else w, model.decoder)
    return LanguageModel(changed, tokenizer=model.tokenizer)


@pytest.fixture(scope="module")
def quiet(texts):
    """The texts without a tilde."""
    return [text.replace("~", "a") for text in texts]


def test_norm_outliers_count_in_the_metrics_over_all_tokens_only(character_model, random_sae, oracle, quiet, config):
    model = with_tilde(character_model, 1000)
    noisy = [text[:4] + "~" + text[5:] for text in quiet]
    metrics = evaluate_sae(model, [from_arrays(random_sae(), 0)], noisy, config, splice=False)[0]
    rows = streams(model, noisy)
    assert metrics["tokens_all"] == sum(map(len, rows)) and metrics["tokens"] == sum(len(x) - 2 for x in rows)
    assert (metrics["first_tokens"], metrics["outlier_tokens"], metrics["damaged_tokens"]) == (6, 6, 0)
    kept = in_batches([np.delete(x, [0, 4], axis=0) for x in rows])
    assert metrics["fvu"] == pytest.approx(oracle(random_sae(), kept)["fvu"], rel=1e-4)
    assert metrics["mse_all"] > 100 * metrics["mse"]
    keep_all = EvaluationConfig(3, drop_first=False, max_norm_multiple=0.0)
    everything = evaluate_sae(model, [from_arrays(random_sae(), 0)], noisy, keep_all, splice=False)[0]
    assert everything["mse"] == everything["mse_all"] == metrics["mse_all"]
    assert (everything["first_tokens"], everything["outlier_tokens"]) == (0, 0)


@pytest.mark.parametrize("max_norm_multiple", [10.0, 0.0])
def test_damaged_streams_are_counted_and_change_no_metric(character_model, random_sae, quiet, max_norm_multiple):
    config = EvaluationConfig(3, max_norm_multiple=max_norm_multiple)
    model, saes = with_tilde(character_model, np.nan), [from_arrays(random_sae(), 0)]
    damaged = [*quiet[:2], quiet[2][:-1] + "~", *quiet[3:5], "~" + quiet[5][1:]]
    found = evaluate_sae(model, saes, damaged, config)[0]
    healthy = evaluate_sae(model, saes, [*quiet[:2], *quiet[3:5]], replace(config, batch_size=2))[0]
    lost = found.pop("damaged_tokens")
    assert 0 < lost <= len(quiet[2]) + len(quiet[5]) and healthy.pop("damaged_tokens") == 0
    assert lost == len(quiet[2]) + len(quiet[5])  # attention spreads a NaN over the whole row
    assert found == pytest.approx(healthy, rel=1e-4) and np.isfinite(list(found.values())).all()


def test_every_token_is_counted_under_one_heading():
    x = np.ones((2, 6, D), np.float32)
    x[0, 1], x[0, 2, 3], x[1, 3] = np.nan, np.inf, 100
    segment_ids = jnp.asarray([[1, 1, 1, 1, 2, 2], [1, 1, 1, 1, 0, 0]])
    counted = count_tokens(jnp.asarray(x), segment_ids, 10.0, True)
    assert np.asarray(counted.every_BT).tolist() == [[True, False, False, True, True, True], [True] * 4 + [False] * 2]
    assert np.asarray(counted.ordinary_BT).tolist() == [[False, False, False, True, False, True], [False, True, True, False, False, False]]
    assert (int(counted.first), int(counted.outliers), int(counted.damaged)) == (3, 1, 2)


def test_histograms_and_geometry_come_when_asked_for(character_model, random_sae, texts):
    config = EvaluationConfig(3, densities=True, geometry=True)
    found = evaluate_sae(character_model, [from_arrays(random_sae(), 0)], texts, config, splice=False)[0]
    for suffix in ("", "_all"):
        histogram = found[f"density_histogram{suffix}"]
        assert histogram["silent"] == round(found[f"dead_fraction{suffix}"] * F) and histogram["silent"] + histogram["counts"].sum() == F
    assert found["encoder_decoder_cosine"] == pytest.approx(1) and found["decoder_max_cosine"] == found["encoder_max_cosine"] < 1


def test_what_cannot_be_evaluated_is_refused(character_model, random_sae, texts):
    sae = from_arrays(random_sae(), 0)
    narrow = from_arrays(SAEArrays(*(np.ones(shape, np.float32) for shape in ((8, 4), (8, 4), 8, 4)), k=2), 0)
    with pytest.raises(ShapeError, match="reads residual streams 4 wide, but in memory has width 32"):
        evaluate_sae(character_model, [narrow], texts)
    with pytest.raises(InputError, match="layer 5 is out of range"):
        evaluate_sae(character_model, [from_arrays(random_sae(), 5)], texts)
    with pytest.raises(InputError, match="of each layer one"):
        evaluate_sae(character_model, [sae, sae], texts)
    with pytest.raises(InputError, match="no texts"):
        evaluate_sae(character_model, [sae], [])
