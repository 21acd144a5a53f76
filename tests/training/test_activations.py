from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.data.batches import BatchConfig, TokenBatch
from qscope_jax.errors import ConfigError, InputError, SourceError
from qscope_jax.models.language_model import forward
from qscope_jax.parallel.mesh import make_mesh
from qscope_jax.parallel.rules import shard_tree
from qscope_jax.training.activations import ActivationConfig, ActivationStream, geometric_median, mean_squared_norm
from qscope_jax.training.tokens import TokenStream

OUTLIER = ord("~") - 30
LAYERS = (0, 1)


class Recorded(TokenStream):
    """A token stream that remembers what it gave."""

    def __init__(self, tokens):
        self._tokens, self.batches, self.shape, self.lanes = tokens, [], tokens.shape, tokens.lanes

    def __next__(self):
        self.batches.append(next(self._tokens))
        return self.batches[-1]

    def get_state(self):
        return self._tokens.get_state()


def config(**changes) -> ActivationConfig:
    return ActivationConfig(**{"layers": LAYERS, "batch_tokens": 32, "buffer_batches": 4, **changes})


def rows_that_count(decoder, batches, layers=LAYERS, *, drop_first=True, drop_outliers=True) -> list[bytes]:
    """Streams of all tapped layers at every token that should be served, one string of bits for each."""
    found = []
    for batch in batches:
        out = forward(decoder, batch.tokens_BT, batch.segment_ids_BT, (), jnp.asarray(layers, jnp.int32), stop_after=max(layers))
        mask = batch.segment_ids_BT > 0
        if drop_first:
            mask &= batch.positions_BT > 0
        if drop_outliers:
            mask &= batch.tokens_BT != OUTLIER
        found += rows(np.asarray(out.residuals)[:, mask])
    return found


def rows(x_MND) -> list[bytes]:
    return [row.tobytes() for row in np.ascontiguousarray(np.asarray(x_MND).swapaxes(0, 1))]


@pytest.mark.parametrize("mix", [0.5, 0.0])
def test_every_token_that_counts_is_served_once_exactly_as_the_model_computed_it(mix, model, token_stream):
    tokens = Recorded(token_stream())
    stream = ActivationStream(model.decoder, tokens, config(mix=mix))
    served = [row for _ in range(25) for row in rows(next(stream))]
    state = stream.get_state()
    left = rows(state.arrays["buffer"][:, 0, state.cursor["served"] : state.cursor["filled"][0]])
    expected = rows_that_count(model.decoder, tokens.batches)
    assert Counter(served + left) == Counter(expected)
    assert state.cursor["refills"] > 3 and len(served) == 25 * 32


def test_layers_share_one_permutation_and_it_mixes(model, token_stream):
    tokens = Recorded(token_stream())
    batch = next(ActivationStream(model.decoder, tokens, config()))
    expected = {row: place for place, row in enumerate(rows_that_count(model.decoder, tokens.batches))}
    # A row is the streams of both layers: it is found only if both are of the same token.
    places = [expected[row] for row in rows(batch)]
    assert np.mean(np.abs(np.diff(places)) == 1) < 0.2


def test_layers_come_in_the_order_asked_for(model, token_stream):
    forwards, backwards = (next(ActivationStream(model.decoder, token_stream(), config(layers=layers))) for layers in (LAYERS, LAYERS[::-1]))
    np.testing.assert_array_equal(forwards, backwards[::-1])


def test_first_tokens_and_outliers_are_dropped_and_counted(model, token_stream):
    tokens = Recorded(token_stream())
    stream = ActivationStream(model.decoder, tokens, config())
    next(stream)
    present = sum(int((batch.segment_ids_BT > 0).sum()) for batch in tokens.batches)
    assert (stream.seen_tokens, stream.dropped_tokens) == (present, present - len(rows_that_count(model.decoder, tokens.batches)))
    assert stream.dropped_tokens > 0
    keeping = Recorded(token_stream())
    stream = ActivationStream(model.decoder, keeping, config(drop_first=False, max_norm_multiple=0.0))
    next(stream)
    served = rows(stream.get_state().arrays["buffer"][:, 0, : stream.get_state().cursor["filled"][0]])
    assert Counter(served) == Counter(rows_that_count(model.decoder, keeping.batches, drop_first=False, drop_outliers=False))
    assert stream.dropped_tokens == 0


@pytest.mark.parametrize("before", [0, 1, 7])
def test_a_restored_stream_goes_on_bit_for_bit(before, model, token_stream):
    stream, other = (ActivationStream(model.decoder, token_stream(), config()) for _ in range(2))
    for _ in range(before):
        next(stream)
    state = stream.get_state()
    expected = [np.asarray(next(stream)) for _ in range(9)]
    next(other)
    for _ in range(2):
        other.set_state(state)
        np.testing.assert_array_equal([np.asarray(next(other)) for _ in range(9)], expected)
    assert (other.seen_tokens, other.dropped_tokens) == (stream.seen_tokens, stream.dropped_tokens)
    assert expected[0].any()


def test_another_seed_mixes_otherwise(model, token_stream):
    one, other = (next(ActivationStream(model.decoder, token_stream(), config(seed=seed))) for seed in (0, 1))
    assert not np.array_equal(one, other)


def test_what_is_looked_at_first_is_what_is_served(model, token_stream):
    stream = ActivationStream(model.decoder, token_stream(), config(mix=0.0))
    first = np.asarray(stream.peek())
    assert first.shape == (2, 4 * 32, 32)
    np.testing.assert_array_equal(np.concatenate([next(stream) for _ in range(4)], axis=1), first)


def test_a_share_kept_back_of_nearly_the_whole_buffer_still_serves(model, token_stream):
    tokens = Recorded(token_stream())
    stream = ActivationStream(model.decoder, tokens, config(mix=0.99))
    served = Counter(row for _ in range(6) for row in rows(next(stream)))
    assert not served - Counter(rows_that_count(model.decoder, tokens.batches))


def test_a_model_that_gives_no_finite_stream_is_refused(model, token_stream):
    broken = jax.tree.map(lambda w: w * jnp.float32(jnp.nan), model.decoder)
    with pytest.raises(SourceError, match="was NaN or infinite in 51 batches in a row"):
        next(ActivationStream(broken, token_stream(), config()))


def test_tokens_whose_stream_is_not_finite_are_left_out_and_counted(model, documents, token_stream):
    bad = ord("!") - 30
    embedding = model.decoder.embedding[...].at[bad].set(jnp.nan)
    damaged = jax.tree_util.tree_map_with_path(lambda path, leaf: embedding if "embedding" in jax.tree_util.keystr(path) else leaf, model.decoder)
    texts = documents()
    assert any("!" in text for text in texts)
    tokens = Recorded(token_stream(texts))
    stream = ActivationStream(damaged, tokens, config(mix=0.0))
    served = np.concatenate([next(stream) for _ in range(8)], axis=1)
    assert np.isfinite(served).all()
    # What comes after the bad token in its document has seen it, and attention lets 0 * NaN through to its row's other documents.
    hit = sum(((np.cumsum((batch.tokens_BT == bad) & (batch.segment_ids_BT == s), axis=1) > 0) & (batch.segment_ids_BT == s)).sum()
              for batch in tokens.batches for s in range(1, 1 + batch.segment_ids_BT.max()))  # fmt: skip
    assert stream.seen_tokens / 2 > stream.damaged_tokens >= hit > 0


def lanes_of(documents, count) -> TokenStream:
    return TokenStream(documents(), lambda text: [ord(character) - 30 for character in text], BatchConfig(8, 24), lanes=count)


@pytest.mark.parametrize("axes", ["data=2", "data=4", "data=2,fsdp=2", "data=4,fsdp=2", "tensor=2"])
def test_batches_depend_on_the_lanes_and_not_on_the_mesh(axes, model, documents):
    settings = config(lanes=4)
    alone = ActivationStream(model.decoder, lanes_of(documents, 4), settings)
    mesh = make_mesh(axes)
    stream = ActivationStream(shard_tree(model.decoder, mesh), lanes_of(documents, 4), settings, mesh)
    first = np.asarray(alone.peek())
    np.testing.assert_allclose(stream.peek(), first, atol=1e-5 * np.abs(first).max())
    for _ in range(9):
        batch, expected = next(stream), np.asarray(next(alone))
        np.testing.assert_allclose(batch, expected, atol=1e-5 * np.abs(expected).max())
    assert batch.sharding.is_equivalent_to(jax.NamedSharding(mesh, jax.P("fsdp", "data", None)), 3)
    assert (stream.seen_tokens, stream.dropped_tokens) == (alone.seen_tokens, alone.dropped_tokens)


def test_every_lane_serves_its_own_documents_and_gives_up_little(model, documents):
    tokens = Recorded(lanes_of(documents, 2))
    stream = ActivationStream(model.decoder, tokens, config(lanes=2, mix=0.0))
    served = [np.asarray(next(stream)) for _ in range(20)]
    for lane, part in enumerate((slice(0, 16), slice(16, 32))):
        own = [TokenBatch(*(getattr(batch, name)[4 * lane : 4 * lane + 4] for name in ("tokens_BT", "segment_ids_BT", "positions_BT")))
               for batch in tokens.batches]  # fmt: skip
        count = Counter(rows_that_count(model.decoder, own))
        got = Counter(row for batch in served for row in rows(batch[:, part]))
        # Rows of four documents at a time are another program than rows of eight: compared by how many there are, and by value below.
        assert sum(got.values()) == 320 <= sum(count.values())
        mine, theirs = (np.stack([np.frombuffer(row, np.float32) for row in found]) for found in (got, count))
        assert np.abs(mine[:, None] - theirs[None]).max(axis=2).min(axis=1).max() < 1e-4
    kept = sum(len(rows_that_count(model.decoder, [batch])) for batch in tokens.batches)
    assert stream.seen_tokens - stream.dropped_tokens > 0.9 * kept


def test_lanes_that_do_not_fit_are_refused(model, documents):
    with pytest.raises(ConfigError, match="lanes is 2, expected a multiple of the mesh's data=4"):
        ActivationStream(model.decoder, lanes_of(documents, 2), config(lanes=2), make_mesh("data=4"))
    with pytest.raises(ConfigError, match="tokens come in 2 lanes, expected lanes = 4"):
        ActivationStream(model.decoder, lanes_of(documents, 2), config(lanes=4))
    with pytest.raises(ConfigError, match="8 rows, expected a multiple of data=1 times fsdp=3"):
        ActivationStream(model.decoder, lanes_of(documents, 2), config(lanes=2), make_mesh("fsdp=3"))


def test_texts_of_one_token_end_in_an_error_not_in_an_endless_loop(model, token_stream):
    with pytest.raises(InputError, match="the texts are too short"):
        next(ActivationStream(model.decoder, token_stream(["a", "b", "c"]), config()))


@pytest.mark.parametrize(
    "changes",
    [{"layers": ()}, {"layers": (1, 1)}, {"batch_tokens": 0}, {"buffer_batches": 1}, {"mix": 1.0}, {"mix": -0.1}, {"lanes": 0}, {"lanes": 3}],
)
def test_impossible_settings_are_refused(changes):
    with pytest.raises(ConfigError):
        config(**changes)


def test_the_geometric_median_is_where_unit_pulls_cancel():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 5)).astype(np.float32) + 3
    x[:20] += 1000
    point = np.asarray(geometric_median(jnp.asarray(x)), np.float64)
    pulls = (x - point) / np.linalg.norm(x - point, axis=1, keepdims=True)
    assert np.linalg.norm(pulls.mean(axis=0)) < 1e-4
    assert np.linalg.norm(point - 3) < 1 and np.linalg.norm(x.mean(axis=0) - 3) > 100


def test_the_geometric_median_of_equal_rows_is_that_row():
    np.testing.assert_allclose(geometric_median(jnp.full((8, 3), 2, jnp.float32)), 2, rtol=1e-6)


def test_the_mean_squared_norm_is_taken_in_float32():
    assert mean_squared_norm(jnp.full((4, 2), 300, jnp.float16)) == 180000
