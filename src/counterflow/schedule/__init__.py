"""Which schedule? Actions, schedules, their generators, their transfers, and the check that they run."""

from counterflow.schedule.action import Action, Kind
from counterflow.schedule.check import check, check_transfers
from counterflow.schedule.formats import (
    as_dict,
    from_csv,
    from_json,
    from_text,
    read_schedule,
    to_csv,
    to_json,
    to_text,
)
from counterflow.schedule.generators import (
    GENERATORS,
    dualpipe,
    dualpipev,
    generate,
    gpipe,
    one_f_one_b,
    zb1p,
)
from counterflow.schedule.schedule import Schedule
from counterflow.schedule.transfers import Payload, Post, Run, Transfer, Transfers, Wait, lower

__all__ = [
    "GENERATORS",
    "Action",
    "Kind",
    "Payload",
    "Post",
    "Run",
    "Schedule",
    "Transfer",
    "Transfers",
    "Wait",
    "as_dict",
    "check",
    "check_transfers",
    "dualpipe",
    "dualpipev",
    "from_csv",
    "from_json",
    "from_text",
    "generate",
    "gpipe",
    "lower",
    "one_f_one_b",
    "read_schedule",
    "to_csv",
    "to_json",
    "to_text",
    "zb1p",
]
