"""Small traces made here, as data and in every formatting, and the real ones where their folder lies beside ours."""

import json
import random
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

Data = dict[str, Any]

REAL = Path(__file__).parents[2] / "shared" / "data" / "traces"


def real_trace(name: str) -> Path:
    """A real trace that is not ours to ship."""
    path = REAL / name
    if not path.exists():
        pytest.skip(f"{name} is not ours to ship, and ../shared/data/traces is not here")
    return path


def kernel(name: str, stream: int, ts: Any, dur: Any, correlation: int = 1, grid: int = 132, **rest: Any) -> Data:
    device = rest.pop("device", 0)
    arguments = {
        "device": device,
        "stream": stream,
        "correlation": correlation,
        "grid": [grid, 1, 1],
        "block": [128, 1, 1],
    }
    return {
        "ph": "X",
        "cat": "kernel",
        "name": name,
        "pid": device,
        "tid": stream,
        "ts": ts,
        "dur": dur,
        "args": arguments,
    } | rest


def launch(ts: Any, correlation: int, thread: int = 9, name: str = "cudaLaunchKernel", dur: Any = 1) -> Data:
    return {
        "ph": "X", "cat": "cuda_runtime", "name": name, "pid": 8, "tid": thread, "ts": ts, "dur": dur,
        "args": {"External id": 4, "correlation": correlation},
    }  # fmt: skip


def annotation(name: str, ts: Any, dur: Any, thread: int = 9) -> Data:
    return {
        "ph": "X",
        "cat": "user_annotation",
        "name": name,
        "pid": 8,
        "tid": thread,
        "ts": ts,
        "dur": dur,
        "args": {},
    }


def flow(correlation: int, ts: Any) -> Data:
    return {"ph": "f", "id": correlation, "pid": 0, "tid": 7, "ts": ts, "cat": "ac2g", "name": "ac2g", "bp": "e"}


def trace(events: list[Data], **beside: Any) -> Data:
    head = {"schemaVersion": 1, "deviceProperties": [{"id": 0, "name": "GPU", "numSms": 132}]}
    return head | {"distributedInfo": {"rank": 3}} | beside | {"traceEvents": events, "traceName": "a.json"}


def layer(at: int, first: int) -> list[Data]:
    """A layer of a Mixture-of-Experts model: what the CPU did, and what the GPU did later."""
    return [
        annotation("dispatch(F)", at, 10),
        launch(at + 2, first),
        annotation("aten::mm", at + 3, 1) | {"cat": "cpu_op", "args": {"Input Dims": [[1], []]}},
        launch(at + 4, first + 50, name="cudaEventRecord"),
        annotation("mlp(B)", at + 11, 9),
        launch(at + 12, first + 1, thread=10),
        launch(at + 14, first + 2, thread=10, name="cudaMemsetAsync"),
        kernel("void deep_ep::internode::dispatch<8>(int4*)", 27, at + 40, 20, first, grid=20),
        flow(first, at + 40),
        kernel("void gemm<{lambda(int)#1}>(float*)", 7, at + 45, 30, first + 1),
        flow(first + 1, at + 45),
        {"name": "thread_name", "ph": "M", "ts": at, "pid": 0, "tid": 7, "args": {"name": "stream 7"}},
        kernel("Memset (Device)", 7, at + 80, 2)
        | {"cat": "gpu_memset", "args": {"bytes": 8, "correlation": first + 2}},
    ]


def sample(layers: int = 3) -> Data:
    return trace([event for number in range(layers) for event in layer(100 * number, 10 * number)])


# --- formattings --------------------------------------------------------------------------------------------


def kineto(data: Data) -> str:
    """As PyTorch writes it: a few keys on each line."""
    beside = {key: value for key, value in data.items() if key != "traceEvents"}
    lines = ",\n".join(f"  {_kineto_event(event)}" for event in data["traceEvents"])
    head = json.dumps(beside, indent=2, default=_number)[:-2]
    return f'{head},\n  "traceEvents": [\n{lines}\n  ]\n}}'


def _kineto_event(event: Data) -> str:
    first = {key: event[key] for key in event if key not in ("ts", "dur", "args")}
    times = {key: event[key] for key in ("ts", "dur") if key in event}
    arguments = json.dumps(event.get("args", {}), default=_number)
    return f'{{\n    {_plain(first)},\n    {_plain(times)},\n    "args": {arguments}\n  }}'


def _plain(data: Data) -> str:
    return json.dumps(data, default=_number)[1:-1].replace('"' + _MARK, "").replace(_MARK + '"', "")


_MARK = "@@"


def _number(value: Any) -> str:
    assert isinstance(value, Decimal)
    return f"{_MARK}{value}{_MARK}"


def compact(data: Data) -> str:
    return json.dumps(data, separators=(",", ":"), default=_number).replace('"' + _MARK, "").replace(_MARK + '"', "")


def indented(data: Data) -> str:
    return json.dumps(data, indent=4, default=_number).replace('"' + _MARK, "").replace(_MARK + '"', "")


def reordered(data: Data, seed: int = 0) -> str:
    """Keys in another order in every event."""
    rng = random.Random(seed)
    events = []
    for event in data["traceEvents"]:
        keys = list(event)
        rng.shuffle(keys)
        events.append({key: event[key] for key in keys})
    return compact(data | {"traceEvents": events})


def mixed(data: Data, seed: int = 0) -> str:
    """The first slice formatted in one way, others in another."""
    rng = random.Random(seed)
    events = [rng.choice([compact, indented])(event) for event in data["traceEvents"]]
    return compact(data | {"traceEvents": []}).replace('"traceEvents":[', '"traceEvents":[' + " ,\n".join(events))


FORMATTINGS = {one.__name__: one for one in (kineto, compact, indented, reordered, mixed)}

# --- any trace ----------------------------------------------------------------------------------------------

times = st.integers(0, 60) | st.integers(0, 60_000).map(lambda ns: Decimal(ns) / 1000)
kernel_names = st.sampled_from(
    [
        "void gemm<{lambda(int)#1}>(float*)",
        'quoted "X" and }, {"ph": "X", "cat": "kernel" \\ end',
        "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "void dpsk::ep::internode::cached_notify<false>(int)",
        "Memcpy DtoD (Device -> Device)",
    ]
) | st.text(max_size=12)


@st.composite
def events(draw: st.DrawFn) -> Data:
    kind = draw(st.sampled_from(["kernel", "kernel", "memcpy", "launch", "launch", "annotation", "flow", "cpu", "odd"]))
    ts, dur, number = draw(times), draw(times), draw(st.integers(0, 5))
    match kind:
        case "kernel":
            return kernel(
                draw(kernel_names), draw(st.sampled_from([7, 20])), ts, dur, number, grid=draw(st.integers(1, 200))
            )
        case "memcpy":
            return kernel("Memcpy HtoD (Pinned -> Device)", 7, ts, dur, number) | {"cat": "gpu_memcpy"}
        case "launch":
            return launch(
                ts,
                number,
                draw(st.sampled_from([9, 10])),
                draw(st.sampled_from(["cudaLaunchKernel", "cudaEventQuery"])),
            )
        case "annotation":
            return annotation(draw(st.sampled_from(["attn(F)", "mlp(B)", "ProfilerStep#1"])), ts, dur)
        case "flow":
            return flow(number, ts)
        case "cpu":
            return annotation("aten::mm", ts, dur) | {"cat": "cpu_op", "args": {"Input type": ["X", {"ph": 1}]}}
    return {"ph": "i", "s": "g", "name": "Record Window End", "pid": "", "tid": "", "ts": ts}


traces = st.builds(
    trace, st.lists(events(), max_size=12), baseTimeNanoseconds=st.sampled_from([0, 1_767_189_312_000_000_000])
)
