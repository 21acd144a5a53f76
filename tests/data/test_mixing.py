from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qscope_jax.data.mixing import largest_size, mix
from qscope_jax.errors import InputError

shares = st.sampled_from([0.0, 0.1, 0.25, 1 / 3, 0.5, 0.75, 1.0])


def rows(kind: str, count: int) -> list[dict]:
    return [{"text": f"{kind} {i}"} for i in range(count)]


def test_the_papers_mixture_is_half_and_half():
    mixture = mix(rows("r", 9), rows("s", 4), synthetic_share=0.5)
    assert (mixture.real, mixture.synthetic, mixture.repeats, len(mixture.rows)) == (4, 4, 0, 8)


@given(st.integers(0, 12), st.integers(0, 12), shares)
def test_the_largest_mixture_is_the_largest(real, synthetic, share):
    def fits(size: int) -> bool:
        wanted = int(size * share + 0.5)
        return wanted <= synthetic and size - wanted <= real

    assert largest_size(real, synthetic, share) == max(size for size in range(25) if fits(size))


@given(st.integers(1, 12), st.integers(1, 12), shares, st.integers(0, 5))
def test_counts_are_exact_and_no_row_comes_twice(real, synthetic, share, seed):
    if not (size := largest_size(real, synthetic, share)):
        return
    mixture = mix(rows("r", real), rows("s", synthetic), synthetic_share=share, seed=seed)
    origins = Counter(row["origin"] for row in mixture.rows)
    assert (origins["real"], origins["synthetic"]) == (mixture.real, mixture.synthetic) == (size - int(size * share + 0.5), int(size * share + 0.5))
    assert len({row["text"] for row in mixture.rows}) == size
    assert all(row["text"][0] == row["origin"][0] for row in mixture.rows)


def test_a_seed_is_a_mixture_and_another_seed_another():
    first, again, other = (mix(rows("r", 20), rows("s", 20), synthetic_share=0.5, size=10, seed=seed).rows for seed in (1, 1, 2))
    assert first == again != other


def test_repeats_are_spread_evenly_and_counted():
    mixture = mix(rows("r", 3), rows("s", 2), synthetic_share=0.5, size=10, repeat=True)
    times = Counter(row["text"] for row in mixture.rows)
    assert {times["s 0"], times["s 1"]} == {2, 3} and {times[f"r {i}"] for i in range(3)} == {1, 2}
    assert mixture.repeats == 3 + 2


def test_what_cannot_be_mixed_is_refused():
    cases = [
        ("synthetic_share is 2.0", lambda: mix(rows("r", 1), rows("s", 1), synthetic_share=2.0)),
        ("5 synthetic rows, 1 are given", lambda: mix(rows("r", 9), rows("s", 1), synthetic_share=0.5, size=10)),
        ("5 synthetic rows, 0 are given", lambda: mix(rows("r", 9), [], synthetic_share=0.5, size=10, repeat=True)),
        ("a mixture of 0 rows", lambda: mix([], [], synthetic_share=0.5)),
        ("column 'origin' already", lambda: mix([{"origin": 1}], rows("s", 1), synthetic_share=0.5)),
    ]
    for line, call in cases:
        with pytest.raises(InputError, match=line):
            call()
