import dataclasses

import numpy as np
import pytest

from qscope_jax.sae.comparison import first_difference
from qscope_jax.sae.formats.writers import WRITERS


@pytest.mark.parametrize("to", sorted(WRITERS))
def test_a_layer_is_read_back_from_where_it_was_written(to, arrays, tmp_path):
    writer = WRITERS[to]
    sae = arrays(layer=7, apply_b_dec_to_input=bool(writer.apply_b_dec_to_input))
    path = tmp_path / writer.unit.format(layer=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    writer.write(path, sae)
    found = writer.read_back(path, 7, sae)
    assert first_difference(sae, found) is None
    assert (found.k, found.activation, found.apply_b_dec_to_input) == (sae.k, "topk", sae.apply_b_dec_to_input)
    other = dataclasses.replace(sae, b_dec=np.zeros_like(sae.b_dec))  # what is read back is what is on disk, not what was expected
    assert first_difference(other, writer.read_back(path, 7, other)) == "b_dec"


def test_units_of_different_layers_never_collide():
    for writer in WRITERS.values():
        assert len({writer.unit.format(layer=layer) for layer in range(20)}) == 20
