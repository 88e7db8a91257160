import re
from collections.abc import Sequence
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow.errors import ReportError
from counterflow.report import line_plot
from counterflow.report.plot import HEIGHT, LEFT, TOP, WIDTH, apart, ticks
from strategies import names

SVG = "{http://www.w3.org/2000/svg}"
Lines = dict[str, Sequence[float | None]]


def plotted(x: Sequence[float], lines: Lines) -> ElementTree.Element:
    return ElementTree.fromstring(line_plot("title", "ranks", "µs", x, lines))


def hovers(root: ElementTree.Element) -> list[str | None]:
    return [title.text for title in root.iter(f"{SVG}title")]


def labels(root: ElementTree.Element) -> dict[str | None, float]:
    """The lines' names with their heights."""
    return {text.text: float(text.get("y", "nan")) for text in root.iter(f"{SVG}text") if text.get("class") == "name"}


def paths(root: ElementTree.Element) -> list[ElementTree.Element]:
    """The lines between points, without the pieces beside their names."""
    drawn = [path for path in root.iter(f"{SVG}path") if path.get("class") == "line"]
    return [path for path in drawn if "h" not in path.get("d", "")]


def test_every_value_is_a_point_that_tells_its_line_and_place() -> None:
    root = plotted([4, 8], {"1f1b": [9, 21], "zb1p": [3, 7.5]})
    assert hovers(root) == ["1f1b: 4, 9", "1f1b: 8, 21", "zb1p: 4, 3", "zb1p: 8, 7.5"]


def test_points_stand_to_scale() -> None:
    root = plotted([1, 2, 5], {"a": [0, 1, 4]})
    xs, ys = ([float(circle.get(at, "nan")) for circle in root.iter(f"{SVG}circle")] for at in ("cx", "cy"))
    assert xs[2] - xs[0] == pytest.approx(4 * (xs[1] - xs[0]))
    assert ys[2] - ys[0] == pytest.approx(4 * (ys[1] - ys[0]))
    assert ys[2] < ys[0]


def axis_starts_at_zero(values: list[float | None]) -> bool:
    root = plotted(range(len(values)), {"a": values})
    return "0" in [text.text for text in root.iter(f"{SVG}text") if text.get("class") == "note y"]


def test_the_axis_starts_at_zero_unless_most_of_it_would_be_empty() -> None:
    assert axis_starts_at_zero([10, 21])
    assert axis_starts_at_zero([-3, -1])
    assert not axis_starts_at_zero([44, 69])


def test_a_missing_value_is_a_hole() -> None:
    root = plotted([1, 2, 3, 4, 5], {"a": [1, 2, None, 4, 5]})
    assert [path.get("d", "").count("L") for path in paths(root)] == [1, 1]
    assert len(hovers(root)) == 4


def test_a_line_without_values_is_told_and_not_drawn() -> None:
    root = plotted([1, 2], {"a": [1, 2], "b": [None, None]})
    assert labels(root).keys() == {"a"}
    assert "without a value: b" in [text.text for text in root.iter(f"{SVG}text")]


def test_equal_lines_are_both_seen() -> None:
    root = plotted([1, 2], {"a": [1, 2], "b": [1, 2], "c": [2, 3]})
    assert [path.get("stroke-dasharray") is not None for path in paths(root)] == [False, True, False]


def test_x_may_come_in_any_order() -> None:
    assert hovers(plotted([8, 4], {"a": [2, 1]})) == ["a: 4, 1", "a: 8, 2"]


def test_names_at_the_ends_do_not_overlap() -> None:
    root = plotted([1, 2], {f"line {index}": [5, 5 + index / 100] for index in range(12)})
    heights = sorted(labels(root).values())
    assert len(heights) == 12
    assert all(below - above > 15 for above, below in zip(heights, heights[1:], strict=False))
    assert heights[-1] < float(root.get("height", "nan"))


@given(st.lists(st.floats(0, 100), max_size=20))
def test_labels_keep_their_order_their_distance_and_within_bounds(wanted: list[float]) -> None:
    placed = apart(wanted, 10, 0, 300)
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    heights = [placed[index] for index in order]
    assert all(after - before >= 10 - 1e-9 for before, after in zip(heights, heights[1:], strict=False))
    assert all(-1e-9 <= height <= 300 + 1e-9 for height in heights)


def test_a_label_with_room_stays_where_it_is() -> None:
    assert apart([5, 50, 30], 16, 0, 100) == [5, 50, 30]


@given(st.floats(-1e9, 1e9), st.floats(0.01, 1e9), st.booleans())
def test_ticks_are_few_round_and_evenly_spaced(low: float, span: float, outward: bool) -> None:
    high = low + span
    found = ticks(low, high, outward)
    assert 2 <= len(found) <= 9
    if outward:
        assert found[0] <= low + span / 1e6
        assert found[-1] >= high - span / 1e6
    else:
        assert all(low - span / 1e6 <= value <= high + span / 1e6 for value in found)
    assert ticks(0, 21, outward=True) == [0, 5, 10, 15, 20, 25]


@given(names, names, names)
def test_any_text_stays_text(title: str, label: str, name: str) -> None:
    picture = line_plot(f"<script>{title}", label, "<b>", [1], {f"&<{name}": [1.0]})
    root = ElementTree.fromstring(picture.encode("utf-8"))
    assert {element.tag.removeprefix(SVG) for element in root.iter()} <= {
        *("svg", "style", "rect", "text", "path", "g", "circle", "title")
    }


def test_one_point_and_no_line_can_be_plotted() -> None:
    assert hovers(plotted([3], {"a": [0]})) == ["a: 3, 0"]
    assert hovers(plotted([3, 4], {})) == []


def test_a_mark_is_an_upright_rule_with_its_name_at_its_place() -> None:
    drawn = ElementTree.fromstring(line_plot("", "", "", [0, 100], {"a": [0, 1]}, marks={"late <b>": 75, "early": 25}))
    rules = [each.get("d") for each in drawn.iter(f"{SVG}path") if "mark" in each.get("class", "")]
    assert rules == [f"M{LEFT + WIDTH * share:g} {TOP}v{HEIGHT}" for share in (0.25, 0.75)]
    named = {each.text: float(each.get("x", "")) for each in drawn.iter(f"{SVG}text")}
    assert named["early"] > LEFT + WIDTH * 0.25
    assert named["late <b>"] < LEFT + WIDTH * 0.75
    with pytest.raises(ReportError, match=re.escape("the mark 'far' is at 101, and x goes from 0 to 100")):
        line_plot("", "", "", [0, 100], {"a": [0, 1]}, marks={"far": 101})


def test_colours_follow_the_viewer_unless_a_theme_is_fixed() -> None:
    follows, dark = (line_plot("", "", "", [1], {"a": [1]}, theme=theme) for theme in (None, "dark"))
    assert "@media (prefers-color-scheme:dark)" in follows
    assert "@media" not in dark


@pytest.mark.parametrize(
    ("x", "lines", "message"),
    [
        ([], {}, "a plot got no x values; it needs at least one"),
        ([1, 2], {"a": [1]}, "the line 'a' has 1 values and x has 2; give one for each x"),
        ([1], {"a": [float("nan")]}, "the line 'a' has the value nan; give a finite number, or None for a hole"),
        ([float("inf")], {}, "the line 'x' has the value inf"),
    ],
)
def test_what_no_plot_can_show_is_refused(x: list[float], lines: Lines, message: str) -> None:
    with pytest.raises(ReportError, match=re.escape(message)):
        plotted(x, lines)
