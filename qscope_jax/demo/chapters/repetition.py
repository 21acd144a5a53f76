"""Chapter: reinforcement learning of sums, and the same with one answer of each group steered into endless repetition."""

import numpy as np

from qscope_jax.demo.dapo_study import COUNT, LAYERS, ArmResult, Study, cold_start, edits_of, repetition_features, run_arm
from qscope_jax.demo.repetition import KINDS, WRONG_SHARE
from qscope_jax.demo.tour import Chapter, Check, Tour
from qscope_jax.features.classify.classification_scores import Interval
from qscope_jax.features.proportions import pooled_share
from qscope_jax.report.figures import curves
from qscope_jax.report.page import Page
from qscope_jax.training.dapo.dapo_config import DAPOConfig
from qscope_jax.training.sft import SFTConfig

TITLE = "Learning by trial, and from rare failures"
STUDY = Study(
    cold_start=SFTConfig(steps=200, batch_size=16, length=128, learning_rate=3e-3, warmup_steps=10, remat=False),
    training=DAPOConfig(
        steps=16, num_prompts=8, num_generations=8, max_prompt_length=64, max_completion_length=80, temperature=0.8, learning_rate=4e-4,
        warmup_steps=2, weight_decay=0.0, remat=False,
    ),
    held_out=40, measure_every=16,
)  # fmt: skip
_NAMES = {"vanilla": "DAPO", "steered": "DAPO with steered negatives"}


def run(tour: Tour) -> Chapter:
    """Give the model a bad habit, let it learn sums by trial twice, and ask both what neither has learnt from."""
    saes = [sae for sae in tour.saes if sae.layer in LAYERS]
    model = cold_start(tour.model, STUDY)
    features = repetition_features(model, saes, STUDY, COUNT)
    arms = {name: run_arm(model, STUDY, edits_of(arm, model, saes, features, STUDY)) for arm, name in _NAMES.items()}
    plain, steered = arms.values()
    repeating = {name: _share(found, "prone", -1) for name, found in arms.items()}
    before, after = _share(plain, "right", 0), _share(plain, "right", -1)
    ratio = _share(steered, "prone", -1).value / max(_share(plain, "prone", -1).value, 1e-9)
    checks = [
        Check(
            "right answers to held-out sums, after DAPO less before", after.value - before.value, "at least +0.10", after.value - before.value >= 0.1
        ),
        Check("endless repetition, steered negatives / plain DAPO", ratio, "at most 0.50", bool(_share(plain, "prone", -1).value) and ratio <= 0.5),
    ]
    told = {name: f"{share.value:.0%}" for name, share in repeating.items()}
    summary = (
        f"The model is fine-tuned on sums of which {WRONG_SHARE:.0%} are wrong and on answers of which some go round in circles: {before.value:.0%} "
        f"of its answers to held-out sums are right, and {_share(plain, 'prone', 0).value:.0%} of those to questions that end in a phrase over and "
        f"over never leave it. {STUDY.training.steps} steps of DAPO on other sums and on ordinary questions, after which this is rare, bring "
        f"{after.value:.0%} right; {told[_NAMES['vanilla']]} still repeat. With one of eight answers steered along {features.features_MS.size} "
        f"features of repetition, so that there is always one to learn from, {told[_NAMES['steered']]} do, and "
        f"{_share(steered, 'right', -1).value:.0%} of the sums are right."
    )

    def draw(page: Page) -> None:
        rows = [("before", *_cells(plain, 0)), *((name, *_cells(found, -1)) for name, found in arms.items())]
        columns = ("", "right sums", "repeating: ordinary questions", "repeating: prone questions", "from", "to")
        page.table(columns, rows, caption="Answers to held-out prompts; 95 % intervals over prompts")
        page.figure(
            curves(
                range(1, STUDY.training.steps + 1),
                {name: [float(step["reward"]) for step in found.metrics] for name, found in arms.items()},
                title="Reward of answers that are not steered",
                x_title="step",
                y_title="reward",
            )  # fmt: skip
        )
        page.table(("before, a question of the prone kind",), [(plain.first["prone"].texts[0],)], align=["left"])

    data = {
        "layers": features.layers,
        "features": features.features_MS.tolist(),
        **{
            name: {what: [_share(found, what, place)._asdict() for place in (0, -1)] for what in ("right", *KINDS[1:])}
            for name, found in arms.items()
        },
    }
    return Chapter(TITLE, summary, checks, data, draw)


def _share(found: ArmResult, what: str, place: int) -> Interval:
    """Share of answers that are `right`, or of a kind that repeat, at a measurement."""
    counts_P = np.array((found.right if what == "right" else found.repeating[what])[place])
    return pooled_share(counts_P, np.full(len(counts_P), STUDY.samples))


def _cells(found: ArmResult, place: int) -> tuple[float, ...]:
    return _share(found, "right", place).value, _share(found, "open", place).value, *_share(found, "prone", place)
