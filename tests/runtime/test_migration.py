"""Experts move while the model answers: exactly as the unplaced one, before, during, after, and when a rank dies."""

import json
import os
import random
import signal
import subprocess
import threading
from collections import defaultdict, deque
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore

from counterflow import Placement, plan_migration
from counterflow.errors import CounterflowError, PeerError, PipelineError
from counterflow.experts import MigrationPlan, resize
from counterflow.runtime import Migration
from counterflow.runtime.transport import Lane, Message
from runtime.experts import EXPERT_BYTES, EXPERTS, GPUS, LAYERS, ROOM, holds_what_it_says, placements, slots_of
from runtime.processes import command, run_ranks, surroundings


def found_by(folder: Path, ranks: list[int]) -> list[dict]:
    return [json.loads((folder / f"rank-{rank}.json").read_text(encoding="utf-8")) for rank in ranks]


# --- over gloo ----------------------------------------------------------------------------------------------


def test_answers_before_during_and_after_are_those_of_the_unplaced_model(tmp_path: Path) -> None:
    run_ranks("migrate", GPUS, tmp_path, EXPERT_BYTES, "SIGKILL", 0, 20)
    plan = plan_migration(*placements())
    for found in found_by(tmp_path, list(range(GPUS))):
        assert len(found["right"]) > LAYERS + 1  # a layer in more than one step
        assert all(found["right"])
        assert found["changes"] == len(found["right"]) - 1
        assert 0 < found["most_received"] <= EXPERT_BYTES
        assert found["swapped"] == [0, 1, 2]
        assert found["error"] is None
        assert found["truthful"]
        assert found["pointers_kept"]
        for layer in range(LAYERS):
            assert found["held"][layer] == plan.new.physical_to_logical[layer].reshape(GPUS, ROOM).tolist()


def told(how: str, at: int, timeout_s: float, folder: Path) -> list[int]:
    """The exit codes of ranks that nobody watches over, so that the others live on when one does not."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    ranks = []
    with surroundings():
        for rank in range(GPUS):
            settings = {**os.environ, **meeting, "RANK": str(rank), "WORLD_SIZE": str(GPUS)}
            # In sessions of their own, as the launcher's: a busy machine gives each session its share.
            ranks.append(
                subprocess.Popen(
                    command("migrate", folder, EXPERT_BYTES, how, at, timeout_s), env=settings, start_new_session=True
                )
            )
    try:
        for rank in (0, 1, 3):
            ranks[rank].wait(timeout=60)
    finally:
        for process in ranks:
            process.kill()
    return [process.wait() for process in ranks]


@pytest.mark.parametrize(
    ("how", "at", "timeout_s"),
    [
        pytest.param("SIGKILL", 8, 20, id="killed before it sends an expert"),
        pytest.param("SIGKILL", 24, 20, id="killed while it tells its vote"),
        pytest.param("SIGSTOP", 8, 3, id="stopped", marks=pytest.mark.slow),
    ],
)
def test_when_a_rank_fails_the_others_know_what_they_hold_serve_by_it_and_move_on(
    how: str, at: int, timeout_s: float, tmp_path: Path
) -> None:
    assert told(how, at, timeout_s, tmp_path) == [0, 0, -signal.SIGKILL, 0]
    found = found_by(tmp_path, [0, 1, 3])
    for rank in found:
        assert all(rank["right"])
        assert rank["truthful"]
        assert rank["held"] == found[0]["held"]
        assert how == "SIGSTOP" or "rank 2" in rank["error"]  # who waits for one that waits names that one
        assert rank["second"]["swapped"] == [0, 1, 2]
        assert rank["second"]["error"] is None
        assert rank["second"]["truthful"]
        assert all(rank["second"]["right"])
    (where,) = {rank["error"].partition("; the placement of the layers is ")[2] for rank in found}
    assert where


# --- every point at which a rank may die --------------------------------------------------------------------


class Death(BaseException):
    """Not an Exception: nothing that is dead handles it."""


class Network:
    """Ranks as threads; one of them dies instead of posting its ``last``-th message."""

    def __init__(self, mortal: int = -1, last: int = -1) -> None:
        self.mortal, self.left, self.dead, self.posted = mortal, last, set[int](), 0
        self.changed = threading.Condition()
        self.under_way: dict[tuple[Lane, int, int], deque[list[Tensor]]] = defaultdict(deque)


class Threaded:
    """The face of ProcessGroupTransport; its group is a network and a rank."""

    def __init__(self, group: tuple[Network, int], *_: object) -> None:
        self.network, self.rank = group
        self.num_ranks = GPUS

    def send(self, message: Message, tensors: list[Tensor]) -> "Sent":
        assert all(tensor.is_contiguous() for tensor in tensors)  # any other is copied, which takes memory
        with self.network.changed:
            if self.rank == self.network.mortal:
                self.network.posted += 1
                self.network.left -= 1
                if self.network.left == 0:
                    raise Death
            if message.target in self.network.dead:
                raise PeerError(f"could not post {message.what}: rank {message.target} is gone")
            self.network.under_way[message.lane, message.source, message.target].append([t.clone() for t in tensors])
            self.network.changed.notify_all()
        return Sent()

    def receive(self, message: Message, tensors: list[Tensor]) -> "Received":
        return Received(self.network, message, tensors)

    def gather(self, numbers: list[int], what: str) -> list[list[int]]:
        return [numbers] * self.num_ranks


class Sent:
    def wait(self) -> None:
        pass


class Received:
    def __init__(self, network: Network, message: Message, tensors: list[Tensor]) -> None:
        self.network, self.message, self.tensors = network, message, tensors

    def wait(self) -> None:
        message, network = self.message, self.network
        queue = network.under_way[message.lane, message.source, message.target]
        with network.changed:
            network.changed.wait_for(lambda: queue or message.source in network.dead, timeout=30)
            if not queue:
                raise PeerError(f"waited for {message.what}: rank {message.source} died")
            for target, source in zip(self.tensors, queue.popleft(), strict=True):
                target.copy_(source)


@pytest.fixture
def a_process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Rank(threading.Thread):
    """Carries the plan out in a thread, and keeps what came of it."""

    def __init__(
        self, network: Network, rank: int, plan: MigrationPlan, extra_bytes: int, transport: type = Threaded
    ) -> None:
        super().__init__(daemon=True)
        self.network, self.rank = network, rank
        before = [plan.held(layer) for layer in range(LAYERS)]
        room = plan.new.num_slots // GPUS
        self.slots = slots_of(before, rank, max(len(before[0][rank]), room))
        self.migration = Migration(
            plan, self.slots, extra_bytes=extra_bytes, group=(network, rank), transport=transport
        )
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            while not self.migration.done:
                self.migration.advance()
        except (Death, CounterflowError) as error:
            self.error = error
        finally:
            with self.network.changed:
                self.network.dead.add(self.rank)  # who gave up answers no more
                self.network.changed.notify_all()

    @property
    def held(self) -> list[tuple[tuple[int, ...], ...]]:
        return [self.migration.held(layer) for layer in range(LAYERS)]


def ranks_over(
    network: Network, extra_bytes: int, plan: MigrationPlan | None = None, transport: type = Threaded
) -> list[Rank]:
    plan = plan or plan_migration(*placements())
    ranks = [Rank(network, rank, plan, extra_bytes, transport) for rank in range(GPUS)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout=60)
        assert not rank.is_alive()
    return ranks


@pytest.mark.usefixtures("a_process_group")
def test_wherever_a_rank_dies_the_others_agree_on_what_is_where_and_it_is_there() -> None:
    mortal = Network(mortal=2)
    whole = ranks_over(mortal, EXPERT_BYTES)
    assert all(rank.error is None for rank in whole)
    outcomes = set()
    for last in range(1, mortal.posted + 1):
        ranks = ranks_over(Network(mortal=2, last=last), EXPERT_BYTES)
        assert isinstance(ranks[2].error, Death)
        survivors = [ranks[0], ranks[1], ranks[3]]
        for rank in survivors:
            assert rank.held == survivors[0].held
            assert holds_what_it_says(rank.slots, rank.held, rank.rank)
            if rank.error is None:  # all that it had to hear it heard
                assert rank.migration.done
                continue
            assert isinstance(rank.error, PeerError)
            with pytest.raises(PipelineError, match="does not go on; plan a new one from what is held"):
                rank.migration.advance()
        outcomes.add(str(survivors[0].held))
    # From nothing swapped to, when it died among its last votes, everything.
    assert str(whole[0].held) in outcomes
    assert len(outcomes) > LAYERS


@pytest.mark.usefixtures("a_process_group")
def test_who_cannot_reach_the_dead_still_sends_to_the_living_so_that_nobody_blames_them() -> None:
    network = Network()
    network.dead.add(2)
    plan = plan_migration(*placements())
    survivors = [Rank(network, rank, plan, 1 << 20) for rank in (0, 1, 3)]
    for rank in survivors:
        rank.start()
    for rank in survivors:
        rank.join(timeout=60)
        assert isinstance(rank.error, PeerError)
        assert "rank 2" in str(rank.error)
        assert not rank.migration.swapped


# --- every point at which a rank may stall ------------------------------------------------------------------


class Stalling(Network):
    """Connections like gloo's: a wait that times out closes all of that rank, and what had arrived by then is there.

    Time passes when all ranks wait. The mortal one stalls, with its connections open, instead of posting or waiting
    for the ``last``-th time.
    """

    def __init__(self, mortal: int = -1, last: int = -1) -> None:
        super().__init__(mortal, last)
        self.now, self.closed, self.waits = 0.0, set[int](), dict[int, tuple[float, Half]]()
        self.halves: dict[tuple[Lane, int, int, bool], deque[Half]] = defaultdict(deque)

    def pass_by(self, rank: int) -> None:
        if rank == self.mortal:
            self.posted += 1
            self.left -= 1
            if self.left == 0:
                raise Death

    def times_out(self, rank: int) -> bool:
        stuck = all(not half.done and not half.ends & self.closed for _, half in self.waits.values())
        return (
            stuck
            and len(self.waits) + len(self.dead) == GPUS
            and rank == min(self.waits, key=lambda r: (self.waits[r][0], r))
        )


class Half:
    """One side of a message."""

    def __init__(self, network: Stalling, rank: int, message: Message, tensors: list[Tensor], timeout_s: float) -> None:
        self.network, self.rank, self.message, self.tensors, self.timeout_s = network, rank, message, tensors, timeout_s
        self.ends, self.done = {message.source, message.target}, False
        with network.changed:
            network.pass_by(rank)
            if self.ends & network.closed:
                raise PeerError(f"could not post {message.what}: a connection is closed")
            key, sends = (message.lane, message.source, message.target), rank == message.source
            if others := network.halves[*key, not sends]:
                other = others.popleft()
                source, target = (self, other) if sends else (other, self)
                for to, of in zip(target.tensors, source.tensors, strict=True):
                    to.copy_(of)
                self.done = other.done = True
                network.changed.notify_all()
            else:
                network.halves[*key, sends].append(self)

    def wait(self) -> None:
        network = self.network
        with network.changed:
            network.pass_by(self.rank)
            network.waits[self.rank] = network.now + self.timeout_s, self
            try:
                while not self.done:
                    if self.ends & network.closed:
                        raise PeerError(f"waited for {self.message.what}: a connection is closed")
                    if network.times_out(self.rank):
                        network.now = network.waits[self.rank][0]
                        network.closed.add(self.rank)
                        raise PeerError(f"waited {self.timeout_s} s for {self.message.what}")
                    network.changed.notify_all()
                    network.changed.wait(timeout=30)
            finally:
                del network.waits[self.rank]
                network.changed.notify_all()


class LikeGloo(Threaded):
    def __init__(self, group: tuple[Stalling, int], channels: object, timeout_s: float, *_: object) -> None:
        super().__init__(group)
        self.timeout_s = timeout_s

    def send(self, message: Message, tensors: list[Tensor]) -> Half:
        return Half(self.network, self.rank, message, tensors, self.timeout_s)

    receive = send


@pytest.mark.usefixtures("a_process_group")
def test_wherever_a_rank_stalls_the_others_agree_on_what_is_where_and_it_is_there() -> None:
    mortal = Stalling(mortal=2)
    assert all(rank.error is None for rank in ranks_over(mortal, EXPERT_BYTES, transport=LikeGloo))
    for last in range(1, mortal.posted + 1):
        ranks = ranks_over(Stalling(mortal=2, last=last), EXPERT_BYTES, transport=LikeGloo)
        assert isinstance(ranks[2].error, Death)
        survivors = [ranks[0], ranks[1], ranks[3]]
        for rank in survivors:
            assert rank.error is None or isinstance(rank.error, PeerError)
            assert rank.held == survivors[0].held
            assert holds_what_it_says(rank.slots, rank.held, rank.rank)


# --- any placement, any memory ------------------------------------------------------------------------------


def any_placement(drawn: random.Random, gpus: int, room: int) -> Placement:
    """Copies of one expert on one GPU included."""
    rows = []
    for _ in range(LAYERS):
        row = [*range(EXPERTS), *(drawn.randrange(EXPERTS) for _ in range(gpus * room - EXPERTS))]
        drawn.shuffle(row)
        rows.append(row)
    return Placement(rows, EXPERTS, gpus)


@pytest.mark.usefixtures("a_process_group")
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("most", [1, 2, 12])
def test_any_placement_is_reached_with_memory_for_any_number_of_experts(most: int, seed: int) -> None:
    drawn = random.Random(seed)
    plan = plan_migration(any_placement(drawn, GPUS, 4), any_placement(drawn, GPUS, 4))
    for rank in ranks_over(Network(), most * EXPERT_BYTES, plan):
        assert rank.error is None
        assert rank.migration.placement is plan.new
        assert rank.held == [tuple(map(tuple, row)) for row in plan.new.physical_to_logical.reshape(LAYERS, GPUS, 4)]
        assert holds_what_it_says(rank.slots, rank.held, rank.rank)


@pytest.mark.usefixtures("a_process_group")
@pytest.mark.parametrize(("gpus", "room"), [(4, 2), (4, 3), (4, 6), (2, 4), (3, 5)])
def test_other_numbers_of_slots_and_gpus_are_reached_a_whole_layer_at_a_time(gpus: int, room: int) -> None:
    drawn = random.Random(gpus * room)
    plan = plan_migration(any_placement(drawn, gpus, room), any_placement(drawn, GPUS, 4))
    for rank in ranks_over(Network(), 4 * EXPERT_BYTES, plan):
        assert rank.error is None
        assert rank.held == [tuple(map(tuple, row)) for row in plan.new.physical_to_logical.reshape(LAYERS, GPUS, 4)]
        assert holds_what_it_says(rank.slots, rank.held, rank.rank)


@pytest.mark.usefixtures("a_process_group")
def test_halfway_one_placement_says_what_is_where_if_all_layers_have_one_size() -> None:
    plan = plan_migration(*placements())
    rank = Rank(Network(), 0, plan, EXPERT_BYTES)
    assert rank.migration.placement.physical_to_logical.tolist() == plan.old.physical_to_logical.tolist()
    wider = Placement([[*row, *row[:4]] for row in plan.old.physical_to_logical.tolist()], EXPERTS, GPUS)
    rank = Rank(Network(), 0, plan_migration(plan.old, wider), 1 << 20)
    with pytest.raises(PipelineError, match="no one placement holds for all layers: ask held layer by layer"):
        rank.migration.placement  # noqa: B018
    replaced = plan_migration(plan.old, plan.new, lost_gpus=[3])  # and one added in its place
    rank = Rank(Network(), 3, replaced, 1 << 20)
    with pytest.raises(PipelineError, match="no one placement holds for all layers"):
        rank.migration.placement  # noqa: B018


@pytest.mark.usefixtures("a_process_group")
def test_ranks_with_different_plans_do_not_begin() -> None:
    class Differing(Threaded):
        def gather(self, numbers: list[int], what: str) -> list[list[int]]:
            return [[number + rank for number in numbers] for rank in range(self.num_ranks)]

    plan = plan_migration(*placements())
    slots = slots_of([plan.held(layer) for layer in range(LAYERS)], 0, ROOM)
    with pytest.raises(PipelineError, match="rank 1 has another plan, other tensors or other extra_bytes than rank 0"):
        Migration(plan, slots, extra_bytes=EXPERT_BYTES, group=(Network(), 0), transport=Differing)


@pytest.mark.usefixtures("a_process_group")
def test_a_rank_that_cannot_load_what_was_lost_leaves_all_as_they_were() -> None:
    plan = plan_migration(
        Placement([[0, 1, 2, 3]], 4, 2), Placement([[0, 1, 2, 3]], 4, 2), lost_gpus=[1], reload_lost=True
    )
    slots = [[torch.zeros(3)] for _ in range(2)]
    network = Network()

    def fails(layer: int, expert: int) -> list[Tensor]:
        raise OSError(f"no checkpoint of expert {expert}")

    class Two(Threaded):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)
            self.num_ranks = 2

    pair = [
        Migration(plan, {0: slots}, extra_bytes=24, group=(network, rank), transport=Two, reload=fails)
        for rank in range(2)
    ]
    errors: dict[int, str] = {}

    def run(rank: int) -> None:
        try:
            pair[rank].advance()
        except PipelineError as error:
            errors[rank] = str(error)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert errors == {
        0: "rank 1 could not take in its experts; the placement of the layers is old: 0",
        1: "rank 1 could not take in its experts (no checkpoint of expert 2); the placement of the layers is old: 0",
    }
    assert pair[0].held(0) == ((0, 1), ())


@pytest.mark.usefixtures("a_process_group")
@pytest.mark.parametrize(
    ("experts", "extra_bytes", "words"),
    [
        ({}, 12, "layer 0 got tensors for 0 slots of rank 0; give those of 2"),
        (
            {0: [[torch.zeros(3)], [torch.zeros(4)]]},
            12,
            "slot 1 of layer 0 on rank 0 has tensors float32[4] and slot 0",
        ),
        (
            {0: [[torch.zeros(2, 3)], [torch.zeros(3, 2).T]]},
            24,
            "slot 1 of layer 0 on rank 0 has tensors float32[2, 3] with strides [1, 2] and slot 0 float32[2, 3]",
        ),
        (
            {0: [[torch.zeros(4, 6)[:, :3]]] * 2},
            48,
            "slot 0 of layer 0 on rank 0 has float32[4, 3] with strides [6, 1], and to send what has gaps in memory",
        ),
        ({0: [[torch.zeros(3)], [torch.zeros(3)]]}, 11, "extra_bytes is 11 and an expert of layer 0 has 12 bytes"),
        ({0: [[torch.zeros(3)], [torch.zeros(3, device="meta")]]}, 12, "has experts on cpu and meta; have all"),
    ],
)
def test_what_does_not_fit_the_plan_is_refused(experts: dict, extra_bytes: int, words: str) -> None:
    plan = plan_migration(Placement([[0, 1, 2, 3]], 4, 2), Placement([[0, 2, 1, 3]], 4, 2))

    class Two(Threaded):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)
            self.num_ranks = 2

    with pytest.raises(PipelineError) as caught:
        Migration(plan, experts, extra_bytes=extra_bytes, group=(Network(), 0), transport=Two)
    assert words in str(caught.value)


@pytest.mark.usefixtures("a_process_group")
def test_gloo_is_not_given_what_would_end_its_peer() -> None:
    plan = plan_migration(Placement([[0, 1, 0]], 2, 1), Placement([[0, 1, 1]], 2, 1))
    slots = [[torch.zeros(3, device="meta")] for _ in range(3)]
    with pytest.raises(PipelineError, match="rank 0 has tensors on meta, which gloo does not carry; use an NCCL group"):
        Migration(plan, {0: slots}, extra_bytes=12)


@pytest.mark.usefixtures("a_process_group")
def test_a_group_of_another_size_is_refused() -> None:
    plan = plan_migration(Placement([[0, 1, 2, 3]], 4, 2), Placement([[0, 2, 1, 3]], 4, 2))
    with pytest.raises(PipelineError, match="the process group has 1 ranks and the new placement 2 GPUs; plan for"):
        Migration(plan, {}, extra_bytes=12)


@pytest.mark.usefixtures("a_process_group")
def test_where_nothing_moves_nobody_asks_what_the_group_carries(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL carries no tensors on the CPU, where those would be that are not there."""
    monkeypatch.setattr(dist, "get_backend_config", lambda group: "cuda:nccl")
    same, other = Placement([[0, 1, 0]], 2, 1), Placement([[0, 1, 1]], 2, 1)
    assert Migration(plan_migration(same, same), {}, extra_bytes=8).done
    with pytest.raises(PipelineError, match="layer 0 got tensors for 0 slots of rank 0; give those of 3"):
        Migration(plan_migration(same, other), {}, extra_bytes=8)


@pytest.mark.usefixtures("a_process_group")
@pytest.mark.parametrize("surroundings", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_weights_may_be_parameters_or_made_for_inference(surroundings: type) -> None:
    with surroundings():
        slots = [[torch.full((2,), float(expert))] for expert in (0, 1, 0)]
    if surroundings is not torch.inference_mode:
        slots = [[torch.nn.Parameter(tensor)] for (tensor,) in slots]
    plan = plan_migration(Placement([[0, 1, 0]], 2, 1), Placement([[0, 1, 1]], 2, 1))
    Migration(plan, {0: slots}, extra_bytes=8).advance()
    assert [slot[0].tolist() for slot in slots] == [[0, 0], [1, 1], [1, 1]]


# --- other GPUs ---------------------------------------------------------------------------------------------


def test_who_is_left_alone_takes_what_it_lacks_from_a_checkpoint() -> None:
    found = resize(Placement([[0, 1, 2, 0]], 3, 2), lost_gpus=[1], num_replicas=3)
    assert found.reload == ((0, 2),)
    slots = [[torch.full((2,), float(expert))] for expert in (0, 1, 9)]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(PipelineError, match="experts of layer 0 have no copy left"):
            Migration(found.plan, {0: slots}, extra_bytes=64)
        one_number = Migration(found.plan, {0: slots}, extra_bytes=64, reload=lambda *_: [torch.zeros(1)])
        with pytest.raises(PipelineError, match=r"reload gave float32\[1\] for expert 2 of layer 0; give float32\[2\]"):
            one_number.advance()
        loaded = []

        def reload(layer: int, expert: int) -> list[Tensor]:
            loaded.append((layer, expert))
            return [torch.full((2,), float(expert))]

        migration = Migration(found.plan, {0: slots}, extra_bytes=64, reload=reload)
        while not migration.done:
            migration.advance()
    finally:
        dist.destroy_process_group()
    assert loaded == [(0, 2)]
    (held,) = migration.held(0)
    assert [slot[0].tolist() for slot in slots] == [[float(expert)] * 2 for expert in held]
    assert sorted(held) == [0, 1, 2]
