"""The page of `explain`: feature by feature, where it fires and what it writes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from qscope_jax.errors import InputError
from qscope_jax.features.explain.feature_card import Context, FeatureCard
from qscope_jax.report.figures import bars
from qscope_jax.report.number_format import format_number
from qscope_jax.report.page import Page

TokenText = Callable[[int], str]

MOST_FEATURES = 200
"""A page with more could not be opened; a site can."""

_MOST_GROUPS = 30


def write_explanation_page(
    path: str | Path, cards: Iterable[FeatureCard], *, token_text: TokenText, title: str = "Features explained", subtitle: str = ""
) -> Path:
    """Write the page and return its path.

    Args:
        path: The HTML file.
        cards: Features, in the order in which they are shown.
        token_text: What a token reads as by itself.
        title: Title of the page.
        subtitle: A line below it: which store, which model.

    Raises:
        SourceError: the file cannot be written.
        InputError: there are more features than a page can show.
    """
    page = Page(title, subtitle)
    cards = list(cards)
    if len(cards) > MOST_FEATURES:
        raise InputError(f"{len(cards)} features are more than a page can show ({MOST_FEATURES}); write a site instead")
    page.table(_COLUMNS, [_row(card, token_text) for card in cards])
    for card in cards:
        add_card(page, card, token_text)
    return page.write(path)


def add_card(page: Page, card: FeatureCard, token_text: TokenText, *, known_as: str = "", level: int = 2) -> Page:
    """Add the sections of one feature to a page, under a heading of a level that says what the feature is known as, if anything."""
    said = known_as or card.explanation
    page.heading(f"Layer {card.layer}, feature {card.feature}" + (f": {said}" if said else ""), level)
    page.text(facts_line(card))
    if not card.maximum:
        return page
    if card.top:
        page.heading("Where it fires most", 4)
        _add_contexts(page, card.top, card.maximum, token_text)
    for part in card.quantiles:
        if part.contexts:
            page.heading(f"From {part.texts:,} texts with a maximum of {format_number(part.low)} to {format_number(part.high)}", 4)
            _add_contexts(page, part.contexts, card.maximum, token_text)
    _add_figures(page, card)
    _add_words(page, card, token_text)
    _add_relations(page, {"nearest direction": card.neighbours, "fires at the same tokens": card.cofiring}, ("cosine", "Jaccard index"))
    return page


def facts_line(card: FeatureCard) -> str:
    """How often and how strongly a feature fires, in a sentence."""
    if not card.maximum:
        return "It never fires in these texts."
    scores = "".join(f" {name[:1].upper()}{name[1:]} score of the explanation: {value:.2f}." for name, value in card.scores.items())
    return (
        f"It fires at {share(card.density)} of tokens and in {share(card.text_rate)} of texts. Its largest activation is "
        f"{format_number(card.maximum)}; the texts in which it fires have maxima of {format_number(card.mean_maximum)} on average.{scores}"
    )


def share(value: float) -> str:
    """A share in percent, with as many digits as a rare feature needs."""
    return f"{format_number(100 * value)} %"


def context_label(context: Context) -> str:
    """What stands above a context: its text, its place in it, and what is known of it."""
    about = "".join(f", {name} {value}" for name, value in context.about.items())
    return f"text {context.text}, token {context.start + context.peak}{about}"


_COLUMNS = ("feature", "explanation", "density", "in texts", "maximum", "promotes")


def _row(card: FeatureCard, token_text: TokenText) -> tuple[object, ...]:
    promoted = " ".join(token_text(token) for token, _ in card.promoted[:5])
    return str(card.feature), card.explanation or None, share(card.density), share(card.text_rate), card.maximum, promoted or None


def _add_contexts(page: Page, contexts: Sequence[Context], maximum: float, token_text: TokenText) -> None:
    for context in contexts:
        page.tokens([token_text(token) for token in context.token_ids], context.activations, label=context_label(context), maximum=maximum)


def _add_figures(page: Page, card: FeatureCard) -> None:
    page.heading("How strongly and for whom", 4)
    middles = [f"{(low + high) / 2:.3g}" for low, high, _ in card.histogram]
    page.figure(bars(middles, [texts for *_, texts in card.histogram], title="Texts by maximum", y="texts", horizontal=False))
    for column, groups in card.groups.items():
        shown = groups[:_MOST_GROUPS]
        heights = {"texts": [group.text_rate for group in shown], "tokens": [group.density for group in shown]}
        left = f", the {len(shown)} of {len(groups)} in which it fires most" if len(shown) < len(groups) else ""
        page.figure(bars([group.group for group in shown], heights, title=f"Firing by {column}{left}", y="share in which it fires"))


def _add_words(page: Page, card: FeatureCard, token_text: TokenText) -> None:
    if not card.promoted and not card.suppressed:
        return
    page.heading("What its direction writes", 4)
    length = max(len(card.promoted), len(card.suppressed))
    columns = [
        [(token_text(token), logit) for token, logit in side] + [(None, None)] * (length - len(side)) for side in (card.promoted, card.suppressed)
    ]
    rows = [(*left, *right) for left, right in zip(*columns, strict=True)]
    page.table(("promoted", "logit", "suppressed", "logit"), rows, caption="Through the final norm's gain and the head, strongest first")


def _add_relations(page: Page, relations: Mapping[str, Sequence[tuple[int, float]]], measures: Sequence[str]) -> None:
    if not any(relations.values()):
        return
    page.heading("Features near it", 4)
    for (name, pairs), measure in zip(relations.items(), measures, strict=True):
        if pairs:
            page.table((name, measure), [(str(feature), value) for feature, value in pairs])
