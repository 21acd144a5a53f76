"""`qscope steer`: continue prompts with features added, clamped or removed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from qscope_jax.cli.options import Integers, Numbers, Texts, check_at_least, positional
from qscope_jax.cli.results import check_writable, write_result
from qscope_jax.cli.sources import SAEOptions, SamplingOptions, check_texts, open_model, open_sae, read_documents, sampling_config, with_stops
from qscope_jax.errors import ConfigError

if TYPE_CHECKING:
    from qscope_jax.models.edits import Edit
    from qscope_jax.models.language_model import Completion, LanguageModel
    from qscope_jax.models.sampling import SamplingConfig
    from qscope_jax.sae.layer_sae import LayerSAE


@dataclass(frozen=True, kw_only=True)
class Config(SamplingOptions, SAEOptions):
    """Continue prompts with features added, clamped or removed, beside the original continuation."""

    prompts: Texts = positional(())
    """Text to continue."""
    layer: int
    """Layer after which the edit acts, 0-based."""
    feature: Integers
    """Feature, or several that act together: 77 or 77,105."""
    strength: Numbers = (1.0,)
    """Strength, or several for a dose sweep: coefficient (add), activation (clamp) or share (project-out)."""
    unit: Literal["raw", "residual"] = "raw"
    """What a strength of 1 adds: the direction as stored, or one as long as the layer's median residual."""
    norm_file: str = ""
    """Texts to measure that median on; by default the prompts."""
    mode: Literal["add", "clamp", "ablate", "project-out"] = "add"
    """Add directions, set activations, set them to 0, or remove the stream's part along the direction."""
    positions: str = "all"
    """Where it acts: all, 5, -1, 3-7 or 0,3-7; negative positions count from the prompt's end."""
    phase: Literal["prefill", "decode", "both"] = "both"
    """When it acts: while the prompt is read, while tokens are generated, or both."""
    controls: int = 0
    """Also add so many random features, and the features with the opposite sign, at the same strengths."""
    out: str = ""
    """JSON file for the completions and the share of each script in them."""


def run(config: Config) -> dict[str, Any]:
    """Steer; returns original and steered completions with the script shares of each edit."""
    from qscope_jax.models.edits import where

    prompts = check_texts(config.prompts, "prompt")
    _check(config)
    check_writable(config.out)
    sampling = sampling_config(config)
    where(config.positions, config.phase)
    norm_texts = read_documents(config.norm_file) if config.norm_file else prompts
    model = open_model(config.model, config.dtype, config.mesh)
    sae = open_sae(config.sae, config.layer, model)
    sampling = with_stops(sampling, config.stop, model)
    if config.mode == "add":
        runs, norm = _add(model, sae, prompts, norm_texts, sampling, config)
    else:
        runs, norm = _edit(model, sae, prompts, sampling, config), None
    result = {"residual_norm": norm, "runs": [_result(*one) for one in runs]}
    _show(prompts, result["runs"])
    write_result(config.out, "steer", config, result)
    return result


Run = tuple[str, Integers, float, "list[Completion]"]
"""Kind of edit, features, strength and completions."""


def _check(config: Config) -> None:
    if not config.strength or not config.feature:
        raise ConfigError("strength and feature need at least one number each; an empty list was given")
    if not all(map(math.isfinite, config.strength)):
        raise ConfigError(f"strength is {','.join(map(str, config.strength))}, expected finite numbers")
    if config.mode != "add" and (config.unit != "raw" or config.controls):
        raise ConfigError(f"mode {config.mode} has neither units nor controls; use --unit and --controls with mode add")
    if config.mode == "project-out" and len(config.feature) > 1:
        raise ConfigError(f"mode project-out takes one feature, not {len(config.feature)}")
    check_at_least(config, 0, "controls")


def _add(
    model: "LanguageModel", sae: "LayerSAE", prompts: list[str], norm_texts: Sequence[str], sampling: "SamplingConfig", config: Config
) -> tuple[list[Run], float | None]:
    """The original and every dose in one batch, and a batch for each control."""
    from qscope_jax.features.steering import dose_sweep, random_features, residual_norms

    width = len(config.feature)
    drawn = random_features(sae, config.controls * width, seed=config.seed, exclude=config.feature) if config.controls else []
    norm = residual_norms(model, norm_texts, [sae.layer])[sae.layer] if config.unit == "residual" else None
    settings: dict[str, Any] = dict(unit=config.unit, residual_norm=norm, positions=config.positions, phase=config.phase)

    def sweep(kind: str, features: Integers, strengths: Sequence[float]) -> list[Run]:
        doses = dose_sweep(model, prompts, sae, features, list(dict.fromkeys(strengths)), sampling=sampling, **settings)
        return [("original" if dose == 0 else kind, features, dose, rows) for dose, rows in doses.items()]

    runs = sweep("steered", config.feature, (0.0, *config.strength))
    if drawn:
        if opposite := [-dose for dose in config.strength if dose and -dose not in config.strength]:
            runs += sweep("opposite sign", config.feature, opposite)
        for start in range(0, len(drawn), width):
            runs += sweep("random feature", tuple(drawn[start : start + width]), [dose for dose in config.strength if dose])
    return runs, norm


def _edit(model: "LanguageModel", sae: "LayerSAE", prompts: list[str], sampling: "SamplingConfig", config: Config) -> list[Run]:
    """The original, and a batch for each strength of an edit that is no addition."""
    from qscope_jax.features.steering import ablate, clamp, project_out

    place: dict[str, Any] = {"positions": config.positions, "phase": config.phase}

    def edit(strength: float) -> "Edit":
        if config.mode == "clamp":
            return clamp(sae, config.feature, strength, **place)
        return project_out(sae, config.feature[0], share=strength, **place) if config.mode == "project-out" else ablate(sae, config.feature, **place)

    edits = [(strength, edit(strength)) for strength in ((0.0,) if config.mode == "ablate" else dict.fromkeys(config.strength))]
    runs: list[Run] = [("original", config.feature, 0.0, model.generate(prompts, sampling))]
    return runs + [(config.mode, config.feature, strength, model.generate(prompts, sampling, edits=(one,))) for strength, one in edits]


def _result(kind: str, features: Integers, strength: float, completions: "list[Completion]") -> dict[str, Any]:
    from qscope_jax.features.scripts import SCRIPTS, script_share

    texts = [completion.text for completion in completions]
    return {
        "kind": kind,
        "features": [] if kind == "original" else list(features),
        "strength": strength,
        "script_shares": {script: script_share(texts, script) for script in SCRIPTS},
        "completions": [{"prompt": one.prompt, "text": one.text, "token_ids": list(one.token_ids), "stopped": one.stopped} for one in completions],
    }


def _show(prompts: list[str], runs: list[dict[str, Any]]) -> None:
    from qscope_jax.report.terminal import print_table

    for row, prompt in enumerate(prompts):
        rows = [
            (run["kind"], ",".join(map(str, run["features"])) or None, None if run["kind"] == "original" else f"{run['strength']:g}",
             run["completions"][row]["text"])
            for run in runs
        ]  # fmt: skip
        print_table(("edit", "feature", "strength", "continuation"), rows, title=prompt)
        print()
