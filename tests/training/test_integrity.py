import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.training.checkpoint import Checkpoints, StreamState
from qscope_jax.training.integrity import RECORD, damage, read_facts, write_record


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small checkpoint as it is on disk; tests put back what they change."""
    folder = tmp_path_factory.mktemp("saved")
    state = {"weights": jnp.asarray(np.random.default_rng(0).standard_normal((4, 3)), jnp.float32), "steps": jnp.int32(3)}
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(3, state, StreamState({"buffer": state["weights"]}, {"served": 3}), {"fvu": 0.25, "none": float("nan")})
    return folder / "3"


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def offsets(content):
    return sorted({0, len(content) // 2, len(content) - 1, *np.random.default_rng(len(content)).integers(0, max(len(content), 1), 2).tolist()})


def test_a_checkpoint_that_nobody_touched_is_whole(saved):
    assert damage(saved) is None and len(files(saved)) > 10
    assert read_facts(saved) == {"fvu": 0.25, "none": None}


def test_any_file_cut_at_any_byte_is_noticed(saved):
    for path in files(saved):
        whole = path.read_bytes()
        for offset in offsets(whole) if whole else []:
            path.write_bytes(whole[:offset])
            reason = damage(saved)
            assert reason and path.name in reason and "\n" not in reason, (path, offset)
        path.write_bytes(whole)
    assert damage(saved) is None


def test_any_byte_altered_in_any_file_is_noticed(saved):
    for path in files(saved):
        whole = path.read_bytes()
        for offset in offsets(whole) if whole else []:
            for mask in (1, 0x20):
                path.write_bytes(whole[:offset] + bytes([whole[offset] ^ mask]) + whole[offset + 1 :])
                assert damage(saved), (path, offset, mask)
        path.write_bytes(whole)
    assert damage(saved) is None


def test_a_file_too_few_or_too_many_is_noticed(saved):
    for path in files(saved):
        path.rename(saved.parent / "elsewhere")
        assert damage(saved) == ("it was not finished" if path.name == RECORD else f"{path.relative_to(saved).as_posix()} is missing")
        (saved.parent / "elsewhere").rename(path)
    for folder in {path.parent for path in files(saved)}:
        for name in ("junk", ".record.json.x1"):
            (folder / name).write_bytes(b"")
            assert damage(saved) == f"{(folder / name).relative_to(saved).as_posix()} does not belong to it"
            (folder / name).unlink()
    assert damage(saved) is None


def test_a_longer_file_is_noticed_though_it_begins_the_same(saved):
    path = saved / "place/metadata"
    whole = path.read_bytes()
    path.write_bytes(whole + b" ")
    assert damage(saved) == f"place/metadata has {len(whole) + 1} bytes of {len(whole)}"
    path.write_bytes(whole)


def test_a_link_is_not_the_file_that_it_names(saved):
    path = saved / "place/metadata"
    path.rename(saved.parent / "elsewhere")
    path.symlink_to(saved.parent / "elsewhere")
    assert damage(saved)
    path.unlink()
    (saved.parent / "elsewhere").rename(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"sha256":"x"}', '{"files":{},"facts":{},"sha256":"0"}', "[" * 100_000, "\u00e9"])
def test_a_record_that_is_none_is_noticed(tmp_path, text):
    (tmp_path / RECORD).write_text(text, encoding="utf-8")
    assert damage(tmp_path) == "record.json was altered"
    with pytest.raises(ValueError, match="record.json was altered"):
        read_facts(tmp_path)


def test_a_record_can_be_made_of_an_empty_folder(tmp_path):
    write_record(tmp_path, {"step": 1})
    assert damage(tmp_path) is None and read_facts(tmp_path) == {"step": 1}
