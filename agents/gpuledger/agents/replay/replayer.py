"""Sends a replay: batches to the broker, with progress, exact totals and where the last message of each topic is.

A replay needs no spool: its source is the file. Run again after a failure, or just again, it changes nothing, for ids,
revisions and claim times are those of the trace.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

from gpuledger.agents.messages import Message, event_message
from gpuledger.agents.publisher import Delivered
from gpuledger.agents.replay.facts import Replay
from gpuledger.agents.replay.trace import UNPLACED_NODE
from gpuledger.schemas.events import Allocation, Commitment, Event, Inventory, Job, Transfer

__all__ = ["UNATTRIBUTED", "Progress", "Sent", "Sink", "Totals", "send"]

#: What the ledger calls the tenant of a job without an account.
UNATTRIBUTED = "unattributed"
BATCH = 2_000
#: Batches handed to the sink at one time: more only hold memory.
_IN_FLIGHT = 2


class Sink(Protocol):
    """Where messages go; `gpuledger.agents.publisher.Publisher` is one."""

    async def publish_many(self, messages: Iterable[Message], /) -> list[Delivered]:
        """Returns when all are acknowledged, one place per message, in their order."""
        ...


#: Called after each batch with the events acknowledged so far and those expected.
Progress = Callable[[int, int], None]


@dataclass(slots=True)
class Totals:
    """What was told, exactly. GPU time is in GPU-microseconds.

    `held_gpu_us` is by tenant as the trace names accounts; `unplaced_gpu_us` by job and contained in it. Allocations
    without an end are in `open_ended` and in no sum. `committed_gpu_us` is after transfers.
    """

    events: Counter[str] = field(default_factory=Counter[str])
    job_ids: set[str] = field(default_factory=set[str])
    gpus: int = 0
    held_gpu_us: Counter[str] = field(default_factory=Counter[str])
    unplaced_gpu_us: Counter[str] = field(default_factory=Counter[str])
    committed_gpu_us: Counter[str] = field(default_factory=Counter[str])
    pools: dict[str, int] = field(default_factory=dict[str, int])
    _open: set[str] = field(default_factory=set[str])

    @property
    def open_ended(self) -> int:
        return len(self._open)

    def counted(self, events: Iterable[Event]) -> Iterator[Event]:
        """The same events, each added on its way."""
        for event in events:
            self.add(event)
            yield event

    def add(self, event: Event) -> None:
        self.events[event.kind] += 1
        match event:
            case Allocation():
                self._allocation(event)
            case Job():
                self.job_ids.add(event.id)
            case Inventory():
                self.gpus += len(event.placements)
                for placement in event.placements:
                    self.pools.setdefault(placement.pool, placement.start_ms)
            case Commitment() if event.end_ms is not None:
                self.committed_gpu_us[event.tenant] += event.gpus * (event.end_ms - event.start_ms) * 1000
            case Transfer() if event.end_ms is not None:
                moved = event.gpus * (event.end_ms - event.start_ms) * 1000
                self.committed_gpu_us[event.from_tenant] -= moved
                self.committed_gpu_us[event.to_tenant] += moved
            case _:
                pass

    def _allocation(self, event: Allocation) -> None:
        if event.end_ms is None:
            # Told as it happened, the end follows under the same id.
            self._open.add(event.id)
        else:
            self._open.discard(event.id)
            # Weights are thousandths or whole, so the division is exact.
            gpu_us = (event.end_ms - event.start_ms) * 1000 * event.weight_num // event.weight_den
            self.held_gpu_us[event.account or UNATTRIBUTED] += gpu_us
            if event.gpu.startswith(f"{UNPLACED_NODE}/"):
                self.unplaced_gpu_us[event.job_id] += gpu_us


@dataclass(slots=True)
class Sent:
    """The end of a replay. `last_offsets`: (topic of the contract, partition) -> greatest offset of ours."""

    totals: Totals
    last_offsets: dict[tuple[str, int], int]
    seconds: float

    @property
    def events(self) -> int:
        return self.totals.events.total()

    @property
    def events_per_second(self) -> int:
        return round(self.events / self.seconds) if self.seconds > 0 else 0


async def send(replay: Replay, sink: Sink, progress: Progress | None = None, batch: int = BATCH) -> Sent:
    """Sends every event of `replay`; while a batch waits for its acknowledgement the next one is made and handed over.

    Raises:
        PublishError: the broker did not take a message; what was sent before stays, and sending all again is safe.
    """
    totals = Totals()
    last: dict[tuple[str, int], int] = {}
    expected = replay.expected
    started_s = time.monotonic()
    events = iter(replay.events())
    acknowledged = 0
    waiting: deque[tuple[list[Message], asyncio.Task[list[Delivered]]]] = deque()
    try:
        while True:
            messages = [event_message(event) for event in totals.counted(islice(events, batch))]
            if messages:
                waiting.append((messages, asyncio.create_task(sink.publish_many(messages))))
            if not waiting:
                return Sent(totals, last, time.monotonic() - started_s)
            if len(waiting) < _IN_FLIGHT and messages:
                continue
            given, task = waiting.popleft()
            _remember(last, given, await task)
            acknowledged += len(given)
            if progress is not None:
                progress(acknowledged, expected)
    finally:
        for _, task in waiting:
            task.cancel()
        await asyncio.gather(*(task for _, task in waiting), return_exceptions=True)


def _remember(last: dict[tuple[str, int], int], messages: Sequence[Message], places: Sequence[Delivered]) -> None:
    for message, place in zip(messages, places, strict=True):
        key = (message.topic, place.partition)
        last[key] = max(last.get(key, -1), place.offset)
