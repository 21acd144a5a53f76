"""Figures of benchmarks: points with their names, a tree, coverage curves."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, SupportsFloat

import numpy as np
from jaxtyping import Float

from qscope_jax.errors import InputError
from qscope_jax.report.figures import curves, template
from qscope_jax.report.palette import COLORS, css

if TYPE_CHECKING:
    import plotly.graph_objects

_NAMED = 40  # points that still have room for their names beside them


def scatter(
    names: Sequence[str], x: Iterable[SupportsFloat], y: Iterable[SupportsFloat], *, title: str, x_title: str, y_title: str
) -> "plotly.graph_objects.Figure":
    """Points with names, such as a benchmark's redundancy by features and by performance.

    Raises:
        InputError: names and coordinates differ in number.
    """
    import plotly.graph_objects as go

    xs, ys = [float(value) for value in x], [float(value) for value in y]
    if not len(names) == len(xs) == len(ys):
        raise InputError(f"{len(names)} names for {len(xs)} and {len(ys)} coordinates; give as many of each")
    named = len(names) <= _NAMED
    figure = go.Figure()
    figure.add_scatter(
        x=xs, y=ys, mode="markers+text" if named else "markers", text=[_plain(name) for name in names] if named else None,
        textposition="top center", textfont=dict(size=11), customdata=[_plain(name) for name in names], marker=dict(size=8, opacity=0.85),
        hovertemplate="%{customdata}: %{x:.5~g}, %{y:.5~g}<extra></extra>",
    )  # fmt: skip
    return figure.update_layout(**_layout(title, 420), xaxis=dict(title=_plain(x_title)), yaxis=dict(title=_plain(y_title)))


def tree(joins: Float[np.ndarray, "M 4"], names: Sequence[str], *, title: str, x_title: str) -> "plotly.graph_objects.Figure":
    """A tree of clusters, leaves below each other in the order of the linkage table.

    Args:
        joins: SciPy's linkage table.
        names: Names of the leaves.
        title: Title of the figure.
        x_title: What the distance at which clusters join is.
    """
    import plotly.graph_objects as go
    from scipy.cluster.hierarchy import dendrogram

    drawn: dict[str, Any] = dict(dendrogram(joins, no_plot=True))
    figure = go.Figure()
    for distances, places in zip(drawn["dcoord"], drawn["icoord"], strict=True):
        figure.add_scatter(
            x=distances, y=places, mode="lines", line=dict(color=css(COLORS["blue"]), width=2), hovertemplate="%{x:.3f}<extra></extra>"
        )
    # SciPy puts leaves at 5, 15, 25, ...
    ticks = dict(tickvals=[5 + 10 * place for place in range(len(names))], ticktext=[_plain(names[int(leaf)]) for leaf in drawn["leaves"]])
    y_axis = dict(showgrid=False, zeroline=False, autorange="reversed", **ticks)
    return figure.update_layout(**_layout(title, 130 + 24 * len(names)), xaxis=dict(title=_plain(x_title), rangemode="tozero"), yaxis=y_axis)


def coverage_curves(coverage: Mapping[str, tuple[Sequence[int], Float[np.ndarray, " N"]]]) -> "plotly.graph_objects.Figure":
    """How much of its footprint a benchmark's subsets cover, over their size.

    Args:
        coverage: For each benchmark the sizes to draw, and c_n for all n = 1, ..., N.
    """
    sizes = sorted({int(size) for chosen, _ in coverage.values() for size in chosen})
    lines = {name: [shares[size - 1] if size <= len(shares) else np.nan for size in sizes] for name, (_, shares) in coverage.items()}
    return named_curves(sizes, lines, title="Coverage curves", x_title="samples", y_title="share of the footprint", log_x=True)


def named_curves(x: Sequence[int], lines: Mapping[str, Sequence[float]], **labels: Any) -> "plotly.graph_objects.Figure":
    """Curves whose names stand beside them in a column, for many of them or long ones; `labels` are those of `curves`."""
    legend = dict(orientation="v", x=1.02, y=1, xanchor="left", yanchor="top")
    return curves(x, lines, **labels).update_layout(legend=legend, margin_t=48, height=max(400, 120 + 26 * len(lines)))


def _layout(title: str, height: int) -> dict[str, Any]:
    return dict(template=template(), title_text=_plain(title), height=height, showlegend=False)


def _plain(text: str) -> str:
    """Text that plotly shows as it stands."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
