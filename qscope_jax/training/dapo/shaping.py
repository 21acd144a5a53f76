"""Rewards that shape answers whatever they say: against length, against repeated n-grams. Counted in tokens, never in characters."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Integer

from qscope_jax.errors import ConfigError


def soft_overlong_punishment(lengths_N: Integer[np.ndarray, " N"], *, max_completion_len: int, soft_punish_cache: int) -> Float[np.ndarray, " N"]:
    """DAPO's punishment of long completions (arXiv 2503.14476, Eq. 13), right and wrong ones alike.

        0 up to max_completion_len - soft_punish_cache, from there linearly down to -1 at max_completion_len, and -1 beyond

    Args:
        lengths_N: Tokens of each completion, its stop token included.
        max_completion_len: L_max, the longest completion.
        soft_punish_cache: L_cache, the tokens before it in which the punishment grows.

    Raises:
        ConfigError: `soft_punish_cache` is not between 1 and `max_completion_len`.
    """
    check_overlong(max_completion_len, soft_punish_cache)
    over_N = lengths_N.astype(np.float64) - (max_completion_len - soft_punish_cache)
    return 0.0 - np.clip(over_N / soft_punish_cache, 0.0, 1.0)


def check_overlong(max_completion_len: int, soft_punish_cache: int) -> None:
    """Check the two lengths of the punishment.

    Raises:
        ConfigError: `soft_punish_cache` is not between 1 and `max_completion_len`.
    """
    if not 1 <= soft_punish_cache <= max_completion_len:
        raise ConfigError(f"soft_punish_cache is {soft_punish_cache}, expected 1 to max_completion_len, which is {max_completion_len}")


def ngram_repetition_penalty(token_ids: Sequence[int], *, ngram_size: int = 3, max_penalty: float = -1.0) -> float:
    """(1 - distinct n-grams / n-grams) * max_penalty of a completion, as TRL has it; 0 where it is shorter than an n-gram.

    Raises:
        ConfigError: n-grams of no token, or a penalty above 0.
    """
    check_ngrams(ngram_size, max_penalty)
    count = len(token_ids) - ngram_size + 1
    if count < 1:
        return 0.0
    distinct = len({tuple(token_ids[start : start + ngram_size]) for start in range(count)})
    return (1 - distinct / count) * max_penalty if distinct < count else 0.0


def check_ngrams(ngram_size: int, max_penalty: float) -> None:
    """Check the settings of the penalty.

    Raises:
        ConfigError: n-grams of no token, or a penalty above 0.
    """
    if ngram_size < 1:
        raise ConfigError(f"ngram_size is {ngram_size}, expected 1 or more")
    if not -np.inf < max_penalty <= 0:
        raise ConfigError(f"max_penalty is {max_penalty}, expected 0 or less: it is what full repetition costs")
