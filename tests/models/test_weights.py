import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.data.hub import open_source
from qscope_jax.errors import ArchitectureError, ConfigError, QscopeError, ShapeError, SourceError
from qscope_jax.models import weights
from qscope_jax.models.language_model import LanguageModel, forward, load_model
from qscope_jax.models.safetensors_file import read_header

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bits of every tensor of a folder, read by the safetensors package."""
    import torch
    from safetensors.torch import load_file

    loaded = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    return {name: (str(tensor.dtype), tuple(tensor.shape), tensor.view(torch.uint8).numpy().tobytes()) for name, tensor in loaded.items()}


def edit_json(path: Path, **changes) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in (content | changes).items() if value != "absent"}))


def rewrite(folder: Path, change) -> None:
    """Apply `change` to the dictionary of the torch tensors of a single-file folder."""
    from safetensors.torch import load_file, save_file

    loaded = load_file(folder / SINGLE)
    change(loaded)
    save_file(loaded, folder / SINGLE, {"format": "pt"})


@pytest.fixture
def folder(make_reference, tmp_path) -> Path:
    """A float32 checkpoint in one file, to be spoilt."""
    return Path(shutil.copytree(make_reference("untied").folder, tmp_path / "checkpoint"))


@pytest.fixture
def sharded(make_reference, tmp_path) -> Path:
    """The same in several files, as transformers writes them."""
    make_reference("untied").model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    return tmp_path / "sharded"


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize(
    "shape", ["tied", "untied", "experts", "experts in some layers", "llama, scaled", "gemma", "delta, tied, wrapped", "delta, experts"]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_load_and_save_change_no_bit(make_reference, tmp_path, monkeypatch, scan, shape, dtype, shard):
    import torch

    copy.deepcopy(make_reference(shape).model).to(getattr(torch, dtype)).save_pretrained(tmp_path / "read", max_shard_size=shard)
    monkeypatch.setattr(weights, "_SHARD_BYTES", 20_000 if shard == "20KB" else 5_000_000_000)
    model = load_model(tmp_path / "read", scan=scan)
    model.save(tmp_path / "written")
    expected = tensors(tmp_path / "read")
    assert tensors(tmp_path / "written") == expected
    assert model.config.dtype == dtype and model.config.tie_embeddings == ("lm_head.weight" not in expected)
    assert (tmp_path / "written" / INDEX).exists() == (tmp_path / "read" / INDEX).exists() == (shard == "20KB")


def test_a_file_of_mixed_dtypes_keeps_each_of_them(folder, tmp_path):
    import torch

    def mix(loaded) -> None:
        for name in loaded:
            loaded[name] = loaded[name].to(torch.float32 if "norm" in name else torch.bfloat16)

    rewrite(folder, mix)
    edit_json(folder / "config.json", dtype="bfloat16")
    model = load_model(folder, scan=True)
    model.save(tmp_path / "written")
    assert tensors(tmp_path / "written") == tensors(folder)
    # Gains that float32 resolves and bfloat16 does not make no difference to the activations' dtype.
    out = forward(model.decoder, np.ones((1, 4), np.int32), np.ones((1, 4), np.int32), taps=jnp.arange(1, dtype=jnp.int32), stop_after=0)
    assert out.residuals.dtype == jnp.bfloat16
    assert {leaf.dtype.name for leaf in jax.tree.leaves(load_model(folder, dtype="float32").decoder)} == {"float32"}


def test_a_dtype_that_is_asked_for_is_rounded_to_as_numpy_does(folder):
    model = load_model(folder, dtype="bfloat16")
    exact = load_model(folder).decoder.embedding[...]
    assert model.config.dtype == "bfloat16"
    assert np.array_equal(model.decoder.embedding[...], np.asarray(exact).astype(jnp.bfloat16))


def test_transformers_reads_what_is_saved(make_reference, sharded, tmp_path, monkeypatch):
    import torch
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(weights, "_SHARD_BYTES", 30_000)
    load_model(sharded).save(tmp_path / "written")
    index = json.loads((tmp_path / "written" / INDEX).read_text())
    sizes = [entry.dtype.itemsize * int(np.prod(entry.shape)) for file in set(index["weight_map"].values())
             for entry in read_header(tmp_path / "written" / file).values()]  # fmt: skip
    assert len(set(index["weight_map"].values())) > 3 and index["metadata"]["total_size"] == sum(sizes)
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "written", output_loading_info=True)  # pyright: ignore
    assert not any(info.values())
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(theirs(tokens).logits, make_reference("untied").model(tokens).logits)


def test_the_config_keeps_what_is_not_interpreted(folder, tmp_path):
    edit_json(folder / "config.json", use_cache=False, future_key={"a": 1}, eos_token_id=[5, 6])
    load_model(folder).save(tmp_path / "written")
    written, read = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "written", folder))
    assert read.items() <= (written | {"transformers_version": read["transformers_version"]}).items()


def test_tokenizer_files_and_generation_config_travel_along(folder, tmp_path):
    (folder / "tokenizer.json").write_text("{}")
    (folder / "generation_config.json").write_text('{"eos_token_id": [9, 5]}')
    edit_json(folder / "config.json", eos_token_id=5)
    model = load_model(folder)
    assert model.config.eos_token_ids == (5, 9)
    model.save(tmp_path / "written")
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "written" / name).read_bytes() == (folder / name).read_bytes()


def test_loading_works_offline_from_the_hub_cache(sharded, tmp_path, monkeypatch):
    from huggingface_hub import constants

    repository = tmp_path / "hub" / "models--owner--name"
    snapshot, blobs = repository / "snapshots" / COMMIT, repository / "blobs"
    for made in (snapshot, blobs, repository / "refs"):
        made.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for number, file in enumerate(sharded.iterdir()):
        shutil.copyfile(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    model = load_model("owner/name")
    assert model.name == "owner/name"
    model.save(tmp_path / "written")
    assert tensors(tmp_path / "written") == tensors(sharded)


def test_loading_imports_neither_torch_nor_transformers(folder):
    program = (
        "import sys; from qscope_jax.models.language_model import load_model; model = load_model(sys.argv[1]); model.save(sys.argv[1] + '-copy');"
        "print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "[]\n"), result.stderr


@pytest.mark.parametrize("mesh", ["fsdp=2,tensor=2", "data=2,fsdp=4", "tensor=8"])
def test_every_device_of_a_mesh_holds_its_slices(folder, tmp_path, mesh, by_layer):
    model, plain = load_model(folder, mesh=mesh), load_model(folder)
    got, expected = by_layer(model.decoder), by_layer(plain.decoder)
    assert got.keys() == expected.keys() and all(np.array_equal(got[name], expected[name]) for name in expected)
    fsdp, tensor = model.mesh.shape["fsdp"], model.mesh.shape["tensor"]
    layer = model.decoder.layers[0]
    for parameter, split in [(layer.mixer.q_proj, (1, tensor, fsdp)), (layer.mixer.o_proj, (1, fsdp, tensor)),
                             (layer.feed_forward.down_proj, (1, fsdp, tensor)), (layer.input_norm, (1, fsdp)), (layer.mixer.q_norm, (1, 1)),
                             (model.decoder.embedding, (1, fsdp))]:  # a vocabulary of 97 is not divisible  # fmt: skip
        array = parameter[...]
        assert array.sharding.mesh == model.mesh
        assert array.sharding.shard_shape(array.shape) == tuple(size // parts for size, parts in zip(array.shape, split, strict=True))
    model.save(tmp_path / "written")
    assert tensors(tmp_path / "written") == tensors(folder)


def test_logits_on_a_mesh_equal_those_on_one_device(folder):
    tokens = np.random.default_rng(0).integers(0, 97, (4, 16)).astype(np.int32)
    plain, meshed = (load_model(folder, mesh=mesh, scan=True) for mesh in ("", "data=2,fsdp=2,tensor=2"))
    expected = forward(plain.decoder, tokens, np.ones_like(tokens)).logits
    with jax.set_mesh(meshed.mesh):
        got = forward(meshed.decoder, tokens, np.ones_like(tokens)).logits
    assert len(got.sharding.device_set) == 8
    np.testing.assert_allclose(got, expected, atol=1e-5 * float(jnp.abs(expected).max()))


def lose_a_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[2].unlink()


def cut_a_shard(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[2]
    path.write_bytes(path.read_bytes()[:-100])


def change_index(**changes):
    return lambda folder: edit_json(folder / INDEX, **changes)


def name_a_file(name):
    def spoil(folder: Path) -> None:
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        edit_json(folder / INDEX, weight_map=weight_map | {"model.norm.weight": name})

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lose_a_shard, "has no file model-00003-of-"),
        (cut_a_shard, "the file is truncated, download it again"),
        (change_index(weight_map="absent"), "has no weight_map"),
        (change_index(weight_map={"model.norm.weight": 3}), "has no weight_map"),
        (name_a_file("../model-00001.safetensors"), "outside its own folder"),
        (name_a_file(["model-00001.safetensors"]), "has no weight_map"),
        (lambda folder: name_a_file(sorted(folder.glob("*.safetensors"))[0].name)(folder), "promises tensor model.norm.weight"),
        (lambda folder: (folder / INDEX).write_text("{"), "is not valid JSON"),
        (lambda folder: (folder / INDEX).unlink(), "neither model.safetensors.index.json nor model.safetensors"),
    ],
)
def test_a_spoilt_sharded_checkpoint_is_a_source_error(sharded, spoil, message):
    spoil(sharded)
    with pytest.raises(SourceError, match=message) as caught:
        load_model(sharded)
    assert "\n" not in str(caught.value)


def set_tensor(name: str, change):
    """Change one tensor of the file, or remove it where `change` gives None."""

    def spoil(folder: Path) -> None:
        def alter(loaded) -> None:
            changed = change(loaded.pop(name) if name in loaded else None)
            if changed is not None:
                loaded[name] = changed.contiguous()

        rewrite(folder, alter)

    return spoil


def set_config(**changes):
    return lambda folder: edit_json(folder / "config.json", **changes)


def poison(tensor):
    tensor[1, 2] = float("nan")
    return tensor


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (set_tensor(NAME, lambda x: x[:-1]), ShapeError, r"up_proj.weight has shape \(47, 32\), config.json demands \(48, 32\)"),
        (set_tensor(NAME, lambda x: x.T), ShapeError, r"has shape \(32, 48\)"),
        (set_tensor(NAME, lambda x: x[None]), ShapeError, r"has shape \(1, 48, 32\)"),
        (set_tensor("model.embed_tokens.weight", lambda x: x[0]), ShapeError, r"has shape \(32,\), config.json demands \(97, 32\)"),
        (set_config(hidden_size=64), ShapeError, "config.json demands"),
        (set_tensor(NAME, poison), ShapeError, "up_proj.weight holds NaN or infinite values"),
        (set_tensor(NAME, lambda x: x.double().mul(1e300).clamp(max=1e300)), ShapeError, "holds values too large for float32"),
        (set_tensor(NAME, lambda x: x.char()), ArchitectureError, "is of int8; quantised weights are not implemented"),
        (set_tensor(NAME, lambda x: None), SourceError, "1 tensors are missing, first model.layers.1.mlp.up_proj.weight"),
        (set_config(num_hidden_layers=4, layer_types="absent"), SourceError, "11 tensors are missing, first model.layers.3.input_layernorm"),
        (set_config(num_hidden_layers=2, layer_types="absent"), ArchitectureError, "11 tensors have no place in a qwen3 decoder"),
        (set_tensor("model.layers.0.self_attn.q_proj.bias", lambda _: np_zeros()), ArchitectureError, "first model.layers.0.self_attn.q_proj.bias"),
        (set_config(model_type="qwen9"), ArchitectureError, "model_type is 'qwen9'; implemented: gemma2, llama, qwen3, qwen3_5"),
        (set_config(attention_bias=True), ArchitectureError, "attention_bias=True is not implemented"),
        (set_config(rope_parameters={"rope_type": "yarn", "factor": 4.0}), ArchitectureError, "rotary scaling .*yarn.* not implemented"),
        (set_config(use_sliding_window=True), ArchitectureError, "use_sliding_window=True is not implemented"),
        (set_config(hidden_size="absent"), ConfigError, "required key 'hidden_size' is missing"),
        (lambda folder: (folder / "config.json").unlink(), SourceError, "has no file config.json"),
        (lambda folder: (folder / SINGLE).unlink(), SourceError, "neither"),
    ],
)
def test_a_spoilt_checkpoint_is_an_error_of_one_line(folder, spoil, error, message):
    spoil(folder)
    with pytest.raises(error, match=message) as caught:
        load_model(folder)
    assert issubclass(error, QscopeError) and "\n" not in str(caught.value)


def np_zeros():
    import torch

    return torch.zeros(48)


def test_values_too_large_for_the_dtype_asked_for_are_refused(folder):
    set_tensor(NAME, lambda x: x * 1e6)(folder)
    with pytest.raises(ShapeError, match="holds values too large for float16; load it as float32, its own dtype"):
        load_model(folder, dtype="float16")


@pytest.mark.parametrize("dtype", ["float99", "int32", "float64"])
def test_a_dtype_that_no_model_has_is_refused(folder, dtype):
    with pytest.raises(QscopeError, match=f"dtype '{dtype}' is not one that a model can have"):
        load_model(folder, dtype=dtype)


def test_a_failed_save_leaves_nothing_behind_and_the_old_folder_whole(folder, tmp_path, monkeypatch):
    model = load_model(folder)
    out = tmp_path / "out"
    model.save(out / "model")
    before = {path.name: path.read_bytes() for path in (out / "model").iterdir()}
    monkeypatch.setattr(weights, "_SHARD_BYTES", 20_000)
    real, calls = weights.write_file, []

    def full_disk(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        real(*arguments)

    monkeypatch.setattr(weights, "write_file", full_disk)
    for target in (out / "model", out / "new"):
        calls.clear()
        with pytest.raises(SourceError, match="writing failed .No space left on device"):
            model.save(target)
    assert [path.name for path in out.iterdir()] == ["model"]
    assert {path.name: path.read_bytes() for path in (out / "model").iterdir()} == before


def test_a_folder_of_something_else_is_not_replaced(folder, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("x")
    with pytest.raises(SourceError, match="holds something else than a model"):
        load_model(folder).save(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter1.tex").exists()


def test_a_model_can_be_saved_over_its_own_source(folder):
    expected = tensors(folder)
    load_model(folder).save(folder)
    assert tensors(folder) == expected


def test_a_decoder_made_in_memory_can_be_saved_and_loaded(tiny_config, random_decoder, by_layer, tmp_path):
    decoder = random_decoder(tiny_config(layers=4, period=2, tie_embeddings=True))
    LanguageModel(decoder).save(tmp_path / "model")
    for scan in (True, False):
        loaded = by_layer(load_model(tmp_path / "model", scan=scan).decoder)
        assert all(np.array_equal(loaded[name], array) for name, array in by_layer(decoder).items())


def test_a_tensor_in_two_files_is_read_from_the_one_that_the_index_names(sharded):
    from safetensors.torch import load_file, save_file

    expected = tensors(sharded)["model.norm.weight"]
    files = {file: load_file(file) for file in sharded.glob("*.safetensors")}
    for file, loaded in files.items():
        if "model.norm.weight" not in loaded:
            save_file(loaded | {"model.norm.weight": next(x for y in files.values() for n, x in y.items() if n == "model.norm.weight") * 2}, file)
    decoder = load_model(sharded).decoder
    assert np.asarray(decoder.final_norm[...]).tobytes() == expected[2]


def test_read_config_needs_no_weights(folder):
    (folder / SINGLE).unlink()
    assert weights.read_config(open_source(folder)).num_layers == 3
