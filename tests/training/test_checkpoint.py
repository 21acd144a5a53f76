import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.errors import SourceError
from qscope_jax.parallel.mesh import make_mesh
from qscope_jax.parallel.rules import batch_sharding
from qscope_jax.training.checkpoint import Checkpoints, StreamState, abstract

CURSOR = {"place": [1, {"deep": 2}], "served": 3}


def state(seed=0) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "weights": jnp.asarray(rng.standard_normal((4, 3)), jnp.float32),
        "half": (jnp.asarray(rng.standard_normal(5), jnp.bfloat16), jnp.int32(seed)),
    }


def stream(seed=0) -> StreamState:
    return StreamState({"buffer": jnp.full((2, 3), seed, jnp.float32)}, CURSOR)


@pytest.fixture
def checkpoints(tmp_path):
    opened = Checkpoints(tmp_path / "run")
    yield opened
    opened.close()


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_everything_comes_back_to_the_bit_in_another_process(checkpoints, tmp_path):
    checkpoints.save(7, state(), stream(3))
    checkpoints.close()
    again = Checkpoints(tmp_path / "run")
    restored, place = again.restore(abstract(state(1)), abstract(stream().arrays))
    again.close()
    assert again.latest == 7
    assert_same(restored, state())
    assert_same(place.arrays, stream(3).arrays)
    assert place.cursor == CURSOR


def test_a_stream_without_arrays_is_its_cursor(checkpoints):
    checkpoints.save(1, state(), StreamState({}, CURSOR))
    assert checkpoints.restore(abstract(state()), abstract({}))[1] == StreamState({}, CURSOR)


def test_what_is_saved_is_the_state_at_that_moment_though_its_arrays_are_donated(checkpoints):
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + jnp.ones((), x.dtype), tree), donate_argnums=0)
    big = {"weights": jnp.zeros((512, 1024), jnp.float32)}
    for number in range(1, 6):
        big = step(big)
        checkpoints.save(number, big, StreamState({}, CURSOR))
    for _ in range(5):
        big = step(big)
    for number in (4, 5):
        restored, _ = checkpoints.restore(abstract(big), {}, number)
        np.testing.assert_array_equal(restored["weights"], np.full((512, 1024), number))


def test_the_newest_are_kept(checkpoints, tmp_path):
    for number in (1, 2, 3):
        checkpoints.save(number, state(number), stream(number))
    checkpoints.close()
    assert sorted(int(path.name) for path in (tmp_path / "run").iterdir() if path.name.isdigit()) == [2, 3]
    again = Checkpoints(tmp_path / "run")
    assert_same(again.restore(abstract(state()), abstract(stream().arrays))[0], state(3))
    assert_same(again.restore(abstract(state()), abstract(stream().arrays), 2)[0], state(2))
    again.close()


def test_arrays_come_back_on_the_mesh_of_the_new_run(checkpoints):
    checkpoints.save(1, state(), stream())
    mesh = make_mesh("data=2")
    target = abstract(state())
    target["weights"] = jax.ShapeDtypeStruct((4, 3), jnp.float32, sharding=batch_sharding(mesh, 2))
    restored, _ = checkpoints.restore(target, abstract(stream().arrays))
    assert restored["weights"].sharding.shard_shape((4, 3)) == (2, 3)
    np.testing.assert_array_equal(restored["weights"], state()["weights"])


def test_an_empty_folder_has_nothing_to_resume_from(checkpoints):
    assert checkpoints.latest is None
    with pytest.raises(SourceError, match="run: holds no whole checkpoint to resume from"):
        checkpoints.restore(abstract(state()), {})


def other_shape():
    return state() | {"weights": jnp.zeros((4, 5), jnp.float32)}


def other_dtype():
    return state() | {"weights": jnp.zeros((4, 3), jnp.bfloat16)}


def fewer_leaves():
    return {"weights": state()["weights"]}


def more_leaves():
    return state() | {"threshold": jnp.zeros((4,), jnp.float32)}


def other_names():
    found = state()
    return {"W": found["weights"], "half": found["half"]}


@pytest.mark.parametrize("other", [other_shape, other_dtype, fewer_leaves, more_leaves, other_names])
def test_the_checkpoint_of_another_run_is_one_clear_line(other, checkpoints):
    checkpoints.save(1, state(), stream())
    with pytest.raises(SourceError, match=r"checkpoint 1 does not fit this run \([\w.]+ is .*, this run has .*\); use another folder") as caught:
        checkpoints.restore(abstract(other()), abstract(stream().arrays))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_a_stream_of_another_size_does_not_fit(checkpoints):
    checkpoints.save(1, state(), stream())
    with pytest.raises(SourceError, match="does not fit this run"):
        checkpoints.restore(abstract(state()), {"buffer": jax.ShapeDtypeStruct((2, 9), jnp.float32)})


def test_a_checkpoint_without_a_stream_does_not_fit_a_run_that_needs_one(checkpoints):
    checkpoints.save(1, state(), StreamState({}, CURSOR))
    with pytest.raises(SourceError, match="does not fit this run"):
        checkpoints.restore(abstract(state()), abstract(stream().arrays))


def test_a_half_written_checkpoint_is_not_the_newest(checkpoints, tmp_path):
    checkpoints.save(1, state(), stream())
    checkpoints.close()
    (tmp_path / "run" / "2.orbax-checkpoint-tmp-0").mkdir()
    again = Checkpoints(tmp_path / "run")
    assert again.latest == 1
    again.close()


def test_a_damaged_checkpoint_is_one_clear_line(checkpoints, tmp_path):
    checkpoints.save(1, state(), stream())
    checkpoints.close()
    for file in (tmp_path / "run" / "1" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    again = Checkpoints(tmp_path / "run")
    with pytest.raises(SourceError, match="checkpoint 1 does not fit this run") as caught:
        again.restore(abstract(state()), abstract(stream().arrays))
    assert "\n" not in str(caught.value)
    again.close()
