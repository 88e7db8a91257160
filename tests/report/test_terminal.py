import io
import re

import numpy as np
import pytest
from hypothesis import given
from rich.console import Console

from counterflow import Costs, Schedule, Timeline, dualpipe, gpipe, one_f_one_b, simulate
from counterflow.report import Memory, print_schedule, staircase
from counterflow.report.palette import shade
from counterflow.schedule import Kind, generate
from counterflow.timeline import Span
from strategies import names, runnable_schedules

UNITS = Costs(forward_us=1, backward_us=2, input_us=1, weight_us=1, overlapped_us=3)


def printed(schedule: Schedule, timeline: Timeline | None = None, memory: Memory | None = None, **how: object) -> str:
    file = io.StringIO()
    console = Console(file=file, highlight=False, _environ={}, **how)  # type: ignore[arg-type]
    print_schedule(schedule, timeline or simulate(schedule, UNITS), memory=memory, console=console)
    return file.getvalue()


def coloured(schedule: Schedule, width: int, **more: object) -> str:
    return printed(schedule, width=width, force_terminal=True, color_system="truecolor", **more)


def rows(text: str) -> list[str]:
    """The cells of each rank, without colours, name and share of bubble."""
    plain = re.sub(r"\x1b\[[\d;]*m", "", text)
    return [match[1] for match in re.finditer(r"^rank \d+ +(.*?)  +[\d.]+ %$", plain, re.MULTILINE)]


# --- in a pipe ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [gpipe(3, 3), one_f_one_b(4, 8), dualpipe(2, 4)], ids=lambda s: s.name)
def test_in_a_pipe_rows_are_the_staircase(schedule: Schedule) -> None:
    drawn = staircase(simulate(schedule, UNITS), unit_us=1)
    assert [row.rstrip(". ") for row in rows(printed(schedule))] == [row.rstrip(". ") for row in drawn.splitlines()]


@given(runnable_schedules)
def test_in_a_pipe_every_action_is_there_whole_and_without_colour(schedule: Schedule) -> None:
    text = printed(schedule, width=20)
    assert "\x1b" not in text
    for row, actions in zip(rows(text), schedule.rows, strict=True):
        wanted = ["&".join(f"{part.kind.value}{part.microbatch}" for part in action.parts) for action in actions]
        assert re.findall(r"[FBIW][\dFBIW&]*", row) == wanted


def test_a_large_schedule_is_not_cut_in_a_pipe() -> None:
    lines = rows(printed(generate("1f1b", 32, 128), width=80))
    assert len(lines) == 32
    assert all("F127" in line and "B127" in line for line in lines)


def test_measured_times_that_share_no_unit_are_drawn_near_scale() -> None:
    spans = [Span(0, "0F0", 0, 999_983), Span(0, "0B0", 1_999_993, 3_999_971)]
    timeline = Timeline.from_spans(spans)
    (row,) = rows(printed(gpipe(1, 1), timeline))
    assert re.fullmatch(r"F0 +\.[. ]+B0-+", row.strip())


def test_colours_that_are_not_wanted_are_not_used() -> None:
    assert "\x1b" not in coloured(gpipe(2, 2), 100, no_color=True)


# --- on a terminal ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [40, 80, 120, 160, 200])
@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb1p", "dualpipe", "interleaved-1f1b"])
def test_no_line_is_wider_than_the_terminal(name: str, width: int) -> None:
    text = re.sub(r"\x1b\[[\d;]*m", "", coloured(generate(name, 8, 24), width))
    assert max(map(len, text.splitlines()[3:])) <= width


def test_equal_durations_are_equally_wide_and_ids_stand_in_them() -> None:
    (row,) = rows(coloured(gpipe(1, 3), 60))
    assert re.sub(r"\s+", " ", row).strip() == "0 1 2 0 1 2"
    starts = [match.start() for match in re.finditer(r"\d", row)]
    assert starts[1] - starts[0] == starts[2] - starts[1]


@pytest.mark.parametrize("width", [160, 200])
def test_all_ids_of_the_published_size_are_readable(width: int) -> None:
    schedule = dualpipe(8, 20)
    for row, actions in zip(rows(coloured(schedule, width)), schedule.rows, strict=True):
        ids = [str(part.microbatch) for action in actions for part in action.parts]
        assert re.sub(r"[ ·▌▐]", "", row) == "".join(ids)


def test_ids_are_left_out_where_there_is_no_room_for_any() -> None:
    assert not re.search(r"\d", "".join(rows(coloured(generate("1f1b", 32, 128), 120))))


def test_kinds_and_directions_have_the_colours_of_the_picture() -> None:
    text = coloured(dualpipe(4, 8), 120)
    for kind in (Kind.F, Kind.B, Kind.I, Kind.W):
        for index in range(2):
            red, green, blue = bytes.fromhex(shade(kind, index, 2)[1:])
            assert f"48;2;{red};{green};{blue}" in text
    assert "entered at rank 3" in text


def test_the_scale_the_step_and_the_bubble_are_told() -> None:
    plain = re.sub(r"\x1b\[[\d;]*m", "", coloured(dualpipe(8, 20), 160))
    assert "dualpipe: 8 ranks, 20 micro-batches\nstep 66 µs, bubble 6 µs on every rank; one column is 0.5 µs" in plain
    assert plain.count("9.1 %") == 8


@pytest.mark.parametrize("how", [{}, {"force_terminal": True, "color_system": "truecolor"}], ids=["pipe", "terminal"])
def test_memory_is_a_line_below_each_rank(how: dict[str, object]) -> None:
    memory = Memory([(np.array([0, 1000, 3000]), np.array([1, 2, 0]))])
    text = re.sub(r"\x1b\[[\d;]*m", "", printed(gpipe(1, 1), memory=memory, width=60, **how))
    (bars,) = re.findall(r"^ +(▄+█+) +2$", text, re.MULTILINE)
    assert bars.count("█") == pytest.approx(2 * bars.count("▄"), abs=1)
    assert "activations held" in text


@pytest.mark.parametrize("how", [{}, {"force_terminal": True, "color_system": "truecolor"}], ids=["pipe", "terminal"])
def test_actions_that_take_no_time_can_be_printed(how: dict[str, object]) -> None:
    nothing = simulate(gpipe(2, 2), Costs(forward_us=0, backward_us=0, weight_us=0))
    assert "step 0 µs" in printed(gpipe(2, 2), nothing, width=80, **how)


@given(names)
def test_a_name_cannot_steer_the_terminal(name: str) -> None:
    schedule = Schedule.from_rows(gpipe(1, 1).rows, f"\x1b[31m[bold]{name}\n\x9b")
    text = coloured(schedule, 80)
    assert "\x1b[31m" not in text.splitlines()[0]
    assert "\x9b" not in text
    assert len(text.splitlines()) == len(coloured(gpipe(1, 1), 80).splitlines())
