"""A world on the broker's topics, and a worker that consumes it without a broker: the real sinks, store and recomputer.

Partitions are lists of records, committed offsets are numbers, and the dirty marks are caught where they would be sent.
Only marked minutes are ever computed, so that a mark that is missing shows as a minute that differs.
"""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from gpuledger.schemas.events import Allocation, Dirty, Fact, Geometry, Inventory, Job, Placement, encode_event
from gpuledger.schemas.topics import TOPICS
from gpuledger.streams.blocks import Record
from gpuledger.streams.frontier import Frontier
from gpuledger.streams.intake import Stored
from gpuledger.streams.ledger_rows import Version
from gpuledger.streams.marks import MINUTE_MS, Ranges
from gpuledger.streams.recomputer import LedgerRules, Recomputer
from gpuledger.streams.sinks import TICK_HEADER, FactsSink, Followup, TelemetrySink
from gpuledger.streams.store import Store
from tests.streams import inputs
from tests.streams.story import World

__all__ = ["Worker", "logs", "rules"]

Partition = tuple[str, int]
Logs = dict[Partition, list[Record]]

GRACE_MS = 60_000
#: Minutes around the window that are computed and compared too.
MARGIN = 3
PARTITIONS = {"telemetry": 2, "allocations": 2, "inventory": 2, "capacity": 1, "jobs": 1, "rates": 1}
GATES = {name: count for name, count in PARTITIONS.items() if TOPICS[name].gates}


def rules(w: World) -> LedgerRules:
    """What the processes of the world's ledger agree on."""
    return LedgerRules(
        grace_ms=GRACE_MS, confirm_ms=w["confirm_ms"], price_interval_minutes=15, gates=GATES, ahead_ms=w["ahead_ms"]
    )


# ------------------------------------------------------------------------------------------------- topics


def _partition(topic: str, key: str) -> Partition:
    return topic, sum(key.encode()) % PARTITIONS[topic]


def _where(fact: Fact) -> Partition:
    match fact:
        case Allocation():
            return _partition("allocations", fact.node)
        case Placement() | Geometry():
            return _partition("inventory", fact.node)
        case Job():
            return _partition("jobs", fact.id)
        case _:
            return _partition("capacity" if fact.kind in ("commitment", "transfer") else "rates", fact.id)


def _value(fact: Fact) -> bytes:
    match fact:
        case Placement():
            return encode_event(Inventory(node=fact.node, claimed_at_ms=fact.claimed_at_ms, placements=[fact]))
        case Geometry():
            return encode_event(Inventory(node=fact.node, claimed_at_ms=fact.claimed_at_ms, geometries=[fact]))
        case _:
            return encode_event(fact)


def logs(w: World, r: random.Random) -> Logs:
    """The world's records by partition. Some come in their own time, the others after every minute has become complete;
    the broker's time of a batch is written back into the world, because it decides what is quarantined."""
    late_ms = w["to_ms"] + GRACE_MS + 10 * MINUTE_MS
    early: dict[Partition, list[tuple[int, bytes, tuple[tuple[str, bytes], ...], dict[str, Any] | None]]]
    early = defaultdict(list)
    late: dict[Partition, list[tuple[bytes, tuple[tuple[str, bytes], ...], dict[str, Any] | None]]] = defaultdict(list)
    tardiness = r.choice([0.0, 0.2, 0.5, 1.0])
    facts = inputs.events(w)
    r.shuffle(facts)
    for fact in facts:
        if r.random() < tardiness:
            late[_where(fact)].append((_value(fact), (), None))
        else:
            at = r.randrange(w["from_ms"] - MINUTE_MS, w["to_ms"], 1000)
            early[_where(fact)].append((at, _value(fact), (), None))
    for batch in w["batches"]:
        message = inputs.message(batch)
        where = _partition("telemetry", batch["node"])
        if batch["late"] or batch["appended_ms"] >= late_ms or r.random() < tardiness / 2:
            late[where].append((message.value, message.headers, batch))
        else:
            early[where].append((batch["appended_ms"], message.value, message.headers, batch))
    made: Logs = {}
    for topic, count in PARTITIONS.items():
        for n in range(count):
            records: list[Record] = []
            made[topic, n] = records
            for at, value, headers, batch in sorted(early[topic, n], key=lambda item: item[0]):
                records.append(Record(topic, n, len(records), at, b"k", value, headers))
                if batch is not None:
                    batch["appended_ms"] = at
            records.append(Record(topic, n, len(records), late_ms, b"k", None, ((TICK_HEADER, b"1"),)))
            for step, (value, headers, batch) in enumerate(late[topic, n], 1):
                records.append(Record(topic, n, len(records), late_ms + step * 1000, b"k", value, headers))
                if batch is not None:
                    batch["appended_ms"] = late_ms + step * 1000
    w["complete_until_ms"] = late_ms - GRACE_MS
    return made


# ------------------------------------------------------------------------------------------------- the worker


@dataclass
class Worker:
    """Consumes the logs of a world in any order, with crashes and redelivery, into one database.

    `committed` is where each partition goes on; `due` the marked and not yet computed milliseconds of each pool;
    `missed` leaves out marks whose reason is named, for tests that must fail; `until_ms` is the present: records of
    later broker time have not come yet.
    """

    store: Store
    world: World
    logs: Logs
    r: random.Random
    missed: frozenset[str] = frozenset()
    committed: dict[Partition, int] = field(default_factory=dict[Partition, int])
    due: dict[str, Ranges] = field(default_factory=dict[str, Ranges])
    marks: list[Dirty] = field(default_factory=list[Dirty])
    offset: int = 0
    until_ms: int = 1 << 60

    def __post_init__(self) -> None:
        self.rules = rules(self.world)
        self.recomputer = Recomputer(self.store, self.rules)
        self.frontier = Frontier(self.store, self.rules, self._send)
        self.restart()

    @property
    def from_ms(self) -> int:
        """The first minute that is computed and compared."""
        return self.world["from_ms"] - MARGIN * MINUTE_MS

    @property
    def to_ms(self) -> int:
        return self.world["to_ms"] + MARGIN * MINUTE_MS

    async def _send(self, mark: Dirty) -> None:
        if mark.why not in self.missed:
            self.marks.append(mark)
            self.due.setdefault(mark.pool, Ranges()).update([(mark.from_ms, mark.to_ms)])

    def restart(self) -> None:
        """Another process takes over: what was remembered is gone."""
        ahead_ms = self.rules.ahead_ms
        self.sinks = {
            topic: TelemetrySink(self.store, self._send, self.rules)
            if topic == "telemetry"
            else FactsSink(self.store, topic, self._send, ahead_ms)
            for topic in PARTITIONS
        }

    # -- steps

    def left(self) -> list[Partition]:
        """Partitions with records that are not committed and came in time."""
        return [where for where, log in self.logs.items() if self._next(where) < self._end(log)]

    def _next(self, where: Partition) -> int:
        return self.committed.get(where, 0)

    def _end(self, log: list[Record]) -> int:
        return sum(record.timestamp_ms <= self.until_ms for record in log)

    def _take(self, wheres: Iterable[Partition], most: int) -> tuple[Stored[Followup], dict[Partition, int]]:
        """Stores the next records of partitions of one topic, as one block."""
        records: list[Record] = []
        reached: dict[Partition, int] = {}
        topic = ""
        for where in wheres:
            start = self._next(where)
            taken = self.logs[where][start : min(start + self.r.randint(1, most), self._end(self.logs[where]))]
            records += taken
            reached[where] = start + len(taken)
            topic = where[0]
        return self.sinks[topic].store(records), reached

    def consume(self, most: int = 6, crashes: bool = True) -> None:
        """One block of one topic goes its way: stored, marked, committed; or it crashes between these steps."""
        topic = self.r.choice(self.left())[0]
        wheres = [where for where in self.left() if where[0] == topic and self.r.random() < 0.8]
        wheres = wheres or [self.r.choice([where for where in self.left() if where[0] == topic])]
        stored, reached = self._take(wheres, most)
        crash = self.r.random() if crashes else 1.0
        if crash >= 0.1:
            asyncio.run(self.sinks[topic].after(stored))
        if crash >= 0.2:
            self.committed.update(reached)
        else:
            self.restart()

    def rewind(self) -> None:
        """A rebalance: a partition goes on at an offset it has passed already."""
        where = self.r.choice(list(self.logs))
        self.committed[where] = self.r.randint(0, self._next(where))
        if self.r.random() < 0.5:
            self.restart()

    def advance(self) -> None:
        """A pass of the frontier, at the time of the latest record that was consumed."""
        times = [self.logs[where][n - 1].timestamp_ms for where, n in self.committed.items() if n]
        asyncio.run(self.frontier.advance(max(times, default=self.world["from_ms"])))
        assert self.frontier.stats.failures == 0, "the frontier could not be read"

    def recompute(self) -> None:
        """Computes exactly the marked minutes."""
        due, self.due = self.due, {}
        for pool, ranges in sorted(due.items()):
            for start, end in ranges.clip(self.from_ms, self.to_ms).widen(MINUTE_MS):
                self.recomputer.minutes(pool, start, end, self.version())

    def version(self) -> Version:
        """A new version, as the offsets of marks make them."""
        self.offset += 1
        return Version(1, self.offset, self.r.getrandbits(40))

    def run(self, crashes: bool = True) -> None:
        """Everything is consumed, the frontier passes, what is marked is computed; in a random order with setbacks."""
        setbacks = 4 if crashes else 0
        while self.left():
            step = self.r.random()
            if step < 0.75:
                self.consume(crashes=crashes)
            elif step < 0.83 and setbacks:
                setbacks -= 1
                self.rewind()
            elif step < 0.9:
                self.advance()
            else:
                self.recompute()
        self.settle()

    def settle(self) -> None:
        """Nothing is left to do."""
        self.advance()
        self.recompute()

    # -- what is there

    def written(self, table: str) -> list[tuple[Any, ...]]:
        """The rows that count of a table by minute, without their versions, sorted. Minutes of a pool in which there is
        nothing but their marker are left out: nothing marks them."""
        sql = (
            f"SELECT * EXCEPT version FROM {table} WHERE minute >= fromUnixTimestamp64Milli({{from_ms:Int64}}, 'UTC') "
            "AND minute < fromUnixTimestamp64Milli({to_ms:Int64}, 'UTC') AND (pool, minute, version) IN "
            f"(SELECT pool, minute, max(version) FROM {table} GROUP BY pool, minute)"
        )
        rows = {tuple(row) for row in self.store.rows(sql, {"from_ms": self.from_ms, "to_ms": self.to_ms})}
        filled = {row[:2] for row in rows if "marker" not in row}
        return sorted((row for row in rows if row[:2] in filled), key=repr)

    def compute_all(self, pools: Iterable[str]) -> None:
        """Every minute of the pools again, in one piece."""
        for pool in pools:
            self.recomputer.minutes(pool, self.from_ms, self.to_ms, self.version())

    def sources(self) -> dict[str, list[tuple[Any, ...]]]:
        """What the ledger is computed from: current fragments and facts, and what was derived from batches."""
        keys = {"confirmed": "allocation_id, max(named_ms)", "boots": "node, boot_id, min(start_ms)"}
        tables = ("placements", "allocations", "geometries", "jobs", "commitments", "transfers", "rates")
        found = {
            table: self.store.rows(f"SELECT * EXCEPT recorded_at FROM {table} FINAL ORDER BY id") for table in tables
        }
        found["fragments"] = self.store.rows("SELECT * EXCEPT appended_at FROM fragments FINAL ORDER BY ALL")
        for table, columns in keys.items():
            found[table] = self.store.rows(f"SELECT {columns} FROM {table} GROUP BY ALL ORDER BY ALL")
        return found

    def empty(self) -> None:
        """Forgets everything that was stored."""
        sql = (
            "SELECT name FROM system.tables WHERE database = {db:String} AND engine LIKE '%MergeTree' "
            "AND name != 'migrations'"
        )
        for (name,) in self.store.rows(sql, {"db": self.store.database}):
            self.store.client.command(f"TRUNCATE TABLE {name}")
