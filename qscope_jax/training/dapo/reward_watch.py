"""What a person should hear about the rewards of a run: that a function fails, or that one never tells answers apart."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qscope_jax.errors import ConfigError
from qscope_jax.training.dapo.advantages import differs_inside
from qscope_jax.training.dapo.group_filter import normal_members
from qscope_jax.training.dapo.rewards import Scores


@dataclass
class _Seen:
    """What a function gave so far: completions, those with a value, the range of values, whether they differed inside a group."""

    completions: int = 0
    scored: int = 0
    lowest: float = np.inf
    highest: float = -np.inf
    varied: bool = False


class RewardWatch:
    """Looks at the scores of each generation batch and says, each once, what is wrong with a reward.

    Attributes:
        failures: By name, how often a function failed.
        first_errors: By name, what it said the first time.
    """

    def __init__(self, group_size: int, *, steered: Sequence[int] = (), steps: int = 5):
        """Watch a run.

        Args:
            group_size: Completions of a prompt, which stand next to each other.
            steered: Members of a group that are steered; a reward that tells those apart alone does not vary.
            steps: Batches after which a reward that never varied is named.

        Raises:
            ConfigError: steps below 1.
            InputError: a steered member that is not in the group.
        """
        if steps < 1:
            raise ConfigError(f"a reward that never varies is to be named after {steps} steps, expected 1 or more")
        self._normal_G, self._steps, self._batches = normal_members(group_size, steered), steps, 0
        self._seen: dict[str, _Seen] = {}
        self.failures: dict[str, int] = {}
        self.first_errors: dict[str, str] = {}

    def update(self, scores: Scores) -> list[str]:
        """Lines to show after a batch: of a function that failed for the first time, and, after `steps` batches, of one that never varied."""
        lines = []
        for name, error in scores.errors.items():
            self.failures[name] = self.failures.get(name, 0) + 1
            if name not in self.first_errors:
                self.first_errors[name] = error
                lines.append(f"reward {name} failed ({error}); completions of such a batch cannot be scored: mend the function")
        self._batches += 1
        for name, values_N in scores.components.items():
            self._add(self._seen.setdefault(name, _Seen()), values_N)
            if self._batches == self._steps and not self._seen[name].varied:
                lines.append(self._described(name, self._seen[name]))
        return lines

    def _add(self, seen: _Seen, values_N: np.ndarray) -> None:
        values_PG = values_N.reshape(-1, len(self._normal_G))[:, self._normal_G]
        scored_PG = np.isfinite(values_PG)
        seen.completions += values_PG.size
        seen.scored += int(scored_PG.sum())
        seen.lowest = min(seen.lowest, values_PG[scored_PG].min(initial=np.inf))
        seen.highest = max(seen.highest, values_PG[scored_PG].max(initial=-np.inf))
        seen.varied |= bool(differs_inside(values_PG, scored_PG).any())

    def _described(self, name: str, seen: _Seen) -> str:
        when = f"in the first {self._steps} steps"
        if not seen.scored:
            return f"reward {name} scored none of {seen.completions} completions {when}; check the answers in the data and what it expects of them"
        if seen.lowest == seen.highest:
            found = f"was {seen.lowest:g} for all {seen.scored} completions that it scored {when}"
        else:
            found = f"never differed between answers to the same prompt {when}"
        return f"reward {name} {found}; nothing is learnt from it: check what it looks for, and whether the prompts are too hard or too easy"
