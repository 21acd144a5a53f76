"""Benchmarks that light up the same features, joined step by step."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.cluster.hierarchy import fcluster, leaves_list, linkage, optimal_leaf_ordering
from scipy.spatial.distance import squareform

from qscope_jax.errors import InputError


@dataclass(frozen=True, eq=False)
class Clustering:
    """A tree over benchmarks.

    Attributes:
        joins: SciPy's linkage table: two clusters, the distance at which they join, and the number of benchmarks in both; [N - 1, 4].
        order: Benchmarks in an order in which neighbours are alike.
    """

    joins: Float[np.ndarray, "M 4"]
    order: tuple[int, ...]

    def groups(self, distance: float) -> list[list[int]]:
        """Benchmarks that have joined below a distance, in the tree's order."""
        labels = fcluster(self.joins, distance, criterion="distance")
        found: dict[int, list[int]] = {}
        for benchmark in self.order:
            found.setdefault(int(labels[benchmark]), []).append(benchmark)
        return list(found.values())


def cluster(overlap_min: Float[np.ndarray, "N N"]) -> Clustering:
    """Cluster benchmarks by the distance 1 - overlap_min; clusters are as far apart as their benchmarks are in the mean.

    Raises:
        InputError: fewer than two benchmarks.
    """
    if len(overlap_min) < 2:
        raise InputError(f"{len(overlap_min)} benchmark given to cluster; expected 2 or more")
    distance = 1 - (overlap_min + overlap_min.T) / 2
    np.fill_diagonal(distance, 0)
    condensed = squareform(np.maximum(distance, 0), checks=False)
    joins = linkage(condensed, method="average")
    joins = optimal_leaf_ordering(joins, condensed)
    return Clustering(joins, tuple(int(leaf) for leaf in leaves_list(joins)))
