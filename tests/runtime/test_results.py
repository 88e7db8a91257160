"""What a step gives back: losses, outputs, evaluation, timelines and named ranges; and how bad calls are refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from counterflow import CounterflowError, Schedule
from counterflow.errors import PipelineError
from counterflow.runtime import Pipeline
from counterflow.schedule import GENERATORS, generate
from counterflow.timeline import TWINS_OF
from runtime.cases import (
    Case,
    Step,
    assert_bitwise,
    block,
    expected_gradients,
    gradients_by_rank,
    ordinary_case,
    ordinary_step,
    plain_losses,
    plain_outputs,
)
from runtime.processes import run_ranks

SIZES = [
    *(("gpipe", 3, 4), ("1f1b", 3, 2), ("interleaved-1f1b", 3, 3), ("interleaved-1f1b-overlap", 2, 4), ("zb1p", 3, 4)),
    *(("zb2p", 3, 4), ("zbv", 2, 3), ("v-half", 3, 4), ("v-min", 2, 5), ("dualpipe", 4, 8), ("dualpipev", 2, 5)),
]


# --- losses and outputs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_losses_are_there_and_outputs_if_asked_for(size: tuple[str, int, int]) -> None:
    case = ordinary_case(*size)
    data = case.steps[0]
    pipeline = case.in_process()
    quiet = pipeline.step(data.inputs, data.targets)
    full = pipeline.step(data.inputs, data.targets, outputs=True)
    assert quiet.outputs == {}
    assert quiet.losses == full.losses == plain_losses(case)[0]
    assert list(full.losses) == list(full.outputs) == list(range(case.schedule.num_microbatches))
    assert all(torch.equal(full.outputs[m], output) for m, output in enumerate(plain_outputs(case)))
    assert not any(tensor.requires_grad for tensor in (*full.losses.values(), *full.outputs.values()))


def test_outputs_keep_their_structure() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = block(1)

        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"logits": [self.inner(x)], "count": 3, "nothing": None}

    case = Case(
        generate("zb1p", 2, 2),
        [ordinary_step(2)],
        lambda stage: Last() if stage else block(0),
        lambda output, target: nn.functional.mse_loss(output["logits"][0], target),
    )
    pipeline = case.in_process()
    output = pipeline.step(case.steps[0].inputs, case.steps[0].targets, outputs=True).outputs[1]
    assert (output["count"], output["nothing"]) == (3, None)
    assert torch.equal(output["logits"][0], plain_outputs(case)[1]["logits"][0])


class WithLoss(nn.Module):
    """A last stage that returns the loss."""

    def __init__(self, stage: int) -> None:
        super().__init__()
        self.inner = block(stage)

    def forward(self, x: Tensor) -> Tensor:
        return (self.inner(x) ** 2).mean()


def test_without_a_loss_function_the_last_stage_returns_the_loss_and_targets_are_not_needed() -> None:
    schedule, data = generate("zb1p", 2, 3), ordinary_step(3)
    pipeline = Pipeline.in_process(schedule, [{0: block(0)}, {1: WithLoss(1)}])
    result = pipeline.step(data.inputs)
    plain = nn.Sequential(block(0), WithLoss(1))
    for m, x in enumerate(data.inputs):
        loss = plain(x)
        loss.backward()
        assert torch.equal(result.losses[m], loss.detach())
    found = [p.grad for p in pipeline.parameters()]
    assert all(torch.equal(one, other.grad) for one, other in zip(found, plain.parameters(), strict=True))
    assert pipeline.evaluate(data.inputs).losses == result.losses


# --- evaluation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [("gpipe", 2, 3), *SIZES])
def test_evaluation_and_training_may_alternate_as_they_like(size: tuple[str, int, int]) -> None:
    case = ordinary_case(*size, num_steps=2)
    pipeline = case.in_process()
    first, second = case.steps

    def evaluated() -> None:
        before = [None if p.grad is None else p.grad.clone() for p in pipeline.parameters()]
        losses = [pipeline.evaluate(data.inputs, data.targets).losses for data in case.steps]
        assert losses == plain_losses(case)
        for parameter, gradient in zip(pipeline.parameters(), before, strict=True):
            assert (parameter.grad is None) if gradient is None else torch.equal(parameter.grad, gradient)

    evaluated()
    pipeline.step(first.inputs, first.targets)
    evaluated()
    evaluated()
    pipeline.step(second.inputs, second.targets)
    evaluated()
    assert_bitwise(gradients_by_rank(pipeline), expected_gradients(case))


def test_evaluation_runs_in_eval_mode_without_gradients_and_leaves_every_flag_as_it_was() -> None:
    seen = []

    class Stage(nn.Module):
        def __init__(self, stage: int) -> None:
            super().__init__()
            self.inner, self.drop, self.still = block(stage), nn.Dropout(0.5), nn.Dropout(0.5).eval()

        def forward(self, x: Tensor) -> Tensor:
            seen.append((self.training, self.drop.training, self.still.training, torch.is_grad_enabled()))
            return self.drop(self.inner(x))

    case = ordinary_case("zb1p", 2, 2, make=Stage)
    data = case.steps[0]
    pipeline = case.in_process()
    flags = [module.training for module in pipeline.modules()]
    for call, expected in (
        (pipeline.evaluate, (False, False, False, False)),
        (pipeline.step, (True, True, False, True)),
        (pipeline.evaluate, (False, False, False, False)),
    ):
        seen.clear()
        call(data.inputs, data.targets)
        assert seen == [expected] * 4
        assert [module.training for module in pipeline.modules()] == flags
    with pytest.raises(RuntimeError):
        pipeline.evaluate([torch.ones(2, 7)] * 2)
    assert [module.training for module in pipeline.modules()] == flags


def test_evaluation_needs_no_targets_and_gives_the_losses_of_those_there_are() -> None:
    case = ordinary_case("1f1b", 2, 3)
    pipeline = case.in_process()
    inputs, targets = case.steps[0].inputs, case.steps[0].targets
    result = pipeline.evaluate(inputs, {1: targets[1]}, outputs=True)
    assert result.losses == {1: plain_losses(case)[0][1]}
    assert sorted(result.outputs) == [0, 1, 2]
    assert pipeline.evaluate(inputs).losses == {}


def test_a_model_without_loss_is_evaluated_for_its_outputs() -> None:
    class Tagged(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, str]:
            return x, "tag"

    schedule = generate("1f1b", 2, 2).forward_only()
    pipeline = Pipeline.in_process(schedule, [{0: block(0)}, {1: Tagged()}])
    inputs = ordinary_step(2).inputs
    result = pipeline.evaluate(inputs, outputs=True)
    assert result.losses == {}
    assert [output[1] for output in result.outputs.values()] == ["tag", "tag"]
    assert torch.equal(result.outputs[0][0], block(0)(inputs[0]))
    with pytest.raises(PipelineError, match="has mode 'forward' and cannot train; use evaluate"):
        pipeline.step(inputs)


def test_freezing_and_thawing_between_steps_is_noticed() -> None:
    case = ordinary_case("zb1p", 3, 4, num_steps=2)
    pipeline = case.in_process()
    for frozen in ({0}, set(), {0, 1}, {1}):
        for modules in pipeline.stages.values():
            for stage, module in modules.items():
                module.requires_grad_(stage not in frozen)
        for parameter in pipeline.parameters():
            parameter.grad = None
        pipeline.step(case.steps[0].inputs, case.steps[0].targets)

        def make(stage: int, frozen: set[int] = frozen) -> nn.Module:
            return block(stage).requires_grad_(stage not in frozen)

        assert_bitwise(gradients_by_rank(pipeline), expected_gradients(Case(case.schedule, case.steps[:1], make)))


# --- time and names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_every_action_stands_in_the_profile_under_its_own_text_and_in_order(
    size: tuple[str, int, int], tmp_path: Path
) -> None:
    case = ordinary_case(*size)
    pipeline = case.in_process()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        pipeline.step(case.steps[0].inputs, case.steps[0].targets)
    # The trace, for in the list of events torch takes 2F0 for the mangled name of an F0.
    recorded.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    ranges = sorted((e for e in events if e.get("cat") == "user_annotation"), key=lambda event: event["ts"])
    for row in case.schedule.rows:
        texts = [str(action) for action in row]
        assert [event["name"] for event in ranges if event["name"] in texts] == texts


def test_the_timeline_is_that_of_the_last_step_of_either_kind() -> None:
    case = ordinary_case("dualpipe", 2, 4)
    data = case.steps[0]
    pipeline = case.in_process()
    assert len(pipeline.timeline) == 0
    for call, schedule in (
        (pipeline.step, case.schedule),
        (pipeline.evaluate, case.schedule.forward_only()),
        (pipeline.step, case.schedule),
    ):
        call(data.inputs, data.targets)
        assert pipeline.gather_timeline() == pipeline.timeline
        sums = [TWINS_OF.format(stage) for stage in (0, 1)] if schedule.mode == "train" else []
        rows = [[str(action) for action in row] + sums for row in schedule.rows]
        assert names_by_rank(pipeline.timeline, 2) == rows


def names_by_rank(timeline: Any, num_ranks: int) -> list[list[str]]:
    return [[span.name for span in timeline if span.rank == rank] for rank in range(num_ranks)]


# --- bad calls ----------------------------------------------------------------------------------------------


def two_stages(**more: Any) -> Pipeline:
    return ordinary_case("1f1b", 2, 3).in_process(**more)


DATA = ordinary_step(3)
NEEDS_SCALAR = (
    "; training needs a scalar tensor that depends on the parameters: return one from loss_fn, or from the last stage "
    "if there is no loss_fn"
)


def with_loss(loss_fn: Any) -> Pipeline:
    return Pipeline.in_process(generate("1f1b", 1, 3), [{0: block(0)}], loss_fn)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: two_stages().step(torch.ones(3, 8), DATA.targets),
            "inputs got a Tensor; give a list with one entry for each of 3 micro-batches, such as batch.chunk(3), or "
            "map micro-batches to entries",
        ),
        (
            lambda: two_stages().step([*DATA.inputs, DATA.inputs[0]], DATA.targets),
            "inputs got 4 entries; give a list with one entry for each of 3 micro-batches, such as batch.chunk(3), or "
            "map micro-batches to entries",
        ),
        (
            lambda: two_stages().evaluate(DATA.inputs, 3),
            "targets got a int; give a list with one entry for each of 3 micro-batches, such as batch.chunk(3), or "
            "map micro-batches to entries",
        ),
        (
            lambda: two_stages().step(None, DATA.targets),
            "rank 0 got no inputs for micro-batches 0, 1, 2, which start there; give one entry for each",
        ),
        (
            lambda: two_stages().step({0: DATA.inputs[0], 2: DATA.inputs[2]}, DATA.targets),
            "rank 0 got no inputs for micro-batches 1, which start there; give one entry for each",
        ),
        (
            lambda: two_stages().step(DATA.inputs, DATA.targets[:2]),
            "rank 1 got no targets for micro-batches 2, which end there; give one entry for each",
        ),
        (
            lambda: with_loss(lambda output, target: output).step(DATA.inputs, DATA.targets),
            f"the loss of micro-batch 0 is a tensor of shape [3, 5, 8]{NEEDS_SCALAR}",
        ),
        (
            lambda: with_loss(lambda output, target: 1.0).step(DATA.inputs, DATA.targets),
            f"the loss of micro-batch 0 is a float{NEEDS_SCALAR}",
        ),
        (
            lambda: with_loss(lambda output, target: target.sum()).step(DATA.inputs, DATA.targets),
            f"the loss of micro-batch 0 is a tensor of shape [] without gradient{NEEDS_SCALAR}",
        ),
        (
            lambda: with_loss(None).step(DATA.inputs),
            f"the loss of micro-batch 0 is a tensor of shape [3, 5, 8]{NEEDS_SCALAR}",
        ),
        (
            lambda: with_loss(lambda output, target: output).evaluate(DATA.inputs, DATA.targets),
            "the loss of micro-batch 0 is a tensor of shape [3, 5, 8] without gradient; return a scalar tensor from "
            "loss_fn",
        ),
        (
            lambda: Pipeline.in_process(generate("1f1b", 2, 3), [{0: block(0)}], None),
            "stages got 1 entries; give one for each of 2 ranks",
        ),
        (
            lambda: Pipeline.in_process(generate("1f1b", 2, 3), [{0: block(0)}, {0: block(0), 1: block(1)}], None),
            "rank 1 got stages [0, 1] and holds [1] under 1f1b; build {stage: module for stage in "
            "schedule.stages_of(rank)}",
        ),
        (
            lambda: Pipeline.in_process(generate("1f1b", 1, 3), [[block(0)]]),
            "rank 0 got a list and holds [0] under 1f1b; build {stage: module for stage in schedule.stages_of(rank)}",
        ),
        (
            lambda: Pipeline.in_process(generate("1f1b", 1, 3), [{0: torch.tanh}]),
            "stage 0 of rank 0 is a builtin_function_or_method; give an nn.Module",
        ),
        (
            lambda: two_stages(weight_split="neither"),
            "weight_split is 'neither'; it can be 'linear' or 'graph'",
        ),
        (
            lambda: Pipeline(generate("1f1b", 2, 3), {0: block(0)}),
            "a pipeline of several processes needs a process group: start them with torchrun and call "
            "torch.distributed.init_process_group first, or use Pipeline.in_process",
        ),
    ],
)
def test_a_bad_call_is_refused_in_one_sentence(call: Any, sentence: str) -> None:
    with pytest.raises(PipelineError) as caught:
        call()
    assert str(caught.value) == sentence
    assert isinstance(caught.value, CounterflowError)


def test_stages_of_another_rank_are_refused_before_any_other_rank_is_waited_for() -> None:
    """And before their device is asked for, which stages that are not there do not have."""
    made = []
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(PipelineError, match=r"rank 0 got stages \[\] and holds \[0\] under 1f1b; build"):
            Pipeline(generate("1f1b", 1, 3), {}, transport=lambda *_: made.append("communicators"))  # type: ignore[arg-type]
    finally:
        dist.destroy_process_group()
    assert made == []


def test_stages_where_the_process_group_carries_nothing_are_refused() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(PipelineError) as caught:
            Pipeline(generate("1f1b", 1, 3), {0: block(0).to("meta")})
    finally:
        dist.destroy_process_group()
    assert str(caught.value) == "rank 0 has tensors on meta, which gloo does not carry; use an NCCL group"


def test_a_schedule_that_would_not_run_is_refused() -> None:
    rows = generate("1f1b", 2, 3).rows
    with pytest.raises(CounterflowError, match="stands before its forward"):
        Pipeline.in_process(Schedule((rows[0][::-1], rows[1]), 2, 3), [{0: block(0)}, {1: block(1)}])


def test_what_a_stage_passes_on_may_not_change_by_itself() -> None:
    class Counting(nn.Module):
        count = 0

        def forward(self, x: Tensor) -> tuple[Tensor, int]:
            self.count += 1
            return x, self.count

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = block(1)

        def forward(self, x: Tensor, _: int) -> Tensor:
            return self.inner(x)

    pipeline = Pipeline.in_process(generate("1f1b", 2, 3), [{0: Counting()}, {1: Last()}], nn.functional.mse_loss)
    pipeline.step(DATA.inputs, DATA.targets)
    with pytest.raises(PipelineError) as caught:
        pipeline.step(DATA.inputs, DATA.targets)
    assert str(caught.value) == (
        "stage 0 passed on (float64[3, 5, 8], 4) for micro-batch 0, and (float64[3, 5, 8], 1) before; what a stage "
        "passes on may change only with the shapes of the pipeline's inputs or with the parameters that are frozen"
    )


class Choosy(nn.Module):
    """Raises where there is no number."""

    def __init__(self, stage: int) -> None:
        super().__init__()
        self.inner = block(stage)

    def forward(self, x: Tensor) -> Tensor:
        if x.isnan().any():
            raise ZeroDivisionError("no")
        return self.inner(x)


@pytest.mark.parametrize("size", SIZES)
def test_within_one_process_a_broken_step_leaves_nothing_behind(size: tuple[str, int, int]) -> None:
    schedule = generate(*size)
    last = schedule.num_stages - 1
    steps = [ordinary_step(schedule.num_microbatches, seed) for seed in range(3)]
    case = Case(schedule, steps, lambda stage: Choosy(stage) if stage == last else block(stage))
    pipeline = case.in_process()
    good, bad, next_one = steps
    bad = Step([x * torch.nan if m == 1 else x for m, x in enumerate(bad.inputs)], bad.targets)
    pipeline.step(good.inputs, good.targets)
    before = {parameter: parameter.grad.clone() for parameter in pipeline.parameters()}
    with pytest.raises(ZeroDivisionError) as caught:
        pipeline.step(bad.inputs, bad.targets)
    (note,) = caught.value.__notes__
    assert re.fullmatch(rf"counterflow: rank \d, at \(?{last}F1\b.*", note)
    # What other stages had accumulated by then stays, as without a pipeline; twins have it apart until its end.
    for stage, ranks in schedule.twins.items():
        for rank in ranks:
            assert all(torch.equal(p.grad, before[p]) for p in pipeline.stages[rank][stage].parameters())
    for parameter, gradient in before.items():
        parameter.grad = gradient
    pipeline.step(next_one.inputs, next_one.targets)
    wanted = expected_gradients(Case(schedule, [good, next_one], case.make))
    assert_bitwise(gradients_by_rank(pipeline), wanted)


def test_a_refused_call_leaves_the_gradients_of_twins_alone() -> None:
    case = ordinary_case("dualpipe", 2, 4, num_steps=2)
    pipeline = case.in_process()
    for data in case.steps:
        pipeline.step(data.inputs, data.targets)
        with pytest.raises(PipelineError):
            pipeline.step(data.inputs[:2], data.targets)
        with pytest.raises(PipelineError):
            pipeline.evaluate(data.inputs[:2], data.targets)
    assert_bitwise(gradients_by_rank(pipeline), expected_gradients(case))


def test_every_generator_is_in_these_tests() -> None:
    assert {name for name, _, _ in SIZES} == set(GENERATORS)


# --- bad calls between processes ----------------------------------------------------------------------------


def test_ranks_that_disagree_say_so(tmp_path: Path) -> None:
    run_ranks("disagree", 2, tmp_path)
    said = [json.loads((tmp_path / f"rank-{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
    other_schedule = "rank {} has another schedule than rank {}; give all ranks the same"
    other_call = "rank {} called {} while rank {} called {}; all ranks make the same calls in the same order"
    other_shapes = (
        "stage 0 has other parameters or buffers on rank 0 than on rank 1; its copies need the same shapes and dtypes "
        "in the same order: build them by the same code"
    )
    broken = (
        "this pipeline broke in an earlier step (rank 1 called evaluate while rank 0 called step; all ranks make the "
        "same calls in the same order); build a new one"
    )
    assert said[0] == {
        "schedules": other_schedule.format(1, 0),
        "calls": other_call.format(1, "evaluate", 0, "step"),
        "the next call": broken,
        "gathering": other_call.format(1, "step", 0, "gather_timeline"),
        "twins": other_shapes,
        "ranks": "the process group has 2 ranks and the schedule 3; make one for the other",
    }
    assert said[1] == {
        "schedules": other_schedule.format(0, 1),
        "calls": other_call.format(0, "step", 1, "evaluate"),
        "the next call": broken.replace(
            "rank 1 called evaluate while rank 0 called step", "rank 0 called step while rank 1 called evaluate"
        ),
        "gathering": other_call.format(0, "gather_timeline", 1, "step"),
        "twins": other_shapes,
        "ranks": "the process group has 2 ranks and the schedule 3; make one for the other",
    }


def test_steps_differ_in_what_they_send_only_while_shapes_are_learned() -> None:
    data = ordinary_step(4)
    pipeline = ordinary_case("1f1b", 2, 4).in_process()
    sent: list[str] = []
    send = pipeline._transport.send
    pipeline._transport.send = lambda message, tensors: (sent.append(message.lane.name), send(message, tensors))[1]
    counts = []
    for step in (data, data, Step([x[:2] for x in data.inputs], [y[:2] for y in data.targets]), data):
        sent.clear()
        pipeline.step(step.inputs, step.targets)
        counts.append((sent.count("HEADER"), sent.count("PIPELINE")))
    assert counts == [(8, 8), (0, 8), (8, 8), (8, 8)]
