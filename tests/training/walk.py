"""A recipe that sums its batches: cheap, and wrong in every digit if a batch is missed or repeated."""

import json

import jax
import jax.numpy as jnp

from qscope_jax.training.checkpoint import StreamState
from qscope_jax.training.loop import LoopConfig


class Noise:
    """A stream of numbers whose place is a counter and whose buffer is the last one."""

    def __init__(self):
        self.count, self.last = 0, jnp.zeros((3,), jnp.float32)

    def __next__(self):
        self.count += 1
        self.last = self.last * 0.5 + jax.random.normal(jax.random.fold_in(jax.random.key(0), self.count), (3,), jnp.float32)
        return self.last

    def get_state(self):
        return StreamState({"last": self.last}, {"count": self.count})

    def set_state(self, state):
        self.count, self.last = state.cursor["count"], state.arrays["last"]


class Walk:
    """The state is a running sum of `width` numbers; `at` maps steps to what happens there."""

    name, unit = "walk", "steps"

    def __init__(self, width=3, at=None):
        self.width, self.at = width, at or {}
        self._step = jax.jit(lambda state, x: {"sum": state["sum"] * 1.01 + jnp.sum(x), "steps": state["steps"] + 1}, donate_argnums=0)

    def init(self):
        return {"sum": jnp.zeros((self.width,), jnp.float32), "steps": jnp.int32(0)}

    def stream(self):
        return Noise()

    def step(self, state, batch):
        state = self._step(state, batch)
        self.at.get(int(state["steps"]), lambda: None)()
        return state, {"loss": state["sum"][0], "parts": state["sum"][:2]}

    def units(self, batch):
        return 1

    def evaluate(self, state):
        total = float(state["sum"].sum())
        return {"held_out": total, "spread": [total, abs(total)]}


def settings(folder="", **changes) -> LoopConfig:
    return LoopConfig(**{"steps": 10, "log_every": 2, "eval_every": 4, "checkpoint_every": 3, "progress": False, "run_dir": str(folder), **changes})


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
