"""DAPO (arXiv 2503.14476) with rollouts steered along features as rare negatives (Qwen-Scope report, section 8): the recipe.

A step draws prompts, samples a group of answers to each with the policy as it stands, scores them, drops groups that teach nothing where that is
asked for, and updates the policy. One or more members of each group may be sampled under edits, so that the policy sees, and learns to avoid, what
it rarely does by itself; their old log-probabilities are those of the unedited policy, or the clip would take away every gradient.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from qscope_jax.data.buckets import bucket_length
from qscope_jax.errors import InputError
from qscope_jax.models.decoder import Decoder
from qscope_jax.models.edits import Edit
from qscope_jax.models.language_model import LanguageModel
from qscope_jax.models.rollouts import Rollout, RolloutSampler
from qscope_jax.parallel.processes import is_first
from qscope_jax.parallel.rules import batch_sharding, place_rows, shard_tree
from qscope_jax.training.dapo.advantages import group_advantages
from qscope_jax.training.dapo.dapo_config import DAPOConfig
from qscope_jax.training.dapo.group_filter import Refill, keep_groups
from qscope_jax.training.dapo.policy_batch import PolicyBatch, policy_batch
from qscope_jax.training.dapo.policy_loss import policy_counts, policy_loss
from qscope_jax.training.dapo.prompt_stream import DrawnPrompts, PromptStream, draw_seeds
from qscope_jax.training.dapo.reward_watch import RewardWatch
from qscope_jax.training.dapo.rewards import Reward, RewardInputs, Scores, check_columns, score
from qscope_jax.training.dapo.rollout_metrics import group_metrics, held_out_metrics, token_metrics
from qscope_jax.training.losses import token_logprobs
from qscope_jax.training.tuning import TunedState, Tuning, accumulate, check_rows


@dataclass(frozen=True, eq=False)
class PromptTask:
    """What is asked, and what answers are worth.

    Attributes:
        prompts: Token ids of each prompt, up to where the answer begins.
        texts: The same as texts, for rewards.
        columns: Columns of the data rows, such as `answer`, a list over prompts each.
        rewards: Reward functions.
        stop_ids: Tokens that end an answer.
        held_out: Numbers of prompts that are only evaluated on.
    """

    prompts: Sequence[Sequence[int]]
    texts: Sequence[str]
    columns: Mapping[str, Sequence[Any]]
    rewards: Sequence[Reward]
    stop_ids: tuple[int, ...]
    held_out: tuple[int, ...] = ()


class Groups(NamedTuple):
    """Scored rollouts, whole groups behind each other."""

    rollouts: list[Rollout]
    scores: Scores


class DAPO:
    """Recipe: reinforcement learning of a model from rewards of its own answers."""

    name = "DAPO"
    unit = "tokens"

    def __init__(self, model: LanguageModel, task: PromptTask, config: DAPOConfig, *, edits: Sequence[Edit] = (), rollout_mesh: Mesh | None = None):
        """Describe a run.

        Args:
            model: Where it begins; stays as it is, and is the reference of `beta`.
            task: Prompts and rewards.
            config: Sizes and rates.
            edits: What steered members feel at every token that they draw; fixed for the run.
            rollout_mesh: Where rollouts are drawn, if not on the model's mesh; parameters move there each step.

        Raises:
            InputError: no prompt to learn from, one that does not fit, a column that a reward asks for is missing, or edits without steered members.
            ConfigError: rows that the mesh does not divide.
        """
        if bool(edits) != bool(config.num_steered):
            raise InputError(f"num_steered is {config.num_steered} and there are {len(edits)} edits; steered members need edits, and edits members")
        self.model, self.task, self.config, self.edits = model, task, config, tuple(edits)
        self.rollout_mesh = model.mesh if rollout_mesh is None else rollout_mesh
        self.learnt = tuple(index for index in range(len(task.prompts)) if index not in set(task.held_out))
        _check_task(task, self.learnt, config, model)
        check_rows(config.num_rows // config.num_mini_batches, config.micro_batches, model.mesh, "a mini-batch of answers of")
        self.tuning = Tuning(model, config)
        rows = config.rollout_rows or config.drawn_prompts * config.num_generations
        self.sampler = self._sampler(rows)
        self.watch = RewardWatch(config.num_generations, steered=config.steered_members)
        self.timings: dict[str, float] = {}
        self.ended = ""
        self._stream: PromptStream | None = None
        self._tokens = 0
        self._update = jax.jit(self._run, donate_argnums=0, out_shardings=(self.tuning.places(), None))
        self._old = jax.jit(self._policy_logprobs)
        self._reference = jax.jit(self._logprobs)
        self._policy = jax.jit(self.tuning._exported)

    def init(self) -> TunedState:
        """The model's own weights as master copies, or adapters that change nothing yet."""
        return self.tuning.init()

    def stream(self) -> PromptStream:
        """Prompts to learn from, from the beginning."""
        self._stream = PromptStream(len(self.learnt), self.config.drawn_prompts, self.config.seed)
        return self._stream

    def units(self, batch: DrawnPrompts) -> int:
        """Tokens that the last step drew."""
        return self._tokens

    def step(self, state: TunedState, batch: DrawnPrompts) -> tuple[TunedState, Mapping[str, Any]]:
        """Rollouts, rewards, and `num_iterations * num_mini_batches` updates. Metrics: see `rollout_metrics` and `policy_loss`.

        `timings` then holds seconds of rollouts, scoring and updates.

        Raises:
            TooFewGroupsError: with `strict_groups`, where too few groups teach anything.
        """
        seconds = {"rollout": 0.0, "scoring": 0.0}
        decoder = self.policy(state)
        self._tokens = 0
        groups, metrics = self._collect(decoder, batch, seconds)
        start = time.monotonic()
        if groups.rollouts:
            state, found = self._learn(state, groups)
            metrics |= found
            self.ended = _entropy_verdict(found["entropy"], self.config)
        jax.block_until_ready(state)
        self.timings = {f"{name}_seconds": value for name, value in (*seconds.items(), ("update", time.monotonic() - start))}
        return state, metrics

    def evaluate(self, state: TunedState) -> Mapping[str, Any]:
        """Held-out prompts, answered without any edit; see `rollout_metrics.held_out_metrics`."""
        task, config = self.task, self.config
        if not task.held_out:
            return {}
        prompts = [task.prompts[index] for index in task.held_out]
        seeds = draw_seeds(config.seed + 1, task.held_out)
        rollouts = self.sampler(self.policy(state), prompts, config.eval_samples, seeds=seeds)
        scores = self._score([task.held_out[one.prompt] for one in rollouts], rollouts)
        return {"held_out": True, **held_out_metrics(rollouts, scores, config.eval_samples, self._outcome(scores))}

    def policy(self, state: TunedState) -> Decoder:
        """The decoder that rollouts are drawn from, on their mesh."""
        with jax.set_mesh(self.model.mesh):
            decoder = self._policy(state.parameters, self.model.decoder)
        return decoder if self.rollout_mesh is self.model.mesh else shard_tree(decoder, self.rollout_mesh)

    def lower(self) -> jax.stages.Lowered:
        """An update of rollouts as long as they may be, lowered without any array: to look at, or to compile for machines elsewhere."""
        config, mesh = self.config, self.model.mesh
        rows = config.num_rows // config.num_mini_batches
        multiple = max(config.head_chunk, 1)
        length = -(-bucket_length(config.max_prompt_length + config.max_completion_length) // multiple) * multiple

        def array(dtype: Any, *shape: int) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh, len(shape)))

        mini = [*(array(dtype, rows, length) for dtype in (jnp.int32, jnp.int32, jnp.bool_, jnp.float32)),
                *(array(dtype, rows) for dtype in (jnp.float32, jnp.bool_, jnp.bool_))]  # fmt: skip
        old = array(jnp.float32, rows, length) if config.num_iterations * config.num_mini_batches > 1 else None
        reference = array(jnp.float32, rows, length) if config.beta else None
        state = self.tuning.abstract_state()
        with jax.set_mesh(mesh):
            return self._update.lower(state, self.tuning.frozen, mini, old, reference)

    def save(self, state: TunedState, folder: Path) -> Path:
        """Write the trained model; see `Tuning.save`."""
        return self.tuning.save(state, folder)

    def _collect(self, decoder: Decoder, batch: DrawnPrompts, seconds: dict[str, float]) -> tuple[Groups, dict[str, float]]:
        """Groups of the step, drawn until there are enough of them."""
        config, wanted = self.config, self.config.num_prompts
        refill = Refill(wanted, config.max_num_gen_batches if config.dynamic_sampling else 1)
        verdicts: dict[str, int] = {}
        while True:
            groups, kept_P, counts = self._generation_batch(decoder, batch, seconds)
            verdicts = {name: verdicts.get(name, 0) + count for name, count in counts.items()}
            refill = refill.after(groups, kept_P)
            if not refill.wanted:
                break
            assert self._stream is not None
            batch = next(self._stream)
        if line := refill.shortfall(strict=config.strict_groups) if config.dynamic_sampling else "":
            _say(line)
        chosen = refill.chosen
        rollouts = [one for group in chosen for one in group.rollouts]
        scores = _joined([group.scores for group in chosen])
        metrics: dict[str, float] = {f"groups/{name}": float(count) for name, count in (*refill.counts.items(), *verdicts.items())}
        if rollouts:
            metrics |= group_metrics(rollouts, scores, config.num_generations, self._outcome(scores))
        return Groups(rollouts, scores), metrics

    def _generation_batch(self, decoder: Decoder, batch: DrawnPrompts, seconds: dict[str, float]) -> tuple[list[Groups], np.ndarray, dict[str, int]]:
        config = self.config
        numbers = [self.learnt[prompt] for prompt in batch.prompts]
        start = time.monotonic()
        drawn = self.sampler(
            decoder, [self.task.prompts[number] for number in numbers], config.num_generations, seeds=draw_seeds(config.seed, batch.draws),
            edits=self.edits, steered=config.steered_members,
        )  # fmt: skip
        middle = time.monotonic()
        scores = self._score([numbers[one.prompt] for one in drawn], drawn)
        for line in self.watch.update(scores):
            _say(line)
        seconds["rollout"] += middle - start
        seconds["scoring"] += time.monotonic() - middle
        self._tokens += sum(len(one.token_ids) for one in drawn)
        drawn = [Rollout(numbers[one.prompt], one.member, one.token_ids, one.logprobs, one.stopped, one.steered) for one in drawn]
        size = config.num_generations
        groups = [Groups(drawn[i : i + size], _part(scores, slice(i, i + size))) for i in range(0, len(drawn), size)]
        if not config.dynamic_sampling:
            return groups, np.ones(len(groups), bool), {}
        kept = keep_groups(self._outcome(scores), size, steered=config.steered_members)
        return groups, kept.kept_P, dict(kept.counts)

    def _score(self, numbers: Sequence[int], rollouts: Sequence[Rollout]) -> Scores:
        """Rewards of answers to the prompts of those numbers."""
        task = self.task
        inputs = RewardInputs(
            [task.texts[number] for number in numbers], [self._text(one) for one in rollouts], [list(one.token_ids) for one in rollouts],
            {name: [values[number] for number in numbers] for name, values in task.columns.items()},
        )  # fmt: skip
        return score(self.task.rewards, inputs)

    def _text(self, rollout: Rollout) -> str:
        ids = rollout.token_ids[:-1] if rollout.stopped else rollout.token_ids
        return self.model.tokenizer.decode(list(ids), skip_special_tokens=True)

    def _outcome(self, scores: Scores) -> Float[np.ndarray, " N"]:
        """The task's own outcome of each answer."""
        return scores.components[self.config.filter_metric or self.task.rewards[0].name]

    def _learn(self, state: TunedState, groups: Groups) -> tuple[TunedState, dict[str, float]]:
        config = self.config
        found = group_advantages(
            groups.scores.totals_N, config.num_generations, scale_rewards=config.scale_rewards, advantage_eps=config.advantage_eps
        )
        prompts = [self.task.prompts[one.prompt] for one in groups.rollouts]
        batch = policy_batch(
            prompts, groups.rollouts, found.advantages_N, rows=config.num_rows, mask_truncated=config.mask_truncated_completions,
            max_steered_tokens=config.max_steered_tokens, multiple=max(config.head_chunk, 1),
        )  # fmt: skip
        metrics = {f"advantages/{name}": float(count) for name, count in found.counts.items()} | token_metrics(batch)
        sums: dict[str, float] = {}
        parts = config.num_mini_batches
        with jax.set_mesh(self.model.mesh):
            minis = [self._placed(batch, slice(part, None, parts)) for part in range(parts)]
            old = [self._old_logprobs(state, mini) for mini in minis]
            reference = [self._reference(self.model.decoder, mini[:3]) if config.beta else None for mini in minis]
            updates = parts * config.num_iterations
            # An answer is learnt from as many updates after it was drawn as come before in this step.
            metrics["staleness"] = (updates - 1) / 2
            for _ in range(config.num_iterations):
                for mini, before, first in zip(minis, old, reference, strict=True):
                    state, measured = self._update(state, self.tuning.frozen, mini, before, first)
                    sums = {name: sums.get(name, 0.0) + float(value) / updates for name, value in measured.items()}
        return state, metrics | sums

    def _old_logprobs(self, state: TunedState, mini: list[Array]) -> Array | None:
        """Log-probabilities before the first update, of the policy without edits; None where each update is the first."""
        config = self.config
        if config.num_iterations == config.num_mini_batches == 1:
            return None
        return self._old(state.parameters, self.tuning.frozen, mini[:3])

    def _run(
        self, state: TunedState, frozen: Decoder | None, mini: list[Array], old_BT: Array | None, reference_BT: Array | None
    ) -> tuple[TunedState, dict[str, Array]]:
        """One update; `mini` holds tokens, segments, mask, the sampler's log-probabilities, advantages, and which rows are steered and real."""
        counts = policy_counts(mini[2], mini[6])
        loss_config, width = self.config.policy_loss(), self.config.max_completion_length

        def loss(parameters: Any, arrays: list[Array]) -> tuple[Array, dict[str, Array]]:
            tokens, segments, mask, sampled, advantages, steered, _, before, first = arrays
            logp, entropy = self._logprobs_and_entropy(self.tuning.assemble(parameters, frozen), tokens, segments, mask)
            old = jax.lax.stop_gradient(logp) if old_BT is None else before
            value, sums = policy_loss(
                logp, old, advantages, mask, counts, loss_config, width=width, reference_logp_BT=None if reference_BT is None else first
            )
            normal = mask & ~steered[:, None]
            drift = jnp.abs(jax.lax.stop_gradient(logp) - sampled)
            extra = {name: jnp.sum(jnp.where(normal, values, 0.0)) for name, values in (("entropy", entropy), ("sampler_difference", drift))}
            return value, {"loss": jax.lax.stop_gradient(value), "normal": jnp.sum(normal, dtype=jnp.float32), **sums, **extra}

        zeros = jnp.zeros_like(mini[3])
        arrays = [*mini, zeros if old_BT is None else old_BT, zeros if reference_BT is None else reference_BT]
        sums, gradient = accumulate(loss, state.parameters, arrays, self.config.micro_batches)
        state, metrics = self.tuning.update(state, gradient)
        normal = jnp.maximum(sums.pop("normal"), 1)
        means = {name: sums.pop(name) / normal for name in ("entropy", "sampler_difference")}
        loss_value = sums.pop("loss")
        tokens = jnp.maximum(counts.tokens, 1)
        return state, {"loss": loss_value, **means, **{f"policy/{name}": value / tokens for name, value in sums.items()}, **metrics}

    def _logprobs_and_entropy(self, decoder: Decoder, tokens_BT: Array, segments: Array, mask_BT: Array) -> tuple[Array, Array]:
        last = decoder.config.num_layers - 1
        out = decoder(tokens_BT, segment_ids=segments, taps=np.asarray([last], np.int32), stop_after=last)
        assert out.residuals is not None
        return token_logprobs(decoder, out.residuals[0], tokens_BT, mask_BT, temperature=self.config.temperature, chunk=self.config.head_chunk)

    def _logprobs(self, decoder: Decoder, arrays: list[Array]) -> Array:
        return self._logprobs_and_entropy(decoder, *arrays)[0]

    def _policy_logprobs(self, parameters: Any, frozen: Decoder | None, arrays: list[Array]) -> Array:
        return self._logprobs(self.tuning.assemble(parameters, frozen), arrays)

    def _placed(self, batch: PolicyBatch, rows: slice) -> list[Array]:
        arrays = (batch.tokens_BT, batch.segment_ids, batch.mask_BT, batch.sampled_BT, batch.advantages_B, batch.steered_B, batch.real_B)
        put = jnp.asarray if self.model.mesh.size == 1 else partial(place_rows, mesh=self.model.mesh)
        return [put(array[rows]) for array in arrays]

    def _sampler(self, rows: int) -> RolloutSampler:
        config = self.config
        return RolloutSampler(
            self.model.config, self.rollout_mesh, rows=rows, prompt_length=config.max_prompt_length, max_new_tokens=config.max_completion_length,
            sampling=config.sampling(), stop_ids=self.task.stop_ids,
        )  # fmt: skip


def _entropy_verdict(entropy: float, config: DAPOConfig) -> str:
    """Why the run should end at this entropy; "" where it should not."""
    if config.min_entropy and entropy < config.min_entropy:
        return f"the policy's entropy is {entropy:.3g} nats a token, below min_entropy {config.min_entropy:g}"
    if config.max_entropy and not entropy <= config.max_entropy:
        return f"the policy's entropy is {entropy:.3g} nats a token, above max_entropy {config.max_entropy:g}"
    return ""


def _check_task(task: PromptTask, learnt: Sequence[int], config: DAPOConfig, model: LanguageModel) -> None:
    if not learnt:
        raise InputError(f"there are {len(task.prompts)} prompts, {len(task.held_out)} of them held out; give at least one to learn from")
    check_columns(task.rewards, list(task.columns))
    names = [reward.name for reward in task.rewards]
    if config.filter_metric and config.filter_metric not in names:
        raise InputError(f"filter_metric is {config.filter_metric}, expected one of the rewards: {', '.join(names)}")
    room = min(config.max_prompt_length, model.config.max_positions - config.max_completion_length)
    for index, prompt in enumerate(task.prompts):
        if not 0 < len(prompt) <= room:
            raise InputError(
                f"prompt {index} has {len(prompt)} tokens, expected 1 to {room} (max_prompt_length {config.max_prompt_length}, and "
                f"{model.config.max_positions} positions less max_completion_length {config.max_completion_length}); cut it, or leave it out"
            )


def _part(scores: Scores, rows: slice) -> Scores:
    return Scores(scores.totals_N[rows], {name: values[rows] for name, values in scores.components.items()}, scores.errors, {})


def _joined(scores: Sequence[Scores]) -> Scores:
    if not scores:
        return Scores(np.zeros(0), {}, {}, {})
    components = {name: np.concatenate([one.components[name] for one in scores]) for name in scores[0].components}
    return Scores(np.concatenate([one.totals_N for one in scores]), components, {}, {})


def _say(line: str) -> None:
    if is_first():
        print(line, file=sys.stderr)
