import inspect
import re
import textwrap

import pytest

from counterflow import Costs, Timeline, simulate
from counterflow.errors import ReportError
from counterflow.report import staircase
from counterflow.schedule import GENERATORS
from counterflow.timeline import Span

# --- the drawings in the docstrings -------------------------------------------------------------------------


def drawing_of(name: str) -> tuple[int, int, str]:
    """Ranks, micro-batches and literal block of a generator's docstring; one with an option set has its own."""
    generator = GENERATORS[name]
    option = "".join(f" with ``{key}``" for key in getattr(generator, "keywords", ()))
    docstring = inspect.getdoc(getattr(generator, "func", generator)) or ""
    sizes = re.search(rf"^(\d+) ranks, (\d+) micro-batches{option},[^:]*::$", docstring, re.MULTILINE)
    assert sizes, (
        f"the docstring of {name} needs its sizes, as in '3 ranks, 4 micro-batches{option},', and its staircase"
    )
    block = re.match(r"\n\n((?:    .*\n)+)", docstring[sizes.end() :])
    assert block, f"an indented staircase has to follow the '::' in the docstring of {name}"
    return int(sizes[1]), int(sizes[2]), textwrap.dedent(block[1]).rstrip()


@pytest.mark.parametrize("name", GENERATORS)
def test_the_staircase_in_a_generators_docstring_is_the_simulated_one(name: str) -> None:
    ranks, microbatches, drawn = drawing_of(name)
    costs = Costs(forward_us=1, backward_us=2, input_us=1, weight_us=1, overlapped_us=3)
    assert drawn == staircase(simulate(GENERATORS[name](ranks, microbatches), costs), unit_us=1)


# --- how it is drawn ----------------------------------------------------------------------------------------


def timeline(*spans: tuple[int, str, int, int], lane: str = "compute") -> Timeline:
    """Spans of rank, name, start and end, in microseconds."""
    return Timeline.from_spans(Span(rank, name, 1000 * start, 1000 * end, lane) for rank, name, start, end in spans)


def test_a_cell_tells_kind_and_microbatch_and_is_drawn_to_its_end() -> None:
    steps = timeline((0, "0F0", 0, 1), (0, "0I0", 1, 2), (0, "0W0", 2, 4), (1, "(1F1;2B0)OVERLAP_F_B", 1, 4))
    assert staircase(steps, 1) == "F0 I0 W0---\n.  F1&B0---"


def test_cells_are_as_wide_as_the_text_with_least_room() -> None:
    assert staircase(timeline((0, "0F0", 0, 1), (0, "0F100", 1, 2), (0, "0B0", 3, 5)), 1) == "F0   F100 .    B0-------"
    assert staircase(timeline((0, "(0F1;0B0)OVERLAP_F_B", 1, 2), (1, "1F0", 0, 1)), 1) == ".     F1&B0\nF0    ."


def test_time_counts_from_the_first_action() -> None:
    assert staircase(timeline((0, "0F0", 7, 8)), 1) == staircase(timeline((0, "0F0", 0, 1)), 1) == "F0"


def test_the_unit_scales_the_picture() -> None:
    assert staircase(timeline((0, "0F0", 0, 4), (1, "1F0", 6, 8)), 2) == "F0--- .  .\n.  .  .  F0"
    assert staircase(timeline((0, "0F0", 0, 1)), 0.5) == "F0---"


def test_a_timeline_without_actions_is_empty() -> None:
    assert staircase(timeline(), 1) == ""


def test_other_lanes_are_not_drawn() -> None:
    both = [*timeline((0, "0F0", 0, 1)), *timeline((0, "send", 0, 9), lane="communication")]
    assert staircase(Timeline.from_spans(both), 1) == "F0"


@pytest.mark.parametrize(
    ("span", "unit_us", "message"),
    [
        (
            (0, "0B0", 1, 2),
            2,
            "rank 0: 0B0 starts 1 µs into the step and takes 1 µs; a staircase needs whole multiples",
        ),
        ((0, "0B0", 2, 3), 2, "takes 1 µs; a staircase needs whole multiples of its unit, here 2 µs"),
        ((0, "0B0", 2, 2), 2, "takes 0 µs; a staircase needs whole multiples"),
        ((0, "0B0", 2, 4), 0, "a staircase got a unit of 0 µs; it needs at least 0.001 µs"),
        ((0, "0B0", 2, 4), float("nan"), "a staircase got a unit of nan µs"),
        ((0, "gemm", 2, 4), 2, "rank 0: a staircase draws actions alone: 'gemm' is not an action"),
        ((0, "0B0", 0, 4), 2, "rank 0: B0 starts before the action ahead of it has ended"),
    ],
)
def test_what_no_staircase_can_show_is_refused(span: tuple[int, str, int, int], unit_us: float, message: str) -> None:
    with pytest.raises(ReportError, match=re.escape(message)):
        staircase(timeline((0, "0F0", 0, 2), span), unit_us)
