from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.errors import InputError
from qscope_jax.models.cache import init_cache
from qscope_jax.models.edits import AddDirections, EditContext, OnRows, ProjectOut, where
from qscope_jax.models.language_model import LanguageModel, forward, load_model

ALL = jnp.arange(3, dtype=jnp.int32)
LENGTH, PROMPT = 24, 12
EVERYWHERE = where()
DIRECTIONS = np.random.default_rng(3).standard_normal((2, 32)).astype(np.float32)


@pytest.fixture(scope="module")
def decoders(make_reference) -> dict[str, object]:
    folder = make_reference("tied").folder
    return {"scanned": load_model(folder, scan=True).decoder, "unrolled": load_model(folder, scan=False).decoder}


@pytest.fixture(scope="module", params=["scanned", "unrolled"])
def decoder(request, decoders):
    return decoders[request.param]


@pytest.fixture(scope="module")
def tokens(make_reference) -> jax.Array:
    return jnp.asarray(np.resize(make_reference("tied").tokens, (3, LENGTH)))


def add(layers=(1, -1), strengths=((2.0, 0.0),), place=EVERYWHERE, second_place=EVERYWHERE, directions=DIRECTIONS) -> AddDirections:
    """Two directions; by default the first at layer 1 of all rows."""
    stacked = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), place, second_place)
    return AddDirections(jnp.asarray(layers, jnp.int32), jnp.asarray(directions), jnp.asarray(strengths, jnp.float32), stacked)


def project(layer: int, share=(1.0,), place=EVERYWHERE) -> ProjectOut:
    return ProjectOut(jnp.int32(layer), jnp.asarray(DIRECTIONS[0]), jnp.asarray(share, jnp.float32), place)


def run(decoder, tokens, *edits, ids=None) -> SimpleNamespace:
    """A forward pass with its results in NumPy, which slices and compares them without compiling."""
    out = forward(decoder, tokens, np.ones(tokens.shape, np.int32) if ids is None else ids, edits, ALL)
    assert out.residuals is not None and out.logits is not None
    return SimpleNamespace(residuals=np.asarray(out.residuals), logits=np.asarray(out.logits))


def assert_close(got, expected, tolerance):
    """The largest difference is at most `tolerance` of the largest magnitude."""
    expected = np.asarray(expected)
    assert np.abs(np.asarray(got) - expected).max() <= tolerance * np.abs(expected).max()


def test_added_directions_equal_forward_hooks_in_torch(make_reference, decoder, tokens):
    import torch

    model = make_reference("tied").model
    strengths = np.asarray([[3.0, -1.5], [0.5, 2.0], [0.0, 1.0]], np.float32)
    masks = np.zeros((2, LENGTH), np.float32)
    masks[0, 3:8], masks[1] = 1, 1
    shifts = torch.from_numpy(np.einsum("bw,wt,wd->wbtd", strengths, masks, DIRECTIONS))
    residuals: dict[int, np.ndarray] = {}

    def hook(layer: int):
        def edit(module, inputs, output):
            output = output + (shifts[0] if layer == 0 else shifts[1] if layer == 2 else 0)
            residuals[layer] = output.numpy()
            return output

        return edit

    hooks = [module.register_forward_hook(hook(layer)) for layer, module in enumerate(model.model.layers)]
    with torch.no_grad():
        logits = model(torch.from_numpy(np.array(tokens)).long()).logits.numpy()
    for handle in hooks:
        handle.remove()
    out = run(decoder, tokens, add(layers=(0, 2), strengths=strengths, place=where("3-7")))
    for layer in range(3):
        assert_close(out.residuals[layer], residuals[layer], 1e-5)
    assert_close(out.logits, logits, 1e-5)


def test_strength_0_and_layer_minus_1_are_bit_identical_to_no_edit(decoders, tokens):
    decoder = decoders["scanned"]
    plain = run(decoder, tokens)
    for edit in (add(strengths=[[0.0, 0.0]]), add(layers=(-1, -1)), add(place=where([30]))):
        edited = run(decoder, tokens, edit)
        assert np.array_equal(edited.residuals, plain.residuals) and np.array_equal(edited.logits, plain.logits)


def test_an_edit_moves_its_tokens_by_the_direction_and_no_others(decoder, tokens):
    plain = run(decoder, tokens, add(layers=(-1, -1))).residuals
    edited = run(decoder, tokens, add(place=where([0, 5, -1]))).residuals
    places, others = [0, 5, 23], [t for t in range(LENGTH) if t not in (0, 5, 23)]
    assert np.array_equal(edited[0], plain[0]) and np.array_equal(edited[1][:, others], plain[1][:, others])
    assert_close(edited[1][:, places], plain[1][:, places] + 2 * DIRECTIONS[0], 1e-6)
    assert not np.array_equal(edited[2][:, others], plain[2][:, others])


def test_each_row_has_its_own_strength(decoder, tokens):
    strengths = [[0.0, 0.0], [2.0, 0.0], [-1.0, 0.0]]
    mixed = run(decoder, tokens, add(strengths=strengths)).residuals
    for row, strength in enumerate(strengths):
        assert_close(mixed[:, row], run(decoder, tokens, add(strengths=[strength] * 3)).residuals[:, row], 1e-6)


def test_several_directions_at_one_layer_add_up(decoder, tokens):
    plain = run(decoder, tokens, add(layers=(-1, -1))).residuals[2]
    edited = run(decoder, tokens, add(layers=(2, 2), strengths=[[2.0, -3.0]])).residuals[2]
    assert_close(edited, plain + 2 * DIRECTIONS[0] - 3 * DIRECTIONS[1], 1e-6)


def test_the_last_position_is_that_of_each_document_and_never_padding(decoder, tokens):
    ids = np.asarray([[0] * 4 + [1] * 20, [1] * 9 + [2] * 15, [1] * 8 + [3] * 10 + [0] * 6], np.int32)
    plain, edited = (run(decoder, tokens, add(place=where(place)), ids=ids).residuals[1] for place in ([30], [0, -1]))
    moved = [np.flatnonzero(row).tolist() for row in np.any(plain != edited, axis=-1)]
    assert moved == [[4, 23], [0, 8, 9, 23], [0, 7, 8, 17]]


def test_projection_leaves_no_component_where_it_acts(decoders, tokens):
    unit = DIRECTIONS[0] / np.linalg.norm(DIRECTIONS[0])
    inert = add(layers=(-1, -1))
    plain = np.asarray(run(decoders["scanned"], tokens, project(-1), inert).residuals[1])
    edited = np.asarray(run(decoders["scanned"], tokens, project(1, place=where("0-9")), inert).residuals[1])
    assert np.abs(plain @ unit).max() > 0.5 and np.abs(edited[:, :10] @ unit).max() < 1e-5
    assert np.array_equal(edited[:, 10:], plain[:, 10:])
    assert_close(edited[:, :10] + (plain[:, :10] @ unit)[..., None] * unit, plain[:, :10], 1e-6)
    reflected = np.asarray(run(decoders["scanned"], tokens, project(1, share=[2.0, 0.0, 0.5]), inert).residuals[1])
    assert_close(reflected @ unit, (plain @ unit) * np.asarray([[-1.0], [1.0], [0.5]]), 1e-5)


def test_an_edit_on_some_rows_leaves_the_others_to_the_bit():
    x = jnp.asarray(np.random.default_rng(5).standard_normal((3, 4, 32)), jnp.float32)
    context = EditContext(jnp.broadcast_to(jnp.arange(4, dtype=jnp.int32), (3, 4)), jnp.full((3, 4), 4, jnp.int32), jnp.ones((3, 4), bool))
    for edit in (add(), project(1)):
        some, none = (OnRows(edit, jnp.asarray(rows)) for rows in ([False, True, False], [False] * 3))
        everywhere, got = edit(x, jnp.int32(1), context), some(x, jnp.int32(1), context)
        assert np.array_equal(got[1], everywhere[1]) and not np.array_equal(got[1], x[1])
        assert np.array_equal(got[0], x[0]) and np.array_equal(got[2], x[2])
        assert [bool(one.touches(jnp.int32(layer))) for one in (some, none) for layer in (0, 1)] == [False, True, False, False]
    with pytest.raises(InputError, match="values for 3 prompts, the batch has 1"):
        OnRows(add(strengths=[[1.0, 0.0]] * 3), jnp.ones(3, bool)).check(3, 32, 3)


def test_edits_apply_in_their_order(decoders, tokens):
    norm = np.linalg.norm(DIRECTIONS[0])
    edited = run(decoders["scanned"], tokens, project(1), add(layers=(1, -1))).residuals[1]
    assert_close(edited @ (DIRECTIONS[0] / norm), np.full((3, LENGTH), 2 * norm), 1e-5)


@pytest.mark.parametrize(
    ("cached", "whole"),
    [
        (("all", "both"), "all"),
        (("all", "prefill"), slice(0, PROMPT)),
        (("all", "decode"), slice(PROMPT, None)),
        ((-1, "both"), PROMPT - 1),
        ((slice(-3, None), "both"), slice(PROMPT - 3, None)),
        (([2, 14], "both"), [2, 14]),
        (([2, 14], "decode"), 14),
    ],
)
def test_cached_decoding_with_an_edit_equals_full_recomputation_with_it(decoders, cached_step, tokens, cached, whole):
    decoder, tokens = decoders["scanned"], np.asarray(tokens)
    ids = np.ones_like(tokens)
    ids[0, :5] = 0  # left padding; its prompt is shorter, so places that depend on the prompt's length are compared in the other rows
    rows = slice(0 if cached[1] == "both" and not isinstance(cached[0], int | slice) else 1, 3)
    edit = add(place=where(*cached))
    cache, residuals, logits = init_cache(decoder.config, 3, LENGTH), [], []
    for start, stop in [(0, PROMPT), *((t, t + 1) for t in range(PROMPT, LENGTH))]:
        out = cached_step(decoder, tokens[:, start:stop], ids[:, start:stop], cache, edit)
        cache, residuals, logits = out.cache, [*residuals, out.residuals], [*logits, out.logits]
    expected = run(decoder, tokens, add(place=where(whole)), ids=ids)
    valid = ids[rows] > 0
    assert_close(np.concatenate(residuals, axis=2)[:, rows][:, valid], expected.residuals[:, rows][:, valid], 1e-4)
    assert_close(np.concatenate(logits, axis=1)[rows][valid], expected.logits[rows][valid], 1e-4)


@pytest.fixture(scope="module")
def cached_step():
    return jax.jit(lambda decoder, tokens, ids, cache, edit: decoder(tokens, segment_ids=ids, cache=cache, edits=(edit,), taps=ALL))


def variants() -> list[AddDirections]:
    """Edits that differ in one thing each."""
    return [
        add(), add(layers=(2, -1)), add(strengths=[[5.0, 0.0]]), add(directions=DIRECTIONS[::-1]), add(place=where([4, 7])),
        add(place=where(phase="decode")), add(layers=(1, 0), strengths=[[2.0, 1.0]]),
    ]  # fmt: skip


def test_changing_an_edit_or_the_taps_compiles_nothing_in_a_forward_pass(decoder, tokens, count_compilations):
    edits, taps = variants(), [jnp.asarray(layers, jnp.int32) for layers in ([0, 1, 2], [2, 1, 0], [1, 2, 0])]
    ids = jnp.ones_like(tokens)
    forward(decoder, tokens, ids, (edits[0],), taps[0])
    with count_compilations() as compilations:
        outputs = [forward(decoder, tokens, ids, (edit,), taps[0]).logits for edit in edits]
        for layers in taps:
            forward(decoder, tokens, ids, (edits[0],), layers)
    assert compilations.count == 0
    # While each of them, but for the one that acts on generated tokens alone, changed the result.
    assert len({np.asarray(logits).tobytes() for logits in outputs}) == len(edits)


def test_changing_an_edit_compiles_nothing_in_generation(decoder, number_tokenizer, count_compilations):
    model = LanguageModel(decoder, tokenizer=number_tokenizer)
    prompts = ["5 17 80 33 2 9 61 44 90 12 3", "7 30 4"]
    edits = variants()
    model.generate(prompts, edits=[edits[0]], max_new_tokens=16)
    with count_compilations() as compilations:
        completions = [model.generate(prompts, edits=[edit], max_new_tokens=16) for edit in edits]
    assert compilations.count == 0
    assert len({completion[0].token_ids for completion in completions}) > 3


def acting(positions, phase="both", *, length=10, decoding=False) -> list[int]:
    """Positions at which an edit acts, in a prompt of `length` tokens or in the five that are generated after it."""
    token = jnp.arange(length, length + 5, dtype=jnp.int32) if decoding else jnp.arange(length, dtype=jnp.int32)
    context = EditContext(token[None], jnp.full((1, token.size), length, jnp.int32), jnp.ones((1, token.size), bool))
    return token[where(positions, phase).mask(context)[0]].tolist()


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ("all", range(10)),
        (3, [3]),
        (np.int64(3), [3]),
        (-1, [9]),
        ([0, -2, 5], [0, 5, 8]),
        ([-1, -2, -3], [7, 8, 9]),
        (range(0, 9, 1), range(9)),
        (range(0, 16, 2), [0, 2, 4, 6, 8]),
        (slice(2, 5), [2, 3, 4]),
        (slice(None, -1), range(9)),
        (slice(-3, None), [7, 8, 9]),
        (slice(-3, -1), [7, 8]),
        (slice(5, 5), []),
        (slice(None, 0), []),
        ("5", [5]),
        ("3-7", [3, 4, 5, 6, 7]),
        (" 0, 3 - 5 ", [0, 3, 4, 5]),
        ("-1", [9]),
        ("-4--2", [6, 7, 8]),
        ("6--2", [6, 7, 8]),
        ("2-4,3--6,8", [2, 3, 4, 8]),
        ("7-7,8-9", [7, 8, 9]),
        ([25, -25], []),
        ("-25-1", [0, 1]),
    ],
)
def test_positions_are_read_as_written(positions, expected):
    assert acting(positions) == list(expected)


def test_generated_tokens_continue_the_prompts_numbering():
    assert acting("all", decoding=True) == acting(slice(-2, None), decoding=True) == [10, 11, 12, 13, 14]
    assert acting([3, 9, 12], decoding=True) == [12]
    assert acting(-1, decoding=True) == acting([-1, -2], decoding=True) == acting("-4--1", decoding=True) == []


def test_phases_choose_prompt_and_generated_tokens():
    assert [bool(acting("all", phase)) for phase in ("prefill", "decode", "both")] == [True, False, True]
    assert [bool(acting("all", phase, decoding=True)) for phase in ("prefill", "decode", "both")] == [False, True, True]


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ("", "cannot read ''"),
        ("x", "cannot read 'x'"),
        ("3-", "cannot read '3-'"),
        ("1,,2", "cannot read ''"),
        ("7-3", "the range '7-3' is empty"),
        ("-1--4", "the range '-1--4' is empty"),
        ([], "the list of positions is empty"),
        ([1.5], "not whole numbers"),
        (None, "not whole numbers"),
        (2**40, "out of range"),
        (slice(0, 9, 2), "a step is not possible"),
        (range(0, 18, 2), "9 separate ranges, at most 8"),
    ],
)
def test_unreadable_positions_are_refused(positions, message, abstract_arrays):
    with abstract_arrays(), pytest.raises(InputError, match=message):
        where(positions)


def test_an_unknown_phase_is_refused():
    with pytest.raises(InputError, match="phase is 'later', expected one of prefill, decode, both"):
        where(phase="later")
