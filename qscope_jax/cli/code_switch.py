"""`qscope code-switch`: how often answers switch to a language nobody asked for, what features do before, and what taking them away does."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qscope_jax.cli import choices, switch_effects
from qscope_jax.cli.options import Texts, check_at_least
from qscope_jax.cli.progress import count_progress
from qscope_jax.cli.results import check_writable, write_result
from qscope_jax.cli.sources import TINY, ModelOptions, SamplingOptions, open_model, sampling_config, with_stops
from qscope_jax.errors import ConfigError

if TYPE_CHECKING:
    from qscope_jax.data.chat_templates import ChatFormat
    from qscope_jax.features.switching.code_switching import RatioChange, Response, SwitchRatio
    from qscope_jax.features.switching.switch_prompts import SwitchPrompt
    from qscope_jax.models.language_model import LanguageModel
    from qscope_jax.models.sampling import SamplingConfig
    from qscope_jax.report.switching_page import SwitchExample


@dataclass(frozen=True, kw_only=True)
class Config(SamplingOptions, ModelOptions):
    """Answer prompts several times and count answers that switch to another language."""

    prompts: str = TINY
    """Prompts with language and, if known, task: a .jsonl, .parquet or .csv file, a hub dataset, or `tiny` for held-out sentences of the corpus."""
    language: str = "zh"
    """The language that nobody asks for, by its code."""
    script: str = ""
    """Script that tells it, such as Han, where the code does not say."""
    models: Texts | None = None
    """Compare these models instead, all with the same prompts; the first is what the others are measured against."""
    samples: int = 8
    """Answers to each prompt."""
    max_new_tokens: int = 0
    """Tokens of an answer at most; 0 is 2,048, or half of the model's positions where that is less."""
    temperature: float = 1.0
    """Logits are divided by it; 0 takes the most probable token."""
    top_p: float = 0.8
    """Draw from the most probable tokens that together reach this probability."""
    column: str = "prompt"
    """Column of the prompt, where there is no column `messages` with its turns."""
    language_column: str = "language"
    """Column of the prompt's language."""
    task_column: str = "task"
    """Column of its task."""
    languages: Texts | None = None
    """Keep prompts of these languages."""
    split: str = "train"
    """Split of a hub dataset."""
    limit: int | None = None
    """At most so many prompts of each language, drawn at random."""
    chat: bool = True
    """Write prompts by the chat template, where there is one; otherwise they are continued as they stand."""
    template: str = ""
    """Chat template: chatml, gemma, llama3, plain, or a Jinja file; by default that of the run of `qscope sft train` whose model it is, or else the
    tokenizer's own."""
    response_marker: str = ""
    """Text after which an answer begins, where the template should not be asked."""
    batch_size: int = 32
    """Answers written at a time."""
    responses: str = ""
    """JSON-lines file of all answers, for trace and ablate; those that it has already are not sampled again."""
    examples: int = 5
    """Switched answers of each model that are shown."""
    page: str = ""
    """HTML file for tables, figures and examples."""
    out: str = ""
    """JSON file for the numbers and examples."""


def run(config: Config) -> dict[str, Any]:
    """Sample and count; returns the ratios of each model, and what they are beside the first model's."""
    from qscope_jax.features.switching.code_switching import SAMPLING, compare_ratios, switch_ratios
    from qscope_jax.features.switching.switch_prompts import check_prompts

    names = _models(config)
    script = switch_effects.script_of(config.language, config.script)
    sampling = sampling_config(replace(config, max_new_tokens=config.max_new_tokens or SAMPLING.max_new_tokens))
    for path in (config.out, config.page, config.responses):
        check_writable(path)
    prompts = _prompts(config)
    quoting = check_prompts(prompts, script)
    if quoting:
        print(f"{quoting} of {len(prompts)} prompts contain {script} themselves; answers may quote them.", file=sys.stderr)
    answers = {name: _answer(name, prompts, sampling, config) for name in names}
    ratios = {name: switch_ratios(found, script, seed=config.seed) for name, found in answers.items()}
    changes = {name: compare_ratios(answers[names[0]], answers[name], script, seed=config.seed) for name in names[1:]}
    examples = {name: _examples(found, prompts, script, config.examples) for name, found in answers.items()}
    _show(ratios, changes, script)
    if config.page:
        from qscope_jax.report.switching_page import write_ratios_page

        subtitle = f"{', '.join(names)}; {config.samples} answers to each of {len(prompts):,} prompts, {config.prompts}"
        write_ratios_page(config.page, ratios, script=script, changes=changes, examples=examples, subtitle=subtitle)
        print(f"Page: {config.page}")
    result = {
        "script": script,
        "prompts": len(prompts),
        "prompts_with_script": quoting,
        "models": {
            name: {
                "ratios": [asdict(row) for row in ratios[name]],
                "cut_share": sum(not one.stopped for one in answers[name]) / len(answers[name]),
                "examples": [{**asdict(one.response), "prompt_text": one.prompt} for one in examples[name]],
            }
            for name in names
        },
        "changes": {name: [asdict(row) for row in rows] for name, rows in changes.items()},
    }
    write_result(config.out, "code-switch measure", config, result)
    return result


ACTIONS: dict[str, tuple[type, Any]] = {
    "measure": (Config, run),
    "trace": (switch_effects.TraceConfig, switch_effects.trace),
    "ablate": (switch_effects.AblateConfig, switch_effects.ablate),
    "choices": (choices.Config, choices.run),
}


def _models(config: Config) -> list[str]:
    names = list(config.models or (config.model,))
    if len(set(names)) < len(names):
        raise ConfigError(f"models are {', '.join(names)}; name each of them once")
    check_at_least(config, 1, "samples", "batch_size", "limit")
    check_at_least(config, 0, "examples")
    return names


def _prompts(config: Config) -> "list[SwitchPrompt]":
    from qscope_jax.features.switching.switch_prompts import SwitchPrompt, load_prompts

    if config.prompts == TINY:
        from qscope_jax.demo.corpus import LANGUAGES
        from qscope_jax.demo.switching import questions

        asked = questions(config.language, (config.limit or 80) * (len(LANGUAGES) - 1))
        found = [SwitchPrompt((("user", text),), language) for text, language in asked if config.languages is None or language in config.languages]
        if not found:
            raise ConfigError(f"languages is {','.join(config.languages or ())}; the embedded corpus has {', '.join(LANGUAGES)}")
        return found
    return load_prompts(
        config.prompts, column=config.column, language_column=config.language_column, task_column=config.task_column,
        languages=config.languages, split=config.split, limit=config.limit, seed=config.seed,
    )  # fmt: skip


def _answer(name: str, prompts: "list[SwitchPrompt]", sampling: "SamplingConfig", config: Config) -> "list[Response]":
    """One model's answers; it is let go before the next is loaded."""
    from qscope_jax.features.switching.code_switching import sample_responses
    from qscope_jax.features.switching.response_log import open_log
    from qscope_jax.features.switching.switch_prompts import prompt_renderer, uses_chat

    model = open_model(name, config.dtype, config.mesh)
    format = _format(name, config)
    chat = config.chat and uses_chat(model.tokenizer, format)
    if not config.max_new_tokens:
        sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, model.config.max_positions // 2))
    sampling = with_stops(sampling, config.stop, model)
    if chat:
        sampling = _until_turn_end(sampling, model, format)
    log = open_log(config.responses) if config.responses else None
    render = prompt_renderer(model.tokenizer, chat=chat, format=format)
    settings: dict[str, Any] = dict(samples=config.samples, render=render, batch_size=config.batch_size, log=log)
    with count_progress(f"answers of {name}") as told:
        return sample_responses(model, prompts, sampling, progress=told, **settings)


def _format(name: str, config: Config) -> "ChatFormat":
    """How prompts are written: as asked for, or as in the run that a model is of."""
    import yaml

    from qscope_jax.data.chat_templates import ChatFormat

    saved = Path(name).expanduser().parent / "config.yaml"
    if config.template or config.response_marker or not saved.is_file():
        return ChatFormat(config.template, config.response_marker)
    try:
        run = yaml.safe_load(saved.read_text(encoding="utf-8"))
        template, marker, end = (str(run[key]) for key in ("template", "response_marker", "turn_end"))
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):  # of something else
        return ChatFormat()
    # The embedded model has no template of its own, and is trained with this one.
    return ChatFormat(template or ("plain" if run.get("model") == TINY else ""), marker, end)


def _until_turn_end(sampling: "SamplingConfig", model: "LanguageModel", format: "ChatFormat") -> "SamplingConfig":
    """Stop where the template ends an answer, too: a base model that was fine-tuned may know no such token as its own end."""
    from qscope_jax.data.chat_tokens import turn_end_ids

    ends = turn_end_ids(model.tokenizer, format)
    stops = model.config.eos_token_ids if sampling.stop_token_ids is None else sampling.stop_token_ids
    return replace(sampling, stop_token_ids=tuple(dict.fromkeys((*stops, *ends)))) if len(ends) == 1 else sampling


def _examples(responses: "Sequence[Response]", prompts: "Sequence[SwitchPrompt]", script: str, count: int) -> "list[SwitchExample]":
    """The first switched answers, of as many different prompts as there are."""
    from qscope_jax.features.switching.code_switching import is_switched
    from qscope_jax.report.switching_page import SwitchExample

    switched = sorted((one for one in responses if is_switched(one.text, script)), key=lambda one: one.sample)
    first = {one.prompt: one for one in reversed(switched)}
    chosen = [*first.values(), *(one for one in switched if one is not first[one.prompt])][:count]
    return [SwitchExample(one, prompts[one.prompt].messages[-1][1]) for one in chosen]


def _show(ratios: "Mapping[str, Sequence[SwitchRatio]]", changes: "Mapping[str, Sequence[RatioChange]]", script: str) -> None:
    from qscope_jax.report.number_format import format_change, format_points
    from qscope_jax.report.terminal import print_table

    for name, rows in ratios.items():
        cells = [
            (row.name or row.group, row.prompts, row.responses, row.switched, f"{100 * row.ratio:.2f}", f"{100 * row.low:.2f}-{100 * row.high:.2f}")
            for row in rows
        ]
        print_table(("answers", "prompts", "number", "switched", "%", "95 %"), cells, title=f"{name}: answers with {script}")
        print()
    for name, rows in changes.items():
        cells = [(row.name or row.group, f"{100 * row.change:+.2f}", format_points(row.low, row.high), format_change(row.relative)) for row in rows]
        print_table(("answers", "points", "95 %", "relative"), cells, title=f"{name} beside {next(iter(ratios))}")
        print()
