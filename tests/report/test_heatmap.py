"""The heatmap: every cell is there, on one scale, in colours that need no hue to be told apart."""

import re
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.errors import ReportError
from counterflow.report import load_heatmap
from counterflow.report.heatmap import COLOURS, MANY, ON_DARK
from counterflow.report.palette import contrast
from strategies import names

SVG = "{http://www.w3.org/2000/svg}"
MIDDLE = len(COLOURS) // 2
EVEN = np.full((2, 3), 5.0)
UNEVEN = np.array([[2.0, 0.0, 1.0], [1.0, 1.0, 1.0]])


def drawn(**panels: np.ndarray) -> ElementTree.Element:
    return ElementTree.fromstring(load_heatmap("loads", panels))


def cells(root: ElementTree.Element) -> list[tuple[int, str, str]]:
    """Colour, path, and what is told of every cell, without the legend's."""
    return [
        (int(group.get("class", "").removeprefix("cell h")), path.get("d", ""), title.text or "")
        for group in root.iter(f"{SVG}g")
        for path in group.iter(f"{SVG}path")
        for title in path.iter(f"{SVG}title")
    ]


def texts(root: ElementTree.Element) -> list[str]:
    return [text.text or "" for text in root.iter(f"{SVG}text")]


def test_every_gpu_of_every_layer_is_a_cell_that_tells_its_load_over_the_mean() -> None:
    told = [title for _, _, title in cells(drawn(before=UNEVEN))]
    assert sorted(told) == [
        "GPU 0, layer 0: 2.000 × mean",
        "GPU 0, layer 1: 1.000 × mean",
        "GPU 1, layer 0: 0.000 × mean",
        "GPU 1, layer 1: 1.000 × mean",
        "GPU 2, layer 0: 1.000 × mean",
        "GPU 2, layer 1: 1.000 × mean",
    ]


def test_layers_go_across_and_gpus_down() -> None:
    where = {title[:14]: path for _, path, title in cells(drawn(before=UNEVEN))}
    start = {name: tuple(map(int, re.findall(r"\d+", path)[:2])) for name, path in where.items()}
    (x, y), right, below = (start[name] for name in ("GPU 0, layer 0", "GPU 0, layer 1", "GPU 1, layer 0"))
    assert (right[0] > x, right[1]) == (True, y)
    assert (below[0], below[1] > y) == (x, True)


def test_the_mean_is_neutral_and_both_ends_are_reached() -> None:
    colours = {title: colour for colour, _, title in cells(drawn(before=UNEVEN))}
    assert colours["GPU 2, layer 0: 1.000 × mean"] == MIDDLE
    assert colours["GPU 0, layer 0: 2.000 × mean"] == len(COLOURS) - 1
    assert colours["GPU 1, layer 0: 0.000 × mean"] == 0


def test_all_panels_share_one_scale() -> None:
    nearly = np.array([[1.02, 0.98, 1.0], [1.0, 1.0, 1.0]])
    alone = {colour for colour, _, _ in cells(drawn(after=nearly))}
    beside = {
        colour for colour, _, title in cells(drawn(before=UNEVEN, after=nearly)) if re.search(r"1\.02|0\.98", title)
    }
    assert len(alone) > 1
    assert beside == {MIDDLE}


def test_the_legend_says_what_its_ends_stand_for() -> None:
    assert {"0 ×", "mean", "2 ×"} <= set(texts(drawn(before=UNEVEN)))
    assert "2 × and more" in texts(drawn(before=np.array([[5.0, 0.0, 0.0]])))
    assert {"0.95 ×", "1.05 ×"} <= set(texts(drawn(before=EVEN)))


def test_each_panel_names_its_hottest_gpu() -> None:
    root = drawn(before=UNEVEN, after=EVEN)
    assert {"before", "at most 2.00 × mean: GPU 0, layer 0", "after", "at most 1.00 × mean: GPU 0, layer 0"} <= set(
        texts(root)
    )


def test_a_layer_without_load_is_even() -> None:
    assert {colour for colour, _, _ in cells(drawn(before=np.zeros((2, 3))))} == {MIDDLE}


def test_very_many_cells_are_all_drawn_and_tell_nothing() -> None:
    loads = np.random.default_rng(0).lognormal(0, 0.5, (50, MANY // 50 + 1))
    picture = load_heatmap("loads", {"before": loads})
    assert "<title>" not in picture
    root = ElementTree.fromstring(picture)
    field = [path.get("d", "") for path in root.iter(f"{SVG}path") if path.get("class") is None]
    assert sum(path.count("M") for path in field) == loads.size + len(COLOURS)
    assert len(picture) < 40 * loads.size


def test_numbers_on_the_axes_are_whole_however_few_there_are() -> None:
    for size in (1, 2, 3):
        shown = texts(drawn(before=np.ones((size, size))))
        assert not [text for text in shown if re.fullmatch(r"\d+\.\d+", text)]


@pytest.mark.parametrize(("colours", "ground"), [(COLOURS, "#ffffff"), (ON_DARK, "#0d1117")])
def test_the_further_from_the_mean_the_more_a_cell_stands_out(colours: tuple[str, ...], ground: str) -> None:
    for side in (colours[MIDDLE:], colours[MIDDLE::-1]):
        assert all(contrast(far, ground) > 1.1 * contrast(near, ground) for near, far in pairwise(side))
    assert 0.8 < contrast(colours[0], ground) / contrast(colours[-1], ground) < 1.25


def test_colours_follow_the_viewer_unless_a_theme_is_fixed() -> None:
    follows, dark = (load_heatmap("", {"before": EVEN}, theme=theme) for theme in (None, "dark"))
    assert "@media (prefers-color-scheme:dark)" in follows
    assert "@media" not in dark
    assert ON_DARK[0] in dark


@given(names, names)
def test_any_text_stays_text(title: str, name: str) -> None:
    root = ElementTree.fromstring(load_heatmap(f"<script>{title}", {f"&<{name}": EVEN}).encode("utf-8"))
    assert {element.tag.removeprefix(SVG) for element in root.iter()} <= {
        *("svg", "style", "rect", "text", "path", "g", "title")
    }


@settings(max_examples=12)
@given(st.integers(1, 130), st.integers(1, 400))
def test_a_panel_stays_on_its_page_and_off_its_neighbour(layers: int, gpus: int) -> None:
    root = drawn(before=np.ones((layers, gpus)), after=np.ones((layers, gpus)))
    borders = [path.get("d", "") for path in root.iter(f"{SVG}path") if path.get("class") == "axis"]
    (left, right), (left_too, right_too) = (
        tuple(int(re.findall(rf"{letter}(\d+)", border)[0]) for letter in "MH") for border in borders
    )
    assert left < right < left_too < right_too <= int(root.get("width", "0"))


@pytest.mark.parametrize(
    ("panels", "message"),
    [
        ({}, "a heatmap got no loads; give at least one panel"),
        ({"a": EVEN, "b": EVEN[:1]}, "the panel 'b' has shape [1, 3] and the first one [2, 3]"),
        ({"a": EVEN[0]}, "the panel 'a' has shape [3]"),
        ({"a": EVEN[:0]}, "the panel 'a' has shape [0, 3]"),
        ({"a": -EVEN}, "the panel 'a' has a load that is negative or not finite"),
        ({"a": EVEN * float("nan")}, "the panel 'a' has a load that is negative or not finite"),
    ],
)
def test_what_no_heatmap_can_show_is_refused(panels: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(ReportError, match=re.escape(message)):
        load_heatmap("loads", panels)


def test_an_unknown_theme_is_refused() -> None:
    with pytest.raises(ReportError, match="needs light or dark"):
        load_heatmap("loads", {"a": EVEN}, theme="sepia")  # type: ignore[arg-type]
