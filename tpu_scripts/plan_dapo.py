"""Plan a DAPO run for a TPU slice without the hardware: rollouts and updates, what a chip holds, computes and sends.

    pip install libtpu
    python -m tpu_scripts.plan_dapo --config configs/dapo/qwen3_8b.yaml --topology v5p:2x2x2 --mesh fsdp=8

Compiles ahead of time the loop that draws tokens, with one edit on steered rows, and an update of answers as long as they may be; prints what they
take, and ends with status 2 where that does not fit. Further flags are those of `qscope dapo train`. Reads no checkpoint and no prompts, and
nothing from the hub. `--topology cpu:8` rehearses on virtual CPU devices.
"""

import contextlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tpu_scripts.plan import answer, compile_program, planner, show_collectives, show_memory

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from qscope_jax.cli.dapo import Config
    from qscope_jax.training.dapo.dapo import DAPO
    from tpu_scripts.chips import Slice

_GIB = 2**30
_PARTS = {
    "weights": "the model it begins with",
    "state": "trained parameters and Adam's moments",
    "policy": "the decoder that rollouts are drawn from",
    "rollout": "rollouts: cache, sampler, temporaries",
    "update": "update: batch, gradients, temporaries",
    "together": "together, with the larger of rollouts with their decoder and update",
}


_ADVICE = "a larger slice, another mesh, more micro_batches, fewer rollout_rows, or lora_rank"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; exit status 2 is a mistake of the user, or a run that does not fit, said in one line."""
    make = planner("dapo train", "qscope_jax.cli.dapo", plan, show, _ADVICE)
    return answer((__doc__ or "").splitlines()[0], "dapo train", make, arguments)


def plan(config: "Config", mesh: "Mesh", where: "Slice") -> dict[str, Any]:
    """Compile both programs and add up.

    Returns:
        `gib` (of each part, on a device), `collectives`, `compile_seconds` and what was planned.

    Raises:
        ConfigError: no such model, sizes that the mesh does not divide, or a program that does not compile.
    """
    from tpu_scripts.programs import bytes_a_device

    recipe = abstract_recipe(config, mesh)
    decoder = recipe.model.decoder
    loop, rows = recipe.sampler.lower(decoder, recipe.edits)
    built = {
        "rollout": compile_program(loop, f"{where.topology}: the rollouts' loop"),
        "update": compile_program(recipe.lower(), f"{where.topology}: an update"),
    }
    weights = bytes_a_device(decoder)
    parts = {
        "weights": weights, "state": bytes_a_device(recipe.tuning.abstract_state()), "policy": weights,
        "rollout": bytes_a_device(rows) + built["rollout"].extra, "update": built["update"].extra,
    }  # fmt: skip
    parts["together"] = parts["weights"] + parts["state"] + max(parts["policy"] + parts["rollout"], parts["update"])
    return {
        "model": config.model, "rows": recipe.sampler.rows, "answers": recipe.config.num_rows, "prompt": config.max_prompt_length,
        "completion": config.max_completion_length, "micro_batches": config.micro_batches, "topology": where.topology,
        "accelerator": where.accelerator, "chips": where.num_chips, "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "gib": {name: size / _GIB for name, size in parts.items()},
        "collectives": {name: [vars(kind) for kind in program.sent] for name, program in built.items()},
        "compile_seconds": {name: program.seconds for name, program in built.items()},
    }  # fmt: skip


def abstract_recipe(config: "Config", mesh: "Mesh") -> "DAPO":
    """The recipe of a config on shapes alone, with the last member of each group steered along one direction.

    Raises:
        ConfigError: no such model, or sizes that do not fit.
    """
    import numpy as np

    from qscope_jax.cli.options import same_named
    from qscope_jax.features.steering import add_directions
    from qscope_jax.models.language_model import LanguageModel
    from qscope_jax.training.dapo.dapo import DAPO, PromptTask
    from qscope_jax.training.dapo.dapo_config import DAPOConfig
    from qscope_jax.training.dapo.rewards import Reward
    from tpu_scripts.programs import backbone, decoder_arrays

    model = backbone(config.model, config.dtype)
    settings = DAPOConfig(**{**same_named(DAPOConfig, config), "num_steered": 1})
    edit = add_directions(2 * model.num_layers // 3, np.ones((1, model.d_model), np.float32), 1.0)
    task = PromptTask([[1]], [""], {}, [Reward("any", 1.0, lambda completions: [0.0] * len(completions))], (0,))
    return DAPO(LanguageModel(decoder_arrays(model, mesh), mesh=mesh), task, settings, edits=(edit,))


def show(found: dict[str, Any]) -> None:
    """Print a plan as tables."""
    mesh = ",".join(f"{axis}={size}" for axis, size in found["mesh"].items()) or "one device"
    place = f"{found['topology']} ({found['chips']} chips{', ' + found['accelerator'] if found['accelerator'] else ''}), {mesh}"
    sizes = f"{found['answers']} answers of up to {found['completion']} tokens to prompts of up to {found['prompt']}"
    print(f"{found['model']}: {sizes}, {found['rows']} drawn at a time, updates in {found['micro_batches']} parts, on {place}\n")
    show_memory(found, _PARTS)
    show_collectives(found["collectives"])
    seconds = found["compile_seconds"]
    print(f"\ncompiled in {seconds['rollout']:.1f} s (rollouts) and {seconds['update']:.1f} s (update)")


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
