"""How well an SAE rebuilds a stream: sums over tokens, added batch by batch, and every metric that follows from them, with its formula.

Peers give the same name to different quantities; each variant is here under a name of its own. Notation: x a token's stream, xhat its
reconstruction, e = x - xhat, means over counted tokens unless said otherwise, n_b the counted tokens of batch b.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qscope_jax.parallel.rules import on_host
from qscope_jax.sae.autoencoder import SparseAutoencoder
from qscope_jax.sae.sparse import scatter_scalars

Mask = Bool[Array, " N"]

DENSITY_EDGES = np.arange(-7.0, 0.25, 0.25)
"""Edges of the histogram of log10 firing rates: the same for all layers and runs, so that histograms compare."""

_ROUNDING = np.float32(1e-12)


@jax.jit
def reconstruction_sums(sae: SparseAutoencoder, x_ND: Float[Array, "N D"], masks: tuple[Mask, ...]) -> tuple[dict[str, Array], ...]:
    """For each mask, sums over its tokens from which every metric follows, and the stream's mean `mean_D`; one encoding serves all masks.

    `x2` and `error_spread` are sums of squares about the mean: about 0, a stream with a large mean would lose its variance to float32's
    rounding. What a token outside all masks holds, be it NaN, does not matter.
    """
    counted_N = jnp.any(jnp.stack(masks), axis=0)
    x = jnp.where(counted_N[:, None], x_ND.astype(jnp.float32), jnp.float32(0))
    code = sae.encode(x)
    error = x - (rebuilt := sae.decode(code))
    norm_x, norm_rebuilt = jnp.linalg.norm(x, axis=-1), jnp.linalg.norm(rebuilt, axis=-1)
    dot_N = jnp.sum(x * rebuilt, axis=-1)
    e2_N = jnp.sum(jnp.square(error), axis=-1)
    by_token = {
        "e2": e2_N,
        "rebuilt2": jnp.square(norm_rebuilt),
        "dot": dot_N,
        "active": jnp.sum(code.values > 0, axis=-1, dtype=jnp.float32),
        "activation": jnp.sum(code.values, axis=-1),
        "cosine": dot_N / jnp.maximum(norm_x * norm_rebuilt, jnp.float32(1e-8)),
        "l2_ratio": norm_rebuilt / jnp.where(norm_x < 1e-4, jnp.float32(1), norm_x),
    }

    def sums(mask_N: Array) -> dict[str, Array]:
        weight_N = mask_N.astype(jnp.float32)
        tokens = jnp.sum(weight_N)
        mean_D, mean_error_D = (_mean(weight_N, rows, tokens) for rows in (x, error))
        spread_N = jnp.sum(jnp.square(x - mean_D), axis=-1)
        # A token that equals the mean differs from it by the mean's rounding.
        apart_N = mask_N & (spread_N > _ROUNDING * jnp.square(norm_x))
        fired_NK = (code.values > 0) & mask_N[:, None]
        return {
            "tokens": tokens,
            "mean_D": mean_D,
            "x2": jnp.sum(jnp.where(apart_N, spread_N, jnp.float32(0))),
            "error_spread": jnp.sum(weight_N * jnp.sum(jnp.square(error - mean_error_D), axis=-1)),
            "unexplained": jnp.sum(jnp.where(apart_N, e2_N / jnp.where(apart_N, spread_N, 1), jnp.float32(0))),
            "tokens_apart": jnp.sum(apart_N, dtype=jnp.float32),
            "fired_F": scatter_scalars(fired_NK.astype(jnp.float32), code.indices, sae.num_features),
            **{name: jnp.sum(weight_N * value_N) for name, value_N in by_token.items()},
        }

    return tuple(sums(mask_N) for mask_N in masks)


class ReconstructionMetrics:
    """Sums of `reconstruction_sums` over batches, added in float64 on the host, and one quotient at the end."""

    def __init__(self):
        """Begin with nothing counted."""
        self._sums: dict[str, np.ndarray] = {}

    def add(self, sae: SparseAutoencoder, x_ND: Float[Array, "N D"], mask_N: Mask) -> None:
        """Count a batch."""
        self.add_sums(reconstruction_sums(sae, x_ND, (mask_N,))[0])

    def add_sums(self, sums: dict[str, Array]) -> None:
        """Count a batch by its sums."""
        new = {name: on_host(value).astype(np.float64) for name, value in sums.items()}
        new |= _batch_quotients(new)
        old = self._sums or {name: np.zeros_like(value) for name, value in new.items()}
        total = {name: np.asarray(old[name] + value) for name, value in new.items()}
        # Chan et al. 1983: means are pooled, and sums of squares about them gain what lies between the means.
        share = new["tokens"] / max(float(total["tokens"]), 1.0)
        apart_D = new["mean_D"] - old["mean_D"]
        total["mean_D"] = old["mean_D"] + share * apart_D
        total["x2"] = total["x2"] + old["tokens"] * share * np.sum(np.square(apart_D))
        self._sums = total

    @property
    def firing_rate(self) -> Float[np.ndarray, " F"]:
        """Feature density: share of counted tokens at which each feature fires."""
        return self._sums["fired_F"] / max(float(self._sums["tokens"]), 1.0)

    def result(self) -> dict[str, float]:
        """The metrics, over all counted tokens (`tokens`); NaN where a denominator is 0.

        Of the reconstruction:
            `fvu` = sum |e|^2 / sum |x - mean x|^2; `explained_variance` = 1 - fvu (SAELens from 6.45.1); `mse` = mean |e|^2;
            `cossim` = mean cosine of x and xhat; `l2_ratio` = mean |xhat| / |x| (norms below 1e-4 count as 1);
            `relative_reconstruction_bias` = mean |xhat|^2 / mean x.xhat, over all tokens (peers average the quotients of batches).
        Of the code:
            `l0`, `l1` = mean count and sum of activations; `frac_alive`, `dead_fraction` = share of features that fired at all, or never, on
            these tokens; `dense_fraction_1_percent`, `dense_fraction` = share that fired on more than a hundredth, a tenth of them.
        As peers define them:
            `explained_variance_legacy` = mean of 1 - |e|^2 / |x - batch mean|^2 (SAELens before 6.45.1; tokens that equal their batch's
            mean are left out); `frac_variance_explained` = mean over batches of 1 - sum_d var(e) / sum_d var(x) (dictionary_learning; blind
            to a constant error); `saebench_mse` = mean over tokens of |e|^2 / n_b; `saebench_explained_variance` = 1 - E / (S - (S / D)^2),
            E and S the means over batches of mean |e|^2 and mean |x|^2 (SAEBench 0.6.0; its denominator is no variance, and is kept so that
            numbers compare with published ones).
        """
        s = {name: float(value) for name, value in self._sums.items() if value.ndim == 0}
        tokens, batches, width = max(s["tokens"], 1.0), max(s["batches"], 1.0), self._sums["mean_D"].size
        fvu = _quotient(s["e2"], s["x2"])
        power = s["batch_power"] / batches
        dead = float(np.mean(self._sums["fired_F"] == 0))
        return {
            "tokens": s["tokens"],
            "fvu": fvu,
            "explained_variance": 1.0 - fvu,
            "mse": s["e2"] / tokens,
            "l0": s["active"] / tokens,
            "l1": s["activation"] / tokens,
            "cossim": s["cosine"] / tokens,
            "l2_ratio": s["l2_ratio"] / tokens,
            "relative_reconstruction_bias": _quotient(s["rebuilt2"], s["dot"]),
            "frac_alive": 1.0 - dead,
            "dead_fraction": dead,
            "dense_fraction_1_percent": float(np.mean(self.firing_rate > 0.01)),
            "dense_fraction": float(np.mean(self.firing_rate > 0.1)),
            "explained_variance_legacy": 1.0 - _quotient(s["unexplained"], s["tokens_apart"]),
            "frac_variance_explained": 1.0 - _quotient(s["batch_error_share"], s["batches_apart"]),
            "saebench_mse": s["batch_mse"] / tokens,
            "saebench_explained_variance": 1.0 - _quotient(s["batch_mse"] / batches, power - (power / width) ** 2),
        }

    def density_histogram(self) -> dict[str, Any]:
        """Features by log10 of their firing rate: `edges` (`DENSITY_EDGES`), `counts` between them, and the number `silent` that never fired.

        Rates below the first edge count in the first bin.
        """
        rate_F = self.firing_rate
        logs = np.clip(np.log10(rate_F[rate_F > 0]), DENSITY_EDGES[0], DENSITY_EDGES[-1])
        counts: Int[np.ndarray, " bins"] = np.histogram(logs, DENSITY_EDGES)[0]
        return {"edges": DENSITY_EDGES.copy(), "counts": counts, "silent": int(np.sum(rate_F == 0))}


def _mean(weight_N: Array, rows_ND: Array, tokens: Array) -> Array:
    return jnp.einsum("n,nd->d", weight_N, rows_ND, precision=jax.lax.Precision.HIGHEST) / jnp.maximum(tokens, 1)


def _batch_quotients(sums: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What metrics that average over batches need of one batch; zeros of one without tokens."""
    tokens, x2 = float(sums["tokens"]), float(sums["x2"])
    quotients = {
        "batches": tokens > 0,
        "batch_mse": sums["e2"] / max(tokens, 1),
        "batch_power": x2 / max(tokens, 1) + np.sum(np.square(sums["mean_D"])),
        "batches_apart": x2 > 0,
        "batch_error_share": sums["error_spread"] / x2 if x2 > 0 else 0,
    }
    return {name: np.asarray(value, np.float64) for name, value in quotients.items()}


def _quotient(above: float, below: float) -> float:
    return above / below if below else float("nan")
