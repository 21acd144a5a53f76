import pytest

from qscope_jax.data.buckets import bucket_length
from qscope_jax.errors import InputError


def test_ladder_is_powers_of_two_and_their_halves_again():
    assert sorted({bucket_length(n) for n in range(1, 257)}) == [16, 24, 32, 48, 64, 96, 128, 192, 256]


def test_bucket_is_the_smallest_rung_that_holds_the_length():
    rungs = [16, 24, 32, 48, 64, 96, 128]
    for n in range(1, 129):
        assert bucket_length(n) == min(rung for rung in rungs if rung >= n)


@pytest.mark.parametrize("minimum", [1, 8, 12, 16, 40, 100, 128])
def test_rungs_are_multiples_of_8_from_any_minimum(minimum):
    for n in range(1, 600, 7):
        length = bucket_length(n, minimum=minimum)
        assert length % 8 == 0 and length >= max(n, minimum)
        assert bucket_length(length, minimum=minimum) == length


def test_lengths_up_to_a_hundred_thousand_use_few_buckets():
    assert len({bucket_length(n) for n in range(1, 100_001, 3)}) <= 27


@pytest.mark.parametrize("n", [0, -3])
def test_no_tokens_have_no_bucket(n):
    with pytest.raises(InputError, match="at least 1"):
        bucket_length(n)


def test_minimum_below_1_is_refused():
    with pytest.raises(InputError, match="smallest bucket"):
        bucket_length(5, minimum=0)
