"""Schedules go out and come back without loss; what is no schedule is refused with its place."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow import Schedule, dualpipe
from counterflow.errors import ScheduleError
from counterflow.schedule import as_dict, from_csv, from_json, from_text, read_schedule, to_csv, to_json, to_text
from strategies import any_schedules, names, schedules_read_off_rows

NO_ACTION = (
    "is not an action; write stage, one of F B I W, micro-batch, as in 3F12, or (0F4;7B1)OVERLAP_F_B, "
    "with numbers below a million"
)
NEEDS_RANKS = (
    'a schedule in JSON needs "ranks", a list with one list of actions (text) for each rank; '
    "write one with counterflow schedule --json"
)
NO_ROWS = "a schedule got no actions; it needs a row of actions for each rank"


# --- there and back -----------------------------------------------------------------------------------------


@given(schedules_read_off_rows, names)
def test_text_and_csv_bring_rows_back_under_the_name_given(schedule: Schedule, name: str) -> None:
    for back in (from_text(to_text(schedule), name), from_csv(to_csv(schedule), name)):
        assert back == schedule
        assert back.name == name


@given(any_schedules())
def test_json_brings_everything_back(schedule: Schedule) -> None:
    back = from_json(to_json(schedule))
    assert back == schedule
    assert back.name == schedule.name


@given(any_schedules())
def test_the_keys_that_others_rely_on(schedule: Schedule) -> None:
    data = as_dict(schedule)
    assert list(data) == ["format", "name", "mode", "num_ranks", "num_stages", "num_microbatches", "ranks"]
    assert json.loads(json.dumps(data)) == data
    assert data["ranks"] == [[str(action) for action in row] for row in schedule.rows]


@given(schedules_read_off_rows, st.data())
def test_idle_cells_of_a_csv_are_left_out(schedule: Schedule, data: st.DataObject) -> None:
    lines = []
    for row in schedule.rows:
        cells = [str(action) for action in row]
        for at in data.draw(st.lists(st.integers(0, len(cells)), max_size=3)):
            cells.insert(at, data.draw(st.sampled_from(["", " "])))
        lines.append(",".join(cells))
    assert from_csv("\n".join(lines) + "\n") == schedule


def test_lines_may_end_as_on_windows() -> None:
    assert from_csv("0F0,0B0\r\n0F1,0B1\r\n") == from_csv("0F0,0B0\n0F1,0B1\n")


def test_json_may_leave_out_format_name_mode_and_ranks() -> None:
    assert from_json('{"ranks": [["0F0"]], "num_stages": 1, "num_microbatches": 1}') == from_text("0F0")


@pytest.mark.parametrize("write", [to_text, to_csv, to_json])
def test_a_file_is_read_by_its_ending(write, tmp_path: Path) -> None:
    path = tmp_path / f"mine.{write.__name__.removeprefix('to_').replace('text', 'txt')}"
    schedule = dualpipe(4, 8)
    path.write_text(write(schedule), encoding="utf-8")
    assert read_schedule(path) == schedule
    assert read_schedule(path).name == ("dualpipe" if write is to_json else "mine")


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0 0B0\n0F1 0C1", f"row 2, column 2: '0C1' {NO_ACTION}"),
        ("0F0junk", f"row 1, column 1: '0F0junk' {NO_ACTION}"),
        ("0F0,0B0", f"row 1, column 1: '0F0,0B0' {NO_ACTION}"),
        (
            "0F0\n\n0F1 (0F1;0B1)OVERLAP_F_B",
            "row 3, column 2: an overlapped action got 0F1 and 0B1; it needs a forward, then a backward (B or I) "
            "of another micro-batch",
        ),
        ("", NO_ROWS),
        ("\n\n", NO_ROWS),
    ],
)
def test_bad_text_is_refused_with_row_and_column(text: str, message: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        from_text(text)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0,0B0\n,,0F1,0C1\n", f"row 2, column 4: '0C1' {NO_ACTION}"),
        ("0F0;0B0", f"row 1, column 1: '0F0;0B0' {NO_ACTION}"),
        ('"0F0",0B0', f"row 1, column 1: '\"0F0\"' {NO_ACTION}"),
        ("0F0\0,0B0", f"row 1, column 1: '0F0\\x00' {NO_ACTION}"),
        ("0F0,\u0661B0", f"row 1, column 2: '\u0661B0' {NO_ACTION}"),
        ("\ufeff0F0,0B0", f"row 1, column 1: '\\ufeff0F0' {NO_ACTION}"),
        ("0F0,0SEND_F0,0SEND_F", f"row 1, column 3: '0SEND_F' {NO_ACTION}"),
        (",,\n,\n", NO_ROWS),
    ],
)
def test_bad_csv_is_refused_with_row_and_column(text: str, message: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        from_csv(text)
    assert str(caught.value) == message


GOOD = {"ranks": [["0F0", "0B0"]], "num_stages": 1, "num_microbatches": 1}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ranks": None}, NEEDS_RANKS),
        ({"ranks": {"0": ["0F0"]}}, NEEDS_RANKS),
        ({"ranks": ["0F0"]}, NEEDS_RANKS),
        ({"ranks": [[0]]}, NEEDS_RANKS),
        ({"ranks": [["0F0", None]]}, NEEDS_RANKS),
        ({"ranks": []}, NO_ROWS),
        ({"ranks": [["0F0"], ["0B0", "0C0"]]}, f"row 2, column 2: '0C0' {NO_ACTION}"),
        ({"format": 2}, "the schedule has format 2; this version reads format 1"),
        ({"format": "1"}, "the schedule has format '1'; this version reads format 1"),
        ({"name": None}, "the schedule has the name None; a name is text"),
        ({"name": [[[[[[[[]]]]]]]]}, "the schedule has the name [[[[[[[...]]]]]]]; a name is text"),
        ({"mode": "eval"}, "the schedule has mode 'eval'; a mode is 'train' or 'forward'"),
        ({"mode": ["train"]}, "the schedule has mode ['train']; a mode is 'train' or 'forward'"),
        (
            {"mode": "forward"},
            "rank 0, step 1: 0B0 is a backward in a schedule of mode 'forward'; drop it or state mode 'train'",
        ),
        ({"num_ranks": 2}, 'the schedule states "num_ranks": 2 and has 1 rows; make them agree'),
        (
            {"num_stages": 0},
            'a schedule in JSON needs "num_stages", a whole number of at least 1; it has 0',
        ),
        (
            {"num_stages": True},
            'a schedule in JSON needs "num_stages", a whole number of at least 1; it has True',
        ),
        (
            {"num_microbatches": 1.5},
            'a schedule in JSON needs "num_microbatches", a whole number of at least 1; it has 1.5',
        ),
        (
            {"num_microbatches": float("inf")},
            'a schedule in JSON needs "num_microbatches", a whole number of at least 1; it has inf',
        ),
        (
            {"ranks": [["0F0", "0B3"]]},
            "rank 0, step 1: 0B3 is outside the schedule's 1 stages and 1 micro-batches; "
            "correct the action or the stated numbers",
        ),
    ],
)
def test_json_that_is_no_schedule_is_refused(changed: dict[str, object], message: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        from_json(json.dumps(GOOD | changed))
    assert str(caught.value) == message


@pytest.mark.parametrize("missing", GOOD)
def test_json_without_what_it_needs_is_refused_by_name(missing: str) -> None:
    with pytest.raises(ScheduleError, match=f'a schedule in JSON needs "{missing}", a '):
        from_json(json.dumps({key: value for key, value in GOOD.items() if key != missing}))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0F0 0B0",
        "[" * 100_000,
        pytest.param('{"ranks": [["0F0"]], "num_stages": ' + "1" * 5000 + "}", id="5000 digits"),
        pytest.param('{"name": ' + "[" * 100_000 + "]" * 100_000 + "}", id="nested deeply"),
    ],
)
def test_what_is_not_json_is_refused(text: str) -> None:
    with pytest.raises(ScheduleError, match=r"^the schedule is not JSON \(.*; write it with counterflow schedule --"):
        from_json(text)


@pytest.mark.parametrize("text", ["null", "[]", "3", '"0F0"', "{}", "NaN", "1e999", '[["0F0"]]'])
def test_json_of_something_else_is_refused(text: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        from_json(text)
    assert str(caught.value) == NEEDS_RANKS


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(), st.lists, max_leaves=5))
def test_no_value_of_a_field_gets_past_the_reader_unnoticed(value: object) -> None:
    for key in ("format", "name", "mode", "num_ranks", "num_stages", "num_microbatches", "ranks"):
        try:
            read = from_json(json.dumps(GOOD | {key: value}))
        except ScheduleError:
            continue
        assert read.rows == from_json(json.dumps(GOOD)).rows
        assert isinstance(read.name, str)


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("mine.xml", b"0F0", "{} ends in '.xml'; a schedule is read from .json, .csv or .txt"),
        ("mine", b"0F0", "{} ends in ''; a schedule is read from .json, .csv or .txt"),
        ("mine.csv", b"0F0,0C0", f"{{}}: row 1, column 2: '0C0' {NO_ACTION}"),
        ("mine.json", b"{}", f"{{}}: {NEEDS_RANKS}"),
    ],
)
def test_a_bad_file_is_named(name: str, contents: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(contents)
    with pytest.raises(ScheduleError) as caught:
        read_schedule(path)
    assert str(caught.value) == message.format(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.csv").write_bytes(b"0F0,\xff")
    (tmp_path / "folder.csv").mkdir()
    for name in ("latin.csv", "folder.csv", "missing.csv", "nul\0.csv"):
        with pytest.raises(
            ScheduleError, match=r" cannot be read as a schedule \(.+\); give one as counterflow schedule writes it"
        ):
            read_schedule(tmp_path / name)
