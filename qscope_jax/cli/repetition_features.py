"""`qscope dapo features`: find the features that rise as a model begins to repeat itself endlessly."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qscope_jax.cli.options import Integers, check_at_least, positional
from qscope_jax.cli.results import check_writable, write_result
from qscope_jax.cli.sources import TINY_REPETITION, SAEOptions, check_layers, open_model, open_saes
from qscope_jax.errors import InputError

if TYPE_CHECKING:
    from qscope_jax.features.repetition.repetition_features import RepetitionFeatures
    from qscope_jax.models.language_model import LanguageModel


@dataclass(frozen=True, kw_only=True)
class Config(SAEOptions):
    """Find the features that rise in endless repetition, from the model's own completions."""

    data: str = positional()
    """Prompts (a column, or messages): a .jsonl, .parquet or .csv file, a folder, or a hub dataset; `tiny:repetition` for made
    questions."""
    out: str = ""
    """JSON file for the result."""
    page: str = ""
    """HTML file for the report."""
    layers: Integers | None = None
    """Layers: 3 or 2,4-5; by default all that have an SAE."""
    count: int = 5
    """Features of each layer."""
    column: str = "prompt"
    """Column of the prompt where rows have no messages."""
    split: str = "train"
    """Split of a hub dataset."""
    limit: int | None = None
    """Read at most so many prompts."""
    template: str = ""
    """Chat template: chatml, gemma, llama3, plain, a Jinja file, or by default the tokenizer's own."""
    samples: int = 4
    """Completions of each prompt."""
    max_new_tokens: int = 256
    """Tokens of a completion at most; what repeats without end is cut there."""
    temperature: float = 1.0
    """Of the draws; low ones repeat sooner."""
    rows: int = 32
    """Completions under way at a time."""
    seed: int = 0
    """Of the draws."""


def run(config: Config) -> dict[str, Any]:
    """Sample, tell endless repetition from the rest, and rank features by their rise."""
    from qscope_jax.features.repetition.endless_repetition import endless_repetition
    from qscope_jax.features.repetition.repetition_features import COLUMNS, find_repetition_features
    from qscope_jax.report.terminal import print_table

    check_at_least(config, 1, "limit", "samples", "max_new_tokens", "rows", "count")
    check_writable(config.out)
    check_writable(config.page)
    model = open_model(config.model, config.dtype, config.mesh)
    saes = open_saes(config.sae, model)
    layers = check_layers(saes, config.layers, model)
    drawn = _drawn(model, config)
    repeating = [ids for ids, completion, stopped in drawn if endless_repetition(completion, stopped=stopped) is not None]
    normal = [ids for ids, completion, stopped in drawn if stopped]
    if not repeating or not normal:
        found = f"{len(repeating)} of {len(drawn)} completions repeat endlessly and {len(normal)} end by themselves"
        raise InputError(f"{found}; give more prompts, more --samples, longer --max-new-tokens or another --temperature")
    features = find_repetition_features(model, (saes[layer] for layer in layers), repeating, normal, count=config.count)
    rows = features.rows()
    print(f"{len(repeating)} of {len(drawn)} completions repeat endlessly; {len(normal)} end by themselves.")
    print_table(COLUMNS, [(str(layer), str(int(rank)), str(int(feature)), *measured) for layer, rank, feature, *measured in rows])
    if config.page:
        _write_page(config.page, features, len(repeating), len(drawn))
    result = {"repeating": len(repeating), "completions": len(drawn), "columns": list(COLUMNS), "features": rows}
    write_result(config.out, "dapo features", config, result)
    return result


def _drawn(model: "LanguageModel", config: Config) -> list[tuple[list[int], tuple[int, ...], bool]]:
    """Tokens of prompt and completion, those of the completion alone, and whether it stopped."""
    from qscope_jax.data.chat_templates import ChatFormat
    from qscope_jax.data.chat_tokens import prompt_text, turn_end_ids
    from qscope_jax.data.prompt_rows import load_prompt_rows
    from qscope_jax.models.rollouts import RolloutSampler
    from qscope_jax.models.sampling import SamplingConfig

    chat_format = ChatFormat(template=config.template or ("plain" if config.model == "tiny" else ""))
    if config.data == TINY_REPETITION:
        from qscope_jax.demo.repetition import open_questions

        each = 150 if config.limit is None else -(-config.limit // 2)
        rows = [*open_questions(each, prone=True), *open_questions(each)]
    else:
        rows = load_prompt_rows(config.data, column=config.column, split=config.split, limit=config.limit)
    prompts = model.tokenize([prompt_text(row.messages, model.tokenizer, chat_format) for row in rows])
    end = turn_end_ids(model.tokenizer, chat_format)
    stops: Sequence[int] = tuple(dict.fromkeys((*(end if len(end) == 1 else ()), *model.config.eos_token_ids)))
    sampler = RolloutSampler(
        model.config, model.mesh, rows=config.rows, prompt_length=max(map(len, prompts)), max_new_tokens=config.max_new_tokens,
        sampling=SamplingConfig(config.max_new_tokens, config.temperature, seed=config.seed), stop_ids=stops,
    )  # fmt: skip
    found = sampler(model.decoder, prompts, config.samples, seeds=list(range(len(prompts))))
    return [([*prompts[one.prompt], *one.token_ids], one.token_ids, one.stopped) for one in found]


def _write_page(path: str, features: "RepetitionFeatures", repeating: int, completions: int) -> None:
    from qscope_jax.features.repetition.repetition_features import COLUMNS
    from qscope_jax.report.figures import bars
    from qscope_jax.report.page import Page

    page = Page("Features of endless repetition", f"{repeating} of {completions} completions go round in circles until they are cut.")
    page.text("The same token is compared with itself: its activation where it stands last in the circle, less that where it stands first.")
    rows = features.rows()
    page.table(COLUMNS, [(str(layer), str(int(rank)), str(int(feature)), *measured) for layer, rank, feature, *measured in rows])
    labels = [f"{layer}:{int(feature)}" for layer, _, feature, *_ in rows]
    series = {"first occurrence": [row[4] for row in rows], "last occurrence": [row[5] for row in rows], "normal text": [row[6] for row in rows]}
    page.figure(bars(labels, series, title="Mean activation of each feature, layer:feature", y="activation"))
    page.write(path)
