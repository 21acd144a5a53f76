"""Gated delta net: linear attention whose memory forgets (a gate) and corrects itself (the delta rule).

Source: Yang, Kautz and Hatamizadeh, "Gated Delta Networks", arXiv 2412.06464, as Qwen3.5 builds it in. Beside the dimension key of
`qscope_jax.models`: J value heads for each of G key heads, K and V here the width of a key and of a value, Q tokens of a chunk, Z chunks.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from qscope_jax.models.attention import SequenceContext
from qscope_jax.models.cache import DeltaState
from qscope_jax.models.config import ModelConfig
from qscope_jax.models.linear import linear, rms_norm

_HIGHEST = jax.lax.Precision.HIGHEST


class GatedDeltaNet(nnx.Module):
    """Mixer with a fixed-size memory S [K, V] for each value head, all of it in float32.

        q, k, v = silu(conv(W_qkv x)),  q and k of unit length, q / sqrt(K)
        g = -exp(A_log) softplus(W_a x + dt_bias),  beta = sigmoid(W_b x)
        S <- exp(g) S;  S <- S + k (beta (v - S^T k))^T;  o = S^T q
        y = W_out (w norm(o) silu(W_z x))

    Documents never meet: the memory and the convolution begin anew with each, and padding leaves both as they are.
    """

    def __init__(self, config: ModelConfig, key: jax.Array):
        """Random weights: normal with standard deviation 0.02, output projection scaled down with depth, decay rates uniform to 16."""
        keys = iter(jax.random.split(key, 7))
        heads, values = config.delta_value_heads, config.delta_value_heads * config.delta_value_dim
        channels = 2 * config.delta_key_heads * config.delta_key_dim + values

        def weight(*shape: int, scale: float = 0.02) -> nnx.Param:
            return nnx.Param((jax.random.normal(next(keys), shape, jnp.float32) * scale).astype(config.dtype))

        self.config = config
        self.in_proj_qkv, self.in_proj_z = weight(channels, config.d_model), weight(values, config.d_model)
        self.in_proj_b, self.in_proj_a = weight(heads, config.d_model), weight(heads, config.d_model)
        self.conv1d = weight(channels, 1, config.delta_conv, scale=config.delta_conv**-0.5)
        self.A_log = nnx.Param(jnp.log(jax.random.uniform(next(keys), (heads,), jnp.float32, 0.01, 16)).astype(config.dtype))
        self.dt_bias = nnx.Param(jnp.ones((heads,), config.dtype))
        self.delta_norm = nnx.Param(jnp.ones((config.delta_value_dim,), config.dtype))
        self.out_proj = weight(config.d_model, values, scale=0.02 / math.sqrt(2 * config.num_layers))

    def __call__(
        self, x_BTD: Float[Array, "B T D"], context: SequenceContext, cache: DeltaState | None, repeat: Int[Array, ""] | int
    ) -> tuple[Float[Array, "B T D"], DeltaState | None]:
        """Mix the tokens of a call with those before them; see `Attention.__call__`."""
        config, documents = self.config, context.documents
        assert documents is not None
        batch, length, _ = x_BTD.shape
        groups, shared = config.delta_key_heads, config.delta_value_heads // config.delta_key_heads
        mixed = linear(x_BTD, self.in_proj_qkv[...])
        before = None if cache is None else cache.inputs[repeat]
        mixed, inputs = short_convolution(mixed, self.conv1d[...], before, documents.ids_BS)
        keys = groups * config.delta_key_dim
        q, k = (_unit(part.reshape(batch, length, groups, -1)) for part in (mixed[..., :keys], mixed[..., keys : 2 * keys]))
        v = mixed[..., 2 * keys :].astype(jnp.float32).reshape(batch, length, groups, shared, -1)
        rate_H = jnp.exp(self.A_log[...].astype(jnp.float32))
        steps = jax.nn.softplus(linear(x_BTD, self.in_proj_a[...]).astype(jnp.float32) + self.dt_bias[...].astype(jnp.float32))
        beta = jax.nn.sigmoid(linear(x_BTD, self.in_proj_b[...]).astype(jnp.float32))
        g, beta = (jnp.where(documents.valid_BT[..., None], part, 0).reshape(batch, length, groups, shared) for part in (-rate_H * steps, beta))
        shape = (batch, groups, shared, config.delta_key_dim, config.delta_value_dim)
        memory = jnp.zeros(shape, jnp.float32) if cache is None else cache.memory[repeat]
        rule = delta_rule if length == 1 else partial(chunked_delta_rule, chunk=config.delta_chunk)
        out, memory = rule(q * config.delta_key_dim**-0.5, k, v, g, beta, memory, documents.number_BT)
        z = linear(x_BTD, self.in_proj_z[...]).reshape(batch, length, groups, shared, -1)
        normed = rms_norm(out.astype(x_BTD.dtype), self.delta_norm[...], config.norm_eps)
        gated = (normed.astype(jnp.float32) * jax.nn.silu(z.astype(jnp.float32))).astype(x_BTD.dtype)
        if cache is not None:
            cache = DeltaState(
                jax.lax.dynamic_update_index_in_dim(cache.memory, memory, repeat, 0),
                jax.lax.dynamic_update_index_in_dim(cache.inputs, inputs.astype(cache.inputs.dtype), repeat, 0),
            )
        return linear(gated.reshape(batch, length, -1), self.out_proj[...]), cache


def short_convolution(
    x_BTC: Float[Array, "B T C"], weight_C1W: Float[Array, "C 1 W"], before: Float[Array, "B _ C"] | None, ids_BS: Int[Array, "B S"]
) -> tuple[Float[Array, "B T C"], Float[Array, "B _ C"]]:
    """Causal depthwise convolution and SiLU, in float32, each token meeting only its own document.

    Args:
        x_BTC: Inputs.
        weight_C1W: Kernel, its last tap for the token itself.
        before: Inputs of the W - 1 slots before; zeros where None.
        ids_BS: Segment ids of those slots and of the tokens.

    Returns:
        The result in the dtype of `x_BTC`, and the inputs of the last W - 1 slots.
    """
    width, length = weight_C1W.shape[-1], x_BTC.shape[1]
    before = jnp.zeros((x_BTC.shape[0], width - 1, x_BTC.shape[2]), x_BTC.dtype) if before is None else before.astype(x_BTC.dtype)
    seen = jnp.concatenate([before, x_BTC], axis=1)
    weight = weight_C1W.astype(jnp.float32)
    total = jnp.zeros(x_BTC.shape, jnp.float32)
    for tap in range(width):
        same = (ids_BS[:, tap : tap + length] == ids_BS[:, width - 1 :])[..., None]
        total += jnp.where(same, seen[:, tap : tap + length].astype(jnp.float32), 0) * weight[:, 0, tap]
    return jax.nn.silu(total).astype(x_BTC.dtype), seen[:, length:]


def delta_rule(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G J V"],
    g: Float[Array, "B T G J"],
    beta: Float[Array, "B T G J"],
    memory: Float[Array, "B G J K V"],
    documents_BT: Int[Array, "B T"],
) -> tuple[Float[Array, "B T G J V"], Float[Array, "B G J K V"]]:
    """Token after token: the reference form, and the one that decoding uses.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        g: Logarithms of the decay; 0 at padding.
        beta: Strengths of the correction; 0 at padding.
        memory: What the documents numbered 0 go on from.
        documents_BT: Number of each token's document, never falling.

    Returns:
        Outputs, and the memory after the last token.
    """

    def step(carry: tuple[Array, Array], token: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        memory, current_B = carry
        q, k, v, g, beta, document_B = token
        memory = jnp.where((document_B == current_B)[:, None, None, None, None], jnp.exp(g)[..., None, None] * memory, 0)
        error = v - jnp.einsum("bgk,bgjkv->bgjv", k, memory, precision=_HIGHEST)
        memory += jnp.einsum("bgk,bgjv->bgjkv", k, beta[..., None] * error, precision=_HIGHEST)
        return (memory, document_B), jnp.einsum("bgk,bgjkv->bgjv", q, memory, precision=_HIGHEST)

    tokens = tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v, g, beta, documents_BT))
    (memory, _), out = jax.lax.scan(step, (memory, jnp.zeros_like(documents_BT[:, 0])), tokens)
    return jnp.moveaxis(out, 0, 1), memory


def chunked_delta_rule(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G J V"],
    g: Float[Array, "B T G J"],
    beta: Float[Array, "B T G J"],
    memory: Float[Array, "B G J K V"],
    documents_BT: Int[Array, "B T"],
    *,
    chunk: int = 64,
) -> tuple[Float[Array, "B T G J V"], Float[Array, "B G J K V"]]:
    """`delta_rule`, whose arguments it shares, by chunks: tokens of a chunk meet in a triangular system, later ones in a product.

    With c the running sum of g in a chunk and D[i, j] = exp(c_i - c_j) for tokens j <= i of one document, 0 elsewhere,

        (I + strictly_lower(beta k k^T D)) [U | W] = [beta v | beta exp(c) k]
        N = U - W S;   o = exp(c) q S + (q k^T D) N;   S <- exp(c_last) S + (exp(c_last - c) k)^T N

    where terms with S hold for tokens of the document that S belongs to, and S keeps only the last document's.
    """
    batch, length = documents_BT.shape
    groups, shared = v.shape[2:4]
    size = min(chunk, length)
    count = -(-length // size)

    def cut(x: Array) -> Array:
        return x.reshape(batch, count, size, *x.shape[2:])

    def by_head(x: Array) -> Array:
        return jnp.moveaxis(cut(jnp.pad(x, ((0, 0), (0, count * size - length), *((0, 0),) * (x.ndim - 2)))), 2, -2)

    q, k, v = by_head(q), by_head(k), by_head(v)  # [B Z G Q K], the same, [B Z G J Q V]
    g, beta = (by_head(x[..., None])[..., 0] for x in (g, beta))  # [B Z G J Q]
    documents = cut(jnp.pad(documents_BT, ((0, 0), (0, count * size - length)), mode="edge"))  # [B Z Q]
    ends = documents[..., -1]
    enters = jnp.pad(ends[:, :-1], ((0, 0), (1, 0)))  # the document that the memory holds when a chunk begins
    reads = (documents == enters[..., None])[:, :, None, None]
    leaves = (documents == ends[..., None])[:, :, None, None]
    decay = jnp.cumsum(g, axis=-1)
    paired = (documents[..., :, None] == documents[..., None, :]) & jnp.tril(jnp.ones((size, size), bool))
    # Masked before exp: the exponents left out are positive and may overflow.
    pairs = jnp.exp(jnp.where(paired[:, :, None, None], decay[..., :, None] - decay[..., None, :], -jnp.inf))
    read = jnp.where(reads, jnp.exp(decay), 0)
    within = jnp.einsum("bzgqk,bzgpk->bzgqp", q, k, precision=_HIGHEST)[:, :, :, None] * pairs
    likeness = jnp.einsum("bzgqk,bzgpk->bzgqp", k, k, precision=_HIGHEST)[:, :, :, None]
    system = beta[..., None] * likeness * pairs
    sides = jnp.concatenate([beta[..., None] * v, (beta * read)[..., None] * k[:, :, :, None]], axis=-1)
    solved = jax.lax.linalg.triangular_solve(system, sides, left_side=True, lower=True, unit_diagonal=True)
    ours, theirs = solved[..., : v.shape[-1]], solved[..., v.shape[-1] :]
    written = jnp.where(leaves, jnp.exp(decay[..., -1:] - decay), 0)
    kept = jnp.where((enters == ends)[:, :, None, None], jnp.exp(decay[..., -1]), 0)

    def step(memory: Array, now: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, ours, theirs, within, read, written, kept = now
        new = ours - jnp.einsum("bgjqk,bgjkv->bgjqv", theirs, memory, precision=_HIGHEST)
        out = read[..., None] * jnp.einsum("bgqk,bgjkv->bgjqv", q, memory, precision=_HIGHEST)
        out += jnp.einsum("bgjqp,bgjpv->bgjqv", within, new, precision=_HIGHEST)
        added = jnp.einsum("bgqk,bgjqv->bgjkv", k, written[..., None] * new, precision=_HIGHEST)
        return kept[..., None, None] * memory + added, out

    chunks = tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, ours, theirs, within, read, written, kept))
    memory, out = jax.lax.scan(step, memory, chunks)  # [Z B G J Q V]
    out = out.transpose(1, 0, 4, 2, 3, 5).reshape(batch, count * size, groups, shared, -1)
    return out[:, :length], memory


def _unit(x: Array) -> Array:
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
