# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# (plotly makes the attributes of its figures at run time)
import math

import jax.numpy as jnp
import numpy as np
import plotly.graph_objects as go
import pytest

from qscope_jax.errors import InputError
from qscope_jax.report.figures import bars, curves, heat_map, histogram, template
from qscope_jax.report.palette import COLORS, css


def test_bars_keep_repeated_labels_apart():
    figure = bars(["the", "the", "1"], np.asarray([1, 2, 3], np.float32), title="t", y="count")
    assert list(figure.data[0].x) == [0, 1, 2] and list(figure.data[0].y) == [1, 2, 3]
    assert list(figure.layout.xaxis.ticktext) == ["the", "the", "1"]


def test_bars_lie_where_labels_are_long_and_read_from_the_top():
    figure = bars(["a label that is long", "b"], [1, 2], title="t", y="count", errors=[0.1, 0.2])
    assert figure.data[0].orientation == "h" and list(figure.data[0].x) == [1, 2]
    assert figure.layout.yaxis.autorange == "reversed" and list(figure.data[0].error_x.array) == [0.1, 0.2]


def test_bars_have_intervals_of_their_own_that_need_not_be_even():
    heights = {"before": [0.5, 0.0], "after": [0.25, 0.0]}
    figure = bars(["a", "b"], heights, title="t", y="share", bounds={"before": ([0.25, 0.0], [1.0, 0.5])})
    assert list(figure.data[0].error_y.array) == [0.5, 0.5] and list(figure.data[0].error_y.arrayminus) == [0.25, 0]
    assert figure.data[1].error_y.array is None
    alone = bars(["a", "b"], [2, 1], title="t", y="share", bounds=([1, 1], [4, 3]), horizontal=True)
    assert list(alone.data[0].error_x.array) == [2, 2] and list(alone.data[0].error_x.arrayminus) == [1, 0]
    with pytest.raises(InputError, match="bounds 'other' belong to no series; series are 'before', 'after'"):
        bars(["a", "b"], heights, title="t", y="share", bounds={"other": ([0, 0], [0, 0])})
    with pytest.raises(InputError, match="the bounds: 1 entries for 2 labels"):
        bars(["a", "b"], [1, 2], title="t", y="share", bounds=([0], [3, 3]))


def test_a_mapping_of_series_gives_grouped_bars_with_a_legend():
    figure = bars(["a", "b"], {"before": [1, 2], "after": [3, 4]}, title="t", y="count")
    assert [trace.name for trace in figure.data] == ["before", "after"] and figure.layout.showlegend


def test_curves_draw_each_line_with_its_band_below_it():
    figure = curves([0, 1], {"a": [1, 2], "b": [3, math.nan]}, title="t", x_title="x", y_title="y", bands={"b": ([2, 3], [4, 5])})
    assert [trace.name for trace in figure.data] == ["a", None, None, "b"]
    assert figure.data[2].fill == "tonexty" and list(figure.data[1].y) == [2, 3] and list(figure.data[2].y) == [4, 5]
    assert figure.data[3].line.color == css(COLORS["orange"])


def test_a_heat_map_of_both_signs_is_centred_on_zero():
    figure = heat_map(["a", "a"], [0, 1], jnp.asarray([[-1.0, 0.5], [3.0, math.nan]]), title="t")
    trace = figure.data[0]
    assert (trace.zmin, trace.zmax) == (-3, 3) and trace.text[1][1] == "" and list(figure.layout.yaxis.ticktext) == ["a", "a"]
    assert heat_map(["a"], [0, 1], [[1, 2]], title="t").data[0].zmin is None


def test_a_wide_heat_map_names_some_columns_and_writes_no_numbers():
    figure = heat_map(["a"], range(100), [range(100)], title="t")
    assert figure.data[0].text is None and list(figure.layout.xaxis.tickvals)[:3] == [0, 3, 6]


def test_a_histogram_counts_every_finite_value_once():
    values = np.r_[np.random.default_rng(0).normal(size=1000), math.nan, math.inf, 1e9]
    figure = histogram(values, title="t", x_title="x", marks={"here": 0.5})
    assert sum(figure.data[0].y) == 1001 and len(figure.data[0].y) <= 100
    assert figure.layout.shapes[0].x0 == 0.5 and figure.layout.annotations[0].text == "here"
    assert len(histogram([2.0, 2.0], title="t", x_title="x", bins=4).data[0].y) == 4


def test_every_figure_is_transparent_and_shows_labels_as_they_stand():
    name = "<b>x</b>"
    figures = [
        bars([name], [1], title=name, y=name),
        curves([0], {name: [1]}, title=name, x_title=name, y_title=name),
        heat_map([name], [name], [[1]], title=name, x_title=name, y_title=name, value_title=name),
        histogram([1], title=name, x_title=name),
    ]
    for figure in figures:
        assert isinstance(figure, go.Figure) and figure.layout.template.layout.paper_bgcolor == template().layout.paper_bgcolor == "rgba(0,0,0,0)"
        assert "<b>" not in str(figure.to_plotly_json()["data"]) + str(figure.layout.title) + str(figure.layout.xaxis) + str(figure.layout.yaxis)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bars(["a"], [1, 2], title="t", y="y"), "2 entries for 1 labels"),
        (lambda: bars(["a"], [1], title="t", y="y", errors=[1, 2]), "error bars.*2 entries for 1"),
        (lambda: curves([0], {"a": [1, 2]}, title="t", x_title="x", y_title="y"), "curve 'a'.*2 entries for 1"),
        (lambda: curves([0], {"a": [1]}, title="t", x_title="x", y_title="y", bands={"b": ([0], [1])}), "band 'b'"),
        (lambda: curves([0], {"a": [1]}, title="t", x_title="x", y_title="y", bands={"a": ([0], [1, 2])}), "band 'a'.*2 entries"),
        (lambda: heat_map(["a"], [0], [[1], [2]], title="t"), "2 entries for 1 rows"),
        (lambda: heat_map(["a"], [0], [[1, 2]], title="t"), "row 'a'.*2 entries for 1 columns"),
        (lambda: histogram([math.nan], title="t", x_title="x"), "no finite value"),
        (lambda: histogram([1], title="t", x_title="x", bins=0), "0 bins"),
    ],
)
def test_data_that_does_not_fit_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
