"""A vote of all ranks that those who are left understand alike, whichever of them dies or stalls meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from counterflow.errors import PeerError
from counterflow.runtime.transport import Handle, Lane, Message, ProcessGroupTransport

SILENT, YES, NO = 0, 1, 2


def vote(transport: ProcessGroupTransport, yes: bool) -> tuple[list[int], PeerError | None]:
    """What every rank says, as far as anyone who is left knows, and who was not heard.

    In the second round each passes on what it knows. So when a rank dies while it tells the others, those who
    heard it tell those who did not, and all that are left come to one decision. It may also stall: then the wait
    for it times out, upon which gloo closes all connections of this rank. What the others pass on has to be here
    by then, so both rounds are listened for from the start, and nobody waits for its sends before it passes on.
    """
    rank, num_ranks = transport.rank, transport.num_ranks
    others = [other for other in range(num_ranks) if other != rank]
    heard = torch.full((2, num_ranks, num_ranks), SILENT)  # by round and by who tells
    heard[0, rank, rank] = YES if yes else NO
    silence: list[PeerError] = []
    rounds = [[_posted(transport.receive, other, rank, votes[other], silence) for other in others] for votes in heard]
    sends = []
    for receives in rounds:
        known = heard.amax(dim=(0, 1))
        sends += [_posted(transport.send, rank, other, known, silence) for other in others]
        _wait_for(receives, silence)
    _wait_for(sends, silence)
    return heard.amax(dim=(0, 1)).tolist(), silence[0] if silence else None


def _posted(
    post: Callable[[Message, list[Tensor]], Handle], source: int, target: int, votes: Tensor, silence: list[PeerError]
) -> Handle | None:
    """The vote of ``source`` under way to ``target``, if that can be reached."""
    try:
        return post(Message(Lane.HEADER, source, target, f"the vote of rank {source}"), [votes])
    except PeerError as error:
        silence.append(error)
        return None


def _wait_for(handles: Iterable[Handle | None], silence: list[PeerError]) -> None:
    for handle in handles:
        try:
            if handle is not None:
                handle.wait()
        except PeerError as error:
            silence.append(error)
