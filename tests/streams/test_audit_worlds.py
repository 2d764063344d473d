"""The audit passes on random worlds: shared GPUs, changing pools, reboots, lost batches, runs that overlap."""

from __future__ import annotations

import pyarrow as pa
import pytest

from gpuledger.schemas.config import ClickHouse
from gpuledger.streams.audit import audit
from gpuledger.streams.ledger_rows import Version
from gpuledger.streams.recomputer import LedgerRules, Recomputer
from tests.fixtures.clickhouse import ClickHouseDatabase
from tests.streams import inputs, worlds
from tests.streams.small_ledger import GATES, HOUR_MS, START_MS, SmallLedger, migrate_database

pytestmark = pytest.mark.services

RULES = LedgerRules(grace_ms=0, confirm_ms=45_000, price_interval_minutes=15, gates=dict.fromkeys(GATES, 1))


@pytest.mark.parametrize("seed", range(6))
def test_a_random_world_balances(
    seed: int, clickhouse_database: ClickHouseDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worlds, "START_MS", START_MS + 10 * 60_000)
    w = worlds.world(seed)
    ledger = SmallLedger(ClickHouse(url=clickhouse_database.url, database=clickhouse_database.name))
    migrate_database(ledger.settings)
    ledger.add(*inputs.events(w))
    ledger.add_batches(w["batches"])
    boots, named = inputs.boots(w), inputs.namings(w) or {"nobody": w["from_ms"]}
    names = ("node", "boot_id", "start_ms")
    ledger.store.insert("boots", pa.table({name: pa.array([boot[name] for boot in boots]) for name in names}))
    confirmed = {"allocation_id": pa.array(list(named)), "named_ms": pa.array(list(named.values()))}
    ledger.store.insert("confirmed", pa.table(confirmed))
    ledger.stored_until(START_MS + 2 * HOUR_MS)
    for pool in worlds.POOLS:
        Recomputer(ledger.store, RULES).hours(pool, START_MS, START_MS + HOUR_MS, Version(1, 1, 1))
    report = audit(ledger.store, RULES, START_MS, START_MS + HOUR_MS, sample=0, pauses_s=())
    assert report.findings == []
    seen = audit(ledger.store, RULES, w["from_ms"], w["to_ms"], sample=1000, pauses_s=())
    assert seen.findings == [] and seen.sampled >= (w["to_ms"] - w["from_ms"]) // 60_000
    ledger.store.close()
