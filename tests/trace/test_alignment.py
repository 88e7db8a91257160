"""Ranks side by side: clocks that were moved apart are found again, and who comes last is named."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow.trace import Message, align

Ends = list[tuple[int, int]]


def said(times: Ends, name: str = "allreduce", group: str = "0", first: int = -1, offset: int = 0) -> list[Message]:
    """Collectives with these starts and ends, on a clock that is ``offset`` ahead; numbered from ``first``."""
    return [
        Message(name, group, (), start + offset, end + offset, None, False, first + i if first >= 0 else -1)
        for i, (start, end) in enumerate(times)
    ]


def together(seed: int, count: int, ranks: int) -> list[Ends]:
    """For each rank the same ends, each started when that rank came."""
    rng = random.Random(seed)
    now, every = 0, [[] for _ in range(ranks)]
    for _ in range(count):
        starts = [now + rng.randrange(10_000, 500_000) for _ in range(ranks)]
        now = max(starts) + rng.randrange(5_000, 50_000)
        for times, start in zip(every, starts, strict=True):
            times.append((start, now))
    return every


offsets = st.lists(st.integers(-(10**15), 10**15), min_size=2, max_size=6)


@given(offsets, st.integers(0, 99), st.booleans())
def test_any_offsets_are_found_again(shifts: list[int], seed: int, numbered: bool) -> None:
    every = together(seed, 12, len(shifts))
    found = align([said(t, offset=o, first=0 if numbered else -1) for t, o in zip(every, shifts, strict=True)])
    assert found.offsets_ns.tolist() == [shift - shifts[0] for shift in shifts]
    assert (found.error_us, found.shared, found.basis, found.apart) == (0, 12, "collectives", ())


@given(offsets, st.integers(0, 99))
def test_offsets_are_found_through_ranks_that_share_other_groups(shifts: list[int], seed: int) -> None:
    """Rank 0 knows rank 2 only through rank 1."""
    every = [list[Message]() for _ in shifts]
    for rank in range(len(shifts) - 1):
        pair = together(seed + rank, 8, 2)
        for member, times in zip((rank, rank + 1), pair, strict=True):
            every[member] += said(times, group=f"pair {rank}", offset=shifts[member])
    assert align(every).offsets_ns.tolist() == [shift - shifts[0] for shift in shifts]


@given(st.integers(0, 5), st.integers(0, 5), st.integers(-(10**9), 10**9), st.integers(0, 99), st.booleans())
def test_a_profile_that_starts_or_stops_elsewhere_is_matched_all_the_same(
    missing: int, left_out: int, shift: int, seed: int, numbered: bool
) -> None:
    whole, other = together(seed, 30, 2)
    other = other[missing : len(other) - left_out]
    first, second = (0, missing) if numbered else (-1, -1)
    found = align([said(whole, first=first), said(other, offset=shift, first=second)])
    assert found.offsets_ns.tolist() == [0, shift]
    assert found.shared == 30 - missing - left_out


@given(st.integers(0, 99), st.integers(-(10**9), 10**9))
def test_late_ends_on_one_side_move_the_clock_by_no_more_than_they_usually_spread(seed: int, shift: int) -> None:
    rng = random.Random(seed)
    whole, other = together(seed, 31, 2)
    noisy = [(s, e + rng.randrange(100) + (10**7 if i % 8 == 0 else 0)) for i, (s, e) in enumerate(other)]
    found = align([said(whole), said(noisy, offset=shift)])
    assert abs(int(found.offsets_ns[1]) - shift) < 100
    assert found.error_us is not None
    assert found.error_us < 0.1


def test_clocks_whose_ends_differ_now_one_way_and_now_the_other_are_one() -> None:
    ends = [(0, 100), (200, 300), (400, 500)]
    other = [(0, 110), (200, 290), (400, 512)]
    assert align([said(ends), said(other)]).offsets_us == (0.0, 0.0)


def test_few_collectives_tell_no_error() -> None:
    assert align([said([(0, 5)]), said([(0, 8)])]).error_us is None


def test_ranks_that_share_nothing_keep_their_clocks_and_are_told_apart() -> None:
    lonely = said([(0, 5)], group="other")
    found = align([said([(0, 5), (6, 8)]), said([(3, 8), (9, 11)]), lonely])
    assert (found.offsets_us, found.apart) == ((0.0, 0.003, 0.0), (2,))
    assert align([lonely, said([(0, 5)])]).basis == "none"


def test_messages_between_two_ranks_align_nothing() -> None:
    assert align([said([(0, 5)], name="send"), said([(0, 5)], name="send")]).basis == "none"


# --- stragglers -----------------------------------------------------------------------------------------------


def test_who_comes_last_is_named_with_what_the_others_waited() -> None:
    ends = [(1000 * i, 1000 * i + 900) for i in range(10)]
    late = [(start + 600, end) for start, end in ends]
    found = align([said(ends), said(late, offset=77), said(ends)], ranks=[4, 5, 6])
    (straggler,) = found.stragglers
    assert (straggler.rank, straggler.name, straggler.group) == (5, "allreduce", "0")
    assert (straggler.late, straggler.count) == (10, 10)
    assert (straggler.waited_us, straggler.most_us) == (pytest.approx(12), pytest.approx(0.6))


def test_who_is_late_now_and_then_is_no_straggler() -> None:
    ends = [(1000 * i, 1000 * i + 900) for i in range(10)]
    mixed = [(start + (600 if i % 2 else 0), end) for i, (start, end) in enumerate(ends)]
    other = [(start + (0 if i % 2 else 600), end) for i, (start, end) in enumerate(ends)]
    assert align([said(mixed), said(other)]).stragglers == ()


def test_lateness_within_the_error_of_the_clocks_is_none() -> None:
    ends = [(1000 * i, 1000 * i + 900) for i in range(10)]
    other = [(start + 5, end + (-20 if i % 2 else 20)) for i, (start, end) in enumerate(ends)]
    assert align([said(ends), said(other)]).stragglers == ()


def test_each_kind_of_collective_has_its_own_straggler() -> None:
    ends = [(1000 * i, 1000 * i + 900) for i in range(4)]
    late = [(start + 500, end) for start, end in ends]
    found = align([
        said(ends, group="data") + said(late, name="allgather", group="tensor"),
        said(late, group="data") + said(ends, name="allgather", group="tensor"),
    ])  # fmt: skip
    assert {(one.rank, one.group) for one in found.stragglers} == {(1, "data"), (0, "tensor")}
