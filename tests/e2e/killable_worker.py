"""The worker as `gpuledger worker run` runs it, but it kills itself (SIGKILL) at a chosen point.

Started as ``python -m tests.e2e.killable_worker DATADIR [AGENT POINT PASSAGE]``; configured by its environment. A
passage of 0 kills at the first one after the file DATADIR.armed is there.
Points are those of the agents' barriers ("stored", "marked", "before_read", "written") and two inside a slice of the
ledger: "read" (computed, nothing written) and "torn" (some of its tables written). Only passages that have data behind
them count: a block of ticks, or a slice of a minute without fragments, would prove nothing.
"""

from __future__ import annotations

import functools
import logging
import os
import signal
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa

from gpuledger.finance.rates import Rates
from gpuledger.schemas.config import load_config
from gpuledger.streams import app
from gpuledger.streams.intake import Barrier
from gpuledger.streams.ledger_rows import Fingerprints
from gpuledger.streams.recompute import Ledger
from gpuledger.streams.recomputer import Recomputer
from gpuledger.streams.store import Store
from gpuledger.streams.worker import run_worker

# A killed member holds up its group for this long; the broker allows no less.
_SESSION_TIMEOUT_S = 6


class _Fuse:
    """Counts passages of the chosen point and kills the process at the wanted one."""

    def __init__(self, agent: str, point: str, passage: int, armed: Path) -> None:
        self.agent, self.point, self.passage, self.armed = agent, point, passage, armed
        self._passed = 0
        self._stored: Counter[str] = Counter()

    def barrier(self, agent: str) -> Barrier:
        async def wait(name: str) -> None:
            if (agent, name) == (self.agent, self.point) and self._has_data(agent):
                self.burn()

        return wait

    def _has_data(self, agent: str) -> bool:
        table = {"telemetry": "fragments", "dirty": "ledger_gpu_minute"}.get(agent, "facts")
        return self.point == "before_read" or self._stored.pop(table, 0) > 0

    def burn(self) -> None:
        self._passed += 1
        if self._passed == self.passage or (self.passage == 0 and self.armed.exists()):
            logging.warning("kills itself: %s %s, passage %d", self.agent, self.point, self._passed)
            os.kill(os.getpid(), signal.SIGKILL)

    def lay(self) -> None:
        """Into the two places that no barrier reaches, and into the store, to know what a passage has behind it."""
        insert = Store.insert
        compute = Recomputer.compute

        fuse = self

        def noted_insert(self: Store, table: str, rows: pa.Table) -> None:
            if (fuse.agent, fuse.point) == ("dirty", "torn") and table == "ledger_gpu_hour" and rows.num_rows > 2:
                fuse.burn()
            insert(self, table, rows)
            fuse.note(table, rows.num_rows)

        def noted_compute(self: Recomputer, pool: str, from_ms: int, to_ms: int) -> tuple[Ledger, Fingerprints, Rates]:
            found = compute(self, pool, from_ms, to_ms)
            if (fuse.agent, fuse.point) == ("dirty", "read") and found[1].fragments.sum() > 0:
                fuse.burn()
            return found

        Store.insert = noted_insert
        Recomputer.compute = noted_compute

    def note(self, table: str, rows: int) -> None:
        self._stored[table] += rows


def main(datadir: str, agent: str = "", point: str = "", passage: str = "0") -> None:
    """Runs until SIGTERM or until the fuse burns."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    app.faust_settings = functools.partial(app.faust_settings, session_timeout_s=_SESSION_TIMEOUT_S)
    fuse = _Fuse(agent, point, int(passage), Path(f"{datadir}.armed"))
    fuse.lay()
    run_worker(load_config(None, os.environ), Path(datadir), fuse.barrier)


if __name__ == "__main__":
    main(*sys.argv[1:])
