"""What is left to compute, in which order: dirty marks to slices. Pure: clocks come in as arguments.

The newest minutes come first, so that a backlog never delays what people are watching; older ranges go in slices of
bounded time. A block of marks is finished when every minute of it has been computed by a slice that began after it
was taken.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from gpuledger.streams.marks import MINUTE_MS, Ranges

__all__ = ["DirtyQueue", "Pace", "Slice"]

B = TypeVar("B")

#: A slice holds its rows in memory: a month of hours is enough to make its fixed cost small.
_MAX_UNITS = 31 * 24
#: Between the open minute and the one that has just become complete may lie clean ones: computing them again costs less
#: than a slice of its own.
_BRIDGE_MS = 3 * MINUTE_MS


@dataclass(frozen=True, slots=True)
class Slice:
    """Minutes [from_ms, to_ms) of a pool to compute: minute rows alone, or everything ('hours').

    `partition` and `offset`: the last mark taken before the slice began; they are its version. `taken` counts the
    blocks that were there then.
    """

    kind: Literal["minutes", "hours"]
    pool: str
    from_ms: int
    to_ms: int
    partition: int
    offset: int
    taken: int


@dataclass(frozen=True, slots=True)
class Pace:
    """How time is shared. `unit_ms`: slices of older time are multiples of it; `live_ms`: younger minutes are computed
    on their own, at most every `live_every_ms` per pool, and with at most one part in `live_share` of the time for all
    pools together; `slice_ms`: time for older slices; `settle_ms`: how long an older range waits for more marks of its
    pool, at most `patience_ms`; the unit still open is computed every `open_every_ms`, and with at most one part in
    `open_share` of the time."""

    unit_ms: int
    live_ms: int = 600_000
    live_every_ms: int = 1_000
    live_share: int = 3
    slice_ms: int = 500
    settle_ms: int = 1_500
    patience_ms: int = 15_000
    open_every_ms: int = 5_000
    open_share: int = 15


@dataclass(slots=True)
class _Block(Generic[B]):
    """Blocks of one partition that follow each other; `number` is that of the last."""

    handles: list[B]
    number: int
    minutes: dict[str, Ranges]
    hours: dict[str, Ranges]

    def is_done(self) -> bool:
        return not any(self.minutes.values()) and not any(self.hours.values())

    def join(self, after: _Block[B]) -> None:
        """Takes in the block after it. What is left of both is then done by slices that began after both were taken."""
        self.handles += after.handles
        self.number = after.number
        for mine, others in ((self.minutes, after.minutes), (self.hours, after.hours)):
            for pool, ranges in others.items():
                mine.setdefault(pool, Ranges()).update(ranges)


@dataclass(slots=True)
class _Pool:
    partition: int
    offset: int
    live_at: int = -(10**9)
    live_took: int = 0
    newest_last: bool = False
    open_at: int = -(10**9)
    open_took: int = 0
    marked_at: int = 0
    waiting_since: int | None = None
    units: int = 1


@dataclass(slots=True)
class DirtyQueue(Generic[B]):
    """Blocks of marks in, slices out, finished blocks back in the order of their partitions.

    `now_ms` is UTC; `clock_ms` any monotonic clock. One slice is under way at a time: `done` ends it. Every block has
    marks of the open hour and is finished with it, and hundreds would make each look at them slow: beyond `max_blocks`
    of a partition, neighbours become one.
    """

    pace: Pace
    max_blocks: int = 64
    _blocks: dict[int, deque[_Block[B]]] = field(default_factory=dict[int, "deque[_Block[B]]"])
    _pools: dict[str, _Pool] = field(default_factory=dict[str, _Pool])
    _taken: int = 0

    def __len__(self) -> int:
        return sum(len(block.handles) for blocks in self._blocks.values() for block in blocks)

    def add(self, handle: B, partition: int, offset: int, marks: dict[str, Ranges], now_ms: int, clock_ms: int) -> None:
        """Takes a block whose last record is at `offset`. Minutes after the open one are left to their own marks."""
        open_end = now_ms // MINUTE_MS * MINUTE_MS + MINUTE_MS
        self._taken += 1
        minutes = {pool: ranges.clip(now_ms - self.pace.live_ms, open_end) for pool, ranges in marks.items()}
        minutes = {pool: ranges.widen(MINUTE_MS) for pool, ranges in minutes.items()}
        hours = {pool: ranges.clip(0, open_end).widen(self.pace.unit_ms) for pool, ranges in marks.items()}
        blocks = self._blocks.setdefault(partition, deque())
        blocks.append(_Block([handle], self._taken, minutes, hours))
        if len(blocks) > self.max_blocks:
            self._blocks[partition] = _joined(blocks)
        for state in self._pools.values():
            if state.partition == partition:
                state.offset = max(state.offset, offset)
        for pool, ranges in hours.items():
            state = self._pools.setdefault(pool, _Pool(partition, offset))
            state.partition, state.offset = partition, max(state.offset, offset)
            if ranges and any(start + self.pace.unit_ms <= now_ms for start, _ in ranges):
                state.marked_at = clock_ms
                state.waiting_since = clock_ms if state.waiting_since is None else state.waiting_since

    def _outstanding(self, pool: str, kind: Literal["minutes", "hours"]) -> Ranges:
        found: list[tuple[int, int]] = []
        for block in self._blocks.get(self._pools[pool].partition, ()):
            found += getattr(block, kind).get(pool, ())
        return Ranges(found)

    def next(self, now_ms: int, clock_ms: int) -> Slice | None:
        """The slice to compute now; None when nothing is due yet."""
        states = self._pools.values()
        live_every_ms = max(self.pace.live_every_ms, self.pace.live_share * sum(s.live_took for s in states))
        open_every_ms = max(self.pace.open_every_ms, self.pace.open_share * sum(s.open_took for s in states))
        for pool in sorted(self._pools, key=lambda pool: self._pools[pool].live_at):
            found = self._live(pool, clock_ms, live_every_ms)
            if found is not None:
                return found
        for pool in sorted(self._pools, key=lambda pool: self._pools[pool].open_at):
            found = self._open(pool, now_ms, clock_ms, open_every_ms)
            if found is not None:
                return found
        older = [found for pool in self._pools if (found := self._older(pool, now_ms, clock_ms)) is not None]
        return max(older, key=lambda found: found.to_ms, default=None)

    def _slice(self, kind: Literal["minutes", "hours"], pool: str, from_ms: int, to_ms: int) -> Slice:
        state = self._pools[pool]
        return Slice(kind, pool, from_ms, to_ms, state.partition, state.offset, self._taken)

    def _live(self, pool: str, clock_ms: int, every_ms: int) -> Slice | None:
        state = self._pools[pool]
        if clock_ms < state.live_at + every_ms:
            return None
        ranges = list(self._outstanding(pool, "minutes"))
        if not ranges:
            return None
        state.live_at = clock_ms
        start, end = ranges.pop()
        while ranges and start - ranges[-1][1] <= _BRIDGE_MS:
            start = ranges.pop()[0]
        # The open minute is marked every second, so it would always be the newest: others have every second visit.
        state.newest_last = not (state.newest_last and ranges)
        return self._slice("minutes", pool, *((start, end) if state.newest_last else ranges[0]))

    def _open(self, pool: str, now_ms: int, clock_ms: int, every_ms: int) -> Slice | None:
        """The unit that is not over yet, up to the end of the open minute."""
        state, unit = self._pools[pool], self.pace.unit_ms
        start = now_ms // unit * unit
        if clock_ms < state.open_at + every_ms:
            return None
        if not self._outstanding(pool, "hours").clip(start, start + unit):
            return None
        state.open_at = clock_ms
        return self._slice("hours", pool, start, now_ms // MINUTE_MS * MINUTE_MS + MINUTE_MS)

    def _older(self, pool: str, now_ms: int, clock_ms: int) -> Slice | None:
        state, unit = self._pools[pool], self.pace.unit_ms
        ranges = list(self._outstanding(pool, "hours").clip(0, now_ms // unit * unit))
        if not ranges:
            state.waiting_since = None
            return None
        settled = clock_ms >= state.marked_at + self.pace.settle_ms
        if not settled and clock_ms < (state.waiting_since or 0) + self.pace.patience_ms:
            return None
        start, end = ranges[-1]
        return self._slice("hours", pool, max(start, end - state.units * unit), end)

    def done(self, slice_: Slice, took_ms: int) -> None:
        """The slice has been written."""
        state, unit = self._pools[slice_.pool], self.pace.unit_ms
        end = slice_.to_ms
        if slice_.kind == "minutes":
            state.live_took = took_ms
        elif end % unit:
            state.open_took = took_ms
            end = -(-end // unit) * unit
        else:
            # Longer slices where they are quick, shorter ones where they are slow; both within reason.
            factor = min(4.0, max(0.25, self.pace.slice_ms / max(took_ms, 1)))
            state.units = min(_MAX_UNITS, max(1, int((end - slice_.from_ms) // unit * factor)))
        for block in self._blocks.get(slice_.partition, ()):
            if block.number > slice_.taken:
                break
            if slice_.kind == "hours" and slice_.pool in block.hours:
                block.hours[slice_.pool].remove(slice_.from_ms, end)
            if slice_.pool in block.minutes:
                block.minutes[slice_.pool].remove(slice_.from_ms, slice_.to_ms)

    def finished(self) -> list[tuple[B, int]]:
        """(handle, partition) of blocks that are done, with every block before them in their partition."""
        out: list[tuple[B, int]] = []
        for partition, blocks in self._blocks.items():
            while blocks and blocks[0].is_done():
                out += [(handle, partition) for handle in blocks.popleft().handles]
        return out

    def drop(self, held: Callable[[B], bool]) -> None:
        """Forgets blocks that are no longer ours; whoever has their partition takes them again."""
        for partition, blocks in self._blocks.items():
            # They leave all at once: where the first is ours, so are those after it.
            if not blocks or held(blocks[0].handles[0]):
                continue
            for block in blocks:
                block.handles = [handle for handle in block.handles if held(handle)]
            self._blocks[partition] = deque(block for block in blocks if block.handles)

    def backlog(self) -> tuple[int, int]:
        """(blocks not finished, minutes still to compute for the oldest time) for /metrics and `status`."""
        ranges = [r for pool in self._pools for r in self._outstanding(pool, "hours")]
        return len(self), sum(end - start for start, end in ranges) // MINUTE_MS


def _joined(blocks: deque[_Block[B]]) -> deque[_Block[B]]:
    """Each two neighbours as one."""
    out: deque[_Block[B]] = deque()
    for n, block in enumerate(blocks):
        if n % 2:
            out[-1].join(block)
        else:
            out.append(block)
    return out
