"""`qscope sft`: fine-tune on conversations, plainly or with another language's features held down (SASFT)."""

import math
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qscope_jax.cli import language_features
from qscope_jax.cli.options import Integers, check_at_least, positional, same_named
from qscope_jax.cli.sources import TINY, TINY_REPETITION, ModelOptions, open_model
from qscope_jax.cli.training_run import RunOptions, TuningOptions, check_run, run_to_end
from qscope_jax.errors import ConfigError

if TYPE_CHECKING:
    from qscope_jax.data.chat_data import Conversation
    from qscope_jax.data.chat_templates import ChatFormat
    from qscope_jax.data.chat_tokens import ChatRow
    from qscope_jax.models.language_model import LanguageModel
    from qscope_jax.training.auxiliary import Auxiliary
    from qscope_jax.training.sft import SFT, SFTConfig


@dataclass(frozen=True, kw_only=True)
class Config(TuningOptions, RunOptions, ModelOptions):
    """Fine-tune a model on conversations: `--method sft`, `sasft`, or `penalty`."""

    data: str = positional(TINY)
    """Conversations (messages, or prompt and response): a .jsonl or .parquet file, a folder, a hub dataset, or `tiny` for made ones in which a few
    answers switch to --language, `tiny:repetition` for such as leave the embedded model prone to repetition."""
    method: Literal["sft", "sasft", "penalty"] = "sft"
    """Cross-entropy alone; with the features of --features held down; or with the probability of --language's tokens held down."""
    split: str = "train"
    """Split of a hub dataset."""
    limit: int | None = None
    """Read at most so many conversations."""
    language_column: str = "language"
    """Column of the conversations' language, which sasft and penalty need."""
    eval_data: str = ""
    """Conversations to evaluate on; by default a share of the data."""
    holdout_share: float = 0.01
    """Share of the data, drawn at random, kept for evaluation where there is no eval_data; 0 keeps none."""
    template: str = ""
    """Chat template: chatml, gemma, llama3, plain, a Jinja file, or by default the tokenizer's own."""
    response_marker: str = ""
    """Text after which an answer begins, where the template should not be asked."""
    turn_end: str = ""
    """Text that ends an answer, with a response_marker."""
    max_refused_share: float = 0.05
    """Largest share of conversations that may be left out, because no answer is found in them."""
    language: str = ""
    """With penalty (and data tiny): the unwanted language, by its label in the data."""
    features: str = ""
    """With sasft: the folder that `qscope sft features` wrote."""
    weight: float = 0.01
    """Lambda: weight of the loss beside cross-entropy; 0 is plain fine-tuning."""
    form: Literal["paper", "code"] = "paper"
    """SASFT's loss as in the paper, or as in the authors' code; their 5e-4 and 1e-3 in code are about 0.008 and 0.016 in paper."""
    aim: Literal["reduce", "raise"] = "reduce"
    """Hold the features down in other languages, or lift them in their own."""
    alpha: Literal["mean", "zero"] = "mean"
    """Usual level of a feature: its mean on the language, as measured before, or zero."""
    layers: Integers | None = None
    """Of the features' layers, by default all."""
    num_features: int | None = None
    """Use so many features of each layer, by default all."""
    any_model: bool = False
    """Accept features that were measured on a model of another name, such as a renamed folder's."""
    steps: int | None = None
    """Optimiser steps, by default those of --epochs."""
    epochs: float = 1.0
    """Passes over the data, by its number of tokens."""
    batch_size: int = 32
    """Rows of a step."""
    length: int = 1024
    """Tokens of a row; longer conversations are cut."""
    lanes: int = 1
    """Independent streams of conversations, on a mesh a multiple of its data axis."""
    learning_rate: float = 1e-5
    """Peak rate of AdamW."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate falls after the warm-up."""
    warmup_steps: int = 100
    """Steps of linear warm-up, at most half of the run."""
    seed: int = 0
    """Of the held-out share, the order of conversations, and adapters."""


def run(config: Config) -> dict[str, Any]:
    """Fine-tune; returns the last held-out metrics and where the model is."""
    from qscope_jax.data.chat_export import write_chat_settings
    from qscope_jax.parallel.processes import from_first, is_first, join_processes

    if config.distributed:
        join_processes()
    out = from_first(lambda: _check(config))
    model = open_model(config.model, config.dtype, config.mesh)
    recipe = make_recipe(model, config)
    end = run_to_end("sft train", recipe, config, recipe.config.steps)
    if end is None:
        return {"finished": False}
    result = {"finished": True, "step": end.step, "model": str(recipe.save(end.state, out / "model")), "held_out": end.held_out}
    if is_first():
        write_chat_settings(out / "model", model.tokenizer, _format(config), model.config.eos_token_ids)
        from qscope_jax.report.run_page import write_run_page

        result["page"] = str(write_run_page(out))
        _show(result, config)
    return result


ACTIONS: dict[str, tuple[type, Any]] = {"features": (language_features.Config, language_features.run), "train": (Config, run)}


def make_recipe(model: "LanguageModel", config: Config) -> "SFT":
    """The recipe that the options describe.

    Raises:
        QscopeError: data, features or sizes do not fit.
    """
    from qscope_jax.training.sft import SFT

    rows, held_out = _rows(model, config)
    auxiliary, languages = _auxiliary(model, config, rows)
    settings = _settings(config, rows)
    return SFT(model, rows, settings, auxiliary=auxiliary, languages=languages, held_out=held_out, lanes=config.lanes)


def _settings(config: Config, rows: "Sequence[ChatRow]") -> "SFTConfig":
    from qscope_jax.training.sft import SFTConfig

    steps = config.steps
    if steps is None:
        tokens = sum(len(rows[index].tokens) for index in range(len(rows)))
        steps = max(math.ceil(config.epochs * tokens / (config.batch_size * config.length)), 1)
    return SFTConfig(**{**same_named(SFTConfig, config), "steps": steps})


def _rows(model: "LanguageModel", config: Config) -> "tuple[Sequence[ChatRow], Sequence[ChatRow]]":
    """Rows to learn from and held-out ones; what was left out is said on stderr."""
    from qscope_jax.data.chat_tokens import chat_rows

    found, held_out = _conversations(config)
    chat_format = _format(config)
    rows = chat_rows(found, model.tokenizer, chat_format, length=config.length)
    if rows.refused or rows.truncated:
        reasons = "".join(f"; left out {count}: {reason}" for reason, count in rows.refused.items())
        print(f"{config.data}: {len(rows)} conversations to learn from, {rows.truncated} cut at {config.length} tokens{reasons}", file=sys.stderr)
    return rows, chat_rows(held_out, model.tokenizer, chat_format, length=config.length) if held_out else []


def _format(config: Config) -> "ChatFormat":
    from qscope_jax.data.chat_templates import ChatFormat

    return ChatFormat(**{**same_named(ChatFormat, config), **({"template": "plain"} if config.model == TINY and not config.template else {})})


def _conversations(config: Config) -> "tuple[list[Conversation], list[Conversation]]":
    from qscope_jax.data.chat_data import load_conversations

    if config.data == TINY:
        from qscope_jax.demo.switching import clean_conversations, switching_conversations

        return switching_conversations(2000 if config.limit is None else config.limit, config.language, seed=config.seed), clean_conversations(200)
    if config.data == TINY_REPETITION:
        from qscope_jax.demo.repetition import cold_start_conversations

        found = cold_start_conversations(4000 if config.limit is None else config.limit, seed=config.seed)
    else:
        found = load_conversations(config.data, split=config.split, limit=config.limit, language_column=config.language_column)
    if config.eval_data:
        return found, load_conversations(config.eval_data, language_column=config.language_column)
    order = list(range(len(found)))
    random.Random(config.seed).shuffle(order)
    kept = len(found) - (max(round(config.holdout_share * len(found)), 1) if config.holdout_share else 0)
    if kept < 1:
        raise ConfigError(f"{config.data}: has {len(found)} conversations, of which holdout_share {config.holdout_share} leaves none")
    return [found[index] for index in sorted(order[:kept])], [found[index] for index in sorted(order[kept:])]


def _auxiliary(model: "LanguageModel", config: Config, rows: "Sequence[ChatRow]") -> "tuple[Auxiliary | None, tuple[str, ...]]":
    """The loss beside cross-entropy and the languages that it tells apart."""
    if config.method == "sft":
        return None, ()
    from qscope_jax.training.sasft import SASFTConfig, feature_ceiling, script_penalty

    if config.method == "sasft":
        from qscope_jax.features.switching.language_features import LanguageFeatures

        features = LanguageFeatures.load(config.features)
        features.check_model(model, any_name=config.any_model)
        return feature_ceiling(features, SASFTConfig(**same_named(SASFTConfig, config))), features.languages
    from qscope_jax.features.switching.code_switching import script_tokens, target_script

    languages = tuple(sorted({rows[index].language for index in range(len(rows))} - {""}))
    unwanted_V = script_tokens(model.tokenizer, model.config.vocab_size, target_script(config.language))
    return script_penalty(unwanted_V, languages, config.language, config.weight), languages


def _check(config: Config) -> Path:
    """The run's folder; what can be wrong is found before anything is loaded."""
    check_at_least(config, 1, "limit", "steps")
    if not 0 <= config.holdout_share < 1:
        raise ConfigError(f"holdout_share is {config.holdout_share}, expected 0 to below 1")
    if not 0 < config.epochs < math.inf:
        raise ConfigError(f"epochs is {config.epochs}, expected a positive number")
    if config.method == "sasft" and not config.features:
        raise ConfigError("method sasft needs --features, a folder that `qscope sft features` wrote")
    if config.method == "penalty" and not config.language:
        raise ConfigError("method penalty needs --language, the unwanted language by its label in the data")
    if config.data == TINY and not config.language:
        raise ConfigError("data tiny needs --language, the one that some answers switch to: zh, ru or ko")
    if config.keep_best and not (config.holdout_share or config.eval_data):
        raise ConfigError(f"keep_best is {config.keep_best}, but there are no held-out conversations to choose by")
    return check_run(config, "micro_batches", "remat", "head_chunk")


def _show(result: dict[str, Any], config: Config) -> None:
    from qscope_jax.report.terminal import print_table

    if result["held_out"]:
        print_table(("held-out conversations", f"step {result['step']}"), list(result["held_out"].items()))
    print(f"Model: {result['model']}   page: {result['page']}")
    if config.method != "sft" or config.data == TINY:
        prompts, language = ("tiny" if config.data == TINY else "PROMPTS"), config.language or "LANGUAGE"
        print(f"Count its switches with: qscope code-switch measure --model {result['model']} --language {language} --prompts {prompts}")
