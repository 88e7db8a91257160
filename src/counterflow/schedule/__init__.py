"""Which schedule? Actions, schedules, their generators, their transfers, and the check that they run."""

from counterflow.schedule.action import Action, Kind
from counterflow.schedule.activations import held_activations
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
    STAGES_PER_RANK,
    dualpipe,
    dualpipev,
    generate,
    gpipe,
    interleaved_1f1b,
    one_f_one_b,
    v_half,
    v_min,
    zb1p,
    zb2p,
    zbv,
)
from counterflow.schedule.lowering import lower
from counterflow.schedule.progress import CHANNELS, Channels
from counterflow.schedule.rows import ActionNames, Rows
from counterflow.schedule.schedule import Schedule
from counterflow.schedule.transfers import Payload, Post, Programs, Run, Transfer, Transfers, Wait

__all__ = [
    "CHANNELS",
    "GENERATORS",
    "STAGES_PER_RANK",
    "Action",
    "ActionNames",
    "Channels",
    "Kind",
    "Payload",
    "Post",
    "Programs",
    "Rows",
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
    "held_activations",
    "interleaved_1f1b",
    "lower",
    "one_f_one_b",
    "read_schedule",
    "to_csv",
    "to_json",
    "to_text",
    "v_half",
    "v_min",
    "zb1p",
    "zb2p",
    "zbv",
]
