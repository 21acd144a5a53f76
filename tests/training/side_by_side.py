"""Whether SAEs trained side by side are those trained alone, to the bit, by the emitters that users have: `python -m tests.training.side_by_side`.

Tests run with XLA's older ones, by which sums of stacked arrays round otherwise, so this needs a process of its own.
"""

import json

import jax
import numpy as np

from qscope_jax.data.batches import BatchConfig
from qscope_jax.training.activations import ActivationConfig, ActivationStream
from qscope_jax.training.loop import LoopConfig, train
from qscope_jax.training.sae import SAETraining
from qscope_jax.training.sae_config import SAEConfig
from qscope_jax.training.tokens import TokenStream
from tests.processes import join
from tests.training import characters
from tests.training.test_sae_step import config_of, run

LAYERS, SEEDS = (0, 1), (0, 1, 2, 3)


def main() -> None:
    join()
    several, _ = run(config_of("topk"), None, SEEDS)
    steps = [equal(run(config_of("topk"), None, (seed,))[0], several, place=place) for place, seed in enumerate(SEEDS)]
    both, other = trained(), trained(seed=4)
    layers = [equal(trained((layer,)), both, place=place) for place, layer in enumerate(LAYERS)]
    seeded = trained(num_seeds=2, seed=3)
    seeds = [equal(jax.tree.map(lambda leaf, place=place: leaf[2 * place + 1][None], seeded), other, place=place) for place in range(len(LAYERS))]
    unlike = [not np.array_equal(seeded.sae.W_dec[2 * place], seeded.sae.W_dec[2 * place + 1]) for place in range(len(LAYERS))]
    print(json.dumps({"steps": steps, "layers": layers, "seeds": seeds, "unlike": unlike}))


def equal(single, several, place: int) -> list[str]:
    """Names of what differs between the only SAE of a state and the one at a place of another."""
    pairs = zip(jax.tree_util.tree_flatten_with_path(single)[0], jax.tree.leaves(several), strict=True)
    return [jax.tree_util.keystr(path) for (path, one), other in pairs if not np.array_equal(one[0], other[place])]


def trained(layers=LAYERS, **changes):
    """State of SAEs of the small model's layers after twelve steps."""
    model = characters.make_model()
    streams = ActivationConfig(layers, batch_tokens=32, buffer_batches=4)
    config = SAEConfig(**{"num_features": 40, "k": 4, "steps": 12, "learning_rate": 0.01, "dead_after_tokens": 64, **changes})

    def activations() -> ActivationStream:
        tokens = TokenStream(characters.make_documents(), characters.codes, BatchConfig(4, 24))
        return ActivationStream(model.decoder, tokens, streams, model.mesh)

    return train(SAETraining(model, layers, activations, config, ()), LoopConfig(config.steps, "", progress=False))


if __name__ == "__main__":
    main()
