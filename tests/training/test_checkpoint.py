import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from qscope_jax.errors import SourceError
from qscope_jax.parallel.mesh import make_mesh
from qscope_jax.parallel.rules import batch_sharding
from qscope_jax.training import checkpoint as checkpoint_module
from qscope_jax.training.checkpoint import Checkpoints, StreamState, abstract, outline, saved_steps
from tests.processes import ROOT

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


def test_leaves_come_back_in_their_places_whatever_the_order_of_their_names(checkpoints):
    saved = [jnp.float32(number) for number in range(12)]
    checkpoints.save(1, saved, StreamState({}, CURSOR))
    for like in (saved, abstract(saved), outline(saved)):
        assert_same(checkpoints.restore_state(like), saved)


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


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def remove(file):
    file.unlink()


def add(file):
    file.with_name("junk").write_bytes(b"")


@pytest.mark.parametrize(
    "harm, name",
    [(cut, "state/_METADATA"), (flip, "place/metadata"), (remove, "_CHECKPOINT_METADATA"), (remove, "commit_success.txt"), (add, "record.json")],
)
def test_a_torn_checkpoint_is_set_aside_for_the_one_before(harm, name, checkpoints, tmp_path, capsys):
    for number in (1, 2):
        checkpoints.save(number, state(number), stream(number))
    checkpoints.close()
    harm(tmp_path / "run/2" / name)
    with Checkpoints(tmp_path / "run") as again:
        restored, place = again.restore(abstract(state()), abstract(stream().arrays))
        assert again.latest == 1
        # The number is free again.
        again.save(2, state(5), stream(5))
        assert_same(again.restore(abstract(state()), abstract(stream().arrays))[0], state(5))
    assert_same(restored, state(1))
    assert_same(place.arrays, stream(1).arrays)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["1", "2", "torn-2"]
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "run: checkpoint 2 is torn (" in said and said.endswith("and set aside as torn-2; the run goes on from step 1\n")


def test_a_checkpoint_whose_record_is_missing_was_not_finished(checkpoints, tmp_path, capsys):
    checkpoints.save(1, state(), stream())
    checkpoints.close()
    (tmp_path / "run/1/record.json").unlink()
    (tmp_path / "run/torn-9").mkdir()
    with Checkpoints(tmp_path / "run") as again:
        assert again.latest == 1
        assert again.newest_whole() is None and again.latest is None
        with pytest.raises(SourceError, match="run: holds no whole checkpoint to resume from"):
            again.restore(abstract(state()), {})
    assert "checkpoint 1 is torn (it was not finished) and set aside as torn-1; none is left, the run begins anew\n" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["torn-1"]  # torn ones of earlier times are gone


def test_a_torn_checkpoint_that_was_asked_for_is_one_clear_line(checkpoints, tmp_path):
    for number in (1, 2):
        checkpoints.save(number, state(number), stream(number))
    checkpoints.close()
    cut(tmp_path / "run/1/place/metadata")
    with Checkpoints(tmp_path / "run") as again:
        with pytest.raises(SourceError, match=r"checkpoint 1 is torn \(place/metadata has \d+ bytes of \d+\); use another one") as caught:
            again.restore_state(abstract(state()), 1)
        assert_same(again.restore_state(abstract(state())), state(2))
    assert "\n" not in str(caught.value)


def test_what_a_killed_run_had_begun_is_cleared_away(checkpoints, tmp_path):
    (tmp_path / "run/3.orbax-checkpoint-tmp").mkdir()
    Checkpoints(tmp_path / "run").close()
    assert not list((tmp_path / "run").iterdir())


def save_all(folder, values, **options):
    """Checkpoints 1, 2, ... with these values of the metric; None is a step that was not evaluated."""
    opened = Checkpoints(folder, best="fvu", **options)
    for step, value in enumerate(values, 1):
        opened.save(step, state(step), StreamState({}, CURSOR), {} if value is None else {"fvu": value, "l0": 3.0})
    opened.close()
    return sorted(int(path.name) for path in folder.iterdir())


@pytest.mark.parametrize(
    "values, mode, best, kept",
    [
        ([0.5, 0.2, 0.3, 0.4, 0.6], "min", (2, 0.2), [2, 4, 5]),
        ([0.5, 0.9, 0.3, None, None], "max", (2, 0.9), [2, 4, 5]),
        ([0.5, 0.3, 0.3, None, None], "min", (3, 0.3), [3, 4, 5]),
        ([0.5, float("nan"), None, None], "min", (1, 0.5), [1, 3, 4]),
        ([None, None, None], "min", None, [2, 3]),
    ],
)
def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path, values, mode, best, kept):
    assert save_all(tmp_path, values, mode=mode) == kept
    with Checkpoints(tmp_path, best="fvu", mode=mode) as again:
        assert again.best == best
        if best:
            assert_same(again.restore_state(abstract(state()), best[0]), state(best[0]))


def test_the_best_of_earlier_runs_outlives_the_later_ones(tmp_path):
    save_all(tmp_path, [0.5, 0.1, 0.3])
    with Checkpoints(tmp_path, best="fvu") as again:
        for step in (4, 5, 6):
            again.save(step, state(step), StreamState({}, CURSOR), {"fvu": 0.2})
        assert again.best == (2, 0.1)
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [2, 5, 6]


def test_nothing_is_deleted_before_its_successor_is_recorded(tmp_path, monkeypatch):
    seen = []
    write = checkpoint_module.write_record
    monkeypatch.setattr(checkpoint_module, "write_record", lambda folder, facts: (seen.append(saved_steps(tmp_path)), write(folder, facts)))
    save_all(tmp_path, [0.1, 0.2, 0.3, 0.05, 0.4], keep=1)
    # The best so far, what is newest and recorded, and the one being recorded.
    assert seen == [[1], [1, 2], [1, 2, 3], [1, 3, 4], [4, 5]]


def test_a_full_disk_is_one_clear_line_and_finished_checkpoints_stay(checkpoints, tmp_path, monkeypatch):
    checkpoints.save(1, state(1), stream(1))
    checkpoints.wait()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(SourceError, match=r"checkpoint 2 could not be written \(No space left on device\); finished ones are untouched: free space"):
        checkpoints.save(2, state(2), stream(2))
    assert checkpoints.latest == 1
    assert_same(checkpoints.restore(abstract(state()), abstract(stream().arrays))[0], state(1))


FILLS_UP = """
import resource, sys
import jax.numpy as jnp
from qscope_jax.training.checkpoint import Checkpoints, StreamState
from qscope_jax.errors import SourceError
with Checkpoints(sys.argv[1]) as checkpoints:
    checkpoints.save(1, {"w": jnp.ones(100)}, StreamState({}, {}))
    checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    checkpoints.save(2, {"w": jnp.ones(1 << 20)}, StreamState({}, {}))
    try:
        checkpoints.close()
    except SourceError as error:
        print(error)
"""


def test_a_disk_that_fills_up_while_a_checkpoint_is_written_is_one_clear_line(tmp_path):
    """The limit on a file's size stands for the disk's: here too the system refuses a write, under Orbax."""
    done = subprocess.run([sys.executable, "-c", FILLS_UP, tmp_path / "run"], capture_output=True, text=True, cwd=ROOT, timeout=100)
    assert "checkpoint 2 could not be written (File too large); finished ones are untouched" in done.stdout
    assert done.stdout.count("\n") == 1 and "Traceback" not in done.stderr
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["1"]


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SourceError, match=r"file/run: cannot be written \(Not a directory\); choose a folder that you may write to"):
        Checkpoints(tmp_path / "file/run")


def laid_out(mesh):
    """State whose matrix has rows over `data` and columns over `tensor`."""
    weights = jax.device_put(jnp.arange(64, dtype=jnp.float32).reshape(8, 8), NamedSharding(mesh, PartitionSpec("data", "tensor")))
    return {"weights": weights, "steps": jax.device_put(jnp.int32(3), NamedSharding(mesh, PartitionSpec()))}


@pytest.mark.parametrize("spec, shard", [("tensor=4", (8, 2)), ("", (8, 8)), ("data=4,tensor=2", (2, 4))])
def test_a_checkpoint_of_one_mesh_continues_on_another(checkpoints, spec, shard):
    saved = laid_out(make_mesh("data=2,tensor=2"))
    checkpoints.save(1, saved, StreamState({"buffer": saved["weights"]}, CURSOR))
    like = abstract(laid_out(make_mesh(spec)))
    restored, place = checkpoints.restore(like, {"buffer": like["weights"]})
    for array in (restored["weights"], place.arrays["buffer"]):
        assert array.sharding == like["weights"].sharding and array.sharding.shard_shape((8, 8)) == shard
        np.testing.assert_array_equal(array, saved["weights"])
    assert restored["steps"].sharding == like["steps"].sharding and restored["steps"] == 3


def test_a_stream_whose_arrays_depend_on_the_mesh_says_so(checkpoints):
    checkpoints.save(1, state(), stream())
    with pytest.raises(
        SourceError, match=r"the stream's buffer is float32\[2,3\], this run has float32\[4,3\], which depends on batch, buffer and mesh"
    ):
        checkpoints.restore(abstract(state()), {"buffer": jax.ShapeDtypeStruct((4, 3), jnp.float32)})
