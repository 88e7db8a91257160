"""The split of a backward into I and W: what waits, what runs how often, and whose hooks fire when."""

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from counterflow import Action
from counterflow.runtime import Pipeline
from counterflow.runtime.clock import WallClock
from counterflow.schedule import Kind, generate
from runtime.cases import Case, assert_bitwise, block, expected_gradients, gradients_by_rank, ordinary_case
from runtime.flows import FLOWS, Checkpointed, Convolution


class Onlooker(WallClock):
    """Calls ``look`` after each action: the clock is told of every one."""

    def __init__(self, look: Callable[[int, Action], None]) -> None:
        self.look = look

    def ran(self, rank: int, action: Action) -> None:
        self.look(rank, action)


def run(case: Case, look: Callable[[int, Action], None] = lambda rank, action: None) -> Pipeline:
    pipeline = case.in_process(clock=Onlooker(look))
    pipeline.step(case.steps[0].inputs, case.steps[0].targets)
    return pipeline


@contextmanager
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# --- what waits ---------------------------------------------------------------------------------------------


def with_gradient_after(case: Case, rank: int, stage: int) -> dict[Kind, set[str]]:
    """Which parameters of the stage have a gradient after its F, I and W of a first micro-batch."""
    found: dict[Kind, set[str]] = {}

    def look(_: int, action: Action) -> None:
        if action.stage == stage:
            parameters = pipeline.stages[rank][stage].named_parameters()
            found.setdefault(action.kind, {name for name, p in parameters if p.grad is not None})

    pipeline = case.in_process(clock=Onlooker(look))
    pipeline.step(case.steps[0].inputs, case.steps[0].targets)
    return found


ALL = {name for name, _ in block(0).named_parameters()}
LINEARS = {"0.weight", "3.weight"}


@pytest.mark.parametrize(("weight_split", "done_in_i"), [("linear", ALL - LINEARS), ("graph", set())])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_weights_of_linears_wait_for_w_and_on_the_graph_everything_does(
    stage: int, weight_split: str, done_in_i: set[str]
) -> None:
    case = ordinary_case("zb1p", 3, 1, weight_split=weight_split)
    assert with_gradient_after(case, stage, stage) == {Kind.F: set(), Kind.I: done_in_i, Kind.W: ALL}


def test_an_embedding_is_done_in_i_and_the_linears_behind_it_in_w() -> None:
    found = with_gradient_after(FLOWS["token ids"].case(generate("zb1p", 3, 1)), 0, 0)
    assert found[Kind.I] >= {"0.weight"}
    assert found[Kind.W] - found[Kind.I] == {"1.weight", "4.weight"}


@pytest.mark.parametrize(
    ("weight_split", "share"), [("linear", 2 * 8 * 16 / (2 * 8 * 16 + 16 + 8 + 32)), ("graph", 1.0)]
)
def test_deferred_weights_says_how_much_of_a_stage_waited(weight_split: str, share: float) -> None:
    case = ordinary_case("zb1p", 2, 2, weight_split=weight_split)
    pipeline = case.in_process()
    assert pipeline.deferred_weights() == {}
    pipeline.step(case.steps[0].inputs, case.steps[0].targets)
    assert pipeline.deferred_weights() == {0: share, 1: share}


def test_token_ids_and_inputs_without_gradient_keep_no_weight_of_the_first_stage_from_waiting() -> None:
    for name in ("token ids", "a custom Function"):
        pipeline = run(FLOWS[name].case(generate("zb1p", 3, 4)))
        assert pipeline.deferred_weights()[0] > 0.5


def test_a_schedule_without_w_defers_nothing() -> None:
    assert run(ordinary_case("1f1b", 2, 2)).deferred_weights() == {}


def test_a_stage_whose_weights_cannot_wait_is_warned_about() -> None:
    case = FLOWS["convolutions"].case(generate("zb1p", 1, 1))
    sentence = (
        "stage 0: no weight gradient could be left for W, because none of its weights goes through "
        'torch.nn.functional.linear; I does all the work: try weight_split="graph"'
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(sentence)}$"):
        pipeline = run(case)
    assert pipeline.deferred_weights() == {0: 0.0}


def test_nobody_is_warned_of_what_is_frozen_or_what_the_graph_defers() -> None:
    schedule = generate("zb1p", 1, 1)
    with no_warning():
        assert run(FLOWS["convolutions"].case(schedule, "graph")).deferred_weights() == {0: 1.0}

        def half_frozen(stage: int) -> nn.Module:
            return nn.Sequential(Convolution(stage).requires_grad_(False), nn.LayerNorm(8).double())

        run(Case(schedule, ordinary_case("zb1p", 1, 1).steps, half_frozen))


def test_the_function_for_linear_is_there_again_after_a_step_and_after_a_broken_one() -> None:
    original = F.linear
    case = ordinary_case("zb1p", 2, 2)
    pipeline = run(case)
    assert F.linear is original
    with pytest.raises(RuntimeError):
        pipeline.step([torch.ones(2, 7)] * 2, case.steps[0].targets)
    assert F.linear is original


# --- how often it runs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_stage_runs_its_blocks_once_more_in_i_and_never_in_w(reentrant: bool) -> None:
    stage = Checkpointed(1, reentrant=reentrant, num_blocks=4)
    case = Case(
        generate("zb1p", 2, 3), ordinary_case("zb1p", 2, 3).steps, lambda index: stage if index else block(index)
    )
    runs = {}
    seen = 0

    def look(rank: int, action: Action) -> None:
        nonlocal seen
        if action.stage == 1:
            runs[str(action)], seen = stage.runs - seen, stage.runs

    pipeline = run(case, look)
    assert runs == {f"1{kind}{m}": count for kind, count in (("F", 4), ("I", 4), ("W", 0)) for m in range(3)}
    assert pipeline.deferred_weights()[1] > 0.8
    fresh = Case(
        case.schedule, case.steps, lambda i: Checkpointed(1, reentrant=reentrant, num_blocks=4) if i else block(i)
    )
    assert_bitwise(gradients_by_rank(pipeline), expected_gradients(fresh))


def test_a_custom_function_runs_its_backward_once() -> None:
    calls = Counter[str]()

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            calls[current] += 1
            return grad * 2

    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = block(0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Counted.apply(self.inner(x))

    current = "I"

    def look(rank: int, action: Action) -> None:
        nonlocal current
        current = "W" if action.kind is Kind.I else "I"

    run(Case(generate("zb1p", 1, 2), ordinary_case("zb1p", 1, 2).steps, lambda _: Stage()), look)
    assert calls == {"I": 2}


# --- hooks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_split", ["linear", "graph"])
@pytest.mark.parametrize("size", [("1f1b", 2, 4), ("zb1p", 2, 4), ("dualpipe", 2, 4), ("dualpipev", 1, 4)])
def test_hooks_fire_once_for_each_micro_batch(size: tuple[str, int, int], weight_split: str) -> None:
    case = ordinary_case(*size, weight_split=weight_split)
    after, before = Counter[tuple[int, int, str]](), Counter[tuple[int, int, str]]()
    pipeline = case.in_process()
    for rank, modules in pipeline.stages.items():
        for stage, module in modules.items():
            for name, parameter in module.named_parameters():
                key = rank, stage, name
                parameter.register_post_accumulate_grad_hook(lambda _, key=key: after.update([key]))
                parameter.register_hook(lambda _, key=key: before.update([key]))
    pipeline.step(case.steps[0].inputs, case.steps[0].targets)
    rows = case.schedule.rows
    for rank, stage, name in after | before:
        count = sum(part.kind is Kind.F and part.stage == stage for action in rows[rank] for part in action.parts)
        assert after[rank, stage, name] == before[rank, stage, name] == count
    assert len(after) == len(list(pipeline.parameters()))


def test_those_of_a_linear_fire_in_w_and_those_of_its_bias_in_i() -> None:
    stage = block(0)
    fired: list[str] = []
    log: list[tuple[str, list[str]]] = []
    for name, parameter in stage.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: fired.append(name))

    def look(rank: int, action: Action) -> None:
        log.append((str(action), sorted(fired)))
        fired.clear()

    case = ordinary_case("zb1p", 1, 2)
    pipeline = Pipeline.in_process(case.schedule, [{0: stage}], case.loss_fn, clock=Onlooker(look))
    pipeline.step(case.steps[0].inputs, case.steps[0].targets)
    others = ["0.bias", "2.bias", "2.weight", "3.bias"]
    assert log == [
        (f"0{kind}{m}", names)
        for m in range(2)
        for kind, names in (("F", []), ("I", others), ("W", ["0.weight", "3.weight"]))
    ]


def test_a_hook_may_change_the_gradient_and_does_so_once() -> None:
    def hooked(index: int) -> nn.Module:
        stage = block(index)
        for parameter in stage.parameters():
            parameter.register_hook(lambda grad: grad * 3)
        return stage

    for weight_split in ("linear", "graph"):
        case = Case(generate("zb1p", 2, 3), ordinary_case("zb1p", 2, 3).steps, hooked, weight_split=weight_split)
        assert_bitwise(gradients_by_rank(run(case)), expected_gradients(case))


# --- around the step ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_split", ["linear", "graph"])
@pytest.mark.parametrize("size", [("1f1b", 2, 3), ("zb1p", 2, 3), ("dualpipev", 1, 3)])
def test_autocast_may_stand_around_the_whole_step(size: tuple[str, int, int], weight_split: str) -> None:
    case = Case(
        generate(*size),
        ordinary_case(*size).steps,
        lambda index: block(index).float(),
        lambda output, target: F.mse_loss(output.float(), target.float()),
        weight_split,
    )
    inputs = [x.float() for x in case.steps[0].inputs]
    pipeline = case.in_process()
    stages = [case.make(stage) for stage in range(case.schedule.num_stages)]
    with torch.autocast("cpu", torch.bfloat16):
        result = pipeline.step(inputs, case.steps[0].targets, outputs=True)
    for m, x in enumerate(inputs):
        with torch.autocast("cpu", torch.bfloat16):
            for stage in stages:
                x = stage(x)
            case.loss_fn(x, case.steps[0].targets[m]).backward()
        assert result.outputs[m].dtype == torch.bfloat16
        assert torch.equal(result.outputs[m], x)
    expected = {index: {n: p.grad for n, p in stage.named_parameters()} for index, stage in enumerate(stages)}
    assert_bitwise(gradients_by_rank(pipeline), expected)


def test_autocast_leaves_double_precision_alone_as_it_does_without_a_pipeline() -> None:
    case = ordinary_case("zb1p", 2, 2)
    pipeline = case.in_process()
    with torch.autocast("cpu", torch.bfloat16):
        pipeline.step(case.steps[0].inputs, case.steps[0].targets)
    assert_bitwise(gradients_by_rank(pipeline), expected_gradients(case))


def test_a_caller_without_gradients_still_trains() -> None:
    case = ordinary_case("zb1p", 2, 2)
    pipeline = case.in_process()
    with torch.no_grad():
        pipeline.step(case.steps[0].inputs, case.steps[0].targets)
    assert_bitwise(gradients_by_rank(pipeline), expected_gradients(case))
