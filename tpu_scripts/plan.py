"""Plan an SAE training run for a TPU slice without the hardware: what a chip holds, computes and sends.

    pip install libtpu
    python -m tpu_scripts.plan --config configs/sae/qwen3_1.7b_w32k_l0_50.yaml --topology v5p:2x2x1 --mesh fsdp=4

Compiles ahead of time the model's pass up to the highest trained layer and the SAEs' step, prints what they take together, and ends with
status 2 where that does not fit. Further flags are those of `qscope train-sae`, such as `--model-batch 32`. Reads no checkpoint and nothing
from the hub. `--topology cpu:8` rehearses on virtual CPU devices.
"""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qscope_jax.errors import ConfigError, QscopeError

if TYPE_CHECKING:
    import jax
    from jax.sharding import Mesh

    from tpu_scripts.chips import Slice
    from tpu_scripts.collectives import Collectives
    from tpu_scripts.programs import Run

_GIB = 2**30
_PARTS = {
    "weights": "model weights",
    "state": "SAEs: parameters, moments, counters",
    "buffer": "activation buffer",
    "refill": "refill: another buffer, residual streams, the model's temporaries",
    "sae": "SAE step: batch, temporaries",
    "together": "together, with the larger of the last two",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; exit status 2 is a mistake of the user, or a run that does not fit, said in one line."""
    advice = "a larger slice, another mesh, or a smaller model_batch, buffer_batches or batch_tokens"
    make = planner("train-sae", "qscope_jax.cli.train_sae", _plan_saes, show, advice)
    return answer((__doc__ or "").splitlines()[0], "train-sae", make, arguments)


def answer(
    description: str, verb: str, make: "Callable[[list[str], argparse.Namespace, Slice], dict[str, Any]]", arguments: Sequence[str] | None
) -> int:
    """Read the command line, plan, show, and say in one line what does not fit.

    Args:
        description: What the program does.
        verb: The verb of `qscope` whose YAML is planned.
        make: Plans and shows; given the verb's flags, the program's options and the slice. Returns the plan, with `gib` of its parts and `advice`.
        arguments: The command line's.
    """
    parser = argparse.ArgumentParser(description=description, epilog=f"Further flags are those of qscope {verb}.")
    parser.add_argument("--config", required=True, help=f"YAML of qscope {verb}")
    parser.add_argument("--topology", required=True, help="libtpu's name, such as v5e:4x4, v5p:2x2x2, v6e:4x4")
    parser.add_argument("--mesh", help="axes over the devices, such as data=2,fsdp=4; by default the config's")
    parser.add_argument("--memory", type=float, help="GiB of a device to plan for, by default all that a program may use")
    parser.add_argument("--out", type=Path, help="write the plan as JSON too")
    options, rest = parser.parse_known_args(arguments)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing here runs on an accelerator, though one may be there
    try:
        _answer(options, rest, make)
    except QscopeError as error:
        print(f"plan: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _answer(options: argparse.Namespace, rest: list[str], make: "Callable[[list[str], argparse.Namespace, Slice], dict[str, Any]]") -> None:
    from qscope_jax.data.files import write_json
    from tpu_scripts.chips import describe

    mesh = [] if options.mesh is None else ["--mesh", options.mesh]
    where = describe(options.topology)
    if options.memory is None:
        options.memory = where.memory_gib
    found = make(["--config", options.config, *mesh, *rest], options, where)
    if options.out is not None:
        write_json(options.out, found)
    together = found["gib"]["together"]
    if options.memory is not None and together > options.memory:
        raise ConfigError(f"{where.topology}: {together:.2f} GiB a device do not fit into its {options.memory:g}; try {found['advice']}")


def planner(
    verb: str, module: str, plan: "Callable[[Any, Mesh, Slice], dict[str, Any]]", show: Callable[[dict[str, Any]], None], advice: str
) -> "Callable[[list[str], argparse.Namespace, Slice], dict[str, Any]]":
    """What `answer` calls to plan a verb's run.

    Args:
        verb: The verb.
        module: Where its `Config` is.
        plan: Plans a config on a mesh of a slice.
        show: Prints a plan.
        advice: What to try where it does not fit.
    """

    def make(flags: list[str], options: argparse.Namespace, where: "Slice") -> dict[str, Any]:
        from qscope_jax.cli.options import parse
        from qscope_jax.parallel.mesh import make_mesh
        from tpu_scripts.chips import as_if_there

        config = parse(verb, import_module(module).Config, flags)
        with as_if_there(where):
            found = plan(config, make_mesh(config.mesh, where.devices), where)
        found |= {"memory_gib": options.memory, "advice": advice}
        show(found)
        return found

    return make


def _plan_saes(config: Any, mesh: "Mesh", where: "Slice") -> dict[str, Any]:
    from tpu_scripts.programs import make_run

    return plan(make_run(config, mesh), where)


@dataclass(frozen=True)
class Program:
    """A compiled program: what it takes beside its arguments, and what it sends.

    Attributes:
        seconds: Time that compiling took.
        extra: Bytes of temporaries and of results that are not written over arguments.
        sent: Its collectives.
    """

    seconds: float
    extra: int
    sent: "list[Collectives]"


def plan(run: "Run", where: "Slice") -> dict[str, Any]:
    """Compile both programs and add up.

    Returns:
        `gib` (of each part, on a device), `collectives`, `flops`, `compile_seconds` and what was planned.

    Raises:
        ConfigError: a program does not compile; where it needs more memory than a device has, the line says how much.
    """
    from tpu_scripts import programs

    decoder = programs.decoder_arrays(run.model, run.mesh)
    step, state = programs.lower_sae(run)
    built = {
        "model": compile_program(programs.lower_model(run, decoder), f"{where.topology}: the model's pass"),
        "sae": compile_program(step, f"{where.topology}: the SAE step"),
    }
    held = {name: programs.bytes_a_device(tree) for name, tree in (("weights", decoder), ("state", state), ("buffer", programs.buffer_array(run)))}
    # While a new buffer is filled by the model, the old one is still there.
    passing = {"refill": held["buffer"] + built["model"].extra, "sae": built["sae"].extra + programs.batch_bytes(run)}
    parts = {**held, **passing, "together": sum(held.values()) + max(passing.values())}
    return {
        "model": run.config.model, "saes": run.num_saes, "num_features": run.sae.num_features, "k": run.sae.k,
        "topology": where.topology, "accelerator": where.accelerator, "chips": where.num_chips,
        "mesh": {axis: size for axis, size in run.mesh.shape.items() if size > 1},
        "gib": {name: size / _GIB for name, size in parts.items()}, "flops": _flops(run, where),
        "collectives": {name: [vars(kind) for kind in program.sent] for name, program in built.items()},
        "compile_seconds": {name: program.seconds for name, program in built.items()},
    }  # fmt: skip


def compile_program(lowered: "jax.stages.Lowered", what: str) -> Program:
    """Compile and measure.

    Raises:
        ConfigError: it does not compile, most often because a device has too little memory.
    """
    import jax

    from tpu_scripts.collectives import collectives

    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{what} does not fit or compile ({line}); try a larger slice, another mesh or a smaller batch") from error
    seconds = time.perf_counter() - start
    memory: Any = compiled.memory_analysis()
    extra = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    try:
        text = compiled.as_text() or ""
    except jax.errors.JaxRuntimeError as error:  # libtpu is newer than jaxlib, and has an instruction that this does not know
        raise ConfigError(f"{what}: libtpu writes a program that jax {jax.__version__} cannot read; install the one that jax[tpu] names") from error
    return Program(seconds, extra, collectives(text))


def _flops(run: "Run", where: "Slice") -> dict[str, float | None]:
    """FLOPs of a training step of `batch_tokens` tokens, by formula, and the least time that they take."""
    from qscope_jax.sae.sparse import strategy
    from tpu_scripts.flops import model_flops, sae_flops

    tokens, size = run.config.batch_tokens, run.sae
    dense = strategy(size.num_features, run.model.d_model, size.k) == "dense"
    model = tokens * model_flops(run.model, run.config.sequence_length, max(run.layers) + 1)
    saes = tokens * run.num_saes * sae_flops(size.num_features, run.model.d_model, size.k, dense)
    each = (model + saes) / run.mesh.size
    return {"model": model, "saes": saes, "device": each, "peak_seconds": None if where.tflops is None else each / (where.tflops * 1e12)}


def show(found: dict[str, Any]) -> None:
    """Print a plan as tables."""
    mesh = ",".join(f"{axis}={size}" for axis, size in found["mesh"].items()) or "one device"
    place = f"{found['topology']} ({found['chips']} chips{', ' + found['accelerator'] if found['accelerator'] else ''}), {mesh}"
    print(f"{found['model']}: {found['saes']} SAEs of {found['num_features']:,} features, {found['k']} active, on {place}\n")
    show_memory(found, _PARTS)
    show_collectives(found["collectives"])
    flops, seconds = found["flops"], found["compile_seconds"]
    print("\nFLOPs a step by formula (XLA counts a loop's body once):", end=" ")
    print(f"model {flops['model']:.3g}, SAEs {flops['saes']:.3g}; a device {flops['device']:.3g}")
    if flops["peak_seconds"] is not None:
        print(f"at the peak rate of bfloat16 that is {1000 * flops['peak_seconds']:.1f} ms; float32 products take several times as long")
    print(f"compiled in {seconds['model']:.1f} s (model) and {seconds['sae']:.1f} s (SAEs)")


def show_memory(found: dict[str, Any], parts: dict[str, str]) -> None:
    """What a device holds, part by part, and of how much."""
    from qscope_jax.report.terminal import print_table

    print_table(("held by a device", "GiB"), [(said, found["gib"][part]) for part, said in parts.items()])
    if found["memory_gib"] is not None:
        print(f"\na device has {found['memory_gib']:g} GiB: {found['gib']['together'] / found['memory_gib']:.0%} of it")
    print()


def show_collectives(collectives: dict[str, Any]) -> None:
    """What each program sends."""
    from qscope_jax.report.terminal import print_table

    rows = [
        (program, kind["kind"], kind["count"], kind["bytes"] / _GIB, "at least" if kind["unknown_loops"] else "")
        for program, kinds in collectives.items()
        for kind in kinds
    ]
    if not rows:
        print("no collectives: every device works by itself")
        return
    print_table(("program", "collective", "times", "GiB", ""), rows)
    if any(row[-1] for row in rows):
        print("at least: some of them are in a loop whose number of turns the program does not show; one turn is counted")


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
