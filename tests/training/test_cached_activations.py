import shutil
import threading
import time
from collections import Counter

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from qscope_jax.errors import ConfigError, InputError, ShapeError, SourceError
from qscope_jax.parallel.mesh import make_mesh
from qscope_jax.training.cached_activations import CachedActivations, RowOrder
from qscope_jax.training.checkpoint import StreamState
from qscope_jax.training.loop import Stream

TOKENS, SIZE = 1000, 32


@pytest.fixture
def opened(cache):
    """Factory of streams over the cache of 1,000 tokens, which are closed afterwards."""
    streams = []

    def make(**changes) -> CachedActivations:
        streams.append(CachedActivations(cache, **{"batch_tokens": SIZE, "buffer_batches": 4, "block_tokens": 8, **changes}))
        return streams[-1]

    yield make
    for stream in streams:
        stream.close()


@pytest.fixture(scope="module")
def rows(cache) -> np.ndarray:
    """What the files hold, [2, 1000, 32]."""
    shards = sorted(cache.glob("shard*"))
    return np.stack([np.concatenate([load_file(shard / f"layer{layer}.safetensors")["residuals"] for shard in shards]) for layer in (0, 1)])


def take(stream, count: int) -> np.ndarray:
    """Rows of the next batches."""
    return np.concatenate([np.asarray(next(stream)) for _ in range(count)], axis=1)


def bits(x_MND) -> list[bytes]:
    return [row.tobytes() for row in np.ascontiguousarray(np.asarray(x_MND).swapaxes(0, 1))]


def test_every_row_is_served_exactly_once_an_epoch_with_all_its_layers(opened, rows):
    stream = opened()
    # 125 batches of 32 are four epochs of 1,000; batches straddle the ends of three of them.
    served = bits(take(stream, 125))
    assert len(set(bits(rows))) == TOKENS
    for epoch in range(4):
        assert Counter(served[epoch * TOKENS : (epoch + 1) * TOKENS]) == Counter(bits(rows))


@pytest.mark.parametrize(
    "sizes", [dict(block_tokens=1), dict(block_tokens=2000), dict(buffer_batches=1), dict(buffer_batches=99), dict(batch_tokens=1000)]
)
def test_sizes_that_divide_nothing_serve_every_row_once_too(sizes, opened, rows):
    stream = opened(**sizes)
    served = bits(take(stream, -(-TOKENS // stream.batch_tokens)))
    assert Counter(served[:TOKENS]) == Counter(bits(rows))


def test_batches_are_in_the_cache_s_type_and_follow_the_protocol(opened):
    stream = opened()
    batch = next(stream)
    assert isinstance(stream, Stream) and isinstance(batch, jax.Array)
    assert batch.shape == (2, SIZE, 32) and batch.dtype == ml_dtypes.bfloat16


def test_layers_alone_and_in_another_order_are_the_same_rows_in_the_same_order(opened):
    both = take(opened(), 40)
    np.testing.assert_array_equal(take(opened(layers=(1, 0)), 40), both[::-1])
    np.testing.assert_array_equal(take(opened(layers=(1,)), 40), both[1:])


def test_the_order_is_new_every_epoch_and_for_every_seed_and_the_same_for_the_same(opened, rows):
    number = {row: index for index, row in enumerate(bits(rows))}
    one, again, other = ([number[row] for row in bits(take(opened(seed=seed), 125))] for seed in (0, 0, 1))
    assert one == again and one != other
    epochs = [one[start : start + TOKENS] for start in range(0, 4 * TOKENS, TOKENS)]
    # As many rows stay in place as chance lets: about one in a thousand.
    assert all(np.sum(np.equal(epochs[i], epochs[j])) < 20 for i in range(4) for j in range(i))
    # Another seed is no other epoch of this one.
    assert all(np.sum(np.equal(epoch, other[:TOKENS])) < 20 for epoch in epochs)


def test_a_window_takes_whole_blocks_from_all_over_the_cache_and_mixes_their_rows():
    order = RowOrder(100_000, 0, block_tokens=10, window_tokens=5000)
    window = order.window(3)
    blocks = Counter(window // 10)
    assert set(blocks.values()) == {10} and len(blocks) == 500
    assert np.min(window) < 2000 and np.max(window) > 98_000
    # A batch of 500 out of 500 blocks meets most of those it can: 63 % of them, if rows are mixed well.
    assert len(set(window[:500] // 10)) > 280
    assert np.mean(np.abs(np.diff(window)) == 1) < 0.02
    # The next epoch's window takes other blocks: of 5 % of them, 5 % are the same by chance.
    assert len(set(window) & set(order.window(order.windows + 3))) < 600


@pytest.mark.parametrize(("tokens", "block"), [(1003, 8), (1000, 8), (7, 16), (17, 16)])
def test_an_epoch_s_windows_hold_every_row_once_wherever_the_short_block_falls(tokens, block):
    for seed in range(20):
        order = RowOrder(tokens, seed, block_tokens=block, window_tokens=96)
        for epoch in (0, 5):
            windows = [order.window(epoch * order.windows + place) for place in range(order.windows)]
            assert sorted(np.concatenate(windows)) == list(range(tokens))
            starts = [order.start(epoch * order.windows + place) for place in range(order.windows)]
            assert starts == [epoch * tokens + 96 * place for place in range(order.windows)]
            assert order.locate(starts[-1] + 1) == ((epoch + 1) * order.windows - 1, 1)


@pytest.mark.parametrize("before", [0, 1, 4, 31, 32, 70])
def test_a_restored_stream_goes_on_exactly(before, opened):
    stream, other = opened(), opened()
    for _ in range(before):
        next(stream)
    state = stream.get_state()
    expected = take(stream, 9)
    next(other)
    for _ in range(2):
        other.set_state(state)
        np.testing.assert_array_equal(take(other, 9), expected)
    assert state.arrays == {} and len(str(state.cursor)) < 300


def test_restoring_reads_one_window_not_all_before_it(opened, monkeypatch):
    read, state = [], opened().get_state()
    window = RowOrder.window
    monkeypatch.setattr(RowOrder, "window", lambda self, index: (read.append(index), window(self, index))[1])
    stream = opened()
    stream.set_state(StreamState({}, {**state.cursor, "place": {"next_index": 10_000}}))
    next(stream)
    stream.close()
    first = 10_000 * SIZE // TOKENS * 8  # eight windows an epoch
    assert first <= min(read) and max(read) <= first + 16


def test_states_of_other_streams_are_refused(opened):
    state = opened().get_state()
    with pytest.raises(InputError, match="seed was 0, is 1"):
        opened(seed=1).set_state(state)
    with pytest.raises(InputError, match="block_tokens was 8, is 4"):
        opened(block_tokens=4).set_state(state)
    with pytest.raises(InputError, match="not one that cached activations saved"):
        opened().set_state(StreamState({}, {"filled": 3}))


@pytest.mark.parametrize("before", [0, 3, 30, 31])
def test_what_is_looked_at_first_is_what_is_served_and_looking_moves_nothing(before, opened):
    stream = opened()
    for _ in range(before):
        next(stream)
    first = np.asarray(stream.peek())
    # The epoch's last whole batch is its 31st; the next one straddles its end.
    assert first.shape == (2, SIZE * {0: 4, 3: 4, 30: 1, 31: 1}[before], 32)
    np.testing.assert_array_equal(take(stream, first.shape[1] // SIZE), first)


@pytest.mark.parametrize(
    ("axes", "spec"),
    [
        ("data=4", (None, "data")),
        ("fsdp=2", ("fsdp", "data")),
        ("data=2,fsdp=2", ("fsdp", "data")),
        ("fsdp=4", (None, "data")),
        ("data=3", ("fsdp", None)),
    ],
)
def test_a_mesh_changes_where_batches_lie_and_not_what_they_hold(axes, spec, opened):
    mesh = make_mesh(axes)
    spread, plain = opened(mesh=mesh), opened()
    for _ in range(35):
        batch = next(spread)
        assert batch.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(*spec, None)), 3)
        np.testing.assert_array_equal(batch, next(plain))
    np.testing.assert_array_equal(spread.peek(), plain.peek())


def test_a_process_that_holds_some_devices_reads_their_rows_alone(opened, monkeypatch):
    """Another process's devices are hidden from the part that asks which are here."""
    whole = opened()
    expected = np.asarray(next(whole))
    mesh = make_mesh("data=4,fsdp=2")
    ours = set(mesh.devices.reshape(4, 2)[1:3, 1])
    every = NamedSharding.addressable_devices_indices_map
    monkeypatch.setattr(
        NamedSharding, "addressable_devices_indices_map", lambda self, shape: {d: i for d, i in every(self, shape).items() if d in ours}
    )
    reader = opened(mesh=mesh)._reader
    np.testing.assert_array_equal(reader._batch(0).view(ml_dtypes.bfloat16), expected[1:, SIZE // 4 : 3 * SIZE // 4])
    _, own, values, _ = reader._window(0)
    assert values.shape == (1, 4 * SIZE // 2, 32) and len(own) == 4 * SIZE // 2


def test_a_state_saved_on_one_mesh_continues_on_another(opened):
    stream = opened(mesh=make_mesh("data=4"))
    take(stream, 5)
    state = stream.get_state()
    other = opened(mesh=make_mesh("fsdp=2"))
    other.set_state(state)
    np.testing.assert_array_equal(take(other, 5), take(stream, 5))


def test_a_damaged_cache_is_refused_when_it_is_opened(cache, tmp_path):
    copy = shutil.copytree(cache, tmp_path / "copy")
    path = copy / "shard000002/layer0.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(SourceError, match="shard000002/layer0.safetensors: missing, short or changed"):
        CachedActivations(copy, batch_tokens=SIZE)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    CachedActivations(copy, batch_tokens=SIZE).close()
    with pytest.raises(SourceError, match="shard000002/layer0.safetensors: missing, short or changed"):
        CachedActivations(copy, batch_tokens=SIZE, verify=True)


def test_a_file_that_is_lost_while_batches_are_read_is_named(cache, tmp_path):
    copy = shutil.copytree(cache, tmp_path / "copy")
    stream = CachedActivations(copy, batch_tokens=SIZE)
    (copy / "shard000001/layer1.safetensors").unlink()
    with pytest.raises(SourceError, match="shard000001/layer1.safetensors"):
        next(stream)
    stream.close()


@pytest.mark.parametrize("changes", [{"batch_tokens": 0}, {"buffer_batches": 0}, {"block_tokens": 0}, {"seed": -1}, {"batch_tokens": 1001}])
def test_impossible_settings_are_refused(changes, opened):
    with pytest.raises(ConfigError):
        opened(**changes)


def test_layers_and_widths_are_checked_when_it_is_opened(opened):
    with pytest.raises(InputError, match="no activations of layer 5"):
        opened(layers=(0, 5))
    with pytest.raises(ShapeError, match="32 wide, expected 48"):
        opened(d_model=48)


def test_a_closed_or_forgotten_stream_leaves_no_thread(cache):
    before = set(threading.enumerate())
    stream = CachedActivations(cache, batch_tokens=SIZE)
    next(stream)
    stream.close()
    forgotten = CachedActivations(cache, batch_tokens=SIZE)
    next(forgotten)
    del forgotten
    # Not joined: one that is just being started cannot be.
    deadline = time.monotonic() + 10
    while (left := set(threading.enumerate()) - before) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not left
