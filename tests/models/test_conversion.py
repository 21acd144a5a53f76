import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qscope_jax.data.files import read_json
from qscope_jax.data.hub import open_source
from qscope_jax.data.resumable import verify_manifest
from qscope_jax.errors import ArchitectureError, InputError, ShapeError, SourceError
from qscope_jax.models import conversion, orbax_folder, weights
from qscope_jax.models.conversion import StoredModel, convert_model, differing_tensors, narrowed
from qscope_jax.models.orbax_folder import read_entries, read_group
from qscope_jax.models.weights import INDEX_FILE, SINGLE_FILE

SHAPES = ["tied", "untied", "experts", "experts in some layers", "llama, scaled", "gemma", "delta", "delta, tied, wrapped", "delta, experts"]
NAME = "model.layers.1.mlp.up_proj.weight"


def bits(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of every tensor of a Hugging Face folder, read by the safetensors package."""
    loaded = {name: array for file in folder.glob("*.safetensors") for name, array in load_file(file).items()}
    return {name: (array.dtype.name, array.shape, array.tobytes()) for name, array in loaded.items()}


@pytest.fixture
def folder(make_reference, tmp_path) -> Path:
    """A float32 checkpoint in one file, with a tokenizer; to be spoilt."""
    copied = Path(shutil.copytree(make_reference("untied").folder, tmp_path / "source"))
    (copied / "tokenizer.json").write_text('{"a": 1}')
    return copied


@pytest.fixture
def small_units(monkeypatch) -> None:
    """Shards of a few tensors."""
    monkeypatch.setattr(weights, "_SHARD_BYTES", 20_000)


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
@pytest.mark.parametrize("shape", SHAPES)
def test_there_and_back_changes_no_bit(make_reference, tmp_path, monkeypatch, shape, shard):
    monkeypatch.setattr(weights, "_SHARD_BYTES", 20_000 if shard == "20KB" else 5_000_000_000)
    make_reference(shape).model.save_pretrained(tmp_path / "hf", max_shard_size=shard)
    convert_model(open_source(tmp_path / "hf"), tmp_path / "orbax", "orbax")
    convert_model(open_source(tmp_path / "orbax"), tmp_path / "back", "hf")
    convert_model(open_source(tmp_path / "hf"), tmp_path / "copy", "hf")
    expected = bits(tmp_path / "hf")
    assert bits(tmp_path / "back") == bits(tmp_path / "copy") == expected
    assert (tmp_path / "back" / INDEX_FILE).exists() == (shard == "20KB")
    for written in ("orbax", "back", "copy"):
        assert verify_manifest(tmp_path / written) == []
        assert (tmp_path / written / "config.json").read_bytes() == (tmp_path / "hf" / "config.json").read_bytes()


def test_a_file_of_mixed_dtypes_keeps_each_of_them_and_tokenizer_files_travel_along(folder, tmp_path):
    arrays = load_file(folder / SINGLE_FILE)
    save_file({name: x if "norm" in name else x.astype(np.float16) for name, x in arrays.items()}, folder / SINGLE_FILE)
    convert_model(open_source(folder), tmp_path / "orbax", "orbax")
    convert_model(open_source(tmp_path / "orbax"), tmp_path / "back", "hf")
    assert bits(tmp_path / "back") == bits(folder) and {dtype for dtype, _, _ in bits(folder).values()} == {"float16", "float32"}
    assert (tmp_path / "back" / "tokenizer.json").read_text() == '{"a": 1}'


def test_transformers_reads_what_came_back_from_orbax(make_reference, tmp_path, small_units):
    import torch
    from transformers import AutoModelForCausalLM

    convert_model(open_source(make_reference("experts").folder), tmp_path / "orbax", "orbax")
    convert_model(open_source(tmp_path / "orbax"), tmp_path / "back", "hf")
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)  # pyright: ignore
    assert not any(info.values())
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(theirs(tokens).logits, make_reference("experts").model(tokens).logits)


@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_narrowing_needs_consent_and_rounds_as_numpy_does(folder, tmp_path, to):
    source = open_source(folder)
    with pytest.raises(InputError, match="tensors of float32 lose precision as bfloat16; pass --lossy"):
        convert_model(source, tmp_path / "out", to, dtype="bfloat16")
    assert not (tmp_path / "out").exists()
    convert_model(source, tmp_path / "out", to, dtype="bfloat16", lossy=True)
    written = StoredModel(open_source(tmp_path / "out"))
    expected = load_file(folder / SINGLE_FILE)
    for tensor in written.tensors:
        assert np.array_equal(written.read(tensor), expected[tensor.name].astype(jnp.bfloat16))
    assert read_json(tmp_path / "out" / "config.json")["dtype"] == "bfloat16"


@pytest.mark.parametrize(("own", "wanted", "loses"), [
    ("float32", "bfloat16", True), ("float32", "float16", True), ("float16", "bfloat16", True), ("bfloat16", "float16", True),
    ("bfloat16", "float32", False), ("float16", "float32", False), ("bfloat16", "bfloat16", False),
])  # fmt: skip
def test_what_narrows_is_known(own, wanted, loses):
    assert conversion._holds(np.dtype(wanted), np.dtype(own)) is not loses


def test_widening_is_free(folder, tmp_path):
    convert_model(open_source(folder), tmp_path / "narrow", "orbax", dtype="bfloat16", lossy=True)
    convert_model(open_source(tmp_path / "narrow"), tmp_path / "wide", "hf", dtype="float32")
    expected = load_file(folder / SINGLE_FILE)[NAME].astype(jnp.bfloat16).astype(np.float32)
    assert np.array_equal(load_file(tmp_path / "wide" / SINGLE_FILE)[NAME], expected)
    assert narrowed(StoredModel(open_source(tmp_path / "narrow"), "float32")) == {}


@pytest.mark.parametrize("source", ["hf", "orbax"])
def test_values_too_large_for_the_dtype_are_refused_and_nothing_is_left(folder, tmp_path, source):
    arrays = load_file(folder / SINGLE_FILE)
    save_file(arrays | {NAME: arrays[NAME] * np.float32(1e6)}, folder / SINGLE_FILE)
    convert_model(open_source(folder), tmp_path / "orbax", "orbax")
    path = folder if source == "hf" else tmp_path / "orbax"
    with pytest.raises(ShapeError, match="too large for float16"):
        convert_model(open_source(path), tmp_path / "out", "hf", dtype="float16", lossy=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["orbax", "source"]


def test_a_carried_tensor_goes_through_as_bytes_in_a_group_of_its_own(make_reference, tmp_path):
    hf = Path(shutil.copytree(make_reference("tied").folder, tmp_path / "hf"))
    arrays = load_file(hf / SINGLE_FILE)
    head = np.full(arrays["model.embed_tokens.weight"].shape, np.nan, np.float16)  # what is not read need not be finite, nor follow a dtype
    save_file(arrays | {"lm_head.weight": head}, hf / SINGLE_FILE)
    written = convert_model(open_source(hf), tmp_path / "orbax", "orbax", dtype="bfloat16", lossy=True)
    assert written.carried == {"lm_head.weight"}
    assert {name: x.tobytes() for name, x in read_group(tmp_path / "orbax/weights/carried").items()} == {"lm_head.weight": head.tobytes()}
    convert_model(open_source(tmp_path / "orbax"), tmp_path / "back", "hf")
    back = StoredModel(open_source(tmp_path / "back"))
    assert next(back.read(tensor) for tensor in back.tensors if tensor.carried).tobytes() == head.tobytes()


@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_an_interrupted_conversion_resumes_and_writes_finished_units_once(folder, tmp_path, monkeypatch, small_units, to):
    source = open_source(folder)
    convert_model(source, tmp_path / "whole", to)
    real, read = StoredModel.read, []

    def interrupted(self, tensor):
        read.append(tensor.name)
        if len(read) == 25:
            raise KeyboardInterrupt
        return real(self, tensor)

    monkeypatch.setattr(StoredModel, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert_model(source, tmp_path / "out", to)
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.partial").is_dir()
    seen = []
    convert_model(source, tmp_path / "out", to, progress=seen.append)
    monkeypatch.undo()
    total = len(StoredModel(source).tensors)
    assert 25 < len(read) < 25 + total - 8
    assert sum(seen) == sum(tensor.nbytes for tensor in StoredModel(source).tensors)
    assert not list(differing_tensors(StoredModel(source), StoredModel(open_source(tmp_path / "out"))))
    assert verify_manifest(tmp_path / "out") == [] and not (tmp_path / ".out.partial").exists()
    assert {p.relative_to(tmp_path / "out").parts[0] for p in (tmp_path / "out").rglob("*")} == {
        p.relative_to(tmp_path / "whole").parts[0] for p in (tmp_path / "whole").rglob("*")
    }


def test_a_source_that_changed_meanwhile_is_converted_from_the_start(folder, tmp_path, monkeypatch):
    real = orbax_folder.write_group
    monkeypatch.setattr(conversion, "write_orbax_group", lambda f, g, a: real(f, g, a) if g == "layer_00000" else interrupt())
    with pytest.raises(KeyboardInterrupt):
        convert_model(open_source(folder), tmp_path / "out", "orbax")
    monkeypatch.undo()
    arrays = load_file(folder / SINGLE_FILE)
    changed = "model.layers.0.mlp.up_proj.weight"
    save_file(arrays | {changed: arrays[changed] + 1}, folder / SINGLE_FILE)
    convert_model(open_source(folder), tmp_path / "out", "orbax")
    assert np.array_equal(read_group(tmp_path / "out/weights/layer_00000")[changed], arrays[changed] + 1)


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_a_full_disk_is_one_line_and_leaves_no_destination(folder, tmp_path, monkeypatch, to, small_units):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    if to == "hf":
        monkeypatch.setattr(conversion, "write_file", full)
    else:
        from orbax.checkpoint import v1 as ocp

        monkeypatch.setattr(ocp, "save", full)
    with pytest.raises(SourceError, match="the disk is full; nothing is left behind") as caught:
        convert_model(open_source(folder), tmp_path / "out", to)
    assert "\n" not in str(caught.value) and [path.name for path in tmp_path.iterdir()] == ["source"]


def test_only_a_model_is_replaced_and_only_when_asked(folder, tmp_path):
    source = open_source(folder)
    convert_model(source, tmp_path / "out", "hf")
    with pytest.raises(SourceError, match="exists; pass --overwrite"):
        convert_model(source, tmp_path / "out", "orbax")
    convert_model(source, tmp_path / "out", "orbax", overwrite=True)
    assert not (tmp_path / "out" / SINGLE_FILE).exists() and (tmp_path / "out" / "weights").is_dir()
    with pytest.raises(InputError, match="holds the source"):
        convert_model(source, folder, "orbax", overwrite=True)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("x")
    with pytest.raises(SourceError, match="is not replaced"):
        convert_model(source, tmp_path / "thesis", "orbax", overwrite=True)


def drop(arrays) -> None:
    del arrays[NAME]


def add(arrays) -> None:
    arrays["model.layers.0.self_attn.q_proj.bias"] = np.zeros(3, np.float32)


def turn(arrays) -> None:
    arrays[NAME] = arrays[NAME].T.copy()


def poison(arrays) -> None:
    arrays[NAME][1, 2] = np.nan


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [(drop, SourceError, "1 tensors are missing, first " + NAME), (add, ArchitectureError, "no place"), (turn, ShapeError, "demands"),
     (poison, ShapeError, "holds NaN")],
)  # fmt: skip
def test_a_source_that_is_not_sound_is_refused_and_nothing_is_written(folder, tmp_path, change, error, message):
    arrays = load_file(folder / SINGLE_FILE)
    change(arrays)
    save_file(arrays, folder / SINGLE_FILE)
    with pytest.raises(error, match=message):
        convert_model(open_source(folder), tmp_path / "out", "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_flipped_bit_of_an_orbax_source_is_noticed(folder, tmp_path):
    convert_model(open_source(folder), tmp_path / "orbax", "orbax")
    file = max((tmp_path / "orbax/weights/layer_00001").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(SourceError, match="layer_00001/.* is not as its manifest says"):
        convert_model(open_source(tmp_path / "orbax"), tmp_path / "out", "hf")


def test_a_single_differing_bit_or_tensor_is_found(folder, tmp_path):
    (other := tmp_path / "other").mkdir()
    shutil.copyfile(folder / "config.json", other / "config.json")
    arrays = load_file(folder / SINGLE_FILE)
    arrays[NAME][3, 3] = -0.0
    save_file(arrays, folder / SINGLE_FILE)
    arrays[NAME][3, 3] = 0.0
    save_file(arrays, other / SINGLE_FILE)
    assert list(differing_tensors(StoredModel(open_source(folder)), StoredModel(open_source(other)))) == [NAME]
    assert list(differing_tensors(StoredModel(open_source(folder)), StoredModel(open_source(folder)))) == []


def test_what_a_check_refuses_is_not_put_in_its_place(folder, tmp_path):
    def check(path: Path) -> None:
        assert len(read_entries(open_source(path))) == len(StoredModel(open_source(folder)).tensors)
        raise SourceError("not good enough")

    with pytest.raises(SourceError, match="not good enough"):
        convert_model(open_source(folder), tmp_path / "out", "orbax", check=check)
    assert not (tmp_path / "out").exists()


def test_the_manifest_says_what_was_made_from_what(folder, tmp_path):
    convert_model(open_source(folder), tmp_path / "out", "orbax")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["format"] == "orbax" and manifest["plan"]["source"] == str(folder)
    assert set(manifest["plan"]["files"]) >= {"config.json", SINGLE_FILE} and "weights/layer_00002" in manifest["units"]
