"""The colours of every picture, page and terminal table: Okabe and Ito's, told apart under every common colour blindness.

Source: M. Okabe and K. Ito, "Color Universal Design" (2008); yellow is left out because it fades on white.
"""

from qscope_jax.errors import InputError

Rgb = tuple[int, int, int]

COLORS: dict[str, Rgb] = {
    "blue": (0, 114, 178),
    "orange": (230, 159, 0),
    "green": (0, 158, 115),
    "red": (213, 94, 0),
    "purple": (204, 121, 167),
    "sky": (86, 180, 233),
    "grey": (128, 128, 128),
}

_WARM = ("orange", "red", "purple")


def color(name: str) -> Rgb:
    """Red, green and blue (0-255) of a palette colour.

    Raises:
        InputError: the palette has no such colour.
    """
    if name not in COLORS:
        raise InputError(f"color {name!r} is not in the palette; choose one of {', '.join(COLORS)}")
    return COLORS[name]


def opposite(name: str) -> Rgb:
    """The colour for negative values where positive ones have the colour `name`."""
    color(name)
    return COLORS["blue"] if name in _WARM else COLORS["red"]


def css(rgb: Rgb, alpha: float = 1.0) -> str:
    """The colour as CSS and plotly write it, with opacity `alpha` (0-1)."""
    red, green, blue = rgb
    return f"rgba({red},{green},{blue},{alpha:g})" if alpha < 1 else f"rgb({red},{green},{blue})"
