"""SAEs of two layers on a mesh of four devices, for processes that share them: `python -m tests.training.distributed_sae FOLDER AXES STEPS [KILL]`.

At the step KILL the process kills itself.
"""

import json
import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from qscope_jax.data.batches import BatchConfig
from qscope_jax.training.activations import ActivationConfig, ActivationStream
from qscope_jax.training.loop import LoopConfig, train
from qscope_jax.training.sae import SAETraining
from qscope_jax.training.sae_config import SAEConfig
from qscope_jax.training.tokens import TokenStream
from tests.processes import join
from tests.training import characters

LAYERS, LANES, STEPS = (0, 1), 4, 8


def recipe(axes: str) -> SAETraining:
    model = characters.make_model(axes)
    settings = ActivationConfig(LAYERS, batch_tokens=32, buffer_batches=4, lanes=LANES)
    config = SAEConfig(64, 4, STEPS, learning_rate=0.01, dead_after_tokens=100, ema=0.9)

    def activations() -> ActivationStream:
        tokens = TokenStream(characters.make_documents(), characters.codes, BatchConfig(8, 24), lanes=LANES, mesh=model.mesh)
        return ActivationStream(model.decoder, tokens, settings, model.mesh)

    return SAETraining(model, LAYERS, activations, config, characters.make_documents(10, seed=9, shortest=8))


def main(folder: Path, axes: str, steps: int, kill_at: int = 0) -> None:
    join()
    training = recipe(axes)
    step, done = training.step, []

    def until_killed(state, batch):
        done.append(batch)
        if len(done) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(state, batch)

    training.step = until_killed
    state = train(training, LoopConfig(steps, str(folder), log_every=1, checkpoint_every=3, resume=True, progress=False))
    found = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        found[jax.tree_util.keystr(path)] = np.asarray(multihost_utils.process_allgather(leaf, tiled=True)).ravel().tolist()
    print(json.dumps({"devices": jax.device_count(), "state": found}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))
