import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.errors import InputError, ShapeError
from qscope_jax.models.language_model import LanguageModel
from qscope_jax.sae.arrays import SAEArrays
from qscope_jax.sae.layer_sae import from_arrays
from qscope_jax.sae.metrics import EvaluationConfig, ReconstructionMetrics, evaluate_sae, splice_scores

F, D, K = 64, 32, 5


def random_sae(seed=0, b_dec=0.0):
    """Tied directions: a poor SAE, but one whose reconstructions resemble their streams."""
    rng = np.random.default_rng(seed)
    W = rng.standard_normal((F, D)).astype(np.float32)
    W /= np.linalg.norm(W, axis=1, keepdims=True)
    return SAEArrays(W, W.copy(), (-W @ np.full(D, b_dec) + 0.1).astype(np.float32), np.full(D, b_dec, np.float32), k=K)


def perfect_sae():
    """Both signs of every axis: rebuilds every stream to the bit."""
    signs = np.concatenate([np.eye(D), -np.eye(D)]).astype(np.float32)
    return SAEArrays(signs, signs.copy(), np.zeros(2 * D, np.float32), np.zeros(D, np.float32), k=D)


def blank_sae():
    """Rebuilds every stream as zero."""
    zeros = np.zeros((F, D), np.float32)
    return SAEArrays(zeros, zeros.copy(), np.zeros(F, np.float32), np.zeros(D, np.float32), k=K)


def oracle(sae: SAEArrays, x) -> dict[str, float]:
    """Every metric of the streams x [N, D] in float64."""
    x = np.asarray(x, np.float64)
    z = x @ sae.W_enc.T.astype(np.float64) + sae.b_enc
    order = np.argsort(-z, axis=1, kind="stable")[:, : sae.k]
    code = np.zeros_like(z)
    np.put_along_axis(code, order, np.maximum(np.take_along_axis(z, order, axis=1), 0), axis=1)
    rebuilt = code @ sae.W_dec + sae.b_dec
    norms, norms_rebuilt = np.linalg.norm(x, axis=1), np.linalg.norm(rebuilt, axis=1)
    fvu = np.sum((x - rebuilt) ** 2) / np.sum((x - x.mean(axis=0)) ** 2)
    rate = (code > 0).mean(axis=0)
    return {
        "tokens": len(x),
        "fvu": fvu,
        "explained_variance": 1 - fvu,
        "mse": np.sum((x - rebuilt) ** 2, axis=1).mean(),
        "l0": (code > 0).sum(axis=1).mean(),
        "l1": code.sum(axis=1).mean(),
        "cossim": np.mean(np.sum(x * rebuilt, axis=1) / np.maximum(norms * norms_rebuilt, 1e-8)),
        "l2_ratio": np.mean(norms_rebuilt / norms),
        "dead_fraction": np.mean(rate == 0),
        "dense_fraction": np.mean(rate > 0.1),
    }


def measure(sae: SAEArrays, batches, masks=None) -> ReconstructionMetrics:
    metrics = ReconstructionMetrics()
    for index, batch in enumerate(batches):
        mask = np.ones(len(batch), bool) if masks is None else masks[index]
        metrics.add(from_arrays(sae, 0).autoencoder, jnp.asarray(batch), jnp.asarray(mask))
    return metrics


@pytest.fixture
def batches():
    """Three batches that differ in mean and spread, as texts do."""
    rng = np.random.default_rng(1)
    return [(rng.standard_normal((40, D)) * scale + shift).astype(np.float32) for scale, shift in ((1, 0), (3, 0.5), (0.5, -1))]


def test_every_metric_equals_float64_over_all_batches_at_once(batches):
    sae = random_sae()
    assert measure(sae, batches).result() == pytest.approx(oracle(sae, np.concatenate(batches)), rel=1e-5)


def test_masked_tokens_do_not_count_whatever_they_hold(batches):
    sae, rng = random_sae(), np.random.default_rng(2)
    masks = [rng.random(40) < 0.6, rng.random(40) < 0.3, np.zeros(40, bool)]
    kept = np.concatenate([batch[mask] for batch, mask in zip(batches, masks, strict=True)])
    spoilt = [np.where(mask[:, None], batch, 1e6).astype(np.float32) for batch, mask in zip(batches, masks, strict=True)]
    assert measure(sae, spoilt, masks).result() == pytest.approx(oracle(sae, kept), rel=1e-5)
    # An empty batch first must not spoil the pooled mean either.
    assert measure(sae, spoilt[::-1], masks[::-1]).result() == pytest.approx(oracle(sae, kept), rel=1e-5)


@pytest.mark.parametrize("b_dec", [0.0, 1000.0])
def test_a_large_mean_does_not_cancel_the_variance(b_dec, batches):
    sae = random_sae(b_dec=b_dec)
    shifted = [(batch + 1000).astype(np.float32) for batch in batches]
    got, expected = measure(sae, shifted).result(), oracle(sae, np.concatenate(shifted))
    assert got["fvu"] == pytest.approx(expected["fvu"], rel=1e-3)


def test_firing_rates_are_shares_of_counted_tokens(batches):
    sae = random_sae()
    z = np.concatenate(batches) @ sae.W_enc.T + sae.b_enc
    order = np.argsort(-z, axis=1)[:, :K]
    fired = np.zeros(z.shape, bool)
    np.put_along_axis(fired, order, np.take_along_axis(z, order, axis=1) > 0, axis=1)
    np.testing.assert_allclose(measure(sae, batches).firing_rate, fired.mean(axis=0), rtol=1e-6)


def test_equal_streams_have_no_fvu():
    assert np.isnan(measure(random_sae(), [np.zeros((40, D), np.float32)]).result()["fvu"])


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
def results(character_model, texts, config):
    """A random SAE at layer 0 and a perfect one at layer 2, in one pass."""
    return evaluate_sae(character_model, [from_arrays(random_sae(), 0), from_arrays(perfect_sae(), 2)], texts, config)


def streams(model, texts) -> list[np.ndarray]:
    """Residual streams of every text alone, after layer 0."""
    halves = [model.residuals(texts[start : start + 3], [0]) for start in (0, 3)]
    return [np.asarray(x)[mask] for half in halves for x, mask in zip(half.values[0], half.mask, strict=True)]


def test_a_model_is_measured_on_the_tokens_behind_the_first_and_on_all(character_model, texts, results):
    rows = streams(character_model, texts)
    ordinary, every = oracle(random_sae(), np.concatenate([x[1:] for x in rows])), oracle(random_sae(), np.concatenate(rows))
    expected = ordinary | {f"{name}_all": value for name, value in every.items()}
    assert {name: results[0][name] for name in expected} == pytest.approx(expected, rel=1e-4)


def test_a_perfect_sae_scores_1(results):
    perfect = results[2]
    assert perfect["fvu"] == pytest.approx(0, abs=1e-9) and perfect["cossim"] == pytest.approx(1) and perfect["l0"] == pytest.approx(D)
    assert perfect["ce_loss_score"] == perfect["ce_loss_score_mean_ablation"] == pytest.approx(1, abs=1e-4)
    assert perfect["kl_div_score"] == pytest.approx(1, abs=1e-4)
    assert perfect["ce_zero"] != pytest.approx(perfect["ce_clean"], rel=1e-2)


def test_an_sae_that_outputs_zeros_scores_0(character_model, texts, config):
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


def test_norm_outliers_count_in_the_metrics_over_all_tokens_only(character_model, texts, config):
    decoder = character_model.decoder
    outlier = ord("~") - 30
    table = decoder.embedding[...].at[outlier].mul(1000)
    loud = jax.tree_util.tree_map_with_path(lambda path, w: table if "embedding" in jax.tree_util.keystr(path) else w, decoder)
    model = LanguageModel(loud, tokenizer=character_model.tokenizer)
    quiet = [text.replace("~", "a") for text in texts]
    noisy = [text[:4] + "~" + text[5:] for text in quiet]
    metrics = evaluate_sae(model, [from_arrays(random_sae(), 0)], noisy, config, splice=False)[0]
    rows = streams(model, noisy)
    assert metrics["tokens_all"] == sum(map(len, rows)) and metrics["tokens"] == sum(len(x) - 2 for x in rows)
    kept = np.concatenate([np.delete(x, [0, 4], axis=0) for x in rows])
    assert metrics["fvu"] == pytest.approx(oracle(random_sae(), kept)["fvu"], rel=1e-4)
    assert metrics["mse_all"] > 100 * metrics["mse"]
    keep_all = EvaluationConfig(3, drop_first=False, max_norm_multiple=0.0)
    everything = evaluate_sae(model, [from_arrays(random_sae(), 0)], noisy, keep_all, splice=False)[0]
    assert everything["mse"] == everything["mse_all"] == metrics["mse_all"]


def test_what_cannot_be_evaluated_is_refused(character_model, texts):
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
