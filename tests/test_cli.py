import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from counterflow import Costs, Schedule, __version__, dualpipe, gpipe, one_f_one_b, simulate
from counterflow.cli import main
from counterflow.report import schedule_svg
from counterflow.report.png import has_font
from counterflow.schedule import as_dict, from_csv, from_text, to_csv, to_json, to_text
from counterflow.simulator import write_costs
from counterflow.timeline import read_chrome

VERBS = ["schedule", "check", "simulate", "compare", "draw", "balance", "replay", "demo", "trace"]
DUALPIPE = ["dualpipe", "--ranks", "4", "--microbatches", "8"]

# --- running it ---------------------------------------------------------------------------------------------


Run = Callable[..., str]


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a verb that has to refuse its input, and returns the sentence; cells may stand below it."""

    def run(*arguments: str | Path) -> str:
        code = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert (code, printed.out) == (2, "")
        assert printed.err.startswith("counterflow: ")
        sentence, *notes = printed.err.removeprefix("counterflow: ").splitlines()
        assert all(note.startswith("    rank ") for note in notes)
        return sentence

    return run


def command(*arguments: str, **more: Any) -> subprocess.Popen[str]:
    line = [sys.executable, "-c", "import sys; from counterflow.cli import main; sys.exit(main())", *arguments]
    return subprocess.Popen(line, stderr=subprocess.PIPE, text=True, **more)


# --- schedule and check -------------------------------------------------------------------------------------


def test_schedule_prints_text_csv_or_json(out: Run) -> None:
    schedule = dualpipe(4, 8)
    assert out("schedule", *DUALPIPE) == to_text(schedule)
    assert out("schedule", *DUALPIPE, "--csv") == to_csv(schedule)
    assert json.loads(out("schedule", *DUALPIPE, "--json")) == as_dict(schedule)
    assert as_dict(schedule).keys() >= {"name", "num_ranks", "num_stages", "num_microbatches", "ranks"}


def test_forward_only_leaves_the_forwards(out: Run) -> None:
    assert from_text(out("schedule", *DUALPIPE, "--forward-only")) == dualpipe(4, 8).forward_only()


def test_schedule_converts_a_file(out: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(to_json(gpipe(2, 3)))
    assert from_csv(out("schedule", tmp_path / "mine.json", "--csv")) == gpipe(2, 3)


@pytest.mark.parametrize("ending", [".json", ".csv", ".txt"])
def test_check_says_that_a_file_runs_and_how_large_it_is(out: Run, tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"mine{ending}"
    file.write_text({".json": to_json, ".csv": to_csv, ".txt": to_text}[ending](gpipe(4, 3)))
    assert out("check", file) == f"{file}: runs: 4 ranks, 4 stages, 3 micro-batches, 24 actions, 18 transfers\n"
    assert json.loads(out("check", file, "--json")) == {
        "file": str(file),
        "name": "gpipe" if ending == ".json" else "mine",
        "mode": "train",
        "num_ranks": 4,
        "num_stages": 4,
        "num_microbatches": 3,
        "actions": 24,
        "transfers": 18,
        "channels": "rendezvous",
        "runs": True,
    }


@pytest.mark.parametrize("verb", [["check"], ["simulate"], ["draw", "-o", "never.svg"]], ids=lambda verb: verb[0])
def test_a_file_that_would_not_run_is_refused_by_its_name(refusal: Run, tmp_path: Path, verb: list[str]) -> None:
    file = tmp_path / "bad.txt"
    file.write_text("0F0 0B0\n1B0 1F0")
    assert refusal(*verb, file) == f"{file}: rank 1, step 0: 1B0 stands before its forward 1F0; move it behind"


def test_a_w_that_is_longer_than_b_is_refused(refusal: Run) -> None:
    assert refusal("simulate", *DUALPIPE, "--weight-us", "5") == (
        "--weight-us 5 is more than B, 2; W is a part of it: give at most that, or a longer --backward-us"
    )


def test_below_a_refusal_the_cells_are_marked(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "bad.txt"
    file.write_text("0F0 0B0 0F1 0B1\n1F1 1B1 1F0 1B0")
    assert main(["check", str(file)]) == 2
    assert capsys.readouterr().err.splitlines()[1:] == [
        "    rank 0, steps 0 to 3: 0F0 >0B0< 0F1  0B1",
        "    rank 1, steps 0 to 3:>1F1< 1B1  1F0  1B0",
    ]


def test_check_tells_what_the_channels_and_the_memory_allow(out: Run, refusal: Run, tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    file.write_text(to_csv(gpipe(2, 3)))
    assert "runs" in out("check", file, "--channels", "buffered", "--most-activations", "3")
    assert "deadlock: rank 0 at step" in refusal("check", file, "--channels", "nccl")
    assert "0F2 would be activation 3 on its rank" in refusal("check", file, "--most-activations", "2")
    assert refusal("check", file, "--channels", "x").endswith("it is one of rendezvous, buffered, nccl, nccl-pair")


# --- simulate -----------------------------------------------------------------------------------------------


def test_simulate_prints_one_row_of_figures_for_each_rank(out: Run) -> None:
    lines = out("simulate", *DUALPIPE).splitlines()
    assert lines[0] == "dualpipe: 4 ranks, 4 stages, 8 micro-batches; the step takes 26 µs"
    heads = ["rank", "busy µs", "bubble µs", "bubble %", "warm-up", "steady", "cool-down", "peak activations"]
    assert re.split(r"\s{2,}", lines[2]) == heads
    phases = [["0", "2", "0"], ["1", "0", "1"], ["1", "0", "1"], ["0", "2", "0"]]
    assert [line.split() for line in lines[3:7]] == [
        [str(rank), "24", "2", "7.7", *phases[rank], "5"] for rank in range(4)
    ]
    assert lines[8].startswith("critical path: rank 0 0F0 → rank 1 ")


def test_simulate_as_json(out: Run) -> None:
    assert json.loads(out("simulate", "1f1b", "--ranks", "2", "--microbatches", "2", "--json")) == {
        "name": "1f1b",
        "mode": "train",
        "num_ranks": 2,
        "num_stages": 2,
        "num_microbatches": 2,
        "makespan_us": 9.0,
        "busy_us": [6.0, 6.0],
        "bubble_us": [3.0, 3.0],
        "warm_up_us": [2.0, 1.0],
        "steady_us": [0.0, 0.0],
        "cool_down_us": [1.0, 2.0],
        "twins_us": [0.0, 0.0],
        "peak_activations": [2, 1],
        "peak_activation_bytes": None,
        "critical_path": [
            {"rank": rank, "action": action, "start_us": start_us, "end_us": end_us}
            for rank, action, start_us, end_us in [
                (0, "0F0", 0, 1),
                (1, "1F0", 1, 2),
                (1, "1B0", 2, 4),
                (1, "1F1", 4, 5),
                (1, "1B1", 5, 7),
                (0, "0B1", 7, 9),
            ]
        ],
        "slack_us": [[0, 2, 1, 0], [0, 0, 0, 0]],
        "timeline": None,
    }


def test_simulate_writes_the_timeline(out: Run, tmp_path: Path) -> None:
    file = tmp_path / "new" / "timeline.json"
    assert json.loads(out("simulate", *DUALPIPE, "--json", "-o", file))["timeline"] == str(file)
    assert read_chrome(file) == simulate(dualpipe(4, 8), Costs())


def test_that_a_schedule_has_forwards_alone_is_told(out: Run, tmp_path: Path) -> None:
    file = tmp_path / "forwards.csv"
    file.write_text("0F0,0F1")
    sizes = "1 rank, 1 stage, 2 micro-batches, forward only"
    assert out("check", file) == f"{file}: runs: {sizes}, 2 actions, 0 transfers\n"
    assert "2 micro-batches, forward only; the step" in out("simulate", file)


@pytest.mark.parametrize("read", ["mine.csv", "costs.json"])
def test_simulate_does_not_write_over_what_it_read(refusal: Run, tmp_path: Path, read: str) -> None:
    schedule, costs = tmp_path / "mine.csv", tmp_path / "costs.json"
    schedule.write_text(to_csv(gpipe(2, 3)))
    write_costs(Costs(), costs)
    before = (tmp_path / read).read_bytes()
    said = refusal("simulate", schedule, "--costs", costs, "-o", tmp_path / read)
    assert said == f"{tmp_path / read} is what was read, and would be lost; write to another file"
    assert (tmp_path / read).read_bytes() == before


def test_bytes_are_told_when_the_costs_state_sizes(out: Run, tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    write_costs(Costs(forward_us=1, backward_us=2, freed_at_weight_bytes=2_500_000), file)
    sizes = ["1f1b", "--ranks", "2", "--microbatches", "2", "--costs", file]
    assert json.loads(out("simulate", *sizes, "--json"))["peak_activation_bytes"] == [5_000_000, 2_500_000]
    table = out("simulate", *sizes).splitlines()[2:5]
    assert [line.split()[-1] for line in table] == ["MB", "5", "2.5"]


def test_a_rank_without_actions_has_its_row(out: Run, tmp_path: Path) -> None:
    file = tmp_path / "idle.json"
    file.write_text(json.dumps({"num_stages": 1, "num_microbatches": 1, "ranks": [["0F0", "0B0"], []]}))
    figures = json.loads(out("simulate", file, "--json"))
    assert (figures["busy_us"], figures["bubble_us"]) == ([3.0, 0.0], [0.0, 3.0])
    assert out("simulate", file).splitlines()[4].split() == ["1", "0", "3", "100.0", "0", "3", "0", "0"]


def test_the_sums_of_twins_are_told_where_they_cost(out: Run, tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    write_costs(Costs(1, 2, None, 1, 3, twins_us=0.5), file)
    figures = json.loads(out("simulate", *DUALPIPE, "--costs", file, "--json"))
    assert (figures["twins_us"], figures["makespan_us"]) == ([1.0] * 4, 27.0)
    assert "twins µs" in out("simulate", *DUALPIPE, "--costs", file)


@pytest.mark.parametrize(
    ("options", "costs"),
    [
        ([], Costs()),
        (["--forward-us", "10"], Costs(10, 20, None, 10, 30)),
        (["--backward-us", "3"], Costs(1, 3, None, 1.5, 4)),
        (["--weight-us", "0.5"], Costs(1, 2, None, 0.5, 3)),
        (["--overlapped-us", "2.4"], Costs(1, 2, None, 1, 2.4)),
        (["--latency-us", "0.25"], Costs(1, 2, None, 1, 3, latency_us=0.25)),
    ],
)
def test_a_cost_that_is_not_given_follows_from_those_that_are(out: Run, options: list[str], costs: Costs) -> None:
    makespan_us = json.loads(out("simulate", *DUALPIPE, *options, "--json"))["makespan_us"]
    assert makespan_us == simulate(dualpipe(4, 8), costs).makespan_ns / 1000


# --- draw ---------------------------------------------------------------------------------------------------


def test_draw_writes_the_picture(out: Run, tmp_path: Path) -> None:
    file = tmp_path / "dualpipe.svg"
    assert out("draw", *DUALPIPE, "-o", file) == f"wrote {file}: 4 ranks, 4 stages, 8 micro-batches\n"
    assert file.read_text(encoding="utf-8") == schedule_svg(dualpipe(4, 8), simulate(dualpipe(4, 8), Costs()))
    assert json.loads(out("draw", *DUALPIPE, "-o", file, "--json"))["file"] == str(file)


def test_draw_takes_a_file_its_forwards_and_costs(out: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text(to_csv(one_f_one_b(2, 4)))
    out("draw", tmp_path / "mine.csv", "--forward-only", "--forward-us", "7", "-o", tmp_path / "mine.svg")
    picture = (tmp_path / "mine.svg").read_text(encoding="utf-8")
    assert "mine: 2 ranks, 4 micro-batches, forward only" in picture
    assert "step 35 µs" in picture


def test_draw_fixes_the_theme_and_adds_memory_when_asked(out: Run, tmp_path: Path) -> None:
    out("draw", *DUALPIPE, "--theme", "dark", "--memory", "-o", tmp_path / "dark.svg")
    picture = (tmp_path / "dark.svg").read_text(encoding="utf-8")
    assert "@media" not in picture
    assert "rank 3 holds at most 5 activations at once" in picture


def test_memory_is_drawn_in_bytes_when_the_costs_state_sizes(out: Run, tmp_path: Path) -> None:
    write_costs(Costs(forward_us=1, backward_us=2, freed_at_weight_bytes=2_500_000), tmp_path / "costs.json")
    sizes = ["1f1b", "--ranks", "2", "--microbatches", "2", "--costs", tmp_path / "costs.json"]
    out("draw", *sizes, "--memory", "-o", tmp_path / "bytes.svg")
    assert "rank 0 holds at most 5 MB at once" in (tmp_path / "bytes.svg").read_text(encoding="utf-8")


def test_draw_writes_a_png(out: Run, tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    if not has_font():
        pytest.skip("needs a font")
    assert out("draw", *DUALPIPE, "-o", tmp_path / "dualpipe.png").startswith(f"wrote {tmp_path / 'dualpipe.png'}: ")
    assert (tmp_path / "dualpipe.png").read_bytes().startswith(b"\x89PNG")


def test_draw_without_a_file_prints_the_schedule(out: Run) -> None:
    printed = out("draw", *DUALPIPE)
    assert "\x1b" not in printed
    assert "rank 3  F4 F5 F6 F0 I0 W0 F1 F7&B1--- " in printed
    assert json.loads(out("draw", *DUALPIPE, "--json"))["file"] is None


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            "schedule dualpip",
            "'dualpip' is neither a schedule nor a file; the schedules are gpipe, 1f1b, interleaved-1f1b,",
        ),
        ("schedule dualpipe", "dualpipe needs its sizes; give --ranks and --microbatches"),
        ("simulate dualpipe --ranks 8", "dualpipe needs its sizes; give --ranks and --microbatches"),
        (
            "schedule dualpipe --ranks 7 --microbatches 20",
            "dualpipe got 7 ranks; it needs an even number of at least 2",
        ),
        ("schedule gpipe --ranks 2 --microbatches 2 --csv --json", "schedule got both --csv and --json; choose one"),
        ("schedule", "Missing argument 'NAME|FILE'; see counterflow schedule --help"),
        ("schedule gpipe --ranks two --microbatches 2", "Invalid value for '--ranks': "),
        ("schedule gpipe --rank 2", "No such option: --rank"),
        (
            "check nothing.csv",
            "nothing.csv cannot be read as a schedule (No such file or directory); give one as counterflow schedule",
        ),
        (
            "check latin.csv",
            "latin.csv cannot be read as a schedule ('utf-8' codec can't decode byte 0xb5 in position 0: invalid start "
            "byte); give one as counterflow schedule",
        ),
        (
            "simulate good.csv --last-stage-weight 1e300",
            "good.csv: the weight of the last stage got 1e+300; it needs a number from 1, as long as the others take, "
            "to 1e+18: ",
        ),
        ("check mine.csv", "mine.csv: row 1, column 2: '0X0' is not an action"),
        ("simulate good.csv --ranks 2", "good.csv is a file and states its own sizes; leave out --ranks"),
        ("simulate good.csv --forward-us -1", "forward_us got -1.0; it needs a number"),
        (
            "simulate good.csv --costs nothing.json",
            "nothing.json cannot be read as costs (No such file or directory); give one as counterflow trace costs",
        ),
        (
            "simulate good.csv --costs c.json --latency-us 0",
            "--costs c.json states every cost; leave out the single ones",
        ),
        ("simulate good.csv --costs short.json", "good.csv: the costs name 1 stages and the schedule has a stage 1"),
        ("simulate good.csv -o good.csv/t.json", "good.csv/t.json cannot be written ("),
        ("compare --ranks 8", "Missing option '--microbatches'; see counterflow compare --help"),
        ("compare --ranks 0 --microbatches 4", "gpipe got 0 ranks; it needs at least 1"),
        ("draw good.csv -o good.jpg", "good.jpg ends in '.jpg'; a schedule is drawn as .svg or .png"),
        ("draw good.csv --theme dark", "draw got --theme dark and no picture to draw; give -o with an .svg or .png"),
        ("draw good.csv --theme blue -o good.svg", "Invalid value for '--theme': "),
        ("draw good.csv -o good.csv/x.svg", "good.csv/x.svg cannot be written ("),
        ("drow", "No such command 'drow'"),
    ],
)
def test_bad_input_is_one_sentence_on_stderr_and_code_2(
    refusal: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.csv").write_text("0F0,0X0\n")
    Path("latin.csv").write_bytes("µ".encode("latin-1"))
    Path("good.csv").write_text(to_csv(gpipe(2, 2)))
    Path("short.json").write_text(json.dumps({"format": 1, "forward_us": [1], "backward_us": [2]}))
    assert refusal(*arguments.split()).startswith(sentence)


@pytest.mark.parametrize(("option", "given"), [("--ranks", "two"), ("--forward-us", "1µs"), ("--ranks", "")])
def test_a_number_that_cannot_be_read_is_told(refusal: Run, option: str, given: str) -> None:
    sentence = refusal("simulate", "gpipe", option, given)
    assert sentence.startswith(f"Invalid value for '{option}': ")
    assert repr(given) in sentence
    assert sentence.endswith("; see counterflow simulate --help")


def test_what_a_file_holds_cannot_steer_the_terminal(out: Run, refusal: Run, tmp_path: Path) -> None:
    evil = Schedule.from_rows(gpipe(1, 1).rows, name="\x1b[31mred\nnext [bold]line")
    (tmp_path / "evil.json").write_text(to_json(evil))
    assert out("simulate", tmp_path / "evil.json").splitlines()[0].startswith("[31mred next [bold]line: 1 rank,")
    (tmp_path / "evil.csv").write_text("\x1b[31m")
    assert "\x1b" not in refusal("check", tmp_path / "evil.csv")


# --- help, and what is around it ----------------------------------------------------------------------------


# The example of demo trains for a minute; tests/demo runs a shorter one.
# Those of balance, replay and trace read files of their own; tests/cli and tests/trace run them.
@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in ("demo", "balance", "replay", "trace")])
def test_help_shows_an_example_that_runs(out: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("dualpipe.csv").write_text(to_csv(dualpipe(2, 4)))
    example = re.search(r"Example:\n +counterflow (.*)", out(verb, "--help"))
    assert example
    arguments = example[1].split(" > ")[0].split()
    assert arguments[0] == verb
    assert out(*arguments)


def test_help_lists_the_verbs(out: Run) -> None:
    assert out() == out("--help")
    listed = out("--help").split("Commands:")[1]
    assert re.findall(r"^  (\w+)  +[A-Z].*\.$", listed, re.MULTILINE) == VERBS
    assert "..." not in listed


def test_version(out: Run) -> None:
    assert out("--version") == f"counterflow {__version__}\n"
    done = subprocess.run([sys.executable, "-m", "counterflow", "--version"], capture_output=True, text=True)
    assert done.stdout == f"counterflow {__version__}\n"


def test_help_needs_neither_numpy_nor_rich() -> None:
    code = "import sys; from counterflow.cli import main; main(['--help']); print([m in sys.modules for m in {}])"
    done = subprocess.run(
        [sys.executable, "-c", code.format(("numpy", "rich", "torch"))], capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "[False, False, False]"


# --- pipes --------------------------------------------------------------------------------------------------


def test_in_a_pipe_a_table_is_plain_and_whole() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "FORCE_COLOR"} | {"COLUMNS": "40"}
    run = command("compare", "--ranks", "8", "--microbatches", "20", stdout=subprocess.PIPE, env=environment)
    printed, _ = run.communicate()
    assert run.returncode == 0
    assert "\x1b" not in printed
    assert "…" not in printed
    rows = printed.split("\n\n")[1].splitlines()
    assert {"gpipe", "1f1b", "zb1p", "dualpipe", "dualpipev"} < {row.split()[0] for row in rows}
    assert {len(row) for row in rows} == {len(rows[0])}
    assert rows[0].endswith("× bound")


def test_a_reader_that_leaves_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    run = command("schedule", *DUALPIPE, stdout=writer)
    os.close(writer)
    assert run.communicate()[1] == ""
    assert run.returncode == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_output_that_cannot_be_written_is_told() -> None:
    with open("/dev/full", "w") as full:
        run = command("schedule", *DUALPIPE, stdout=full)
        assert run.communicate()[1] == "counterflow: the output cannot be written: No space left on device\n"
    assert run.returncode == 2


def test_an_encoding_without_micro_is_no_error() -> None:
    run = command("simulate", *DUALPIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert "the step takes 26 ?s" in run.communicate()[0]
    assert run.returncode == 0


def test_ctrl_c_ends_with_130_and_says_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(path: Path) -> Schedule:
        raise KeyboardInterrupt

    monkeypatch.setattr("counterflow.schedule.read_schedule", interrupted)
    assert main(["check", "mine.csv"]) == 130
    assert capsys.readouterr() == ("", "")
