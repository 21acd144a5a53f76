import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.data.batches import TokenBatch, pad_batch
from qscope_jax.models.scoring import next_token_loss
from qscope_jax.training.causal_lm import CausalLM, CausalLMConfig
from qscope_jax.training.loop import LoopConfig, train

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "slept"]
STEPS = 20


def spell(text):
    """A word is a token; 1 ends a document."""
    return [*(2 + WORDS.index(word) for word in text.split()), 1]


def phrases(count, seed=0):
    """Documents that go round the words in order from a random one: every token but the first can be learnt."""
    rng = np.random.default_rng(seed)
    starts, lengths = rng.integers(0, len(WORDS), count), rng.integers(3, 12, count)
    return [" ".join(WORDS[(start + place) % len(WORDS)] for place in range(length)) for start, length in zip(starts, lengths, strict=True)]


@pytest.fixture(scope="module")
def recipe(tiny_config) -> CausalLM:
    config = CausalLMConfig(batch_size=4, length=24, steps=STEPS, learning_rate=0.02, warmup_steps=4, clip=1e3)
    return CausalLM(tiny_config(1), config, phrases(300), spell, [spell(text) for text in phrases(4, seed=1)])


def settings(folder="", **changes) -> LoopConfig:
    return LoopConfig(**{"steps": STEPS, "log_every": 5, "checkpoint_every": 6, "progress": False, "run_dir": str(folder), **changes})


@pytest.fixture(scope="module")
def trained(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    return train(recipe, settings(folder)), [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_loss_falls_on_training_and_held_out_documents(recipe, trained):
    state, metrics = trained
    before = recipe.evaluate(recipe.init())["held_out_loss"]
    assert before == pytest.approx(np.log(97), rel=0.05)
    assert metrics[-1]["held_out_loss"] < 0.6 * before and metrics[-2]["loss"] < 0.6 * before
    assert recipe.evaluate(state) == {"held_out_loss": metrics[-1]["held_out_loss"]}


def test_a_resumed_run_equals_the_uninterrupted_one_to_the_bit(recipe, trained, tmp_path, monkeypatch):
    step, taken = recipe.step, []

    def fail(state, batch):
        taken.append(batch)
        if len(taken) > 9:
            raise KeyboardInterrupt
        return step(state, batch)

    monkeypatch.setattr(recipe, "step", fail)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, settings(tmp_path / "run"))
    monkeypatch.undo()
    resumed = train(recipe, settings(tmp_path / "run", resume=True))
    for one, other in zip(jax.tree.leaves(resumed), jax.tree.leaves(trained[0]), strict=True):
        np.testing.assert_array_equal(one, other)
    assert [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()] == trained[1]


def loss(decoder, tokens, segments):
    return next_token_loss(decoder(tokens, segment_ids=segments).logits, tokens, segments)


gradient_of = jax.jit(jax.value_and_grad(loss, has_aux=True))


def loss_and_gradient(decoder, batch):
    return gradient_of(decoder, jnp.asarray(batch.tokens_BT), jnp.asarray(batch.segment_ids_BT))


def test_the_gradient_of_packed_documents_is_the_sum_over_documents(recipe, trained):
    documents = [spell(text) for text in ("sat on a mat and", "the cat", "it slept then it slept the", "mat")]
    alone = pad_batch(documents, length=24)
    tokens, segments = np.concatenate(documents), np.repeat(np.arange(1, 5), [len(ids) for ids in documents])
    # All of them in one row, between rows of padding, so that both batches run in one program.
    packed = TokenBatch(*(np.pad(row[None], ((1, 2), (0, 24 - len(tokens)))).astype(np.int32) for row in (tokens, segments, segments)))
    decoder = trained[0].decoder
    (total, weight), gradient = loss_and_gradient(decoder, packed)
    (expected_total, expected_weight), expected = loss_and_gradient(decoder, alone)
    assert weight == expected_weight == len(tokens) - 4
    assert total == pytest.approx(float(expected_total), rel=1e-5)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5 * largest)


def test_a_step_divides_by_the_tokens_of_the_whole_batch(recipe):
    state = recipe.init()
    batch = next(recipe.stream())
    (total, weight), gradient = loss_and_gradient(state.decoder, batch)
    norm = np.sqrt(sum(float(jnp.sum(jnp.square(leaf / weight))) for leaf in jax.tree.leaves(gradient)))
    _, metrics = recipe.step(state, batch)
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(
        {"loss": float(total / weight), "gradient_norm": norm, "tokens": float(weight)}, rel=1e-4
    )
    assert recipe.units(batch) == (batch.segment_ids_BT > 0).sum()


def test_a_batch_that_predicts_nothing_leaves_the_weights_finite_and_only_matrices_decay(recipe):
    state = recipe.init()
    # The first steps have a rate near 0, so walk past them.
    lonely = TokenBatch(*(np.tile(row, (4, 1)).astype(np.int32) for row in (np.ones(24), np.arange(1, 25), np.zeros(24))))
    before = jax.tree.map(np.asarray, state.decoder)
    for _ in range(5):
        state, metrics = recipe.step(state, lonely)
    assert metrics["loss"] == metrics["tokens"] == 0
    after = state.decoder
    assert np.isfinite(after.embedding[...]).all()
    layer, layer_before = after.layers[0], before.layers[0]
    for module, old, names in (
        (after, before, ["final_norm"]),
        (layer, layer_before, ["input_norm", "post_attention_norm"]),
        (layer.mixer, layer_before.mixer, ["q_norm", "k_norm"]),
    ):
        for name in names:
            np.testing.assert_array_equal(getattr(module, name)[...], getattr(old, name)[...])
    for module, old, names in (
        (after, before, ["embedding", "head"]),
        (layer.mixer, layer_before.mixer, ["q_proj", "o_proj"]),
        (layer.feed_forward, layer_before.feed_forward, ["down_proj"]),
    ):
        for name in names:
            assert np.linalg.norm(getattr(module, name)[...]) < np.linalg.norm(getattr(old, name)[...])


def test_without_held_out_documents_there_is_nothing_to_evaluate(tiny_config, trained):
    assert CausalLM(tiny_config(1), CausalLMConfig(), phrases(3), spell).evaluate(trained[0]) == {}
