"""The chunk engine: forwards and backwards through blocks as programs of steps, issued in the order of a plan.

One thread, two lanes. Compute steps run on the caller's current stream, exchanges on streams of their own. Three rules
make the lanes safe, without ``record_stream``:

1. A step waits for its own program's last transfer, never for the end of a lane: the event that an exchange waits for
   is recorded right behind the step that made the rows.
2. That step also allocates the buffer which the rows will arrive in, before it records the event: so whatever used
   the memory before is done when the exchange writes.
3. What is sent is let go only when the lane that allocated it has waited for the arrival.

What the steps of a forward compute is in ``forward_program``, what those of a backward do in ``backward_program``.
"""

from __future__ import annotations

from operator import methodcaller

from torch import Tensor
from torch.profiler import record_function

from counterflow.runtime.blocks import buffer_for, ready_now
from counterflow.runtime.exchange import Arrival, Exchange, Rows
from counterflow.schedule.chunk_plans import ChunkPlan, Step, Steps


def run(plan: ChunkPlan, *programs: Program, serial: bool = False) -> None:
    """Issue the steps of ``programs``, which are those of ``plan``, in its order.

    With ``serial`` each step is over before the next one is issued, so nothing is hidden; the results are the same.
    """
    assert plan.programs == tuple(program.steps for program in programs), "the plan is for other programs"
    step: Step | None = None
    try:
        for number, place in plan.order:
            program = programs[number]
            step = program.steps[place]
            with record_function(step.name):
                program.issue(place)
            if serial:
                program.wait()
    except BaseException as error:
        error.add_note(f"counterflow: at {step}")
        for program in programs:
            program.abandon()
        raise


class Program:
    """Steps, what each of them does, and the rows that are under way."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps
        # By name: bound methods would be a cycle, and activations would stay until Python looks for those.
        self._do: list[methodcaller] = []
        self._parcel: _Parcel | None = None
        self._arrival: Arrival | None = None

    def issue(self, place: int) -> None:
        """One step, whose needs have been issued."""
        self._do[place](self)

    def wait(self) -> None:
        """For the rows under way, if any; what was sent can go then."""
        if self._arrival is not None:
            assert self._parcel is not None
            self._arrival.wait()
            self._arrival = self._parcel.source = None

    def abandon(self) -> None:
        """After an error: nothing may get the memory of rows that a GPU still moves. Peers are not waited for."""
        if self._arrival is not None and self._parcel is not None and self._parcel.ready is not None:
            self._arrival.wait()
        self._arrival = self._parcel = None

    def _pack(self, source: Tensor, exchange: Exchange, rows: Rows) -> None:
        """The end of a compute step: these rows are ready to be sent."""
        self._parcel = _Parcel(source, exchange, rows)

    def _send(self) -> None:
        """The step of every transfer: what the step before has made ready goes off."""
        if self._parcel is not None:
            self._arrival = self._parcel.start()

    def _land(self) -> Tensor | None:
        """The begin of a compute step: the rows that came, None where none were sent."""
        self.wait()
        parcel, self._parcel = self._parcel, None
        return None if parcel is None else parcel.target


class _Parcel:
    """Rows to be sent, with the room for what arrives and the moment from which on both are ready."""

    def __init__(self, source: Tensor, exchange: Exchange, rows: Rows) -> None:
        self.source: Tensor | None = source.contiguous()
        self._exchange, self._rows = exchange, rows
        self.target = buffer_for(self.source, rows)
        self.ready = ready_now(self.source)

    def start(self) -> Arrival:
        """Off they go."""
        assert self.source is not None
        return self._exchange.start(self.source, self.target, self._rows, self.ready)
