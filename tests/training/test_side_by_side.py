"""SAEs that are trained side by side are those trained alone, to the bit, in programs that round as those of users do."""

import json

import pytest

from tests.processes import run_program


@pytest.fixture(scope="module")
def differences():
    """Names of the arrays that differ, for every pair that was compared."""
    done = run_program("tests.training.side_by_side", timeout=250, rounds_as_for_users=True)
    assert done.status == 0, done.err[-2000:]
    return json.loads(done.out.splitlines()[-1])


def test_each_of_several_equals_the_one_that_steps_alone(differences):
    assert differences["steps"] == [[], [], [], []]


def test_each_layers_sae_equals_the_one_trained_alone(differences):
    assert differences["layers"] == [[], []]


def test_seeds_of_a_layer_are_trained_side_by_side(differences):
    assert differences["seeds"] == [[], []] and differences["unlike"] == [True, True]
