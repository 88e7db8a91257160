"""Low-latency transfers fly between their send and their receive kernel, and compute hides them meanwhile."""

from pathlib import Path

import pytest

from counterflow import open_trace
from counterflow.trace import Exposure, exposures
from counterflow.trace.flights import role_of
from traces import annotation, compact, kernel, launch, trace

DISPATCH = "void deep_ep::internode_ll::dispatch<true, 3, 10, 7168>(void*, float*)"
COMBINE = "void dpsk::ep::internode_ll::combine<3, 10, 7168, 9>(void*, void*)"
GEMM = "void gemm<1>(float*)"


def measured(folder: Path, events: list) -> Exposure:
    path = folder / "trace.json"
    path.write_text(compact(trace(events)))
    [gpu] = exposures(open_trace(path))
    return gpu


def decode(layers: int, graph: bool, period: int = 500) -> list:
    """Send, compute, receive, on one stream: dispatch flies under 100 µs of compute, combine under 60 and a pause."""
    steps = [
        (DISPATCH, 0, 10),
        (GEMM, 10, 100),
        (DISPATCH, 112, 8),
        (GEMM, 120, 50),
        (COMBINE, 170, 12),
        (GEMM, 182, 60),
    ]
    steps.append((COMBINE, 282, 9))
    events = [launch(0, 1, name="cudaGraphLaunch")] if graph else []
    for layer in range(layers):
        for number, (name, at, us) in enumerate(steps):
            correlation = 1 if graph else 10 * layer + number + 1
            events += [] if graph else [launch(layer * period + at, correlation)]
            events.append(kernel(name, 7, 1_000 + layer * period + at, us, correlation))
    return events


@pytest.mark.parametrize("graph", [True, False], ids=["one graph launch", "launched one by one"])
def test_a_send_and_its_receive_are_joined(tmp_path: Path, graph: bool) -> None:
    gpu = measured(tmp_path, decode(3, graph))
    found = [(f.name, f.count, f.flight_us, f.hidden_us, f.exposed_us) for f in gpu.flights]
    assert found == [("dispatch", 3, 3 * 102, 3 * 100, 3 * 2), ("combine", 3, 3 * 100, 3 * 60, 3 * 40)]
    assert (gpu.flights_us, gpu.hidden_flights_us, gpu.exposed_flights_us) == (606, 480, 126)
    assert gpu.communication_us == gpu.exposed_us == 3 * 39, "kernels are counted as ever"


def test_a_kernel_that_sends_and_receives_at_once_flies_not(tmp_path: Path) -> None:
    names = [DISPATCH, GEMM, COMBINE, GEMM] * 3
    gpu = measured(tmp_path, [kernel(name, 7, 20 * n, 15, n) for n, name in enumerate(names)])
    assert (gpu.flights, gpu.flights_us) == ((), 0)


def test_a_receive_whose_send_was_cut_off_is_left_alone(tmp_path: Path) -> None:
    gpu = measured(tmp_path, decode(2, graph=True)[3:])
    assert [(flight.name, flight.count) for flight in gpu.flights] == [("combine", 2), ("dispatch", 1)]


def test_streams_and_graph_launches_are_not_mixed(tmp_path: Path) -> None:
    two_graphs = [
        launch(0, 1, name="cudaGraphLaunch"), launch(5, 2, name="cudaGraphLaunch"),
        kernel(GEMM, 7, 10, 5, 1), kernel(DISPATCH, 7, 20, 5, 1),
        kernel(DISPATCH, 7, 50, 5, 2), kernel(GEMM, 7, 60, 5, 2),
    ]  # fmt: skip
    assert measured(tmp_path, two_graphs).flights == ()
    assert measured(tmp_path, [kernel(DISPATCH, 7, 0, 5), kernel(DISPATCH, 8, 50, 5)]).flights == ()


def test_kernels_named_by_what_they_do_go_together_whatever_is_between(tmp_path: Path) -> None:
    send, receive = ("a2a_dispatch_send_kernel<8>(int)", "a2a_dispatch_recv_kernel<8>(int)")
    rules = [kernel(send, 7, 0, 5), kernel(COMBINE, 7, 10, 5), kernel(GEMM, 7, 20, 5), kernel(receive, 7, 30, 5)]
    [flight] = measured(tmp_path, rules).flights
    assert (flight.flight_us, flight.hidden_us) == (25, 5), "the combine alone is no flight of its own"
    assert role_of("void deep_ep::intranode::dispatch<8>(int)") is None
    assert role_of("void at::native::dispatch_kernel(int)") is None


def test_flights_are_cut_to_the_window(tmp_path: Path) -> None:
    events = [
        annotation("half", 0, 10), launch(1, 1), launch(2, 2), launch(20, 3),
        kernel(DISPATCH, 7, 30, 10, 1), kernel(GEMM, 7, 45, 15, 2), kernel(DISPATCH, 7, 80, 10, 3),
    ]  # fmt: skip
    path = tmp_path / "trace.json"
    path.write_text(compact(trace(events)))
    [gpu] = exposures(open_trace(path), within="half")
    assert (gpu.flights_us, gpu.hidden_flights_us) == (20, 15)
