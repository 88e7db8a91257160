"""The verbs trace pipeline and trace costs, and the way round: run, profile, rebuild, predict."""

import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from conftest import Run
from counterflow import dualpipev, one_f_one_b, simulate
from counterflow.cli import main
from counterflow.report.png import has_font
from counterflow.schedule import to_csv
from counterflow.simulator import Costs, read_costs
from counterflow.timeline import read_chrome
from ranks import all_reduce, behind_one_another, from_start, gpu_events, named_ranges, spans_of, write
from traces import annotation, kernel, launch, real_trace

COSTS = Costs(30, 60, None, 25, latency_us=4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two ranks of 1F1B, three steps, with a collective behind each; rank 1 always comes last to it."""
    steps = behind_one_another(simulate(one_f_one_b(2, 4), COSTS), 3)
    events = []
    for rank in range(2):
        ends = [int(step.end_ns.max()) + 9_000 for step in steps]
        events.append(
            named_ranges(spans_of(rank, steps)) + [all_reduce(end - 8_000 + 5_000 * rank, end) for end in ends]
        )
    write(tmp_path / "traces", events)
    return tmp_path / "traces"


def test_the_step_is_told_with_its_bubble_its_waits_and_its_straggler(out: Run, folder: Path) -> None:
    text = out("trace", "pipeline", folder)
    assert text.startswith(
        "1f1b: 2 ranks, 2 stages, 4 micro-batches; actions named by counterflow's executor\n3 whole steps"
    )
    assert re.search(r"^1 +rank001.json +360 +106 +34 +8 +64 +22\.7%$", text, re.MULTILINE)
    assert "rank 0 before 0B0: 68 µs for 1B0 of rank 1, 64 µs of them until it was done" in text
    assert "rank 1 came last to 3 of 3 collectives (all_reduce): the others waited 15 µs" in text


def test_json_has_stable_keys_and_every_step(out: Run, folder: Path) -> None:
    data = json.loads(out("trace", "pipeline", folder, "--step", "all", "--json"))
    assert (data["named_by"], data["name"], data["num_ranks"], data["problem"]) == (
        "counterflow's executor", "1f1b", 2, None,
    )  # fmt: skip
    assert data["schedule"][1][:2] == ["1F0", "1B0"]
    assert [one["step"] for one in data["steps"]] == ["step 0", "step 1", "step 2"]
    step = simulate(one_f_one_b(2, 4), COSTS)
    assert data["steps"][0]["bubble_us"] == [ns / 1000 for ns in step.bubble_ns().tolist()]
    assert data["clocks"]["basis"] == "collectives"
    assert data["clocks"]["stragglers"][0]["rank"] == 1
    assert set(data["steps"][0]["waits"][0]) == {
        "rank", "action", "waits_for_rank", "waits_for", "start_us", "waited_us", "arriving_us",
    }  # fmt: skip


def test_the_timeline_is_written_and_the_overlay_drawn(out: Run, folder: Path, tmp_path: Path) -> None:
    files = ("-o", tmp_path / "step.json", "--overlay", tmp_path / "o.svg")
    text = out("trace", "pipeline", folder, "--step", "1", *files)
    assert "simulated: 466 µs, +0.0%\n" in text
    assert "differ most" not in text
    assert from_start(read_chrome(tmp_path / "step.json")) == from_start(simulate(one_f_one_b(2, 4), COSTS))
    ElementTree.fromstring((tmp_path / "o.svg").read_text())
    out("trace", "pipeline", folder, "--step", "all", "-o", tmp_path / "every.json")
    assert len(read_chrome(tmp_path / "every.json")) == 3 * 16


def test_an_overlay_can_be_a_png(out: Run, folder: Path, tmp_path: Path) -> None:
    if not has_font():
        pytest.skip("no font to draw text with")
    out("trace", "pipeline", folder, "--overlay", tmp_path / "o.png")
    assert (tmp_path / "o.png").read_bytes().startswith(b"\x89PNG")


def test_costs_go_from_traces_to_the_simulator(out: Run, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    text = out("trace", "costs", folder, "-o", file)
    assert "from the ranges of counterflow's executor: 3 steps of 2 ranks" in text
    assert read_costs(file).forward_us == (30, 30)
    told = json.loads(out("simulate", "1f1b", "--ranks", "2", "--microbatches", "4", "--costs", file, "--json"))
    assert told["makespan_us"] == simulate(one_f_one_b(2, 4), COSTS).makespan_ns / 1000
    compared = json.loads(out("trace", "pipeline", folder, "--costs", file, "--json"))["simulated"]
    assert compared["makespan_us"] == told["makespan_us"]
    assert {one["measured_us"] - one["simulated_us"] for one in compared["deviations"]} == {0}
    data = json.loads(out("trace", "costs", folder, "--json"))
    assert set(data) == {"costs", "source", "not_told", "warnings"}


def test_all_ranks_of_one_process_need_the_schedule(out: Run, tmp_path: Path) -> None:
    schedule = dualpipev(2, 4)
    step = simulate(schedule, COSTS)
    events = named_ranges([span for rank in range(2) for span in spans_of(rank, [step])])
    (trace,) = write(tmp_path / "one", [events])
    (tmp_path / "dualpipev.csv").write_text(to_csv(schedule))
    found = json.loads(out("trace", "pipeline", trace.file, "--schedule", tmp_path / "dualpipev.csv", "--json"))
    assert (found["name"], found["num_ranks"], found["warnings"]) == ("dualpipev", 2, [])


def test_without_names_the_bubble_has_bounds_and_their_assumptions(out: Run, tmp_path: Path) -> None:
    step = simulate(one_f_one_b(2, 4), COSTS)
    write(tmp_path / "gpu", [gpu_events(spans_of(rank, [step]), named=False) for rank in range(2)])
    text = out("trace", "pipeline", tmp_path / "gpu")
    assert text.startswith("no named actions: the bubble lies between two bounds; clocks taken as they are")
    assert "an optimiser that runs in it counts as computing" in text
    data = json.loads(out("trace", "pipeline", tmp_path / "gpu", "--json"))
    for one, bubble_ns in zip(data["bounds"], step.bubble_ns().tolist(), strict=True):
        assert one["least_us"] <= bubble_ns / 1000 <= one["most_us"]
    assert len(data["assumptions"]) == 4


def test_rules_of_one_s_own_tell_what_computes(out: Run, tmp_path: Path) -> None:
    rules = tmp_path / "rules.json"
    rules.write_text(json.dumps({"rules": [{"pattern": "house_ring", "class": "transfer"}]}))
    unnamed = [kernel("gemm", 7, 0, 20), kernel("house_ring", 7, 20, 10), kernel("gemm", 7, 30, 10)]
    write(tmp_path / "unnamed", [unnamed])
    for more, computes_us in (((), 40), (("--rules", rules), 30)):
        [bounds] = json.loads(out("trace", "pipeline", tmp_path / "unnamed", *more, "--json"))["bounds"]
        assert bounds["compute_us"] == computes_us
    # The ring of the first action ends beside the second one's work, so it is none of the first one's end.
    launched = [annotation("0F0", 0, 2), launch(0.5, 1), launch(1, 2), annotation("0B0", 3, 2), launch(4, 3)]
    named = [kernel("gemm", 7, 10, 20, 1), kernel("house_ring", 9, 30, 25, 2), kernel("gemm", 7, 40, 30, 3)]
    write(tmp_path / "named", [launched + named])
    for more, forward_us in (((), 45), (("--rules", rules), 30)):
        text = json.loads(out("trace", "costs", tmp_path / "named", *more, "--json"))
        assert text["costs"]["forward_us"] == [forward_us], text


def test_a_published_trace_without_messages_says_so(out: Run) -> None:
    text = out("trace", "pipeline", real_trace("deepseek_train.json.gz"))
    assert "no kernel sent to or received from another rank" in text


def test_bad_input_is_refused_in_a_sentence(refusal: Run, folder: Path, tmp_path: Path) -> None:
    assert refusal("trace", "pipeline", folder, "--step", "3") == (
        "--step got '3'; the traces hold 3 whole steps: give a number from 0 to 2, all or mean"
    )
    assert "drawn as .svg or .png" in refusal("trace", "pipeline", folder, "--overlay", "o.pdf")
    assert "give --step a number, or mean" in refusal(
        "trace", "pipeline", folder, "--step", "all", "--overlay", "o.svg"
    )
    write(tmp_path / "cpu", [[annotation("forward", 0, 5)]])
    assert "leave out --overlay" in refusal("trace", "pipeline", tmp_path / "cpu", "--overlay", tmp_path / "o.svg")
    assert "profile with ProfilerActivity.CUDA" in refusal("trace", "pipeline", tmp_path / "cpu")
    assert "names neither actions" in refusal("trace", "costs", tmp_path / "cpu")


def test_names_in_a_trace_steer_no_terminal(out: Run, tmp_path: Path) -> None:
    steps = behind_one_another(simulate(one_f_one_b(2, 2), COSTS), 3)
    evil = [all_reduce(int(s.end_ns.max()), int(s.end_ns.max()) + 9, name="gloo:\x1b[31mall\nreduce") for s in steps]
    late = [event | {"ts": event["ts"] + 5, "dur": 1} for event in evil]
    events = [named_ranges(spans_of(rank, steps)) + some for rank, some in enumerate((evil, late))]
    write(tmp_path / "traces", events)
    assert "\x1b" not in out("trace", "pipeline", tmp_path / "traces")


# --- the whole way round --------------------------------------------------------------------------------------


def test_what_the_runtime_ran_is_rebuilt_from_its_profile(out: Run, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from torch.profiler import ProfilerActivity, profile

    from counterflow.runtime import Pipeline

    schedule = dualpipev(2, 4)
    stages = [{s: torch.nn.Linear(64, 64) for s in schedule.stages_of(rank)} for rank in range(2)]
    running = Pipeline.in_process(schedule, stages, torch.nn.functional.mse_loss)
    data = list(torch.randn(4, 32, 64))
    running.step(data, data)
    measured = []
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, acc_events=True) as profiler:
        for _ in range(3):
            running.step(data, data)
            measured.append(running.timeline)
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    (tmp_path / "ran.csv").write_text(to_csv(schedule))
    arguments = (tmp_path / "trace.json", "--schedule", tmp_path / "ran.csv")
    found = json.loads(out("trace", "pipeline", *arguments, "--step", "all", "--json"))
    assert found["schedule"] == [[str(action) for action in row] for row in schedule.rows]
    assert (found["problem"], found["num_steps"], found["actions_outside_steps"]) == (None, 3, 0)
    for step, timeline in zip(found["steps"], measured, strict=True):
        # The executor's own marks stand just outside its ranges.
        for busy_us, own_ns in zip(step["busy_us"], timeline.busy_ns().tolist(), strict=True):
            assert busy_us <= own_ns / 1000
        assert step["makespan_us"] <= timeline.makespan_ns / 1000
    out("trace", "costs", *arguments, "-o", tmp_path / "costs.json")
    told = json.loads(out("simulate", tmp_path / "ran.csv", "--costs", tmp_path / "costs.json", "--json"))
    # In one process ranks take turns; side by side they are no faster than each by itself.
    assert 0 < max(told["busy_us"]) <= told["makespan_us"]


PROCESS = """
import sys, torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, ScheduleInterleaved1F1B
from torch.profiler import ProfilerActivity, profile
from counterflow.runtime import Pipeline
from counterflow.schedule import generate

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, loss, data = dist.get_rank(), torch.nn.functional.mse_loss, torch.randn(6, 256, 256)
schedule = generate("interleaved-1f1b", 2, 6)
stages = {s: torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(4))) for s in schedule.stages_of(rank)}
ours = Pipeline(schedule, stages, loss)
parts = [PipelineStage(stages[s], s, 4, torch.device("cpu")) for s in stages]
theirs = ScheduleInterleaved1F1B(parts, 6, loss)
whole = data.flatten(0, 1)
keywords = {"target": whole, "losses": []} if rank else {}
steps = {
    "ours": lambda: ours.step(list(data), list(data)),
    "theirs": lambda: theirs.step(*(() if rank else (whole,)), **keywords),
}
for name, step in steps.items():
    for _ in range(3):
        step()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, acc_events=True) as profiler:
        for _ in range(6):
            step()
            dist.all_reduce(torch.ones(1))
    profiler.export_chrome_trace(f"{sys.argv[1]}/{name}/rank{rank}.json")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_are_rebuilt_and_predicted_from_their_profiles_ours_and_torch_s(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    from counterflow.runtime import launch

    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
    launch([sys.executable, "-c", PROCESS, str(tmp_path)], 2, logs=tmp_path / "logs")
    for name, by in (("ours", "counterflow's executor"), ("theirs", "torch's pipeline runtime")):
        folder, costs = tmp_path / name, tmp_path / f"{name}.json"
        assert main(["trace", "costs", str(folder), "-o", str(costs)]) == 0
        assert read_costs(costs).transfer_bytes == (256 * 256 * 4,) * 3 + (0,)
        capsys.readouterr()
        assert main(["trace", "pipeline", str(folder), "--costs", str(costs), "--json"]) == 0
        printed = capsys.readouterr()
        assert ("begin with the wait" in printed.err) == (name == "theirs")
        found = json.loads(printed.out)
        assert (found["named_by"], found["num_steps"], found["num_ranks"], found["problem"]) == (by, 6, 2, None)
        assert found["clocks"]["basis"] == "collectives"
        # The machine is shared: the prediction is held to the same order, the benchmark says how near it comes.
        assert 0.4 < found["simulated"]["makespan_us"] / found["steps"][0]["makespan_us"] < 1.6


def test_trace_alone_shows_its_verbs(out: Run) -> None:
    text = out("trace")
    assert re.findall(r"^  (\w+)  ", text.split("Commands:")[1], re.MULTILINE) == [
        *("overlap", "report", "pipeline", "costs", "diff")
    ]
