"""Figures (plotly) that look alike: one palette, one template, a transparent background that suits light and dark pages."""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, SupportsFloat

from qscope_jax.errors import InputError
from qscope_jax.report.number_format import format_number
from qscope_jax.report.palette import COLORS, css

if TYPE_CHECKING:
    import plotly.graph_objects

Values = Iterable[SupportsFloat]

CLEAR = "rgba(0,0,0,0)"
_INK = "rgb(118,124,132)"  # legible on white and on black; a page replaces it by its own ink
_GRID = "rgba(128,128,128,0.22)"
_TWO_SIDED = ("rgb(178,84,0)", "rgb(238,178,112)", "rgb(245,245,245)", "rgb(120,180,220)", "rgb(0,88,150)")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
_MAX_MARKED = 40  # points on a curve that are still drawn one by one
_MAX_WRITTEN = 260  # cells of a heat map that still have room for their number
_MAX_TICKS = 42
_LONG_LABEL = 12


def bars(
    labels: Iterable[Any],
    values: Values | Mapping[str, Values],
    *,
    title: str,
    y: str,
    errors: Values | None = None,
    bounds: tuple[Values, Values] | Mapping[str, tuple[Values, Values]] | None = None,
    horizontal: bool | None = None,
) -> "plotly.graph_objects.Figure":
    """A bar for each label, or with a mapping of series a group of bars for each label.

    Args:
        labels: Names of the bars, in order; repeats are allowed.
        values: Heights, or {series: heights}.
        title: Title of the figure.
        y: What the heights are, with their unit.
        errors: Half widths of error bars, the same for every series.
        bounds: In their place the ends of intervals, which need not lie evenly around the heights: (low, high), or {series: (low, high)}.
        horizontal: Whether bars lie; by default they do when labels are many or long.

    Raises:
        InputError: a series, `errors` or `bounds` have another length than `labels`, or bounds belong to no series.
    """
    import plotly.graph_objects as go

    names = [_plain(label) for label in labels]
    series = {str(name): _floats(heights) for name, heights in values.items()} if isinstance(values, Mapping) else {"": _floats(values)}
    for name, heights in series.items():
        _check_length(f"series {name!r}" if name else "the values", heights, names, "labels")
    spreads = _spreads(series, errors, bounds, names)
    if horizontal is None:
        horizontal = len(names) > 16 or any(len(name) > _LONG_LABEL for name in names)
    places = list(range(len(names)))
    hover = "%{customdata}: %{" + ("x" if horizontal else "y") + ":.5~g}<extra>" + ("%{fullData.name}" if len(series) > 1 else "") + "</extra>"
    figure = go.Figure()
    for name, heights in series.items():
        ends: dict[str, Any] = dict(x=heights, y=places, orientation="h") if horizontal else dict(x=places, y=heights)
        if name in spreads:
            ends["error_x" if horizontal else "error_y"] = dict(type="data", **spreads[name], color=_INK, thickness=1.2, width=3)
        figure.add_bar(**ends, name=_plain(name), customdata=names, hovertemplate=hover)
    label_axis = dict(tickvals=places, ticktext=names, showgrid=False)
    label_axis |= dict(autorange="reversed") if horizontal else {}
    value_axis = dict(title=_plain(y), rangemode="tozero")
    height = 110 + max(len(names) * (8 + 16 * len(series)), 120) if horizontal else 380
    axes: dict[str, Any] = dict(xaxis=value_axis, yaxis=label_axis) if horizontal else dict(xaxis=label_axis, yaxis=value_axis)
    return figure.update_layout(**_layout(title, height, legend=len(series) > 1), **axes)


def curves(
    x: Values,
    lines: Mapping[str, Values],
    *,
    title: str,
    x_title: str,
    y_title: str,
    bands: Mapping[str, tuple[Values, Values]] | None = None,
    log_x: bool = False,
    log_y: bool = False,
) -> "plotly.graph_objects.Figure":
    """Curves over one x axis, each with an optional band: dose curves, training curves.

    Args:
        x: Positions on the x axis.
        lines: {name: heights}; a gap where a height is not a number.
        title: Title of the figure.
        x_title: What x is, with its unit.
        y_title: What y is, with its unit.
        bands: {name: (low, high)} for any of `lines`.
        log_x: Whether x is logarithmic.
        log_y: Whether y is logarithmic.

    Raises:
        InputError: a curve or band has another length than `x`, or a band belongs to no curve.
    """
    import plotly.graph_objects as go

    places = _floats(x)
    bands = bands or {}
    if strangers := sorted(set(bands) - set(lines)):
        raise InputError(f"band {strangers[0]!r} belongs to no curve; curves are {', '.join(map(repr, lines))}")
    figure = go.Figure()
    for i, (name, heights) in enumerate(lines.items()):
        rgb = list(COLORS.values())[i % len(COLORS)]
        heights = _floats(heights)
        _check_length(f"curve {name!r}", heights, places, "positions on the x axis")
        if name in bands:
            low, high = map(_floats, bands[name])
            _check_length(f"band {name!r}", low, places, "positions on the x axis")
            _check_length(f"band {name!r}", high, places, "positions on the x axis")
            edge = dict(x=places, mode="lines", line=dict(width=0), legendgroup=_plain(name), showlegend=False, hoverinfo="skip")
            figure.add_scatter(y=low, **edge)
            figure.add_scatter(y=high, fill="tonexty", fillcolor=css(rgb, 0.18), **edge)
        figure.add_scatter(
            x=places, y=heights, name=_plain(name), legendgroup=_plain(name), hovertemplate="%{y:.5~g}",
            mode="lines+markers" if len(places) <= _MAX_MARKED else "lines", marker=dict(size=6),
            line=dict(color=css(rgb), width=2.2, dash=_DASHES[i % len(_DASHES)]),
        )  # fmt: skip
    x_axis = dict(title=_plain(x_title), type="log" if log_x else "linear")
    y_axis = dict(title=_plain(y_title), type="log" if log_y else "linear")
    return figure.update_layout(**_layout(title, 400, legend=len(lines) > 1), xaxis=x_axis, yaxis=y_axis, hovermode="x unified")


def heat_map(
    rows: Sequence[Any],
    columns: Sequence[Any],
    values: Iterable[Values],
    *,
    title: str,
    x_title: str = "",
    y_title: str = "",
    value_title: str = "",
) -> "plotly.graph_objects.Figure":
    """A matrix as coloured cells, first row on top; numbers in the cells where there is room.

    Values of both signs get a two-sided scale centred on zero.

    Args:
        rows: Row names; repeats are allowed.
        columns: Column names; repeats are allowed.
        values: One sequence of numbers a row.
        title: Title of the figure.
        x_title: What columns are.
        y_title: What rows are.
        value_title: What the numbers are, beside the colour scale.

    Raises:
        InputError: the values do not fill rows x columns.
    """
    import plotly.graph_objects as go

    cells = [_floats(row) for row in values]
    _check_length("the values", cells, rows, "rows")
    for name, row in zip(rows, cells, strict=True):
        _check_length(f"row {name!r}", row, columns, "columns")
    row_names, column_names = [_plain(name) for name in rows], [_plain(name) for name in columns]
    finite = [number for row in cells for number in row if math.isfinite(number)]
    written = len(row_names) * len(column_names) <= _MAX_WRITTEN and len(column_names) <= 20
    figure = go.Figure()
    figure.add_heatmap(
        z=cells, x=list(range(len(column_names))), y=list(range(len(row_names))), **_scale(finite), xgap=1, ygap=1,
        customdata=[[f"{row}, {column}" for column in column_names] for row in row_names],
        hovertemplate="%{customdata}: %{z:.5~g}<extra></extra>",
        text=[[_short(number) for number in row] for row in cells] if written else None, texttemplate="%{text}" if written else None,
        colorbar=dict(title=_plain(value_title), thickness=12, outlinewidth=0),
    )  # fmt: skip
    x_axis = dict(title=_plain(x_title), **_ticks(column_names))
    y_axis = dict(title=_plain(y_title), **_ticks(row_names), autorange="reversed")
    height = min(max(130 + 26 * len(row_names), 260), 1200)
    return figure.update_layout(**_layout(title, height), xaxis=x_axis, yaxis=y_axis)


def histogram(
    values: Values,
    *,
    title: str,
    x_title: str,
    y_title: str = "count",
    bins: int | None = None,
    log_y: bool = False,
    marks: Mapping[str, SupportsFloat] | None = None,
) -> "plotly.graph_objects.Figure":
    """How often each size of value occurs; only the counts go into the figure, so any number of values is fine.

    Args:
        values: Numbers; those that are not finite are left out.
        title: Title of the figure.
        x_title: What the values are, with their unit.
        y_title: What is counted.
        bins: Number of bins; by default the Freedman-Diaconis or Sturges rule decides, up to 100.
        log_y: Whether counts are drawn on a logarithmic scale.
        marks: {label: position} of vertical lines.

    Raises:
        InputError: no value is finite, or `bins` is below 1.
    """
    import numpy as np
    import plotly.graph_objects as go

    numbers = np.asarray(_floats(values))
    numbers = numbers[np.isfinite(numbers)]
    if not numbers.size:
        raise InputError(f"the histogram {title!r} got no finite value; give at least one")
    if bins is None:
        # Counting edges with numpy's own rule would make an array of any size where one value lies far out.
        spread = np.subtract(*np.percentile(numbers, [75, 25])) * 2 / numbers.size ** (1 / 3)
        wanted = np.ptp(numbers) / spread if spread > 0 else math.log2(numbers.size) + 1
        bins = int(min(max(math.ceil(wanted), 1), 100))
    if bins < 1:
        raise InputError(f"the histogram {title!r} was asked for {bins} bins; give at least 1")
    counts, edges = np.histogram(numbers, bins=bins)
    figure = go.Figure()
    figure.add_bar(
        x=((edges[1:] + edges[:-1]) / 2).tolist(), width=np.diff(edges).tolist(), y=counts.tolist(),
        customdata=[f"{format_number(low)} to {format_number(high)}" for low, high in zip(edges[:-1], edges[1:], strict=True)],
        hovertemplate="%{customdata}: %{y}<extra></extra>",
    )  # fmt: skip
    for label, place in (marks or {}).items():
        figure.add_vline(x=float(place), line=dict(color=css(COLORS["red"]), dash="dash", width=1.5), annotation_text=_plain(label))
    y_axis = dict(title=_plain(y_title), type="log" if log_y else "linear")
    return figure.update_layout(**_layout(title, 360), xaxis=dict(title=_plain(x_title)), yaxis=y_axis, bargap=0)


def template() -> "plotly.graph_objects.layout.Template":
    """The template of every figure here, for figures made elsewhere: `figure.update_layout(template=template())`."""
    import plotly.graph_objects as go

    axis = dict(
        gridcolor=_GRID, linecolor=_GRID, zerolinecolor="rgba(128,128,128,0.5)", zerolinewidth=1,
        automargin=True, ticks="", title=dict(standoff=10, font_size=13),
    )  # fmt: skip
    layout = dict(
        colorway=[css(rgb) for rgb in COLORS.values()],
        paper_bgcolor=CLEAR,
        plot_bgcolor=CLEAR,
        font=dict(family="system-ui, 'Segoe UI', 'Noto Sans', 'Noto Sans CJK SC', sans-serif", size=13, color=_INK),
        title=dict(x=0, xref="container", xanchor="left", font_size=15, y=1, yref="container", yanchor="top", pad=dict(l=2, t=10)),
        margin=dict(l=8, r=8, t=48, b=8),
        legend=dict(orientation="h", x=0, y=1, xanchor="left", yanchor="bottom", bgcolor=CLEAR),
        xaxis=axis,
        yaxis=axis,
        modebar=dict(bgcolor=CLEAR, color=_INK, activecolor=css(COLORS["blue"])),
        barcornerradius=2,
    )
    return go.layout.Template(layout=layout)


def _layout(title: str, height: int, legend: bool = False) -> dict[str, Any]:
    # The legend is a line of its own between title and plot.
    return dict(template=template(), title_text=_plain(title), height=height, showlegend=legend, margin_t=72 if legend else 48)


def _ticks(names: list[str]) -> dict[str, Any]:
    """Tick labels at places 0, 1, ...; every so many where there is no room for all."""
    step = -(-len(names) // _MAX_TICKS) or 1
    return dict(tickvals=list(range(0, len(names), step)), ticktext=names[::step], showgrid=False)


def _scale(finite: list[float]) -> dict[str, Any]:
    """The colour scale for these numbers: two-sided and symmetric if both signs occur, else from faint to strong."""
    if finite and min(finite) < 0 < max(finite):
        end = max(abs(number) for number in finite)
        return dict(colorscale=_TWO_SIDED, zmin=-end, zmax=end)
    return dict(colorscale="Cividis")


def _spreads(
    series: Mapping[str, list[float]],
    errors: Values | None,
    bounds: tuple[Values, Values] | Mapping[str, tuple[Values, Values]] | None,
    names: Sequence[str],
) -> dict[str, dict[str, list[float]]]:
    """Error bars of each series, in plotly's terms: lengths above the heights, and below where they differ."""
    if errors is not None:
        spread = _floats(errors)
        _check_length("the error bars", spread, names, "labels")
        return {name: {"array": spread} for name in series}
    found = {}
    for name, ends in (bounds if isinstance(bounds, Mapping) else {} if bounds is None else dict.fromkeys(series, bounds)).items():
        if name not in series:
            raise InputError(f"bounds {name!r} belong to no series; series are {', '.join(map(repr, series))}")
        low, high = map(_floats, ends)
        for end in (low, high):
            _check_length("the bounds", end, names, "labels")
        heights = series[name]
        found[name] = {
            "array": [max(end - height, 0.0) for end, height in zip(high, heights, strict=True)],
            "arrayminus": [max(height - end, 0.0) for end, height in zip(low, heights, strict=True)],
        }
    return found


def _short(number: float) -> str:
    return f"{number:.3g}" if math.isfinite(number) else ""


def _floats(values: Iterable[SupportsFloat]) -> list[float]:
    return [float(value) for value in values]


def _plain(text: Any) -> str:
    """Text that plotly shows as it stands: it would read `<b>` as markup otherwise."""
    return html.escape(str(text), quote=False)


def _check_length(name: str, values: Sequence[Any], partner: Sequence[Any], partner_name: str) -> None:
    if len(values) != len(partner):
        raise InputError(f"{name}: {len(values)} entries for {len(partner)} {partner_name}; give as many of the one as of the other")
