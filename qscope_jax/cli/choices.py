"""`qscope code-switch choices`: multiple-choice accuracy, to see what a fine-tuned model has lost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qscope_jax.cli.options import Texts, check_at_least, positional
from qscope_jax.cli.progress import count_progress
from qscope_jax.cli.results import check_writable, write_result
from qscope_jax.cli.sources import ModelOptions, open_model
from qscope_jax.errors import ConfigError

if TYPE_CHECKING:
    from qscope_jax.features.choices import ChoiceAccuracy, ChoiceScores


@dataclass(frozen=True, kw_only=True)
class Config(ModelOptions):
    """Score multiple-choice questions by the likelihood of their choices."""

    questions: str = positional()
    """A .jsonl, .parquet or .csv file of questions, or a hub dataset."""
    models: Texts | None = None
    """Compare these models instead; the first is what the others are measured against."""
    question: Texts = ("question",)
    """Column of the question, or several that are put below each other."""
    choices: Texts = ("choices",)
    """Column of a list of choices, or a column for each of them."""
    answer: str = "answer"
    """Column of the right choice: its text, its letter, or its number from 0."""
    group: str = ""
    """Column to count by as well, such as the language."""
    split: str = "test"
    """Split of a hub dataset."""
    limit: int | None = None
    """At most so many questions, drawn at random."""
    frame: str = "Question: {question}\nAnswer:"
    """Text around {question}, up to where a choice follows."""
    separator: str = " "
    """What stands before a choice."""
    letters: bool = False
    """List the choices with letters below the question, and score the letters."""
    batch_size: int = 32
    """Choices scored at a time."""
    seed: int = 0
    """Of the draw."""
    page: str = ""
    """HTML file for table and figures."""
    out: str = ""
    """JSON file for the numbers."""


def run(config: Config) -> dict[str, Any]:
    """Score; returns each model's accuracies, and what they are beside the first model's."""
    from qscope_jax.data.choices import load_choices
    from qscope_jax.features.choices import ChoiceFormat, accuracy_change, choice_accuracy, score_choices

    names = list(config.models or (config.model,))
    if len(set(names)) < len(names):
        raise ConfigError(f"models are {', '.join(names)}; name each of them once")
    check_at_least(config, 1, "limit", "batch_size")
    check_writable(config.out)
    check_writable(config.page)
    format = ChoiceFormat(config.frame, config.separator, config.letters)
    columns: dict[str, Any] = dict(question=config.question, choices=config.choices, answer=config.answer, group=config.group)
    questions = load_choices(config.questions, **columns, split=config.split, limit=config.limit, seed=config.seed)
    scores: dict[str, ChoiceScores] = {}
    for name in names:
        model = open_model(name, config.dtype, config.mesh)
        with count_progress(f"choices, {name}") as told:
            scores[name] = score_choices(model, questions, format, batch_size=config.batch_size, progress=told)
    accuracies = {name: choice_accuracy(found) for name, found in scores.items()}
    changes = {name: {how: accuracy_change(scores[names[0]], scores[name], how)._asdict() for how in ("raw", "normalised")} for name in names[1:]}
    _show(accuracies, changes)
    if config.page:
        from qscope_jax.report.switching_page import write_choices_page

        write_choices_page(config.page, accuracies, subtitle=f"{', '.join(names)}; {len(questions):,} questions, {config.questions}")
        print(f"Page: {config.page}")
    result = {
        "questions": len(questions),
        "models": {
            name: [{**row._asdict(), "raw": row.raw._asdict(), "normalised": row.normalised._asdict()} for row in rows]
            for name, rows in accuracies.items()
        },
        "changes": changes,
    }  # fmt: skip
    write_result(config.out, "code-switch choices", config, result)
    return result


def _show(accuracies: "Mapping[str, Sequence[ChoiceAccuracy]]", changes: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    from qscope_jax.report.number_format import format_points
    from qscope_jax.report.terminal import print_table

    for name, rows in accuracies.items():
        cells = [(row.group or "all", row.questions, row.chance, str(row.raw), str(row.normalised)) for row in rows]
        print_table(("group", "questions", "by chance", "accuracy", "by character"), cells, title=f"{name}: log-likelihood of choices")
        print()
    for name, found in changes.items():
        cells = [(how, f"{100 * one['value']:+.2f}", format_points(one["low"], one["high"])) for how, one in found.items()]
        print_table(("accuracy", "points", "95 %"), cells, title=f"{name} beside {next(iter(accuracies))}")
        print()
