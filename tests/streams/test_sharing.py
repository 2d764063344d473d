"""A GPU cut into MIG instances, cut anew in mid-minute, from batches and facts to rows; every number worked by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from gpuledger.agents.batch import encode_batch
from gpuledger.cli.database import migrate_database
from gpuledger.schemas.config import ClickHouse
from gpuledger.schemas.events import (
    Allocation,
    Dirty,
    Event,
    Geometry,
    Instance,
    Inventory,
    Job,
    Placement,
    encode_event,
)
from gpuledger.schemas.migrate import migrations, statements
from gpuledger.schemas.telemetry import BatchHeader, Device
from gpuledger.streams.blocks import Record
from gpuledger.streams.ledger_rows import Version
from gpuledger.streams.recomputer import Recomputer
from gpuledger.streams.sinks import FactsSink, TelemetrySink
from tests.fixtures.clickhouse import ClickHouseDatabase
from tests.streams.small_ledger import HOUR_MS, RULES, START_MS, SmallLedger, minute

pytestmark = pytest.mark.services

POOL, GPU = "mig", "GPU-m"
#: The GPU is cut anew in the middle of minute 2: instance number 1 is used again.
ANEW = minute(2) + 30_000
FIRST = [Instance(1, START_MS, 3, "3g.40gb"), Instance(2, START_MS, 2, "2g.20gb")]
SECOND = [Instance(1, ANEW, 4, "4g.40gb")]


def fact(kind: type[Any], id_: str, **fields: Any) -> Any:
    return kind(**{"id": id_, "revision": 1, "claimed_at_ms": START_MS, "node": "n0", **fields})


def allocation(id_: str, tenant: str, instance: Instance, **fields: Any) -> Allocation:
    names = {"gpu": GPU, "job_id": f"job-{id_}", "tenant": tenant, "source": "kubernetes"}
    slices = {"instance": instance.instance, "epoch_ms": instance.epoch_ms}
    weight = {"weight_num": instance.slices, "weight_den": 7}
    return fact(Allocation, id_, **(names | slices | weight | fields))


ALLOCATIONS = [
    allocation("x", "acme", FIRST[0], start_ms=START_MS, end_ms=ANEW),
    allocation("y", "nord", FIRST[1], start_ms=START_MS, end_ms=ANEW),
    allocation("z", "acme", SECOND[0], start_ms=ANEW),
]


def inventory() -> Inventory:
    return Inventory(
        node="n0",
        claimed_at_ms=START_MS,
        placements=[fact(Placement, "p", gpu=GPU, pool=POOL, start_ms=START_MS)],
        geometries=[
            fact(Geometry, "first", gpu=GPU, instances=FIRST, start_ms=START_MS),
            fact(Geometry, "second", gpu=GPU, instances=SECOND, start_ms=ANEW),
        ],
    )


def batch() -> tuple[bytes, bytes]:
    """One batch over minutes 1 to 3, a sample each 10 s: the whole GPU (no utilisation, as in MIG mode; 700 W), both
    instances until the GPU is cut anew, and the new instance 1. Number 2 has no utilisation that can be measured."""
    begin = minute(1)
    devices = [
        Device(GPU, 0, begin, 5_000_000),
        Device(GPU, 1, begin, None, START_MS),
        Device(GPU, 2, begin, None, START_MS),
        Device(GPU, 1, ANEW, None, ANEW),
    ]
    until = {0: minute(4), 1: ANEW, 2: ANEW, 3: minute(4)}
    since = {0: begin, 1: begin, 2: begin, 3: ANEW}
    activity: dict[int, float | None] = {0: None, 1: 0.8, 2: None, 3: 0.0}
    rows = [
        (at, n, activity[n], 5_000_000 + 700 * (at - begin) if n == 0 else None)
        for at in range(begin + 10_000, minute(4) + 1, 10_000)
        for n in range(4)
        if since[n] < at <= until[n]
    ]
    header = BatchHeader(
        node="n0",
        boot_id="boot",
        boot_start_ms=START_MS - HOUR_MS,
        run_id="run",
        run_start_ms=START_MS,
        seq=0,
        period_ms=10_000,
        anchor_wall_ms=START_MS,
        anchor_boottime_ms=0,
        devices=devices,
    )
    names = ("ts_ms", "device", "sm_active", "energy_mj")
    made = encode_batch(header, {name: [row[n] for row in rows] for n, name in enumerate(names)})
    return made.value, made.headers[0][1]


def record(topic: str, offset: int, event: Event | tuple[bytes, bytes]) -> Record:
    at = START_MS + 5 * HOUR_MS
    if isinstance(event, tuple):
        return Record(topic, 0, offset, at, b"n0", event[0], (("gpuledger-batch", event[1]),))
    return Record(topic, 0, offset, at, b"n0", encode_event(event))


class Ledger(SmallLedger):
    """Fed through the sinks; `marked` are the marks they sent."""

    marked: list[Dirty]

    def feed(self, topic: str, *events: Event | tuple[bytes, bytes]) -> list[Dirty]:
        """Stores and marks; returns the marks."""
        self.marked = []

        async def send(mark: Dirty) -> None:
            self.marked.append(mark)

        made = TelemetrySink(self.store, send, RULES) if topic == "telemetry" else None
        sink = made or FactsSink(self.store, topic, send, RULES.ahead_ms)
        records = [record(topic, self.offset + n, event) for n, event in enumerate(events)]
        self.offset += len(events)
        stored = sink.store(records)
        assert not stored.rejected
        asyncio.run(sink.after(stored))
        return self.marked

    def recomputed(self, n: int) -> dict[tuple[Any, ...], tuple[int, int | None]]:
        """GPU rows of minute `n` after a recompute: (tenant, job, instance, kind, activity) → (GPU-us, mJ)."""
        self.offset += 1
        Recomputer(self.store, RULES).hours(POOL, START_MS, START_MS + HOUR_MS, Version(1, self.offset, 5))
        rows = self.store.rows(
            "SELECT tenant, job_id, instance, kind, activity, gpu_us, energy_mj FROM v_gpu_minute "
            "WHERE pool = {pool:String} AND minute = fromUnixTimestamp64Milli({at:Int64}, 'UTC')",
            {"pool": POOL, "at": minute(n)},
        )
        return {tuple(row[:5]): (row[5], row[6]) for row in rows}

    def of_pool(self, n: int) -> dict[tuple[str, str], int]:
        """Pool rows of minute `n`: (tenant, kind) → GPU-us."""
        rows = self.store.rows(
            "SELECT tenant, kind, sum(gpu_us) FROM v_ledger_minute "
            "WHERE pool = {pool:String} AND minute = fromUnixTimestamp64Milli({at:Int64}, 'UTC') GROUP BY tenant, kind",
            {"pool": POOL, "at": minute(n)},
        )
        return {(tenant, kind): us for tenant, kind, us in rows}


@pytest.fixture
def ledger(clickhouse_database: ClickHouseDatabase) -> Iterator[Ledger]:
    settings = ClickHouse(url=clickhouse_database.url, database=clickhouse_database.name)
    migrate_database(settings)
    made = Ledger(settings)
    made.stored_until(START_MS + 4 * HOUR_MS)
    yield made
    made.store.close()


@pytest.fixture
def sliced(ledger: Ledger) -> Ledger:
    ledger.feed("inventory", inventory())
    ledger.feed("allocations", *ALLOCATIONS)
    ledger.feed("telemetry", batch())
    return ledger


def test_slices_and_what_no_instance_has_sum_to_the_gpu(sliced: Ledger) -> None:
    # 60 s x 3/7, 2/7 and 2/7 of 60,000,000 us: floors 25,714,285 + 2 x 17,142,857, the one left to the largest rest.
    # 700 W for 60 s are 42,000,000 mJ, divided in the same way without a rest.
    assert sliced.recomputed(1) == {
        ("acme", "job-x", 1, "held", "active"): (25_714_286, 18_000_000),
        ("nord", "job-y", 2, "held", "unobserved"): (17_142_857, 12_000_000),
        ("", "", 0, "unsliced", "unobserved"): (17_142_857, 12_000_000),
    }
    assert sliced.of_pool(1) == {
        ("acme", "held"): 25_714_286,
        ("nord", "held"): 17_142_857,
        ("", "unsliced"): 17_142_857,
    }


def test_a_gpu_cut_anew_in_mid_minute_keeps_its_two_instances_of_one_number_apart(sliced: Ledger) -> None:
    # 30 s as above: 12,857,142.9 + 2 x 8,571,428.6 us, of which the two left go to the first two in the order of
    # holders where rests are equal (acme's is largest); then 30 s of 4/7 and 3/7: 17,142,857.1 + 12,857,142.9.
    found = sliced.recomputed(2)
    assert found == {
        ("acme", "job-x", 1, "held", "active"): (12_857_143, 9_000_000),
        ("nord", "job-y", 2, "held", "unobserved"): (8_571_429, 6_000_000),
        ("acme", "job-z", 1, "held", "idle"): (17_142_857, 12_000_000),
        ("", "", 0, "unsliced", "unobserved"): (8_571_428 + 12_857_143, 6_000_000 + 9_000_000),
    }
    assert sum(us for us, _ in found.values()) == 60_000_000


def test_an_instance_made_again_says_nothing_of_who_held_its_predecessor(sliced: Ledger) -> None:
    """The end of x came late: until then x seems to hold instance 1 on, but what the new one does is not its doing."""
    sliced.feed("allocations", allocation("x", "acme", FIRST[0], start_ms=START_MS, end_ms=minute(3), revision=2))
    found = sliced.recomputed(2)
    assert ("acme", "job-x", 1, "held", "idle") not in found
    assert ("acme", "job-x", 1, "held", "unobserved") in found


def test_a_reservation_takes_unsliced_capacity_last(sliced: Ledger) -> None:
    from gpuledger.schemas.events import Commitment

    one = {"revision": 1, "claimed_at_ms": START_MS, "start_ms": START_MS, "end_ms": START_MS + HOUR_MS}
    sliced.feed("capacity", Commitment(id="c", pool=POOL, tenant="acme", gpus=1, **one))
    sliced.recomputed(1)
    # acme wants 1 - 3/7 and gets all there is, which is unsliced; the rest of its claim is more than there is.
    assert sliced.of_pool(1) == {
        ("acme", "held"): 25_714_286,
        ("nord", "held"): 17_142_857,
        ("acme", "reserved_unused"): 17_142_857,
        ("acme", "overcommitted"): 17_142_857,
    }


def test_the_end_of_a_job_ends_what_no_epilog_ended_and_marks_from_there(sliced: Ledger) -> None:
    job = Job(id="job-z", revision=1, claimed_at_ms=START_MS, source="kubernetes", started_ms=ANEW)
    assert sliced.feed("jobs", job) == []
    ended = Job(
        id="job-z",
        revision=2,
        claimed_at_ms=START_MS,
        source="kubernetes",
        started_ms=ANEW,
        ended_ms=minute(3) + 15_000,
    )
    marks = sliced.feed("jobs", ended)
    until = START_MS + 5 * HOUR_MS + RULES.ahead_ms
    assert [(mark.pool, mark.from_ms, mark.to_ms) for mark in marks] == [(POOL, minute(3), until)]
    # 15 s of 4/7 and 3/7, then 45 s of which 4/7 is an instance that nobody holds and 3/7 unsliced.
    assert {key[:2] + key[3:]: us for key, (us, _) in sliced.recomputed(3).items()} == {
        ("acme", "job-z", "held", "idle"): 8_571_429,
        ("", "", "unallocated", "unobserved"): 25_714_286,
        ("", "", "unsliced", "unobserved"): 6_428_571 + 19_285_714,
    }


def test_a_job_that_ended_before_is_another_run_of_the_same_id(sliced: Ledger) -> None:
    before = sliced.recomputed(3)
    old = {"claimed_at_ms": START_MS, "source": "kubernetes", "ended_ms": START_MS + 1000}
    sliced.feed("jobs", Job(id="job-z", revision=1, **old))
    assert sliced.recomputed(3) == before


def test_a_migration_that_was_cut_off_is_repeated(ledger: Ledger) -> None:
    migration = next(each for each in migrations() if each.name.endswith("sharing"))
    for statement in statements(migration.sql):
        ledger.sql(statement.replace("CREATE TABLE ", "CREATE TABLE IF NOT EXISTS ", 1))
