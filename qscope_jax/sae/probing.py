"""Sparse probing: how well few features tell classes of texts apart, beside as few raw dimensions and beside all of them.

After Gurnee et al. 2023 (arXiv 2305.01610) and SAEBench: a text is its mean code over ordinary tokens, k features are chosen by the
difference of class means, and a logistic regression (C = 1) on them is scored on texts held out. Choice, scaling and fit see the training
split only. Several classes are probed one against the rest.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy.sparse import coo_array, csr_array, vstack

from qscope_jax.data.text_splits import distinct_texts, hold_out
from qscope_jax.errors import ConfigError, InputError
from qscope_jax.models.language_model import LanguageModel, forward
from qscope_jax.sae.autoencoder import SparseAutoencoder, SparseCode
from qscope_jax.sae.filtering import MAX_NORM_MULTIPLE
from qscope_jax.sae.layer_sae import LayerSAE
from qscope_jax.sae.metrics import count_tokens

FEWEST_TEXTS = 5
"""Texts that a class needs."""

Indices: TypeAlias = Int[np.ndarray, " _"]
Source: TypeAlias = Literal["sae", "residual", "dense"]


@dataclass(frozen=True)
class ProbingConfig:
    """How texts are split and read."""

    ks: tuple[int, ...] = (1, 2, 5)
    """Features that a probe may use."""
    test_share: float = 0.2
    """Share of each class's texts that is held out, at least one."""
    seed: int = 0
    """Of the split."""
    standardize: bool = True
    """Scale what a probe reads to unit variance over the training split. Without it, as SAEBench does, the penalty depends on the unit of
    activations: mean codes are small numbers, and a probe on small numbers gives the commoner answer whatever it reads."""
    batch_size: int = 16
    """Texts a forward pass."""
    drop_first: bool = True
    """Leave the first token of every text out."""
    max_norm_multiple: float = MAX_NORM_MULTIPLE
    """Leave tokens out whose norm exceeds this multiple of the median; 0 keeps all."""

    def __post_init__(self):
        """Check ranges."""
        if not self.ks or min(self.ks) < 1 or not 0 < self.test_share < 1:
            raise ConfigError(f"ks is {self.ks} and test_share {self.test_share}, expected numbers of 1 or more and a share between 0 and 1")


@dataclass(frozen=True)
class Probe:
    """One logistic regression, scored on the test split.

    Attributes:
        label: The class told from all others.
        source: What it reads: `sae` features, as few dimensions of the `residual` stream, or all of them (`dense`).
        k: Columns it reads.
        accuracy: Share of test texts told right.
        f1: Harmonic mean of precision and recall of the class.
        columns: The features or dimensions, best first; empty for `dense`.
        converged: Whether the fit ended within its 1,000 iterations.
    """

    label: str
    source: Source
    k: int
    accuracy: float
    f1: float
    columns: tuple[int, ...]
    converged: bool


@dataclass(frozen=True)
class ProbingResult:
    """The probes of one layer.

    Attributes:
        layer: 0-based layer.
        probes: One for each class, source and k.
        majority: For each class the accuracy of always giving the commoner answer of the test split.
        train: Texts to learn from.
        test: Texts held out.
        repeated: Texts left out as they occur before, with the same class.
        contradictory: Texts left out as they occur with several classes.
        unread: Texts without an ordinary token at this layer; they count, as zeros.
    """

    layer: int
    probes: tuple[Probe, ...]
    majority: dict[str, float]
    train: int
    test: int
    repeated: int
    contradictory: int
    unread: int

    def mean(self, source: str, k: int | None = None) -> tuple[float, float]:
        """Accuracy and F1 of the probes of a source (and, unless None, of k columns), averaged over classes."""
        chosen = [probe for probe in self.probes if probe.source == source and k in (None, probe.k)]
        return float(np.mean([probe.accuracy for probe in chosen])), float(np.mean([probe.f1 for probe in chosen]))


@dataclass(frozen=True)
class Split:
    """Texts without repeats, by the half that they belong to; indices into the texts given."""

    train: Indices
    test: Indices
    repeated: int
    contradictory: int


def probe_saes(
    model: LanguageModel, saes: Sequence[LayerSAE], texts: Sequence[str], labels: Sequence[str], config: ProbingConfig | None = None
) -> dict[int, ProbingResult]:
    """Probe SAEs of distinct layers on labelled texts; one model pass serves all layers.

    Raises:
        ShapeError: an SAE does not fit the model.
        InputError: texts and labels differ in number, there is one class only or one of few texts, a k exceeds the number of features or
            dimensions, or a layer is out of range.
    """
    config = config or ProbingConfig()
    split = split_texts(texts, labels, config)
    for sae in saes:
        sae.check_width(model.config.d_model, model.name)
        model.check_layer(sae.layer)
        if max(config.ks) > min(sae.num_features, sae.d_model):
            raise InputError(f"k {max(config.ks)} exceeds the {sae.num_features} features or {sae.d_model} dimensions of layer {sae.layer}")
    used: list[int] = [*split.train.tolist(), *split.test.tolist()]
    means = text_means(model, saes, [texts[index] for index in used], config)
    classes = np.asarray([labels[index] for index in used], object)
    train, test = np.arange(len(split.train)), np.arange(len(split.train), len(used))
    results = {}
    for layer, (codes_BF, streams_BD, tokens_B) in means.items():
        probes: list[Probe] = []
        sources: list[tuple[Source, csr_array | np.ndarray]] = [("sae", codes_BF), ("residual", streams_BD)]
        for label in sorted(set(classes)):
            positive_B = classes == label
            for source, columns in sources:
                chosen = best_columns(columns, positive_B, train, max(config.ks))
                probes += [fit_probe(label, source, columns, positive_B, train, test, chosen[:k], standardize=config.standardize) for k in config.ks]
            probes.append(fit_probe(label, "dense", streams_BD, positive_B, train, test, None, standardize=config.standardize))
        shares = {label: float(np.mean(classes[test] == label)) for label in sorted(set(classes))}
        majority = {label: max(share, 1 - share) for label, share in shares.items()}
        unread = int(np.sum(tokens_B == 0))
        results[layer] = ProbingResult(layer, tuple(probes), majority, len(train), len(test), split.repeated, split.contradictory, unread)
    return results


def split_texts(texts: Sequence[str], labels: Sequence[str], config: ProbingConfig) -> Split:
    """Hold out a share of every class, after removing repeats, so that no text is in both halves.

    Raises:
        InputError: texts and labels differ in number, there is one class only, or a class has fewer than `FEWEST_TEXTS`.
    """
    distinct = distinct_texts(texts, labels)
    kept: list[int] = distinct.kept.tolist()
    repeated, contradictory = distinct.repeated, distinct.contradictory
    removed = f"{repeated} repeated and {contradictory} contradictory ones removed"
    members: dict[str, list[int]] = {}
    for index in kept:
        members.setdefault(labels[index], []).append(index)
    if len(members) < 2:
        raise InputError(f"{len(kept)} texts ({removed}) have {len(members)} class; a probe needs texts of two or more")
    for label, group in members.items():
        if len(group) < FEWEST_TEXTS:
            raise InputError(f"class {label!r} has {len(group)} texts ({removed}), expected {FEWEST_TEXTS} or more; add texts or leave the class out")
    train, test = hold_out(distinct.kept, [labels[index] for index in kept], config.test_share, config.seed)
    return Split(train, test, repeated, contradictory)


def text_means(
    model: LanguageModel, saes: Sequence[LayerSAE], texts: Sequence[str], config: ProbingConfig
) -> dict[int, tuple[csr_array, Float[np.ndarray, "B D"], Int[np.ndarray, " B"]]]:
    """Of every text and layer the mean code [B, F] (sparse) and mean stream over ordinary tokens, and their number; zeros where there are none."""
    parts: dict[int, list[tuple[Any, ...]]] = {sae.layer: [] for sae in saes}
    for start in range(0, len(texts), config.batch_size):
        batch = model.batch(texts[start : start + config.batch_size])
        segment_ids = jnp.asarray(batch.segment_ids_BT)
        with jax.set_mesh(model.mesh):
            out = forward(model.decoder, batch.tokens_BT, segment_ids, (), jnp.asarray(list(parts), jnp.int32), stop_after=max(parts))
        assert out.residuals is not None
        for sae, x in zip(saes, out.residuals, strict=True):
            code, mean_BD, mask_BT = _read(sae.autoencoder, x, segment_ids, config.max_norm_multiple, config.drop_first)
            parts[sae.layer].append((_mean_codes(code, np.asarray(mask_BT), sae.num_features), np.asarray(mean_BD), np.asarray(mask_BT).sum(axis=1)))
    joined = {layer: tuple(zip(*rows, strict=True)) for layer, rows in parts.items()}
    return {layer: (csr_array(vstack(codes)), np.concatenate(streams), np.concatenate(tokens)) for layer, (codes, streams, tokens) in joined.items()}


def best_columns(columns: csr_array | np.ndarray, positive_B: Bool[np.ndarray, " B"], rows: Indices, k: int) -> Indices:
    """The k columns whose class means over `rows` differ most, best first; ties go to the lower column."""
    inside, outside = (columns[rows[positive_B[rows] == wanted]].mean(axis=0) for wanted in (True, False))
    return np.argsort(-np.abs(np.asarray(inside - outside).ravel()), kind="stable")[:k]


def fit_probe(
    label: str,
    source: Source,
    columns: csr_array | np.ndarray,
    positive_B: Bool[np.ndarray, " B"],
    train: Indices,
    test: Indices,
    chosen: Indices | None,
    *,
    standardize: bool = True,
) -> Probe:
    """Fit on the rows `train` of the chosen columns (None: all), and score on the rows `test`."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import accuracy_score, f1_score

    picked = columns if chosen is None else columns[:, chosen]
    inputs = np.asarray(picked.toarray() if isinstance(picked, csr_array) else picked, np.float64)
    if standardize:
        spread = inputs[train].std(axis=0)
        inputs = (inputs - inputs[train].mean(axis=0)) / np.where(spread > 0, spread, 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        fitted = LogisticRegression(C=1.0, max_iter=1000).fit(inputs[train], positive_B[train])
    answers, truth = fitted.predict(inputs[test]), positive_B[test]
    f1 = float(f1_score(truth, answers, zero_division=0))  # pyright: ignore[reportArgumentType]
    converged = not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
    names = () if chosen is None else tuple(int(column) for column in chosen)
    return Probe(label, source, inputs.shape[1], float(accuracy_score(truth, answers)), f1, names, converged)


@partial(jax.jit, static_argnames=("max_norm_multiple", "drop_first"))
def _read(
    sae: SparseAutoencoder, x: Array, segment_ids: Array, max_norm_multiple: float, drop_first: bool
) -> tuple[SparseCode, Float[Array, "B D"], Bool[Array, "B T"]]:
    mask_BT = count_tokens(x, segment_ids, max_norm_multiple, drop_first).ordinary_BT
    x = jnp.where(mask_BT[..., None], x.astype(jnp.float32), jnp.float32(0))
    mean_BD = jnp.sum(x, axis=1) / jnp.maximum(jnp.sum(mask_BT, axis=1, dtype=jnp.float32), 1)[:, None]
    return sae.encode(x.reshape(-1, x.shape[-1])), mean_BD, mask_BT


def _mean_codes(code: SparseCode, mask_BT: Bool[np.ndarray, "B T"], num_features: int) -> csr_array:
    """Sums of codes by text over masked-in tokens, divided by their number."""
    rows_N = np.broadcast_to(np.arange(mask_BT.shape[0])[:, None], mask_BT.shape)[mask_BT]
    values, indices = (np.asarray(array)[mask_BT.reshape(-1)] for array in (code.values, code.indices))
    shares = values.astype(np.float64) / mask_BT.sum(axis=1)[rows_N][:, None]
    active = values > 0
    rows = np.broadcast_to(rows_N[:, None], values.shape)[active]
    return coo_array((shares[active], (rows, indices[active])), shape=(mask_BT.shape[0], num_features)).tocsr()
