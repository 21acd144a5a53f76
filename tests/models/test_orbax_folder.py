import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.data import orbax_arrays
from qscope_jax.data.hub import open_source
from qscope_jax.data.resumable import verify_manifest
from qscope_jax.errors import ArchitectureError, InputError, QscopeError, ShapeError, SourceError
from qscope_jax.models import orbax_folder
from qscope_jax.models.language_model import LanguageModel, load_model
from qscope_jax.models.orbax_folder import grouped, read_entries, read_group
from qscope_jax.models.weights import checked_entries, read_config

SHAPES = ["tied", "untied", "experts", "experts in some layers", "llama, scaled", "gemma", "delta, tied, wrapped", "delta, experts"]


def assert_equal_models(got: LanguageModel, expected: LanguageModel) -> None:
    """The same arrays: bits, dtypes and shardings; the same config."""
    leaves, tree = jax.tree.flatten(got.decoder)
    others, other_tree = jax.tree.flatten(expected.decoder)
    assert tree == other_tree and got.config == expected.config
    for array, other in zip(leaves, others, strict=True):
        assert (array.dtype, array.sharding) == (other.dtype, other.sharding)
        assert np.asarray(array).tobytes() == np.asarray(other).tobytes()


def save_group(folder: Path, group: str, arrays: dict) -> None:
    """Write a group by Orbax alone."""
    from orbax.checkpoint import v1 as ocp

    ocp.save((folder / "weights" / group).resolve(), arrays, overwrite=True)


@pytest.fixture
def folder(make_reference, tmp_path) -> Path:
    """A float32 model in this layout, to be spoilt."""
    load_model(make_reference("untied").folder).save(tmp_path / "orbax", format="orbax")
    return tmp_path / "orbax"


@pytest.mark.parametrize(("shape", "scan"), [(shape, place % 2 == 0) for place, shape in enumerate(SHAPES)] + [("untied", False), ("experts", True)])
def test_a_saved_model_is_loaded_with_every_bit(make_reference, tmp_path, shape, scan):
    model = load_model(make_reference(shape).folder, scan=scan)
    model.save(tmp_path / "orbax", format="orbax")
    assert_equal_models(load_model(tmp_path / "orbax", scan=scan), model)
    assert_equal_models(load_model(tmp_path / "orbax", scan=not scan), load_model(make_reference(shape).folder, scan=not scan))


def test_tensors_keep_hugging_face_names_shapes_and_dtypes(make_reference, tmp_path):
    source = open_source(make_reference("experts").folder)
    load_model(make_reference("experts").folder, dtype="bfloat16").save(tmp_path / "orbax", format="orbax")
    entries, _ = checked_entries(source, read_config(source))
    found = read_entries(open_source(tmp_path / "orbax"))
    assert {name: entry.shape for name, entry in found.items()} == {name: entry.shape for name, entry in entries.items()}
    assert {entry.dtype.name for entry in found.values()} == {"bfloat16"}
    assert {path.name for path in (tmp_path / "orbax" / "weights").iterdir()} == {"layer_00000", "layer_00001", "layer_00002", "shared"}
    assert {entry.group.name for name, entry in found.items() if ".layers.1." in name} == {"layer_00001"}


def test_a_group_is_an_orbax_checkpoint_that_orbax_reads_by_itself(folder, make_reference):
    from orbax.checkpoint import v1 as ocp
    from safetensors.numpy import load_file

    expected = load_file(make_reference("untied").folder / "model.safetensors")
    read = ocp.load((folder / "weights" / "layer_00002").resolve())
    assert len(read) == 11 and all(np.array_equal(array, expected[name]) for name, array in read.items())


@pytest.mark.parametrize(
    ("shape", "mesh"),
    [("untied", "fsdp=2,tensor=2"), ("untied", "data=2,fsdp=4"), ("experts", "data=2,fsdp=4"), ("experts", "expert=2,tensor=2")],
)
def test_every_device_of_a_mesh_gets_its_slices(make_reference, tmp_path, mesh, shape):
    source = make_reference(shape).folder
    load_model(source, mesh=mesh).save(tmp_path / "orbax", format="orbax")
    for scan in (True, False):
        assert_equal_models(load_model(tmp_path / "orbax", mesh=mesh, scan=scan), load_model(source, mesh=mesh, scan=scan))


def test_layers_of_mixed_dtypes_keep_them_and_a_dtype_asked_for_is_rounded_to(folder):
    group = read_group(folder / "weights" / "layer_00000")
    save_group(folder, "layer_00000", {name: x if "norm" in name else x.astype(jnp.bfloat16) for name, x in group.items()})
    sign(folder)
    first, second, _ = load_model(folder, scan=False).decoder.layers
    assert first.mixer.q_proj[...].dtype == jnp.bfloat16 and first.input_norm[...].dtype == jnp.float32
    assert second.mixer.q_proj[...].dtype == jnp.float32
    assert load_model(folder, scan=True).decoder.layers[0].mixer.q_proj[...].dtype == jnp.float32
    narrow = load_model(folder, dtype="bfloat16", scan=True)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(narrow.decoder)} == {"bfloat16"}


def test_large_layers_are_split_into_groups_of_bounded_size(make_reference, tmp_path, monkeypatch):
    monkeypatch.setattr(orbax_folder, "_GROUP_BYTES", 24_000)
    model = load_model(make_reference("experts").folder)
    model.save(tmp_path / "orbax", format="orbax")
    entries = read_entries(open_source(tmp_path / "orbax")).values()
    sizes = {group: sum(e.nbytes for e in entries if e.group == group) for group in {e.group for e in entries}}
    assert len(sizes) > 4 and all(size <= 24_000 or sum(e.group == group for e in entries) == 1 for group, size in sizes.items())
    assert_equal_models(load_model(tmp_path / "orbax"), model)


def test_carried_tensors_are_a_group_of_their_own():
    class Tensor:
        nbytes = 4

        def __init__(self, name):
            self.name = name

    names = ["model.layers.0.a", "model.norm.weight", "mtp.layers.0.a", "model.layers.11.a", "model.visual.b"]
    groups = grouped([Tensor(name) for name in names], frozenset({"mtp.layers.0.a", "model.visual.b"}))
    assert {group: [tensor.name for tensor in tensors] for group, tensors in groups.items()} == {
        "carried": ["mtp.layers.0.a", "model.visual.b"],
        "layer_00000": ["model.layers.0.a"],
        "layer_00011": ["model.layers.11.a"],
        "shared": ["model.norm.weight"],
    }


def test_tokenizer_files_travel_along_and_the_manifest_lists_every_file(make_reference, tmp_path):
    source = Path(shutil.copytree(make_reference("untied").folder, tmp_path / "hf"))
    (source / "tokenizer.json").write_text("{}")
    load_model(source).save(tmp_path / "orbax", format="orbax")
    assert (tmp_path / "orbax" / "tokenizer.json").read_text() == "{}"
    files = {path.relative_to(tmp_path / "orbax").as_posix() for path in (tmp_path / "orbax").rglob("*") if path.is_file()}
    assert verify_manifest(tmp_path / "orbax") == []
    assert set(json.loads((tmp_path / "orbax" / "manifest.json").read_text())["files"]) == files - {"manifest.json"}


def test_a_model_can_be_saved_over_its_own_source_but_not_over_something_else(folder, tmp_path):
    model = load_model(folder)
    model.save(folder, format="orbax")
    assert_equal_models(load_model(folder), model)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("x")
    with pytest.raises(SourceError, match="is not replaced"):
        model.save(tmp_path / "thesis", format="orbax")
    with pytest.raises(InputError, match="'gguf'"):
        model.save(tmp_path / "new", format="gguf")


def test_a_failed_save_leaves_nothing_behind_and_the_old_folder_whole(folder, tmp_path, monkeypatch):
    model = load_model(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    real, calls = orbax_folder.write_group, []

    def full_disk(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise SourceError("the disk is full")
        real(*arguments)

    monkeypatch.setattr(orbax_folder, "write_group", full_disk)
    for target in (folder, tmp_path / "new"):
        calls.clear()
        with pytest.raises(SourceError, match="the disk is full"):
            model.save(target, format="orbax")
    assert [path.name for path in tmp_path.iterdir()] == ["orbax"]
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def cut_data(folder: Path) -> None:
    path = max((folder / "weights" / "layer_00001").rglob("d/*"), key=lambda file: file.stat().st_size)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def sign(folder: Path) -> None:
    """Make the manifest agree with what is there, so that what is wrong lies deeper."""
    manifest = json.loads((folder / "manifest.json").read_text())
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
    manifest["files"] = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()} for path in files
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def signed(spoil):
    def change(folder: Path) -> None:
        spoil(folder)
        sign(folder)

    return change


def edit_group(change, group="layer_00001"):
    def spoil(folder: Path) -> None:
        arrays = {name: array.copy() for name, array in read_group(folder / "weights" / group).items()}
        change(arrays)
        save_group(folder, group, arrays)

    return signed(spoil)


def edit_config(**changes):
    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def poison(arrays) -> None:
    arrays[NAME][1, 2] = np.nan


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (cut_data, SourceError, "missing or not of the .* bytes that manifest.json says"),
        (lambda f: (f / "manifest.json").unlink(), SourceError, "has no manifest.json, without which nobody knows"),
        (lambda f: (f / "manifest.json").write_text('{"files": 3}'), SourceError, "manifest.json lists no files"),
        (signed(lambda f: (f / "weights/shared/_CHECKPOINT_METADATA").unlink()), SourceError, "shared: the Orbax checkpoint is damaged"),
        (signed(lambda f: shutil.rmtree(f / "weights/shared/state")), SourceError, "shared: the Orbax checkpoint is damaged"),
        (lambda f: shutil.rmtree(f / "weights/layer_00001"), SourceError, "layer_00001/.* is missing"),
        (signed(lambda f: shutil.rmtree(f / "weights/layer_00001")), SourceError, "11 tensors are missing, first model.layers.1"),
        (signed(lambda f: shutil.copytree(f / "weights/layer_00001", f / "weights/x")), SourceError, "lies in layer_00001 and in x"),
        (edit_group(lambda a: a.pop(NAME)), SourceError, "1 tensors are missing, first model.layers.1.mlp.up_proj.weight"),
        (edit_group(lambda a: a.update({"model.layers.1.x": np.ones(2)})), ArchitectureError, "no place in a qwen3 decoder, first model.layers.1.x"),
        (edit_group(lambda a: a.update({NAME: a[NAME].T.copy()})), ShapeError, r"has shape \(32, 48\), config.json demands \(48, 32\)"),
        (edit_group(lambda a: a.update({NAME: a[NAME].astype(np.int8)})), ArchitectureError, "is of int8; quantised"),
        (edit_group(poison), ShapeError, "up_proj.weight holds NaN or infinite values"),
        (edit_config(num_hidden_layers=4, layer_types=None), SourceError, "11 tensors are missing, first model.layers.3"),
        (lambda f: (f / "config.json").unlink(), SourceError, "has no file config.json"),
    ],
)
def test_a_spoilt_folder_is_an_error_of_one_line(folder, spoil, error, message):
    spoil(folder)
    with pytest.raises(error, match=message) as caught:
        load_model(folder)
    assert issubclass(error, QscopeError) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_values_too_large_for_the_dtype_asked_for_are_refused(folder):
    edit_group(lambda arrays: arrays.update({NAME: arrays[NAME] * np.float32(1e6)}))(folder)
    with pytest.raises(ShapeError, match="up_proj.weight holds values too large for float16; load it as float32"):
        load_model(folder, dtype="float16")


def test_a_damaged_checkpoint_says_nothing_on_stderr(folder):
    cut_data(folder)
    program = (
        "import sys\nfrom qscope_jax.models.language_model import load_model\n"
        "try: load_model(sys.argv[1])\nexcept Exception as error: print(type(error).__name__, {'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert (done.stdout, done.stderr) == ("SourceError set()\n", "")


def test_a_disk_without_room_is_found_before_orbax_writes(folder, tmp_path, monkeypatch, capfd):
    model = load_model(folder)
    monkeypatch.setattr(orbax_arrays.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 5000, 5000))
    with pytest.raises(SourceError, match="new: the disk is full; nothing is left behind"):
        model.save(tmp_path / "new", format="orbax")
    assert [path.name for path in tmp_path.iterdir()] == ["orbax"] and capfd.readouterr() == ("", "")
