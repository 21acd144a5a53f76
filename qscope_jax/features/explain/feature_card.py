"""All that is known of one feature, as plain values: what `explain` finds, and what tables, pages, the site and exports show."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Context:
    """A stretch of a text around the token at which a feature fires most in it.

    Attributes:
        text: Index of the text in the store.
        peak: Index of that token within this stretch.
        start: Position in the text of the stretch's first token.
        token_ids: The stretch.
        activations: The feature's activation at each of its tokens.
        about: The text's own columns (language, source, ...), as text.
    """

    text: int
    peak: int
    start: int
    token_ids: tuple[int, ...]
    activations: tuple[float, ...]
    about: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class GroupRate:
    """How often a feature fires in the texts of one language, source or other group.

    Attributes:
        group: Its name.
        texts: Its texts that have a counted token.
        text_rate: Share of them in which the feature fires.
        density: Share of its counted tokens at which it fires.
        mean: Mean of the texts' maxima over all of its texts, 0 where it does not fire.
    """

    group: str
    texts: int
    text_rate: float
    density: float
    mean: float


@dataclass(frozen=True)
class QuantileContexts:
    """Contexts from texts whose maxima lie in one range.

    Attributes:
        low: Least maximum of the range, inclusive.
        high: Largest.
        texts: Texts in the range.
        contexts: Some of them, drawn at random.
    """

    low: float
    high: float
    texts: int
    contexts: tuple[Context, ...]


@dataclass(frozen=True)
class FeatureCard:
    """One feature of one layer over a corpus.

    Attributes:
        layer: 0-based layer.
        feature: Index in its dictionary.
        density: Share of counted tokens at which it fires.
        text_rate: Share of texts in which it fires.
        maximum: Largest activation.
        mean_maximum: Mean of the maxima of the texts in which it fires.
        histogram: Texts by maximum: (lower edge, upper edge, texts), ascending.
        groups: Column of the corpus -> its groups, most firing first.
        top: Contexts of highest maximum, highest first, one a text.
        quantiles: Contexts by range of maximum, highest range first.
        promoted: (token id, logit) that its direction raises most; empty where the store has no dictionary.
        suppressed: Those that it lowers most.
        neighbours: (feature, cosine) of nearest directions.
        cofiring: (feature, Jaccard index of the tokens at which both fire), highest first.
        explanation: One sentence, where one was made or given.
        scores: Name -> score of the explanation.
    """

    layer: int
    feature: int
    density: float
    text_rate: float
    maximum: float
    mean_maximum: float
    histogram: tuple[tuple[float, float, int], ...] = ()
    groups: Mapping[str, tuple[GroupRate, ...]] = field(default_factory=dict)
    top: tuple[Context, ...] = ()
    quantiles: tuple[QuantileContexts, ...] = ()
    promoted: tuple[tuple[int, float], ...] = ()
    suppressed: tuple[tuple[int, float], ...] = ()
    neighbours: tuple[tuple[int, float], ...] = ()
    cofiring: tuple[tuple[int, float], ...] = ()
    explanation: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)
