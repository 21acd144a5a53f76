"""Chapter: fine-tuning that teaches a model to switch language, and the same with that language's features held down."""

import numpy as np

from qscope_jax.demo.corpus import LANGUAGES
from qscope_jax.demo.switching import SWITCHED_SHARE
from qscope_jax.demo.switching_study import Study, auxiliary_of, run_arm, target_features
from qscope_jax.demo.tour import Chapter, Check, Tour
from qscope_jax.features.proportions import pooled_share
from qscope_jax.features.switching.code_switching import is_switched, target_script
from qscope_jax.report.page import Page
from qscope_jax.training.sft import SFTConfig

TITLE = "Answers that stay in their language"
TARGET, WEIGHT = "zh", 1.0
STUDY = Study(
    training=SFTConfig(steps=60, batch_size=16, length=128, learning_rate=1e-3, warmup_steps=10, remat=False),
    conversations=1500, clean=96, questions=40,
)  # fmt: skip
_LAYERS = 2


def run(tour: Tour) -> Chapter:
    """Fine-tune twice on the same conversations, plainly and as SASFT does, and ask both the same held-out questions."""
    script = target_script(TARGET)
    features = target_features(tour.model, tour.saes[-_LAYERS:], TARGET)
    arms = {"plain fine-tuning": None, "SASFT": auxiliary_of("sasft", tour.model, TARGET, WEIGHT, features)}
    results = {name: run_arm(tour.model, TARGET, auxiliary, STUDY) for name, auxiliary in arms.items()}
    shares = {name: pooled_share(np.array(found.switched(TARGET)), np.full(STUDY.questions, STUDY.samples)) for name, found in results.items()}
    plain, sasft = shares["plain fine-tuning"].value, shares["SASFT"].value
    ratio = sasft / plain if plain else 0.0
    loss = results["SASFT"].loss / results["plain fine-tuning"].loss - 1
    checks = [
        Check("switched answers, SASFT / plain fine-tuning", ratio, "at most 0.50", bool(plain) and ratio <= 0.5),
        Check("loss on clean text, SASFT against plain", loss, "at most +0.02", loss <= 0.02),
    ]
    name = LANGUAGES[TARGET]
    summary = (
        f"The model is fine-tuned on conversations in its six languages; {SWITCHED_SHARE:.0%} of the answers that should not be {name} switch "
        f"to it, and {plain:.1%} of its own answers to held-out questions then do. With a loss that keeps the pre-activations of "
        f"{features.features_MS.size} {name} features at their usual level, {sasft:.1%} do; the loss on clean text changes by {loss:+.1%}."
    )
    examples = [one.text for one in results["plain fine-tuning"].answers if one.language == "en" and is_switched(one.text, script)][:3]

    def draw(page: Page) -> None:
        rows = [(name, share.value, share.low, share.high, results[name].loss) for name, share in shares.items()]
        page.table(
            ("fine-tuned", "switched", "from", "to", "loss on clean text"), rows, caption="Answers with a Chinese character, 95 % over questions"
        )
        if examples:
            page.table(("answers to English questions that switched",), [(text,) for text in examples], align=["left"])

    data = {
        "target": TARGET,
        "lambda": WEIGHT,
        "layers": features.layers,
        "features": features.features_MS.tolist(),
        "switched": {name: share._asdict() for name, share in shares.items()},
        "loss": {name: found.loss for name, found in results.items()},
    }
    return Chapter(TITLE, summary, checks, data, draw)
