"""The features of a language and how active they are on others: what SASFT holds down, measured on the base model and saved before training.

On disk a folder: `language_features.json` says what is what, and `language_features.safetensors` holds the arrays: `features` [M, S], `scores`
[M, S], `alpha` [M, K, S], `tokens` [K], and the encoder rows of each layer, `layer27.W` [S, D] and `layer27.b` [S]. No SAE is needed to read it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from qscope_jax.data.files import atomic_path, read_json, write_json
from qscope_jax.errors import InputError, ShapeError, SourceError
from qscope_jax.models.language_model import LanguageModel
from qscope_jax.sae.encoder_rows import EncoderRows
from qscope_jax.sae.formats.mapped_tensors import map_safetensors, write_safetensors

FORMAT = "qscope_jax language features"
VERSION = 1
CONFIG_FILE = "language_features.json"
ARRAYS_FILE = "language_features.safetensors"

_ARRAYS = {"features": "features_MS", "scores": "scores_MS", "alpha": "alpha_MKS", "tokens": "tokens_K"}
_NAMES = ("language", "model", "sae")


@dataclass(frozen=True, eq=False)
class LanguageFeatures:
    """Features of one language at M layers, S a layer, and their levels on K languages.

    Attributes:
        language: L, the language whose features they are.
        languages: Labels of the K languages that levels were measured on, in the order of `alpha_MKS`; L among them.
        layers: 0-based layers.
        features_MS: The features of each layer, highest monolinguality first, or as they were given.
        scores_MS: Their monolinguality for L, nu of SASFT (arXiv 2507.14894), float32.
        alpha_MKS: Mean pre-activation of each feature over the counted tokens of each language, float32.
        tokens_K: Counted tokens of each language.
        model: Name of the model that all was measured on: the base model, before training.
        sae: Where the SAEs are from.
        rows: Encoder rows of each layer's features.
        facts: What else is known: how features were chosen, from which texts.

    Raises:
        InputError: layers, languages or features are missing or there twice.
        ShapeError: the arrays do not fit each other.
    """

    language: str
    languages: tuple[str, ...]
    layers: tuple[int, ...]
    features_MS: Int[np.ndarray, "M S"]
    scores_MS: Float[np.ndarray, "M S"]
    alpha_MKS: Float[np.ndarray, "M K S"]
    tokens_K: Int[np.ndarray, " K"]
    model: str
    sae: str
    rows: tuple[EncoderRows, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that the parts belong together."""
        for name, given in (("layers", self.layers), ("languages", self.languages)):
            if not given or len(set(given)) != len(given):
                raise InputError(f"language features of {name} {list(given)}; expected one or more, none of them twice")
        if self.language not in self.languages or len(self.languages) < 2:
            raise InputError(f"levels of {', '.join(self.languages)}; expected {self.language}, whose features these are, and other languages")
        sizes = (len(self.layers), len(self.languages), self.features_MS.shape[-1])
        expected = {"features_MS": (sizes[0], sizes[2]), "scores_MS": (sizes[0], sizes[2]), "alpha_MKS": sizes, "tokens_K": (sizes[1],)}
        if wrong := [name for name, shape in expected.items() if getattr(self, name).shape != shape]:
            shape = list(getattr(self, wrong[0]).shape)
            raise ShapeError(f"{wrong[0]} has shape {shape}, expected {list(expected[wrong[0]])} for {sizes[0]} layers and {sizes[1]} languages")
        if not sizes[2] or any(len(set(features)) != sizes[2] for features in self.features_MS.tolist()):
            raise InputError(f"features {self.features_MS.tolist()}; expected one or more for each layer, none of them twice")
        shapes = [list(rows.W_SD.shape) for rows in self.rows]
        if len(shapes) != sizes[0] or any(shape != [sizes[2], shapes[0][1]] for shape in shapes):
            raise ShapeError(f"encoder rows have shapes {shapes}; expected [{sizes[2]}, width of the model] for each of {sizes[0]} layers")

    @property
    def d_model(self) -> int:
        """Width D of the model."""
        return self.rows[0].W_SD.shape[1]

    def select(self, layers: Sequence[int] | None = None, count: int | None = None) -> "LanguageFeatures":
        """Some of the layers (by default all), and of each the first `count` features: a single layer, a single feature.

        Raises:
            InputError: a layer or so many features are not there.
        """
        chosen = self.layers if layers is None else tuple(layers)
        size = self.features_MS.shape[1] if count is None else count
        if missing := [layer for layer in chosen if layer not in self.layers]:
            raise InputError(f"there are no language features of layer {missing[0]}; there are those of {', '.join(map(str, self.layers))}")
        if not 1 <= size <= self.features_MS.shape[1]:
            raise InputError(f"{size} features of a layer; there are {self.features_MS.shape[1]}, give 1 or more of them")
        places = [self.layers.index(layer) for layer in chosen]
        rows = tuple(EncoderRows(self.rows[place].W_SD[:size], self.rows[place].b_S[:size]) for place in places)
        arrays = {name: getattr(self, name)[places][..., :size] for name in ("features_MS", "scores_MS", "alpha_MKS")}
        return replace(self, layers=chosen, rows=rows, **arrays)

    def check_model(self, model: LanguageModel, *, any_name: bool = False) -> None:
        """Check that these were measured on this model. Of names the last part counts, so that a hub id and a folder called like it agree.

        Args:
            model: The model to train or to read.
            any_name: Accept another name, such as that of a renamed folder; levels mean nothing on another model.

        Raises:
            ShapeError: the model is wider or narrower.
            InputError: it lacks a layer, or has another name.
        """
        if model.config.d_model != self.d_model:
            found = f"residual streams {self.d_model} wide ({self.model}), but {model.name} has width {model.config.d_model}"
            raise ShapeError(f"the features of language {self.language} read {found}; find them on this model")
        for layer in self.layers:
            model.check_layer(layer)
        if not any_name and _last_part(model.name) != _last_part(self.model):
            found = f"levels of language {self.language} were measured on {self.model}, this model is {model.name}"
            raise InputError(f"{found}; measure them on it, or accept any name if it is the same one elsewhere")

    def save(self, folder: str | Path) -> None:
        """Write a folder, whole or not at all; older language features there are replaced.

        Raises:
            SourceError: something else is there, or it cannot be written.
        """
        check_language_features_folder(folder)
        said = {name: getattr(self, name) for name in (*_NAMES, "languages", "layers", "facts")}
        arrays = {name: np.asarray(getattr(self, attribute)) for name, attribute in _ARRAYS.items()}
        for layer, rows in zip(self.layers, self.rows, strict=True):
            arrays |= {f"layer{layer}.{name}": array for name, array in rows.tensors().items()}
        with atomic_path(Path(folder).expanduser(), directory=True) as temporary:
            write_safetensors(temporary / ARRAYS_FILE, arrays)
            write_json(temporary / CONFIG_FILE, {"format": FORMAT, "format_version": VERSION, **said})

    @classmethod
    def load(cls, folder: str | Path) -> "LanguageFeatures":
        """Read what `save` wrote.

        Raises:
            SourceError: there are no language features, or they are damaged or of a newer version.
        """
        path = Path(folder).expanduser()
        if not (path / CONFIG_FILE).is_file():
            raise SourceError(f"{folder}: holds no language features; find them with qscope sft features")
        said = read_json(path / CONFIG_FILE)
        if said.get("format") != FORMAT or said.get("format_version") != VERSION:
            found = f"{said.get('format', 'something else')} version {said.get('format_version', 'unknown')}"
            raise SourceError(f"{folder}: holds {found}, expected {FORMAT} version {VERSION}")
        tensors = map_safetensors(path / ARRAYS_FILE)
        try:
            return cls._of_parts(said, tensors)
        except (KeyError, TypeError, ValueError, IndexError, InputError, ShapeError) as error:
            raise SourceError(f"{folder}: is damaged ({type(error).__name__}: {error}); find the language features again") from error

    @classmethod
    def _of_parts(cls, said: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> "LanguageFeatures":
        languages, layers = tuple(said["languages"]), tuple(said["layers"])
        if not all(isinstance(text, str) for text in (*languages, *(said[name] for name in _NAMES))) or not isinstance(said["facts"], dict):
            raise ValueError("its names are not text")
        if not all(type(layer) is int and layer >= 0 for layer in layers):
            raise ValueError(f"its layers are {list(layers)}")
        parts = {name: tensors[name] for name in _ARRAYS}
        rows = [(tensors[f"layer{layer}.W"], tensors[f"layer{layer}.b"]) for layer in layers]
        kinds = {name: "i" if name in ("features", "tokens") else "f" for name in _ARRAYS}
        if wrong := [name for name, array in parts.items() if array.dtype.kind != kinds[name] or array.ndim != len(_ARRAYS[name].split("_")[1])]:
            raise ValueError(f"{wrong[0]} holds {parts[wrong[0]].dtype} {list(parts[wrong[0]].shape)}")
        if any(W.ndim != 2 or b.shape != W.shape[:1] for W, b in rows):
            raise ValueError(f"encoder rows have shapes {[(list(W.shape), list(b.shape)) for W, b in rows]}")
        if not all(np.isfinite(array).all() for array in (parts["scores"], parts["alpha"], *(array for pair in rows for array in pair))):
            raise ValueError("it holds NaN or infinity")
        read = tuple(EncoderRows(jnp.asarray(W, jnp.float32), jnp.asarray(b, jnp.float32)) for W, b in rows)
        features, scores, alpha, tokens = (np.array(array) for array in parts.values())
        return cls(said["language"], languages, layers, features, scores, alpha, tokens, said["model"], said["sae"], read, said["facts"])


def check_language_features_folder(path: str | Path) -> None:
    """Check that language features may be written there.

    Raises:
        SourceError: something else is there.
    """
    target = Path(path).expanduser()
    if target.exists() and not (target / CONFIG_FILE).is_file() and not (target.is_dir() and not any(target.iterdir())):
        raise SourceError(f"{path}: exists and holds no language features; choose a new folder")


def _last_part(name: str) -> str:
    return name.replace("\\", "/").rstrip("/").split("/")[-1]
