"""The one safe way for a Faust agent to consume: store, then mark, then acknowledge, in strict offset order.

A crash at any point makes the records come again, and storing them again writes the same rows. Bad records are
searched out and dead-lettered, a database or broker that is away is waited for, and nothing is lost in between.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, NoReturn, Protocol, TypeVar, cast, runtime_checkable

from gpuledger.streams.blocking import BlockingThread
from gpuledger.streams.blocks import BlockConsumer, Record, RecordBlock
from gpuledger.streams.exceptions import DataError, IntakeSetupError
from gpuledger.streams.letters import printable

__all__ = [
    "Barrier",
    "DeadLetter",
    "IntakeLimits",
    "IntakeStats",
    "PreparingSink",
    "Rejected",
    "Sink",
    "Step",
    "Stored",
    "intake",
    "is_connection_error",
    "no_barrier",
]

_log = logging.getLogger(__name__)

M = TypeVar("M")

#: `await barrier("stored")` runs between store and marks, `await barrier("marked")` between marks and acknowledgement,
#: `await barrier("acknowledged")` before the offsets are committed; fault tests stop or kill the process there.
Barrier = Callable[[str], Awaitable[None]]

#: Sends one record with the reason to the dead-letter topic; returns when the broker has acknowledged it.
DeadLetter = Callable[[Record, str], Awaitable[None]]

#: Dead letters on their way at the same time, and of these so many appear in the log.
_LETTERS_AT_ONCE = 100
_LETTERS_LOGGED = 5


class Rejected(NamedTuple):
    """A record that the sink could not keep, and why."""

    record: Record
    reason: str


@dataclass(frozen=True, slots=True)
class Stored(Generic[M]):
    """What a sink reports: what `after` has to send, and the records of the block it did not store."""

    marks: M
    rejected: Sequence[Rejected] = ()


#: Stores the records it was made for; may be called again.
Step = Callable[[], Stored[M]]


class Sink(Protocol[M]):
    """Where the records of an agent go."""

    def store(self, records: Sequence[Record]) -> Stored[M]:
        """Store all records, or raise; runs in a thread, blocks, and writes the same rows when called again.

        A record that is `unreadable` has nothing to store and is returned as rejected. Any error that the intake's
        `is_io_error` does not know is taken as the fault of one of the records.
        """
        ...

    async def after(self, stored: Stored[M]) -> None:
        """Send what follows from the stored rows (dirty marks) and return when the broker has acknowledged it."""
        ...


@runtime_checkable
class PreparingSink(Sink[M], Protocol[M]):
    """A sink with work to do before it needs the database: of the next block, while the database has this one."""

    def prepare(self, records: Sequence[Record]) -> Step[M]:
        """Does what needs nothing but the records, and returns the rest of `store`.

        Runs in a thread of its own, one call at a time.
        """
        ...


@dataclass(frozen=True, slots=True)
class IntakeLimits:
    """When a merged block is full, and how patience runs out.

    A merged block holds whole Kafka blocks, so it may pass its limits by less than one of them.
    """

    max_records: int = 2_000
    #: A block costs the database about the same ten to twenty calls and files, however many messages it holds.
    max_bytes: int = 32 * 1024 * 1024
    linger_ms: int = 200
    #: A block that takes long to store is waited for longer, so many times as long, for fewer and fuller ones.
    linger_share: int = 2
    linger_most_ms: int = 1_000
    backoff_first_ms: int = 100
    backoff_max_ms: int = 30_000
    #: SIGTERM waits this long for the block in flight; Faust itself needs up to two seconds of the ten we promise.
    drain_ms: int = 6_000
    #: So many single records in a row failing alike is a fault of ours, not of the data: wait, don't dead-letter all.
    systemic_after: int = 20


@dataclass(slots=True)
class IntakeStats:
    """Counters of one agent since its start, for /metrics; `last_offset` is the last acknowledged per partition."""

    records: int = 0
    bytes: int = 0
    blocks: int = 0
    stored: int = 0
    retries: int = 0
    dead_letters: int = 0
    dropped: int = 0
    store_us: int = 0
    in_flight_records: int = 0
    last_error: str | None = None
    last_offset: dict[tuple[str, int], int] = field(default_factory=dict[tuple[str, int], int])


def is_connection_error(exc: Exception) -> bool:
    """The default for `is_io_error`: the other side is away or slow. Callers add their client's own errors."""
    return isinstance(exc, (ConnectionError, TimeoutError, asyncio.TimeoutError))


async def no_barrier(name: str) -> None:
    """The default barrier: nothing waits."""


async def intake(
    stream: Any,
    *,
    sink: Sink[M],
    dead_letter: DeadLetter,
    is_io_error: Callable[[Exception], bool] = is_connection_error,
    limits: IntakeLimits = IntakeLimits(),
    stats: IntakeStats | None = None,
    barrier: Barrier = no_barrier,
) -> None:
    """Consume the stream of a Faust agent on a block topic until the worker stops.

    Blocks are merged across partitions by size or time; one merged block is in flight while the next is gathered and
    prepared.
    Errors of `is_io_error` are retried for ever with growing pauses, any other error of `store` is searched down to
    the records that cause it; `after` and `dead_letter` are retried whatever they raise. On shutdown the block in
    flight is finished within `limits.drain_ms`, the rest is left for the next worker.

    Raises IntakeSetupError when the app does not consume in blocks, or waits for empty streams on shutdown.
    """
    app = stream.app
    consumer = app.consumer
    if not isinstance(consumer, BlockConsumer):
        raise IntakeSetupError("intake needs a topic from block_topic(); this app has Faust's stock consumer")
    if app.conf.stream_wait_empty:
        raise IntakeSetupError("stream_wait_empty: must be False, or SIGTERM hangs; use faust_settings()")
    run = _Intake(consumer, sink, dead_letter, is_io_error, limits, stats or IntakeStats(), barrier)
    await run.run(stream)


class _Abandoned(Exception):
    """The merged block is left to whoever gets its partitions next: they were revoked, or this worker stops."""


class _Systemic(Exception):
    """Single records fail one after the other and none succeeds."""


class _Pending(NamedTuple):
    event: Any
    records: Sequence[Record]
    size_bytes: int
    arrived_s: float


class _Merged(NamedTuple, Generic[M]):
    """Blocks to be taken through together. `step` is None where it has to be made when it is their turn."""

    blocks: list[_Pending]
    records: list[Record]
    step: Step[M] | None

    @classmethod
    def of(cls, blocks: list[_Pending]) -> _Merged[M]:
        return cls(blocks, [record for block in blocks for record in block.records], None)


class _Intake(Generic[M]):
    """One running agent: a reader that gathers blocks, a preparer that merges them and works one ahead, and a flusher
    that takes merged blocks through the order."""

    def __init__(
        self,
        consumer: BlockConsumer,
        sink: Sink[M],
        dead_letter: DeadLetter,
        is_io_error: Callable[[Exception], bool],
        limits: IntakeLimits,
        stats: IntakeStats,
        barrier: Barrier,
    ) -> None:
        self._consumer = consumer
        self._sink = sink
        self._dead_letter = dead_letter
        self._is_io_error = is_io_error
        self._limits = limits
        self._stats = stats
        self._barrier = barrier
        self._pending: deque[_Pending] = deque()
        self._pending_records = 0
        self._pending_bytes = 0
        self._arrived = asyncio.Event()
        self._taken = asyncio.Event()
        self._ahead = asyncio.Semaphore(1)
        self._prepared: asyncio.Queue[_Merged[M]] = asyncio.Queue()
        self._merged: list[_Pending] = []
        self._stored_ms = 0.0
        self._stopping = asyncio.Event()
        self._thread = BlockingThread(f"store-{type(sink).__name__}")
        self._prepares = BlockingThread(f"prepare-{type(sink).__name__}")

    async def run(self, stream: Any) -> None:
        reader = asyncio.create_task(self._read(stream))
        preparer = asyncio.create_task(self._prepare())
        flusher = asyncio.create_task(self._flush())
        try:
            done, _ = await asyncio.wait({reader, preparer, flusher}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            reader.cancel()
            preparer.cancel()
            await self._drain(flusher)
            self._prepares.close()
            self._thread.close()

    # -- gathering

    async def _read(self, stream: Any) -> None:
        async for event in stream.noack().events():
            records: RecordBlock = event.value
            self._pending.append(_Pending(event, records, records.size_bytes, time.monotonic()))
            self._pending_records += len(records)
            self._pending_bytes += records.size_bytes
            self._stats.records += len(records)
            self._stats.bytes += records.value_bytes
            self._arrived.set()
            while self._full():
                self._taken.clear()
                await self._taken.wait()

    def _full(self) -> bool:
        return self._pending_records >= self._limits.max_records or self._pending_bytes >= self._limits.max_bytes

    async def _gathered(self) -> list[_Pending]:
        """Wait for a full block, or for what came within the linger time of its first record."""
        while not self._pending:
            self._arrived.clear()
            await self._arrived.wait()
        deadline_s = self._pending[0].arrived_s + self._linger_s()
        while not self._full() and (left_s := deadline_s - time.monotonic()) > 0:
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), timeout=left_s)
            except TimeoutError:
                break
        taken = list(self._pending)
        self._pending.clear()
        self._pending_records = self._pending_bytes = 0
        self._taken.set()
        return self._still_held(taken)

    def _linger_s(self) -> float:
        limits = self._limits
        longer_ms = min(limits.linger_most_ms, limits.linger_share * self._stored_ms)
        return max(limits.linger_ms, longer_ms) / 1000

    def _still_held(self, blocks: Sequence[_Pending]) -> list[_Pending]:
        held = [block for block in blocks if self._consumer.holds(block.event.message)]
        self._stats.dropped += sum(len(block.records) for block in blocks) - sum(len(block.records) for block in held)
        return held

    # -- one ahead

    async def _prepare(self) -> NoReturn:
        while True:
            await self._ahead.acquire()
            while not (blocks := await self._gathered()):
                pass  # all that was gathered has gone to other workers
            merged = _Merged[M].of(blocks)
            try:
                merged = merged._replace(step=await self._step(merged.records))
            except Exception:
                # It is met again when it is the block's turn, and there it is known what to do about it.
                _log.debug("a block could not be prepared", exc_info=True)
            self._prepared.put_nowait(merged)

    async def _step(self, records: Sequence[Record]) -> Step[M]:
        """What stores the records, prepared as far as the sink can."""
        sink = self._sink
        if isinstance(sink, PreparingSink):
            return await self._prepares.call(lambda: sink.prepare(records))
        return lambda: sink.store(records)

    async def _next(self) -> _Merged[M]:
        """What was prepared, without the blocks whose partitions have gone meanwhile."""
        merged = await self._prepared.get()
        self._ahead.release()
        held = self._still_held(merged.blocks)
        return merged if len(held) == len(merged.blocks) else _Merged[M].of(held)

    # -- the order: store, marks, dead letters, acknowledgement

    async def _flush(self) -> None:
        while not self._stopping.is_set():
            self._merged, records, step = await self._next()
            if not self._merged:
                continue
            began_s = time.monotonic()
            self._stats.blocks += 1
            self._stats.in_flight_records = len(records)
            try:
                await self._take_through(records, step)
            except _Abandoned:
                self._stats.dropped += len(records)
                _log.info("left a block of %d records to the next owner of its partitions", len(records))
            self._stored_ms = (time.monotonic() - began_s) * 1000
            self._stats.in_flight_records = 0
            self._merged = []

    async def _take_through(self, records: Sequence[Record], step: Step[M] | None) -> None:
        stored, rejected = await self._store(records, step)
        await self._barrier("stored")
        for piece in stored:
            await self._persist("marks", lambda piece=piece: self._sink.after(piece))
        for start in range(0, len(rejected), _LETTERS_AT_ONCE):
            await self._bury(rejected[start : start + _LETTERS_AT_ONCE])
        await self._barrier("marked")
        self._stats.stored += len(records) - len(rejected)
        self._acknowledge()
        await self._barrier("acknowledged")

    async def _bury(self, rejected: Sequence[Rejected]) -> None:
        """Sends dead letters, all at once; a sender of rubbish must not make the log its own."""
        for record, reason in rejected[:_LETTERS_LOGGED]:
            where = f"{record.topic}/{record.partition} offset {record.first_offset}"
            _log.warning("dead letter: %s: %s", where, printable(reason))
        if len(rejected) > _LETTERS_LOGGED:
            _log.warning("and %d more dead letters of the same block", len(rejected) - _LETTERS_LOGGED)
        sends = [self._persist("dead letter", lambda r=r, why=why: self._dead_letter(r, why)) for r, why in rejected]
        await _all(sends)
        self._stats.dead_letters += len(rejected)

    def _acknowledge(self) -> None:
        for block in self._still_held(self._merged):
            block.event.ack()
            last = block.records[-1]
            self._stats.last_offset[last.topic, last.partition] = last.offset

    async def _store(self, records: Sequence[Record], step: Step[M] | None) -> tuple[list[Stored[M]], list[Rejected]]:
        attempt = 0
        while True:
            try:
                return await self._store_bisecting(records, step)
            except _Systemic as exc:
                await self._pause("store", attempt, cast(Exception, exc.__cause__))
                attempt += 1

    async def _store_bisecting(
        self, records: Sequence[Record], step: Step[M] | None
    ) -> tuple[list[Stored[M]], list[Rejected]]:
        """Store everything but the records that cannot be stored, halving what fails until single ones are left."""
        stored: list[Stored[M]] = []
        rejected: list[Rejected] = []
        parts = [(records, step)]
        while parts:
            part, step = parts.pop()
            try:
                piece = await self._store_retrying(step or await self._step(part))
            except _Abandoned:
                raise
            except Exception as exc:
                if len(part) > 1:
                    middle = len(part) // 2
                    parts += [(part[middle:], None), (part[:middle], None)]  # the earlier half comes off first
                    continue
                rejected.append(Rejected(part[0], _reason(exc)))
                if not (stored or isinstance(exc, DataError)) and len(rejected) >= self._limits.systemic_after:
                    raise _Systemic from exc
            else:
                stored.append(piece)
                rejected.extend(piece.rejected)
        return stored, rejected

    async def _store_retrying(self, step: Step[M]) -> Stored[M]:
        attempt = 0
        while True:
            started_ns = time.monotonic_ns()
            try:
                return await self._thread.call(step)
            except Exception as exc:
                if not self._is_io_error(exc):
                    raise
                error = exc
            finally:
                self._stats.store_us += (time.monotonic_ns() - started_ns) // 1000
            await self._pause("store", attempt, error)
            attempt += 1

    async def _persist(self, what: str, action: Callable[[], Awaitable[None]]) -> None:
        attempt = 0
        while True:
            try:
                return await action()
            except Exception as exc:
                error = exc
            await self._pause(what, attempt, error)
            attempt += 1

    async def _pause(self, what: str, attempt: int, error: Exception) -> None:
        """Wait before another attempt; raises _Abandoned when that is not for this worker any more."""
        self._stats.retries += 1
        self._stats.last_error = f"{what}: {_reason(error)}"
        longest_ms = min(self._limits.backoff_max_ms, self._limits.backoff_first_ms << min(attempt, 20))
        pause_ms = random.randint(longest_ms // 2, longest_ms)
        _log.warning("%s failed (attempt %d), again in %d ms: %s", what, attempt + 1, pause_ms, _reason(error))
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), timeout=pause_ms / 1000)
        if self._stopping.is_set() or not any(self._consumer.holds(block.event.message) for block in self._merged):
            raise _Abandoned

    # -- the end

    async def _drain(self, flusher: asyncio.Task[NoReturn] | asyncio.Task[None]) -> None:
        """Let the block in flight be acknowledged; Faust cancels an agent more than once while it stops."""
        self._stopping.set()
        deadline_s = time.monotonic() + self._limits.drain_ms / 1000
        if not self._merged:
            flusher.cancel()
        while not flusher.done() and (left_s := deadline_s - time.monotonic()) > 0:
            try:
                await asyncio.wait({flusher}, timeout=left_s)
            except asyncio.CancelledError:
                continue
        if not flusher.done():
            _log.warning(
                "gave up a block of %d records after %d ms; they will be redelivered",
                self._stats.in_flight_records,
                self._limits.drain_ms,
            )
            flusher.cancel()


async def _all(waits: Sequence[Awaitable[None]]) -> None:
    """Waits for all of them; the first error is raised when none is under way any more."""
    results = await asyncio.gather(*waits, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result


def _reason(exc: BaseException) -> str:
    return str(exc) if isinstance(exc, DataError) else f"{type(exc).__name__}: {exc}"
