"""A browsable site of a layer's features: one folder that opens from disk or any static server, and asks no other machine for anything.

    index.html          the program and its style, in one file
    site.json           says that the folder is such a site
    data/index0.js ...  what the list, its search and its filters need, of all features
    data/block0.js ...  all that is known of some hundred features each, loaded when one of them is opened

The program is `site_assets/`, the look that of every page here (`style.css`).
"""

import base64
import hashlib
import html
import importlib.resources
import json
import os
import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from qscope_jax.data.files import atomic_path, plain, read_json, write_json
from qscope_jax.errors import InputError, SourceError
from qscope_jax.features.explain.feature_card import FeatureCard
from qscope_jax.report import palette
from qscope_jax.report.number_format import format_number
from qscope_jax.report.site_data import Block, IndexPart, data_script

SITE_FILE = "site.json"
FORMAT = "qscope_jax feature site"

BLOCK_FEATURES = 128
"""Features whose details are one file: about a megabyte with ten contexts each."""

INDEX_FEATURES = 8192
"""Features in one file of the index."""

_SCRIPTS = ("format.js", "data.js", "search.js", "elements.js", "tokens.js", "charts.js", "feature.js", "list.js", "main.js")
_SURROGATES = re.compile("[\ud800-\udfff]")


def write_site(
    folder: str | os.PathLike[str],
    cards: Iterable[FeatureCard],
    *,
    title: str,
    subtitle: str = "",
    token_text: Callable[[int], str],
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Write a site of the features of one layer, whole or not at all, and return its folder.

    Cards are taken one by one; memory holds a block of them, not all. The site can be opened as a file (`index.html`) or served by anything
    that serves files; `index.html#feature/17` opens a feature.

    Args:
        folder: Where it appears. An older site there is replaced; anything else is not.
        cards: Features in the order in which the list first shows them.
        title: What the features are of.
        subtitle: A line below the title.
        token_text: What a token reads as by itself, from its id, such as `store.vocabulary.__getitem__`.
        about: What the site says of itself, such as model, SAE and corpus: names and values.

    Raises:
        SourceError: the folder holds something else, or cannot be written to.
        InputError: there is no card, a feature comes twice, or cards are of several layers.
    """
    target = Path(folder).expanduser().resolve()
    _check_replaceable(target)
    # A token recurs in most blocks, and to decode one may cost more than to remember it.
    text = lru_cache(maxsize=None)(token_text)
    digest = hashlib.sha256()
    with atomic_path(target, directory=True) as temporary:
        (temporary / "data").mkdir()
        counts = _write_data(temporary / "data", _checked(cards), text, digest.update)
        # Blocks carry the whole's name, so that a browser never mixes an old block that it has kept with a new index.
        site = {**counts, "block": BLOCK_FEATURES, "version": digest.hexdigest()[:12], "about": _facts(about or {})}
        page = _page(title, subtitle, site)
        (temporary / "index.html").write_text(page, encoding="utf-8")
        write_json(temporary / SITE_FILE, {"format": FORMAT, "title": _whole(title), **counts, "version": site["version"]})
    return target


def holds_site(folder: Path) -> bool:
    """Whether a folder is such a site, which may be replaced by another."""
    try:
        return read_json(folder / SITE_FILE).get("format") == FORMAT
    except SourceError:
        return False


def _check_replaceable(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise SourceError(f"{target}: is a file, expected the name of a folder for the site; choose another")
    if target.is_dir() and any(target.iterdir()) and not holds_site(target):
        raise SourceError(f"{target}: holds something else than a site of features; choose an empty or a new folder")


def _checked(cards: Iterable[FeatureCard]) -> Iterator[FeatureCard]:
    """The cards, as long as they are of one layer and no feature comes twice."""
    layer, seen = None, set()
    for card in cards:
        layer = card.layer if layer is None else layer
        if card.layer != layer:
            raise InputError(f"a site shows one layer; cards of layers {layer} and {card.layer} came; write a site for each")
        if card.feature in seen:
            raise InputError(f"feature {card.feature} of layer {layer} came twice; give each feature once")
        seen.add(card.feature)
        yield card
    if layer is None:
        raise InputError("a site needs at least one feature; no card came")


def _write_data(folder: Path, cards: Iterable[FeatureCard], text: Callable[[int], str], update: Callable[[bytes], None]) -> dict[str, Any]:
    """Write index and blocks; return the layer and what was written. `update` sees every byte."""
    counts = {"layer": 0, "features": 0, "parts": 0, "blocks": 0}

    def write(name: str, value: Any) -> None:
        script = data_script(name, value).encode()
        update(script)
        (folder / f"{name}.js").write_bytes(script)

    def write_part() -> None:
        write(f"index{counts['parts']}", part.columns)
        counts["parts"] += 1

    def write_block() -> None:
        write(f"block{counts['blocks']}", block.value())
        counts["blocks"] += 1

    part, block = IndexPart(text), Block(text)
    for card in cards:
        counts["layer"] = card.layer
        counts["features"] += 1
        part.add(card)
        block.add(card)
        if len(block) == BLOCK_FEATURES:
            write_block()
            block = Block(text)
        if len(part) == INDEX_FEATURES:
            write_part()
            part = IndexPart(text)
    if len(block):
        write_block()
    if len(part):
        write_part()
    return counts


def _page(title: str, subtitle: str, site: Mapping[str, Any]) -> str:
    """The one document. Its policy lets this script run and load scripts, and nothing else be fetched."""
    heat, cold = (" ".join(map(str, rgb)) for rgb in (palette.color("blue"), palette.opposite("blue")))
    style = f"\n{_asset('style.css')}\n:root {{ --heat: {heat}; --cold: {cold}; }}\n{_asset('site_assets', 'site.css')}"
    program = "\n".join(_asset("site_assets", name) for name in _SCRIPTS)
    script = f'\n(() => {{\n"use strict";\n{program}}})();\n'
    sources = f"script-src {_hash(script)} 'strict-dynamic'; style-src {_hash(style)}; img-src data:"
    policy = f"default-src 'none'; {sources}; base-uri 'none'; form-action 'none'"
    facts = _whole(json.dumps(plain(site), ensure_ascii=False)).replace("<", "\\u003c")
    return string.Template(_asset("site_assets", "index.html")).substitute(
        policy=policy, title=_escape(title), subtitle=_escape(subtitle), style=style, script=script, site=facts
    )


def _facts(about: Mapping[str, Any]) -> list[list[str]]:
    return [[_whole(str(name)), _whole(format_number(value))] for name, value in about.items()]


def _asset(*name: str) -> str:
    return importlib.resources.files("qscope_jax.report").joinpath(*name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _escape(text: str) -> str:
    return html.escape(_whole(text))


def _whole(text: str) -> str:
    """The text without halves of surrogate pairs, which UTF-8 cannot hold."""
    return _SURROGATES.sub("\ufffd", str(text))
