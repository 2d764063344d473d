"""Laws 2, 3 and 9 through the store: the real sinks, marks and recomputer on the real engine, driven without a broker.

Only marked minutes are computed, so every comparison with a ledger that was computed whole also says that no mark is
missing. A few seeds in every run; by hand many: `GPULEDGER_STORE_SEEDS=200 pytest tests/streams -k laws_store`.
"""

from __future__ import annotations

import os
import random
import uuid
from collections.abc import Iterator

import pytest

from gpuledger.cli.database import migrate_database
from gpuledger.schemas.config import ClickHouse
from gpuledger.streams.store import Store
from tests.fixtures.clickhouse import ClickHouse as Server
from tests.streams import laws
from tests.streams.computed import compute, figures, stored
from tests.streams.consumed import GRACE_MS, Worker, logs
from tests.streams.worlds import BASES, POOLS, World, world

pytestmark = pytest.mark.services

SEEDS = range(int(os.environ.get("GPULEDGER_STORE_SEEDS", "2")))


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
        whole = worker.written(table)
        assert [row for row in rows if row not in whole] == [] == [row for row in whole if row not in rows], table
    bounds = (worker.from_ms, worker.to_ms)
    table = stored(w, None, bounds)
    for pool in POOLS:
        ledger, _, _ = worker.recomputer.compute(pool, *bounds)
        assert figures(ledger) == figures(compute(w, pool, table, bounds))
    laws.agreement(w)


@pytest.mark.parametrize("seed", SEEDS)
def test_law_2_any_order_of_arrival_makes_the_same_ledger(store: Store, seed: int) -> None:
    w, r = made(seed), random.Random(seed)
    worker = Worker(store, w, logs(w, r), r)
    worker.empty()
    worker.run(crashes=False)
    as_if_computed_whole(worker)


@pytest.mark.parametrize("seed", SEEDS)
def test_law_3_crashes_and_redelivery_from_any_offset_change_nothing(store: Store, seed: int) -> None:
    w, r = made(1000 + seed), random.Random(seed)
    worker = Worker(store, w, logs(w, r), r)
    worker.empty()
    worker.run()
    as_if_computed_whole(worker)
    sources, rows = worker.sources(), worker.written("ledger_minute")
    for _ in range(4):
        worker.rewind()
    worker.run()
    assert worker.sources() == sources
    assert worker.written("ledger_minute") == rows
    as_if_computed_whole(worker)


@pytest.mark.parametrize("seed", SEEDS)
def test_law_9_a_correction_makes_the_ledger_that_had_known_it(store: Store, seed: int) -> None:
    w, r = made(2000 + seed), random.Random(seed)
    worker = Worker(store, w, logs(w, r), r)
    worker.empty()
    worker.until_ms = w["complete_until_ms"] + GRACE_MS
    worker.run()
    assert worker.recomputer.complete_until_ms() == w["complete_until_ms"]
    worker.until_ms = 1 << 60
    worker.run()
    as_if_computed_whole(worker)
