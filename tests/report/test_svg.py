import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given

from counterflow import Costs, Schedule, Timeline, dualpipe, dualpipev, gpipe, one_f_one_b, simulate, zb1p
from counterflow.errors import ReportError
from counterflow.report import Memory, schedule_svg
from counterflow.report.palette import contrast, ink, shade
from counterflow.schedule import Kind, from_text, generate
from counterflow.simulator import activations_over_time
from counterflow.timeline import Span
from strategies import names

UNITS = Costs(forward_us=1, backward_us=2, input_us=1, weight_us=1, overlapped_us=3)
SCHEDULES = [gpipe(3, 3), one_f_one_b(4, 8), zb1p(4, 8), dualpipe(4, 8), dualpipev(2, 4), dualpipe(4, 8).forward_only()]
EXAMPLES = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s.name}-{s.mode}")

# --- reading a picture --------------------------------------------------------------------------------------


def drawn(schedule: Schedule, costs: Costs = UNITS) -> ElementTree.Element:
    return ElementTree.fromstring(schedule_svg(schedule, simulate(schedule, costs)))


def classes(element: ElementTree.Element) -> set[str]:
    return set(element.get("class", "").split())


def elements(root: ElementTree.Element, tag: str, kind: str = "") -> list[ElementTree.Element]:
    """The elements below `root`, and itself, of this tag and class."""
    found = root.iter(f"{{http://www.w3.org/2000/svg}}{tag}")
    return [element for element in found if not kind or kind in classes(element)]


def title(element: ElementTree.Element) -> str:
    """What the element itself, not one inside it, tells under the pointer."""
    told = element.find("{http://www.w3.org/2000/svg}title")
    return (told.text or "") if told is not None else ""


def cells(root: ElementTree.Element) -> dict[str, ElementTree.Element]:
    """The cells by the action that their hover text begins with; the legend's have none."""
    return {re.split("[:,]", title(cell))[0]: cell for cell in elements(root, "g") if title(cell)}


def gaps(root: ElementTree.Element) -> list[str]:
    return [title(gap) for gap in elements(root, "path", "gap") if title(gap)]


def ids(cell: ElementTree.Element) -> list[str | None]:
    return [text.text for text in elements(cell, "text")]


def sides(path: ElementTree.Element) -> tuple[float, float]:
    """Where a box starts and ends."""
    found = re.fullmatch(r"M([\d.]+)-17H([\d.]+)V9H\1z", path.get("d", ""))
    assert found
    return float(found[1]), float(found[2])


def border(cell: ElementTree.Element) -> tuple[float, float]:
    """The sides of a cell: of the edge round a pair, or of its only box."""
    return sides((elements(cell, "path", "edge") or elements(cell, "path"))[0])


def styled(root: ElementTree.Element) -> str:
    (style,) = elements(root, "style")
    return style.text or ""


def words(root: ElementTree.Element) -> str:
    return " ".join(text.text or "" for text in elements(root, "text"))


# --- cells --------------------------------------------------------------------------------------------------


@EXAMPLES
def test_every_action_is_one_cell_with_one_border_and_the_ids_of_its_parts(schedule: Schedule) -> None:
    found = cells(drawn(schedule))
    actions = {str(action): action for row in schedule.rows for action in row}
    assert found.keys() == actions.keys()
    for text, cell in found.items():
        assert len(elements(cell, "path", "edge")) == (actions[text].pair is not None)
        assert ids(cell) == [str(part.microbatch) for part in actions[text].parts]


@EXAMPLES
def test_cells_stand_to_scale_where_the_timeline_has_them(schedule: Schedule) -> None:
    found = cells(drawn(schedule))
    spans = {span.name: span for span in simulate(schedule, UNITS)}
    unit = border(found["0F0"])[1]
    for name, cell in found.items():
        times = (spans[name].start_ns / 1000, spans[name].end_ns / 1000)
        assert border(cell) == pytest.approx([unit * time for time in times])


def test_an_overlapped_pair_is_filled_in_two_colours_up_to_its_border() -> None:
    cell = cells(drawn(dualpipe(2, 4)))["(1F3;0B0)OVERLAP_F_B"]
    forward, backward = elements(cell, "g")[1:]
    assert [classes(half) for half in (forward, backward)] == [{"F", "s1"}, {"B"}]
    (start, middle), (same, end) = border(forward), border(backward)
    assert middle == same
    assert (start, end) == border(cell)


@pytest.mark.parametrize(("backward_us", "share"), [(2, 1 / 3), (1, 1 / 2), (3, 1 / 4)])
def test_a_pair_is_split_as_its_two_kinds_take_when_they_stand_alone(backward_us: float, share: float) -> None:
    root = drawn(dualpipe(2, 4), Costs(forward_us=1, backward_us=backward_us, weight_us=0.5, overlapped_us=3))
    cell = cells(root)["(1F3;0B0)OVERLAP_F_B"]
    start, end = border(cell)
    assert border(elements(cell, "g")[1]) == pytest.approx((start, start + share * (end - start)), abs=0.1)


def test_hovering_tells_action_stages_microbatches_and_times() -> None:
    root = drawn(dualpipe(2, 4), Costs(forward_us=1.5, backward_us=3, weight_us=1.5))
    titles = {title.text for title in elements(root, "title")}
    assert "0F0: stage 0, micro-batch 0, 0 to 1.5 µs" in titles
    assert any(
        (title or "").startswith("(1F3;0B0)OVERLAP_F_B: stage 1, micro-batch 3 and stage 0, micro-batch 0, ")
        for title in titles
    )


def test_an_id_that_does_not_fit_is_left_out() -> None:
    root = drawn(one_f_one_b(2, 20), Costs(forward_us=0.001, backward_us=1000, weight_us=500))
    assert ids(cells(root)["0F12"]) == []
    assert ids(cells(root)["0B12"]) == ["12"]


@pytest.mark.parametrize("name", ["1f1b", "dualpipe", "interleaved-1f1b"])
def test_every_id_of_a_large_schedule_is_readable_and_the_file_opens(name: str) -> None:
    schedule = generate(name, 32, 128)
    picture = schedule_svg(schedule, simulate(schedule, UNITS))
    assert all(ids(cell) for cell in cells(ElementTree.fromstring(picture)).values())
    assert len(picture.encode()) < 2_200_000


def test_three_digits_fit_into_the_shortest_action() -> None:
    assert ids(cells(drawn(gpipe(1, 101)))["0F100"]) == ["100"]


# --- directions ---------------------------------------------------------------------------------------------


def test_dualpipe_tells_its_two_directions_apart_by_where_a_microbatch_entered() -> None:
    root = drawn(dualpipe(4, 8))
    for text, cell in cells(root).items():
        if not text.startswith("("):
            assert ("s1" in classes(cell)) == (int(text[2:]) >= 4)
    assert "entered at rank 0" in words(root)
    assert "entered at rank 3" in words(root)


def test_dualpipev_tells_the_two_stages_of_a_rank_apart() -> None:
    root = drawn(dualpipev(2, 4))
    for text, cell in cells(root).items():
        if not text.startswith("("):
            assert ("s1" in classes(cell)) == (int(text[0]) >= 2)
    assert "at a rank's first stage" in words(root)


@pytest.mark.parametrize("schedule", [gpipe(3, 3), one_f_one_b(3, 3), zb1p(3, 3)], ids=lambda s: s.name)
def test_one_direction_has_one_shade(schedule: Schedule) -> None:
    assert not elements(drawn(schedule), "g", "s1")


def test_each_of_the_stages_on_a_rank_has_a_shade_of_its_own() -> None:
    schedule = generate("interleaved-1f1b", 2, 4, chunks=4)
    root = drawn(schedule)
    for text, cell in cells(root).items():
        assert classes(cell) == {text[1], *([f"s{int(text[0]) // 2}"] if text[0] not in "01" else [])}
    assert "at a rank's 1st to 4th stage" in words(root)
    fills = [shade(Kind.F, index, 4) for index in range(4)]
    assert all(fill in styled(root) for fill in fills)


@pytest.mark.parametrize("count", range(1, 9))
@pytest.mark.parametrize("kind", [Kind.F, Kind.B, Kind.I, Kind.W])
def test_shades_go_from_light_to_dark_and_text_on_them_is_readable(kind: Kind, count: int) -> None:
    fills = [shade(kind, index, count) for index in range(count)]
    on_white = [contrast(fill, "#ffffff") for fill in fills]
    assert on_white == sorted(set(on_white))
    assert all(contrast(ink(fill), fill) > 3.8 for fill in fills)
    if count <= 2:
        assert all(contrast(ink(fill), fill) > 4.5 for fill in fills)


# --- gaps and memory ----------------------------------------------------------------------------------------


def test_every_gap_says_what_its_end_waited_for() -> None:
    told = gaps(drawn(one_f_one_b(2, 2)))
    assert told == [
        "rank 0 idle from 2 to 4 µs (2 µs): 0B0 waits for the gradient of 1B0, which rank 1 ends at 4 µs",
        "rank 0 idle from 6 to 7 µs (1 µs): 0B1 waits for the gradient of 1B1, which rank 1 ends at 7 µs",
        "rank 1 idle from 0 to 1 µs (1 µs): 1F0 waits for the activation of 0F0, which rank 0 ends at 1 µs",
        "rank 1 idle from 7 to 9 µs (2 µs): nothing left to compute",
    ]


def curves(*values: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(np.arange(len(held)) * 1000, np.array(held)) for held in values]


def test_memory_is_a_curve_below_each_row_on_one_scale() -> None:
    schedule = gpipe(2, 2)
    timeline = simulate(schedule, UNITS)
    memory = Memory(curves([1, 2, 4, 0], [0, 1, 2, 0]))
    root = ElementTree.fromstring(schedule_svg(schedule, timeline, memory=memory))
    found = [path for path in elements(root, "path", "held") if title(path)]
    assert [title(path) for path in found] == [
        "rank 0 holds at most 4 activations at once",
        "rank 1 holds at most 2 activations at once",
    ]
    highest = [min(float(y) for y in re.findall(r"V(-?[\d.]+)", path.get("d", ""))) for path in found]
    assert highest[0] == 2 * highest[1] < 0
    assert "peak 4" in words(root)
    assert "activations held" in words(root)
    assert not elements(drawn(schedule), "path", "held")


def test_bytes_are_told_in_the_unit_that_reads_best() -> None:
    schedule = gpipe(1, 1)
    memory = Memory(curves([2_500_000_000, 0]), "bytes")
    picture = schedule_svg(schedule, simulate(schedule, UNITS), memory=memory)
    assert "rank 0 holds at most 2.5 GB at once" in picture
    assert "peak 2.5 GB" in words(ElementTree.fromstring(picture))


def test_what_the_simulator_says_of_memory_can_be_drawn() -> None:
    schedule = dualpipe(4, 8)
    timeline = simulate(schedule, UNITS)
    memory = Memory(activations_over_time(schedule, timeline))
    root = ElementTree.fromstring(schedule_svg(schedule, timeline, memory=memory))
    assert words(root).count("peak 5") == 4


def test_memory_of_other_ranks_is_refused() -> None:
    schedule = gpipe(2, 2)
    with pytest.raises(ReportError, match="the memory has curves of 1 ranks and the schedule has 2"):
        schedule_svg(schedule, simulate(schedule, UNITS), memory=Memory(curves([1])))


# --- around the cells ---------------------------------------------------------------------------------------


def test_the_legend_explains_the_kinds_that_occur_and_no_others() -> None:
    assert "backward for weights" not in words(drawn(gpipe(2, 2)))
    assert "overlapped forward & backward" not in words(drawn(zb1p(2, 2)))
    for label in ("forward", "backward", "backward for input", "backward for weights", "overlapped forward & backward"):
        assert label in [text.text for text in elements(drawn(dualpipe(4, 8)), "text")]


def test_title_and_bubble_are_told() -> None:
    assert "gpipe: 4 ranks, 8 micro-batches step 33 µs, bubble 9 µs on every rank" in words(drawn(gpipe(4, 8)))
    assert words(drawn(gpipe(4, 8))).count("27.3 %") == 4
    assert "1 rank, 1 micro-batch, forward only" in words(drawn(gpipe(1, 1).forward_only()))


def test_ranks_with_different_bubbles_show_the_range() -> None:
    root = drawn(dualpipe(8, 20), Costs(forward_us=1, backward_us=2, weight_us=1, overlapped_us=2.4))
    assert "bubble 3 to 4.2 µs" in words(root)


@EXAMPLES
def test_everything_lies_on_the_page(schedule: Schedule) -> None:
    root = drawn(schedule)
    width, height = float(root.get("width", "nan")), float(root.get("height", "nan"))
    for cell in cells(root).values():
        assert border(cell)[1] < width
    for group in elements(root, "g"):
        if moved := re.fullmatch(r"translate\((\S+) (\S+)\)", group.get("transform", "")):
            assert 0 < float(moved[1]) < width
            assert 0 < float(moved[2]) < height


def test_a_step_of_very_different_durations_stays_a_page_that_opens() -> None:
    root = drawn(one_f_one_b(2, 4), Costs(forward_us=0.001, backward_us=1e6, weight_us=1))
    assert float(root.get("width", "nan")) < 41_000


def test_actions_that_take_no_time_can_be_drawn() -> None:
    assert cells(drawn(gpipe(2, 2), Costs(forward_us=0, backward_us=0, weight_us=0)))


# --- what comes from outside --------------------------------------------------------------------------------


def test_a_hostile_name_stays_text() -> None:
    evil = Schedule.from_rows(gpipe(1, 1).rows, name="\"><script>alert('x')</script>&")
    root = drawn(evil)
    assert not elements(root, "script")
    assert root.get("aria-label") == "\"><script>alert('x')</script>&: 1 rank, 1 micro-batch"


@given(names)
def test_any_name_makes_valid_xml_that_can_be_written(name: str) -> None:
    schedule = Schedule.from_rows(gpipe(1, 1).rows, name)
    picture = schedule_svg(schedule, simulate(schedule, UNITS))
    ElementTree.fromstring(picture.encode("utf-8"))


def test_a_character_that_no_xml_may_hold_is_replaced() -> None:
    assert "a\ufffd[31m\ufffdz" in words(drawn(Schedule.from_rows(gpipe(1, 1).rows, "a\x1b[31m\ud800z")))


def test_a_rank_without_actions_is_all_bubble() -> None:
    assert "100.0 %" in words(drawn(from_text("0F0 0B0\n\n")))


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([Span(0, "0F0", 0, 1)], "the timeline has '0B0' 0 times on rank 0 and pair has it 1 times"),
        ([Span(0, "0F0", 0, 1), Span(0, "0B0", 1, 2), Span(0, "0B0", 2, 3)], "'0B0' 2 times on rank 0"),
        ([Span(0, "0F0", 0, 1), Span(0, "0B0", 1, 2), Span(1, "0F0", 2, 3)], "'0F0' 1 times on rank 1"),
    ],
)
def test_the_timeline_of_another_schedule_is_refused(spans: list[Span], message: str) -> None:
    with pytest.raises(ReportError, match=re.escape(message)):
        schedule_svg(from_text("0F0 0B0", "pair"), Timeline.from_spans(spans))


def test_spans_that_are_no_actions_lie_on_other_lanes_and_are_not_drawn() -> None:
    schedule = gpipe(2, 2)
    timeline = simulate(schedule, UNITS)
    wire = Span(0, "activation", 0, 99_000, "communication")
    assert schedule_svg(schedule, Timeline.from_spans([*timeline, wire])) == schedule_svg(schedule, timeline)


# --- light and dark -----------------------------------------------------------------------------------------


def test_colours_follow_the_viewers_preference_unless_a_theme_is_fixed() -> None:
    schedule = gpipe(1, 1)
    timeline = simulate(schedule, UNITS)
    follows, light, dark = (schedule_svg(schedule, timeline, theme=theme) for theme in (None, "light", "dark"))
    assert "@media (prefers-color-scheme:dark)" in follows
    assert "@media" not in light + dark
    assert "#0d1117" in dark
    assert "#0d1117" not in light


def test_a_theme_that_is_none_is_refused() -> None:
    schedule = gpipe(1, 1)
    with pytest.raises(ReportError, match="a picture got theme 'blue'; it needs light or dark"):
        schedule_svg(schedule, simulate(schedule, UNITS), theme="blue")  # type: ignore[arg-type]


def test_names_stay_in_sight_while_a_wide_picture_is_scrolled() -> None:
    root = drawn(dualpipe(4, 8))
    (stays,) = elements(root, "g", "stay")
    assert "rank 0 rank 1 rank 2 rank 3" in words(stays)
    assert f"calc({int(root.get('width', '0')) + 15}px - 100vw)" in styled(root)


def test_the_sums_of_twins_stand_behind_the_last_action() -> None:
    schedule = dualpipe(4, 8)
    timeline = simulate(schedule, Costs(1, 2, None, 1, 3, twins_us=4))
    root = ElementTree.fromstring(schedule_svg(schedule, timeline))
    shown = words(root)
    assert "step 34 µs, 8 µs of it sums over twins behind the last action, bubble 2 µs on every rank" in shown
    assert "sum of gradients over twins" in shown
    assert "5.9 %" in shown
    titles = [element.text for element in root.iter() if element.tag.endswith("title")]
    assert "rank 3 sums gradients, twins of stage 3, 30 to 34 µs" in titles
