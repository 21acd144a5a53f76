"""Rollouts: several continuations of each prompt, drawn on the mesh with their log-probabilities, some members of a group steered."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from qscope_jax.errors import InputError
from qscope_jax.models.config import ModelConfig
from qscope_jax.models.decoder import Decoder
from qscope_jax.models.edits import Edit
from qscope_jax.models.rollout_steps import PromptStates, RolloutState, begin_rows, draw, no_rollouts, read_prompts
from qscope_jax.models.sampling import Sampler, SamplingConfig
from qscope_jax.parallel.rules import on_host, replicated

# Steps after which the host hears of the tokens drawn, however few rows are done.
_STEPS = 64


@dataclass(frozen=True)
class Rollout:
    """One continuation of a prompt.

    Attributes:
        prompt: Its number among the prompts.
        member: Its number in the prompt's group.
        token_ids: Tokens drawn, the stop token included.
        logprobs: Log-probability of each of them when it was drawn, in `softmax(logits / temperature)` before top-k, top-p and the repetition
            penalty (of the logits themselves where sampling is greedy). A steered member's are those of the steered model.
        stopped: Whether it met a stop token; otherwise it was cut.
        steered: Whether it felt the edits.
    """

    prompt: int
    member: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    stopped: bool
    steered: bool


class RolloutSampler:
    """Draws groups of rollouts in a batch of rows that never waits for its longest: a row that is done begins with the next member.

    Prompts are read once and shared by their group. A member's tokens depend on the model, its prompt, the seeds and its own number alone: not on
    the rows it was drawn beside, how many there are, or which members are steered.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        *,
        rows: int,
        prompt_length: int,
        max_new_tokens: int,
        sampling: SamplingConfig,
        stop_ids: Sequence[int],
        refill_share: float = 0.0625,
    ):
        """Say what programs are for; those of equal sizes are shared, and nothing compiles until the first call.

        Args:
            config: Of the decoders that will be passed.
            mesh: Theirs; rows lie over its axes `data` and `fsdp`.
            rows: Rollouts under way at a time.
            prompt_length: Room for a prompt, in tokens.
            max_new_tokens: Tokens that a rollout has at most, its stop token included; that of `sampling` is not read.
            sampling: How to draw. Its seed and those of the prompts make the keys.
            stop_ids: Tokens that end a rollout, unless `sampling` names some.
            refill_share: Share of rows that must be done before others begin in their place: fewer wait less, and interrupt more often.

        Raises:
            InputError: a size below 1 or beyond the model's positions, rows that the mesh does not divide, a share that is none, or too many stop
                tokens.
        """
        for name, value in (("rows", rows), ("prompt_length", prompt_length), ("max_new_tokens", max_new_tokens)):
            if value < 1:
                raise InputError(f"{name} is {value}, expected at least 1")
        if max_new_tokens >= config.max_positions:
            raise InputError(f"max_new_tokens is {max_new_tokens}; the model has {config.max_positions} positions, leave some for prompts")
        self._shards = mesh.shape["data"] * mesh.shape["fsdp"]
        if rows % self._shards:
            raise InputError(f"{rows} rows cannot be split over {self._shards} devices of the axes data and fsdp; give a multiple of them")
        if not 0 < refill_share <= 1:
            raise InputError(f"refill_share is {refill_share}, expected above 0 and at most 1")
        self.config, self.mesh, self.sampling = config, mesh, sampling
        self.rows, self.prompt_length, self.max_new_tokens = rows, prompt_length, max_new_tokens
        self.stop_ids = tuple(stop_ids if sampling.stop_token_ids is None else sampling.stop_token_ids)
        self.refill_rows = max(1, round(rows * refill_share))
        self.arrays = Sampler.make(sampling, self.stop_ids, rows)

    def __call__(
        self,
        decoder: Decoder,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        *,
        seeds: Sequence[int],
        edits: Sequence[Edit] = (),
        steered: Sequence[int] = (),
        edit_prompts: bool = False,
    ) -> list[Rollout]:
        """Draw `group_size` rollouts of every prompt.

        Args:
            decoder: The model, on the mesh.
            prompts: Token ids.
            group_size: Members of each group.
            seeds: One for each prompt; member m draws its t-th token with a key made of the sampling's seed, this one, m and t.
            edits: Interventions that the members in `steered` feel, at the positions and in the phases that they name, from the last prompt token
                on. Others are untouched to the bit. Their layers, features and strengths compile nothing; how many edits there are does.
            steered: Numbers of the members that feel them.
            edit_prompts: Whether steered members feel the edits at earlier prompt tokens too; each prompt is then read once more for them.

        Returns:
            Rollouts in the order of prompts, and of members in each.

        Raises:
            InputError: what is wrong with the prompts, seeds, members or edits, before anything runs.
            ShapeError: edits made for another model.
        """
        self._check(prompts, group_size, seeds, edits, steered)
        entries = _entries(len(prompts), group_size, sorted(set(steered)), apart=edit_prompts)
        # As many prompts are read at a time as fill all rows with their groups.
        at_once = -(-self.rows // (group_size * self._shards)) * self._shards
        with jax.set_mesh(self.mesh):
            return _Run(self, decoder, prompts, seeds, tuple(edits), edit_prompts).rollouts(entries, at_once)

    def lower(self, decoder: Decoder, edits: Sequence[Edit] = ()) -> tuple[jax.stages.Lowered, RolloutState]:
        """The loop that draws, lowered without any array, and the state that it carries: to plan a run for machines elsewhere.

        Args:
            decoder: Described parameters, with their shardings.
            edits: Interventions.
        """
        everywhere = replicated(self.mesh)

        def described(leaf: Any, place: Any = everywhere) -> Any:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

        with jax.set_mesh(self.mesh):
            first = no_rollouts.lower(self.config, self.rows, self.prompt_length + self.max_new_tokens)
            state = jax.tree.map(described, first.out_info, first.compile().output_shardings)
            sampler, felt = jax.tree.map(described, (self.arrays, tuple(edits)))
            number = described(np.int32(0))
            return draw.lower(decoder, state, sampler, felt, number, number, steps=_STEPS), state

    def _check(self, prompts: Sequence[Sequence[int]], group_size: int, seeds: Sequence[int], edits: Sequence[Edit], steered: Sequence[int]) -> None:
        if group_size < 1 or not len(prompts):
            raise InputError(f"{len(prompts)} prompts in groups of {group_size}; give at least 1 of each")
        room = min(self.prompt_length, self.config.max_positions - self.max_new_tokens)
        for index, prompt in enumerate(prompts):
            if not 0 < len(prompt) <= room:
                limits = f"prompt_length is {self.prompt_length}, and {self.max_new_tokens} new tokens share {self.config.max_positions} positions"
                raise InputError(f"prompt {index} has {len(prompt)} tokens, expected 1 to {room} ({limits}); cut it, or leave it out")
            if not 0 <= min(prompt) <= max(prompt) < self.config.vocab_size:
                raise InputError(f"prompt {index} has tokens from {min(prompt)} to {max(prompt)}; the model has 0 to {self.config.vocab_size - 1}")
        if len(seeds) != len(prompts):
            raise InputError(f"{len(seeds)} seeds for {len(prompts)} prompts; give one for each")
        if not 0 <= min(seeds) <= max(seeds) < 2**32:
            raise InputError(f"seeds run from {min(seeds)} to {max(seeds)}, expected 0 to 4294967295")
        if wrong := [member for member in steered if not 0 <= member < group_size]:
            raise InputError(f"member {wrong[0]} cannot be steered; a group has members 0 to {group_size - 1}")
        if steered and not edits:
            raise InputError(f"members {sorted(steered)} are to be steered, but there are no edits; give some, or steer nobody")
        for edit in edits:
            edit.check(self.config.num_layers, self.config.d_model, 1)  # rows come and go: values for each row of a batch fit none


class _Entry(NamedTuple):
    """A prompt to be read, and the members that begin with it."""

    prompt: int
    edited: bool
    members: tuple[tuple[int, bool], ...]


def _entries(prompts: int, group_size: int, steered: Sequence[int], *, apart: bool) -> list[_Entry]:
    """What is to be read, in order; members are (number, whether steered), the steered first, since as a rule they end last.

    With `apart` steered members have an entry of their own, which is read under the edits.
    """
    odd = tuple((member, True) for member in steered)
    others = tuple((member, False) for member in range(group_size) if member not in steered)
    groups = [(True, odd), (False, others)] if apart else [(False, odd + others)]
    return [_Entry(prompt, edited, members) for prompt in range(prompts) for edited, members in groups if members]


@dataclass
class _Row:
    """A rollout under way."""

    prompt: int
    member: int
    steered: bool
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


@dataclass
class _Run:
    """One call of the sampler: who waits, who is under way."""

    sampler: RolloutSampler
    decoder: Decoder
    prompts: Sequence[Sequence[int]]
    seeds: Sequence[int]
    edits: tuple[Edit, ...]
    edit_prompts: bool

    def rollouts(self, entries: Sequence[_Entry], at_once: int) -> list[Rollout]:
        """Draw them all, `at_once` entries read at a time."""
        size = self.sampler.rows
        state = no_rollouts(self.sampler.config, size, self.sampler.prompt_length + self.sampler.max_new_tokens)
        to_read, rows, done = deque(entries[i : i + at_once] for i in range(0, len(entries), at_once)), dict[int, _Row](), list[Rollout]()
        waiting, read = deque[tuple[int, _Row]](), None
        left = sum(len(entry.members) for entry in entries)
        while left or rows:
            free = [row for row in range(size) if row not in rows]
            while free and left:
                if not waiting:
                    batch = to_read.popleft()
                    read = self._read(batch, at_once)
                    waiting.extend((place, _Row(entry.prompt, *member)) for place, entry in enumerate(batch) for member in entry.members)
                begins = {free.pop(): waiting.popleft() for _ in range(min(len(free), len(waiting)))}
                assert read is not None
                state = self._begin(state, read, begins)
                rows |= {row: one for row, (_, one) in begins.items()}
                left -= len(begins)
            state = self._draw(state, rows, done, min(self.sampler.refill_rows, left) if left else size)
        return sorted(done, key=lambda one: (one.prompt, one.member))

    def _read(self, entries: Sequence[_Entry], size: int) -> PromptStates:
        """Read all but the last token of each prompt, padded on the left."""
        tokens = np.zeros((size, self.sampler.prompt_length), np.int32)
        segments, last, edited = np.zeros_like(tokens), np.zeros(size, np.int32), np.zeros(size, bool)
        for place, entry in enumerate(entries):
            *before, last[place] = self.prompts[entry.prompt]
            tokens[place, tokens.shape[1] - len(before) :] = before
            segments[place, tokens.shape[1] - len(before) :] = 1
            edited[place] = entry.edited
        return read_prompts(self.decoder, tokens, segments, last, self.edits if self.edit_prompts else (), edited)

    def _begin(self, state: RolloutState, read: PromptStates, begins: dict[int, tuple[int, _Row]]) -> RolloutState:
        """Let rows begin, each with the entry at its place among those read."""
        size = self.sampler.rows
        chosen, seeds, steered = np.full(size, -1, np.int32), np.zeros((size, 2), np.uint32), np.zeros(size, bool)
        for row, (place, one) in begins.items():
            chosen[row], seeds[row], steered[row] = place, (self.seeds[one.prompt], one.member), one.steered
        return begin_rows(state, read, chosen, np.uint32(self.sampler.sampling.seed), seeds, steered)

    def _draw(self, state: RolloutState, rows: dict[int, _Row], done: list[Rollout], enough: int) -> RolloutState:
        """Draw until enough rows are done, note the tokens, and take the rows that are done out of those under way."""
        limit = np.int32(self.sampler.max_new_tokens)
        state, drawn = draw(self.decoder, state, self.sampler.arrays, self.edits, limit, np.int32(enough), steps=_STEPS)
        tokens_BT, logprobs_BT, counts_B, done_B = (on_host(x) for x in (*drawn, state.counts_B, state.done_B))
        for row, one in list(rows.items()):
            new = int(counts_B[row]) - len(one.tokens)
            one.tokens += tokens_BT[row, :new].tolist()
            one.logprobs += logprobs_BT[row, :new].tolist()
            if done_B[row]:
                stopped = one.tokens[-1] in self.sampler.stop_ids
                done.append(Rollout(one.prompt, one.member, tuple(one.tokens), tuple(one.logprobs), stopped, one.steered))
                del rows[row]
        return state
