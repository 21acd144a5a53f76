"""Dynamic sampling: prompts whose answers are all right or all wrong teach nothing and are replaced by further ones (arXiv 2503.14476, Eq. 11).

What tells them apart should be the bare outcome of the task. By a shaped reward groups of wrong answers would stay, for their lengths alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from qscope_jax.errors import ConfigError, InputError, QscopeError, ShapeError
from qscope_jax.training.dapo.advantages import differs_inside


class TooFewGroupsError(QscopeError):
    """Not as many prompts as wanted had answers that differ, within the batches that could be drawn."""


class KeptGroups(NamedTuple):
    """The verdict on P groups.

    Attributes:
        kept_P: Groups inside which the metric differs.
        counts: `kept`; `all_right` and `all_wrong`, dropped for one value above 0, or not above; `unscorable`, dropped for fewer than two values.
    """

    kept_P: Bool[np.ndarray, " P"]
    counts: Mapping[str, int]


def keep_groups(metric_N: Float[np.ndarray, " N"], group_size: int, *, steered: Sequence[int] = ()) -> KeptGroups:
    """Keep groups inside which the metric differs among normal members: max != min, whatever the std rounds to.

    A steered member is nearly always the worst; if it counted, every group would stay.

    Args:
        metric_N: Outcome of each completion, completions of a prompt next to each other; what is not finite does not count.
        group_size: Completions of a prompt.
        steered: Members of each group, from 0, that do not count.

    Raises:
        ShapeError: values that are not whole groups.
        InputError: fewer than two normal members, or a steered one that is not in the group.
    """
    if group_size < 1 or len(metric_N) % group_size:
        raise ShapeError(f"{len(metric_N)} values are not whole groups of {group_size}; give one for each completion")
    normal_G = normal_members(group_size, steered)
    if normal_G.sum() < 2:
        raise InputError(f"{group_size} answers to a prompt with members {list(steered)} steered; expected two normal ones or more to compare")
    metric_PG = metric_N.astype(np.float64).reshape(-1, group_size)
    counted_PG = np.isfinite(metric_PG) & normal_G
    kept_P, few_P = differs_inside(metric_PG, counted_PG), counted_PG.sum(axis=1) < 2
    right_P = ~kept_P & ~few_P & (np.where(counted_PG, metric_PG, -np.inf).max(axis=1) > 0)
    counts = {"kept": int(kept_P.sum()), "all_right": int(right_P.sum()), "unscorable": int(few_P.sum())}
    return KeptGroups(kept_P, {**counts, "all_wrong": len(kept_P) - sum(counts.values())})


def normal_members(group_size: int, steered: Sequence[int]) -> Bool[np.ndarray, " G"]:
    """Which members of a group are not steered.

    Raises:
        InputError: a steered member that is not in the group.
    """
    if outside := [member for member in steered if not 0 <= member < group_size]:
        raise InputError(f"member {outside[0]} is to be steered in groups of {group_size}; members are 0 to {group_size - 1}")
    normal_G = np.ones(group_size, bool)
    normal_G[list(steered)] = False
    return normal_G


@dataclass(frozen=True)
class Refill:
    """The kept groups of one optimiser step while they come in; `after` gives the next state.

    Attributes:
        target: Groups wanted.
        max_num_gen_batches: Batches of new prompts that may be drawn, 1 or more.
        groups: Kept ones in the order in which they came, surplus included.
        batches: Batches drawn.
        prompts: Prompts drawn.
    """

    target: int
    max_num_gen_batches: int
    groups: tuple[Any, ...] = ()
    batches: int = 0
    prompts: int = 0

    def __post_init__(self):
        """Check ranges."""
        if self.target < 1 or self.max_num_gen_batches < 1:
            raise ConfigError(f"{self.target} prompts a step from at most {self.max_num_gen_batches} generation batches; expected 1 or more of each")

    def after(self, groups: Sequence[Any], kept_P: Bool[np.ndarray, " P"]) -> "Refill":
        """The state after a batch.

        Raises:
            InputError: the step wants no further batch, or not one verdict for each group.
        """
        if not self.wanted:
            raise InputError(f"a batch is added after {self.batches} of {self.max_num_gen_batches} with {len(self.groups)} groups of {self.target}")
        if len(groups) != len(kept_P):
            raise InputError(f"{len(kept_P)} verdicts for {len(groups)} groups; give one for each")
        added = tuple(group for group, kept in zip(groups, kept_P, strict=True) if kept)
        return replace(self, groups=self.groups + added, batches=self.batches + 1, prompts=self.prompts + len(groups))

    @property
    def wanted(self) -> bool:
        """Whether to draw another batch of new prompts."""
        return len(self.groups) < self.target and self.batches < self.max_num_gen_batches

    @property
    def chosen(self) -> tuple[Any, ...]:
        """The first `target` groups. Surplus is not carried over: the next step's policy did not sample it."""
        return self.groups[: self.target]

    @property
    def missing(self) -> int:
        """Groups that the step has to do without, if it ends here."""
        return max(self.target - len(self.groups), 0)

    @property
    def counts(self) -> dict[str, int]:
        """To be logged: `batches` and `prompts` drawn, `groups` chosen, `surplus` thrown away, `missing`."""
        chosen = len(self.chosen)
        return {
            "batches": self.batches, "prompts": self.prompts, "groups": chosen, "surplus": len(self.groups) - chosen, "missing": self.missing,
        }  # fmt: skip

    def shortfall(self, *, strict: bool = False) -> str:
        """What to say where the cap was reached with groups missing, in one line; empty where none is.

        Raises:
            TooFewGroupsError: the same, where `strict` does not let the step go on.
        """
        if self.wanted or not self.missing:
            return ""
        found = f"{len(self.groups)} of {self.target} prompts had answers that differ, out of {self.prompts} in {self.batches} generation batches"
        if strict:
            raise TooFewGroupsError(f"{found}; raise max_num_gen_batches, take other prompts, or let steps go on with fewer")
        return f"{found}; the step " + ("goes on with those" if self.groups else "changes nothing")
