"""A recipe on a mesh of four devices, for processes that share them: `python -m tests.training.distributed_walk FOLDER RUN STEP`.

At STEP the last process is sent SIGTERM; 0 is never. At the end the folder is refused to a run that does not resume.
"""

import os
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from qscope_jax.errors import SourceError
from qscope_jax.parallel.mesh import make_mesh
from qscope_jax.training.checkpoint import StreamState
from qscope_jax.training.loop import train
from tests.processes import join
from tests.training.walk import settings

ROWS, WIDTH = 8, 6


class Rows:
    """Random rows, of which each process makes its own; the last batch is part of the place."""

    def __init__(self, sharding):
        self.sharding, self.count = sharding, 0
        self.last = self._make(np.zeros((ROWS, WIDTH), np.float32))

    def __next__(self):
        self.count += 1
        fresh = self._make(np.random.default_rng(self.count).standard_normal((ROWS, WIDTH)).astype(np.float32))
        self.last = mix(self.last, fresh)
        return self.last

    def get_state(self):
        return StreamState({"last": self.last}, {"count": self.count})

    def set_state(self, state):
        self.count, self.last = state.cursor["count"], state.arrays["last"]

    def _make(self, rows):
        mine = np.array_split(rows, jax.process_count())[jax.process_index()]
        return jax.make_array_from_process_local_data(self.sharding, mine)


class DistributedWalk:
    """Least squares on sharded rows, its weights replicated and its moments sharded; `stop_at` signals the last process."""

    name, unit = "walk", "rows"

    def __init__(self, stop_at=0):
        self.mesh, self.stop_at, self.done = make_mesh("data=4"), stop_at, 0
        self.rows = NamedSharding(self.mesh, PartitionSpec("data"))
        self.whole = NamedSharding(self.mesh, PartitionSpec())
        self._init = jax.jit(first_state, out_shardings={"weights": self.whole, "moments": self.rows})
        self._step = jax.jit(one_step, donate_argnums=0, out_shardings=({"weights": self.whole, "moments": self.rows}, self.whole))

    def init(self):
        return self._init()

    def stream(self):
        return Rows(self.rows)

    def step(self, state, batch):
        self.done += 1
        if self.done == self.stop_at and jax.process_index() == jax.process_count() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        state, loss = self._step(state, batch)
        return state, {"loss": loss}

    def units(self, batch):
        return batch.shape[0]

    def evaluate(self, state):
        return {"held_out": float(jnp.sum(state["weights"]))}


mix = jax.jit(lambda last, fresh: last * 0.5 + fresh)


def first_state():
    return {"weights": jnp.zeros((WIDTH,), jnp.float32), "moments": jnp.zeros((ROWS, WIDTH), jnp.float32)}


def one_step(state, rows):
    loss, gradient = jax.value_and_grad(lambda weights: jnp.mean(jnp.square(rows @ weights - jnp.sum(rows, axis=1))))(state["weights"])
    moments = 0.9 * state["moments"] + rows * gradient
    return {"weights": state["weights"] - 0.1 * gradient + 0.01 * jnp.mean(moments, axis=0), "moments": moments}, loss


def main(folder: Path, run: str, stop_at: int) -> None:
    join()
    state = train(DistributedWalk(stop_at), settings(folder / run, progress=True, resume=True, keep_best="held_out"))
    local = {name: [np.asarray(shard.data).tobytes().hex() for shard in array.addressable_shards] for name, array in state.items()}
    print("state", jax.device_count(), local["weights"][0], "".join(local["moments"]))
    try:
        train(DistributedWalk(), settings(folder / run))
    except SourceError as error:
        print(error)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
