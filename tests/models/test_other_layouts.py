"""Checkpoints that hold more than the decoder reads, or the same in another arrangement, come back as they were."""

import shutil
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qscope_jax.data.hub import open_source
from qscope_jax.errors import ArchitectureError, ShapeError
from qscope_jax.models.conversion import convert_model
from qscope_jax.models.language_model import forward, load_model

TOKENS = np.random.default_rng(5).integers(0, 97, (2, 16)).astype(np.int32)


def with_tensors(folder: Path, target: Path, change) -> Path:
    """A copy of a folder of one file whose tensors went through `change`."""
    shutil.copytree(folder, target)
    save_file(change(load_file(folder / "model.safetensors")), target / "model.safetensors", {"format": "pt"})
    return target


def fuse(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Experts of a layer as the release has them: one tensor of gates and ups behind each other, one of downs."""
    fused = {name: tensor for name, tensor in tensors.items() if ".mlp.experts." not in name}
    layers = {name.split(".mlp.experts.")[0] for name in tensors if ".mlp.experts." in name}
    for layer in layers:
        experts = f"{layer}.mlp.experts"
        gate, up, down = (np.stack([tensors[f"{experts}.{e}.{kind}_proj.weight"] for e in range(6)]) for kind in ("gate", "up", "down"))
        fused |= {f"{experts}.gate_up_proj": np.concatenate([gate, up], axis=1), f"{experts}.down_proj": down}
    return fused


@pytest.fixture(scope="module")
def single(make_reference) -> Path:
    return make_reference("delta, experts").folder


@pytest.fixture(scope="module")
def fused(single, tmp_path_factory) -> Path:
    return with_tensors(single, tmp_path_factory.mktemp("fused") / "model", fuse)


@pytest.fixture(scope="module")
def wrapped(make_reference, tmp_path_factory) -> Path:
    """A folder with a vision tower and a head of multi-token prediction."""
    more = {"mtp.fc.weight": np.arange(12, dtype=np.float32).reshape(3, 4).astype(ml_dtypes.bfloat16), "mtp.norm.weight": np.float32([np.inf, 1])}
    return with_tensors(make_reference("delta, tied, wrapped").folder, tmp_path_factory.mktemp("wrapped") / "model", lambda tensors: tensors | more)


def logits(model) -> np.ndarray:
    return np.asarray(forward(model.decoder, TOKENS, np.ones_like(TOKENS)).logits)


def assert_same_tensors(one: Path, other: Path):
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and tensor.shape == second[name].shape and tensor.tobytes() == second[name].tobytes()


@pytest.mark.parametrize("mesh", ["", "expert=2,tensor=2", "data=2,fsdp=4"])
@pytest.mark.parametrize("scan", [False, True])
def test_fused_experts_are_those_in_tensors_of_their_own(single, fused, mesh, scan):
    expected, got = load_model(single), load_model(fused, mesh=mesh, scan=scan)
    np.testing.assert_allclose(logits(got), logits(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format", ["hf", "orbax"])
def test_fused_experts_are_saved_fused_to_the_bit(fused, tmp_path, format):
    load_model(fused, scan=True).save(tmp_path / "written", format)
    again = load_model(tmp_path / "written", mesh="expert=2,tensor=2", scan=True)
    again.save(tmp_path / "hf")
    assert_same_tensors(tmp_path / "hf", fused)


@pytest.mark.parametrize("through", ["hf", "orbax"])
def test_what_a_decoder_leaves_out_is_listed_and_carried_over(wrapped, tmp_path, through):
    model = load_model(wrapped)
    names = load_file(wrapped / "model.safetensors").keys()
    assert sorted(model.left_out()) == sorted(name for name in names if name.startswith(("mtp.", "model.visual.")))
    model.save(tmp_path / "written", through)
    load_model(tmp_path / "written").save(tmp_path / "hf")
    assert_same_tensors(tmp_path / "hf", wrapped)


@pytest.mark.parametrize("folder", ["fused", "wrapped"])
def test_a_conversion_there_and_back_changes_no_bit(request, folder, tmp_path):
    source = request.getfixturevalue(folder)
    convert_model(open_source(source), tmp_path / "orbax", "orbax")
    convert_model(open_source(tmp_path / "orbax"), tmp_path / "hf", "hf")
    assert_same_tensors(tmp_path / "hf", source)
    assert (tmp_path / "hf" / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_transformers_reads_a_wrapper_that_was_saved(make_reference, tmp_path):
    from transformers import Qwen3_5ForConditionalGeneration

    load_model(make_reference("delta, tied, wrapped").folder).save(tmp_path / "written")
    _, info = Qwen3_5ForConditionalGeneration.from_pretrained(tmp_path / "written", output_loading_info=True)  # pyright: ignore
    assert not any(info.values())


def test_a_vision_tower_is_left_out_of_wrappers_only(fused, tmp_path):
    stray = with_tensors(fused, tmp_path / "stray", lambda tensors: tensors | {"model.audio.weight": np.zeros(3, np.float32)})
    with pytest.raises(ArchitectureError, match="1 tensors have no place in a qwen3_5_moe_text decoder, first model.audio.weight"):
        load_model(stray)


def test_fused_experts_of_a_wrong_shape_are_named(fused, tmp_path):
    name = "model.layers.0.mlp.experts.gate_up_proj"
    cut = with_tensors(fused, tmp_path / "cut", lambda tensors: tensors | {name: tensors[name][:, :-1].copy()})
    with pytest.raises(ShapeError, match=r"gate_up_proj has shape \(6, 39, 32\), config.json demands \(6, 40, 32\)"):
        load_model(cut)


def test_half_precision_weights_of_a_delta_net_keep_what_is_float32(make_reference, tmp_path):
    def halve(tensors):
        return {name: tensor if name.endswith("A_log") else tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}

    mixed = with_tensors(make_reference("delta").folder, tmp_path / "mixed", halve)
    (mixed / "config.json").write_text((mixed / "config.json").read_text().replace("float32", "bfloat16"))
    model = load_model(mixed)
    assert {leaf.dtype.name for leaf in (model.decoder.layers[0].mixer.A_log[...], model.decoder.embedding[...])} == {"float32", "bfloat16"}
    assert jnp.isfinite(logits(model)).all()
    model.save(tmp_path / "written")
    assert_same_tensors(tmp_path / "written", mixed)
