"""What holds for Qwen3 in the other tests holds for every family: one decoder, other mixers, feed-forwards and names."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qscope_jax.features.steering import add_directions
from qscope_jax.models.cache import init_cache
from qscope_jax.models.decoder import Decoder
from qscope_jax.models.language_model import forward, load_model

FAMILIES = ["tied", "experts", "experts in some layers", "llama, scaled", "gemma", "delta", "delta, tied, wrapped", "delta, experts"]
LENGTH = 20


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, make_reference):
    return make_reference(request.param).folder


@pytest.fixture(scope="module")
def decoder(folder) -> Decoder:
    return load_model(folder, scan=True).decoder


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 97, (4, LENGTH)).astype(np.int32)


def run(decoder, tokens, ids=None, edits=(), **settings):
    return forward(decoder, tokens, np.ones_like(tokens) if ids is None else ids, edits, jnp.arange(3, dtype=jnp.int32), **settings)


def assert_close(got, expected, tolerance):
    got, expected = np.asarray(got, np.float32), np.asarray(expected, np.float32)
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()


def assert_all_close(got, expected, tolerance):
    """Array by array, each measured by its own largest."""
    for one, two in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert_close(one, two, tolerance)


def test_padded_rows_and_packed_documents_equal_documents_alone(decoder, tokens):
    short, long = tokens[0, :8], tokens[1, :12]
    rows = np.stack([np.r_[short, long], np.r_[tokens[2, :12], short], np.r_[long, tokens[2, :8]]])
    ids = np.stack([np.r_[[1] * 8, [2] * 12], np.r_[[0] * 12, [1] * 8], np.r_[[1] * 12, [0] * 8]]).astype(np.int32)
    out = run(decoder, rows, ids)
    for row, start, document in ((0, 0, short), (0, 8, long), (1, 12, short), (2, 0, long)):
        alone, place = run(decoder, document[None]), slice(start, start + len(document))
        assert_close(out.residuals[:, row, place], alone.residuals[:, 0], 1e-5)
        assert_close(out.logits[row, place], alone.logits[0], 1e-5)


def test_cached_decoding_equals_full_recomputation(decoder, tokens):
    expected = run(decoder, tokens).logits
    step = jax.jit(lambda decoder, tokens, cache: decoder(tokens, cache=cache))
    cache, logits, ends = init_cache(decoder.config, len(tokens), LENGTH), [], [12, *range(13, LENGTH + 1)]
    for start, stop in zip([0, *ends], ends, strict=False):
        out = step(decoder, tokens[:, start:stop], cache)
        cache, logits = out.cache, [*logits, out.logits]
    assert_close(np.concatenate(logits, axis=1), expected, 1e-4)


def test_stop_after_and_unrolled_layers_give_the_same_streams(decoder, folder, tokens):
    expected = run(decoder, tokens)
    stopped = forward(decoder, tokens, np.ones_like(tokens), (), jnp.asarray([1], jnp.int32), stop_after=1)
    assert stopped.logits is None
    assert_close(stopped.residuals[0], expected.residuals[1], 1e-6)
    assert_close(run(load_model(folder, scan=False).decoder, tokens).residuals, expected.residuals, 1e-5)


def test_an_edit_moves_its_layer_and_those_above(decoder, tokens):
    direction = np.random.default_rng(0).standard_normal((1, 32)).astype(np.float32)
    # Both with an edit: one program, which rounds alike.
    plain, edited = (run(decoder, tokens, edits=(add_directions(1, direction, strength),)) for strength in (0.0, 2.0))
    assert np.array_equal(plain.residuals[0], edited.residuals[0])
    assert_close(plain.residuals, run(decoder, tokens).residuals, 1e-6)
    assert_close(edited.residuals[1] - plain.residuals[1], np.broadcast_to(2 * direction[0], plain.residuals[1].shape), 1e-5)
    assert np.abs(edited.residuals[2] - edited.residuals[1] - plain.residuals[2] + plain.residuals[1]).max() > 1e-3


# Epsilon far above rounding: a first step of Adam moves what has any gradient by the whole rate, in whichever direction rounding points.
OPTIMIZER = optax.adam(1e-2, eps=1e-3)


@jax.jit
def step(decoder, tokens):
    """Gradients of a loss, and the decoder after one step."""
    grads = jax.grad(lambda decoder: jnp.mean(jax.nn.logsumexp(decoder(tokens).logits, axis=-1)))(decoder)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = OPTIMIZER.update(grads, OPTIMIZER.init(decoder))
    return grads, optax.apply_updates(decoder, updates)


@pytest.fixture(scope="module")
def on_one_device(decoder, tokens):
    return run(decoder, tokens).logits, *step(decoder, tokens)


def test_remat_changes_no_gradient_and_every_weight_has_one(decoder, tokens, on_one_device):
    other, plain = copy.copy(decoder), on_one_device[1]
    other.config = type(decoder.config)(**{**vars(decoder.config), "remat": True})
    recomputed, _ = step(other, tokens)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(plain))
    assert_all_close(recomputed, plain, 1e-5)


@pytest.mark.parametrize("mesh", ["data=2,expert=2,tensor=2", "fsdp=2,expert=4", "data=2,tensor=4"])
def test_a_mesh_changes_neither_logits_nor_gradients_nor_an_optimiser_step(folder, decoder, tokens, on_one_device, mesh):
    logits, wanted, stepped = on_one_device
    meshed = load_model(folder, mesh=mesh, scan=True)
    with jax.set_mesh(meshed.mesh):
        got, (grads, after) = run(meshed.decoder, tokens), step(meshed.decoder, tokens)
    assert_close(got.logits, logits, 1e-5)
    assert_all_close(grads, wanted, 1e-5)
    assert_all_close(after, stepped, 1e-5)
    assert all(np.abs(np.asarray(one) - np.asarray(two)).max() > 1e-4 for one, two in zip(jax.tree.leaves(stepped), jax.tree.leaves(decoder)))


@pytest.mark.parametrize("shape", FAMILIES)
def test_transformers_reads_what_is_saved(make_reference, tmp_path, shape):
    import torch
    from transformers import AutoModelForCausalLM

    reference = make_reference(shape)
    load_model(reference.folder).save(tmp_path / "written")
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "written", output_loading_info=True)  # pyright: ignore
    assert not any(info.values())
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(theirs(tokens).logits, reference.model(tokens).logits)
