"""How strongly a feature must be steered for a model to go round in circles."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from qscope_jax.errors import InputError

MULTIPLES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)


class RepetitionStrength(NamedTuple):
    """The smallest strength that was enough.

    Attributes:
        alpha: What the feature's direction is multiplied by.
        multiple: The same as a multiple of the median residual norm.
        shares: Share of completions that repeat, by multiple, of those that were tried.
    """

    alpha: float
    multiple: float
    shares: dict[float, float]


def find_repetition_strength(
    repeats: Callable[[float], Sequence[bool]],
    residual_norm: float,
    *,
    direction_norm: float = 1.0,
    multiples: Sequence[float] = MULTIPLES,
    share: float = 0.8,
) -> RepetitionStrength:
    """Steer ever more strongly until most completions repeat endlessly. The paper does not say how alpha is chosen; this is our way.

    Args:
        repeats: Samples the probe prompts steered with a strength alpha, and says of each completion whether it repeats endlessly.
        residual_norm: Median norm of the layer's residual stream; see `qscope_jax.residual_norms`.
        direction_norm: Norm of the feature's direction; alpha = multiple * residual_norm / direction_norm, so that what is added has `multiple`
            times the stream's norm.
        multiples: Tried in this order, from small to large, up to the first that is enough.
        share: Share of completions that must repeat.

    Raises:
        InputError: norms that are not positive, multiples that do not grow or a share outside of 0 to 1; no completions; or none of the
            strengths is enough.
    """
    if not (0 < residual_norm < np.inf and 0 < direction_norm < np.inf):
        raise InputError(f"norms of the stream, {residual_norm}, and of the direction, {direction_norm}, must be positive; measure them")
    if not multiples or multiples[0] <= 0 or any(low >= high for low, high in zip(multiples, multiples[1:])):
        raise InputError(f"multiples are {list(multiples)}; expected one or more above 0, from small to large")
    if not 0 < share <= 1:
        raise InputError(f"the share of completions that must repeat is {share}, expected above 0 and at most 1")
    shares: dict[float, float] = {}
    for multiple in multiples:
        alpha = multiple * residual_norm / direction_norm
        flags = list(repeats(alpha))
        if not flags:
            raise InputError("there are no completions of probe prompts to look for repetition in; give one prompt or more")
        shares[multiple] = sum(map(bool, flags)) / len(flags)
        if shares[multiple] >= share:
            return RepetitionStrength(alpha, multiple, shares)
    best = max(shares, key=lambda multiple: shares[multiple])
    raise InputError(
        f"no strength up to {multiples[-1]:g} times the residual norm makes {share:.0%} of completions repeat, at most {shares[best]:.0%} at "
        f"{best:g}; choose another feature or layer, or larger multiples"
    )
