"""The Faust agent of the dirty topic: takes marks, computes slices in a thread, acknowledges what is finished.

It does not use `intake`, because it goes on taking marks while older ones are still being computed: the newest minute
must not wait for a backlog. Acknowledgements are strict prefixes all the same.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from aiokafka.partitioner import murmur2

from gpuledger.schemas.events import Dirty, decode_event
from gpuledger.schemas.exceptions import MessageError
from gpuledger.schemas.texts import check_texts
from gpuledger.streams.blocking import BlockingThread
from gpuledger.streams.blocks import Record
from gpuledger.streams.dirty import DirtyQueue, Pace, Slice
from gpuledger.streams.holders import UNPLACED_POOL
from gpuledger.streams.intake import Barrier, DeadLetter, no_barrier
from gpuledger.streams.ledger_rows import Version
from gpuledger.streams.letters import printable
from gpuledger.streams.marks import Marks
from gpuledger.streams.recomputer import Recomputer
from gpuledger.streams.store import Store, is_io_error

__all__ = ["DirtyStats", "dirty_marks", "take_dirty"]

log = logging.getLogger(__name__)

_POLL_S = 0.05
_LETTERS_AT_ONCE = 100
_LONGEST_PAUSE_S = 30.0


@dataclass(slots=True)
class DirtyStats:
    """Counters since the start, for /metrics and `status`; durations in milliseconds."""

    marks: int = 0
    slices: int = 0
    rows: int = 0
    retries: int = 0
    dead_letters: int = 0
    busy_ms: int = 0
    last_live_ms: int = 0
    backlog_blocks: int = 0
    backlog_minutes: int = 0
    last_error: str | None = None
    last_offset: dict[int, int] = field(default_factory=dict[int, int])


@dataclass(frozen=True, slots=True)
class _Handle:
    event: Any
    offset: int
    timestamp_ms: int


def dirty_marks(record: Record, partitions: int | None = None) -> Dirty:
    """The mark of one record; `partitions` is how many its topic has.

    Raises MessageError, also for a mark that lies in another partition than its pool's: versions of a pool's rows are
    offsets of its own partition, and a greater one from elsewhere would hide every later computation.
    """
    if record.unreadable is not None:
        raise MessageError(record.unreadable.reason)
    if not record.value:
        raise MessageError("value: is empty; expected a dirty mark as JSON")
    event = decode_event(record.value)
    if not isinstance(event, Dirty):
        raise MessageError(f"type: {event.kind} does not belong on topic dirty")
    check_texts(event, record.value)
    if event.to_ms <= event.from_ms:
        raise MessageError(f"to_ms: {event.to_ms} is not after from_ms {event.from_ms}")
    own = None if partitions is None else (murmur2(event.pool.encode()) & 0x7FFFFFFF) % partitions
    if own is not None and record.partition != own:
        raise MessageError(
            f"key: a mark of pool {event.pool} belongs in partition {own}, not in {record.partition}; "
            "give the pool as the key, and use the partitioner of Kafka's own clients (murmur2)"
        )
    return event


async def take_dirty(
    stream: Any,
    *,
    store: Store,
    recomputer: Recomputer,
    pace: Pace,
    epoch: Callable[[], int],
    partitions: int,
    dead_letter: DeadLetter,
    stats: DirtyStats,
    barrier: Barrier = no_barrier,
) -> None:
    """Runs until the worker stops. `partitions`: of the marks' topic, when it started."""
    agent = _DirtyAgent(stream.app.consumer, store, recomputer, pace, epoch, partitions, dead_letter, stats, barrier)
    await agent.run(stream)


class _DirtyAgent:
    def __init__(
        self,
        consumer: Any,
        store: Store,
        recomputer: Recomputer,
        pace: Pace,
        epoch: Callable[[], int],
        partitions: int,
        dead_letter: DeadLetter,
        stats: DirtyStats,
        barrier: Barrier,
    ) -> None:
        self._consumer = consumer
        self._partitions = partitions
        self._store = store
        self._recomputer = recomputer
        self._epoch = epoch
        self._dead_letter = dead_letter
        self._stats = stats
        self._barrier = barrier
        self._queue: DirtyQueue[_Handle] = DirtyQueue(pace)
        self._arrived = asyncio.Event()
        self._thread = BlockingThread("recompute")
        self._progress_at = 0.0
        self._unrecorded: dict[int, _Handle] = {}

    async def run(self, stream: Any) -> None:
        reader = asyncio.create_task(self._read(stream))
        worker = asyncio.create_task(self._work())
        try:
            done, _ = await asyncio.wait({reader, worker}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            # A slice that is cut off here is computed again by whoever takes the marks: nothing is acknowledged.
            reader.cancel()
            worker.cancel()
            self._thread.close()

    async def _read(self, stream: Any) -> None:
        async for event in stream.noack().events():
            records: list[Record] = list(event.value)
            marks = Marks()
            # Partitions are never taken away; a broker that has just come back says for a moment that there are none.
            self._partitions = max(self._partitions, self._consumer.topic_partitions(records[0].topic) or 0)
            rejected: list[tuple[Record, str]] = []
            for record in records:
                try:
                    mark = dirty_marks(record, self._partitions)
                except MessageError as error:
                    rejected.append((record, str(error)))
                    continue
                marks.add(mark.pool, mark.from_ms, mark.to_ms, mark.why)
            for start in range(0, len(rejected), _LETTERS_AT_ONCE):
                some = rejected[start : start + _LETTERS_AT_ONCE]
                await asyncio.gather(*(self._reject(record, reason) for record, reason in some))
            last = records[-1]
            # Acknowledged up to an hour later: until then its records must not keep others from being fetched.
            self._consumer.let_go(event.message)
            handle = _Handle(event, last.offset, last.timestamp_ms)
            self._stats.marks += len(records)
            self._queue.add(handle, last.partition, last.offset, marks.merged(), last.timestamp_ms, _clock_ms())
            self._arrived.set()

    async def _reject(self, record: Record, reason: str) -> None:
        where = f"{record.topic}/{record.partition} offset {record.first_offset}"
        log.warning("dead letter: %s: %s", where, printable(reason))
        pause_s = 0.1
        while True:
            try:
                await self._dead_letter(record, reason)
                break
            except Exception as error:
                self._stats.retries += 1
                log.warning("dead letter not sent: %s", error)
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)
        self._stats.dead_letters += 1

    async def _work(self) -> None:
        failures = 0
        while True:
            self._queue.drop(lambda handle: self._consumer.holds(handle.event.message))
            slice_ = self._queue.next(_now_ms(), _clock_ms())
            if slice_ is None:
                await self._finish()
                self._arrived.clear()
                await _wait(self._arrived, _POLL_S)
                continue
            try:
                await self._compute(slice_)
                failures = 0
            except Exception as error:
                failures += 1
                self._stats.retries += 1
                self._stats.last_error = f"{slice_.pool} [{slice_.from_ms}, {slice_.to_ms}): {error}"
                pause_s = min(_LONGEST_PAUSE_S, 0.1 * 2 ** min(failures, 10)) * random.uniform(0.5, 1)
                level = logging.WARNING if is_io_error(error) else logging.ERROR
                log.log(
                    level, "slice failed, again in %.1f s: %s", pause_s, self._stats.last_error, exc_info=level > 30
                )
                await asyncio.sleep(pause_s)
            await self._finish()

    async def _compute(self, slice_: Slice) -> None:
        version = Version(self._epoch(), slice_.offset, secrets.randbits(40))
        started = _clock_ms()
        await self._barrier("before_read")
        write = self._recomputer.minutes if slice_.kind == "minutes" else self._recomputer.hours
        # The unplaced pool has conflicts by the hour and no minutes of its own.
        if slice_.pool == UNPLACED_POOL and slice_.kind == "minutes":
            self._queue.done(slice_, 0)
            return
        rows = await self._thread.call(lambda: write(slice_.pool, slice_.from_ms, slice_.to_ms, version))
        await self._barrier("written")
        took = _clock_ms() - started
        self._queue.done(slice_, took)
        self._stats.slices += 1
        self._stats.rows += rows
        self._stats.busy_ms += took
        if slice_.kind == "minutes":
            self._stats.last_live_ms = took

    async def _finish(self) -> None:
        finished = self._queue.finished()
        for handle, partition in finished:
            if self._consumer.holds(handle.event.message):
                handle.event.ack()
                self._stats.last_offset[partition] = handle.offset
        if finished:
            await self._barrier("acknowledged")
        self._stats.backlog_blocks, self._stats.backlog_minutes = self._queue.backlog()
        self._unrecorded |= {partition: handle for handle, partition in finished}
        if self._unrecorded and time.monotonic() >= self._progress_at:
            # Once a second; what is not written now is written later, also when no more marks come.
            self._progress_at = time.monotonic() + 1
            last, self._unrecorded = self._unrecorded, {}
            try:
                await self._thread.call(lambda: self._record_progress(last))
            except Exception as error:
                self._unrecorded = last | self._unrecorded
                log.warning("progress of the dirty topic not stored: %s", error)

    def _record_progress(self, last: dict[int, _Handle]) -> None:
        rows = pa.table(
            {
                "topic": pa.array(["dirty"] * len(last), type=pa.string()),
                "partition": pa.array(list(last), type=pa.uint32()),
                "appended_ms": pa.array([handle.timestamp_ms for handle in last.values()], type=pa.int64()),
                "offset": pa.array([handle.offset for handle in last.values()], type=pa.int64()),
            }
        )
        self._store.insert("progress", rows)


def _clock_ms() -> int:
    return time.monotonic_ns() // 1_000_000


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        pass
