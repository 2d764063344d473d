"""The worker as `gpuledger worker run` runs it, but it kills or stops itself at a chosen point.

Started as ``python -m tests.e2e.killable_worker DATADIR [--orders FILE] …``; configured by its environment. A file of
orders may appear at any time: the first process that comes to its point takes it (by renaming it) and obeys. Points
are the agents' barriers and three inside a slice of the ledger: "before_read", "read" (computed, nothing written) and
"torn" (some of its tables written). Only passages that have data behind them count: a block of ticks, or a slice of
minutes without fragments, would prove nothing.
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from gpuledger.finance.rates import Rates
from gpuledger.schemas.config import load_config
from gpuledger.streams import app, intake, recomputer
from gpuledger.streams.blocks import Record
from gpuledger.streams.dirty import Pace
from gpuledger.streams.intake import Barrier, Stored
from gpuledger.streams.ledger_rows import Fingerprints, Version
from gpuledger.streams.recompute import Ledger
from gpuledger.streams.recomputer import Recomputer
from gpuledger.streams.sinks import FactsSink, Followup, TelemetrySink
from gpuledger.streams.store import Store
from gpuledger.streams.worker import run_worker
from tests.e2e.orders import Orders

log = logging.getLogger("tests.killable_worker")

# Their private parts are reached by the mistakes below.
_intake: Any = intake
_recomputer: Any = recomputer

# A killed member holds up its group for this long; a broker allows no less unless it is told to.
SESSION_TIMEOUT_S = 6


class Fuse:
    """Knows what each agent has in hand, and obeys the order that fits."""

    def __init__(self, orders: Orders) -> None:
        self._orders = orders
        #: Agent -> pools that its block in hand marks.
        self._marked: dict[str, set[str]] = {}
        #: The slice in hand that has fragments: pool, from, to.
        self._slice: tuple[str, int, int] | None = None
        #: What was written and not acknowledged yet.
        self._written: list[tuple[str, int, int]] = []

    def barrier(self, agent: str) -> Barrier:
        async def wait(name: str) -> None:
            if agent == "dirty":
                self._dirty(name)
                return
            pools = self._marked.get(agent)
            if pools:
                self.come(agent, name, pools)
            if name == "acknowledged":
                self._marked.pop(agent, None)

        return wait

    def _dirty(self, name: str) -> None:
        if name == "written" and self._slice is not None:
            self._written.append(self._slice)
            self.slice("written", *self._slice)
            self._slice = None
        elif name == "acknowledged":
            for written in self._written:
                self.slice("acknowledged", *written)
            self._written.clear()

    def slice(self, point: str, pool: str, from_ms: int, to_ms: int) -> None:
        """A point of the dirty agent, for these minutes of this pool."""
        self.come("dirty", point, {pool}, from_ms, to_ms)

    def come(self, agent: str, point: str, pools: set[str], from_ms: int = 0, to_ms: int = 1 << 62) -> None:
        """The process is at this point with data of these pools and minutes in hand."""
        order = self._orders.look()
        if order is None or (order.agent, order.point) != (agent, point):
            return
        if (order.pool and order.pool not in pools) or not from_ms <= (order.minute_ms or from_ms) < to_ms:
            return
        if self._orders.take():
            log.warning("obeys: %s", order)
            os.kill(os.getpid(), signal.SIGKILL if order.action == "kill" else signal.SIGSTOP)
            log.warning("goes on: %s", order)

    def lay(self) -> None:
        """Into the places that no barrier reaches, and into the sinks, to know what a passage has behind it."""
        insert = Store.insert
        compute = Recomputer.compute
        fuse = self

        def noted_insert(self: Store, table: str, rows: pa.Table) -> None:
            if table == "ledger_gpu_hour" and fuse._slice is not None:
                fuse.slice("torn", *fuse._slice)
            insert(self, table, rows)

        def noted_compute(
            self: Recomputer, pool: str, from_ms: int, to_ms: int, *rest: Any, **more: Any
        ) -> tuple[Ledger, Fingerprints, Rates]:
            hours = to_ms % 3_600_000 == 0
            if hours:  # of a slice of the open hour, which has no whole end, nobody here wants to know
                fuse.slice("before_read", pool, from_ms, to_ms)
            found = compute(self, pool, from_ms, to_ms, *rest, **more)
            fuse._slice = (pool, from_ms, to_ms) if hours and found[1].fragments.sum() > 0 else None
            if fuse._slice is not None:
                fuse.slice("read", pool, from_ms, to_ms)
            return found

        Store.insert = noted_insert
        Recomputer.compute = noted_compute
        facts_store, prepare = FactsSink.store, TelemetrySink.prepare

        def noted_store(self: FactsSink, records: Sequence[Record]) -> Stored[Followup]:
            return fuse._noted(self, facts_store(self, records))

        def noted_prepare(self: TelemetrySink, records: Sequence[Record]) -> Callable[[], Stored[Followup]]:
            step = prepare(self, records)
            return lambda: fuse._noted(self, step())

        FactsSink.store = noted_store
        TelemetrySink.prepare = noted_prepare

    def _noted(self, sink: Any, stored: Stored[Followup]) -> Stored[Followup]:
        self._marked.setdefault(sink._topic, set()).update(stored.marks.marks.merged())
        return stored


def main(argv: Sequence[str] | None = None) -> None:
    """Runs until SIGTERM or until an order says otherwise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("datadir", type=Path)
    parser.add_argument("--orders", type=Path, help="default: DATADIR.orders")
    parser.add_argument("--session-timeout", type=int, default=SESSION_TIMEOUT_S, metavar="SECONDS")
    parser.add_argument("--settle", type=int, metavar="MS", help="older minutes wait for company for so long")
    parser.add_argument("--wrong", choices=sorted(_WRONG), help="a mistake, to show that it is noticed")
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    app.faust_settings = functools.partial(app.faust_settings, session_timeout_s=given.session_timeout)
    if given.settle is not None:
        waits = {"settle_ms": given.settle, "patience_ms": 4 * given.settle, "open_every_ms": 3 * given.settle}
        app.Pace = functools.partial(Pace, **waits, open_share=4)
    fuse = Fuse(Orders(given.orders or Path(f"{given.datadir}.orders")))
    fuse.lay()
    if given.wrong:
        _WRONG[given.wrong]()
    run_worker(load_config(None, os.environ), given.datadir, fuse.barrier)


def _commit_first() -> None:
    """Offsets are committed before the block is stored: the order that the design forbids."""
    take_through = _intake._Intake._take_through

    async def wrong(self: Any, *block: Any) -> None:
        self._acknowledge()
        while await self._consumer.maybe_wait_for_commit_to_finish():
            pass  # that one began before ours was acknowledged, and Faust would take it for ours
        await self._consumer.commit()
        await take_through(self, *block)

    _intake._Intake._take_through = wrong


def _late_version() -> None:
    """A version is taken when rows are written instead of before the first read."""
    insert = _recomputer.Recomputer._insert

    def wrong(self: Any, table: str, column: str, rows: pa.Table, version: Version, **rest: bool) -> int:
        return insert(self, table, column, rows, replace(version, offset=time.time_ns() // 1_000_000), **rest)

    _recomputer.Recomputer._insert = wrong


_WRONG = {"commit-first": _commit_first, "late-version": _late_version}

if __name__ == "__main__":
    main()
