"""A fitted classifier: a few features and thresholds that tell texts of a class, read in one pass of the model that stops at the highest layer.

There are two ways to read a feature:

- `top_k`: as the SAE does. A feature fires where it is among the K largest of its token, so all F pre-activations are computed, and the SAE is
  needed. This is the rule of the paper, and equals what `read_texts` says of the same texts; so does a feature store, but that its norm filter
  goes by the median of a batch and not of a text.
- `pre_activation`: the chosen rows of the encoder alone, which the classifier carries. A feature is as active as its pre-activation is above 0,
  whether or not others are larger; it is therefore active more often, and thresholds are tuned to that. No SAE is needed, and a pass takes
  hardly longer than without.

On disk a classifier is a folder: `classifier.json` says all but the encoder rows, which are in `rows.safetensors` (`layer12.W` [W, D],
`layer12.b` [W]).
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qscope_jax.data.files import atomic_path, read_json, write_json
from qscope_jax.errors import InputError, ShapeError, SourceError
from qscope_jax.features.classify.classification import FeatureRule, Term
from qscope_jax.features.classify.text_reading import ReadingConfig, counted_tokens, token_rows
from qscope_jax.features.classify.thresholds import Criterion
from qscope_jax.models.decoder import Decoder
from qscope_jax.models.language_model import LanguageModel
from qscope_jax.sae.autoencoder import SparseAutoencoder
from qscope_jax.sae.encoder_rows import EncoderRows, encoder_rows
from qscope_jax.sae.formats.mapped_tensors import map_safetensors, write_safetensors
from qscope_jax.sae.layer_sae import LayerSAE

Reading: TypeAlias = Literal["top_k", "pre_activation"]

FORMAT = "qscope_jax classifier"
VERSION = 1
CONFIG_FILE = "classifier.json"
ROWS_FILE = "rows.safetensors"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FiringFeatures:
    """W features of an SAE, as its code has them."""

    sae: SparseAutoencoder
    features: Int[Array, " W"]

    def activations(self, x_ND: Float[Array, "N D"]) -> Float[Array, "N W"]:
        """Activations; 0 where a feature is not in the code."""
        code = self.sae.encode(x_ND)
        chosen_NKW = code.indices[:, :, None] == self.features
        return jnp.sum(jnp.where(chosen_NKW, code.values[:, :, None], jnp.float32(0)), axis=1)


Encoder: TypeAlias = EncoderRows | FiringFeatures


@dataclass(frozen=True)
class Firing:
    """A feature that exceeds its threshold in a text: how active it is, and at which token (from 0) it is most."""

    layer: int
    feature: int
    activation: float
    position: int


@dataclass(frozen=True)
class Prediction:
    """The answer for one text.

    Attributes:
        text: The text.
        label: Name of its class.
        positive: Whether that is the class looked for.
        score: How far the farthest feature exceeds its threshold, in units of its usual activation; above 0 where positive.
        firings: The features that exceed theirs.
    """

    text: str
    label: str
    positive: bool
    score: float
    firings: tuple[Firing, ...]


@dataclass(frozen=True, eq=False)
class FeatureClassifier:
    """A rule with all that it takes to apply it to texts. Made by `fit_classifier`, or by `load_classifier`.

    Attributes:
        rule: Features and thresholds.
        reading: How features are read.
        positive: Name of the class looked for.
        negative: Name of the other.
        rows: Encoder rows of each layer, in the order of the rule's terms of that layer.
        model: What it was fitted with.
        sae: Where its SAEs are from.
        texts: How texts are read.
        facts: What is known of the fit, such as scores on texts held out.
    """

    rule: FeatureRule
    reading: Reading
    positive: str
    negative: str
    rows: Mapping[int, EncoderRows]
    model: str
    sae: str
    texts: ReadingConfig = ReadingConfig()
    facts: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_rule(
        cls, rule: FeatureRule, saes: Sequence[LayerSAE], *, positive: str, negative: str, model: str, sae: str, texts: ReadingConfig | None = None
    ) -> "FeatureClassifier":
        """The classifier that reads a rule's features as its SAEs do (`top_k`).

        Raises:
            InputError: the SAE of a layer is not among those given.
        """
        by_layer = {one.layer: one for one in saes}
        if missing := [layer for layer in rule.layers if layer not in by_layer]:
            raise InputError(f"the rule reads layer {missing[0]}; SAEs are of layers {', '.join(map(str, by_layer))}")
        rows = {layer: encoder_rows(by_layer[layer], _features(rule, layer)) for layer in rule.layers}
        return cls(rule, "top_k", positive, negative, rows, model, sae, texts or ReadingConfig())

    def by_pre_activation(
        self, model: LanguageModel, texts: Sequence[str], positive_B: np.ndarray, criterion: Criterion = "f1"
    ) -> "FeatureClassifier":
        """The same features read as `pre_activation`, with thresholds tuned on these texts, which must be those of the fit."""
        reader = replace(self, reading="pre_activation")
        activations_BW = np.concatenate([found for found, _ in reader.activations(model, texts)])
        return replace(reader, rule=self.rule.with_thresholds(activations_BW, positive_B, criterion))

    def predict(self, model: LanguageModel, texts: Iterable[str], saes: Sequence[LayerSAE] = ()) -> Iterator[Prediction]:
        """Classify texts as they come, a batch at a time.

        Args:
            model: The model that the classifier was fitted with.
            texts: Texts; they are asked for when they are needed.
            saes: Its SAEs of the layers that the rule reads; a `pre_activation` classifier needs none.

        Raises:
            InputError: an empty text, or an SAE is missing.
            ShapeError: the model or an SAE is another than that of the fit.
        """
        texts, copy = itertools.tee(texts)
        for activations_BW, positions_BW in self.activations(model, copy, saes):
            scores, positive = self.rule.score(activations_BW), self.rule.predict(activations_BW)
            for row, text in enumerate(itertools.islice(texts, len(scores))):
                firings = tuple(
                    Firing(term.layer, term.feature, float(activations_BW[row, w]), int(positions_BW[row, w]))
                    for w, term in enumerate(self.rule.terms)
                    if activations_BW[row, w] > np.float32(term.threshold)
                )
                label = self.positive if positive[row] else self.negative
                yield Prediction(text, label, bool(positive[row]), float(scores[row]), firings)

    def activations(
        self, model: LanguageModel, texts: Iterable[str], saes: Sequence[LayerSAE] = ()
    ) -> Iterator[tuple[Float[np.ndarray, "B W"], Int[np.ndarray, "B W"]]]:
        """Batch by batch, each text's largest activation of each feature of the rule, and at which token; see `predict`."""
        self.check_model(model)
        encoders = self.encoders(saes)
        order = self.term_order()
        source = iter(texts)
        while batch := list(itertools.islice(source, self.texts.batch_size)):
            tokens = token_rows(model, batch, self.texts)
            # A last batch that is not full is filled up, so that it compiles nothing.
            padding = ((0, self.texts.batch_size - len(batch)), (0, 0))
            rows = [np.pad(array, padding) for array in (tokens.tokens_BT, tokens.segment_ids_BT)]
            with jax.set_mesh(model.mesh):
                found = classify_batch(
                    model.decoder, encoders, *rows, jnp.asarray(self.rule.layers, jnp.int32), stop_after=max(self.rule.layers),
                    max_norm_multiple=self.texts.max_norm_multiple, drop_first=self.texts.drop_first,
                )  # fmt: skip
            values, positions = (np.asarray(array)[: len(batch), order] for array in found)
            yield values, positions

    def encoders(self, saes: Sequence[LayerSAE] = ()) -> tuple[Encoder, ...]:
        """What reads each layer of the rule, in their order.

        Raises:
            InputError: an SAE that is needed is missing.
            ShapeError: an SAE is another than that of the fit.
        """
        if self.reading == "pre_activation":
            return tuple(self.rows[layer] for layer in self.rule.layers)
        by_layer = {sae.layer: sae for sae in saes}
        found = []
        for layer in self.rule.layers:
            if layer not in by_layer:
                raise InputError(f"the classifier reads features of layer {layer} as its SAE does; give the SAE of that layer, from {self.sae}")
            features = _features(self.rule, layer)
            self._check_sae(by_layer[layer], features)
            found.append(FiringFeatures(by_layer[layer].autoencoder, jnp.asarray(features, jnp.int32)))
        return tuple(found)

    def term_order(self) -> list[int]:
        """Where each term stands when terms are sorted by layer."""
        by_layer = [w for layer in self.rule.layers for w, term in enumerate(self.rule.terms) if term.layer == layer]
        return [by_layer.index(w) for w in range(len(by_layer))]

    def check_model(self, model: LanguageModel) -> None:
        """Check that a model is as wide and deep as that of the fit.

        Raises:
            InputError: it lacks a layer.
            ShapeError: it is wider or narrower.
        """
        for layer, rows in self.rows.items():
            model.check_layer(layer)
            if rows.W_SD.shape[1] != model.config.d_model:
                found = f"residual streams {rows.W_SD.shape[1]} wide ({self.model}), but {model.name} has width {model.config.d_model}"
                raise ShapeError(f"the classifier reads {found}; give the model it was fitted with")

    def save(self, path: str | Path) -> None:
        """Write a folder, whole or not at all; an older classifier there is replaced.

        Raises:
            SourceError: something else is there, or it cannot be written.
        """
        check_classifier_folder(path)
        target = Path(path).expanduser()
        facts = {
            "format": FORMAT, "format_version": VERSION, "reading": self.reading, "positive": self.positive, "negative": self.negative,
            "model": self.model, "sae": self.sae, "texts": asdict(self.texts), "terms": [asdict(term) for term in self.rule.terms],
            "facts": dict(self.facts),
        }  # fmt: skip
        tensors = {f"layer{layer}.{name}": np.asarray(array) for layer, rows in self.rows.items() for name, array in rows.tensors().items()}
        with atomic_path(target, directory=True) as folder:
            write_safetensors(folder / ROWS_FILE, tensors)
            write_json(folder / CONFIG_FILE, facts)

    def _check_sae(self, sae: LayerSAE, features: Sequence[int]) -> None:
        if max(features) < sae.num_features and self.rows[sae.layer].W_SD.shape[1] == sae.d_model:
            ours, theirs = self.rows[sae.layer], encoder_rows(sae, features)
            # Copies in bfloat16 and in float32 are the same SAE.
            if np.allclose(ours.W_SD, theirs.W_SD, rtol=0.02, atol=0.02 * float(np.abs(ours.W_SD).mean())):
                return
        source = sae.metadata.get("source", "this SAE")
        raise ShapeError(f"{source}: is another SAE of layer {sae.layer} than that of the fit, which is from {self.sae}; give that one")


def check_classifier_folder(path: str | Path) -> None:
    """Check that a classifier may be written there.

    Raises:
        SourceError: something else is there.
    """
    target = Path(path).expanduser()
    if target.exists() and not (target / CONFIG_FILE).is_file() and not (target.is_dir() and not any(target.iterdir())):
        raise SourceError(f"{path}: exists and is no classifier; choose a new folder")


def load_classifier(path: str | Path) -> FeatureClassifier:
    """Read what `FeatureClassifier.save` wrote.

    Raises:
        SourceError: there is no classifier, or it is damaged or of a newer version.
    """
    folder = Path(path).expanduser()
    if not (folder / CONFIG_FILE).is_file():
        raise SourceError(f"{path}: holds no classifier; fit one with qscope classify fit")
    facts = read_json(folder / CONFIG_FILE)
    if facts.get("format") != FORMAT or facts.get("format_version") != VERSION:
        found = f"{facts.get('format', 'something else')} version {facts.get('format_version', 'unknown')}"
        raise SourceError(f"{path}: holds {found}, expected {FORMAT} version {VERSION}")
    tensors = map_safetensors(folder / ROWS_FILE)
    try:
        rule = FeatureRule(tuple(Term(**term) for term in facts["terms"]))
        rows = {layer: EncoderRows(*(jnp.asarray(tensors[f"layer{layer}.{name}"], jnp.float32) for name in ("W", "b"))) for layer in rule.layers}
        if facts["reading"] not in ("top_k", "pre_activation") or any(len(rows[t].b_S) != len(_features(rule, t)) for t in rule.layers) or not rows:
            raise ValueError("its parts do not fit each other")
        reading, positive, negative = (facts[name] for name in ("reading", "positive", "negative"))
        return FeatureClassifier(
            rule, reading, positive, negative, rows, facts["model"], facts["sae"], ReadingConfig(**facts["texts"]), facts["facts"]
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SourceError(f"{folder / CONFIG_FILE}: is damaged ({type(error).__name__}: {error}); fit the classifier again") from error


@partial(jax.jit, static_argnames=("stop_after", "max_norm_multiple", "drop_first"))
def classify_batch(
    decoder: Decoder,
    encoders: tuple[Encoder, ...],
    tokens_BT: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    taps: Int[Array, " M"],
    *,
    stop_after: int,
    max_norm_multiple: float,
    drop_first: bool,
) -> tuple[Float[Array, "B W"], Int[Array, "B W"]]:
    """One pass: each text's largest activation of each feature over its counted tokens (0 where none counts), and at which token.

    Args:
        decoder: The model.
        encoders: What reads each of M layers; their features stand side by side in the result.
        tokens_BT: Tokens.
        segment_ids: 1 at tokens, 0 at padding.
        taps: The layers.
        stop_after: The highest of them.
        max_norm_multiple: See `ordinary_tokens`.
        drop_first: Do not count first tokens.
    """
    residuals = decoder(tokens_BT, segment_ids=segment_ids, taps=taps, stop_after=stop_after).residuals
    assert residuals is not None
    found = []
    for encoder, x in zip(encoders, residuals, strict=True):
        counted_BT = counted_tokens(x, segment_ids, max_norm_multiple, drop_first)
        active_BTW = encoder.activations(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:2], -1)
        found.append(jnp.where(counted_BT[..., None], active_BTW, jnp.float32(0)))
    joined_BTW = jnp.concatenate(found, axis=-1)
    return joined_BTW.max(axis=1), joined_BTW.argmax(axis=1).astype(jnp.int32)


def _features(rule: FeatureRule, layer: int) -> list[int]:
    return [term.feature for term in rule.terms if term.layer == layer]
