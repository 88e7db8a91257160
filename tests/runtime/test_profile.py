"""Recording a run: every rank's cycles in files of their own, whole or absent, whatever ends the block."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from counterflow.errors import PipelineError
from counterflow.runtime import Pipeline, profile
from counterflow.schedule import generate
from counterflow.trace import Trace, open_traces


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch) -> None:
    monkeypatch.delenv("RANK", raising=False)


def work() -> None:
    with torch.profiler.record_function("work"):
        torch.ones(4, 4) @ torch.ones(4, 4)


def record(folder: Path, steps: int, then: Callable[[], object] = lambda: None, **options: int) -> profile:
    with profile(folder, **{"wait": 1, "warmup": 1, "active": 2, "repeat": 1} | options) as recording:
        for _ in range(steps):
            work()
            recording.step()
        then()
    return recording


def annotated(trace: Trace) -> list[str]:
    return [trace.names[name] for name in trace.annotations.name.tolist()]


def test_the_active_steps_are_kept_and_no_others(tmp_path: Path) -> None:
    recording = record(tmp_path, 6)
    assert recording.files == [tmp_path / "rank0_1.json.gz"]
    [trace] = open_traces(tmp_path)
    assert annotated(trace) == ["ProfilerStep#2", "work", "ProfilerStep#3", "work"]
    assert trace.rank == 0
    assert os.listdir(tmp_path) == ["rank0_1.json.gz"]


def test_every_cycle_has_a_file(tmp_path: Path) -> None:
    recording = record(tmp_path, 9, repeat=2, wait=0, active=1)
    assert [path.name for path in recording.files] == ["rank0_1.json.gz", "rank0_2.json.gz"]
    assert [annotated(trace)[0] for trace in open_traces(tmp_path)] == ["ProfilerStep#1", "ProfilerStep#3"]


def test_a_folder_of_ranks_is_read_in_their_order(tmp_path: Path) -> None:
    for rank in (11, 2):
        record(tmp_path / "new" / "folder", 4, rank=rank)
    assert [trace.rank for trace in open_traces(tmp_path / "new" / "folder")] == [2, 11]


def test_the_launcher_tells_the_rank(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "5")
    record(tmp_path, 4)
    assert [trace.rank for trace in open_traces(tmp_path)] == [5]


def test_torch_distributed_tells_the_rank_and_its_groups(tmp_path: Path) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        [file] = record(tmp_path, 4).files
        told = json.loads(gzip.decompress(file.read_bytes()))["distributedInfo"]
        assert (told["rank"], told["world_size"], told["backend"]) == (0, 1, "gloo")
        with pytest.raises(PipelineError) as refused:
            record(tmp_path, 4, rank=1)
        assert str(refused.value) == "profile got rank 1 in a process that is rank 0; leave the rank out"
    finally:
        dist.destroy_process_group()


def test_a_run_that_ends_early_leaves_what_it_recorded(tmp_path: Path) -> None:
    record(tmp_path, 3)
    [trace] = open_traces(tmp_path)
    assert annotated(trace) == ["ProfilerStep#2", "work", "ProfilerStep#3"]


def test_an_error_leaves_what_was_recorded_and_comes_through(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        record(tmp_path, 3, then=lambda: 1 / 0)
    [trace] = open_traces(tmp_path)
    assert annotated(trace) == ["ProfilerStep#2", "work", "ProfilerStep#3"]


def test_a_write_that_fails_leaves_no_file_and_is_told(tmp_path: Path, monkeypatch) -> None:
    def half(self: object, path: str) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", half)
    with pytest.raises(PipelineError, match=r"rank0_1\.json\.gz cannot be written \(.*No space left on device\); give"):
        record(tmp_path, 4)
    with pytest.raises(ZeroDivisionError) as caught:
        record(tmp_path, 3, then=lambda: 1 / 0)
    assert "rank0_1.json.gz cannot be written" in caught.value.__notes__[0]
    assert os.listdir(tmp_path) == []


def test_recording_nothing_is_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="called 1 times, and the first 2 steps are not kept; run more of them"):
        recording = record(tmp_path, 1)
    assert recording.files == []


@pytest.mark.parametrize("wrong", [{"active": 0}, {"wait": -1}, {"warmup": -1}, {"repeat": -1}, {"rank": -1}])
def test_numbers_that_make_no_cycle_are_refused(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(PipelineError, match="it needs an active of at least 1 and nothing below 0"):
        profile(tmp_path, **wrong)


def test_a_folder_that_cannot_be_made_is_refused_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PipelineError, match=r"file cannot be made \(File exists\); give a folder for traces"):
        record(tmp_path / "file", 1)


def test_a_pipeline_is_recorded(tmp_path: Path) -> None:
    schedule = generate("1f1b", 2, 2)
    stages = [{stage: torch.nn.Linear(2, 2) for stage in schedule.stages_of(rank)} for rank in range(2)]
    pipeline = Pipeline.in_process(schedule, stages, torch.nn.functional.mse_loss)
    data = [torch.ones(2, 2)] * 2
    with profile(tmp_path, wait=0, active=1) as recording:
        for _ in range(2):
            pipeline.step(data, data)
            recording.step()
    [trace] = open_traces(tmp_path)
    assert "ProfilerStep#1" in annotated(trace)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")
def test_the_gpu_is_recorded_where_there_is_one(tmp_path: Path) -> None:
    data = torch.ones(512, 512, device="cuda")
    with profile(tmp_path, wait=0, active=2) as recording:
        for _ in range(3):
            with torch.profiler.record_function("mlp(F)"):
                data @ data
            torch.cuda.synchronize()
            recording.step()
    [trace] = open_traces(tmp_path)
    assert len(trace.work) >= 2
    assert len(trace.launches) >= 2
    assert "mlp(F)" in annotated(trace)
    assert trace.sms[0] > 0
