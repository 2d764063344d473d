"""The queue of dirty marks: newest first, nothing acknowledged before it is computed."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuledger.streams.dirty import DirtyQueue, Pace, Slice
from gpuledger.streams.marks import HOUR_MS, MINUTE_MS, Ranges

NOW = 1_700_000_000_000 // HOUR_MS * HOUR_MS + 30 * MINUTE_MS + 20_000
PACE = Pace(unit_ms=HOUR_MS, settle_ms=0)


def queue_with(*marks: tuple[str, int, int]) -> DirtyQueue[str]:
    queue: DirtyQueue[str] = DirtyQueue(PACE)
    for n, (pool, start, end) in enumerate(marks):
        queue.add(f"block {n}", 0, n, {pool: Ranges([(start, end)])}, NOW, 0)
    return queue


def test_the_newest_minute_comes_before_a_backlog() -> None:
    queue = queue_with(("old", NOW - 100 * HOUR_MS, NOW - 50 * HOUR_MS), ("live", NOW - MINUTE_MS, NOW))
    first = queue.next(NOW, 0)
    assert first is not None
    assert (first.kind, first.pool) == ("minutes", "live")
    assert first.to_ms == NOW // MINUTE_MS * MINUTE_MS + MINUTE_MS


@pytest.mark.parametrize(("age", "began"), [(3, [-3, 0, 0, 0]), (8, [0, -8, 0, 0])], ids=["near", "far"])
def test_the_open_minute_does_not_keep_others_waiting(age: int, began: list[int]) -> None:
    """Marked again before every visit of its pool, it is always the newest. What is near is computed with it."""
    open_minute = NOW // MINUTE_MS * MINUTE_MS
    queue = queue_with(("p", open_minute - age * MINUTE_MS, open_minute - (age - 1) * MINUTE_MS))
    found: list[int] = []
    for visit in range(1, 5):
        queue.add("open", 0, visit, {"p": Ranges([(open_minute, open_minute + MINUTE_MS)])}, NOW, 0)
        slice_ = queue.next(NOW, visit * 100_000)
        assert slice_ is not None and slice_.kind == "minutes"
        found.append((slice_.from_ms - open_minute) // MINUTE_MS)
        queue.done(slice_, 10)
    assert found == began


def test_a_block_is_finished_only_when_minutes_and_hours_are_done_and_never_before_its_elders() -> None:
    queue = queue_with(("old", NOW - 3 * HOUR_MS, NOW - 2 * HOUR_MS), ("live", NOW - MINUTE_MS, NOW))
    kinds = []
    while not (finished := queue.finished()):
        slice_ = queue.next(NOW, len(kinds) * 100_000)
        assert slice_ is not None
        kinds.append((slice_.kind, slice_.pool))
        queue.done(slice_, 10)
    assert kinds[0] == ("minutes", "live")
    assert kinds[1] == ("hours", "live")
    assert ("hours", "old") in kinds
    assert finished == [("block 0", 0), ("block 1", 0)]


def test_a_mark_that_came_while_a_slice_was_computed_is_not_finished_by_it() -> None:
    queue = queue_with(("p", NOW - 3 * HOUR_MS, NOW - 2 * HOUR_MS))
    slice_ = queue.next(NOW, 0)
    assert slice_ is not None
    queue.add("late", 0, 7, {"p": Ranges([(NOW - 3 * HOUR_MS, NOW - 2 * HOUR_MS)])}, NOW, 0)
    queue.done(slice_, 10)
    while (left := queue.next(NOW, 0)) is not None and left.taken == slice_.taken:
        queue.done(left, 10)
    assert "late" not in [handle for handle, _ in queue.finished()]
    assert left is not None
    assert left.offset == 7


def test_a_revoked_block_is_forgotten() -> None:
    queue = queue_with(("p", NOW - 3 * HOUR_MS, NOW - 2 * HOUR_MS))
    queue.drop(lambda handle: False)
    assert queue.next(NOW, 0) is None
    assert queue.finished() == []


def test_slow_slices_get_shorter_and_quick_ones_longer() -> None:
    queue = queue_with(("p", NOW - 3000 * HOUR_MS, NOW - 2 * HOUR_MS))
    lengths = []
    for took in (10, 10, 10, 5000, 5000):
        slice_ = queue.next(NOW, 0)
        assert slice_ is not None
        lengths.append((slice_.to_ms - slice_.from_ms) // HOUR_MS)
        queue.done(slice_, took)
    assert lengths == [1, 4, 16, 64, 16]


ranges = st.tuples(st.sampled_from("ab"), st.integers(0, 3000), st.integers(1, 600))


@settings(max_examples=100, deadline=None)
@given(st.lists(ranges, min_size=1, max_size=12), st.sampled_from([1, 2, 5, 64]), st.randoms(use_true_random=False))
def test_every_marked_minute_is_computed_after_its_mark_was_taken(
    marks: list[tuple[str, int, int]], max_blocks: int, r: Random
) -> None:
    """Also where a mark comes while a slice is computed, and where blocks have become one."""
    queue: DirtyQueue[int] = DirtyQueue(PACE, max_blocks)
    computed: dict[tuple[str, int], int] = {}  # (pool, minute) → greatest `taken` that wrote its hour
    finished: list[int] = []
    clock = 0
    under_way: Slice | None = None

    def begin() -> None:
        nonlocal under_way
        under_way = under_way or queue.next(NOW, clock)

    def end() -> None:
        nonlocal under_way
        if under_way is None:
            return
        if under_way.kind == "hours":
            for minute in range(under_way.from_ms, under_way.to_ms, MINUTE_MS):
                computed[under_way.pool, minute] = under_way.taken
        queue.done(under_way, r.randrange(1, 2000))
        under_way = None
        finished.extend(handle for handle, _ in queue.finished())

    wanted = []
    for n, (pool, ago, length) in enumerate(marks):
        start = (NOW // MINUTE_MS - ago) * MINUTE_MS
        stop = min(start + length * MINUTE_MS, NOW // MINUTE_MS * MINUTE_MS + MINUTE_MS)
        queue.add(n, 0, n, {pool: Ranges([(start, stop)])}, NOW, clock)
        wanted.append((pool, start, stop))
        clock += r.randrange(20_000)
        for step in (begin, end) * r.randrange(3):
            if r.random() < 0.8:
                step()
    for _ in range(2000):
        clock += 10_000
        end()
        begin()
        if len(finished) == len(marks):
            break
    assert finished == list(range(len(marks)))
    for n, (pool, start, stop) in enumerate(wanted):
        assert all(computed[pool, minute] > n for minute in range(start, stop, MINUTE_MS))


def test_an_hour_of_open_marks_is_few_blocks_to_look_at_and_each_is_finished() -> None:
    """A mark of the open minute each second of an hour that no slice comes to: as with many pools."""
    queue: DirtyQueue[int] = DirtyQueue(PACE)
    hour = NOW // HOUR_MS * HOUR_MS
    for n in range(3_600):
        minute = hour + n // 60 * MINUTE_MS
        queue.add(n, 0, n, {"p": Ranges([(minute, minute + MINUTE_MS)])}, hour + n * 1000, n * 1000)
    assert len(queue) == 3_600 and queue.backlog() == (3_600, 60)
    assert max(len(blocks) for blocks in queue._blocks.values()) <= 64
    now, clock = hour + HOUR_MS, 3_600_000
    finished: list[int] = []
    for _ in range(20):
        clock += 100_000
        slice_ = queue.next(now, clock)
        if slice_ is None:
            break
        queue.done(slice_, 10)
        finished += [handle for handle, _ in queue.finished()]
    assert finished == list(range(3_600))
