"""The guided tour: chapters in order, their results in a table, a JSON file and a page."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from qscope_jax.data.files import write_json
from qscope_jax.data.texts import load_texts
from qscope_jax.demo.corpus import LANGUAGES, documents, sentences
from qscope_jax.demo.embedded import TinySAESettings, save_saes, tiny_model
from qscope_jax.features.readout import Readout
from qscope_jax.models.language_model import LanguageModel
from qscope_jax.report.page import Page
from qscope_jax.report.terminal import print_table
from qscope_jax.sae.layer_sae import LayerSAE


@dataclass(frozen=True)
class Check:
    """One number of the tour beside what it should reach."""

    name: str
    value: float
    target: str
    met: bool


@dataclass(frozen=True)
class Chapter:
    """What a chapter found.

    Attributes:
        title: Its heading.
        summary: One paragraph, for the terminal and the page.
        checks: Numbers with targets.
        data: Everything measured, JSON-serialisable.
        draw: Adds the chapter's tables and figures to a page.
    """

    title: str
    summary: str
    checks: list[Check]
    data: dict[str, Any]
    draw: Callable[[Page], Any]


@dataclass
class Tour:
    """What chapters share; each may add to it for those that follow."""

    model: LanguageModel
    documents: list[str]
    held_out: list[str]
    sentence: str
    prompts: list[str]
    settings: TinySAESettings = field(default_factory=TinySAESettings)
    saes: list[LayerSAE] = field(default_factory=list)
    alive: dict[int, Any] = field(default_factory=dict)
    readouts: dict[str, dict[int, Readout]] = field(default_factory=dict)
    held_out_readouts: dict[str, dict[int, Readout]] = field(default_factory=dict)
    detectors: dict[str, Any] = field(default_factory=dict)
    named: dict[str, tuple[int, int]] = field(default_factory=dict)
    own_text: bool = False


def make_tour(text: str | None = None, settings: TinySAESettings | None = None) -> Tour:
    """Prepare a tour of the embedded model.

    Args:
        text: A file whose text is read, explained and continued beside the corpus.
        settings: Size and training of the SAEs.

    Raises:
        QscopeError: the file is missing, empty or unreadable.
    """
    texts = documents(4000, seed=1)
    held_out = [line for language in LANGUAGES for line in sentences(language, held_out=True)]
    sentence = "My grandmother made tea, and the children played in the garden until it was dark."
    prompts = _beginnings(sentences("en", held_out=True))
    own = [piece for document in load_texts(text) for piece in document.split("\n") if piece.strip()] if text else []
    if own:
        sentence = max(own[:50], key=lambda piece: min(len(piece), 120))[:400]
        texts = texts + own * max(1, len(texts) // (10 * len(own)))
        prompts = (_beginnings([piece for piece in own if piece.isascii()]) + prompts)[: len(prompts)]
    return Tour(tiny_model(), texts, held_out, sentence, prompts, settings or TinySAESettings(), own_text=bool(own))


def run_tour(tour: Tour, out: Path, console: Console | None = None) -> list[Check]:
    """Run every chapter, print its results, and write `results.json`, `report.html` and the SAEs under `out`."""
    from qscope_jax.demo.chapters import CHAPTERS

    console = console or Console()
    page = Page("A guided tour of a language model's features", "Made by qscope demo from the embedded six-language model.")
    finished: dict[str, Chapter] = {}
    for module in CHAPTERS:
        name = module.__name__.rsplit(".", 1)[-1]
        console.rule(f"[bold]{len(finished) + 1}. {module.TITLE}")
        chapter = finished[name] = module.run(tour)
        console.print(chapter.summary)
        page.heading(chapter.title).text(chapter.summary)
        chapter.draw(page)
    checks = [check for chapter in finished.values() for check in chapter.checks]
    page.heading("Results")
    for check in checks:
        page.verdict(check.name, check.value, check.target, check.met)
    page.write(out / "report.html")
    save_saes(out / "saes", tour.saes)
    write_json(out / "results.json", {name: {"checks": [vars(c) for c in chapter.checks], **chapter.data} for name, chapter in finished.items()})
    console.rule("[bold]Results")
    rows = [(check.name, check.value, check.target, "met" if check.met else "SHORT") for check in checks]
    print_table(("what", "measured", "target", ""), rows, file=console.file)  # pyright: ignore[reportArgumentType]
    console.print(f"Page: {out / 'report.html'}   numbers: {out / 'results.json'}   SAEs: {out / 'saes'}")
    return checks


def _beginnings(lines: list[str], words: int = 4, count: int = 24) -> list[str]:
    """The first words of sentences, as prompts."""
    long_enough = [line.split() for line in lines if len(line.split()) > words + 1]
    return [" ".join(line[:words]) for line in long_enough[:count]]
