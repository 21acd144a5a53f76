"""A feature's card in a terminal: a few lines of facts, then its contexts with their tokens coloured."""

import sys
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.text import Text

from qscope_jax.features.explain.feature_card import Context, FeatureCard, GroupRate
from qscope_jax.report.explanation_page import share
from qscope_jax.report.number_format import format_number
from qscope_jax.report.terminal import TextStream, print_kv, tokens_text

TokenText = Callable[[int], str]

_WORDS, _FEATURES, _GROUPS = 10, 6, 8


def print_card(card: FeatureCard, token_text: TokenText, *, contexts: int = 5, file: TextStream | None = None) -> None:
    """Print a card. Where the output has no colours, each context's strongest token stands between ⟦ and ⟧.

    Args:
        card: The feature.
        token_text: What a token reads as by itself.
        contexts: Contexts of highest maximum shown; of each quantile one.
        file: Where to print; by default standard output.
    """
    scores = ", ".join(f"{name} {value:.2f}" for name, value in card.scores.items())
    title = f"Layer {card.layer}, feature {card.feature}" + (f": {card.explanation}" if card.explanation else "") + (f" ({scores})" if scores else "")
    if not card.maximum:
        print_kv({"fires": "never in these texts", **_words(card, token_text)}, title=title, file=file)
        return
    facts = {
        "fires": f"at {share(card.density)} of tokens, in {share(card.text_rate)} of texts",
        "maximum": f"{format_number(card.maximum)}, on average {format_number(card.mean_maximum)} in a text",
        **{f"by {column}": _groups(groups) for column, groups in card.groups.items()},
        **_words(card, token_text),
    }
    print_kv(facts, title=title, file=file)
    console = Console(file=sys.stdout if file is None else file, highlight=False, markup=False, emoji=False)  # type: ignore[arg-type]
    shown = [*card.top[:contexts], *(context for part in card.quantiles for context in part.contexts[:1])]
    for context in shown:
        console.print(_context(context, card.maximum, token_text, console.color_system is not None), soft_wrap=True)


def _words(card: FeatureCard, token_text: TokenText) -> dict[str, str]:
    """What the direction writes, and features near it; only what is known."""
    found = {
        "promotes": " ".join(_shown(token_text(token)) for token, _ in card.promoted[:_WORDS]),
        "suppresses": " ".join(_shown(token_text(token)) for token, _ in card.suppressed[:_WORDS]),
        "nearest": _features(card.neighbours),
        "fires with": _features(card.cofiring),
    }
    return {name: text for name, text in found.items() if text}


def _features(pairs: Sequence[tuple[int, float]]) -> str:
    return ", ".join(f"{feature} ({value:.2f})" for feature, value in pairs[:_FEATURES])


def _groups(groups: Sequence[GroupRate]) -> str:
    left = f", and {len(groups) - _GROUPS} more" if len(groups) > _GROUPS else ""
    return ", ".join(f"{group.group} {share(group.text_rate)}" for group in groups[:_GROUPS]) + left


def _context(context: Context, maximum: float, token_text: TokenText, colours: bool) -> Text:
    tokens = [token_text(token).replace("\n", "↵").replace("\r", "") for token in context.token_ids]
    if not colours:
        tokens[context.peak] = f"⟦{tokens[context.peak]}⟧"
    strength = max(context.activations)
    return Text(f"{format_number(strength):>8}  ") + tokens_text(tokens, context.activations, maximum=maximum)


def _shown(token: str) -> str:
    """A token whose spaces can be seen."""
    return token.replace(" ", "·").replace("\n", "↵")
