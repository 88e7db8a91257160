import re
from xml.etree import ElementTree

import pytest
from hypothesis import given

from counterflow import Costs, Schedule, Timeline, dualpipe, dualpipev, gpipe, one_f_one_b, simulate, zb1p
from counterflow.errors import ReportError
from counterflow.report import schedule_svg
from counterflow.schedule import from_text
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


def cells(root: ElementTree.Element) -> dict[str, ElementTree.Element]:
    """The cells by the action that their hover text begins with; the legend's have none."""
    titles = [(cell, elements(cell, "title")) for cell in elements(root, "g", "cell")]
    return {(title[0].text or "").split(":")[0]: cell for cell, title in titles if title}


def ids(cell: ElementTree.Element) -> list[str | None]:
    return [text.text for text in elements(cell, "text")]


def end(rect: ElementTree.Element) -> float:
    return float(rect.get("x", "nan")) + float(rect.get("width", "nan"))


def words(root: ElementTree.Element) -> str:
    return " ".join(text.text or "" for text in elements(root, "text"))


# --- cells --------------------------------------------------------------------------------------------------


@EXAMPLES
def test_every_action_is_one_cell_with_one_border_and_the_ids_of_its_parts(schedule: Schedule) -> None:
    found = cells(drawn(schedule))
    actions = {str(action): action for row in schedule.rows for action in row}
    assert found.keys() == actions.keys()
    for text, cell in found.items():
        assert len(elements(cell, "rect", "edge")) == 1
        assert ids(cell) == [str(part.microbatch) for part in actions[text].parts]


@EXAMPLES
def test_cells_stand_to_scale_where_the_timeline_has_them(schedule: Schedule) -> None:
    found = cells(drawn(schedule))
    spans = {span.name: span for span in simulate(schedule, UNITS)}
    unit = float(elements(found["0F0"], "rect", "edge")[0].get("width", "nan"))
    for name, cell in found.items():
        (edge,) = elements(cell, "rect", "edge")
        assert float(edge.get("x", "nan")) == pytest.approx(unit * spans[name].start_ns / 1000)
        assert end(edge) == pytest.approx(unit * spans[name].end_ns / 1000)


def test_an_overlapped_pair_is_filled_in_two_colours_up_to_its_border() -> None:
    cell = cells(drawn(dualpipe(2, 4)))["(1F3;0B0)OVERLAP_F_B"]
    forward, backward = (elements(half, "rect")[0] for half in elements(cell, "g")[1:])
    (edge,) = elements(cell, "rect", "edge")
    assert [classes(half) for half in elements(cell, "g")[1:]] == [{"F", "second"}, {"B"}]
    assert forward.get("x") == edge.get("x")
    assert end(forward) == pytest.approx(float(backward.get("x", "nan")))
    assert end(backward) == pytest.approx(end(edge))


@pytest.mark.parametrize(("backward_us", "share"), [(2, 1 / 3), (1, 1 / 2), (3, 1 / 4)])
def test_a_pair_is_split_as_its_two_kinds_take_when_they_stand_alone(backward_us: float, share: float) -> None:
    root = drawn(dualpipe(2, 4), Costs(forward_us=1, backward_us=backward_us, weight_us=0.5, overlapped_us=3))
    forward, _, edge = elements(cells(root)["(1F3;0B0)OVERLAP_F_B"], "rect")
    assert float(forward.get("width", "nan")) == pytest.approx(share * float(edge.get("width", "nan")), abs=0.01)


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


def test_three_digits_fit_into_the_shortest_action() -> None:
    assert ids(cells(drawn(gpipe(1, 101)))["0F100"]) == ["100"]


# --- directions ---------------------------------------------------------------------------------------------


def test_dualpipe_tells_its_two_directions_apart_by_where_a_microbatch_entered() -> None:
    root = drawn(dualpipe(4, 8))
    for text, cell in cells(root).items():
        if not text.startswith("("):
            assert ("second" in classes(cell)) == (int(text[2:]) >= 4)
    assert "entered at rank 0" in words(root)
    assert "entered at rank 3" in words(root)


def test_dualpipev_tells_the_two_stages_of_a_rank_apart() -> None:
    root = drawn(dualpipev(2, 4))
    for text, cell in cells(root).items():
        if not text.startswith("("):
            assert ("second" in classes(cell)) == (int(text[0]) >= 2)
    assert "at a rank's first stage" in words(root)


@pytest.mark.parametrize("schedule", [gpipe(3, 3), one_f_one_b(3, 3), zb1p(3, 3)], ids=lambda s: s.name)
def test_one_direction_has_one_shade(schedule: Schedule) -> None:
    assert not elements(drawn(schedule), "g", "second")


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
    for rect in elements(root, "rect", "edge"):
        assert end(rect) < width
    for group in elements(root, "g"):
        if moved := re.fullmatch(r"translate\((\S+) (\S+)\)", group.get("transform", "")):
            assert 0 < float(moved[1]) < width
            assert 0 < float(moved[2]) < height


def test_a_step_of_very_different_durations_stays_a_page_that_opens() -> None:
    root = drawn(one_f_one_b(2, 4), Costs(forward_us=0.001, backward_us=1e6, weight_us=1))
    assert float(root.get("width", "nan")) < 13_000


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


def test_colours_follow_the_viewers_preference() -> None:
    (style,) = elements(drawn(gpipe(1, 1)), "style")
    assert "@media (prefers-color-scheme:dark)" in (style.text or "")
