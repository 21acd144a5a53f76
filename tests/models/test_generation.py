import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.data.buckets import bucket_length
from qscope_jax.models import language_model
from qscope_jax.models.generation import decode, prefill
from qscope_jax.models.language_model import LanguageModel, forward, load_model
from qscope_jax.models.sampling import Sampler, SamplingConfig

PROMPTS = ["5 17 80 33 2 9 61 44 90 12 3", "7 30 4", "66 1 1 58 20 6 19"]


@pytest.fixture(scope="module")
def model(make_reference, number_tokenizer) -> LanguageModel:
    return LanguageModel(load_model(make_reference("tied").folder, scan=True).decoder, tokenizer=number_tokenizer)


def ids_of(text: str) -> list[int]:
    return [int(number) for number in text.split()]


@pytest.mark.parametrize(
    ("shape", "scan"),
    [
        ("tied", True),
        ("one key/value head", False),
        ("experts", True),
        ("delta", True),
        ("delta, tied, wrapped", False),
        ("delta, experts", True),
        ("llama, scaled", True),
        ("gemma", True),
    ],
)
def test_24_greedy_tokens_are_those_of_transformers(shape, scan, make_reference, number_tokenizer):
    import torch

    reference = make_reference(shape)
    model = LanguageModel(load_model(reference.folder, scan=scan).decoder, tokenizer=number_tokenizer)
    completions = model.generate(PROMPTS, max_new_tokens=24, stop_token_ids=())
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        ids = torch.tensor([ids_of(prompt)])
        expected = reference.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, pad_token_id=0)
        assert list(completion.token_ids) == expected[0, ids.shape[1] :].tolist()
        assert not completion.stopped
    # Random models soon repeat themselves; were they to say one thing whatever they read, the comparison would be worth little.
    assert len({token for completion in completions for token in completion.token_ids}) > 8


def test_greedy_tokens_are_the_most_probable_ones_of_a_full_pass(model):
    completions = model.generate(PROMPTS, max_new_tokens=20)
    rows = [ids_of(completion.prompt) + list(completion.token_ids) for completion in completions]
    length = max(map(len, rows))
    tokens = np.asarray([row + [0] * (length - len(row)) for row in rows], np.int32)
    best = np.argmax(forward(model.decoder, tokens, np.ones_like(tokens)).logits, axis=-1)
    for row, choice, completion in zip(rows, best, completions, strict=True):
        assert choice[len(row) - 21 : len(row) - 1].tolist() == list(completion.token_ids)


def test_each_row_stops_by_itself_and_the_others_go_on(model):
    free = model.generate(PROMPTS, max_new_tokens=20)
    # A token of each of two rows; several stop tokens at once.
    stops = (free[0].token_ids[3], free[1].token_ids[6])
    for full, completion in zip(free, model.generate(PROMPTS, max_new_tokens=20, stop_token_ids=stops), strict=True):
        ends = [index for index, token in enumerate(full.token_ids) if token in stops]
        expected = full.token_ids[: ends[0] + 1] if ends else full.token_ids
        assert completion.token_ids == expected and completion.stopped == bool(ends)
        assert ids_of(completion.text) == list(expected[:-1] if ends else expected)


def test_a_row_that_has_stopped_reads_no_further_tokens(model):
    stop = model.generate(PROMPTS, max_new_tokens=20)[0].token_ids[3]
    batch = model.batch(PROMPTS, side="left")
    sampler = Sampler.make(SamplingConfig(stop_token_ids=(stop,)), (), 3)
    with jax.set_mesh(model.mesh):  # as `generate` does, so that nothing is compiled anew
        state = prefill(model.decoder, batch.tokens_BT, batch.segment_ids_BT, sampler, (), new_tokens=24)
        state = decode(model.decoder, state, sampler, (), jnp.int32(20))
    counts = np.asarray(state.counts_B)
    assert counts[0] <= 4 < counts.max()
    assert np.array_equal(state.cache.lengths_B, batch.segment_ids_BT.sum(axis=1) + counts - 1)


def test_generation_ends_when_all_rows_have_stopped(model):
    free = model.generate(PROMPTS, max_new_tokens=20)
    batch = model.batch(PROMPTS, side="left")
    sampler = Sampler.make(SamplingConfig(stop_token_ids=tuple({completion.token_ids[1] for completion in free})), (), 3)
    with jax.set_mesh(model.mesh):  # as `generate` does, so that nothing is compiled anew
        state = prefill(model.decoder, batch.tokens_BT, batch.segment_ids_BT, sampler, (), new_tokens=24)
        assert int(decode(model.decoder, state, sampler, (), jnp.int32(20)).step) <= 2


def test_rows_sample_alike_alone_and_in_company(model):
    settings = dict(max_new_tokens=20, temperature=1.0, top_k=20, seed=3)
    first, second, third = model.generate(PROMPTS, **settings)
    other_company = model.generate([PROMPTS[0], PROMPTS[2], PROMPTS[1]], **settings)
    assert other_company[0] == first
    assert model.generate(PROMPTS, **settings) == [first, second, third]
    assert model.generate(PROMPTS, **settings | {"seed": 4})[0] != first


def test_a_repetition_penalty_covers_prompt_and_continuation(model):
    for completion in model.generate(PROMPTS, max_new_tokens=20, repetition_penalty=1e6):
        tokens = ids_of(completion.prompt) + list(completion.token_ids)
        assert len(set(completion.token_ids)) == 20 and len(set(tokens)) == len(set(ids_of(completion.prompt))) + 20


def test_streaming_gives_growing_rows_and_the_same_completion(model):
    heard = []
    streamed = model.generate(PROMPTS, max_new_tokens=20, on_tokens=heard.append)
    assert streamed == model.generate(PROMPTS, max_new_tokens=20)
    assert [len(rows[0]) for rows in heard] == [1, 5, 9, 13, 17, 20]
    for rows in heard:
        assert all(list(completion.token_ids[: len(row)]) == row for row, completion in zip(rows, streamed, strict=True))


def test_one_new_token_is_one_token(model, monkeypatch):
    # Room for 24 as in the other tests, so that nothing is compiled anew.
    monkeypatch.setattr(language_model, "bucket_length", lambda n: 24 if n == 1 else bucket_length(n))
    assert [len(completion.token_ids) for completion in model.generate(PROMPTS, max_new_tokens=1)] == [1, 1, 1]


def test_lengths_within_a_bucket_and_settings_compile_nothing(model, count_compilations):
    model.generate(PROMPTS, max_new_tokens=20)
    with count_compilations() as compilations:
        model.generate(["1 2 3 4", "5", "6 7 8 9 10 11 12 13 14 15 16 17"], max_new_tokens=18)
        model.generate(PROMPTS, max_new_tokens=23, temperature=0.7, top_k=5, top_p=0.9, repetition_penalty=1.2, seed=9, stop_token_ids=(3, 4))
    assert compilations.count == 0


def test_decoding_reuses_the_cache_in_place(model, abstract_arrays):
    batch = model.batch(PROMPTS, side="left")
    sampler = Sampler.make(SamplingConfig(), (), 3)
    with jax.set_mesh(model.mesh), abstract_arrays():
        state = prefill(model.decoder, batch.tokens_BT, batch.segment_ids_BT, sampler, (), new_tokens=24)
        memory = decode.lower(model.decoder, state, sampler, (), jnp.int32(20)).compile().memory_analysis()
    assert memory is not None and memory.alias_size_in_bytes >= sum(leaf.nbytes for leaf in jax.tree.leaves(state.cache.layers))
