"""The site of features: size of the folder, time to write it, and in a headless browser time to open it, to search and to open a feature.

    python -m benchmarks.feature_site [--features 32768] [--contexts 10] [--tokens 48] [--keep DIR]

Targets: it opens in under 2 s, a keystroke of a search is answered within 50 ms. Needs playwright and Chromium (`apt-get install chromium`, or
the path of another in CHROMIUM); without them only size and writing are measured. Opened from disk, in a fresh browser profile each time.
"""

import argparse
import contextlib
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qscope_jax.features.explain.feature_card import Context, FeatureCard, GroupRate, QuantileContexts
from qscope_jax.report.feature_site import write_site

_WORDS = (
    "the", "of", "and", "walk", "river", "teacher", "bread", "Haus", "Straße", "und", "дом", "утро", "كتاب", "مدرسة", "学习", "城市", "天气", "日本",
    "東京", "서울", "학교", "été", "garçon", "ciudad",
)  # fmt: skip
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUERIES = ("r", "ri", "riv", "rive", "river", "学习", "كتاب", "river teacher", "zzzz", "12")
"""What is typed; each is one keystroke more or a query of its own."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--features", type=int, default=32_768)
    parser.add_argument("--contexts", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=48, help="tokens of a context")
    parser.add_argument("--keep", help="folder to leave the site in; default: it is removed")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(arguments.keep or scratch) / "site"
        start = time.perf_counter()
        for _ in random_cards(arguments.features, contexts=arguments.contexts, tokens=arguments.tokens):
            pass
        making = time.perf_counter() - start
        start = time.perf_counter()
        cards = random_cards(arguments.features, contexts=arguments.contexts, tokens=arguments.tokens)
        write_site(folder, cards, title="Random features", subtitle="made for timing", token_text=token_text, about={"cards": "random"})
        seconds = time.perf_counter() - start - making
        sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
        index = sum(path.stat().st_size for path in folder.glob("data/index*.js"))
        print(
            f"{arguments.features:,} features: {len(sizes)} files, {sum(sizes) / 1e6:.1f} MB, of which index {index / 1e6:.1f} MB; "
            f"written in {seconds:.1f} s, peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f} MiB"
        )
        if (executable := browser_path()) is None:
            print("no browser found; opening and searching are not measured")
            return
        _report(folder, executable, arguments.features)


def _report(folder: Path, executable: str, features: int) -> None:
    opened, first, searched, shown = [], [], [], []
    for _ in range(5):
        with browser(executable) as running:
            page = running.new_page()
            opened.append(open_seconds(page, folder))
            first.append(search_seconds(page, QUERIES[0]))
            searched += [search_seconds(page, query) for query in QUERIES]
            shown += [feature_seconds(page, feature) for feature in (features // 2, features // 3)]
    print(f"opens: median {statistics.median(opened):.2f} s, worst {max(opened):.2f}; target under 2")
    print(f"a search: median {statistics.median(searched) * 1e3:.1f} ms, worst {max(searched) * 1e3:.1f}; target under 50")
    print(f"  the first one, at once after opening: median {statistics.median(first) * 1e3:.1f} ms, worst {max(first) * 1e3:.1f}")
    print(f"opens a feature: median {statistics.median(shown) * 1e3:.0f} ms, worst {max(shown) * 1e3:.0f}")


def random_cards(features: int, *, contexts: int = 10, tokens: int = 48, seed: int = 0) -> Iterator[FeatureCard]:
    """Cards with every field filled, some of them dead, dense or explained."""
    rng = np.random.default_rng(seed)
    densities = np.where(rng.random(features) < 0.05, 0.0, 10 ** rng.uniform(-6, -0.5, features))
    maxima = rng.uniform(2, 40, features)
    for feature in range(features):
        density = float(densities[feature])
        if not density:
            yield FeatureCard(layer=12, feature=feature, density=0.0, text_rate=0.0, maximum=0.0, mean_maximum=0.0)
            continue
        maximum = float(maxima[feature])
        # Few tokens are common, most are rare, as in texts.
        ids = (50_000 ** rng.random((contexts, tokens))).astype(int)
        values = maximum * np.maximum(rng.random((contexts, tokens)) - 0.85, 0) / 0.15
        values[:, tokens // 2] = maximum
        words = (50_000 ** rng.random(20)).astype(int).tolist()
        about = {"language": ("English", "Deutsch", "العربية", "中文")[feature % 4]}
        stretches = [
            Context(i, tokens // 2, 0, tuple(row), tuple(activations), about)
            for i, (row, activations) in enumerate(zip(ids.tolist(), values.tolist(), strict=True))
        ]
        half = max(contexts // 2, 1)
        related = rng.integers(0, features, 16).tolist()
        yield FeatureCard(
            layer=12,
            feature=feature,
            density=density,
            text_rate=min(20 * density, 1.0),
            maximum=maximum,
            mean_maximum=maximum / 3,
            histogram=tuple((maximum * i / 10, maximum * (i + 1) / 10, count) for i, count in enumerate(rng.integers(0, 500, 10).tolist())),
            groups={"language": tuple(GroupRate(name, 100, 0.4 / (i + 1), density, maximum / 4) for i, name in enumerate(("en", "de", "zh")))},
            top=tuple(stretches[:half]),
            quantiles=(QuantileContexts(maximum / 2, maximum, 40, tuple(stretches[half:])),),
            promoted=tuple((token, 2.0 - i / 10) for i, token in enumerate(words[:10])),
            suppressed=tuple((token, -1.0 + i / 10) for i, token in enumerate(words[10:])),
            neighbours=tuple((other, 0.9 - i / 10) for i, other in enumerate(related[:8])),
            cofiring=tuple((other, 0.5 - i / 20) for i, other in enumerate(related[8:])),
            explanation=f"texts about the {_WORDS[feature % len(_WORDS)]} of {_WORDS[feature % 7]}" if feature % 3 == 0 else "",
            scores={"detection": 0.8, "fuzzing": 0.7} if feature % 3 == 0 else {},
        )


def token_text(token: int) -> str:
    """A made-up vocabulary: words of several scripts with a number, every fourth after a space."""
    word = _WORDS[token % len(_WORDS)]
    return f"{' ' if token % 4 else ''}{word}{token // len(_WORDS) if token % 3 else ''}"


def browser_path() -> str | None:
    """Chromium or Chrome of this machine, if playwright can drive it."""
    try:
        import playwright.sync_api  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    return next(filter(None, map(shutil.which, (os.environ.get("CHROMIUM") or "", *_BROWSERS))), None)


@contextlib.contextmanager
def browser(executable: str) -> Iterator[Any]:
    """A headless browser; `new_page` of it has a fresh profile."""
    from playwright.sync_api import sync_playwright  # pyright: ignore[reportMissingImports]

    with sync_playwright() as playwright:
        # The sandbox asks for rights that a container's root does not have.
        running = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        try:
            yield running
        finally:
            running.close()


def open_seconds(page: Any, folder: Path) -> float:
    """From the start of the navigation until the list is there and can be searched."""
    page.goto((folder / "index.html").as_uri())
    page.locator("body[data-ready]").wait_for(state="attached")
    return page.evaluate("performance.getEntriesByName('site-ready')[0].startTime") / 1e3


def search_seconds(page: Any, query: str) -> float:
    """From a changed query until the list that answers it is laid out."""
    return page.evaluate(
        """(query) => {
          const input = document.getElementById("query");
          const start = performance.now();
          input.value = query;
          input.dispatchEvent(new Event("input"));
          document.getElementById("rows").getBoundingClientRect();
          return (performance.now() - start) / 1e3;
        }""",
        query,
    )


def feature_seconds(page: Any, feature: int) -> float:
    """From a link's click until the feature is shown; its block is loaded from disk."""
    return page.evaluate(
        """async (feature) => {
          const start = performance.now();
          location.hash = `#feature/${feature}`;
          const shown = () => document.getElementById("view").dataset.feature === String(feature);
          while (!shown() && performance.now() < start + 30_000) await new Promise(requestAnimationFrame);
          return (performance.now() - start) / 1e3;
        }""",
        feature,
    )


if __name__ == "__main__":
    main()
