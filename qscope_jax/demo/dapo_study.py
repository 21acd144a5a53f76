"""Reinforcement learning of the embedded model, with and without rollouts that are steered into repetition: arms that differ in those alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from qscope_jax.data.chat_templates import ChatFormat
from qscope_jax.data.chat_tokens import chat_rows, prompt_text
from qscope_jax.data.prompt_rows import PromptRow
from qscope_jax.demo.repetition import KINDS, cold_start_conversations, full_answer, held_out_prompts, open_questions, prompts_to_learn, right_sum
from qscope_jax.errors import InputError
from qscope_jax.features.repetition.endless_repetition import endless_repetition
from qscope_jax.features.repetition.repetition_features import RepetitionFeatures, find_repetition_features
from qscope_jax.features.steering import random_control, residual_norms, steer
from qscope_jax.models.edits import AddDirections, Edit
from qscope_jax.models.language_model import LanguageModel
from qscope_jax.models.rollouts import Rollout, RolloutSampler
from qscope_jax.sae.layer_sae import LayerSAE
from qscope_jax.training.dapo.dapo import DAPO, PromptTask
from qscope_jax.training.dapo.dapo_config import DAPOConfig
from qscope_jax.training.dapo.rewards import Reward, load_rewards
from qscope_jax.training.sft import SFT, SFTConfig

ARMS = ("vanilla", "steered", "random")
"""No steered member; one steered along features of repetition; one along random directions of the same norm."""
FORMAT = ChatFormat(template="plain")
LAYERS, COUNT = (2, 3), 2
"""Where the steered member is steered, and along how many features of each; the report steers along one, of dictionaries forty times as large."""


@dataclass(frozen=True)
class Study:
    """Sizes of a study."""

    cold_start: SFTConfig = field(
        default_factory=lambda: SFTConfig(steps=400, batch_size=16, length=128, learning_rate=3e-3, warmup_steps=10, remat=False)
    )
    conversations: int = 4000
    """Of the cold start."""
    training: DAPOConfig = field(
        default_factory=lambda: DAPOConfig(
            steps=90,
            num_prompts=8,
            num_generations=8,
            max_prompt_length=64,
            max_completion_length=96,
            temperature=0.8,
            learning_rate=2e-4,
            schedule="constant",
            warmup_steps=5,
            weight_decay=0.0,
            remat=False,
        )  # fmt: skip
    )
    """Of every arm; `num_steered` is the arm's."""
    prompts: int = 300
    """To learn from: half of them sums, half open questions."""
    held_out: int = 80
    """Held-out prompts of each kind: sums, open questions, and such as end in a phrase over and over."""
    samples: int = 4
    """Answers to each."""
    measure_every: int = 30
    """Steps between measurements."""
    probes: int = 48
    """Open questions, of those to learn from, by which the stream's norm is measured and the strength is tried."""
    strength: float = 0.5
    """What is added at every token of a steered answer, in multiples of the layer's median residual norm, for each of the features."""


@dataclass(frozen=True)
class Answers:
    """Answers to one kind of held-out prompts.

    Attributes:
        rows: The prompts.
        rollouts: The answers, as many to each.
        texts: The same as texts.
    """

    rows: Sequence[PromptRow]
    rollouts: Sequence[Rollout]
    texts: Sequence[str]

    def repeating(self) -> list[int]:
        """Endlessly repeating answers to each prompt."""
        return self._count([endless_repetition(one.token_ids, stopped=one.stopped) is not None for one in self.rollouts])

    def right(self) -> list[int]:
        """Right answers to each prompt; none where there is nothing to get right."""
        rewards = right_sum(completions=list(self.texts), answer=[self.rows[one.prompt].columns["answer"] for one in self.rollouts])
        return self._count([reward is not None and reward > 0 for reward in rewards])

    def _count(self, flags: Sequence[bool]) -> list[int]:
        return np.bincount([one.prompt for one, flag in zip(self.rollouts, flags, strict=True) if flag], minlength=len(self.rows)).tolist()


def cold_start(model: LanguageModel, study: Study, seed: int = 0) -> LanguageModel:
    """The model after fine-tuning on sums of which many are wrong and answers of which some go round in circles."""
    rows = chat_rows(cold_start_conversations(study.conversations, seed=seed), model.tokenizer, FORMAT, length=study.cold_start.length)
    recipe = SFT(model, rows, replace(study.cold_start, seed=seed))
    state, stream = recipe.init(), recipe.stream()
    for _ in range(study.cold_start.steps):
        state, _ = recipe.step(state, next(stream))
    return recipe.tuning.tuned(state)


def ask(
    model: LanguageModel, rows: Sequence[PromptRow], study: Study, seed: int = 0, *, samples: int | None = None, edits: Sequence[Edit] = ()
) -> Answers:
    """Answers to prompts, drawn as in training; under `edits` if there are any."""
    samples = samples or study.samples
    config = study.training
    count = min(len(rows) * samples, config.num_rows)
    sampler = RolloutSampler(
        model.config, model.mesh, rows=count, prompt_length=config.max_prompt_length, max_new_tokens=config.max_completion_length,
        sampling=replace(config.sampling(), seed=seed), stop_ids=model.config.eos_token_ids,
    )  # fmt: skip
    drawn = sampler(
        model.decoder, _tokens(model, rows, config), samples, seeds=list(range(len(rows))), edits=edits, steered=range(samples) if edits else ()
    )
    return Answers(rows, drawn, [model.tokenizer.decode(list(one.token_ids), skip_special_tokens=True) for one in drawn])


def repetition_features(model: LanguageModel, saes: Sequence[LayerSAE], study: Study, count: int, seed: int = 0) -> RepetitionFeatures:
    """Features that rise in the model's own endless repetition, in answers to training questions of the prone kind."""
    asked = [*open_questions(study.prompts // 2, prone=True), *open_questions(study.prompts // 2)]
    answers = ask(model, asked, study, seed, samples=2)
    prompts = _tokens(model, asked, study.training)
    repeating, normal = [], []
    for one in answers.rollouts:
        if endless_repetition(one.token_ids, stopped=one.stopped) is not None:
            repeating.append([*prompts[one.prompt], *one.token_ids])
        elif one.stopped:
            normal.append([*prompts[one.prompt], *one.token_ids])
    return find_repetition_features(model, saes, repeating, normal, count=count)


def edits_of(
    arm: str, model: LanguageModel, saes: Sequence[LayerSAE], features: RepetitionFeatures, study: Study, seed: int = 0
) -> list[AddDirections]:
    """What the steered member of an arm feels; nothing for `vanilla`.

    Raises:
        InputError: another arm than those of `ARMS`.
    """
    if arm not in ARMS:
        raise InputError(f"arm {arm!r} is not one of {', '.join(ARMS)}")
    if arm == "vanilla":
        return []
    texts = [prompt_text(row.messages, model.tokenizer, FORMAT) for row in open_questions(study.probes)]
    norms = residual_norms(model, texts, list(features.layers))
    by_layer, rng = {sae.layer: sae for sae in saes}, np.random.default_rng(seed)
    edits = [
        steer(by_layer[layer], chosen, study.strength, unit="residual", residual_norm=norms[layer])
        for layer, chosen in zip(features.layers, features.features_MS.tolist(), strict=True)
    ]
    return [random_control(edit, rng) for edit in edits] if arm == "random" else edits


@dataclass(frozen=True)
class ArmResult:
    """What one arm came to.

    Attributes:
        steps: Steps after which it was measured, the first being 0.
        right: For each, right answers to each held-out sum.
        repeating: By kind of held-out prompts, for each of the steps, endlessly repeating answers to each.
        metrics: What every step said.
        answers: Answers after the last step, by kind of held-out prompts.
    """

    steps: list[int]
    right: list[list[int]]
    repeating: dict[str, list[list[int]]]
    metrics: list[Mapping[str, float]]
    answers: dict[str, Answers]


def run_arm(model: LanguageModel, study: Study, edits: Sequence[Edit] = (), seed: int = 0) -> ArmResult:
    """Train from a cold start, and measure on held-out prompts on the way; equal seeds have equal prompts and draws."""
    rows = prompts_to_learn(study.prompts)
    config = replace(study.training, seed=seed, num_steered=int(bool(edits)))
    task = PromptTask(
        _tokens(model, rows, config), [row.messages[-1].content for row in rows], {"answer": [row.columns["answer"] for row in rows]},
        _rewards(config), model.config.eos_token_ids,
    )  # fmt: skip
    recipe = DAPO(model, task, config, edits=edits)
    state, stream = recipe.init(), recipe.stream()
    result = ArmResult([], [], {kind: [] for kind in KINDS}, [], {})

    def measure(step: int) -> None:
        policy = LanguageModel(recipe.policy(state), mesh=model.mesh, tokenizer=model.tokenizer)
        result.answers.update({kind: ask(policy, asked, study, seed) for kind, asked in held_out_prompts(study.held_out).items()})
        result.steps.append(step)
        result.right.append(result.answers["sums"].right())
        for kind in KINDS:
            result.repeating[kind].append(result.answers[kind].repeating())

    measure(0)
    for step in range(1, config.steps + 1):
        state, metrics = recipe.step(state, next(stream))
        result.metrics.append(metrics)
        if step % study.measure_every == 0 or step == config.steps:
            measure(step)
    return result


def _rewards(config: DAPOConfig) -> list[Reward]:
    """Right sums, full answers to open questions, and the soft punishment of answers that take more than two thirds of the room."""
    longest = config.max_completion_length
    own = {f"{function.__module__}:{function.__name__}": 1.0 for function in (right_sum, full_answer)}
    named = {**own, "length": {"weight": 1.0, "soft_punish_cache": longest // 3}}
    return load_rewards(named, max_completion_len=longest)


def _tokens(model: LanguageModel, rows: Sequence[PromptRow], config: DAPOConfig) -> list[list[int]]:
    """Prompts in the format of the cold start; the few that are longer than there is room lose their beginning."""
    texts = [prompt_text(row.messages, model.tokenizer, FORMAT) for row in rows]
    return [ids[-config.max_prompt_length :] for ids in model.tokenize(texts)]
