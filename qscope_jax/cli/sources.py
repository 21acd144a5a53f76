"""What several verbs open, and the options that say so: models, SAEs, texts and sampling."""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from qscope_jax.cli.options import Integers, Texts
from qscope_jax.errors import ConfigError, InputError

if TYPE_CHECKING:
    from qscope_jax.features.readout import Readout
    from qscope_jax.models.config import ModelConfig
    from qscope_jax.models.language_model import LanguageModel
    from qscope_jax.models.sampling import SamplingConfig
    from qscope_jax.sae.layer_sae import LayerSAE, SAECollection

TINY = "tiny"
TINY_REPETITION = "tiny:repetition"
"""Data that leave the embedded model prone to repetition, and questions that show it."""
LAYERS_AT_ONCE = 4
"""SAEs in memory at a time; one of them can take 3 GB."""

_TEXT_FILES = (".txt", ".jsonl", ".json", ".parquet")


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and how it is held."""

    model: str = TINY
    """Hugging Face folder, hub id, or `tiny` for the embedded model."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of weights and activations, by default the checkpoint's own (float32 for `tiny`)."""
    mesh: str = ""
    """Devices to spread over, such as data=2,tensor=4; by default one."""


@dataclass(frozen=True, kw_only=True)
class SAEOptions(ModelOptions):
    """A model with the SAEs of its layers."""

    sae: str = TINY
    """Folder, file or hub id of the SAEs, or `tiny` for those of the embedded model."""


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How continuations are drawn."""

    max_new_tokens: int = 64
    """Tokens generated at most, the stop token included."""
    temperature: float = 0.0
    """0 takes the most probable token; otherwise logits are divided by it."""
    top_p: float = 1.0
    """Draw from the most probable tokens that together reach this probability."""
    top_k: int = 0
    """Draw from so many most probable tokens; 0 is all."""
    repetition_penalty: float = 1.0
    """Divides the logits of tokens seen before; 1 does nothing."""
    seed: int = 0
    """Seed of the draws."""
    stop: Texts | None = None
    """Further stop tokens, besides the model's own: texts that are one token each, or token ids."""


def open_model(name: str, dtype: str | None = None, mesh: str = "") -> "LanguageModel":
    """Load a model; `tiny` is the embedded one.

    Raises:
        QscopeError: what is wrong with the source.
    """
    from qscope_jax.demo.embedded import TINY as EMBEDDED
    from qscope_jax.models.language_model import load_model

    return load_model(EMBEDDED, dtype=dtype or "float32", mesh=mesh) if name == TINY else load_model(name, dtype=dtype, mesh=mesh)


def open_saes(name: str, model: "LanguageModel") -> "SAECollection":
    """Open the SAEs of a model's layers, on its mesh; `tiny` trains those of the embedded model when they are first needed.

    Raises:
        QscopeError: what is wrong with the source.
    """
    from qscope_jax.sae.layer_sae import SAECollection

    return SAECollection(_sae_source(name, model), max_layers=1, mesh=model.mesh)


def open_sae(name: str, layer: int, model: "LanguageModel") -> "LayerSAE":
    """Load the SAE of one layer and check that it fits the model.

    Raises:
        QscopeError: what is wrong with the source, the layer or the width.
    """
    from qscope_jax.sae.layer_sae import load_sae

    model.check_layer(layer)
    sae = load_sae(_sae_source(name, model), layer, mesh=model.mesh)
    sae.check_width(model.config.d_model, model.name)
    return sae


def check_layers(saes: "SAECollection", layers: Integers | None, model: "LanguageModel") -> list[int]:
    """The layers asked for (None: all that the source has), if the model and the source have them.

    Raises:
        InputError: one of them has not, or a layer is given twice.
    """
    wanted = saes.layers if layers is None else list(layers)
    if len(set(wanted)) != len(wanted) or not wanted:
        raise InputError(f"layers {wanted}: give one or more, none of them twice")
    for layer in wanted:
        model.check_layer(layer)
    if missing := sorted(set(wanted) - set(saes.layers)):
        raise InputError(f"{saes.source}: has no SAE for layer {missing[0]}; it has layers {', '.join(map(str, saes.layers))}")
    return wanted


def sae_groups(saes: "SAECollection", layers: Integers | None, model: "LanguageModel") -> "Iterator[list[LayerSAE]]":
    """The SAEs of the layers asked for, see `check_layers`, a few at a time."""
    wanted = check_layers(saes, layers, model)
    for start in range(0, len(wanted), LAYERS_AT_ONCE):
        yield [saes[layer] for layer in wanted[start : start + LAYERS_AT_ONCE]]


def read_layers(
    model: "LanguageModel", saes: "SAECollection", layers: Integers | None, texts: Sequence[str], *, keep_first: bool, max_norm_multiple: float
) -> "dict[int, Readout]":
    """`read_features` with a few SAEs in memory at a time."""
    from qscope_jax.features.readout import read_features

    readouts = {}
    for group in sae_groups(saes, layers, model):
        readouts |= read_features(model, group, texts, drop_first=not keep_first, max_norm_multiple=max_norm_multiple)
    return readouts


def read_documents(source: str, limit: int | None = None, **settings: str) -> list[str]:
    """The documents of a file, folder or hub dataset that are not blank; `settings` are those of `load_texts`."""
    from qscope_jax.data.texts import load_texts

    return [text for text in load_texts(source, limit=limit, **settings) if text.strip()]


def texts_of(argument: str, limit: int | None = None) -> list[str]:
    """A text as itself, a file as its documents; what looks like the name of a text file must be one.

    Raises:
        SourceError: there is no such file, or it cannot be read.
        InputError: the text is blank.
    """
    if os.path.exists(argument) or (argument.lower().endswith(_TEXT_FILES) and not any(map(str.isspace, argument))):
        return read_documents(argument, limit)
    return check_texts((argument,))


def check_texts(texts: Sequence[str], what: str = "text") -> list[str]:
    """The texts, if there is one and all of them can be tokenised.

    Raises:
        InputError: there is none, one is empty, or one holds bytes that are no UTF-8.
    """
    if not texts:
        raise InputError(f"no {what} given; expected at least one")
    for text in texts:
        if not text:
            raise InputError(f"a {what} is empty; every {what} needs at least one character")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"the {what} {text[:40]!a} is not UTF-8; convert it") from error
    return list(texts)


def cut_texts(model: "LanguageModel", texts: Sequence[str], length: int) -> list[str]:
    """Texts that are longer than `length` tokens, cut there."""
    cut = []
    for text in texts:
        ids = model.tokenizer(text, verbose=False)["input_ids"]
        # Half a character at the cut would come back as the replacement sign.
        cut.append(text if len(ids) <= length else model.tokenizer.decode(ids[:length]).rstrip("\ufffd"))
    return cut


def sampling_config(options: SamplingOptions) -> "SamplingConfig":
    """The library's sampling settings, all but stop tokens; their ranges are checked before a model is loaded."""
    from qscope_jax.models.sampling import SamplingConfig

    return SamplingConfig(
        max_new_tokens=options.max_new_tokens, temperature=options.temperature, top_p=options.top_p, top_k=options.top_k,
        repetition_penalty=options.repetition_penalty, seed=options.seed,
    )  # fmt: skip


def with_stops(sampling: "SamplingConfig", stops: Texts | None, model: "LanguageModel") -> "SamplingConfig":
    """Add stop tokens to the model's own.

    Raises:
        InputError: a text is not exactly one token, or an id not in the vocabulary.
    """
    if not stops:
        return sampling
    ids = [_stop_id(stop, model) for stop in stops]
    return replace(sampling, stop_token_ids=tuple(dict.fromkeys((*model.config.eos_token_ids, *ids))))


def _stop_id(stop: str, model: "LanguageModel") -> int:
    if stop.isdecimal() and stop.isascii():
        if int(stop) >= model.config.vocab_size:
            raise InputError(f"stop token {stop} is out of range; the vocabulary has {model.config.vocab_size} tokens")
        return int(stop)
    ids = model.tokenizer(stop, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise InputError(f"stop text {stop!r} is {len(ids)} tokens; give a text that is one token, or a token id")
    return ids[0]


def _sae_source(name: str, model: "LanguageModel") -> str:
    if name != TINY:
        return name
    from qscope_jax.data.hub import open_source
    from qscope_jax.demo.embedded import TINY as EMBEDDED
    from qscope_jax.demo.embedded import tiny_saes
    from qscope_jax.models.weights import read_config

    def sizes(config: "ModelConfig") -> tuple[int, ...]:
        return config.num_layers, config.d_model, config.vocab_size

    # They serve what was fine-tuned from it as well.
    if sizes(model.config) != sizes(read_config(open_source(EMBEDDED))):
        raise ConfigError(f"--sae is {TINY}, the SAEs of the embedded model; give those of {model.name}")
    return str(tiny_saes(lambda sentence: print(sentence, file=sys.stderr)))
