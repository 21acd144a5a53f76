"""LoRA adapters (Hu et al. 2021, arXiv 2106.09685) for a decoder: made, attached, merged, and carried to and from PEFT's files.

Adapters are a plain pytree, `{weight: {"lora_A": .., "lora_B": ..}}`, with the place and path of the weight as its key, such as
`0.mixer.q_proj`: the first number is the place in the layer period, and every array is stacked over the period's repeats.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from qscope_jax.data.files import read_json, write_json
from qscope_jax.errors import ConfigError, ShapeError, SourceError
from qscope_jax.models.config import ModelConfig
from qscope_jax.models.decoder import Decoder
from qscope_jax.models.low_rank import LowRank
from qscope_jax.models.safetensors_file import read_header, write_file
from qscope_jax.models.weights import NAME_TABLES

Adapters = dict[str, dict[str, Array]]
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_PREFIX = "base_model.model."


def init_adapters(decoder: Decoder, rank: int, targets: Sequence[str], key: jax.Array) -> Adapters:
    """First adapters in float32, A random and B zero, so that the decoder with them is the decoder without.

    Args:
        decoder: Whose weights are adapted; may be abstract, under `jax.eval_shape`.
        rank: W, the inner width of every update.
        targets: Names of weights, of `TARGETS`.
        key: Of A: uniform within 1 / sqrt(I), as PEFT draws it.

    Raises:
        ConfigError: a target that no layer of the decoder has, or a rank below 1.
    """
    if rank < 1:
        raise ConfigError(f"the rank of an adapter is {rank}, expected at least 1")
    found = dict(_weights(decoder, targets))
    missing = [name for name in targets if not any(path.endswith(f".{name}") for path in found)]
    if missing:
        known = sorted({path.rsplit(".", 1)[1] for path, _ in _weights(decoder, TARGETS)})
        raise ConfigError(f"this {decoder.config.family} has no weight {missing[0]} that an adapter fits; choose of {', '.join(known)}")
    keys = jax.random.split(key, len(found))
    adapters: Adapters = {}
    for own, (path, weight) in zip(keys, found.items(), strict=True):
        repeats, out, width = weight.shape
        bound = 1 / math.sqrt(width)
        A = jax.random.uniform(own, (repeats, rank, width), jnp.float32, -bound, bound)
        adapters[path] = {"lora_A": A, "lora_B": jnp.zeros((repeats, out, rank), jnp.float32)}
    return adapters


def attach(decoder: Decoder, adapters: Adapters, scale: float) -> Decoder:
    """The decoder with adapters beside its weights; `scale` is LoRA's alpha / rank. Can be traced."""
    return _replaced(decoder, adapters, lambda weight, pair: LowRank(weight, pair["lora_A"], pair["lora_B"], scale))


def merge(decoder: Decoder, adapters: Adapters, scale: float) -> Decoder:
    """A plain decoder whose weights have the adapters in them, rounded to their dtype."""
    return _replaced(decoder, adapters, lambda weight, pair: nnx.Param(LowRank(weight, pair["lora_A"], pair["lora_B"], scale).multiplied_out()))


def save_adapters(folder: str | Path, adapters: Adapters, config: ModelConfig, *, alpha: float, base: str) -> Path:
    """Write a folder as PEFT has it: `adapter_config.json` and `adapter_model.safetensors`, a pair of tensors for each layer and weight.

    Raises:
        SourceError: the folder cannot be written.
    """
    folder = Path(folder)
    tensors = {f"{_PREFIX}{name}.{part}.weight": array for name, part, array in _by_layer(adapters, config)}
    rank = next(iter(adapters.values()))["lora_A"].shape[-2]
    described = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank, "lora_alpha": alpha, "lora_dropout": 0.0,
        "bias": "none", "fan_in_fan_out": False, "inference_mode": True, "target_modules": sorted({path.rsplit(".", 1)[1] for path in adapters}),
    }  # fmt: skip
    entries = [(name, array.shape, np.dtype(array.dtype)) for name, array in tensors.items()]
    write_file(folder / "adapter_model.safetensors", entries, (np.asarray(array) for array in tensors.values()))
    write_json(folder / "adapter_config.json", described)
    return folder


def load_adapters(folder: str | Path, decoder: Decoder) -> tuple[Adapters, float]:
    """Adapters that PEFT or `save_adapters` wrote, for this decoder, and their scale.

    Raises:
        SourceError: the folder lacks a file, or holds something else than LoRA adapters.
        ShapeError: they are of a model of other layers or widths.
    """
    folder = Path(folder)
    described = read_json(folder / "adapter_config.json")
    if described.get("peft_type") != "LORA" or not described.get("r") or "lora_alpha" not in described:
        raise SourceError(f"{folder}/adapter_config.json: peft_type is {described.get('peft_type')}, expected LORA with r and lora_alpha")
    tensors = {name: entry.read() for name, entry in read_header(folder / "adapter_model.safetensors").items()}
    targets = [name for name in TARGETS if any(f".{name}." in tensor for tensor in tensors)]
    like = jax.eval_shape(lambda: init_adapters(decoder, int(described["r"]), targets, jax.random.key(0))) if targets else {}
    wanted = {f"{_PREFIX}{name}.{part}.weight": (path, part, row) for path, name, row in _places(like, decoder.config) for part in like[path]}
    if set(tensors) != set(wanted):
        odd = sorted(set(tensors) ^ set(wanted))[0]
        raise ShapeError(f"{folder}: its tensors are not those of adapters of this model ({odd} is on one side alone); take those of the same model")
    arrays = {path: {part: np.zeros(leaf.shape, np.float32) for part, leaf in pair.items()} for path, pair in like.items()}
    for name, (path, part, row) in wanted.items():
        if tensors[name].shape != arrays[path][part].shape[1:]:
            raise ShapeError(f"{folder}: {name} has shape {list(tensors[name].shape)}, this model {list(arrays[path][part].shape[1:])}")
        arrays[path][part][row] = tensors[name].astype(np.float32)
    scale = float(described["lora_alpha"]) / (math.sqrt(described["r"]) if described.get("use_rslora") else described["r"])
    return jax.tree.map(jnp.asarray, arrays), scale


def _weights(decoder: Decoder, names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Matrices of those names that are applied as `linear(x, weight)`, with their paths."""
    for place, layer in enumerate(decoder.layers):
        for part in ("mixer", "feed_forward"):
            module = getattr(layer, part)
            for name in names:
                weight = getattr(module, name, None)
                if weight is not None and weight[...].ndim == 3:
                    yield f"{place}.{part}.{name}", weight[...]


def _replaced(decoder: Decoder, adapters: Adapters, make: Any) -> Decoder:
    """A copy with some weights replaced; the decoder itself stays as it is."""
    copy = jax.tree.map(lambda leaf: leaf, decoder)
    for path, pair in adapters.items():
        place, part, name = path.split(".")
        module = getattr(cast(Any, copy.layers)[int(place)], part)
        weight = getattr(module, name)[...]
        delattr(module, name)
        setattr(module, name, make(weight, pair))
    return copy


def _places(adapters: Mapping[str, Any], config: ModelConfig) -> Iterator[tuple[str, str, int]]:
    """Path, Hugging Face module and repeat of each adapted weight of each layer."""
    table = NAME_TABLES[config.family]
    for path, pair in adapters.items():
        place, part, name = path.split(".")
        pattern = table[f"layers.{part}.{name}"].removesuffix(".weight")
        for repeat in range(pair["lora_A"].shape[0]):
            yield path, pattern.format(layer=repeat * config.period + int(place)), repeat


def _by_layer(adapters: Adapters, config: ModelConfig) -> Iterator[tuple[str, str, Float[Array, "O I"]]]:
    for path, name, repeat in _places(adapters, config):
        for part, array in adapters[path].items():
            yield name, part, array[repeat]
