"""A small ledger on the real engine: two pools, two tenants, three complete hours, telemetry for part of them, prices.

Everything is made from events and batches by the product's own functions and computed by `Recomputer`; `SmallLedger`
only knows where things are.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import pyarrow as pa

from gpuledger.cli.database import migrate_database
from gpuledger.schemas.config import ClickHouse
from gpuledger.schemas.events import (
    Allocation,
    AssetCost,
    Commitment,
    EnergyTariff,
    Fact,
    Placement,
    PricePoint,
    RateCard,
)
from gpuledger.streams.decode import decode_block
from gpuledger.streams.facts import StoredFact, fact_rows, rank_of
from gpuledger.streams.fragments import fragments
from gpuledger.streams.ledger_rows import Version
from gpuledger.streams.recomputer import LedgerRules, Recomputer
from gpuledger.streams.store import Store
from tests.streams import worlds

MINUTE_MS, HOUR_MS = 60_000, 3_600_000
#: Hours that are complete, and where they begin: lately, because the tables forget after 90 days.
HOURS = 3
START_MS = time.time_ns() // 1_000_000 // HOUR_MS * HOUR_MS - 6 * HOUR_MS
END_MS = START_MS + HOURS * HOUR_MS
#: Minutes of hour 0 in which the GPUs of H100 were seen, all but g3.
SEEN = range(10, 20)
H100, B200 = "h100", "b200"
GATES = ("telemetry", "allocations", "inventory", "capacity")
RULES = LedgerRules(grace_ms=60_000, confirm_ms=600_000, price_interval_minutes=15, gates=dict.fromkeys(GATES, 1))


def minute(n: int) -> int:
    """The start of minute `n` of the ledger."""
    return START_MS + n * MINUTE_MS


def _fact(kind: type[Any], id_: str, **fields: Any) -> Any:
    return kind(id=id_, revision=1, claimed_at_ms=START_MS, **fields)


def allocation(id_: str, gpu: str, tenant: str, start: int, end: int | None, **fields: Any) -> Allocation:
    times = {"start_ms": minute(start) + 1234, "end_ms": None if end is None else minute(end) + 567}
    names = {"gpu": gpu, "node": "n0", "job_id": f"job-{id_}", "tenant": tenant, "user": "ann", "source": "slurm"}
    return _fact(Allocation, id_, **(names | times | fields))


def world() -> list[Fact]:
    """Placements, allocations, commitments and prices of the two pools."""
    facts: list[Fact] = [
        _fact(Placement, f"p-{gpu}", gpu=gpu, node="n0", pool=H100, model="H100", start_ms=START_MS)
        for gpu in ("g0", "g1", "g2", "g3")
    ]
    # g4 joins in the middle of a minute; b0 changes its pool in hour 1.
    facts += [
        _fact(Placement, "p-g4", gpu="g4", node="n1", pool=H100, start_ms=minute(15) + 20_000),
        _fact(Placement, "p-b0", gpu="b0", node="n2", pool=B200, start_ms=START_MS, end_ms=minute(70) + 30_000),
        _fact(Placement, "q-b0", gpu="b0", node="n2", pool=H100, start_ms=minute(70) + 30_000),
        _fact(Placement, "p-b1", gpu="b1", node="n2", pool=B200, start_ms=START_MS),
        allocation("a0", "g0", "acme", 5, 75),
        allocation("a1", "g1", "acme", 0, 170, weight_num=1, weight_den=3),
        allocation("a2", "g1", "nord", 12, 130, weight_num=1, weight_den=3),
        allocation("a3", "g2", "nord", 8, 40),
        allocation("b0", "b1", "nord", 30, 90, node="n2"),
        _fact(Commitment, "c0", pool=H100, tenant="acme", gpus=2, start_ms=START_MS, end_ms=minute(100)),
        _fact(
            AssetCost,
            "cost-h100",
            pool=H100,
            currency="EUR",
            period_cost=Decimal("1234.56"),
            start_ms=START_MS,
            end_ms=START_MS + 24 * HOUR_MS,
            pue=Decimal("1.2"),
            tariff="power",
        ),
        _fact(
            EnergyTariff,
            "power",
            currency="EUR",
            prices=[PricePoint(START_MS, Decimal("0.1")), PricePoint(minute(20), Decimal("-0.02"))],
            end_ms=START_MS + 24 * HOUR_MS,
        ),
        _fact(RateCard, "card", pool=H100, currency="EUR", per_gpu_hour=Decimal("2.35"), start_ms=START_MS),
    ]
    return facts


def batches() -> list[dict[str, Any]]:
    """What the agent of n0 sent: a batch per GPU and half minute, 5 s apart, of `SEEN`."""
    out: list[dict[str, Any]] = []
    for n, gpu in enumerate(("g0", "g1", "g2")):
        before: tuple[int | None, int | None] = (None, None)
        energy = 1_000_000 * n
        for seq in range(len(SEEN) * 2):
            samples: list[tuple[int, str, int]] = []
            for step in range(1, 7):
                at = minute(SEEN[0]) + seq * 30_000 + step * 5_000
                energy += 1_500_000 + 7 * n
                samples.append((at, "idle" if (seq + n) % 3 == 0 else "active", energy))
            device = {"gpu": gpu, "instance": 0, "previous_ts_ms": before[0], "previous_energy_mj": before[1]}
            batch = {"node": "n0", "run_id": f"run-{gpu}", "run_start_ms": START_MS, "seq": seq, "period_ms": 5_000}
            out.append({**batch, "devices": [{**device, "samples": samples}]})
            before = (samples[-1][0], samples[-1][2])
    return out


@dataclass
class SmallLedger:
    """The ledger in the database of `settings`; `store` is one connection to it."""

    settings: ClickHouse
    store: Store = field(init=False)
    offset: int = 0

    def __post_init__(self) -> None:
        self.store = Store(self.settings)

    def build(self) -> None:
        """Migrates the empty database, stores the world and computes all of it."""
        migrate_database(self.settings)
        self.add(*world())
        self.add_batches(batches())
        self.stored_until(END_MS + 10 * MINUTE_MS)
        self.compute()

    def add(self, *facts: Fact) -> None:
        """Stores facts, and marks nothing."""
        stored = [StoredFact(fact, rank_of(fact), "allocations", 0, n, START_MS) for n, fact in enumerate(facts)]
        for table, rows in fact_rows(stored, []).items():
            self.store.insert(table, rows)

    def add_batches(self, some: list[dict[str, Any]]) -> None:
        """Stores their fragments, and marks nothing."""
        found = fragments(decode_block([worlds.message(batch)._replace(timestamp_ms=END_MS) for batch in some]))
        if found is not None:
            self.store.insert_by_day("fragments", found.table, "minute")

    def stored_until(self, appended_ms: int) -> None:
        """Every partition has stored a record appended at this time."""
        rows = {
            "topic": pa.array(GATES),
            "partition": pa.array([0] * len(GATES), type=pa.uint32()),
            "appended_ms": pa.array([appended_ms] * len(GATES), type=pa.int64()),
            "offset": pa.array([7] * len(GATES), type=pa.int64()),
        }
        self.store.insert("progress", pa.table(rows))

    def compute(self, from_ms: int = START_MS, to_ms: int = END_MS) -> None:
        """A recompute of both pools, as the worker does it."""
        recomputer = Recomputer(self.store, RULES)
        for pool in (H100, B200):
            self.offset += 1
            recomputer.hours(pool, from_ms, to_ms, Version(1, self.offset, 5))

    def sql(self, statement: str, **parameters: Any) -> None:
        """Runs a statement that changes rows, and waits for it."""
        self.store.client.command(statement, parameters=parameters, settings={"mutations_sync": 1})

    def copy_row(self, table: str, where: str, **changed: str) -> None:
        """Inserts the rows that `where` selects again, with columns set to SQL expressions."""
        names = [row[0] for row in self.store.rows(f"DESCRIBE TABLE {table}")]
        values = ", ".join(changed.get(name, name) for name in names)
        self.sql(f"INSERT INTO {table} ({', '.join(names)}) SELECT {values} FROM {table} WHERE {where}")


@contextmanager
def built_ledger(url: str) -> Generator[SmallLedger]:
    """A ledger in a database of its own, for all tests of a module: building one takes longer than a test."""
    name = f"test_{uuid.uuid4().hex}"
    made = SmallLedger(ClickHouse(url=url, database=name))
    made.build()
    try:
        yield made
    finally:
        made.store.client.command(f"DROP DATABASE {name} SYNC")
        made.store.close()
