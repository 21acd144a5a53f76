"""What verbs that train share: options of the run, its folder with the resolved config, and the way from a recipe to the state to export."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from qscope_jax.cli.options import Texts, same_named
from qscope_jax.cli.results import check_writable
from qscope_jax.data.files import atomic_path, plain
from qscope_jax.errors import ConfigError, SourceError


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a run is logged, saved and continued."""

    out: str
    """Folder of the run: config.yaml, metrics.jsonl, checkpoints, page.html and, at the end, what was trained."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 0
    """Steps between evaluations; 0 evaluates at the end only."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 saves at the end only."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept."""
    keep_best: str = ""
    """Held-out metric, such as fvu or loss, whose best checkpoint is kept and exported; of the steps that are both evaluated and saved."""
    keep_best_mode: str = "min"
    """Whether the least (min) or the greatest (max) value is best."""
    resume: bool = False
    """Continue the run in the folder, with the options that it began with."""
    progress: bool = True
    """Show a progress bar with rate and time left."""
    distributed: bool = False
    """Join the run's other processes, each started with the same command: on pods and Slurm JAX finds them, elsewhere set
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID."""
    tensorboard: bool = False
    """Write metrics and rates to tensorboard in the folder too; needs tensorboardX."""
    wandb: str = ""
    """Project of Weights & Biases that metrics and rates go to as well; needs wandb."""


@dataclass(frozen=True, kw_only=True)
class TuningOptions:
    """What fine-tuning verbs train, and how an update is made; names and meaning are those of `training.tuning.TuningConfig`."""

    micro_batches: int = 1
    """Parts in which an update's rows are worked through; changes no gradient."""
    weight_decay: float = 0.1
    """Decay of matrices."""
    beta1: float = 0.9
    """Of Adam's first moment."""
    beta2: float = 0.95
    """Of its second."""
    clip: float = 1.0
    """Largest gradient norm."""
    lora_rank: int = 0
    """Rank of adapters, which are then trained instead of the weights; 0 trains all weights."""
    lora_alpha: float = 32.0
    """Adapters count alpha / rank times."""
    lora_targets: Texts = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Weights that get adapters."""
    master_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of trained parameters and moments; passes compute in --dtype."""
    remat: bool = True
    """Compute layers anew in the backward pass instead of keeping their activations."""
    head_chunk: int = 0
    """Positions of a row whose vocabulary scores are held at a time, a divisor of its length; 0 holds all."""


_MAY_CHANGE = {field.name for field in dataclasses.fields(RunOptions)} | {"mesh"}


@dataclass(frozen=True)
class Finished:
    """The end of a run.

    Attributes:
        state: What is to be exported: the last state, or the best by `keep_best`.
        step: Of which step it is.
        held_out: Its held-out metrics; empty where there were none.
    """

    state: Any
    step: int
    held_out: dict[str, Any]


def check_run(config: Any, *may_change: str) -> Path:
    """The run's folder, after checking that it is new, or that it is to be resumed with the options of then.

    Args:
        config: A verb's options, `RunOptions` among them.
        *may_change: Further options that a resumed run may have otherwise, because they change nothing of what is learnt.

    Raises:
        SourceError: the folder cannot be written, or holds a run and `resume` was not asked for.
        ConfigError: an option is out of range, or differs from the run's.
    """
    from qscope_jax.training.loop import LoopConfig

    out = Path(config.out).expanduser()
    check_writable(config.out, folder=True)
    steps = 1 if config.steps is None else config.steps  # some recipes count their steps from the data
    LoopConfig(**{**same_named(LoopConfig, config), "steps": steps, "run_dir": str(out)})
    saved = out / "config.yaml"
    if not saved.is_file():
        return out
    if not config.resume:
        raise SourceError(f"{config.out}: already holds a run; continue it with --resume, or choose another --out")
    before = yaml.safe_load(saved.read_text(encoding="utf-8"))
    for name, value in plain(dataclasses.asdict(config)).items():
        if name not in _MAY_CHANGE and name not in may_change and before.get(name) != value:
            raise ConfigError(f"{saved}: the run began with {name} {before.get(name)}, not {value}; resume it with --config {saved}")
    return out


def run_to_end(verb: str, recipe: Any, config: Any, steps: int) -> Finished | None:
    """Write the options into the run's folder and train; None where a signal stopped the run before its end, which is said.

    In a run of several processes all call this.

    Raises:
        QscopeError: see `training.loop.train`.
    """
    from qscope_jax.parallel.processes import from_first, is_first
    from qscope_jax.training.loop import LoopConfig, best_state, train

    out = Path(config.out).expanduser()
    loop = LoopConfig(**{**same_named(LoopConfig, config), "steps": steps, "run_dir": str(out)})
    from_first(lambda: _write_config(out / "config.yaml", config))
    state = train(recipe, loop)
    lines = from_first(lambda: [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()])
    if ended := getattr(recipe, "ended", ""):
        steps = lines[-1]["step"]
        if is_first():
            print(f"Ended after step {steps}: {ended}.")
    if not lines or lines[-1]["step"] < steps:
        if is_first():
            print(f"Stopped; continue with: qscope {verb} --config {out / 'config.yaml'} --resume")
        return None
    step = steps
    if config.keep_best:
        state, step, _ = best_state(recipe, loop, state)
    held_out = next((line for line in reversed(lines) if line.get("held_out") and line["step"] == step), {})
    return Finished(state, step, {name: value for name, value in held_out.items() if name not in ("step", "held_out")})


def _write_config(path: Path, config: Any) -> None:
    with atomic_path(path) as temporary:
        text = yaml.safe_dump(plain({**dataclasses.asdict(config), "resume": False}), sort_keys=False, allow_unicode=True)
        temporary.write_text(text, encoding="utf-8")
