"""One base error, a child for each room.

Every message is one sentence that says what was given, what is required and how to
fix it, so that the command line can print it as it stands.
"""


class CounterflowError(Exception):
    """The base of every error that counterflow raises on purpose.

    Example:
        >>> from counterflow import CounterflowError, dualpipe
        >>> try:
        ...     dualpipe(7, 20)
        ... except CounterflowError as error:
        ...     print(error)
        dualpipe got 7 ranks; it needs an even number of at least 2: the nearest legal values are 6 and 8
    """


class TimelineError(CounterflowError, ValueError):
    """A timeline, or a file that should hold one, is not usable."""


class ScheduleError(CounterflowError, ValueError):
    """A schedule cannot be made, read, or would not run."""


class PlacementError(CounterflowError, ValueError):
    """Expert loads, or a placement of experts, cannot be used as given."""


class SimulatorError(CounterflowError, ValueError):
    """Costs are missing, malformed, or do not fit the schedule."""


class TraceError(CounterflowError, ValueError):
    """A file holds no trace, a rules file holds no rules, or a trace holds nothing of what was asked for."""


class ReportError(CounterflowError, ValueError):
    """A picture or page cannot be made as asked."""


class ModelError(CounterflowError, ValueError):
    """A model cannot be built as asked, or is given what it cannot take."""


class PipelineError(CounterflowError, RuntimeError):
    """A pipeline was built or called wrongly, or a step failed."""


class PeerError(PipelineError):
    """A rank waited for another one that died, stalled, or left the step."""


class LaunchError(PipelineError):
    """A rank died or stalled: the first line says which one and at what, the next ones what the others were doing."""
