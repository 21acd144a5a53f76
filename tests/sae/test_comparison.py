import dataclasses

import numpy as np
import pytest

from qscope_jax.sae.arrays import SAEArrays
from qscope_jax.sae.comparison import compare_codes, first_difference, sample_tokens

F, D, K = 96, 32, 8


def made(**settings) -> SAEArrays:
    rng = np.random.default_rng(0)
    W_dec = rng.standard_normal((F, D))
    drawn = {
        "W_enc": 0.3 * W_dec + 0.1 * rng.standard_normal((F, D)),
        "W_dec": W_dec,
        "b_enc": rng.uniform(-1, 0, F),
        "b_dec": 3 * rng.standard_normal(D),
    }
    return SAEArrays(**{**{name: array.astype(np.float32) for name, array in drawn.items()}, "k": K, **settings})


def jump() -> SAEArrays:
    return made(activation="jumprelu", threshold=np.linspace(0, 2, F, dtype=np.float32), k=0, b_dec=np.zeros(D, np.float32))


@pytest.mark.parametrize("sae", [made(), jump(), made(apply_b_dec_to_input=True)])
def test_an_sae_is_the_same_as_itself_on_tokens_that_use_it(sae):
    found = compare_codes(sae, sae)
    assert (found.same, found.tokens, found.moved, found.ties, found.worst_error) == (True, 256, 0, 0, 0)
    seen = sample_tokens(sae) - sae.b_dec * sae.apply_b_dec_to_input
    z = seen @ sae.W_enc.T + sae.b_enc
    active = (z > (sae.threshold if sae.threshold is not None else 0)).sum(axis=1)
    assert np.median(active) >= 4


@pytest.mark.parametrize("make", [made, jump])
@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec"])
def test_a_change_beyond_rounding_is_seen_and_rounding_is_not(make, name):
    sae = make()
    array = getattr(sae, name)
    noise = np.random.default_rng(1).standard_normal(array.shape).astype(np.float32)
    assert not compare_codes(sae, dataclasses.replace(sae, **{name: array + 0.05 * noise})).same
    assert compare_codes(sae, dataclasses.replace(sae, **{name: array * np.float32(1 + 1e-7)})).same


def test_another_k_moves_tokens():
    assert compare_codes(made(), made(k=K + 1)).moved > 200


def test_features_at_the_edge_of_the_selection_count_as_ties():
    sae = made()
    twins = dataclasses.replace(sae, W_enc=np.repeat(sae.W_enc[: F // 2], 2, axis=0), b_enc=np.repeat(sae.b_enc[: F // 2], 2), k=7)
    nudged = twins.b_enc.copy()
    nudged[1::2] += np.float32(2e-7)  # the later of each pair of twins now wins
    found = compare_codes(twins, dataclasses.replace(twins, b_enc=nudged))
    assert found.moved == 0 and found.ties > 100 and found.same


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, None),
        ({"b_enc": np.where(np.arange(F) == 5, np.float32(-0.0), made().b_enc)}, "b_enc"),
        ({"W_dec": made().W_dec.astype(np.float64)}, "W_dec"),
        ({"b_dec": np.ones(D + 1, np.float32)}, "b_dec"),
        ({"threshold": np.ones(F, np.float32)}, "the list of tensors"),
    ],
)
def test_a_bit_a_type_a_shape_or_a_tensor_that_differs_is_named(changes, expected):
    assert first_difference(made(), dataclasses.replace(made(), **changes)) == expected
