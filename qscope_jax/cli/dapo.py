"""`qscope dapo`: reinforcement learning from rewards, with rollouts steered into repetition as rare negatives."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from qscope_jax.cli import repetition_features
from qscope_jax.cli.options import Texts, check_at_least, positional, same_named
from qscope_jax.cli.sources import TINY, SAEOptions, open_model, open_sae
from qscope_jax.cli.training_run import RunOptions, TuningOptions, check_run, run_to_end
from qscope_jax.errors import ConfigError

if TYPE_CHECKING:
    from qscope_jax.data.chat_templates import ChatFormat
    from qscope_jax.data.prompt_rows import PromptRow
    from qscope_jax.models.edits import Edit
    from qscope_jax.models.language_model import LanguageModel
    from qscope_jax.training.dapo.dapo import DAPO, PromptTask


@dataclass(frozen=True, kw_only=True)
class Config(TuningOptions, RunOptions, SAEOptions):
    """Train a model on rewards of its own answers (DAPO); with --num-steered, some of them steered along a feature."""

    data: str = positional()
    """Prompts (a column, or messages) with what rewards look at, such as an answer: a .jsonl, .parquet or .csv file, a folder, or a hub
    dataset; `tiny` for made sums and questions."""
    rewards: Texts = ("numeric",)
    """Reward functions, each NAME or package.module:function, with =WEIGHT and options behind commas: numeric=1 length=1,soft_punish_cache=64.
    Shipped: numeric, exact_match, multiple_choice, script_share, ngram_repetition, format, length."""
    column: str = "prompt"
    """Column of the prompt where rows have no messages."""
    split: str = "train"
    """Split of a hub dataset."""
    limit: int | None = None
    """Read at most so many prompts."""
    eval_data: str = ""
    """Prompts to evaluate on; by default a share of the data."""
    holdout_share: float = 0.05
    """Share of the prompts, drawn at random, that are only evaluated on; 0 keeps none."""
    template: str = ""
    """Chat template: chatml, gemma, llama3, plain, a Jinja file, or by default the tokenizer's own."""
    num_prompts: int = 8
    """Prompts of a step."""
    num_generations: int = 8
    """Answers to a prompt, steered ones included."""
    num_iterations: int = 1
    """Times that a step's answers are gone through."""
    num_mini_batches: int = 1
    """Updates in which they are gone through each time."""
    max_prompt_length: int = 256
    """Room for a prompt, in tokens."""
    max_completion_length: int = 256
    """Tokens of an answer at most."""
    temperature: float = 1.0
    """Of the draws."""
    top_p: float = 1.0
    """Draw from the most probable tokens that together reach this probability."""
    top_k: int = 0
    """Draw from so many most probable tokens; 0 is all."""
    rollout_rows: int = 0
    """Answers under way at a time; 0 is all of a generation batch."""
    loss_type: Literal["dapo", "grpo", "dr_grpo", "bnpo"] = "dapo"
    """How token losses are added up."""
    epsilon: float = 0.2
    """Lower clip."""
    epsilon_high: float = 0.28
    """Upper clip."""
    delta: float | None = None
    """Dual clip: ratios above it have no gradient where the advantage is negative."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """Ratios of tokens, or one for an answer."""
    beta: float = 0.0
    """Weight of the divergence from the model that the run begins with."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What advantages are divided by."""
    advantage_eps: float = 1e-6
    """Added to it."""
    mask_truncated_completions: bool = False
    """Leave answers that were cut out of the loss; steered ones stay."""
    dynamic_sampling: bool = False
    """Replace prompts whose answers are all right or all wrong by further ones."""
    filter_metric: str = ""
    """Reward that says which answers are right, by default the first."""
    gen_batch_size: int = 0
    """Prompts drawn at a time; 0 is num_prompts."""
    max_num_gen_batches: int = 10
    """Batches drawn at most for a step, which then goes on with the groups that there are."""
    strict_groups: bool = False
    """End the run instead."""
    num_steered: int = 0
    """Answers of each group that are steered along --steer-features."""
    steer_features: Texts | None = None
    """Features, as layer:features, such as 18:4711 or 18:4711,12."""
    steer_alpha: float = 1.0
    """How strongly: what is added at every token has so many times the layer's median residual norm, or with --steer-unit raw, alpha times the
    decoder's row."""
    steer_unit: Literal["residual", "raw"] = "residual"
    """Unit of steer_alpha."""
    steer_control: Literal["", "random"] = ""
    """Control: steer along random directions of the same norm instead."""
    max_steered_tokens: int = 0
    """Tokens of a steered answer that are learnt from, from its first on; 0 is all."""
    min_entropy: float = 0.0
    """End the run, saved, where the policy's entropy (nats a token) is below; 0 never does."""
    max_entropy: float = 0.0
    """The same where it is above; 0 never does."""
    steps: int = 100
    """Steps of the run, each with rollouts and its updates."""
    learning_rate: float = 1e-6
    """Peak rate of AdamW."""
    schedule: Literal["cosine", "linear", "constant"] = "constant"
    """How the rate goes on after the warm-up."""
    warmup_steps: int = 20
    """Updates of linear warm-up, at most half of the run."""
    eval_samples: int = 4
    """Answers to each held-out prompt."""
    rollout_mesh: str = ""
    """Mesh that answers are drawn on, such as data=8; by default the model's."""
    seed: int = 0
    """Of the held-out share, the order of prompts, and all draws."""


def run(config: Config) -> dict[str, Any]:
    """Train; returns the last held-out metrics and where the model is."""
    from qscope_jax.data.chat_export import write_chat_settings
    from qscope_jax.parallel.processes import from_first, is_first, join_processes

    if config.distributed:
        join_processes()
    out = from_first(lambda: _check(config))
    model = open_model(config.model, config.dtype, config.mesh)
    recipe = make_recipe(model, config)
    end = run_to_end("dapo train", recipe, config, config.steps)
    if end is None:
        return {"finished": False}
    result = {"finished": True, "step": end.step, "model": str(recipe.save(end.state, out / "model")), "held_out": end.held_out}
    if is_first():
        write_chat_settings(out / "model", model.tokenizer, _format(config), model.config.eos_token_ids)
        from qscope_jax.report.run_page import write_run_page

        result["page"] = str(write_run_page(out))
        _show(result)
    return result


ACTIONS: dict[str, tuple[type, Any]] = {"features": (repetition_features.Config, repetition_features.run), "train": (Config, run)}


def make_recipe(model: "LanguageModel", config: Config) -> "DAPO":
    """The recipe that the options describe.

    Raises:
        QscopeError: data, rewards, features or sizes do not fit.
    """
    from qscope_jax.parallel.mesh import make_mesh
    from qscope_jax.training.dapo.dapo import DAPO
    from qscope_jax.training.dapo.dapo_config import DAPOConfig

    settings = DAPOConfig(**same_named(DAPOConfig, config))
    mesh = make_mesh(config.rollout_mesh) if config.rollout_mesh else None
    return DAPO(model, make_task(model, config), settings, edits=steering_edits(model, config), rollout_mesh=mesh)


def make_task(model: "LanguageModel", config: Config) -> "PromptTask":
    """Prompts as tokens, with their columns and rewards.

    Raises:
        QscopeError: the data cannot be read, or a reward is not known.
    """
    from qscope_jax.data.chat_tokens import prompt_text, turn_end_ids
    from qscope_jax.training.dapo.dapo import PromptTask
    from qscope_jax.training.dapo.rewards import load_rewards

    rewards = load_rewards(read_rewards(config.rewards), max_completion_len=config.max_completion_length)
    rows, held_out = _prompts(config)
    chat_format = _format(config)
    texts = [prompt_text(row.messages, model.tokenizer, chat_format) for row in rows]
    prompts = model.tokenize(texts)
    names = list(dict.fromkeys(name for row in rows for name in row.columns))
    end = turn_end_ids(model.tokenizer, chat_format)
    stops = tuple(dict.fromkeys((*(end if len(end) == 1 else ()), *model.config.eos_token_ids)))
    return PromptTask(prompts, texts, {name: [row.columns.get(name) for row in rows] for name in names}, rewards, stops, held_out)


def read_rewards(given: Sequence[str]) -> dict[str, Any]:
    """Names with weights and options, from `name`, `name=weight` or `name=weight,option=value`.

    Raises:
        ConfigError: one of them reads as something else, or stands there twice.
    """
    found: dict[str, Any] = {}
    for text in given:
        first, *options = text.split(",")
        name, _, weight = first.partition("=")
        pairs = [option.partition("=") for option in options]
        try:
            settings = {key: yaml.safe_load(value) for key, sign, value in pairs if sign and key} | {"weight": float(weight) if weight else 1.0}
        except (ValueError, yaml.YAMLError) as error:
            raise ConfigError(f"reward {text!r}: its weight or an option cannot be read; expected NAME=WEIGHT,OPTION=VALUE") from error
        if not name or len(settings) != len(pairs) + 1 or name in found:
            raise ConfigError(f"reward {text!r}: expected NAME, NAME=WEIGHT or NAME=WEIGHT,OPTION=VALUE, each name once")
        found[name] = settings
    return found


def steering_edits(model: "LanguageModel", config: Config) -> "list[Edit]":
    """What steered members feel; empty without them.

    Raises:
        QscopeError: a layer or feature is out of range, or the SAE is of another model.
    """
    if not config.num_steered:
        return []
    import numpy as np

    from qscope_jax.features.steering import random_control, residual_norms, steer

    edits = []
    for layer, features in read_layer_features(config.steer_features or ()).items():
        norm = residual_norms(model, _probe_texts(model, config), [layer])[layer] if config.steer_unit == "residual" else None
        edits.append(steer(open_sae(config.sae, layer, model), features, config.steer_alpha, unit=config.steer_unit, residual_norm=norm))
    rng = np.random.default_rng(config.seed)
    return [random_control(edit, rng) for edit in edits] if config.steer_control == "random" else list(edits)


def read_layer_features(given: Sequence[str]) -> dict[int, list[int]]:
    """Features by layer, from `18:4711,12`.

    Raises:
        ConfigError: one of them reads as something else, or a layer stands there twice.
    """
    found: dict[int, list[int]] = {}
    for text in given:
        layer, sign, features = text.partition(":")
        numbers = [part.strip() for part in (layer, *features.split(","))]
        if not sign or not all(part.isdigit() for part in numbers) or int(layer) in found:
            raise ConfigError(f"steer_features {text!r}: expected LAYER:FEATURE,FEATURE, each layer once, such as 18:4711")
        found[int(layer)] = [int(part) for part in numbers[1:]]
    return found


def _probe_texts(model: "LanguageModel", config: Config) -> list[str]:
    from qscope_jax.data.chat_tokens import prompt_text

    rows, _ = _prompts(config)
    return [prompt_text(row.messages, model.tokenizer, _format(config)) for row in rows[:64]]


def _prompts(config: Config) -> "tuple[list[PromptRow], tuple[int, ...]]":
    """All prompts, and the numbers of those that are only evaluated on."""
    from qscope_jax.data.prompt_rows import load_prompt_rows

    held_out = load_prompt_rows(config.eval_data, column=config.column) if config.eval_data else []
    if config.data == TINY:
        from qscope_jax.demo.repetition import held_out_prompts, prompts_to_learn

        rows = prompts_to_learn(300 if config.limit is None else config.limit)
        if config.holdout_share and not held_out:
            held_out = [row for kind in ("sums", "prone") for row in held_out_prompts(40)[kind]]
    else:
        rows = load_prompt_rows(config.data, column=config.column, split=config.split, limit=config.limit)
    if held_out or config.data == TINY:
        return [*rows, *held_out], tuple(range(len(rows), len(rows) + len(held_out)))
    count = max(round(config.holdout_share * len(rows)), 1) if config.holdout_share else 0
    return rows, tuple(sorted(random.Random(config.seed).sample(range(len(rows)), count)))


def _format(config: Config) -> "ChatFormat":
    from qscope_jax.data.chat_templates import ChatFormat

    return ChatFormat(template=config.template or ("plain" if config.model == "tiny" else ""))


def _check(config: Config) -> Path:
    """The run's folder; what can be wrong is found before anything is loaded."""
    check_at_least(config, 1, "limit")
    if not 0 <= config.holdout_share < 1:
        raise ConfigError(f"holdout_share is {config.holdout_share}, expected 0 to below 1")
    if bool(config.num_steered) != bool(config.steer_features):
        raise ConfigError(f"num_steered is {config.num_steered} and steer_features {config.steer_features}; give both, or neither")
    read_rewards(config.rewards)
    read_layer_features(config.steer_features or ())
    if config.keep_best and not (config.holdout_share or config.eval_data):
        raise ConfigError(f"keep_best is {config.keep_best}, but there are no held-out prompts to choose by")
    return check_run(config, "micro_batches", "remat", "head_chunk", "rollout_rows", "rollout_mesh")


def _show(result: Mapping[str, Any]) -> None:
    from qscope_jax.report.terminal import print_table

    if result["held_out"]:
        print_table(("held-out prompts", f"step {result['step']}"), list(result["held_out"].items()))
    print(f"Model: {result['model']}   page: {result['page']}")
