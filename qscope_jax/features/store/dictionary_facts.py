"""What a dictionary says of its features by itself, without any text: the vocabulary that directions speak for, and their nearest neighbours."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qscope_jax.errors import ConfigError
from qscope_jax.features.store.feature_store import Dictionary
from qscope_jax.models.language_model import LanguageModel
from qscope_jax.sae.layer_sae import LayerSAE

# Logits or cosines held at a time: 64 MB.
_BLOCK_ELEMENTS = 2**24


def dictionary_facts(model: LanguageModel, sae: LayerSAE, *, entries: int = 10) -> Dictionary:
    """Promoted and suppressed tokens and nearest directions of every feature; takes 2 F D (V + F) operations, in blocks of features.

    A direction d moves the stream x to x + a d. With the root mean square of x at 1, the final norm passes on g * d, g being its gain, so the
    logits move by a W_U (g * d): the logit lens of the direction (nostalgebraist 2020), without what layers above make of it, nor a soft cap.

    Args:
        model: Whose final norm and head are used.
        sae: Whose directions.
        entries: Tokens on either side and neighbours of each feature, fewer where there are not as many.

    Raises:
        ConfigError: `entries` is below 1.
        ShapeError: the SAE does not fit the model.
    """
    if entries < 1:
        raise ConfigError(f"entries is {entries}, expected 1 or more")
    sae.check_width(model.config.d_model, model.name)
    decoder, directions_FD = model.decoder, sae.autoencoder.W_dec[...]
    head_VD = (decoder.embedding if model.config.tie_embeddings else decoder.head)[...]
    gain_D = decoder.final_norm[...].astype(jnp.float32) + (1 if model.config.unit_offset_norms else 0)
    features, vocabulary = sae.num_features, head_VD.shape[0]
    width, others = min(entries, vocabulary), min(entries, max(features - 1, 0))
    size = min(max(_BLOCK_ELEMENTS // max(vocabulary, features), 1), features)
    unit_FD = _unit(directions_FD)
    parts = []
    for start in range(0, features, size):
        begin = min(start, features - size)  # the last block begins where it still fits, so that one program serves all
        with jax.set_mesh(model.mesh):
            found = _block(directions_FD, unit_FD, gain_D, head_VD, jnp.int32(begin), size, width, others)
        parts.append([np.asarray(array)[start - begin :] for array in found])
    return Dictionary(*(np.concatenate(column) for column in zip(*parts, strict=True)))


@partial(jax.jit, static_argnames=("size", "width", "others"))
def _block(
    directions_FD: Array, unit_FD: Array, gain_D: Array, head_VD: Array, start: Int[Array, ""], size: int, width: int, others: int
) -> tuple[Int[Array, "b W"], Float[Array, "b W"], Int[Array, "b W"], Float[Array, "b W"], Int[Array, "b V"], Float[Array, "b V"]]:
    """Token ids and logits on either side, neighbours and cosines, of `size` features from `start`."""
    rows = jax.lax.dynamic_slice_in_dim(directions_FD, start, size).astype(jnp.float32) * gain_D
    logits = jnp.matmul(rows, head_VD.astype(jnp.float32).T, precision=jax.lax.Precision.HIGHEST)
    promoted, promoted_ids = jax.lax.top_k(logits, width)
    suppressed, suppressed_ids = jax.lax.top_k(-logits, width)
    cosines = jnp.matmul(jax.lax.dynamic_slice_in_dim(unit_FD, start, size), unit_FD.T, precision=jax.lax.Precision.HIGHEST)
    itself = start + jnp.arange(size, dtype=jnp.int32)
    cosines = jnp.where(jnp.arange(unit_FD.shape[0], dtype=jnp.int32) == itself[:, None], -jnp.inf, cosines)
    nearest, neighbours = jax.lax.top_k(cosines, others)
    return promoted_ids, promoted, suppressed_ids, -suppressed, neighbours, nearest


@jax.jit
def _unit(rows_FD: Array) -> Array:
    rows = rows_FD.astype(jnp.float32)
    norms = jnp.linalg.norm(rows, axis=1, keepdims=True)
    return rows / jnp.where(norms > 0, norms, jnp.float32(1))
