"""`qscope synthesize`: write texts for features that a data set misses; mix them with real data; score answers for safety."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qscope_jax.cli.coverage_sources import CoverageOptions, CoverageSources
from qscope_jax.cli.endpoints import EndpointOptions, is_address, open_endpoint
from qscope_jax.cli.options import Numbers, Texts, check_at_least, same_named
from qscope_jax.cli.progress import count_progress
from qscope_jax.cli.results import check_writable, write_result
from qscope_jax.errors import ConfigError, InputError

if TYPE_CHECKING:
    from qscope_jax.data.tables import Table
    from qscope_jax.features.generation.generators import Generator
    from qscope_jax.features.synthesis.synthesis import Synthesis, SynthesisConfig
    from qscope_jax.features.synthesis.synthesis_baselines import Baseline, BudgetRow
    from qscope_jax.features.synthesis.targets import Target
    from qscope_jax.features.synthesis.writers import Writer

STEER, MODEL = "steer", "model"
_SETTINGS_FILE, _LOG_FILE, _RANDOM_FILE = "settings.json", "candidates.jsonl", "random.jsonl"
_REPLIES_FILE, _JUDGE_FILE, _KEPT_FILE = "replies.jsonl", "judge.jsonl", "kept.jsonl"
_RESULT_FILE, _PAGE_FILE = "result.json", "report.html"
# What may change between a run and the one that goes on with it.
_FREE = ("out", "concurrency", "retries", "timeout", "key_variable", "mesh", "batch_size")


@dataclass(frozen=True, kw_only=True)
class RunConfig(EndpointOptions, CoverageOptions):
    """Write texts for features that data misses, keep those that fire.

    The same command goes on where it stopped.
    """

    out: str
    """Folder for the texts, the record of all candidates, the numbers and a page."""
    writer: str = STEER
    """Who writes: `steer` (the model, steered), `model` (the model by its chat template), or an endpoint's address."""
    writer_model: str = ""
    """Name of the model at the writer's endpoint; it also rewrites and answers."""
    judge: str = ""
    """Address of the endpoint that judges whether a rewrite means the same; by default the writer's."""
    judge_model: str = ""
    """Name of the judge's model there."""
    judge_tokens: int = 64
    """Tokens of the judge's answer; one that thinks aloud needs some thousands."""
    all_targets: bool = False
    """Write for every target, not only for those that the data misses."""
    weak: int = 1
    """Also write for targets that fewer than so many texts of the data fire."""
    per_target: int = 1
    """Texts kept for each target, rewrites apart."""
    attempts: int = 24
    """Texts written for a target at most, rewrites apart."""
    attempts_uncovered: int | None = None
    """The same for a target that no kept text fires, be it written for another; by default no more than for any."""
    budget: int | None = None
    """Texts written in all at most."""
    styles: Texts | None = None
    """Attack styles by which kept texts are rewritten, such as roleplay fiction authority."""
    same_meaning: bool = False
    """Keep a rewrite only where a judge says that meaning and risk are the same."""
    respond: bool = False
    """Also answer kept texts: refuse and redirect where the target is harmful, help where it is not."""
    harmful: bool = False
    """Whether targets whose table does not say so are harmful."""
    contexts: int = 8
    """Contexts of the pool that a writer sees of each target; 0 for none."""
    doses: Numbers = (1.0, 0.5, 0.25, 1.5)
    """With steer: strengths tried in turn, in residual norms."""
    prompts: Texts | None = None
    """With steer: neutral prompts to continue; by default the first two words of some of the data's texts."""
    max_new_tokens: int = 32
    """Tokens of a text; of rewrites and answers eight times as many."""
    temperature: float = 1.0
    """Of all draws."""
    batch_size: int = 64
    """Texts that the local model writes at a time."""
    baselines: bool = True
    """Also measure random synthesis and natural sampling at equal budget."""
    seed: int = 0
    """Seed of all draws."""


@dataclass(frozen=True, kw_only=True)
class MixConfig:
    """Mix real rows with synthetic ones at a ratio."""

    real: str
    """File or hub dataset of real rows."""
    synthetic: str
    """File of synthetic rows, such as a run's kept.jsonl."""
    out: str
    """JSON-lines file for the mixture; each row says its origin."""
    share: float = 0.5
    """Share of synthetic rows."""
    size: int | None = None
    """Rows of the mixture; by default the most that there can be without repeats."""
    split: str = "train"
    """Split of a hub dataset."""
    repeat: bool = False
    """Use rows again where one kind is short."""
    seed: int = 0
    """Seed of the choice and the order."""


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Score answers: attack success, refusals, and their accuracy."""

    answers: str
    """File of answers, a row each."""
    column: str = "response"
    """Column that holds the answer."""
    harmful_column: str = "harmful"
    """Column that says whether the prompt was harmful: true or false."""
    refused_column: str = ""
    """Column that says whether the answer refuses, as a judge found; by default told by phrases at its beginning."""
    confidence: float = 0.95
    """Of the intervals."""
    out: str = ""
    """JSON file for the scores."""


def run(config: RunConfig) -> dict[str, Any]:
    """Synthesise; returns the coverage before and after, beside the baselines."""
    from qscope_jax.features.synthesis.synthesis import SynthesisConfig
    from qscope_jax.features.synthesis.synthesis_baselines import compare_at_budget
    from qscope_jax.report.coverage_page import write_synthesis_page

    _check(config)
    shared = {**same_named(SynthesisConfig, config), "styles": config.styles or (), "max_tokens": 8 * config.max_new_tokens}
    settings = SynthesisConfig(**shared)
    folder = Path(config.out).expanduser()
    sources = CoverageSources(config)
    _check_settings(folder, config)
    before = sources.coverage(sources.targets)
    targets = list(before.targets) if config.all_targets else before.missing + before.weak(config.weak)
    if not targets:
        print(f"{config.data} covers all of its {len(before.targets)} targets; nothing is to be made.")
        return {"before": before.share, "targets": 0}
    if config.harmful:  # the writer is told too
        targets = [replace(target, harmful=True) if target.harmful is None else target for target in targets]
    assistant = _assistant(config, sources, folder)
    writer = _writer(config, sources, targets, assistant)
    found = _synthesize(config, settings, sources, targets, writer, assistant, folder)
    baselines = _baselines(config, sources, targets, writer, found, folder) if config.baselines and found.written else []
    rows = compare_at_budget(found, baselines)
    _write(folder, found)
    _show(found, rows)
    write_synthesis_page(folder / _PAGE_FILE, before, found, baselines, weak=max(config.weak, 2), subtitle=f"{writer.name}; data: {config.data}")
    result = {
        "before": before.share,
        "targets": len(targets),
        "written": found.written,
        "kept": len(found.kept),
        "coverage": found.coverage,
        "missed": [target.key for target in found.missed],
        "failures": list(found.failures),
        "budgets": [row._asdict() for row in rows],
    }
    write_result(str(folder / _RESULT_FILE), "synthesize run", config, result)
    print(f"Texts: {folder / _KEPT_FILE}   page: {folder / _PAGE_FILE}   numbers: {folder / _RESULT_FILE}")
    return result


def run_mix(config: MixConfig) -> dict[str, Any]:
    """Mix; returns the counts."""
    import json

    from qscope_jax.data.files import atomic_path, plain
    from qscope_jax.data.mixing import mix
    from qscope_jax.data.tables import load_table

    check_writable(config.out)
    real, synthetic = load_table(config.real, split=config.split), load_table(config.synthetic)
    found = mix(real.rows, synthetic.rows, synthetic_share=config.share, size=config.size, seed=config.seed, repeat=config.repeat)
    with atomic_path(Path(config.out).expanduser()) as temporary:
        temporary.write_text("".join(json.dumps(plain(row), ensure_ascii=False, default=str) + "\n" for row in found.rows), encoding="utf-8")
    print(f"{config.out}: {found.real} real and {found.synthetic} synthetic rows, {found.repeats} of them repeats")
    return {"real": found.real, "synthetic": found.synthetic, "repeats": found.repeats}


def run_score(config: ScoreConfig) -> dict[str, Any]:
    """Score; returns the rates and the accuracy with their intervals."""
    from qscope_jax.data.tables import load_table
    from qscope_jax.features.synthesis.safety_scores import phrase_refusal, safety_scores
    from qscope_jax.report.terminal import print_table

    check_writable(config.out)
    table = load_table(config.answers)
    harmful = _flags(table, config.harmful_column)
    answers = table.texts(config.column)
    refused = _flags(table, config.refused_column) if config.refused_column else [phrase_refusal(answer) for answer in answers]
    # The detector sees one answer at a time; what was found before goes by the answer's place.
    marks = ["refuses" if mark else "answers" for mark in refused]
    split = [[mark for mark, kind in zip(marks, harmful, strict=True) if kind is wanted] for wanted in (True, False)]
    found = safety_scores(*split, refuses=lambda mark: mark == "refuses", confidence=config.confidence)
    rows = [
        ("attack success (harmful)", found.attack_success.value, found.attack_success.low, found.attack_success.high, found.attack_success.trials),
        ("refusals (benign)", found.refusals.value, found.refusals.low, found.refusals.high, found.refusals.trials),
        ("accuracy", found.accuracy, found.low, found.high, len(answers)),
    ]
    print_table(("score", "value", "low", "high", "answers"), rows, title=f"{config.answers}, {config.confidence:.0%} intervals")
    result = {**asdict(found), "accuracy": found.accuracy, "detector": config.refused_column or "phrases"}
    write_result(config.out, "synthesize score", config, result)
    return result


ACTIONS = {"run": (RunConfig, run), "mix": (MixConfig, run_mix), "score": (ScoreConfig, run_score)}


def _check(config: RunConfig) -> None:
    check_at_least(config, 1, "weak", "max_new_tokens", "batch_size")
    check_at_least(config, 0, "contexts")
    if config.writer not in (STEER, MODEL) and not is_address(config.writer):
        raise ConfigError(f"writer is {config.writer!r}, expected {STEER}, {MODEL} or an endpoint's address")
    check_writable(config.out, folder=True)


def _check_settings(folder: Path, config: RunConfig) -> None:
    """Let a folder be gone on with by the same settings only; one in which nothing is finished yet takes any.

    Raises:
        ConfigError: it holds a run of other settings.
    """
    from qscope_jax.data.files import plain, read_json, write_json

    settings = plain({name: value for name, value in asdict(config).items() if name not in _FREE})
    path = folder / _SETTINGS_FILE
    if not path.exists() or not any((folder / name).exists() for name in (_LOG_FILE, _RANDOM_FILE)):
        write_json(path, settings)
        return
    old = read_json(path)
    if changed := [name for name in settings if old.get(name) != settings[name]]:
        name = changed[0]
        raise ConfigError(f"{folder}: holds a run whose {name} is {old.get(name)!r}, now {settings[name]!r}; choose another folder, or remove it")


def _assistant(config: RunConfig, sources: CoverageSources, folder: Path) -> "Generator | None":
    """Who follows instructions: the endpoint, or the model where it has a chat template."""
    if is_address(config.writer):
        return open_endpoint(config.writer, config.writer_model, config, flag="--writer-model", cache=str(folder / _REPLIES_FILE))
    if config.writer == MODEL or config.styles or config.respond:
        from qscope_jax.features.generation.local_generator import LocalGenerator

        # Texts have few tokens; thoughts would take them all. Templates that know of none ignore the setting.
        settings = {"enable_thinking": False}
        return LocalGenerator(sources.model, chat=True, chat_settings=settings, batch_size=config.batch_size, top_p=0.95)
    return None


def _synthesize(
    config: RunConfig,
    settings: "SynthesisConfig",
    sources: CoverageSources,
    targets: "list[Target]",
    writer: "Writer",
    assistant: "Generator | None",
    folder: Path,
) -> "Synthesis":
    from qscope_jax.data.record_log import RecordLog
    from qscope_jax.features.synthesis.synthesis import synthesize

    judge = assistant
    if config.judge:
        judge = open_endpoint(config.judge, config.judge_model, config, flag="--judge-model", cache=str(folder / _JUDGE_FILE))
    log = RecordLog(folder / _LOG_FILE, "id", "candidate of a synthesis")
    with count_progress("targets") as told:
        return synthesize(targets, writer, sources.read, settings, log=log, assistant=assistant, judge=judge, progress=told)


def _writer(config: RunConfig, sources: CoverageSources, targets: "list[Target]", assistant: "Generator | None") -> "Writer":
    from qscope_jax.features.synthesis.coverage import strongest_contexts

    contexts = strongest_contexts(targets, sources.pool_texts, sources.pool, count=config.contexts) if config.contexts and config.pool else {}
    if config.writer != STEER:
        from qscope_jax.features.synthesis.writers import InstructedWriter

        assert assistant is not None
        return InstructedWriter(assistant, contexts, max_tokens=config.max_new_tokens, temperature=config.temperature)
    from qscope_jax.features.steering import residual_norms
    from qscope_jax.features.synthesis.steered_writer import SteeredWriter

    natural = sources.data_texts
    prompts = list(config.prompts) if config.prompts else [" ".join(text.split()[:2])[:40] for text in natural[:: max(len(natural) // 32, 1)]]
    return SteeredWriter(
        sources.model,
        {layer: sources.saes[layer] for layer in sources.layers},
        residual_norms(sources.model, natural[:32], sources.layers),
        prompts,
        contexts,
        doses=config.doses,
        max_tokens=config.max_new_tokens,
        temperature=config.temperature,
        batch_size=config.batch_size,
    )


def _baselines(
    config: RunConfig, sources: CoverageSources, targets: "list[Target]", writer: "Writer", found: "Synthesis", folder: Path
) -> "list[Baseline]":
    from qscope_jax.data.record_log import RecordLog
    from qscope_jax.features.synthesis.synthesis_baselines import natural_sampling, random_synthesis

    log = RecordLog(folder / _RANDOM_FILE, "id", "text of a random synthesis")
    with count_progress("random texts") as told:
        drawn = random_synthesis(targets, writer, sources.read, found.written, seed=config.seed, threshold=config.threshold, log=log, progress=told)
    if not config.pool:
        return [drawn]
    return [drawn, natural_sampling(targets, sources.pool_texts, sources.pool, threshold=config.threshold)]


def _write(folder: Path, found: "Synthesis") -> None:
    import json

    from qscope_jax.data.files import atomic_path

    lines = [json.dumps(asdict(candidate), ensure_ascii=False) + "\n" for candidate in found.kept]
    with atomic_path(folder / _KEPT_FILE) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")


def _show(found: "Synthesis", rows: "list[BudgetRow]") -> None:
    from qscope_jax.report.terminal import print_table

    print_table(("method", "texts written", "texts kept", "coverage"), rows, title=f"Coverage of {len(found.targets)} targets")
    if found.resumed:
        print(f"{found.resumed} texts were finished by an earlier run.")
    if found.failures:
        print(f"{len(found.failures)} requests failed, the first: {found.failures[0]}")
    print()


def _flags(table: "Table", column: str) -> list[bool]:
    """A column of booleans, which other formats than JSON write out."""
    spoken = {"true": True, "false": False, "1": True, "0": False}
    values = table.classes(column)
    for value, place in zip(values, table.places, strict=True):
        if value.lower() not in spoken:
            raise InputError(f"{table.name} {place}: column {column} holds {value!r}, expected true or false")
    return [spoken[value.lower()] for value in values]
