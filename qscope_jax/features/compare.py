"""Which features tell two texts, or two sets of texts, apart."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from qscope_jax.errors import InputError, ShapeError
from qscope_jax.features.readout import Readout


@dataclass(frozen=True)
class FeatureDifference:
    """One feature in two sets of texts."""

    feature: int
    mean_a: float
    mean_b: float
    rate_a: float
    rate_b: float


@dataclass(frozen=True, eq=False)
class Comparison:
    """Every feature in two sets of texts at one layer, over counted tokens.

    Attributes:
        layer: 0-based layer.
        mean_a: Mean activation in the first set; likewise `mean_b`.
        rate_a: Firing rate (share of tokens with an activation above 0); likewise `rate_b`.
        tokens: Counted tokens of both sets.
    """

    layer: int
    mean_a: Float[np.ndarray, " F"]
    mean_b: Float[np.ndarray, " F"]
    rate_a: Float[np.ndarray, " F"]
    rate_b: Float[np.ndarray, " F"]
    tokens: tuple[int, int]

    def top(self, count: int, *, by: str = "mean", toward: str = "both") -> list[FeatureDifference]:
        """Features of the largest difference, largest first; ties to the lower index.

        Args:
            count: How many.
            by: `mean` activation or firing `rate` (the official demo's ranking).
            toward: `a`, `b` or `both`: the set in which the feature must be stronger.
        """
        if by not in ("mean", "rate") or toward not in ("a", "b", "both"):
            raise InputError(f"compare by 'mean' or 'rate' toward 'a', 'b' or 'both', not by {by!r} toward {toward!r}")
        difference = self.mean_a - self.mean_b if by == "mean" else self.rate_a - self.rate_b
        scores = {"a": difference, "b": -difference, "both": np.abs(difference)}[toward]
        best = [int(f) for f in np.argsort(-scores, kind="stable")[:count] if scores[f] > 0]
        columns = (self.mean_a, self.mean_b, self.rate_a, self.rate_b)
        return [FeatureDifference(f, *(float(column[f]) for column in columns)) for f in best]


def compare(a: Readout, b: Readout) -> Comparison:
    """Compare two readouts of the same SAE.

    Raises:
        ShapeError: they are of different layers or dictionaries.
        InputError: one of them has no token that counts.
    """
    if (a.layer, a.num_features) != (b.layer, b.num_features):
        raise ShapeError(f"cannot compare layer {a.layer} ({a.num_features} features) with layer {b.layer} ({b.num_features} features)")
    tokens = a.counted_tokens, b.counted_tokens
    if not all(tokens):
        raise InputError("one side has no token that counts: its first token is left out; give longer texts, or keep first tokens")
    (mean_a, rate_a), (mean_b, rate_b) = a.means(), b.means()
    return Comparison(a.layer, mean_a, mean_b, rate_a, rate_b, tokens)
