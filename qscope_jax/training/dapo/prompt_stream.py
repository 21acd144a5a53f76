"""Prompts in a seeded order, endlessly, each draw with a number of its own."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from qscope_jax.errors import InputError
from qscope_jax.training.checkpoint import StreamState


class DrawnPrompts(NamedTuple):
    """A generation batch.

    Attributes:
        prompts: Numbers of the prompts.
        draws: Number of each draw in the run, which no other draw has: what random keys are made of.
    """

    prompts: tuple[int, ...]
    draws: tuple[int, ...]


class PromptStream:
    """Goes through all prompts in an order that is drawn anew for each pass; its place is the number of draws so far."""

    def __init__(self, count: int, batch: int, seed: int = 0):
        """Stand before the first draw.

        Args:
            count: Prompts that there are.
            batch: Prompts of a generation batch.
            seed: Of the orders.

        Raises:
            InputError: no prompts, or batches of none.
        """
        if count < 1 or batch < 1:
            raise InputError(f"{count} prompts in batches of {batch}; expected 1 or more of each")
        self._count, self._batch, self._seed, self._drawn = count, batch, seed, 0
        self._pass, self._order = -1, np.zeros(0, np.int64)

    def __next__(self) -> DrawnPrompts:
        """The next batch."""
        draws = tuple(range(self._drawn, self._drawn + self._batch))
        self._drawn += self._batch
        return DrawnPrompts(tuple(self._prompt(draw) for draw in draws), draws)

    def get_state(self) -> StreamState:
        """Place in the order."""
        return StreamState({}, {"drawn": self._drawn, "prompts": self._count})

    def set_state(self, state: StreamState) -> None:
        """Go to a place.

        Raises:
            InputError: it is of other prompts.
        """
        if state.cursor.get("prompts") != self._count:
            raise InputError(f"the run had {state.cursor.get('prompts')} prompts, now there are {self._count}; resume it with the data of then")
        self._drawn = int(state.cursor["drawn"])

    def _prompt(self, draw: int) -> int:
        number, place = divmod(draw, self._count)
        if number != self._pass:
            self._pass, self._order = number, np.random.default_rng([self._seed, number]).permutation(self._count)
        return int(self._order[place])


def draw_seeds(seed: int, draws: Sequence[int]) -> list[int]:
    """A seed for each draw, from the run's; equal runs sample equally, resumed or not."""
    return [int(np.random.SeedSequence([seed, draw]).generate_state(1)[0]) for draw in draws]
