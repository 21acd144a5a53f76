"""The auxiliary losses of a run from their settings: SASFT from a language's saved features, or the penalty on its tokens."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from qscope_jax.errors import ConfigError, InputError
from qscope_jax.features.switching.language_features import LanguageFeatures
from qscope_jax.training.auxiliary import AIMS, FORMS, FeatureCeiling, ScriptPenalty

ALPHAS = ("mean", "zero")


@dataclass(frozen=True)
class SASFTConfig:
    """Which features are held down, how low, and how strongly."""

    weight: float = 0.01
    """Lambda; 0 is plain fine-tuning. The authors' 5e-4 and 1e-3 count once for each of 32 micro-batches and average over features: in the
    paper's form, over two features, about 0.008 and 0.016."""
    form: str = "paper"
    """`paper`, a mean over the step's answer tokens of the sum over features; or `code`, as the authors' program computes it."""
    aim: str = "reduce"
    """`reduce` the features in other languages, or `raise` them in their own."""
    alpha: str = "mean"
    """Usual level: the `mean` pre-activation on the language, as measured before training, or `zero`."""
    layers: tuple[int, ...] | None = None
    """Layers among those of the features; default all."""
    num_features: int | None = None
    """First features of each layer; default all."""

    def __post_init__(self):
        """Check ranges."""
        if not 0 <= self.weight < float("inf"):
            raise ConfigError(f"the weight of the auxiliary loss is {self.weight}, expected 0 or more")
        for name, known in (("form", FORMS), ("aim", AIMS), ("alpha", ALPHAS)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected one of {', '.join(known)}")


def feature_ceiling(features: LanguageFeatures, config: SASFTConfig) -> FeatureCeiling | None:
    """SASFT's loss, or None where it weighs nothing: such a run is a plain one to the bit.

    Raises:
        InputError: a layer or feature that was not measured.
    """
    if not config.weight:
        return None
    chosen = features.select(config.layers, config.num_features)
    alpha_MKS = np.zeros_like(chosen.alpha_MKS) if config.alpha == "zero" else chosen.alpha_MKS
    return FeatureCeiling(
        rows=chosen.rows,
        alpha_MKS=jnp.asarray(alpha_MKS, jnp.float32),
        target=jnp.int32(chosen.languages.index(chosen.language)),
        layers=chosen.layers,
        weight=float(config.weight),
        form=config.form,
        aim=config.aim,
    )


def script_penalty(unwanted_V: np.ndarray, languages: tuple[str, ...], language: str, weight: float) -> ScriptPenalty | None:
    """The penalty baseline, or None where it weighs nothing.

    Args:
        unwanted_V: Vocabulary items that hold a character of the language's script.
        languages: Labels of the rows' languages.
        language: L, whose tokens are kept down in rows of other languages.
        weight: Lambda.

    Raises:
        InputError: no item is of the script, or L is not among the languages.
        ConfigError: a negative weight.
    """
    if not 0 <= weight < float("inf"):
        raise ConfigError(f"the weight of the penalty is {weight}, expected 0 or more")
    if language not in languages:
        raise InputError(f"the rows' languages are {', '.join(languages)}; {language}, whose tokens are penalised, is not among them")
    if not np.any(unwanted_V):
        raise InputError(f"no token of the vocabulary holds a character of {language}'s script; a penalty on them would do nothing")
    return ScriptPenalty(jnp.asarray(unwanted_V), jnp.int32(languages.index(language)), float(weight)) if weight else None
