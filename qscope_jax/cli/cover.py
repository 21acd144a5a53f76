"""`qscope cover`: which features a data set fires, and which it misses."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qscope_jax.cli.coverage_sources import CoverageOptions, CoverageSources
from qscope_jax.cli.endpoints import EndpointOptions, open_endpoint
from qscope_jax.cli.options import check_at_least
from qscope_jax.cli.results import check_writable, write_result
from qscope_jax.errors import ConfigError

if TYPE_CHECKING:
    from qscope_jax.features.synthesis.coverage import Coverage
    from qscope_jax.features.synthesis.judge import Judgement
    from qscope_jax.features.synthesis.targets import Target

_SHOWN = 12


@dataclass(frozen=True, kw_only=True)
class Config(EndpointOptions, CoverageOptions):
    """Find the features that a data set fires, misses, or covers weakly."""

    weak: int = 5
    """A target is weakly covered when some texts fire it, but fewer than this."""
    missing: str = ""
    """JSON-lines file for the missing targets and the weakly covered ones, for qscope synthesize."""
    judge: str = ""
    """Address of an OpenAI-compatible endpoint that scores the table's explanations which have no score."""
    judge_model: str = ""
    """Name of the judge's model there."""
    judge_tokens: int = 64
    """Tokens of the judge's answer; one that thinks aloud needs some thousands."""
    purpose: str = ""
    """What the data is for, which the judge is told; by default making an assistant safe and helpful."""
    scored: str = ""
    """JSON-lines file for the explanations with the judge's scores."""
    page: str = ""
    """HTML file for tables and figures."""
    out: str = ""
    """JSON file for the coverage and every target's count."""


def run(config: Config) -> dict[str, Any]:
    """Measure the coverage; returns it with every target."""
    check_at_least(config, 1, "weak", "judge_tokens")
    for path in (config.missing, config.scored, config.page, config.out):
        check_writable(path)
    if config.judge and not config.targets:
        raise ConfigError("a judge scores explanations; give a table of them with --targets")
    sources = CoverageSources(config, unjudged=bool(config.judge))
    judgement = _judge(config, sources.listed) if config.judge and sources.listed else None
    if judgement is not None:
        sources.listed = [target for target in judgement.targets if target.score is not None and target.score >= config.tau]
        if not sources.listed:
            raise ConfigError(f"no target scores {config.tau} or more ({len(judgement.failures)} were not judged); lower --tau or ask another judge")
    found = sources.coverage(sources.targets)
    _show(found, config)
    if config.missing:
        _write_missing(found, config)
    if config.page:
        from qscope_jax.report.coverage_page import write_coverage_page

        write_coverage_page(config.page, found, weak=config.weak, subtitle=f"{found.texts:,} texts of {config.data}; targets: {_origin(config)}")
        print(f"Page: {config.page}")
    counts = [
        {"layer": target.layer, "feature": target.feature, "texts": int(count), "strongest": float(best)}
        for target, count, best in zip(found.targets, found.counts, found.strongest, strict=True)
    ]
    result = {
        "coverage": found.share,
        "texts": found.texts,
        "missing": len(found.missing),
        "weak": len(found.weak(config.weak)),
        "layers": {layer: {"covered": covered, "targets": total} for layer, (covered, total) in found.by_layer().items()},
        "judge_failures": {} if judgement is None else judgement.failures,
        "targets": counts,
    }
    write_result(config.out, "cover", config, result)
    return result


def _judge(config: Config, targets: "Sequence[Target]") -> "Judgement":
    """Score what has no score; what is judged is kept where that is asked for."""
    from qscope_jax.features.synthesis.judge import PURPOSE, Judgement, judge_usefulness
    from qscope_jax.features.synthesis.targets import save_targets

    if not 0 <= config.tau <= 1:
        raise ConfigError(f"tau is {config.tau}, expected 0 to 1")
    judge = open_endpoint(config.judge, config.judge_model, config, flag="--judge-model", cache=f"{config.scored}.replies" if config.scored else "")
    unscored = [target for target in targets if target.score is None]
    fresh = judge_usefulness(unscored, judge, purpose=config.purpose or PURPOSE, max_tokens=config.judge_tokens)
    scored = {target.key: target for target in fresh.targets}
    found = Judgement(tuple(scored.get(target.key, target) for target in targets), fresh.failures)
    print(f"Judged {len(scored)} explanations by {judge.name}; {len(found.failures)} failed")
    for key, reason in list(found.failures.items())[:3]:
        print(f"  {key}: {reason}")
    if config.scored:
        save_targets(config.scored, found.targets, failed=found.failures)
    return found


def _origin(config: Config) -> str:
    return config.targets or f"what fires in {config.pool}"


def _write_missing(found: "Coverage", config: Config) -> None:
    from qscope_jax.features.synthesis.targets import save_targets

    wanted = found.missing + found.weak(config.weak)
    save_targets(config.missing, wanted)
    print(f"Missing and weakly covered targets: {config.missing} ({len(wanted)})")


def _show(found: "Coverage", config: Config) -> None:
    from qscope_jax.report.terminal import print_kv, print_table

    print_kv(
        {
            "targets": f"{len(found.targets):,} ({_origin(config)})",
            "texts": found.texts,
            "coverage": f"{found.share:.2%}",
            "missing": len(found.missing),
            f"weak (fewer than {config.weak} texts)": len(found.weak(config.weak)),
        },
        title=f"Coverage of {config.data}",
    )
    print()
    rows = [(str(layer), total, covered, total - covered, covered / total) for layer, (covered, total) in found.by_layer().items()]
    print_table(("layer", "targets", "covered", "missing", "share"), rows)
    if found.missing:
        print()
        rows = [(str(target.layer), str(target.feature), target.explanation or None) for target in found.missing[:_SHOWN]]
        print_table(("layer", "feature", "explanation"), rows, title=f"Missing, the first {len(rows)} of {len(found.missing)}")
