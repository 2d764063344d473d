"""Where the records of each topic go: telemetry to fragments, events to facts, and both to dirty marks.

`store` runs in the intake's thread and may be repeated; what it returns is looked up after the rows are stored, never
before, so that a fact stored meanwhile by another worker is not missed.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from gpuledger.schemas.events import (
    Alert,
    Allocation,
    Dirty,
    Geometry,
    Inventory,
    Job,
    Placement,
    Tenant,
)
from gpuledger.schemas.exceptions import MessageError
from gpuledger.schemas.telemetry import HostReading
from gpuledger.streams.blocking import BlockingThread
from gpuledger.streams.blocks import Record
from gpuledger.streams.decode import TelemetryBlock, decode_block
from gpuledger.streams.facts import StoredFact, decode_facts, documents, fact_rows, rank_of, touched
from gpuledger.streams.fragments import Fragments, fragments
from gpuledger.streams.holders import UNPLACED_POOL
from gpuledger.streams.intake import Rejected, Step, Stored
from gpuledger.streams.letters import decode_letter
from gpuledger.streams.marks import MINUTE_MS, Marks, Ranges
from gpuledger.streams.pool_map import PoolMap
from gpuledger.streams.recomputer import LedgerRules
from gpuledger.streams.store import Store

__all__ = [
    "TICK_HEADER",
    "AlertsSink",
    "DeadLetterSink",
    "FactsSink",
    "Followup",
    "TelemetrySink",
]

#: A record with this header only says that the partition has nothing older: it moves the frontier.
TICK_HEADER = "gpuledger-tick"
#: (node, boot) and allocation namings whose marks this process has sent and need no look-up again.
_REMEMBERED = 200_000

Send = Callable[[Dirty], Awaitable[None]]

_TIME = pa.timestamp("ms", tz="UTC")


def _is_tick(record: Record) -> bool:
    """A record with a value is a message, whatever its headers say."""
    return not record.value and any(key == TICK_HEADER for key, _ in record.headers)


def _unread(records: Iterable[Record]) -> list[Rejected]:
    return [Rejected(record, record.unreadable.reason) for record in records if record.unreadable is not None]


def _progress(records: Iterable[Record], topic: str) -> pa.Table:
    """How far the partitions are stored after these records."""
    last: dict[int, tuple[int, int]] = {}
    for record in records:
        before = last.get(record.partition, (0, 0))
        last[record.partition] = (max(before[0], record.timestamp_ms), max(before[1], record.offset))
    return pa.table(
        {
            "topic": pa.array([topic] * len(last), type=pa.string()),
            "partition": pa.array(list(last), type=pa.uint32()),
            "appended_ms": pa.array([appended for appended, _ in last.values()], type=pa.int64()),
            "offset": pa.array([offset for _, offset in last.values()], type=pa.int64()),
        }
    )


class _Memory(OrderedDict[Any, int]):
    """What has been marked already: a cache of bounded size, whose loss costs a look-up and nothing else."""

    def remember(self, key: Any, value: int) -> None:
        self.pop(key, None)
        self[key] = value
        if len(self) > _REMEMBERED:
            self.popitem(last=False)


@dataclass(frozen=True, slots=True)
class Followup:
    """What is due once a block is stored: its marks, then how far its partitions have come.

    `boots` and `named` are what needs no marks again, once these marks are out."""

    marks: Marks
    progress: pa.Table
    alerts: tuple[Alert, ...] = ()
    boots: dict[tuple[str, str], int] = field(default_factory=dict[tuple[str, str], int])
    named: dict[str, int] = field(default_factory=dict[str, int])


class _MarkingSink:
    """Sends the marks of a stored block, waits for the broker, and then writes down the progress: whoever reads there
    that an offset is stored knows that its marks are out."""

    def __init__(self, store: Store, topic: str, send: Send) -> None:
        self._store = store
        self._topic = topic
        self._send = send
        self._thread = BlockingThread(f"progress-{topic}")

    async def after(self, stored: Stored[Followup]) -> None:
        """Sends one dirty event per pool and range, all at once, then stores the progress."""
        marks = stored.marks.marks
        events = [
            Dirty(pool=pool, from_ms=start, to_ms=end, why=marks.why(pool))
            for pool, ranges in marks.merged().items()
            for start, end in ranges
        ]
        await asyncio.gather(*(self._send(event) for event in events))
        # The intake's thread is idle while `after` runs, so the connection is ours.
        await self._thread.call(lambda: self._store.insert("progress", stored.marks.progress))


class TelemetrySink(_MarkingSink):
    """telemetry → fragments, host readings, gaps, confirmations, boots."""

    def __init__(self, store: Store, send: Send, rules: LedgerRules) -> None:
        super().__init__(store, "telemetry", send)
        self._confirm_ms = rules.confirm_ms
        self._ahead_ms = rules.ahead_ms
        self._pools = PoolMap(store)
        self._named = _Memory()
        self._boots = _Memory()

    def store(self, records: Sequence[Record]) -> Stored[Followup]:
        """Stores every message of the block that can be read; the others are rejected with their reasons."""
        return self.prepare(records)()

    def prepare(self, records: Sequence[Record]) -> Step[Followup]:
        """The block decoded and folded: more than half of the work, and none of it for the database."""
        messages = [record for record in records if record.unreadable is None and not _is_tick(record)]
        block = decode_block(messages, self._ahead_ms)
        found = fragments(block)
        named = _named(block)
        progress = _progress(records, self._topic)
        rejected = [*_unread(records), *(Rejected(messages[n], reason) for n, reason in block.rejected)]
        return lambda: Stored(self._stored(block, found, named, progress), rejected)

    def _stored(
        self,
        block: TelemetryBlock,
        found: Fragments | None,
        named: Mapping[tuple[str, int], int],
        progress: pa.Table,
    ) -> Followup:
        """The rows first, and then what they mark."""
        marks = Marks()
        if found is not None:
            self._store.insert_by_day("fragments", found.table, "minute")
        self._store_headers(block, named)
        if found is not None:
            pools = self._pools.of(set[str]().union(*found.seen.values()))
            for minute, gpus in found.seen.items():
                for pool in set[str]().union(*map(pools.__getitem__, gpus)):
                    marks.add(pool, minute, minute + MINUTE_MS, "telemetry")
        boots = self._mark_boots(block, marks)
        latest = self._mark_confirmations(block, named, marks)
        return Followup(marks, progress, boots=boots, named=latest)

    async def after(self, stored: Stored[Followup]) -> None:
        """As for every sink; what has been marked is remembered only now. A block that was left to another worker
        before its marks were out may come back to this one, and must be marked then."""
        await super().after(stored)
        for key, start in stored.marks.boots.items():
            self._boots.remember(key, start)
        for allocation, t in stored.marks.named.items():
            self._named.remember(allocation, max(t, self._named.get(allocation, 0)))

    def _store_headers(self, block: TelemetryBlock, named: Mapping[tuple[str, int], int]) -> None:
        hosts = [(header.node, header.host) for header in block.headers if header.host is not None]
        if hosts:
            self._store.insert_by_day("host_readings", _host_rows(hosts), "ts")
        gaps = [(header.node, gap) for header in block.headers for gap in header.gaps]
        if gaps:
            fields = {"first_seq": pa.uint32(), "last_seq": pa.uint32(), "from_ms": pa.int64(), "to_ms": pa.int64()}
            fields |= {"run_id": pa.string(), "batches": pa.uint32(), "reason": pa.string()}
            columns = {name: pa.array([getattr(gap, name) for _, gap in gaps], type=t) for name, t in fields.items()}
            self._store.insert("gaps", pa.table({"node": pa.array([node for node, _ in gaps]), **columns}))
        boots = {(h.node, h.boot_id): h.boot_start_ms for h in reversed(block.headers)}
        new = {key: start for key, start in boots.items() if self._boots.get(key) != start}
        if new:
            self._store.insert(
                "boots",
                pa.table(
                    {
                        "node": pa.array([node for node, _ in new]),
                        "boot_id": pa.array([boot for _, boot in new]),
                        "start_ms": pa.array(list(new.values()), type=pa.int64()),
                    }
                ),
            )
        if named:
            self._store.insert("confirmed", _naming_rows(named, by_minute=False))
            self._store.insert_by_day("confirmations", _naming_rows(named, by_minute=True), "minute")

    def _mark_boots(self, block: TelemetryBlock, marks: Marks) -> dict[tuple[str, str], int]:
        """A boot ends what an older boot of its node left without an end, whichever of the two was heard of last.

        Returns the boots that were new."""
        new = {(h.node, h.boot_id): h.boot_start_ms for h in block.headers}
        new = {key: start for key, start in new.items() if self._boots.get(key) != start}
        starts: dict[str, dict[str, int]] = {}
        for nodes in _chunks([node for node, _ in new]):
            sql = "SELECT node, boot_id, min(start_ms) FROM boots WHERE node IN {nodes:Array(String)} GROUP BY ALL"
            for node, boot, start in self._store.rows(sql, {"nodes": nodes}):
                starts.setdefault(node, {})[boot] = int(start)
        rows: list[tuple[Any, ...]] = []
        # Nearly every node has had one boot only, and nothing to end: a worker that starts must not mark months.
        for nodes in _chunks([node for node, known in starts.items() if len(known) > 1]):
            sql = (
                "SELECT node, boot_id, gpu, min(start_ms) FROM allocations FINAL WHERE node IN {nodes:Array(String)} "
                "AND end_ms IS NULL AND boot_id != '' GROUP BY ALL"
            )
            rows += self._store.rows(sql, {"nodes": nodes})
        pools = self._store.pools_of(gpu for _, _, gpu, _ in rows)
        until = int(block.appended_ms.max(initial=0)) + self._ahead_ms
        for node, boot, gpu, start in rows:
            mine = starts[node].get(boot)
            ends = min((t for t in starts[node].values() if mine is not None and t > mine), default=None)
            if ends is not None:
                for pool in pools.get(gpu, ()):
                    marks.add(pool, max(ends, int(start)), until, "boot")
        return new

    def _mark_confirmations(
        self, block: TelemetryBlock, named: Mapping[tuple[str, int], int], marks: Marks
    ) -> dict[str, int]:
        """A naming at t after one at p turns [p + window, t + window) from unconfirmed to confirmed.

        Returns the latest naming of each allocation in the block."""
        if not named:
            return {}
        now = int(block.appended_ms.max()) + self._ahead_ms
        latest: dict[str, int] = {}
        for (allocation, _), t in named.items():
            latest[allocation] = max(latest.get(allocation, 0), t)
        before = {allocation: t for allocation in latest if (t := self._named.get(allocation)) is not None}
        if len(before) < len(latest):
            before |= self._earlier_namings([a for a in latest if a not in before], latest)
        until = {
            a: end
            for a, t in latest.items()
            if before.get(a, 0) < (end := min(t + self._confirm_ms, now)) - self._confirm_ms
        }
        changed = list(until)
        for ids in _chunks(changed):
            sql = "SELECT id, gpu, start_ms FROM allocations FINAL WHERE id IN {ids:Array(String)} AND end_ms IS NULL"
            rows = self._store.rows(sql, {"ids": ids})
            pools = self._pools.of({gpu for _, gpu, _ in rows})
            for allocation, gpu, start_ms in rows:
                start = max(before.get(allocation, 0), start_ms) + self._confirm_ms
                for pool in pools.get(gpu, ()):
                    marks.add(pool, start, until[allocation], "confirmation")
        return latest

    def _earlier_namings(self, allocations: Sequence[str], latest: dict[str, int]) -> dict[str, int]:
        """The latest naming stored in an earlier minute than the block's; redelivery does not change the answer."""
        if not allocations:
            return {}
        minute = min(latest[allocation] for allocation in allocations) // MINUTE_MS * MINUTE_MS
        rows = self._store.rows(
            "SELECT allocation_id, max(named_ms) FROM confirmations WHERE allocation_id IN {ids:Array(String)} "
            "AND minute < fromUnixTimestamp64Milli({minute:Int64}, 'UTC') GROUP BY allocation_id",
            {"ids": list(allocations), "minute": minute},
        )
        return {allocation: int(t) for allocation, t in rows}


def _named(block: TelemetryBlock) -> dict[tuple[str, int], int]:
    """(allocation, minute) → the latest sample that named it as running."""
    out: dict[tuple[str, int], int] = {}
    if not any(header.running for header in block.headers):
        return out
    last = np.zeros(len(block.headers), dtype=np.int64)
    if len(block.message):
        # Rows of a message lie together.
        first = np.flatnonzero(np.append(True, np.diff(block.message) != 0))
        last[block.message[first]] = np.maximum.reduceat(block.columns.column("ts_ms").to_numpy(), first)
    for header, t in zip(block.headers, last.tolist(), strict=True):
        minute = t // MINUTE_MS * MINUTE_MS
        for key in zip(header.running, repeat(minute), strict=False):
            if t > out.get(key, 0):
                out[key] = t
    return out


def _naming_rows(named: Mapping[tuple[str, int], int], by_minute: bool) -> pa.Table:
    columns = {
        "allocation_id": pa.array([allocation for allocation, _ in named]),
        "named_ms": pa.array(list(named.values()), type=pa.int64()),
    }
    if by_minute:
        columns["minute"] = pa.array([minute for _, minute in named], type=pa.int64()).cast(_TIME)
    return pa.table(columns)


def _host_rows(hosts: Sequence[tuple[str, HostReading]]) -> pa.Table:
    types: dict[str, pa.DataType] = dict.fromkeys(("cpu_util_pct", "load_1m"), pa.float32())
    types |= dict.fromkeys(("psi_cpu_pct", "psi_memory_pct", "psi_io_pct"), pa.float32())
    types["cpu_count"] = pa.int32()
    values = zip(*(msgspec.structs.astuple(host) for _, host in hosts), strict=True)
    columns = {
        name: pa.array(found, type=types.get(name, pa.int64()))
        for name, found in zip(HostReading.__struct_fields__, values, strict=True)
    }
    ts = columns.pop("ts_ms").cast(_TIME)
    return pa.table({"node": pa.array([node for node, _ in hosts]), "ts": ts, **columns})


class FactsSink(_MarkingSink):
    """allocations, inventory, jobs, capacity, rates, alerts → `facts` and the typed tables."""

    def __init__(self, store: Store, topic: str, send: Send, ahead_ms: int) -> None:
        super().__init__(store, topic, send)
        self._ahead_ms = ahead_ms

    def store(self, records: Sequence[Record]) -> Stored[Followup]:
        """Stores the facts that are new; a fact repeated by a later message is neither stored nor marked again."""
        facts: list[StoredFact] = []
        inventories: list[tuple[Inventory, int]] = []
        rejected = _unread(records)
        for record in records:
            if record.unreadable is not None or _is_tick(record):
                continue
            try:
                found, inventory = decode_facts(self._topic, record.value)
            except MessageError as error:
                rejected.append(Rejected(record, str(error)))
                continue
            where = (self._topic, record.partition, record.offset, record.timestamp_ms)
            facts += [StoredFact(fact, rank_of(fact), *where) for fact in found]
            if inventory is not None:
                inventories.append((inventory, record.timestamp_ms))
        facts = self._new(facts)
        for table, rows in fact_rows(facts, inventories).items():
            self._store.insert(table, rows)
        now_ms = max((record.timestamp_ms for record in records), default=0) + self._ahead_ms
        marks = self._marks(facts, now_ms)
        alerts = tuple(fact.fact for fact in facts if isinstance(fact.fact, Alert))
        return Stored(Followup(marks, _progress(records, self._topic), alerts), rejected)

    def _new(self, facts: Sequence[StoredFact]) -> list[StoredFact]:
        """Facts that no earlier offset of their partition has brought: those have been stored and marked already."""
        first: dict[tuple[str, str, int], StoredFact] = {}
        for fact in facts:
            first.setdefault((fact.fact.kind, fact.fact.id, fact.rank), fact)
        known: set[tuple[str, str, int, int]] = set()
        for ids in _chunks([fact.fact.id for fact in first.values()]):
            rows = self._store.rows(
                "SELECT kind, id, rank, partition, min(offset) FROM facts WHERE id IN {ids:Array(String)} "
                "AND topic = {topic:String} AND kind IN {kinds:Array(String)} GROUP BY kind, id, rank, partition",
                {"ids": ids, "topic": self._topic, "kinds": sorted({fact.fact.kind for fact in first.values()})},
            )
            for kind, id_, rank, partition, offset in rows:
                fact = first.get((kind, id_, rank))
                if fact is not None and fact.partition == partition and offset < fact.offset:
                    known.add((kind, id_, rank, partition))
        return [fact for key, fact in first.items() if (*key, fact.partition) not in known]

    def _marks(self, facts: Sequence[StoredFact], now_ms: int) -> Marks:
        """The union of pools and ranges of every stored revision of each fact (and, for a placement, of the GPU's)."""
        marks = Marks()
        if not facts:
            return marks
        revisions = self._revisions(facts)
        gpus = {fact.gpu for fact in revisions if isinstance(fact, (Allocation, Placement, Geometry))}
        pools_of = self._store.pools_of(gpus)
        by_id: dict[tuple[str, str], list[Any]] = {}
        for fact in revisions:
            by_id.setdefault((fact.kind, fact.id), []).append(fact)
        everywhere: list[tuple[int, int]] = []
        for (kind, _), stored in by_id.items():
            if isinstance(stored[0], Job):
                continue
            spans = Ranges(touched(fact, now_ms) for fact in stored)
            if isinstance(stored[0], Tenant) or kind == "energy_tariff":
                everywhere += spans
                continue
            pools: set[str] = set()
            for fact in stored:
                pools |= {fact.pool} if hasattr(fact, "pool") else set()
                if isinstance(fact, (Allocation, Placement, Geometry)):
                    pools |= pools_of.get(fact.gpu, {UNPLACED_POOL})
            for pool in pools:
                for start, end in spans:
                    marks.add(pool, start, end, kind)
        self._mark_early_allocations(facts, pools_of, now_ms, marks)
        self._mark_job_ends([fact for fact in revisions if isinstance(fact, Job)], now_ms, marks)
        if everywhere:
            extents = self._store.extents()
            for start, end in everywhere:
                for pool, (first_ms, last_ms) in extents.items():
                    marks.add(pool, max(start, first_ms), min(end, last_ms), "rates")
        return marks

    def _mark_early_allocations(
        self, facts: Sequence[StoredFact], pools_of: Mapping[str, set[str]], now_ms: int, marks: Marks
    ) -> None:
        """Allocations that came before their GPU's first placement are conflicts of the unplaced pool no longer; where
        they began before the placement, they are conflicts of the GPU's pools."""
        sql = (
            "SELECT gpu, min(start_ms), max(ifNull(end_ms, {now:Int64})) FROM allocations "
            "WHERE gpu IN {gpus:Array(String)} GROUP BY gpu"
        )
        for gpus in _chunks([fact.fact.gpu for fact in facts if isinstance(fact.fact, Placement)]):
            for gpu, start, end in self._store.rows(sql, {"gpus": gpus, "now": now_ms}):
                for pool in {UNPLACED_POOL} | pools_of.get(gpu, set()):
                    marks.add(pool, int(start), min(int(end), now_ms), "placement")

    def _mark_job_ends(self, jobs: Sequence[Job], now_ms: int, marks: Marks) -> None:
        """A job's end, told or corrected, ends those of its allocations that have no end of their own."""
        ends: dict[str, int] = {}
        for job in jobs:
            if job.ended_ms is not None:
                ends[job.id] = min(job.ended_ms, ends.get(job.id, job.ended_ms))
        rows: list[tuple[Any, ...]] = []
        for ids in _chunks(ends):
            sql = (
                "SELECT job_id, gpu, start_ms FROM allocations FINAL WHERE job_id IN {ids:Array(String)} "
                "AND end_ms IS NULL AND void = 0"
            )
            rows += self._store.rows(sql, {"ids": ids})
        pools = self._store.pools_of(gpu for _, gpu, _ in rows)
        for job, gpu, start_ms in rows:
            for pool in pools.get(gpu, {UNPLACED_POOL}):
                marks.add(pool, max(ends[job], int(start_ms)), now_ms, "job")

    def _revisions(self, facts: Sequence[StoredFact]) -> list[Any]:
        out: list[Any] = []
        keyed: dict[str, list[str]] = {}
        for fact in facts:
            keyed.setdefault(fact.fact.kind, []).append(fact.fact.id)
        for kind, ids in keyed.items():
            for names in _chunks(ids):
                sql = "SELECT document FROM facts WHERE kind = {kind:String} AND id IN {ids:Array(String)}"
                out += documents(text for (text,) in self._store.rows(sql, {"kind": kind, "ids": names}))
        gpus = sorted({fact.gpu for fact in out if isinstance(fact, Placement)})
        for names in _chunks(gpus):
            sql = (
                "SELECT document FROM facts WHERE kind = 'placement' "
                "AND id IN (SELECT id FROM placements WHERE gpu IN {gpus:Array(String)})"
            )
            out += documents(text for (text,) in self._store.rows(sql, {"gpus": names}))
        return out


def _chunks(names: Iterable[str], size: int = 2_000) -> Iterable[list[str]]:
    unique = sorted(set(names))
    for start in range(0, len(unique), size):
        yield unique[start : start + size]


class AlertsSink(FactsSink):
    """alerts → the table, and on to whoever is told (webhooks); an alert repeated by a later message is not."""

    def __init__(self, store: Store, send: Send, ahead_ms: int, tell: Callable[[Alert], None]) -> None:
        super().__init__(store, "alerts", send, ahead_ms)
        self._tell = tell

    async def after(self, stored: Stored[Followup]) -> None:
        """Tells of the new alerts once they are stored."""
        await super().after(stored)
        for alert in stored.marks.alerts:
            self._tell(alert)


class DeadLetterSink:
    """deadletter → the table that `gpuledger deadletter` and `status` read."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def store(self, records: Sequence[Record]) -> Stored[None]:
        """Stores dead letters, byte for byte; one that cannot itself be read is kept as it came."""
        letters = [decode_letter(record) for record in records]
        last = [letter.offset if letter.last_offset is None else letter.last_offset for letter in letters]
        columns = {
            "topic": pa.array([letter.topic for letter in letters]),
            "partition": pa.array([letter.partition for letter in letters], type=pa.uint32()),
            "offset": pa.array([letter.offset for letter in letters], type=pa.uint64()),
            "last_offset": pa.array(last, type=pa.uint64()),
            "appended_at": pa.array([letter.appended_at_ms for letter in letters], type=pa.int64()).cast(_TIME),
            "reason": pa.array([letter.reason for letter in letters]),
            "key": pa.array([letter.key or b"" for letter in letters], type=pa.binary()),
            "no_key": pa.array([letter.key is None for letter in letters]).cast(pa.uint8()),
            "value": pa.array([letter.value for letter in letters], type=pa.binary()),
            "value_bytes": pa.array([letter.value_bytes for letter in letters], type=pa.uint64()),
            "no_value": pa.array([letter.no_value for letter in letters]).cast(pa.uint8()),
            "headers": pa.array([msgspec.json.encode(letter.headers) for letter in letters], type=pa.binary()),
            "complete": pa.array([letter.complete for letter in letters]).cast(pa.uint8()),
        }
        self._store.insert("dead_letters", pa.table(columns))
        return Stored(None)

    async def after(self, stored: Stored[None]) -> None:
        """Nothing follows."""
