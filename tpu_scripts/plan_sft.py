"""Plan a fine-tuning run for a TPU slice without the hardware: what a chip holds, computes and sends.

    pip install libtpu
    python -m tpu_scripts.plan_sft --config configs/sasft/qwen3_8b_zh.yaml --topology v5p:2x2x2 --mesh fsdp=8

Compiles the optimiser step ahead of time, SASFT's loss on features of the config's layers included, prints what it takes, and ends with status 2
where that does not fit. Further flags are those of `qscope sft train`, such as `--micro-batches 16`. Reads no checkpoint, no conversations and
no features, and nothing from the hub. `--topology cpu:8` rehearses on virtual CPU devices.
"""

import contextlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tpu_scripts.plan import answer, compile_program, planner, show_collectives, show_memory

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from qscope_jax.cli.sft import Config
    from qscope_jax.training.sft import SFT
    from tpu_scripts.chips import Slice

_GIB = 2**30
_PARTS = {
    "weights": "the model it begins with",
    "state": "trained parameters and Adam's moments",
    "step": "step: batch, gradients, temporaries",
    "together": "together",
}
_LANGUAGES = ("en", "zh")
_FEATURES = 2


_ADVICE = "a larger slice, another mesh, more micro_batches, a head_chunk, or lora_rank"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; exit status 2 is a mistake of the user, or a run that does not fit, said in one line."""
    make = planner("sft train", "qscope_jax.cli.sft", plan, show, _ADVICE)
    return answer((__doc__ or "").splitlines()[0], "sft train", make, arguments)


def plan(config: "Config", mesh: "Mesh", where: "Slice") -> dict[str, Any]:
    """Compile the step and add up.

    Returns:
        `gib` (of each part, on a device), `collectives`, `flops`, `compile_seconds` and what was planned.

    Raises:
        ConfigError: no such model, sizes that the mesh does not divide, or a step that does not compile.
    """
    from tpu_scripts.flops import model_flops
    from tpu_scripts.programs import bytes_a_device

    recipe = abstract_recipe(config, mesh)
    built = compile_program(recipe.lower(), f"{where.topology}: the optimiser step")
    parts = {"weights": bytes_a_device(recipe.model.decoder), "state": bytes_a_device(recipe.tuning.abstract_state()), "step": built.extra}
    parts["together"] = sum(parts.values())
    tokens, model = config.batch_size * config.length, recipe.model.config
    # A backward pass is two forward ones, and remat makes every layer once more.
    passes = (4 if config.remat else 3) - (1 if config.lora_rank else 0)
    forward = model_flops(model, config.length, model.num_layers)
    head = 2.0 * model.d_model * model.vocab_size
    total = tokens * (passes * forward + (4 if config.head_chunk else 3) * head)
    each = total / mesh.size
    return {
        "model": config.model, "method": config.method, "lora_rank": config.lora_rank, "rows": config.batch_size, "length": config.length,
        "micro_batches": config.micro_batches, "topology": where.topology, "accelerator": where.accelerator, "chips": where.num_chips,
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1}, "gib": {name: size / _GIB for name, size in parts.items()},
        "flops": {"step": total, "device": each, "peak_seconds": None if where.tflops is None else each / (where.tflops * 1e12)},
        "collectives": {"step": [vars(kind) for kind in built.sent]}, "compile_seconds": built.seconds,
    }  # fmt: skip


def abstract_recipe(config: "Config", mesh: "Mesh") -> "SFT":
    """The recipe of a config on shapes alone; SASFT holds two features at each of the config's layers, by default the last two, down.

    Raises:
        ConfigError: no such model, or sizes that do not fit.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from qscope_jax.cli.options import same_named
    from qscope_jax.data.chat_tokens import ChatRow
    from qscope_jax.models.language_model import LanguageModel
    from qscope_jax.parallel.rules import replicated
    from qscope_jax.sae.encoder_rows import EncoderRows
    from qscope_jax.training.auxiliary import FeatureCeiling, ScriptPenalty
    from qscope_jax.training.sft import SFT, SFTConfig
    from tpu_scripts.programs import backbone, decoder_arrays

    model = backbone(config.model, config.dtype)

    def array(shape: tuple[int, ...], dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(mesh))

    auxiliary: Any = None
    if config.method == "sasft" and config.weight:
        layers = tuple(range(model.num_layers - 2, model.num_layers)) if config.layers is None else config.layers
        count = config.num_features or _FEATURES
        rows = tuple(EncoderRows(array((count, model.d_model)), array((count,))) for _ in layers)
        alpha = array((len(layers), len(_LANGUAGES), count))
        auxiliary = FeatureCeiling(rows, alpha, array((), jnp.int32), layers, config.weight, config.form, config.aim)
    elif config.method == "penalty" and config.weight:
        auxiliary = ScriptPenalty(array((model.vocab_size,), jnp.bool_), array((), jnp.int32), config.weight)
    row = ChatRow(np.zeros(1, np.int32), np.ones(1, bool), _LANGUAGES[0])
    settings = SFTConfig(**{**same_named(SFTConfig, config), "steps": config.steps or 1000})
    return SFT(LanguageModel(decoder_arrays(model, mesh), mesh=mesh), [row], settings, auxiliary=auxiliary, languages=_LANGUAGES, lanes=config.lanes)


def show(found: dict[str, Any]) -> None:
    """Print a plan as tables."""
    mesh = ",".join(f"{axis}={size}" for axis, size in found["mesh"].items()) or "one device"
    place = f"{found['topology']} ({found['chips']} chips{', ' + found['accelerator'] if found['accelerator'] else ''}), {mesh}"
    how = f"adapters of rank {found['lora_rank']}" if found["lora_rank"] else "all weights"
    rows = f"{found['rows']} rows of {found['length']} tokens in {found['micro_batches']} parts"
    print(f"{found['model']}: {found['method']}, {how}, {rows}, on {place}\n")
    show_memory(found, _PARTS)
    show_collectives(found["collectives"])
    flops = found["flops"]
    print(f"\nFLOPs a step by formula: {flops['step']:.3g}; a device {flops['device']:.3g}", end="")
    print("" if flops["peak_seconds"] is None else f", at the peak rate of bfloat16 {flops['peak_seconds']:.2f} s")
    print(f"compiled in {found['compile_seconds']:.1f} s")


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
