"""`qscope code-switch trace` and `ablate`: what features do before a switch of language, and what taking them away does."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from qscope_jax.cli.options import Integers, Numbers, check_at_least, positional
from qscope_jax.cli.progress import count_progress
from qscope_jax.cli.results import check_writable, write_result
from qscope_jax.cli.sources import TINY, SAEOptions, open_model, open_sae
from qscope_jax.errors import ConfigError

if TYPE_CHECKING:
    from qscope_jax.features.switching.language_features import LanguageFeatures
    from qscope_jax.features.switching.response_log import LoggedResponses
    from qscope_jax.features.switching.switch_ablation import DoseCurves
    from qscope_jax.features.switching.switch_points import SwitchPoint
    from qscope_jax.features.switching.switch_traces import Encoder, Trace
    from qscope_jax.models.language_model import LanguageModel


@dataclass(frozen=True, kw_only=True)
class EffectOptions(SAEOptions):
    """Which answers and which features."""

    sae: str = ""
    """Folder, file or hub id of the SAEs, or `tiny`; by default those that --features were found in, or `tiny`."""
    file: str = positional()
    """Answers, as `qscope code-switch measure --responses` wrote them."""
    language: str = ""
    """The language that nobody asked for, by its code; by default that of --features, or zh."""
    script: str = ""
    """Script that tells it, such as Han, where the code does not say."""
    features: str = ""
    """Folder of the language's features, from `qscope sft features`."""
    layer: int | None = None
    """Layer of --feature; with --features one of its layers."""
    feature: Integers = ()
    """Features of that layer's SAE, in the place of --features."""
    limit: int | None = None
    """Look at so many switched answers at most, drawn at random."""
    batch_size: int = 8
    """Answers read at a time."""
    seed: int = 0
    """Of all draws."""
    page: str = ""
    """HTML file for figures and tables."""
    out: str = ""
    """JSON file for the numbers."""


@dataclass(frozen=True, kw_only=True)
class TraceConfig(EffectOptions):
    """Follow features over the tokens around a switch, beside answers without one."""

    window: int = 16
    """Tokens on either side."""
    matches: int = 4
    """Answers without a switch for each with one, of the same prompt first, then of the same language."""


@dataclass(frozen=True, kw_only=True)
class AblateConfig(EffectOptions):
    """Take features' directions away right before a switch, and see how often it still comes."""

    doses: Numbers = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0)
    """Values of lambda; a negative one adds the direction."""
    unit: Literal["raw", "residual"] = "raw"
    """What a lambda of 1 takes away: the direction as stored, or one as long as the median state."""
    control: Integers = ()
    """Features of a control language, such as English, in the same layer."""
    control_features: str = ""
    """Folder of a control language's features, in the place of --control."""
    random: int = 5
    """Random features beside them."""
    draws: int = 0
    """Continue each answer so many times at each dose, besides reading the probability of a switch."""
    draw_tokens: int = 16
    """Tokens of such a continuation."""


def trace(config: TraceConfig) -> dict[str, Any]:
    """Trace; returns the curves of each layer and feature."""
    from qscope_jax.features.switching.switch_points import matched_points
    from qscope_jax.features.switching.switch_traces import switch_traces

    _check(config)
    check_at_least(config, 1, "window", "matches")
    found = _language_features(config.features, config)
    script = script_of(_language(config, found), config.script)
    model = open_model(config.model, config.dtype, config.mesh)
    logged, points = _switches(model, script, config)
    encoders, features = _encoders(model, found, config)
    baseline = matched_points(model, points, logged.prompts, logged.responses, script, matches=config.matches, seed=config.seed)
    with count_progress("answers") as told:
        traces = switch_traces(model, points, baseline, encoders, window=config.window, batch_size=config.batch_size, progress=told)
    names = {layer: [f"feature {feature}" for feature in own] for layer, own in features.items()}
    _show_traces(traces, names)
    if config.page:
        from qscope_jax.report.switching_page import write_traces_page

        write_traces_page(config.page, traces, names, subtitle=f"{logged.model}, {len(points)} switches to {script}, {config.file}")
        print(f"Page: {config.page}")
    layers = {str(layer): {"features": features[layer], **_plain(one)} for layer, one in traces.items()}
    result = {"script": script, "switches": len(points), "baseline": len(baseline), "layers": layers}
    write_result(config.out, "code-switch trace", config, result)
    return result


def ablate(config: AblateConfig) -> dict[str, Any]:
    """Take directions away; returns the dose curves."""
    from qscope_jax.features.switching.switch_ablation import AblationConfig, ablate_switches
    from qscope_jax.models.sampling import SamplingConfig

    _check(config)
    check_at_least(config, 0, "random", "draws")
    found, control = _language_features(config.features, config), _language_features(config.control_features, config)
    script = script_of(_language(config, found), config.script)
    model = open_model(config.model, config.dtype, config.mesh)
    logged, points = _switches(model, script, config)
    stops = logged.sampling.get("stop_token_ids")
    sampling = SamplingConfig(**{**logged.sampling, "stop_token_ids": None if stops is None else tuple(stops)})
    settings = AblationConfig(config.doses, config.unit, sampling, config.draws, config.draw_tokens, config.batch_size)
    layer, directions, features = _directions(model, found, control, config)
    with count_progress("directions and doses") as told:
        curves = ablate_switches(model, points, layer, directions, script, settings, progress=told)
    _show_doses(curves, script)
    if config.page:
        from qscope_jax.report.switching_page import write_doses_page

        subtitle = f"{logged.model}, {config.file}"
        write_doses_page(config.page, curves, script=script, unit=config.unit, subtitle=subtitle)
        print(f"Page: {config.page}")
    result = {
        "script": script, "switches": len(points), "layer": layer, "features": features, "doses": list(curves.doses),
        "residual_norm": curves.residual_norm,
        "measures": {
            measure: {name: dict(zip(("mean", "error"), curves.curve(measure, name), strict=True)) for name in by_name}
            for measure, by_name in curves.values.items()
        },
    }  # fmt: skip
    write_result(config.out, "code-switch ablate", config, result)
    return result


def script_of(language: str, script: str) -> str:
    """The script that tells a language: the one named, or that of its code.

    Raises:
        InputError: there is none, or an unknown one is named.
    """
    from qscope_jax.features.scripts import find_script
    from qscope_jax.features.switching.code_switching import target_script

    if script:
        find_script("", script)
        return script
    return target_script(language)


def _check(config: EffectOptions) -> None:
    check_at_least(config, 1, "limit", "batch_size")
    if bool(config.features) == bool(config.feature):
        raise ConfigError("give either --features, a folder, or --feature with --layer, and not both")
    if config.feature and config.layer is None:
        raise ConfigError("--feature needs --layer, whose SAE has it")
    for path in (config.out, config.page):
        check_writable(path)


def _language_features(folder: str, config: EffectOptions) -> "LanguageFeatures | None":
    """Language features, of the layer asked for alone where there is one."""
    if not folder:
        return None
    from qscope_jax.features.switching.language_features import LanguageFeatures

    found = LanguageFeatures.load(folder)
    return found if config.layer is None else found.select([config.layer])


def _language(config: EffectOptions, found: "LanguageFeatures | None") -> str:
    return config.language or (found.language if found else "zh")


def _switches(model: "LanguageModel", script: str, config: EffectOptions) -> "tuple[LoggedResponses, list[SwitchPoint]]":
    """The model's answers, and where they switch: all of those places, or some."""
    import numpy as np

    from qscope_jax.features.switching.response_log import read_responses
    from qscope_jax.features.switching.switch_points import switch_points

    logged = read_responses(config.file, model.name)
    points = switch_points(model, logged.prompts, logged.responses, script)
    if config.limit is not None and config.limit < len(points):
        points = [points[index] for index in sorted(np.random.default_rng(config.seed).choice(len(points), config.limit, replace=False).tolist())]
    return logged, points


def _encoders(model: "LanguageModel", found: "LanguageFeatures | None", config: EffectOptions) -> "tuple[dict[int, Encoder], dict[int, list[int]]]":
    """What reads the features of each layer, and which they are."""
    from qscope_jax.sae.encoder_rows import encoder_rows

    if found is not None:
        # The answers may be those of the model after training.
        found.check_model(model, any_name=True)
        return dict(zip(found.layers, found.rows, strict=True)), dict(zip(found.layers, found.features_MS.tolist(), strict=True))
    assert config.layer is not None
    return {config.layer: encoder_rows(open_sae(config.sae or TINY, config.layer, model), config.feature)}, {config.layer: list(config.feature)}


def _directions(
    model: "LanguageModel", found: "LanguageFeatures | None", control: "LanguageFeatures | None", config: AblateConfig
) -> tuple[int, dict[str, Any], dict[str, list[int]]]:
    """The layer, and by name the directions to take away and the features that they are of; of language features the last layer's."""
    import numpy as np

    from qscope_jax.features.steering import random_features

    layer = found.layers[-1] if found is not None else config.layer
    assert layer is not None
    # The embedded model's SAEs have no place that another machine would know.
    sae = open_sae(config.sae or (TINY if found is None or config.model == TINY else found.sae), layer, model)
    own = list(config.feature) if found is None else found.features_MS[-1].tolist()
    others = list(config.control) if control is None else control.select([layer]).features_MS[0].tolist()
    prefix = f"{found.language} feature" if found is not None else "feature"
    features = {f"{prefix} {feature}": [feature] for feature in own}
    prefix = f"{control.language} feature" if control is not None else "control feature"
    features |= {f"{prefix} {feature}": [feature] for feature in others}
    if config.random:
        drawn = random_features(sae, config.random, seed=config.seed, exclude=[*own, *others])
        features[f"{config.random} random features"] = drawn
    directions = {name: np.stack([np.asarray(sae.direction(feature)) for feature in chosen]) for name, chosen in features.items()}
    return layer, directions, features


def _plain(one: "Trace") -> dict[str, Any]:
    curves = {kind: {name: getattr(getattr(one, kind), name) for name in ("mean_OS", "error_OS", "counts_O")} for kind in ("switched", "baseline")}
    return {"offsets": one.offsets_O, **curves}


def _show_traces(traces: "Mapping[int, Trace]", names: Mapping[int, Sequence[str]]) -> None:
    from qscope_jax.report.terminal import print_table

    for layer, found in traces.items():
        middle = len(found.offsets_O) // 2
        shown = [index for index in range(max(middle - 4, 0), middle + 3) if found.switched.counts_O[index]]
        rows = [
            (f"{found.offsets_O[index]:+d}", int(found.switched.counts_O[index]),
             *(float(curve.mean_OS[index, place]) for place in range(len(names[layer])) for curve in (found.switched, found.baseline)))
            for index in shown
        ]  # fmt: skip
        columns = [f"{name}, {kind}" for name in names[layer] for kind in ("switched", "not")]
        print_table(("offset", "answers", *columns), rows, title=f"Layer {layer}: mean pre-activation around a switch")
        print()


def _show_doses(curves: "DoseCurves", script: str) -> None:
    from qscope_jax.features.switching.switch_ablation import MEASURES
    from qscope_jax.report.terminal import print_table

    for measure, by_name in curves.values.items():
        means = {name: curves.curve(measure, name)[0] for name in by_name}
        rows = [(f"{dose:g}", *(float(mean[index]) for mean in means.values())) for index, dose in enumerate(curves.doses)]
        print_table(("lambda", *means), rows, title=f"{MEASURES[measure]}, {len(curves.prompts_N)} switches to {script}")
        print()
