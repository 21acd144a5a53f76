"""Sentences from templates: every slot of a template is filled with one of its values."""

import random
from collections.abc import Mapping, Sequence


def expand(template: str, slots: Mapping[str, Sequence[str]], rng: random.Random) -> str:
    """Fill every slot of a template, such as `{person} left.`, with a random value of its own."""
    return template.format_map(_Draw(slots, rng))


class _Draw(dict[str, str]):
    """Mapping that draws a fresh value for every slot of a template."""

    def __init__(self, slots: Mapping[str, Sequence[str]], rng: random.Random):
        self._slots, self._rng = slots, rng

    def __missing__(self, name: str) -> str:
        return self._rng.choice(self._slots[name])
