import numpy as np

from qscope_jax.demo.chapters import training


def test_training_leaves_an_sae_a_layer_and_measures_the_worst_of_them(tour):
    chapter = training.run(tour)
    assert [sae.layer for sae in tour.saes] == [0, 1] == list(chapter.data["layers"])
    assert all((sae.num_features, sae.k) == (64, 4) for sae in tour.saes)
    layers = chapter.data["layers"].values()
    fvu, dead = (check.value for check in chapter.checks)
    assert fvu == max(metrics["fvu"] for metrics in layers) and dead == max(metrics["dead_in_training"] for metrics in layers)
    assert dead == max(1 - np.mean(alive) for alive in tour.alive.values())
    # Five steps do not suffice, and the check says so.
    assert fvu > 0.2 and not chapter.checks[0].met
    assert chapter.data["tokens"] == 5 * 64 and all(np.isfinite(metrics["ce_loss_score"]) for metrics in layers)
