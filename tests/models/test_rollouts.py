from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.errors import InputError, ShapeError
from qscope_jax.features.steering import add_directions
from qscope_jax.models import rollout_steps, rollouts
from qscope_jax.models.decoder import Decoder
from qscope_jax.models.edits import ProjectOut, where
from qscope_jax.models.language_model import forward
from qscope_jax.models.rollout_steps import no_rollouts
from qscope_jax.models.rollouts import Rollout, RolloutSampler
from qscope_jax.models.sampling import SamplingConfig
from qscope_jax.parallel.mesh import make_mesh
from qscope_jax.parallel.rules import shard_tree

ROOM, NEW, SEED = 12, 16, 3
GROUP, STEERED = 3, 1
STOPS = tuple(range(8))
SAMPLING = SamplingConfig(temperature=1.0, seed=SEED)
FAMILIES = {
    "Qwen3": dict(layers=2),
    # The window is shorter than a prompt and what follows it.
    "Gemma 2": dict(
        layers=2, mixers=("sliding_attention", "full_attention"), sliding_window=5, attention_softcap=3.0, logit_softcap=5.0, qk_norm=False,
        output_norms=True, unit_offset_norms=True, activation="gelu_tanh", scale_embeddings=True,
    ),
    "Qwen3.5": dict(
        layers=2, mixers=("gated_delta", "full_attention"), delta_key_heads=2, delta_value_heads=4, delta_key_dim=8, delta_value_dim=6,
        attention_gate=True, unit_offset_norms=True, rotary_dim=4, norm_eps=0.1,
    ),
}  # fmt: skip
PROMPTS = [[5, 17, 80, 33, 20, 9, 61, 44, 90, 12, 30, 66], [70], [66, 10, 10, 58], [7, 30], [41, 23, 77, 64, 88, 19, 95], [9, 50, 31]]
SEEDS = [11, 2**32 - 1, 0, 5, 11, 70]
ALL = (0, 1, 2, 3, 4, 5)
DIRECTION = np.random.default_rng(0).standard_normal((1, 32)).astype(np.float32)


@pytest.fixture(scope="module")
def decoder(tiny_config, random_decoder) -> Decoder:
    return random_decoder(tiny_config(**FAMILIES["Qwen3"]))


def sampler(decoder: Decoder, *, rows: int = 4, mesh: str = "", sampling: SamplingConfig = SAMPLING, **settings) -> RolloutSampler:
    sizes = dict(rows=rows, prompt_length=ROOM, max_new_tokens=NEW, stop_ids=STOPS) | settings
    return RolloutSampler(decoder.config, make_mesh(mesh), sampling=sampling, **sizes)


def draw(decoder: Decoder, chosen=ALL, group: int = GROUP, *, call: dict | None = None, **settings) -> dict[tuple[int, int], Rollout]:
    """Rollouts of the chosen prompts by their number among all, and by member."""
    found = sampler(decoder, **settings)(decoder, [PROMPTS[p] for p in chosen], group, seeds=[SEEDS[p] for p in chosen], **(call or {}))
    assert [(one.prompt, one.member) for one in found] == [(p, m) for p in range(len(chosen)) for m in range(group)]
    return {(chosen[one.prompt], one.member): one for one in found}


def drawn(found: dict[tuple[int, int], Rollout]) -> dict:
    return {place: (one.token_ids, one.logprobs, one.stopped) for place, one in found.items()}


def edit(strength: float = 4.0, **place):
    return add_directions(0, DIRECTION, strength, **place)


def logits_of(decoder: Decoder, prompt: list[int], tokens: tuple[int, ...], edits=()) -> np.ndarray:
    """Of each drawn token, by one pass over prompt and tokens; padded to one length on the right, so that one program serves all."""
    whole = [*prompt, *tokens]
    padded = np.asarray([whole + [0] * (ROOM + NEW - len(whole))], np.int32)
    logits = forward(decoder, padded, (np.arange(ROOM + NEW) < len(whole)).astype(np.int32)[None], edits).logits
    return np.asarray(logits)[0, len(prompt) - 1 : len(whole) - 1]


def key_of(prompt: int, member: int, step: int) -> jax.Array:
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(SEED), np.uint32(SEEDS[prompt])), member)
    return jax.random.fold_in(key, step)


def assert_drawn_from(one: Rollout, logits: np.ndarray, temperature: float = 1.0):
    scaled = logits.astype(np.float64) / temperature
    expected = scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(one.logprobs, expected[np.arange(len(scaled)), list(one.token_ids)], atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rollout_among_others_is_what_its_prompt_gives_alone(family, tiny_config, random_decoder):
    decoder = random_decoder(tiny_config(**FAMILIES[family]))
    for sampling in (SAMPLING, SamplingConfig(temperature=0.0)):
        # Eighteen rollouts in four rows: most rows begin while others go on.
        found = draw(decoder, sampling=sampling)
        for (p, m), one in found.items():
            logits = logits_of(decoder, PROMPTS[p], one.token_ids)
            assert_drawn_from(one, logits)
            if sampling.temperature:
                again = [int(jax.random.categorical(key_of(p, m, t), row)) for t, row in enumerate(logits)]
            else:
                again = np.argmax(logits, axis=1).tolist()
            assert list(one.token_ids) == again
        assert drawn(draw(decoder, [4], sampling=sampling)) == {place: one for place, one in drawn(found).items() if place[0] == 4}
    # Were all to say one thing whatever they read, the comparison would be worth little.
    assert len({one.token_ids for one in draw(decoder).values()}) > 10


def test_a_rollout_ends_with_its_stop_token_or_is_cut(decoder):
    found = draw(decoder).values()
    for one in found:
        assert not set(one.token_ids[:-1]) & set(STOPS) and len(one.token_ids) == len(one.logprobs) <= NEW
        assert one.stopped == (one.token_ids[-1] in STOPS) and (one.stopped or len(one.token_ids) == NEW)
    assert {one.stopped for one in found} == {True, False} and len({len(one.token_ids) for one in found}) > 5
    assert not any(one.stopped for one in draw(decoder, sampling=SamplingConfig(temperature=1.0, stop_token_ids=())).values())


def test_rows_order_and_company_change_nothing(decoder):
    found = draw(decoder)
    assert drawn(draw(decoder, [3, 0, 5, 4, 2, 1])) == drawn(found)
    assert drawn(draw(decoder, refill_share=1.0)) == drawn(found)
    assert drawn(draw(decoder, [2], group=1)) == {(2, 0): drawn(found)[2, 0]}
    others = draw(decoder, rows=7)
    assert {place: one.token_ids for place, one in others.items()} == {place: one.token_ids for place, one in found.items()}
    for place, one in others.items():
        np.testing.assert_allclose(one.logprobs, found[place].logprobs, atol=1e-5)


def test_seeds_members_and_the_sampling_seed_each_change_the_draw(decoder):
    free, other = (SamplingConfig(temperature=1.0, seed=seed, stop_token_ids=()) for seed in (SEED, 4))
    found = [*draw(decoder, [0], sampling=free).values(), *draw(decoder, [0], sampling=other).values()]
    found += sampler(decoder, sampling=free)(decoder, PROMPTS[:1], GROUP, seeds=[SEEDS[0] + 1])
    assert len({one.token_ids for one in found}) == 3 * GROUP


def test_log_probabilities_are_at_the_temperature_and_before_what_cuts_the_distribution(decoder):
    sampling = SamplingConfig(temperature=0.6, top_k=5, top_p=0.9, repetition_penalty=1.5, seed=SEED)
    found = draw(decoder, sampling=sampling)
    for (p, _), one in found.items():
        assert_drawn_from(one, logits_of(decoder, PROMPTS[p], one.token_ids), 0.6)
    assert drawn(found) != drawn(draw(decoder, sampling=SamplingConfig(temperature=0.6, seed=SEED)))


def test_a_repetition_penalty_covers_prompt_and_rollout_of_this_row_alone(decoder):
    for (p, _), one in draw(decoder, sampling=SamplingConfig(repetition_penalty=1e6, stop_token_ids=())).items():
        assert len({*PROMPTS[p], *one.token_ids}) == len(set(PROMPTS[p])) + NEW


def test_a_steered_member_leaves_the_others_to_the_bit(decoder):
    plain = drawn(draw(decoder))
    for strength in (4.0, 0.0):
        found = draw(decoder, call=dict(edits=[edit(strength)], steered=[STEERED]))
        assert {m for (_, m), one in found.items() if one.steered} == {STEERED}
        same = {place: one == plain[place] for place, one in drawn(found).items()}
        assert all(equal for (_, m), equal in same.items() if m != STEERED or strength == 0)
        assert strength == 0 or not any(equal for (_, m), equal in same.items() if m == STEERED)
    assert drawn(draw(decoder, call=dict(edits=[edit(4.0)]))) == plain


@pytest.mark.parametrize(
    ("positions", "phase", "edit_prompts", "acts"),
    [
        ("all", "both", False, lambda length: slice(length - 1, None)),
        ("all", "prefill", False, lambda length: length - 1),
        ("all", "decode", False, lambda length: slice(length, None)),
        (-1, "both", False, lambda length: length - 1),
        ("all", "both", True, lambda length: "all"),
        (slice(-3, -1), "both", True, lambda length: slice(max(length - 3, 0), length - 1)),
    ],
)
def test_a_steered_member_feels_the_edit_from_the_last_prompt_token_on_or_wherever_asked(decoder, positions, phase, edit_prompts, acts):
    steering = dict(edits=[edit(positions=positions, phase=phase)], steered=[STEERED], edit_prompts=edit_prompts)
    for (p, m), one in draw(decoder, call=steering).items():
        place: Callable = acts
        edits = (edit(4.0 if m == STEERED else 0.0, positions=place(len(PROMPTS[p]))),)
        assert_drawn_from(one, logits_of(decoder, PROMPTS[p], one.token_ids, edits))


def test_any_kind_of_edit_is_felt_by_steered_members_alone(decoder):
    projection = ProjectOut(jnp.int32(1), jnp.asarray(DIRECTION[0]), jnp.ones(1, jnp.float32), where())
    found, plain = (drawn(draw(decoder, call=dict(edits=[projection], steered=members))) for members in ([0, 2], []))
    assert {m for (_, m), one in found.items() if one == plain[_, m]} == {1}


def test_each_prompt_is_read_once_and_rows_begin_while_others_go_on(decoder, monkeypatch):
    read, begun = [], []

    def reading(decoder, tokens, segments, *rest):
        read.extend(segments.sum(axis=1).tolist())
        return read_prompts(decoder, tokens, segments, *rest)

    def beginning(state, prompts, chosen, *rest):
        begun.append((int((chosen >= 0).sum()), int((~np.asarray(state.done_B) & (chosen < 0)).sum())))
        return begin_rows(state, prompts, chosen, *rest)

    read_prompts, begin_rows = rollouts.read_prompts, rollouts.begin_rows
    monkeypatch.setattr(rollouts, "read_prompts", reading)
    monkeypatch.setattr(rollouts, "begin_rows", beginning)
    draw(decoder)
    assert sorted(read) == sorted(len(prompt) - 1 for prompt in PROMPTS)
    assert sum(new for new, _ in begun) == len(PROMPTS) * GROUP
    assert sum(others > 0 for _, others in begun) > 5


def test_prompts_lengths_seeds_settings_and_edits_compile_nothing(decoder, count_compilations):
    steering = dict(edits=[edit()], steered=[STEERED])
    draw(decoder, call=steering)
    with count_compilations() as compilations:
        draw(decoder, [5, 1, 1, 3], call=steering, sampling=SamplingConfig(temperature=0.5, top_k=4, seed=9, stop_token_ids=(3,)))
        other = add_directions(1, DIRECTION[:, ::-1].copy(), -7.0, positions=-1, phase="prefill")
        sampler(decoder)(decoder, [[3, 4], [96] * ROOM], GROUP, seeds=[1, 2], edits=[other], steered=[0, 2])
    assert compilations.count == 0


def test_a_mesh_draws_what_one_device_draws(decoder, count_compilations):
    axes, steering = "data=2,fsdp=2,tensor=2", dict(edits=[edit()], steered=[STEERED])
    expected, placed = draw(decoder, call=steering), shard_tree(decoder, make_mesh(axes))
    got = draw(placed, mesh=axes, call=steering)
    for place, one in expected.items():
        assert got[place].token_ids == one.token_ids
        np.testing.assert_allclose(got[place].logprobs, one.logprobs, atol=1e-5)
    with count_compilations() as compilations:
        draw(placed, [2, 1, 0], mesh=axes, call=steering)
    assert compilations.count == 0


def test_what_cannot_be_drawn_is_refused_in_one_line_before_anything_runs(decoder):
    def call(prompts=((1, 2),), group=2, seeds=(0,), **settings):
        return lambda: sampler(decoder)(decoder, prompts, group, seeds=seeds, **settings)

    narrow = add_directions(0, np.ones((1, 31), np.float32), 1.0)
    cases = [
        (InputError, "prompt 1 has 13 tokens, expected 1 to 12 .*prompt_length is 12", call([[1], [1] * 13], seeds=(0, 1))),
        (InputError, "prompt 0 has 30 tokens, expected 1 to 24 .*1000 new tokens share 1024 positions",
         lambda: sampler(decoder, prompt_length=64, max_new_tokens=1000)(decoder, [[1] * 30], 2, seeds=[0])),
        (InputError, "prompt 0 has 0 tokens", call([[]])),
        (InputError, "prompt 0 has tokens from 5 to 97; the model has 0 to 96", call([[97, 5]])),
        (InputError, "0 prompts in groups of 2", call([], seeds=())),
        (InputError, "1 prompts in groups of 0", call(group=0)),
        (InputError, "2 seeds for 1 prompts", call(seeds=(0, 1))),
        (InputError, "seeds run from -1 to -1, expected 0 to 4294967295", call(seeds=(-1,))),
        (InputError, "member 2 cannot be steered; a group has members 0 to 1", call(edits=[edit()], steered=[2])),
        (InputError, r"members \[1\] are to be steered, but there are no edits", call(steered=[1])),
        (InputError, "acts after layer 9", call(edits=[add_directions(9, DIRECTION, 1.0)], steered=[1])),
        (InputError, "values for 2 prompts, the batch has 1", call(edits=[edit(np.ones((2, 1), np.float32))], steered=[1])),
        (ShapeError, "made for another model", call(edits=[narrow], steered=[1])),
        (InputError, "rows is 0, expected at least 1", lambda: sampler(decoder, rows=0)),
        (InputError, "max_new_tokens is 0", lambda: sampler(decoder, max_new_tokens=0)),
        (InputError, "max_new_tokens is 1024; the model has 1024 positions", lambda: sampler(decoder, max_new_tokens=1024)),
        (InputError, "refill_share is 0.0, expected above 0", lambda: sampler(decoder, refill_share=0.0)),
        (InputError, "6 rows cannot be split over 4 devices", lambda: sampler(decoder, rows=6, mesh="data=2,fsdp=2")),
        (InputError, "17 stop tokens", lambda: sampler(decoder, stop_ids=tuple(range(17)))),
    ]  # fmt: skip
    for kind, line, case in cases:
        with pytest.raises(kind, match=line) as caught:
            case()
        assert "\n" not in str(caught.value)


def test_drawing_reuses_the_cache_in_place(decoder, abstract_arrays):
    rows, settings = 4, sampler(decoder)
    with jax.set_mesh(settings.mesh), abstract_arrays():
        state = jax.eval_shape(lambda: no_rollouts(decoder.config, rows, 512))
        arguments = (decoder, state, settings.arrays, (), jnp.int32(NEW), jnp.int32(rows))
        memory = rollout_steps.draw.lower(*arguments, steps=8).compile().memory_analysis()
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.cache.layers))
    assert memory is not None and memory.alias_size_in_bytes >= held and memory.temp_size_in_bytes < held
