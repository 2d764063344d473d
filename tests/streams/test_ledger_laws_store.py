"""Laws 2, 3 and 9 through the store: the real sinks, marks and recomputer on the real engine, driven without a broker.

Only marked minutes are computed, so every comparison with a ledger that was computed whole also says that no mark is
missing. A few seeds in every run; by hand many: `GPULEDGER_STORE_SEEDS=200 pytest tests/streams -k laws_store`.
"""

from __future__ import annotations

import os
import random
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from msgspec.structs import replace

from gpuledger.cli.database import migrate_database
from gpuledger.schemas.config import ClickHouse
from gpuledger.schemas.events import Fact
from gpuledger.streams.holders import UNPLACED_POOL
from gpuledger.streams.store import Store
from tests.fixtures.clickhouse import ClickHouse as Server
from tests.streams import laws
from tests.streams.chance import Seeded
from tests.streams.computed import compute, figures, stored
from tests.streams.consumed import GRACE_MS, Worker, logs
from tests.streams.laws_money import prices
from tests.streams.worlds import BASES, POOLS, World, world
from tests.streams.wrong import IN_THE_STORE, InTheStore

pytestmark = pytest.mark.services

SEEDS = range(int(os.environ.get("GPULEDGER_STORE_SEEDS", "1")))


@pytest.fixture(scope="module")
def store(clickhouse: Server) -> Iterator[Store]:
    """A migrated database, which every world empties."""
    name = f"test_{uuid.uuid4().hex}"
    settings = ClickHouse(url=clickhouse.url, database=name)
    migrate_database(settings)
    made = Store(settings)
    yield made
    made.client.command(f"DROP DATABASE {name} SYNC")
    made.close()


def made(seed: int) -> World:
    return world(seed, BASES, most=6)


def as_if_computed_whole(worker: Worker) -> None:
    """What was written mark by mark is what one computation of everything writes, from what the store holds; and that
    is the ledger of the world, which the oracle confirms."""
    w = worker.world
    before = {table: worker.written(table) for table in ("ledger_minute", "ledger_gpu_minute")}
    worker.compute_all(POOLS)
    for table, rows in before.items():
        same(rows, worker.written(table), table)
    bounds = (worker.from_ms, worker.to_ms)
    table = stored(w, None, bounds)
    for pool in POOLS:
        ledger, _, _ = worker.recomputer.compute(pool, *bounds)
        assert figures(ledger) == figures(compute(w, pool, table, bounds))
    laws.agreement(w)


def same(rows: list[Any], whole: list[Any], table: str) -> None:
    missing, spare = set(whole) - set(rows), set(rows) - set(whole)
    assert not missing and not spare, f"{table}: {len(missing)} rows missing, {len(spare)} too many: {missing or spare}"


def any_order(store: Store, w: World, r: random.Random) -> None:
    """Law 2."""
    worker = Worker(store, w, logs(w, r), r)
    worker.empty()
    worker.run(crashes=False)
    as_if_computed_whole(worker)


def redelivery(store: Store, w: World, r: random.Random) -> None:
    """Law 3: crashes on the way, the last records each twice, then everything again from anywhere."""
    worker = Worker(store, w, logs(w, r, tail=2), r)
    worker.empty()
    worker.until_ms = w["complete_until_ms"] + GRACE_MS
    worker.run()
    worker.until_ms = 1 << 60
    worker.one_by_one(abandoned=True)
    as_if_computed_whole(worker)
    sources, rows = worker.sources(), worker.written("ledger_minute")
    for _ in range(4):
        worker.rewind()
    worker.run()
    assert worker.sources() == sources
    same(rows, worker.written("ledger_minute"), "ledger_minute")
    as_if_computed_whole(worker)


def correction(store: Store, w: World, r: random.Random) -> None:
    """Law 9: all minutes are complete before the last facts and batches come, one by one."""
    worker = Worker(store, w, logs(w, r, tail=3), r)
    worker.empty()
    worker.until_ms = w["complete_until_ms"] + GRACE_MS
    worker.run(crashes=False, most=100)
    assert worker.recomputer.complete_until_ms() == w["complete_until_ms"]
    worker.until_ms = 1 << 60
    worker.one_by_one()
    as_if_computed_whole(worker)


LAWS = {"2": any_order, "3": redelivery, "9": correction}


@pytest.mark.parametrize("seed", SEEDS)
def test_law_2_any_order_of_arrival_makes_the_same_ledger(store: Store, seed: int) -> None:
    any_order(store, made(seed), random.Random(seed))


@pytest.mark.parametrize("seed", SEEDS)
def test_law_3_crashes_and_redelivery_from_any_offset_change_nothing(store: Store, seed: int) -> None:
    redelivery(store, made(1000 + seed), random.Random(seed))


@pytest.mark.parametrize("seed", SEEDS)
def test_law_9_a_correction_makes_the_ledger_that_had_known_it(store: Store, seed: int) -> None:
    correction(store, made(2000 + seed), random.Random(seed))


@pytest.mark.parametrize("seed", SEEDS)
def test_hours_jobs_conflicts_and_money_are_those_of_a_ledger_computed_whole(store: Store, seed: int) -> None:
    """Laws 2, 3 and 9 for everything that is written by the hour, computed as the dirty agent does it."""
    w, r = made(3000 + seed), random.Random(seed)
    rates: list[Fact] = []
    for pool in POOLS:
        p = prices(Seeded(seed), w, pool)
        rates += [p.tariff, *(replace(fact, id=f"{fact.id}-{pool}") for fact in (p.cost, *p.cards))]
        rates.append(replace(p.cost, id=f"cost-{pool}", revision=2, period_cost=p.cost.period_cost + 7))
    worker = Worker(store, w, logs(w, r, rates), r)
    worker.empty()
    worker.run(by_queue=True)
    tables = {"ledger_gpu_hour": "hour", "ledger_job_hour": "hour", "conflicts": "hour", "charges": "interval_start"}
    before = {table: worker.written(table, column) for table, column in tables.items()}
    worker.compute_all([*POOLS, UNPLACED_POOL], hours=True)
    for table, column in tables.items():
        same(before[table], worker.written(table, column), table)
    assert before["charges"] and before["ledger_gpu_hour"]


@pytest.mark.parametrize("case", IN_THE_STORE, ids=str)
def test_a_law_notices_in_the_store(case: InTheStore, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these mistakes in what is stored or marked shows on one world."""
    w = world(case.seed, BASES, most=4, kinds=case.kinds)
    with monkeypatch.context() as patch, pytest.raises(AssertionError):
        case.mistake.make(patch)
        LAWS[case.mistake.law](store, w, random.Random(case.seed))
