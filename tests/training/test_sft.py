import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.data.chat_batches import pad_chat
from qscope_jax.data.chat_tokens import ChatRow
from qscope_jax.errors import ConfigError, InputError
from qscope_jax.models.decoder import Decoder
from qscope_jax.models.language_model import LanguageModel
from qscope_jax.parallel.mesh import make_mesh
from qscope_jax.parallel.rules import shard_tree
from qscope_jax.sae.encoder_rows import EncoderRows
from qscope_jax.training.auxiliary import Batch, FeatureCeiling, ScriptPenalty
from qscope_jax.training.loop import LoopConfig, train
from qscope_jax.training.lora import TARGETS
from qscope_jax.training.sft import SFT, SFTConfig, losses

LANGUAGES = ("en", "zh")
SETTINGS = SFTConfig(steps=12, batch_size=8, length=16, learning_rate=0.01, warmup_steps=2, weight_decay=0.01)


def conversations(count, seed=0):
    """Questions of three tokens; an answer repeats the question backwards."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        question = rng.integers(2, 30, 3)
        tokens = np.concatenate([question, question[::-1], [1]]).astype(np.int32)
        rows.append(ChatRow(tokens, np.arange(7) >= 3, LANGUAGES[number % 2]))
    return rows


ROWS = conversations(64)


@pytest.fixture(scope="module")
def model(tiny_config):
    decoder = jax.jit(lambda key: Decoder(tiny_config(2).unrolled(), key))(jax.random.key(0))
    return LanguageModel(decoder)


def ceiling(width, weight=0.5, **changes):
    rows = tuple(EncoderRows(jax.random.normal(jax.random.key(layer), (2, width)), jnp.zeros(2)) for layer in range(2))
    given = dict(rows=rows, alpha_MKS=jnp.full((2, 2, 2), -0.2), target=jnp.int32(1), layers=(0, 1), weight=weight)
    return FeatureCeiling(**(given | changes))


def gradient(model, config, batch, **settings):
    """Gradient of a step, read from Adam's first moment: an update from zero moments keeps (1 - beta1) of it."""
    recipe = SFT(model, ROWS, replace(config, clip=1e9), languages=LANGUAGES, **settings)
    state, metrics = recipe.step(recipe.init(), batch)
    moment = next(found.mu for found in jax.tree.leaves(state.optimizer, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(found, "mu"))
    return [np.asarray(leaf) / 0.1 for leaf in jax.tree.leaves(moment)], {name: float(value) for name, value in metrics.items()}


def equal(found, expected, tolerance=1e-6):
    largest = max(np.abs(leaf).max() for leaf in expected)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * largest)


@pytest.fixture(scope="module")
def batch():
    return pad_chat(ROWS[:8], LANGUAGES, length=16)


@pytest.fixture(scope="module")
def whole(model, batch):
    return gradient(model, SETTINGS, batch, auxiliary=ceiling(model.config.d_model))


def test_the_loss_is_the_mean_over_answer_tokens_and_lambda_times_the_mean_excess(model, batch, whole):
    _, metrics = whole
    logits = np.asarray(model.decoder(jnp.asarray(batch.tokens_BT), segment_ids=jnp.asarray(batch.segment_ids_BT)).logits, np.float64)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    nll = [-np.log(p[row, place - 1, tokens[place]]) for row, tokens in enumerate(batch.tokens_BT) for place in range(3, 7)]
    assert metrics["tokens"] == 32 and metrics["skipped"] == 0
    assert metrics["loss"] == pytest.approx(np.mean(nll), rel=1e-5)
    loss = ceiling(model.config.d_model)
    out = model.decoder(jnp.asarray(batch.tokens_BT), segment_ids=jnp.asarray(batch.segment_ids_BT), taps=jnp.array([0, 1]))
    excess = 0.0
    for x, rows in zip(np.asarray(out.residuals, np.float64), loss.rows, strict=True):
        f = x @ np.asarray(rows.W_SD, np.float64).T
        excess += np.maximum(f[::2, 3:7] + 0.2, 0).sum()  # every second row is in language 0
    assert metrics["auxiliary"] == pytest.approx(excess / 16, rel=1e-5)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_micro_batches_leave_the_gradient_unchanged(model, batch, whole, count):
    found, metrics = gradient(model, replace(SETTINGS, micro_batches=count), batch, auxiliary=ceiling(model.config.d_model))
    equal(found, whole[0])
    assert metrics["loss"] == pytest.approx(whole[1]["loss"], rel=1e-6) and metrics["auxiliary"] == pytest.approx(whole[1]["auxiliary"], rel=1e-6)


def test_packing_leaves_the_gradient_unchanged(model, batch, whole):
    packed = _packed(ROWS[:8])
    found, metrics = gradient(model, replace(SETTINGS, batch_size=4), packed, auxiliary=ceiling(model.config.d_model))
    equal(found, whole[0])
    assert metrics["tokens"] == 32


def _packed(rows):
    """Two conversations a row."""
    alone = pad_chat(rows, LANGUAGES, length=8)
    join = {}
    for name in ("tokens_BT", "segment_ids_BT", "positions_BT", "trained_BT", "languages_BT"):
        array = getattr(alone, name)
        second = 2 * array[1::2] if name == "segment_ids_BT" else array[1::2]
        join[name] = np.concatenate([array[::2], second], axis=1)
    return type(alone)(**join)


@pytest.mark.parametrize("description", ["data=2", "fsdp=2,tensor=2", "data=2,fsdp=4"])
def test_meshes_leave_the_gradient_unchanged(model, batch, whole, description):
    mesh = make_mesh(description)
    spread = LanguageModel(shard_tree(model.decoder, mesh), mesh=mesh)
    found, metrics = gradient(spread, SETTINGS, batch, auxiliary=ceiling(model.config.d_model))
    equal(found, whole[0])
    assert metrics["auxiliary"] == pytest.approx(whole[1]["auxiliary"], rel=1e-5)


def test_a_state_lies_where_its_parameters_do_and_stays_there(model, batch):
    """Adam's moments as well: an optimiser's zeros depend on no array that would tell the partitioner where they belong."""
    mesh = make_mesh("fsdp=4,tensor=2")
    recipe = SFT(LanguageModel(shard_tree(model.decoder, mesh), mesh=mesh), ROWS, SETTINGS)
    first = recipe.init()
    wanted = [leaf.sharding for leaf in jax.tree.leaves(recipe.tuning.abstract_state())]
    assert [leaf.sharding for leaf in jax.tree.leaves(first)] == wanted
    assert all(np.prod(leaf.sharding.shard_shape(leaf.shape)) * 8 == leaf.size for leaf in jax.tree.leaves(first) if leaf.ndim == 3)
    after, _ = recipe.step(first, batch)
    assert [leaf.sharding for leaf in jax.tree.leaves(after)] == wanted


def test_remat_and_chunks_of_the_head_leave_the_gradient_unchanged(model, batch, whole):
    found, metrics = gradient(model, replace(SETTINGS, remat=False, head_chunk=4), batch, auxiliary=ceiling(model.config.d_model))
    equal(found, whole[0])
    assert metrics["loss"] == pytest.approx(whole[1]["loss"], rel=1e-6)


def test_the_code_s_form_adds_lambda_times_each_micro_batch_s_own_mean(model, batch):
    """One optimiser step of four micro-batches: their four means, each with the full lambda."""
    loss = ceiling(model.config.d_model, form="code")
    _, together = gradient(model, replace(SETTINGS, micro_batches=4), batch, auxiliary=loss)
    alone = []
    for part in range(4):
        rows = pad_chat(ROWS[part:8:4], LANGUAGES, length=16)
        _, metrics = gradient(model, replace(SETTINGS, batch_size=2), rows, auxiliary=loss)
        alone.append(metrics["auxiliary"])
    assert together["auxiliary"] == pytest.approx(sum(alone), rel=1e-5)


def test_a_batch_without_answer_tokens_changes_nothing_but_by_decay(model):
    silent = pad_chat([replace(row, trained=np.zeros(7, bool)) for row in ROWS[:8]], LANGUAGES, length=16)
    for auxiliary in (ceiling(model.config.d_model), ScriptPenalty(jnp.arange(97) > 50, jnp.int32(1), 0.5)):
        found, metrics = gradient(model, SETTINGS, silent, auxiliary=auxiliary)
        assert metrics["loss"] == 0 and metrics["auxiliary"] == 0 and metrics["skipped"] == 0
        assert not any(np.any(leaf) for leaf in found)


def test_the_penalty_s_gradient_lowers_the_probability_of_the_marked_tokens(model, batch):
    unwanted = jnp.arange(97) > 50
    recipe = SFT(model, ROWS, SETTINGS, languages=LANGUAGES, auxiliary=ScriptPenalty(unwanted, jnp.int32(1), 5.0))
    state, first = recipe.init(), None
    for _ in range(4):
        state, metrics = recipe.step(state, batch)
        first = float(metrics["auxiliary"]) if first is None else first
    assert float(metrics["auxiliary"]) < 0.7 * first


def test_a_gradient_that_is_not_finite_is_skipped_and_said(model, batch):
    broken = ceiling(model.config.d_model, alpha_MKS=jnp.full((2, 2, 2), -jnp.inf))
    found, metrics = gradient(model, SETTINGS, batch, auxiliary=replace(broken, weight=float("inf")))
    assert metrics["skipped"] == 1 and not any(np.any(leaf) for leaf in found)


@pytest.mark.parametrize("rank", [0, 4])
def test_the_loss_falls_and_a_resumed_run_equals_the_uninterrupted_one_to_the_bit(model, tmp_path, rank):
    config = replace(SETTINGS, lora_rank=rank, lora_alpha=8.0, learning_rate=0.05 if rank else 0.01)

    def recipe():
        return SFT(model, ROWS, config, languages=LANGUAGES, auxiliary=ceiling(model.config.d_model, 0.01), held_out=conversations(8, seed=5))

    def loop(folder, steps, **changes):
        return LoopConfig(steps=steps, run_dir=str(tmp_path / folder), log_every=1, checkpoint_every=5, progress=False, **changes)

    through = train(recipe(), loop("whole", 12))
    train(recipe(), loop("parts", 7))
    resumed = train(recipe(), loop("parts", 12, resume=True))
    jax.tree.map(np.testing.assert_array_equal, resumed, through)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert lines[11]["loss"] < 0.99 * lines[0]["loss"]
    assert lines[-1]["held_out"] and lines[-1]["loss"] > 0 and lines[-1]["auxiliary"] >= 0


def test_a_run_without_an_auxiliary_loss_never_reads_languages(model):
    unlabelled = [replace(row, language="") for row in ROWS]
    recipe = SFT(model, unlabelled, SETTINGS)
    _, metrics = recipe.step(recipe.init(), pad_chat(unlabelled[:8], (), length=16))
    assert set(metrics) == {"loss", "tokens", "gradient_norm", "skipped"}


def test_adapters_train_alone_and_the_export_has_them_merged(model, batch, tmp_path):
    config = replace(SETTINGS, lora_rank=4, lora_alpha=8.0, lora_targets=TARGETS[:4], learning_rate=0.05)
    recipe = SFT(model, ROWS, config)
    before = np.asarray(model.decoder.layers[0].mixer.q_proj[...])
    state = recipe.init()
    for _ in range(3):
        state, _ = recipe.step(state, batch)
    np.testing.assert_array_equal(model.decoder.layers[0].mixer.q_proj[...], before)
    merged = recipe.export(state)
    assert np.abs(merged.layers[0].mixer.q_proj[...] - before).max() > 1e-4
    np.testing.assert_array_equal(merged.layers[0].feed_forward.up_proj[...], model.decoder.layers[0].feed_forward.up_proj[...])
    placed = Batch(*map(jnp.asarray, (batch.tokens_BT, batch.segment_ids_BT, batch.trained_BT, batch.languages_BT)))
    attached, _ = losses(recipe.tuning.assemble(state.parameters, model.decoder), placed, None, 0)
    alone, _ = losses(merged, placed, None, 0)
    assert float(attached) == pytest.approx(float(alone), rel=1e-5)


def test_master_weights_keep_what_bfloat16_would_lose(model, batch):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.decoder)
    half.config = replace(model.config, dtype="bfloat16")
    slow = replace(SETTINGS, learning_rate=1e-6, warmup_steps=0, weight_decay=0.0)

    def moved(master_dtype):
        recipe = SFT(LanguageModel(half), ROWS, replace(slow, master_dtype=master_dtype))
        first = recipe.init()
        start = np.asarray(first.parameters.layers[0].mixer.q_proj[...], np.float64)
        state, metrics = recipe.step(first, batch)
        assert np.isfinite(float(metrics["loss"])) and recipe.export(state).embedding.dtype == jnp.bfloat16
        return np.abs(np.asarray(state.parameters.layers[0].mixer.q_proj[...], np.float64) - start).max()

    assert moved("float32") == pytest.approx(1e-6, rel=0.05) and moved("bfloat16") in (0, pytest.approx(1e-6, rel=5))


def test_rows_whose_language_has_no_level_are_refused_by_name(model):
    odd = [*ROWS, replace(ROWS[0], language="fr")]
    with pytest.raises(InputError, match="1 of 65 conversations have language 'fr', for which no feature level is known; known are en, zh"):
        SFT(model, odd, SETTINGS, auxiliary=ceiling(model.config.d_model), languages=LANGUAGES)
    with pytest.raises(InputError, match="have no language"):
        SFT(model, [replace(ROWS[0], language="")], SETTINGS, auxiliary=ceiling(model.config.d_model), languages=LANGUAGES)
    with pytest.raises(InputError, match="no conversations"):
        SFT(model, [], SETTINGS)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"steps": 0}, "steps is 0"), ({"schedule": "step"}, "schedule is step"), ({"micro_batches": 3}, "cannot be split into 3"),
     ({"head_chunk": 5}, "head_chunk is 5"), ({"master_dtype": "int8"}, "master_dtype is int8"), ({"learning_rate": 0.0}, "learning_rate")],
)  # fmt: skip
def test_settings_out_of_range_are_refused(change, said):
    with pytest.raises(ConfigError, match=said):
        replace(SETTINGS, **change)


def test_a_mesh_that_does_not_divide_the_rows_is_refused(model):
    mesh = make_mesh("data=8")
    with pytest.raises(ConfigError, match="4 rows does not lie over data and fsdp, 8 shards"):
        SFT(LanguageModel(shard_tree(model.decoder, mesh), mesh=mesh), ROWS, replace(SETTINGS, micro_batches=2))


OTHER_FAMILIES = {
    "llama": {"qk_norm": False},
    "gemma2": {
        "qk_norm": False, "mixers": ("sliding_attention", "full_attention"), "sliding_window": 4, "output_norms": True, "unit_offset_norms": True,
        "activation": "gelu_tanh", "scale_embeddings": True, "attention_softcap": 50.0, "logit_softcap": 30.0, "tie_embeddings": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_the_other_families_of_the_paper_learn_and_are_held_down_as_well(tiny_config, batch, family):
    config = tiny_config(2, family=family, **OTHER_FAMILIES[family]).unrolled()
    model = LanguageModel(jax.jit(lambda key: Decoder(config, key))(jax.random.key(0)))
    recipe = SFT(model, ROWS, SETTINGS, languages=LANGUAGES, auxiliary=ceiling(config.d_model))
    state, metrics = recipe.init(), []
    for _ in range(4):
        state, found = recipe.step(state, batch)
        metrics.append({name: float(value) for name, value in found.items()})
    assert metrics[-1]["loss"] < metrics[0]["loss"] and metrics[-1]["auxiliary"] < 0.9 * metrics[0]["auxiliary"]
    assert all(one["skipped"] == 0 for one in metrics)
