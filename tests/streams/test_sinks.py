"""Which minutes a block of telemetry marks, on the real engine."""

import asyncio
from collections.abc import Iterator

import pytest

from gpuledger.agents.batch import encode_batch
from gpuledger.cli.database import migrate_database
from gpuledger.schemas.config import ClickHouse
from gpuledger.schemas.events import Allocation, Dirty, Event, Inventory, Placement, encode_event
from gpuledger.schemas.telemetry import BatchHeader, Device
from gpuledger.streams.blocks import Record
from gpuledger.streams.intake import Stored
from gpuledger.streams.marks import MINUTE_MS
from gpuledger.streams.recomputer import LedgerRules
from gpuledger.streams.sinks import FactsSink, Followup, TelemetrySink
from gpuledger.streams.store import Store
from tests.fixtures.clickhouse import ClickHouseDatabase

pytestmark = pytest.mark.services

T0 = 1_760_000_040_000
CONFIRM_MS = 10 * MINUTE_MS
RULES = LedgerRules(grace_ms=60_000, confirm_ms=CONFIRM_MS, price_interval_minutes=15)
NOW = T0 + 120 * MINUTE_MS


@pytest.fixture
def store(clickhouse_database: ClickHouseDatabase) -> Iterator[Store]:
    """A migrated database in which GPU g1 of node n is in pool p, held since T0 by an allocation of boot b1."""
    settings = ClickHouse(url=clickhouse_database.url, database=clickhouse_database.name)
    migrate_database(settings)
    made = Store(settings)
    placement = Placement(id="p", revision=1, claimed_at_ms=T0, gpu="g1", node="n", pool="p", start_ms=T0)
    held = Allocation(
        id="a", revision=1, claimed_at_ms=T0, node="n", boot_id="b1", gpu="g1", job_id="j", source="slurm", start_ms=T0
    )
    facts = [Inventory(node="n", claimed_at_ms=T0, placements=[placement]), held]
    for topic, event in zip(("inventory", "allocations"), facts, strict=True):
        FactsSink(made, topic, unsent, 120_000).store([record(topic, event)])
    yield made
    made.close()


async def unsent(event: Dirty) -> None:
    pass


def record(topic: str, event: Event) -> Record:
    return Record(topic, 0, 0, NOW, b"k", encode_event(event), ())


def batch(at_ms: int, boot: str = "b1", boot_start_ms: int = T0 - 90 * 86_400_000, running: bool = True) -> Record:
    """One idle second of the GPU, with what its agent knows to run."""
    header = BatchHeader(
        node="n",
        boot_id=boot,
        boot_start_ms=boot_start_ms,
        run_id=f"run-{boot}",
        run_start_ms=T0,
        seq=at_ms // 1000 % 1_000_000,
        period_ms=1000,
        anchor_wall_ms=T0,
        anchor_boottime_ms=0,
        devices=[Device("g1", 0, at_ms - 1000, None)],
        running=["a"] if running else [],
    )
    message = encode_batch(header, {"ts_ms": [at_ms], "device": [0], "sm_active": [0.0]})
    return Record("telemetry", 0, at_ms // 1000, NOW, b"n", message.value, tuple(message.headers))


def ranges(stored: Stored[Followup]) -> list[tuple[int, int]]:
    """What is marked of pool p, in minutes since T0."""
    return [((a - T0) // MINUTE_MS, (b - T0) // MINUTE_MS) for a, b in stored.marks.marks.merged().get("p", ())]


def test_a_batch_marks_its_minute_and_what_it_confirms(store: Store) -> None:
    sink = TelemetrySink(store, unsent, RULES)
    first = sink.store([batch(T0 + 30_000)])
    assert ranges(first) == [(0, 1), (10, 11)]
    asyncio.run(sink.after(first))
    assert ranges(sink.store([batch(T0 + 5 * MINUTE_MS + 30_000)])) == [(5, 6), (10, 16)]


def test_a_block_that_comes_back_before_its_marks_were_out_is_marked_again(store: Store) -> None:
    sink = TelemetrySink(store, unsent, RULES)
    blocks = [batch(T0 + 12 * MINUTE_MS + 30_000), batch(T0 + 30 * MINUTE_MS + 30_000, "b2", T0 + 20 * MINUTE_MS)]
    first = sink.store(blocks)
    assert ranges(first) == [(10, 122)]
    assert ranges(sink.store(blocks)) == ranges(first)
    asyncio.run(sink.after(first))
    assert ranges(sink.store(blocks)) == [(12, 13), (30, 31)]


@pytest.mark.parametrize("second_first", [False, True])
def test_a_new_boot_marks_what_it_ends_whichever_is_heard_of_first(store: Store, second_first: bool) -> None:
    old = batch(T0 + 5 * MINUTE_MS + 30_000, running=False)
    new = batch(T0 + 30 * MINUTE_MS + 30_000, "b2", T0 + 20 * MINUTE_MS, running=False)
    sink = TelemetrySink(store, unsent, RULES)
    marked: list[list[tuple[int, int]]] = []
    for each in (new, old) if second_first else (old, new):
        stored = sink.store([each])
        asyncio.run(sink.after(stored))
        marked.append(ranges(stored))
    alone = [(30, 31)] if second_first else [(5, 6)]
    # The 90 days before the allocation, in which the old boot ran, are left alone.
    assert marked == [alone, [(5, 6), (20, 122)] if second_first else [(20, 122)]]
