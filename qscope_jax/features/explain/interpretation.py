"""Explanations of features by a language model, and how well they hold.

A generator reads contexts in which a feature fires and says in one sentence what they share. A judge then answers from that sentence alone:
detection asks which contexts the feature fires in, fuzzing in which the right tokens are marked. After Paulo et al. 2024, "Automatically
Interpreting Millions of Features in Large Language Models" (arXiv 2410.13928). There wrong marks are random tokens of contexts without the
feature; here they are silent tokens of contexts with it, so that fuzzing cannot be answered by detection.
"""

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from qscope_jax.errors import ConfigError
from qscope_jax.features.explain.context_questions import (
    Example,
    JudgeScore,
    detection_question,
    explanation_question,
    fuzzing_question,
    judge_score,
    read_explanation,
)
from qscope_jax.features.explain.contexts import FiringTexts, Window, check_features, firing_texts, read_contexts, read_silent_contexts
from qscope_jax.features.explain.feature_card import Context
from qscope_jax.features.explain.feature_labels import FeatureLabel
from qscope_jax.features.explain.marked_text import marked_text, token_groups
from qscope_jax.features.generation.generators import Generator, Message, Reply
from qscope_jax.features.store.feature_store import FeatureStore

# Texts without a feature that are looked through for stretches without it; it may fire at tokens that do not count.
_TRIED = 500


@dataclass(frozen=True)
class InterpretConfig:
    """How explanations are made and scored."""

    shown: int = 20
    """Contexts that an explanation is made from: half of them the highest, half from all strengths."""
    scored: int = 30
    """Other contexts that it is scored on, from all strengths, and as many without the feature. Half of a rare feature's texts are kept for it."""
    window: Window = field(default_factory=lambda: Window(20, 11))
    """How much of a text a context shows."""
    mark_share: float = 0.3
    """Tokens are marked from this share of the context's highest activation on."""
    at_once: int = 5
    """Contexts in one question to the judge."""
    features_at_once: int = 16
    """Features whose questions are asked together; all of them are finished before the next ones."""
    max_tokens: int = 512
    """Tokens of an answer."""
    seed: int = 0
    """Seed of all draws. What a feature is explained and scored by does not depend on which others are."""

    def __post_init__(self):
        """Check the sizes."""
        for name in ("shown", "scored", "at_once", "features_at_once", "max_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected 1 or more")
        if not 0 < self.mark_share <= 1:
            raise ConfigError(f"mark_share is {self.mark_share}, expected a share above 0 and at most 1")


@dataclass(frozen=True)
class Interpretation:
    """What a feature was explained as, and how well that holds.

    Attributes:
        layer: 0-based layer.
        feature: The feature.
        explanation: One sentence; empty where there is none.
        detection: Whether the judge told contexts with the feature from others; None where it was not asked.
        fuzzing: Whether it told rightly marked tokens from wrongly marked ones.
        problem: Why something is missing, in one line.
    """

    layer: int
    feature: int
    explanation: str
    detection: JudgeScore | None = None
    fuzzing: JudgeScore | None = None
    problem: str = ""

    @property
    def scores(self) -> dict[str, float]:
        """Balanced accuracies, of those that could be measured."""
        found = {"detection": self.detection, "fuzzing": self.fuzzing}
        return {name: score.balanced_accuracy for name, score in found.items() if score is not None and score.measured}

    def label(self, by: str = "") -> FeatureLabel:
        """The explanation for a file; its score is the mean of the balanced accuracies."""
        scores = self.scores
        return FeatureLabel(self.layer, self.feature, self.explanation, float(np.mean(list(scores.values()))) if scores else None, scores, by)


def interpret_features(
    store: FeatureStore,
    layer: int,
    features: Sequence[int],
    generator: Generator,
    *,
    judge: Generator | None = None,
    explanations: Mapping[int, str] | None = None,
    config: InterpretConfig | None = None,
) -> Iterator[Interpretation]:
    """Explain features and score the explanations, a few features at a time.

    A question that fails or whose answer cannot be read costs its own feature only, which says so.

    Args:
        store: The store, with codes.
        layer: 0-based layer.
        features: Features.
        generator: Who explains.
        judge: Who scores; by default the same.
        explanations: Explanations that are there already, by feature: those are scored only.
        config: How it is done.

    Raises:
        InputError: there is no such layer or feature, or the store keeps no codes.
    """
    store.check_codes()
    wanted = check_features(store, layer, features).tolist()
    return _interpretations(store, layer, wanted, generator, judge or generator, dict(explanations or {}), config or InterpretConfig())


class _Evidence(NamedTuple):
    """One feature's examples, with its explanation once there is one, and why something is missing."""

    feature: int
    shown: list[str]
    detection: list[Example]
    fuzzing: list[Example]
    explanation: str = ""
    problem: str = ""


def _interpretations(
    store: FeatureStore, layer: int, wanted: list[int], generator: Generator, judge: Generator, given: dict[int, str], config: InterpretConfig
) -> Iterator[Interpretation]:
    readable = _Readable(store)
    found = firing_texts(store, layer, wanted)
    while group := list(itertools.islice(found, config.features_at_once)):
        evidence = [_evidence(store, layer, texts, readable, config)._replace(explanation=given.get(texts.feature, "")) for texts in group]
        evidence = _explained(evidence, generator, config)
        detection = _scores(evidence, [one.detection for one in evidence], detection_question, judge, config)
        fuzzing = _scores(evidence, [one.fuzzing for one in evidence], fuzzing_question, judge, config)
        for one, *scores in zip(evidence, detection, fuzzing, strict=True):
            failed = next((score.failure for score in scores if score is not None and score.failure), "")
            yield Interpretation(layer, one.feature, one.explanation, *scores, problem=one.problem or failed)


def _explained(evidence: list[_Evidence], generator: Generator, config: InterpretConfig) -> list[_Evidence]:
    """The same with explanations, where there was none and there is something to explain."""
    open_ones = [row for row, one in enumerate(evidence) if not one.explanation and one.shown]
    asked = [explanation_question(evidence[row].shown) for row in open_ones]
    explained = list(evidence)
    for row, reply in zip(open_ones, _ask(generator, asked, config), strict=True):
        explanation, problem = read_explanation(reply)
        explained[row] = evidence[row]._replace(explanation=explanation, problem=problem or evidence[row].problem)
    return explained


def _scores(
    evidence: list[_Evidence],
    examples: list[list[Example]],
    question: Callable[[str, Sequence[str]], list[Message]],
    judge: Generator,
    config: InterpretConfig,
) -> list[JudgeScore | None]:
    """A score for each feature that has an explanation and examples; the questions of all of them are asked together."""
    groups = [
        [own[first : first + config.at_once] for first in range(0, len(own), config.at_once)] if one.explanation else []
        for one, own in zip(evidence, examples, strict=True)
    ]
    asked = [question(one.explanation, [e.line for e in part]) for one, own in zip(evidence, groups, strict=True) for part in own]
    replies = iter(_ask(judge, asked, config))
    return [judge_score(own, list(itertools.islice(replies, len(own)))) if own else None for own in groups]


def _ask(generator: Generator, conversations: list[list[Message]], config: InterpretConfig) -> list[Reply]:
    return generator(conversations, max_tokens=config.max_tokens, temperature=0.0, seed=config.seed) if conversations else []


def _evidence(store: FeatureStore, layer: int, found: FiringTexts, readable: "_Readable", config: InterpretConfig) -> _Evidence:
    """Choose a feature's contexts, some to explain it by and others to score that by, and write them out."""
    if not len(found.texts):
        return _Evidence(found.feature, [], [], [], problem="it never fires in the store")
    rng = np.random.default_rng([config.seed, layer, found.feature])
    shown_rows, scored_rows = split_rows(len(found.texts), config.shown, config.scored, rng)
    texts = found.texts[[*shown_rows, *scored_rows]]
    contexts = read_contexts(store, layer, np.full(len(texts), found.feature), texts, config.window)
    shown, scored = contexts[: len(shown_rows)], contexts[len(shown_rows) :]
    # Repeated texts must not carry what was shown over to the scores.
    known = {context.token_ids for context in shown}
    scored = [context for context in scored if context.token_ids not in known]
    silent = read_silent_contexts(store, layer, found.feature, _silent_texts(store, found, rng), len(scored), config.window, rng)
    lines = [f"{_strength(context, float(found.maxima[0]))} {readable.marked(context, config.mark_share)}" for context in shown]
    detection = [Example(readable.plain(context), right) for right, group in ((True, scored), (False, silent)) for context in group]
    quiet = [_silent_positions(store, layer, found.feature, context) for context in scored]
    fuzzing = _fuzzing(scored, quiet, readable, config.mark_share, rng)
    problem = "" if scored else "it fires in too few texts to score an explanation"
    return _Evidence(found.feature, lines, _shuffled(detection, rng), _shuffled(fuzzing, rng), problem=problem)


def split_rows(size: int, shown: int, scored: int, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """Rows of texts, sorted by maximum, to explain a feature by and, never the same, to score that by; both from all strengths.

    Args:
        size: Texts in which it fires.
        shown: Rows to explain it by, at most; half of them the highest.
        scored: Rows to score by, at most half of all.
        rng: Draws.
    """
    scored = min(scored, size // 2)
    shown = min(shown, size - scored)
    top = np.arange((shown + 1) // 2)
    spread = _spread(np.arange(len(top), size), shown - len(top), rng)
    rest = np.setdiff1d(np.arange(len(top), size), spread)
    return [*top.tolist(), *spread.tolist()], _spread(rest, scored, rng).tolist()


def _spread(rows: Int[np.ndarray, " R"], count: int, rng: np.random.Generator) -> Int[np.ndarray, " C"]:
    """Rows drawn one from each of `count` ranges of equal size."""
    return np.array([rng.choice(part) for part in np.array_split(rows, count)] if count else [], np.int64)


def _silent_texts(store: FeatureStore, found: FiringTexts, rng: np.random.Generator) -> list[int]:
    """Texts in which the feature does not fire, in random order."""
    return rng.permutation(np.setdiff1d(np.arange(store.num_texts), found.texts))[:_TRIED].tolist()


def _silent_positions(store: FeatureStore, layer: int, feature: int, context: Context) -> list[int]:
    """Positions of a stretch at which the feature does not fire, whether they count or not."""
    stop = context.start + len(context.token_ids)
    activation = store.code(layer, context.text).activation(feature)[context.start : stop]
    return (context.start + np.flatnonzero(activation == 0)).tolist()


def _fuzzing(scored: list[Context], quiet: list[list[int]], readable: "_Readable", share: float, rng: np.random.Generator) -> list[Example]:
    """Half of the contexts with the right tokens marked, half with as many silent ones; contexts without a silent one are rightly marked."""
    examples = []
    for number, row in enumerate(rng.permutation(len(scored)).tolist()):
        context, silent = scored[row], quiet[row]
        right = strong_positions(context, share)
        if number % 2 and silent:
            wrong = rng.choice(silent, min(len(right), len(silent)), replace=False).tolist()
            examples.append(Example(readable.with_marks(context, wrong), False))
        else:
            examples.append(Example(readable.with_marks(context, right), True))
    return examples


def strong_positions(context: Context, share: float) -> list[int]:
    """Positions in the text at which the activation reaches a share of the context's highest."""
    least = share * max(context.activations)
    return [context.start + i for i, value in enumerate(context.activations) if value > 0 and value >= least]


def _strength(context: Context, maximum: float) -> int:
    return max(round(10 * max(context.activations) / maximum), 1)


def _shuffled(examples: list[Example], rng: np.random.Generator) -> list[Example]:
    return [examples[int(i)] for i in rng.permutation(len(examples))]


class _Readable:
    """Contexts written out, with their texts' characters whole."""

    def __init__(self, store: FeatureStore):
        self._store = store

    def marked(self, context: Context, share: float) -> str:
        """A line with the strong tokens marked."""
        return self.with_marks(context, strong_positions(context, share))

    def plain(self, context: Context) -> str:
        """A line without marks."""
        return self.with_marks(context, ())

    def with_marks(self, context: Context, positions: Collection[int]) -> str:
        """A line with the tokens at some positions of the text marked."""
        vocabulary = self._store.vocabulary
        tokens = [vocabulary[token] for token in self._store.token_ids(context.text).tolist()]
        return marked_text(token_groups(self._store.texts[context.text], tokens), context, positions)
