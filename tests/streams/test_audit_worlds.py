"""The audit passes on random worlds: shared GPUs, changing pools, reboots, lost batches, runs that overlap."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from gpuledger.schemas.config import ClickHouse
from gpuledger.schemas.events import AccountRule, Allocation, Commitment, Fact, Placement, Tenant, Transfer
from gpuledger.streams.audit import audit
from gpuledger.streams.ledger_rows import Version
from gpuledger.streams.recomputer import LedgerRules, Recomputer
from tests.fixtures.clickhouse import ClickHouseDatabase
from tests.streams import worlds
from tests.streams.small_ledger import GATES, HOUR_MS, START_MS, SmallLedger, migrate_database

pytestmark = pytest.mark.services

RULES = LedgerRules(grace_ms=0, confirm_ms=45_000, price_interval_minutes=15, gates=dict.fromkeys(GATES, 1))


def events(w: dict[str, Any]) -> list[Fact]:
    """The world's facts, every revision of them."""
    found: list[Fact] = [Placement(**p) for p in w["placements"]]
    claimed = {"claimed_at_ms": w["from_ms"]}
    found += [Allocation(**claimed, **a) for a in w["allocations"]]
    found += [
        Commitment(**claimed, **c) for c in w["commitments"] if c["end_ms"] is None or c["end_ms"] >= c["start_ms"]
    ]
    found += [Transfer(**claimed, **t) for t in w["transfers"]]
    found += [
        Tenant(
            id=tenant,
            revision=1,
            **claimed,
            rules=[AccountRule(match="account", value=account, start_ms=max(start, 946_684_800_000))],
        )
        for tenant, account, start, _ in w["accounts"][:1]
    ]
    return found


@pytest.mark.parametrize("seed", range(6))
def test_a_random_world_balances(
    seed: int, clickhouse_database: ClickHouseDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worlds, "START_MS", START_MS + 10 * 60_000)
    w = worlds.world(seed)
    ledger = SmallLedger(ClickHouse(url=clickhouse_database.url, database=clickhouse_database.name))
    migrate_database(ledger.settings)
    ledger.add(*events(w))
    ledger.add_batches(w["batches"])
    boots = [(node, boot, start) for (node, boot), start in w["boots"].items()]
    ledger.store.insert(
        "boots",
        pa.table(
            {
                name: pa.array(values)
                for name, values in zip(("node", "boot_id", "start_ms"), zip(*boots, strict=True), strict=True)
            }
        ),
    )
    named = w["named"] or [("nobody", w["from_ms"])]
    ledger.store.insert(
        "confirmed",
        pa.table({"allocation_id": pa.array([id_ for id_, _ in named]), "named_ms": pa.array([t for _, t in named])}),
    )
    ledger.stored_until(START_MS + 2 * HOUR_MS)
    for pool in worlds.POOLS:
        Recomputer(ledger.store, RULES).hours(pool, START_MS, START_MS + HOUR_MS, Version(1, 1, 1))
    report = audit(ledger.store, RULES, START_MS, START_MS + HOUR_MS, sample=0, pauses_s=())
    assert report.findings == []
    seen = audit(ledger.store, RULES, w["from_ms"], w["to_ms"], sample=1000, pauses_s=())
    assert seen.findings == [] and seen.sampled >= worlds.MINUTES
    ledger.store.close()
