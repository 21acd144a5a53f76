"""Which features a benchmark's prompts light up: footprint, coverage curve, redundancy and overlap, in closed form.

After the Qwen-Scope report (arXiv 2605.11887, section 4): a sample's features are those that fire at its last token, a benchmark's footprint is
their union. Means over subsets of samples need no sampling: a subset of n of N samples misses a feature that m samples have with probability
C(N - m, n) / C(N, n).
"""

import typing
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array, vstack

from qscope_jax.errors import InputError

# Numbers of the table (subset sizes by numbers of samples) computed at a time: 32 MB.
_AT_ONCE = 2**22


@dataclass(frozen=True, eq=False)
class Footprint:
    """The features of a benchmark of N samples.

    Attributes:
        name: The benchmark.
        samples: N, those that fire nothing included.
        silent: Samples that fire nothing.
        counts: m_j, the samples whose last token fires feature j.
    """

    name: str
    samples: int
    silent: int
    counts: Int[np.ndarray, " F"]

    @cached_property
    def features(self) -> Bool[np.ndarray, " F"]:
        """F(D), the union over samples (Eq. 3)."""
        return self.counts > 0

    @cached_property
    def size(self) -> int:
        """|F(D)|."""
        return int(np.count_nonzero(self.counts))

    @cached_property
    def expected(self) -> Float[np.ndarray, " N"]:
        """Features that n = 1, ..., N samples fire, in the mean over all subsets of that size."""
        present, features = np.unique(self.counts[self.features], return_counts=True)
        expected = np.empty(self.samples)
        step = max(_AT_ONCE // len(present), 1)
        for first in range(0, self.samples, step):
            sizes = np.arange(first + 1, min(first + step, self.samples) + 1)
            expected[first : first + step] = _presence(self.samples, present[None, :], sizes[:, None]) @ features
        return expected

    @property
    def coverage(self) -> Float[np.ndarray, " N"]:
        """c_n, the share of the footprint that n samples cover (Eq. 7)."""
        return self.expected / self.size

    @property
    def area(self) -> float:
        """AUC(c), the mean of c_n over n (Eq. 8)."""
        return self.redundancy * self.size / self.samples

    @property
    def redundancy(self) -> float:
        """R-hat (Eq. 9) by its closed form, (N + 1) / |F|^2 * sum of m / (m + 1); it grows with N."""
        present = self.counts[self.features].astype(np.float64)
        return float((self.samples + 1) * np.sum(present / (present + 1)) / self.size**2)

    def redundancy_at(self, samples: int) -> float:
        """R-hat of a benchmark cut down to so many samples, which makes benchmarks of different sizes comparable.

        Mean footprints take the place of a subset's own; with all N samples this is `redundancy`.

        Raises:
            InputError: the benchmark has fewer samples, or fewer than 1 was asked for.
        """
        self._check_size(samples)
        return float(self.expected[:samples].sum() / self.expected[samples - 1] ** 2)

    def presence(self, samples: int) -> Float[np.ndarray, " F"]:
        """Probability of each feature to fire somewhere in so many samples, drawn without replacement.

        Raises:
            InputError: the benchmark has fewer samples, or fewer than 1 was asked for.
        """
        self._check_size(samples)
        return _presence(self.samples, self.counts, np.asarray(samples))

    def samples_for(self, share: float) -> int:
        """Fewest samples that cover this share of the footprint, in the mean over subsets.

        Raises:
            InputError: the share is not above 0 and at most 1.
        """
        if not 0 < share <= 1:
            raise InputError(f"share of the footprint is {share}; expected a number above 0 and at most 1")
        # The last value is |F| up to rounding, and a share of 1 must find it.
        return int(np.searchsorted(self.coverage, share * (1 - 1e-12))) + 1

    def _check_size(self, samples: int) -> None:
        if not 1 <= samples <= self.samples:
            raise InputError(f"{self.name}: asked for {samples} of its {self.samples} samples; give 1 to {self.samples}")


def footprint(name: str, last: csr_array) -> Footprint:
    """The footprint of a benchmark.

    Args:
        name: The benchmark, for messages.
        last: Codes of the samples' last tokens [N, F], such as `TextFeatures.last`.

    Raises:
        InputError: there is no sample, or none fires a feature.
    """
    table = csr_array(last)
    firing = np.flatnonzero(table.data > 0)
    rows = np.searchsorted(table.indptr, firing, side="right") - 1
    samples, features = typing.cast(tuple[int, int], table.shape)
    if not len(firing):
        raise InputError(f"benchmark {name}: none of the last tokens of its {samples} samples fires a feature; check the SAE and the layer")
    counts = np.bincount(table.indices[firing], minlength=features)
    return Footprint(name, samples, samples - len(np.unique(rows)), counts.astype(np.int64))


def sampled_redundancy(last: csr_array, *, orders: int = 200, seed: int = 0) -> tuple[float, float]:
    """R-hat by sampling, to check the closed form: mean over random orders of the samples, and its standard error.

    The first n samples of a random order are a random subset, so that an order gives one subset of each size.

    Args:
        last: Codes of the samples' last tokens [N, F].
        orders: Random orders, at least 2.
        seed: Of the orders.

    Raises:
        InputError: fewer than 2 orders, or no sample fires.
    """
    if orders < 2:
        raise InputError(f"orders is {orders}; a mean with an error needs 2 or more")
    one = footprint("sampled", last)
    table = csr_array(last).tocoo()
    fires = table.data > 0
    rows, features = table.coords[0][fires], table.coords[1][fires]
    rng = np.random.default_rng(seed)
    found = np.empty(orders)
    for index in range(orders):
        place = rng.permutation(one.samples)
        first = np.full(len(one.counts), one.samples)
        np.minimum.at(first, features, place[rows])
        # A feature first met at place p is covered by subsets of p + 1, ..., N samples.
        found[index] = np.sum(one.samples - first) / one.size**2
    return float(found.mean()), float(found.std(ddof=1) / np.sqrt(orders))


def overlap_matrix(footprints: Sequence[Footprint]) -> Float[np.ndarray, "N N"]:
    """overlap(i, j) = |F_i and F_j| / |F_i|, the share of benchmark i that j covers (Eq. 10)."""
    shared, sizes = _shared(footprints)
    return shared / sizes[:, None]


def overlap_min_matrix(footprints: Sequence[Footprint]) -> Float[np.ndarray, "N N"]:
    """overlap_min(i, j) = |F_i and F_j| / min(|F_i|, |F_j|) (Eq. 11)."""
    shared, sizes = _shared(footprints)
    return shared / np.minimum(sizes[:, None], sizes[None, :])


def equal_overlap_min_matrix(footprints: Sequence[Footprint], samples: int) -> Float[np.ndarray, "N N"]:
    """overlap_min of benchmarks cut down to the same number of samples, drawn independently of each other, in mean counts.

    A footprint grows with the number of samples, and a larger one covers more of any other; this takes that out. On the diagonal are two
    draws from one benchmark, which is as much as overlap can be at this size.

    Raises:
        InputError: a benchmark has fewer samples.
    """
    presence = np.stack([one.presence(samples) for one in footprints])
    shared, sizes = presence @ presence.T, presence.sum(axis=1)
    return shared / np.minimum(sizes[:, None], sizes[None, :])


def _shared(footprints: Sequence[Footprint]) -> tuple[Float[np.ndarray, "N N"], Float[np.ndarray, " N"]]:
    table = vstack([csr_array(one.features[None, :].astype(np.float64)) for one in footprints], format="csr")
    return (table @ table.T).toarray(), np.array([one.size for one in footprints], np.float64)


def _presence(samples: int, present: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Probability that a subset of `sizes` of the samples has one of the `present` ones; in logarithms, since the binomials overflow."""
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, samples + 1, dtype=np.float64)))])
    rest = samples - present - sizes
    missed = logs[samples - present] + logs[samples - sizes] - logs[samples] - logs[np.maximum(rest, 0)]
    return np.where(rest < 0, 1.0, -np.expm1(np.minimum(missed, 0.0)))
