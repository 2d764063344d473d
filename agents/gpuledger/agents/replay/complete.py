"""When is what was sent in the ledger? First every fact is stored, then every mark it caused has been worked off.

The second is asked with a mark of our own per pool, behind all others: once a worker has got to it, nothing before it
is left. Nothing is read from Kafka, and waiting changes no figure.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from gpuledger.agents.messages import event_message
from gpuledger.agents.replay.exceptions import LedgerTimeout
from gpuledger.agents.replay.replayer import Sent, Sink
from gpuledger.schemas.events import Dirty

__all__ = ["Offsets", "QueryClient", "read_progress", "wait_for_ledger"]

#: (topic of the contract, partition) -> offset.
Offsets = Mapping[tuple[str, int], int]

_MINUTE_MS = 60_000


class QueryClient(Protocol):
    """The part of a clickhouse-connect client that is needed."""

    def query(self, query: str, /) -> Any: ...


def read_progress(client: QueryClient) -> dict[tuple[str, int], int]:
    """How far each partition is stored (and, for `dirty`, worked off)."""
    rows = client.query("SELECT topic, partition, offset FROM v_progress").result_rows
    return {(str(topic), int(partition)): int(offset) for topic, partition, offset in rows}


async def wait_for_ledger(
    client: QueryClient,
    sent: Sent,
    sink: Sink,
    timeout_s: float = 1200.0,
    poll_s: float = 0.5,
    waiting: Callable[[str, int], None] | None = None,
) -> float:
    """Returns the seconds it took until the ledger holds all that `sent` told.

    `waiting` is called at each look with what is waited for and how many messages are still before it. Queries run in
    a thread, one at a time.

    Raises:
        LedgerTimeout: not within `timeout_s`.
        PublishError: the marks could not be sent.
    """
    started_s = time.monotonic()
    deadline_s = started_s + timeout_s
    await _until(client, sent.last_offsets, "facts to be stored", deadline_s, poll_s, waiting)
    marks = [
        Dirty(pool=pool, from_ms=at_ms, to_ms=at_ms + _MINUTE_MS, why="replay: is all before this done?")
        for pool, at_ms in sorted(sent.totals.pools.items())
    ]
    places = await sink.publish_many([event_message(mark) for mark in marks])
    ends: dict[tuple[str, int], int] = {}
    for place in places:
        ends["dirty", place.partition] = max(ends.get(("dirty", place.partition), -1), place.offset)
    await _until(client, ends, "minutes to be computed", deadline_s, poll_s, waiting)
    return time.monotonic() - started_s


async def _until(
    client: QueryClient,
    target: Offsets,
    what: str,
    deadline_s: float,
    poll_s: float,
    waiting: Callable[[str, int], None] | None,
) -> None:
    while True:
        reached = await asyncio.to_thread(read_progress, client)
        behind = {key: offset - reached.get(key, -1) for key, offset in target.items() if reached.get(key, -1) < offset}
        if waiting is not None:
            waiting(what, sum(behind.values()))
        if not behind:
            return
        if time.monotonic() >= deadline_s:
            left = ", ".join(f"{topic}/{partition}: {n} behind" for (topic, partition), n in sorted(behind.items()))
            raise LedgerTimeout(f"gave up waiting for {what} ({left}); is a worker running? `gpuledger status` shows")
        await asyncio.sleep(poll_s)
