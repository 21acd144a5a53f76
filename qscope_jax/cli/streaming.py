"""Tokens as text while they come."""

import re
from collections.abc import Callable, Collection, Sequence

_PARTIAL = "\ufffd"
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class TextStream:
    """Turns a growing list of tokens into pieces of text; a character whose bytes are spread over tokens waits for its last one."""

    def __init__(self, decode: Callable[[Sequence[int]], str], write: Callable[[str], object], stop_ids: Collection[int] = ()):
        """Begin with no tokens.

        Args:
            decode: Text of token ids.
            write: Takes every piece of text.
            stop_ids: Tokens that are not shown when they come last.
        """
        self._decode, self._write, self._stop_ids = decode, write, frozenset(stop_ids)
        # Tokens before `_written` have been written; those from `_context` on are decoded along, as some tokenizers treat a first token apart.
        self._context = self._written = 0

    def update(self, ids: Sequence[int]) -> None:
        """Write what is new in `ids`, all tokens so far, up to the last whole character."""
        self._show(ids, whole_only=True)

    def finish(self, ids: Sequence[int]) -> None:
        """Write what was held back."""
        self._show(ids, whole_only=False)

    def _show(self, ids: Sequence[int], *, whole_only: bool) -> None:
        shown = ids[:-1] if ids and ids[-1] in self._stop_ids else ids
        if len(shown) <= self._written:
            return
        text = self._decode(shown[self._context :])
        if whole_only and text.endswith(_PARTIAL):
            return
        before = self._decode(shown[self._context : self._written])
        # A model's text must not steer the terminal.
        self._write(_CONTROLS.sub(_PARTIAL, text[len(before) :]))
        self._context, self._written = self._written, len(shown)
