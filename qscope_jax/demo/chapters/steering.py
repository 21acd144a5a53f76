"""Chapter: steer English into Chinese and back, beside random features at the same strength."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from qscope_jax.demo.corpus import mixed_prompts, sentences
from qscope_jax.demo.tour import Chapter, Check, Tour
from qscope_jax.features.languages import fit_detector
from qscope_jax.features.scripts import script_share
from qscope_jax.features.steering import dose_sweep, random_features, residual_norms, steer
from qscope_jax.models.language_model import LanguageModel
from qscope_jax.models.sampling import SamplingConfig
from qscope_jax.models.scoring import next_token_loss
from qscope_jax.report.figures import curves
from qscope_jax.report.page import Page
from qscope_jax.sae.layer_sae import LayerSAE

TITLE = "Steer English into Chinese, and back"
DOSES = (0.0, 0.25, 0.375, 0.5, 0.625, 0.75, 1.0, 1.5)
CONTROLS = 16
_SAMPLING = SamplingConfig(max_new_tokens=32, temperature=0.3, seed=0)
_TUNING_PROMPTS, _CONTROL_PROMPTS = 12, 8
# Share of the wanted script on the tuning prompts at which a dose counts as sufficient; the goal on other prompts is lower.
_ENOUGH = 0.8


@dataclass(frozen=True)
class Choice:
    """Layer, feature and strength, chosen on tuning prompts."""

    sae: LayerSAE
    feature: int
    norm: float
    dose: float

    @property
    def settings(self) -> dict[str, Any]:
        """How strengths are counted: as shares of the layer's median residual norm."""
        return {"unit": "residual", "residual_norm": self.norm}


def run(tour: Tour) -> Chapter:
    """Choose on prompts from training sentences, then measure on others."""
    chinese = _choose(tour, "zh", [" ".join(line.split()[:4]) for line in sentences("en")[7::47]][:_TUNING_PROMPTS], "Han")
    english = _choose(tour, "en", [line[:6] for line in sentences("zh")[7::47]][:_TUNING_PROMPTS], "Latin")
    forward = _sweep(tour, chinese, tour.prompts, "Han")
    back = _sweep(tour, english, [line[:6] for line in sentences("zh", held_out=True)[:16]], "Latin")
    mixed = mixed_prompts(16, seed=5)
    down = dose_sweep(tour.model, mixed, chinese.sae, chinese.feature, [0.0, -chinese.dose], sampling=_SAMPLING, **chinese.settings)
    mixed_share = {dose: script_share([c.text for c in rows], "Han") for dose, rows in down.items()}
    letters = {dose: float(np.mean([sum(map(str.isalpha, c.text)) for c in rows])) for dose, rows in down.items()}
    control = _random_control(tour, chinese, seed=1)
    plain, steered = forward[0.0][0], forward[chinese.dose][0]
    before, after = mixed_share[0.0], mixed_share[-chinese.dose]
    checks = [
        Check("Han share of English continuations, unsteered", plain, "under 0.02", plain < 0.02),
        Check("the same, steered by the Chinese feature", steered, "over 0.60", steered > 0.60),
        Check(f"the same, mean of {CONTROLS} random features", float(control.mean()), "under 0.05", bool(control.mean() < 0.05)),
        Check(
            "Han share after mixed prompts, suppressed / not", after / before if before else 1.0, "at most 0.50", bool(before) and after <= before / 2
        ),
        Check("letters a continuation then", letters[-chinese.dose], "at least 10", letters[-chinese.dose] >= 10),
    ]
    summary = (
        f"Feature {chinese.feature} of layer {chinese.sae.layer}, added at {chinese.dose:g} of the layer's median residual norm, takes the share "
        f"of Han "
        f"letters in English continuations from {plain:.1%} to {steered:.1%}; {CONTROLS} random features at the same strength average "
        f"{control.mean():.1%} (the highest {control.max():.0%}). Subtracted after prompts that have switched to Chinese, it takes the share from "
        f"{before:.1%} to {after:.1%} ({letters[-chinese.dose]:.0f} letters a continuation, {letters[0.0]:.0f} unsteered). "
        f"The English feature takes Latin letters in Chinese continuations from {back[0.0][0]:.1%} to {back[english.dose][0]:.1%}."
    )

    def draw(page: Page) -> None:
        series = {"Han, Chinese feature on English": [forward[d][0] for d in DOSES], "Latin, English feature on Chinese": [back[d][0] for d in DOSES]}
        page.figure(curves(list(DOSES), series, title="Dose curves", x_title="strength, in residual norms", y_title="share of letters"))
        rows = [(f"strength {dose:g}", p, c) for dose in (0.0, chinese.dose) for p, c in zip(tour.prompts[:4], forward[dose][1][:4], strict=False)]
        rows += [(f"mixed, strength {dose:g}", p, c.text) for dose, found in down.items() for p, c in zip(mixed[:3], found[:3], strict=False)]
        page.completions(rows)
        page.table(("random feature", "Han share"), [(i + 1, float(share)) for i, share in enumerate(np.sort(control)[::-1])], caption="Control")

    data = {
        "chinese": {"layer": chinese.sae.layer, "feature": chinese.feature, "dose": chinese.dose},
        "english": {"layer": english.sae.layer, "feature": english.feature, "dose": english.dose},
        "han_by_dose": {str(d): forward[d][0] for d in DOSES},
        "latin_by_dose": {str(d): back[d][0] for d in DOSES},
        "mixed": {str(d): share for d, share in mixed_share.items()},
        "mixed_letters": {str(d): count for d, count in letters.items()},
        "random_control": control.tolist(),
        "examples": {str(d): [c[:200] for c in forward[d][1][:6]] for d in (0.0, chinese.dose)},
    }
    return Chapter(TITLE, summary, checks, data, draw)


def _choose(tour: Tour, language: str, prompts: list[str], script: str) -> Choice:
    """Among the layers and doses that suffice, the one whose text the unsteered model finds most natural; by tuning prompts alone."""
    norms = residual_norms(tour.model, sentences("en")[::16], [sae.layer for sae in tour.saes])
    tried: list[tuple[float, Choice, list[str]]] = []
    for sae in tour.saes:
        readouts = {code: by_layer[sae.layer] for code, by_layer in tour.readouts.items()}
        choice = Choice(sae, fit_detector(language, readouts).feature, norms[sae.layer], 0.0)
        for dose, (share, texts) in _sweep(tour, choice, prompts, script).items():
            if dose > 0:
                tried.append((share, Choice(sae, choice.feature, choice.norm, dose), texts))
    enough = [(choice, texts) for share, choice, texts in tried if share >= _ENOUGH]
    if not enough:
        return max(tried, key=lambda item: item[0])[1]
    return min(enough, key=lambda item: surprise(tour.model, item[1]))[0]


def surprise(model: LanguageModel, texts: list[str]) -> float:
    """Mean cross-entropy of texts under the unsteered model, in nats a token; infinite when there is nothing to score."""
    written = [text for text in texts if text.strip()]
    if not written:
        return float("inf")
    batch = model.batch(written)
    logits, _ = model.logits(written)
    total, count = next_token_loss(logits, jnp.asarray(batch.tokens_BT), jnp.asarray(batch.segment_ids_BT))
    return float(total) / float(count) if float(count) else float("inf")


def _sweep(tour: Tour, choice: Choice, prompts: list[str], script: str) -> dict[float, tuple[float, list[str]]]:
    """Share of a script in the continuations, and the continuations, by dose."""
    found = dose_sweep(tour.model, prompts, choice.sae, choice.feature, DOSES, sampling=_SAMPLING, **choice.settings)
    return {dose: (script_share([c.text for c in rows], script), [c.text for c in rows]) for dose, rows in found.items()}


def _random_control(tour: Tour, choice: Choice, seed: int) -> np.ndarray:
    """Han share under each of the random features at the chosen strength, all in one batch."""
    features = random_features(choice.sae, CONTROLS, seed=seed, exclude=[choice.feature], alive=tour.alive[choice.sae.layer])
    prompts = tour.prompts[:_CONTROL_PROMPTS]
    doses_BW = np.kron(np.eye(CONTROLS), np.ones((len(prompts), 1))) * choice.dose
    edit = steer(choice.sae, features, doses_BW, **choice.settings)
    rows = tour.model.generate(prompts * CONTROLS, _SAMPLING, edits=[edit])
    return np.array([script_share([c.text for c in rows[i * len(prompts) : (i + 1) * len(prompts)]], "Han") for i in range(CONTROLS)])
