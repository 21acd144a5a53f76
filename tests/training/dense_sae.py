"""SAE training by dense arrays in float64, by the formulas of the docstrings, with gradients written out and Adam by its paper."""

import numpy as np

PARAMETERS = ("W_enc", "W_dec", "b_enc", "b_dec")


def largest(z, k):
    """The k largest of each row, never negative, in place; ties to the lower index."""
    order = np.argsort(-z, axis=1, kind="stable")[:, :k]
    kept = np.zeros_like(z)
    np.put_along_axis(kept, order, np.maximum(np.take_along_axis(z, order, axis=1), 0), axis=1)
    return kept


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


class DenseSAE:
    """One SAE and its training."""

    def __init__(self, sae, config, scale=1.0, aux_k=6):
        self.names = (*PARAMETERS, "threshold") if hasattr(sae, "threshold") else PARAMETERS
        self.p = {name: np.asarray(getattr(sae, name)[...], np.float64) for name in self.names}
        self.config, self.scale, self.aux_k = config, float(scale), aux_k
        self.m, self.v, self.count = {n: 0 for n in self.names}, {n: 0 for n in self.names}, 0

    def activations(self, x):
        """Code of scaled inputs, [N, F]."""
        z, config = x @ self.p["W_enc"].T + self.p["b_enc"], self.config
        if config.activation == "jumprelu":
            return np.where(z > self.p["threshold"], z, 0)
        if config.activation == "batch_topk":
            return largest(np.maximum(z, 0).reshape(1, -1), config.k * len(z)).reshape(z.shape)
        return largest(z, config.k)

    def loss(self, x, dead, sparsity_weight=0.0):
        """FVU, AuxK and the gradient of all."""
        p, config, x = self.p, self.config, np.asarray(x, np.float64) / self.scale
        z, a = x @ p["W_enc"].T + p["b_enc"], self.activations(x)
        error = x - (a @ p["W_dec"] + p["b_dec"])
        spread = np.sum((x - x.mean(axis=0)) ** 2)
        aux_a = largest(np.where(dead, z, -np.inf), self.aux_k)
        rest = error - aux_a @ p["W_dec"]
        aux_spread = np.sum((error - error.mean(axis=0)) ** 2)
        aux = np.sum(rest**2) / aux_spread if dead.any() else 0.0
        wide_a = largest(z, min(4 * config.k, z.shape[1]))
        down = -2 * error / spread
        wide_down = -2 * (x - (wide_a @ p["W_dec"] + p["b_dec"])) / spread * config.multi_topk_weight
        aux_down = -2 * rest / aux_spread * config.aux_weight * dead.any()
        parts = ((a, down), (wide_a, wide_down), (aux_a, aux_down))
        dz = sum((y @ p["W_dec"].T) * (code > 0) for code, y in parts)
        gradient = {"W_enc": dz.T @ x, "b_enc": dz.sum(axis=0), "W_dec": sum(code.T @ y for code, y in parts)}
        gradient["b_dec"] = (down + wide_down).sum(axis=0)
        if "threshold" in p:
            l0, width = (a > 0).sum(axis=1).mean(), config.bandwidth
            toward_l0 = 2 * sparsity_weight * (l0 / config.k - 1) / (config.k * len(x))
            inside = np.abs(z - p["threshold"]) < width / 2
            slopes = np.where(inside, -(p["threshold"] * (down @ p["W_dec"].T) + toward_l0) / width, 0).sum(axis=0)
            gradient["threshold"] = slopes if config.activation == "jumprelu" else np.zeros_like(p["threshold"])
        return np.sum(error**2) / spread, aux, gradient

    def projected_and_clipped(self, gradient):
        rows = self.p["W_dec"]
        gradient = gradient | {"W_dec": gradient["W_dec"] - np.sum(gradient["W_dec"] * rows, axis=1, keepdims=True) * rows}
        norm = np.sqrt(sum(np.sum(g**2) for g in gradient.values()))
        return {name: g * min(1, self.config.clip / norm) for name, g in gradient.items()}, norm

    def step(self, x, dead):
        gradient, norm = self.projected_and_clipped(self.loss(x, dead)[2])
        rate = float(self.config.schedule()(self.count))
        self.count += 1
        for name, g in gradient.items():
            self.m[name], self.v[name] = 0.9 * self.m[name] + 0.1 * g, 0.999 * self.v[name] + 0.001 * g**2
            mean, square = self.m[name] / (1 - 0.9**self.count), self.v[name] / (1 - 0.999**self.count)
            self.p[name] = self.p[name] - rate * mean / (np.sqrt(square) + 1e-8)
        self.p["W_dec"] /= np.linalg.norm(self.p["W_dec"], axis=1, keepdims=True)
        return norm
