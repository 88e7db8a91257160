"""The demo trains for real, leaves what it promises, and leaves no process when it is killed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from counterflow import dualpipe, simulate
from counterflow.cli import main
from counterflow.demo import Results, run_demo
from counterflow.demo.model import BLOCKS, DecoderStage, StandardLibrary, blocks_of
from counterflow.demo.train import directions
from counterflow.errors import PipelineError
from counterflow.schedule import generate, read_schedule
from counterflow.simulator import read_costs
from counterflow.timeline import COMPUTE, TWINS, read_chrome


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def found(out: Path) -> Results:
    return run_demo(dualpipe(2, 4), device="cpu", steps=8, out=out)


def test_it_learns_with_exact_gradients(found: Results) -> None:
    assert found.gradients == {"largest_difference": 0.0, "bitwise_equal": True}
    assert found.first_loss > 5.3  # ln 256 is 5.55: it knows nothing yet
    assert found.held_out_after < found.held_out_before - 1.5


def test_it_leaves_what_it_promises(found: Results, out: Path) -> None:
    left = {path.name for path in out.iterdir()}
    pictures_and_traces = {"schedule.svg", "measured.svg", "predicted.json", "measured.json"}
    assert left == pictures_and_traces | {"schedule.csv", "costs.json", "results.json", "logs"}
    results = json.loads((out / "results.json").read_text())
    assert results["predicted"]["step_ms"] == found.predicted.step_ms


def test_the_prediction_is_the_simulation_of_what_was_measured(found: Results, out: Path) -> None:
    schedule = read_schedule(out / "schedule.csv")
    predicted = simulate(schedule, read_costs(out / "costs.json"))
    assert read_chrome(out / "predicted.json") == predicted
    assert found.predicted.step_ms == predicted.makespan_ns / 1e6
    assert found.rivals.keys() == {"1f1b"}
    # On two ranks DualPipe never cuts the backward of stage 1, so nothing was measured that ZB1P could rest on.
    assert found.without_prediction == {"zb1p": "the costs do not say how long 1I0 takes; give input_us for stage 1"}


def test_the_measured_trace_holds_every_action_of_the_schedule(found: Results, out: Path) -> None:
    schedule = read_schedule(out / "schedule.csv")
    spans = list(read_chrome(out / "measured.json"))
    measured = sorted((span.rank, span.name) for span in spans if span.lane == COMPUTE)
    assert [span.name for span in spans if span.lane == TWINS] == ["twins of stage 0", "twins of stage 1"] * 2
    assert measured == sorted((rank, str(action)) for rank, row in enumerate(schedule.rows) for action in row)


def test_on_the_command_line_it_says_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--schedule", "1f1b", "--ranks", "2", "--microbatches", "2", "--steps", "5"]) == 0
    said, progress = capsys.readouterr()
    assert "Gradients of one step against a single process: equal, bit for bit." in said
    assert re.search(r"1f1b, measured +\d+ +\d+\.\d\n1f1b, predicted +\d+", said)
    # Nothing cuts a backward in two under 1F1B, so nothing says what ZB1P would take.
    assert re.search(r"zb1p is left out: the costs do not say how long \dI0 takes", said)
    assert (tmp_path / "out/demo/results.json").exists()
    assert progress == ""  # no bar in a pipe


def test_too_few_steps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="the demo got 4 steps; it needs at least 5"):
        run_demo(dualpipe(2, 4), device="cpu", steps=4, out=tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here, which the demo would take")
def test_a_missing_gpu_is_said_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="torch sees no GPU here; use device 'cpu'"):
        run_demo(dualpipe(2, 4), device="cuda", steps=5, out=tmp_path)


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4, 8, 11])
def test_stages_share_the_blocks_evenly(num_stages: int) -> None:
    shares = [blocks_of(stage, num_stages) for stage in range(num_stages)]
    assert sum(shares) == max(BLOCKS, num_stages)
    assert max(shares) - min(shares) <= 1


def test_the_stages_together_are_one_decoder() -> None:
    inputs, targets = StandardLibrary().batch("train", seed=0, num_microbatches=2, size=3)
    assert [tuple(x.shape) for x in inputs] == [(3, 128), (3, 128)]
    assert torch.equal(inputs[0][:, 1:], targets[0][:, :-1])
    value = inputs[0]
    for stage in range(3):
        value = DecoderStage(stage, 3)(value)
    assert value.shape == (3, 128, 256)


def test_directions_are_the_two_halves_of_dualpipe_and_one_for_the_others() -> None:
    assert directions(dualpipe(2, 4)) == [[0, 1], [2, 3]]
    assert directions(generate("dualpipev", 2, 4)) == [[0, 1, 2, 3]]
    assert directions(generate("1f1b", 2, 3)) == [[0, 1, 2]]


def test_a_folder_that_cannot_be_made_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("out").touch()
    assert main(["demo"]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(
        r"counterflow: out/demo cannot be written \(.+\); run the demo in a folder in which you may make that one\n",
        said,
    )


def running(pattern: str) -> list[int]:
    """The processes whose command line holds ``pattern``."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if pattern in command:
                found.append(int(entry.name))
    return found


def until(condition: object, seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.1)
    return False


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("victim", ["a rank", "the demo, politely", "the demo, for good"])
def test_killed_half_way_it_leaves_no_process_and_a_clear_message(tmp_path: Path, victim: str) -> None:
    arguments = ["demo", "--ranks", "2", "--microbatches", "4", "--steps", "10000"]
    code = f"import sys; from counterflow.cli import main; sys.exit(main({arguments}))"
    demo = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert demo.stderr is not None
    # The ranks are told apart from those of other demos by their folder.
    try:
        assert until((tmp_path / "out/demo/progress.json").exists), "the demo did not begin to train"
        ranks = [
            pid for pid in running("counterflow.demo.train") if Path(f"/proc/{pid}/cwd").resolve() == tmp_path.resolve()
        ]
        assert len(ranks) == 2
        match victim:
            case "a rank":
                os.kill(ranks[-1], signal.SIGKILL)
            case "the demo, politely":
                demo.terminate()
            case "the demo, for good":
                demo.kill()
        said = demo.communicate(timeout=30)[1]
        assert until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks), 20), "a rank is still there"
    finally:
        demo.kill()
        demo.wait()
    if victim == "a rank":
        assert demo.returncode == 1
        first, *others = said.splitlines()
        assert first.startswith("counterflow: rank ")
        assert "was killed by SIGKILL" in first
        assert len(others) >= 1
    elif victim == "the demo, politely":
        assert demo.returncode == 143
        assert said == "counterflow: the demo was stopped half-way; its ranks were ended with it\n"
