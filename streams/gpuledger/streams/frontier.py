"""How far time is complete: ticks for idle partitions, marks for every minute the frontier passes and for the open one.

Runs on the one worker that holds partition 0 of the dirty topic. The frontier is the smallest append time that every
partition of the gating topics has stored, less the grace; it never moves back.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import pyarrow as pa

from gpuledger.schemas.events import Dirty
from gpuledger.streams.blocking import BlockingThread
from gpuledger.streams.marks import MINUTE_MS
from gpuledger.streams.recomputer import LedgerRules
from gpuledger.streams.store import Store

__all__ = ["Frontier", "FrontierStats"]

log = logging.getLogger(__name__)

_NAME = "complete"


@dataclass(slots=True)
class FrontierStats:
    """For /metrics and `status`, UTC milliseconds; 0 until the first pass."""

    complete_until_ms: int = 0
    passes: int = 0
    failures: int = 0


class Frontier:
    """One pass per second by a timer of the app."""

    def __init__(self, store: Store, rules: LedgerRules, send: Callable[[Dirty], Awaitable[None]]) -> None:
        self._store = store
        self._rules = rules
        self._send = send
        self._thread = BlockingThread("frontier")
        self.stats = FrontierStats()

    async def advance(self, now_ms: int) -> None:
        """Marks what has become complete since the last pass, and the open minute; errors are counted and logged."""
        try:
            marked, complete, extents = await self._thread.call(self._look)
            open_minute = now_ms // MINUTE_MS * MINUTE_MS
            ranges = [(marked, complete, "complete"), (open_minute, open_minute + MINUTE_MS, "open")]
            marks = [
                Dirty(pool=pool, from_ms=max(start, from_ms), to_ms=min(end, to_ms), why=why)
                for pool, (start, end) in extents.items()
                for from_ms, to_ms, why in ranges
                if max(start, from_ms) < min(end, to_ms)
            ]
            await asyncio.gather(*(self._send(mark) for mark in marks))
            if complete > marked:
                await self._thread.call(lambda: self._remember(complete))
            self.stats.complete_until_ms = max(self.stats.complete_until_ms, complete)
            self.stats.passes += 1
        except Exception as error:
            self.stats.failures += 1
            log.warning("the frontier did not move: %s", error)

    def _look(self) -> tuple[int, int, dict[str, tuple[int, int]]]:
        rows = self._store.rows("SELECT max(marked_until_ms) FROM frontier WHERE name = {name:String}", {"name": _NAME})
        marked = int(rows[0][0]) if rows and rows[0][0] else 0
        stored_until_ms = self._store.stored_until_ms(self._rules.gates)
        complete = max(marked, self._rules.complete_until_ms(stored_until_ms))
        return marked, complete, self._store.extents()

    def _remember(self, complete_ms: int) -> None:
        row = {"name": pa.array([_NAME]), "marked_until_ms": pa.array([complete_ms], type=pa.int64())}
        self._store.insert("frontier", pa.table(row))
