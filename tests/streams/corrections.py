"""Corrections of a small ledger: one GPU, and the real sinks through which late telemetry and corrected facts come."""

from __future__ import annotations

import uuid
from typing import Any

import msgspec

from gpuledger.agents.batch import encode_batch
from gpuledger.schemas.events import Allocation, Dirty, Event, Geometry, Inventory, Placement, encode_event
from gpuledger.schemas.telemetry import BatchHeader, Device
from gpuledger.streams.blocks import Record
from gpuledger.streams.intake import Stored
from gpuledger.streams.marks import MINUTE_MS
from gpuledger.streams.sinks import FactsSink, Followup, TelemetrySink
from tests.streams.small_ledger import END_MS, H100, RULES, START_MS, SmallLedger, allocation, minute

__all__ = ["NOW_MS", "Minutes", "Subject", "revised"]

#: When corrections come: everything in the ledger is complete by then.
NOW_MS = END_MS + 20 * MINUTE_MS

Minutes = set[tuple[str, int]]


async def unsent(event: Dirty) -> None:
    pass


class Subject:
    """A GPU in pool h100 on a node of its own, and the sinks through which it is corrected, as the worker has them.

    Corrections return what they mark: (pool, minute) of the ledger's three hours. `now_ms`: when the broker gets them.
    """

    def __init__(self, ledger: SmallLedger, now_ms: int = NOW_MS) -> None:
        self.ledger = ledger
        self.now_ms = now_ms
        self.gpu = f"gpu-{uuid.uuid4().hex[:8]}"
        self.node = f"node-{self.gpu}"
        self.telemetry = TelemetrySink(ledger.store, unsent, RULES)
        self.offset = 0
        self.inventory(self.placement("p", H100, 0))

    # -- facts about it

    def placement(self, id_: str, pool: str, start: int, **fields: Any) -> Placement:
        plain = Placement(
            id=f"{id_}-{self.gpu}",
            revision=1,
            claimed_at_ms=NOW_MS,
            gpu=self.gpu,
            node=self.node,
            pool=pool,
            start_ms=minute(start),
        )
        return msgspec.structs.replace(plain, **fields)

    def job(self, start: int, end: int | None, **fields: Any) -> Allocation:
        """The first revision of an allocation of nord on the GPU."""
        names = {"node": self.node, "job_id": f"job-{self.gpu}"}
        return msgspec.structs.replace(allocation(f"a-{self.gpu}", self.gpu, "nord", start, end), **(names | fields))

    # -- what comes in

    def inventory(self, *facts: Placement | Geometry) -> Minutes:
        placements = [fact for fact in facts if isinstance(fact, Placement)]
        geometries = [fact for fact in facts if isinstance(fact, Geometry)]
        return self.facts(
            "inventory",
            Inventory(node=self.node, claimed_at_ms=NOW_MS, placements=placements, geometries=geometries),
        )

    def facts(self, topic: str, *events: Event) -> Minutes:
        sink = FactsSink(self.ledger.store, topic, unsent, RULES.ahead_ms)
        return _marked(sink.store([self._record(topic, encode_event(event)) for event in events]))

    def seen(self, at: int, seconds: int = 50, boot: tuple[str, int] = ("boot", -120), **fields: Any) -> Minutes:
        """A batch that saw the GPU active during the `seconds` before the end of minute `at`; a boot's start is a
        minute, too."""
        end_ms = minute(at + 1)
        header = BatchHeader(
            node=self.node,
            boot_id=boot[0],
            boot_start_ms=minute(boot[1]) + 15_000,
            run_id=f"run-{boot[0]}",
            run_start_ms=START_MS,
            seq=self.offset,
            period_ms=10_000,
            anchor_wall_ms=0,
            anchor_boottime_ms=0,
            devices=[Device(fields.pop("gpu", self.gpu), 0, end_ms - seconds * 1000, 1_000)],
            **fields,
        )
        times = [end_ms - 10_000 * step for step in reversed(range(seconds // 10))]
        energies = [1_000_000 + at_ms - START_MS for at_ms in times]
        rows = {"ts_ms": times, "device": [0] * len(times), "sm_active": [0.9] * len(times), "energy_mj": energies}
        message = encode_batch(header, rows)
        return _marked(self.telemetry.store([self._record("telemetry", message.value, tuple(message.headers))]))

    def _record(self, topic: str, value: bytes, headers: tuple[Any, ...] = ()) -> Record:
        self.offset += 1
        return Record(topic, 0, self.offset, self.now_ms, b"k", value, headers)


def _marked(stored: Stored[Followup]) -> Minutes:
    assert not stored.rejected, stored.rejected
    return {
        (pool, (at - START_MS) // MINUTE_MS)
        for pool, ranges in stored.marks.marks.merged().items()
        for start, end in ranges.clip(START_MS, END_MS)
        for at in range(start, end, MINUTE_MS)
    }


def revised(fact: Any, **fields: Any) -> Any:
    """The next revision of a fact."""
    return msgspec.structs.replace(fact, revision=fact.revision + 1, **fields)
