"""A world on the broker's topics, and a worker that consumes it without a broker: the real sinks, store and recomputer.

Partitions are lists of records, committed offsets are numbers, and the dirty marks are caught where they would be sent.
Only marked minutes are ever computed, so that a mark that is missing shows as a minute that differs.
"""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from gpuledger.schemas.events import Allocation, Dirty, Fact, Geometry, Inventory, Job, Placement, encode_event
from gpuledger.schemas.topics import TOPICS
from gpuledger.streams.blocks import Record
from gpuledger.streams.dirty import DirtyQueue, Pace
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


def logs(w: World, r: random.Random, rates: Sequence[Fact] = (), tail: int | None = None) -> Logs:
    """The records of the world and of rates by partition. Some come in their own time, the others after every minute
    has become complete: with `tail` so many facts, corrections if there are any, and so many batches. The broker's time
    of a batch is written back into the world, because it decides what is quarantined."""
    late_ms = w["to_ms"] + GRACE_MS + 10 * MINUTE_MS
    early: dict[Partition, list[tuple[int, bytes, tuple[tuple[str, bytes], ...], dict[str, Any] | None]]]
    early = defaultdict(list)
    late: dict[Partition, list[tuple[bytes, tuple[tuple[str, bytes], ...], dict[str, Any] | None]]] = defaultdict(list)
    tardiness = r.choice([0.0, 0.2, 0.5, 1.0])
    facts = [*inputs.events(w), *rates]
    r.shuffle(facts)
    last = _tail(facts, w["batches"], tail, r)
    for fact in facts:
        if (r.random() < tardiness) if tail is None else id(fact) in last:
            late[_where(fact)].append((_value(fact), (), None))
        else:
            at = r.randrange(w["from_ms"] - MINUTE_MS, w["to_ms"], 1000)
            early[_where(fact)].append((at, _value(fact), (), None))
    for batch in w["batches"]:
        message = inputs.message(batch)
        where = _partition("telemetry", batch["node"])
        tardy = (batch["late"] or r.random() < tardiness / 2) if tail is None else id(batch) in last
        if tardy or batch["appended_ms"] >= late_ms:
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


def _tail(facts: list[Fact], batches: list[dict[str, Any]], tail: int | None, r: random.Random) -> set[int]:
    """The identities of what comes last."""
    if tail is None:
        return set()
    corrections = [fact for fact in facts if fact.revision > 1] or facts
    last: list[Any] = r.sample(corrections, min(tail, len(corrections)))
    return {id(item) for item in [*last, *r.sample(batches, min(tail, len(batches)))]}


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
    open_end_ms: int = 0

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
        elif crash < 0.05 or crash >= 0.15:
            # Otherwise the partition was taken away and came back to the same process, which remembers.
            self.restart()

    def one_by_one(self, abandoned: bool = False) -> None:
        """What is left comes record by record, and only what each marks is computed before the next. `abandoned`: each
        is stored once in vain before, by the same process, whose marks never went out."""
        while self.left():
            where = self.r.choice(self.left())
            record = self.logs[where][self._next(where)]
            sink = self.sinks[where[0]]
            if abandoned:
                sink.store([record])
            asyncio.run(sink.after(sink.store([record])))
            self.committed[where] = self._next(where) + 1
            self.recompute()

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

    def recompute_by_queue(self) -> None:
        """Computes what is marked as the dirty agent does: in slices of its queue, minutes first, then whole units."""
        now_ms = max(self.logs[where][n - 1].timestamp_ms for where, n in self.committed.items() if n)
        queue: DirtyQueue[int] = DirtyQueue(Pace(unit_ms=self.rules.unit_ms))
        due, self.due = self.due, {}
        self.offset += 1
        queue.add(0, 0, self.offset, due, now_ms, 0)
        clock_ms = 0
        while not queue.finished():
            clock_ms += 1_000
            assert clock_ms < 3_600_000, f"the queue never ends: {queue.backlog()}"
            found = queue.next(now_ms, clock_ms)
            if found is None:
                continue
            if found.kind == "minutes":
                self.recomputer.minutes(found.pool, found.from_ms, found.to_ms, self.version())
            else:
                self.recomputer.hours(found.pool, found.from_ms, found.to_ms, self.version())
            queue.done(found, self.r.choice([1, 400, 5_000]))
        self.open_end_ms = now_ms // MINUTE_MS * MINUTE_MS + MINUTE_MS

    def version(self) -> Version:
        """A new version, as the offsets of marks make them."""
        self.offset += 1
        return Version(1, self.offset, self.r.getrandbits(40))

    def run(self, crashes: bool = True, by_queue: bool = False, most: int = 6) -> None:
        """Everything is consumed in blocks of at most `most` records per partition, the frontier passes, what is marked
        is computed; in a random order with setbacks."""
        compute = self.recompute_by_queue if by_queue else self.recompute
        setbacks = 4 if crashes else 0
        while self.left():
            step = self.r.random()
            if step < 0.75:
                self.consume(most, crashes)
            elif step < 0.83 and setbacks:
                setbacks -= 1
                self.rewind()
            elif step < 0.9:
                self.advance()
            elif self.due:
                compute()
        self.advance()
        compute()

    # -- what is there

    def written(self, table: str, column: str = "minute") -> list[tuple[Any, ...]]:
        """The rows that count of a table by minute (hour, interval_start), without their versions, sorted. Those of a
        pool and time at which there is nothing but the marker are left out: nothing marks them."""
        sql = (
            f"SELECT pool, {column}, * EXCEPT (pool, {column}, version) FROM {table} "
            f"WHERE {column} >= fromUnixTimestamp64Milli({{from_ms:Int64}}, 'UTC') "
            f"AND {column} < fromUnixTimestamp64Milli({{to_ms:Int64}}, 'UTC') AND (pool, {column}, version) IN "
            f"(SELECT pool, {column}, max(version) FROM {table} GROUP BY pool, {column})"
        )
        bounds = (self.from_ms, self.to_ms) if column == "minute" else self.unit
        rows = {_plain(row) for row in self.store.rows(sql, {"from_ms": bounds[0], "to_ms": bounds[1]})}
        filled = {row[:2] for row in rows if "marker" not in row}
        return sorted((row for row in rows if row[:2] in filled), key=repr)

    @property
    def unit(self) -> tuple[int, int]:
        """The whole hours and price intervals around the window, up to the open minute."""
        return self.world["from_ms"] // self.rules.unit_ms * self.rules.unit_ms, self.open_end_ms

    def compute_all(self, pools: Iterable[str], hours: bool = False) -> None:
        """Every minute of the pools again, or all hours, in one piece."""
        for pool in pools:
            if hours:
                self.recomputer.hours(pool, *self.unit, self.version())
            else:
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


def _plain(row: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(tuple(sorted(cell.items())) if isinstance(cell, dict) else cell for cell in row)
