"""A believable day of a fleet in a database, for the audit benchmark: facts, fragments and the ledger made of them.

Fragments come from `fragments()` on decoded blocks of a cycle of ten minutes, of which the other cycles are the same
shifted in time, counter and number (the function does not care when a batch was); the ledger is what `Recomputer`
writes. Nothing is inserted that the product could not have written.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import random
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

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
from gpuledger.schemas.telemetry import COLUMNS, BatchHeader, Device
from gpuledger.streams.decode import TelemetryBlock, telemetry_schema
from gpuledger.streams.facts import StoredFact, fact_rows, rank_of
from gpuledger.streams.fragments import fragments
from gpuledger.streams.ledger_rows import Version
from gpuledger.streams.recomputer import LedgerRules, Recomputer
from gpuledger.streams.store import Store

__all__ = ["CYCLE_S", "Day", "fill", "rules"]

MINUTE_MS, HOUR_MS = 60_000, 3_600_000
#: Telemetry repeats after this, each GPU's at another place of the cycle.
CYCLE_S = 600
_GPUS_PER_NODE = 8
_TENANTS = 100
_GATES = ("telemetry", "allocations", "inventory", "capacity")
#: GPUs of one lane and how often: a lane is a place that one job after another has.
_LANES = {8: 45, 4: 15, 2: 15, 1: 25}
_SHARED_PCT = 4
#: (seconds, share of SMs active, milliwatts): the phases of a cycle, idle ones among them.
_PHASES = ((180, 0.9, 650_000), (20, 0.0, 110_000), (140, 0.7, 520_000), (30, 0.0, 110_000), (230, 0.95, 680_000))

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Day:
    """`gpus` GPUs in `pools` pools over [start_ms, start_ms + hours), an agent's flush every `flush_s` seconds."""

    gpus: int
    hours: int
    pools: int
    flush_s: int
    start_ms: int
    seed: int = 1

    @property
    def end_ms(self) -> int:
        return self.start_ms + self.hours * HOUR_MS

    @property
    def nodes(self) -> int:
        return -(-self.gpus // _GPUS_PER_NODE)

    def gpu(self, n: int) -> str:
        """The UUID of GPU `n`, as NVML gives one."""
        digest = hashlib.md5(f"{self.seed}-{n}".encode(), usedforsecurity=False).hexdigest()
        return f"GPU-{digest[:8]}-{digest[8:12]}-{digest[12:16]}-{digest[16:20]}-{digest[20:]}"

    def node(self, n: int) -> str:
        return f"node-{n:05d}"

    def pool_of(self, node: int) -> str:
        return f"pool-{node * self.pools // self.nodes}"

    @property
    def pool_names(self) -> list[str]:
        return [f"pool-{n}" for n in range(self.pools)]


def rules() -> LedgerRules:
    """Those under which the day is computed and audited."""
    return LedgerRules(grace_ms=60_000, confirm_ms=600_000, price_interval_minutes=15, gates=dict.fromkeys(_GATES, 1))


def fill(settings: ClickHouse, day: Day, jobs: int) -> None:
    """Writes the day into a migrated, empty database, the ledger in `jobs` processes; prints what it does, for it takes
    minutes."""
    store = Store(settings)
    began = time.monotonic()

    def say(what: str) -> None:
        print(f"{time.monotonic() - began:7.1f} s  {what}", flush=True)

    facts = _facts(day)
    _store_facts(store, facts, day.start_ms)
    say(f"{len(facts):,} facts")
    _store_fragments(store, day)
    count, parts = store.rows("SELECT count(), uniqExact(_part) FROM fragments")[0]
    say(f"{count:,} fragments in {parts} parts")
    _progress(store, day.end_ms + 10 * MINUTE_MS)
    # A pool is one process's, as with workers.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as workers:
        for pool in workers.map(_compute, *zip(*((settings, day, pool) for pool in day.pool_names), strict=True)):
            say(f"ledger of {pool}")
    for table in ("ledger_minute", "ledger_gpu_minute", "ledger_gpu_hour", "ledger_job_hour", "charges"):
        say(f"{store.rows(f'SELECT count() FROM {table}')[0][0]:,} rows of {table}")
    store.close()


def _compute(settings: ClickHouse, day: Day, pool: str) -> str:
    store = Store(settings)
    recomputer = Recomputer(store, rules())
    for n, hour in enumerate(range(day.start_ms, day.end_ms, HOUR_MS)):
        recomputer.hours(pool, hour, hour + HOUR_MS, Version(1, n, 1))
    store.close()
    return pool


# ------------------------------------------------------------------------------------------------- facts


def _facts(day: Day) -> list[Fact]:
    facts: list[Fact] = []
    month_ms = 30 * 24 * HOUR_MS
    claimed: dict[str, Any] = {"revision": 1, "claimed_at_ms": day.start_ms}
    for n in range(day.gpus):
        node = n // _GPUS_PER_NODE
        names = {"gpu": day.gpu(n), "node": day.node(node), "pool": day.pool_of(node)}
        facts.append(Placement(id=f"p-{n}", **names, model="H100", start_ms=day.start_ms - month_ms, **claimed))
    facts += _allocations(day, claimed)
    prices = [PricePoint(day.start_ms + n * 900_000, Decimal(30 + n * 7 % 45) / 1000) for n in range(day.hours * 4)]
    facts.append(EnergyTariff(id="spot", currency="EUR", prices=prices, end_ms=day.end_ms, **claimed))
    for pool in day.pool_names:
        size = day.gpus // day.pools
        period = {"start_ms": day.start_ms - HOUR_MS, "end_ms": day.start_ms - HOUR_MS + month_ms}
        cost = {"currency": "EUR", "period_cost": Decimal(size * 700), "pue": Decimal("1.2"), "tariff": "spot"}
        facts.append(AssetCost(id=f"cost-{pool}", pool=pool, **cost, **period, **claimed))
        card = {"currency": "EUR", "per_gpu_hour": Decimal("2.35"), "start_ms": period["start_ms"]}
        facts.append(RateCard(id=f"card-{pool}", pool=pool, **card, **claimed))
        for tenant in range(4):
            who = {"tenant": f"tenant-{tenant:02d}", "gpus": max(1, size // 12), "start_ms": day.start_ms - HOUR_MS}
            facts.append(Commitment(id=f"c-{pool}-{tenant}", pool=pool, state="active", **who, **claimed))
    return facts


def _allocations(day: Day, claimed: dict[str, Any]) -> Iterable[Fact]:
    """Jobs one after another in the lanes of each node: about four fifths of the time, few large and many small."""
    chance = random.Random(day.seed)
    job = 0
    for node in range(day.nodes):
        first, width = node * _GPUS_PER_NODE, min(_GPUS_PER_NODE, day.gpus - node * _GPUS_PER_NODE)
        size = min(chance.choices(list(_LANES), list(_LANES.values()))[0], width)
        shares = 3 if size == 1 and chance.randrange(100) < 4 * _SHARED_PCT else 1
        for lane in range(width // size * shares):
            gpus = range(first + lane // shares * size, first + lane // shares * size + size)
            at = day.start_ms - int(chance.expovariate(1 / 3600) * 1000)
            while at < day.end_ms:
                length_ms = max(20_000, int(chance.lognormvariate(0, 1.3) * 3_600_000))
                end = at + length_ms
                names = {
                    "job_id": str(1_000_000 + job),
                    "tenant": f"tenant-{min(_TENANTS - 1, int(chance.expovariate(1 / 12))):02d}",
                    "user": f"user-{chance.randrange(500)}",
                    "source": "slurm",
                    "node": day.node(node),
                }
                for gpu in gpus:
                    yield Allocation(
                        id=f"a-{job}-{gpu}-{lane}",
                        gpu=day.gpu(gpu),
                        start_ms=at,
                        end_ms=end,
                        weight_num=1,
                        weight_den=shares,
                        **names,
                        **claimed,
                    )
                job += 1
                at = end + int(chance.expovariate(1 / 900) * 1000)


def _store_facts(store: Store, facts: Sequence[Fact], appended_ms: int) -> None:
    stored = [StoredFact(fact, rank_of(fact), "allocations", 0, n, appended_ms) for n, fact in enumerate(facts)]
    for table, rows in fact_rows(stored, []).items():
        for start in range(0, rows.num_rows, 200_000):
            store.insert(table, rows.slice(start, 200_000))


def _progress(store: Store, appended_ms: int) -> None:
    rows = {
        "topic": pa.array(_GATES),
        "partition": pa.array([0] * len(_GATES), type=pa.uint32()),
        "appended_ms": pa.array([appended_ms] * len(_GATES), type=pa.int64()),
        "offset": pa.array([7] * len(_GATES), type=pa.int64()),
    }
    store.insert("progress", pa.table(rows))


# ------------------------------------------------------------------------------------------------- fragments


def _store_fragments(store: Store, day: Day) -> None:
    """One cycle by the product's functions, the others by the engine as the same rows later."""
    store.client.command("CREATE TABLE cycle ENGINE = MergeTree ORDER BY minute AS SELECT * FROM fragments LIMIT 0")
    for first in range(0, day.nodes, 200):
        found = fragments(_block(day, range(first, min(first + 200, day.nodes))))
        assert found is not None
        store.insert("cycle", found.table)
    names = [str(row[0]) for row in store.rows("DESCRIBE TABLE fragments")]
    shifted = {name: f"{name} + toIntervalSecond({{cycle:Int64}} * {CYCLE_S})" for name in ("minute", "appended_at")}
    shifted["seq"] = f"seq + {{cycle:Int64}} * {CYCLE_S // day.flush_s}"
    for name in ("energy_first_mj", "energy_last_mj"):
        shifted[name] = f"{name} + {{cycle:Int64}} * {_cycle_mj()}"
    for name in ("segment_energy_from_mj", "segment_energy_to_mj"):
        shifted[name] = f"arrayMap(x -> x + {{cycle:Int64}} * {_cycle_mj()}, {name})"
    values = ", ".join(shifted.get(name) or name for name in names)
    sql = f"INSERT INTO fragments ({', '.join(names)}) SELECT {values} FROM cycle " + (
        f"WHERE toUnixTimestamp64Milli(minute) + {{cycle:Int64}} * {CYCLE_S * 1000} < {{end:Int64}}"
    )
    for cycle in range(-(-day.hours * 3600 // CYCLE_S)):
        store.client.command(sql, parameters={"cycle": cycle, "end": day.end_ms}, settings={"max_threads": 1})
    store.client.command("DROP TABLE cycle SYNC")


def _cycle_mj() -> int:
    return sum(seconds * power_mw for seconds, _, power_mw in _PHASES)


def _block(day: Day, nodes: range) -> TelemetryBlock:
    """What the agents of these nodes flush in one cycle, decoded. Nodes flush by turns; samples lie on the second."""
    seconds = np.arange(1, CYCLE_S + 1)
    headers: list[BatchHeader] = []
    flat: dict[str, list[Ints]] = {"message": [], "device": [], "gpu": [], "at": []}
    for node in nodes:
        gpus = np.arange(node * _GPUS_PER_NODE, min((node + 1) * _GPUS_PER_NODE, day.gpus))
        names = [day.gpu(gpu) for gpu in gpus.tolist()]
        counters = _counters(gpus[:, None], np.arange(CYCLE_S)[None, :])
        # The first batch is shorter, so that nodes take turns.
        batch = (seconds - 1 + node % day.flush_s) // day.flush_s
        first = np.flatnonzero(np.append(True, np.diff(batch) != 0))
        for seq, before in enumerate(first.tolist()):
            at_ms = day.start_ms + before * 1000
            last = zip(names, counters[:, before].tolist(), strict=True)
            headers.append(_header(day, node, seq, [Device(gpu, 0, at_ms, mj) for gpu, mj in last]))
        flat["message"].append(np.tile(len(headers) - len(first) + batch, len(gpus)))
        flat["device"].append(np.repeat(np.arange(len(gpus)), CYCLE_S))
        flat["gpu"].append(np.repeat(gpus, CYCLE_S))
        flat["at"].append(np.tile(seconds, len(gpus)))
    columns = {name: np.concatenate(parts) for name, parts in flat.items()}
    order = np.argsort(columns["message"], kind="stable")
    return _decoded(day, headers, {name: values[order] for name, values in columns.items()})


def _header(day: Day, node: int, seq: int, devices: list[Device]) -> BatchHeader:
    return BatchHeader(
        node=day.node(node),
        boot_id=f"boot-{node}",
        boot_start_ms=day.start_ms - 2 * HOUR_MS,
        run_id=hashlib.md5(f"run-{node}".encode(), usedforsecurity=False).hexdigest(),
        run_start_ms=day.start_ms - HOUR_MS,
        seq=seq,
        period_ms=1000,
        anchor_wall_ms=0,
        anchor_boottime_ms=0,
        devices=devices,
    )


_ACTIVE = np.concatenate([np.full(seconds, share) for seconds, share, _ in _PHASES])
_POWER_MW = np.concatenate([np.full(seconds, mw, dtype=np.int64) for seconds, _, mw in _PHASES])
_ENERGY_MJ = np.concatenate([[0], np.cumsum(_POWER_MW)])


def _place(gpu: Ints, at: Ints) -> Ints:
    """Where in the cycle's phases a GPU is in second `at`."""
    return (at + gpu * 37) % CYCLE_S


def _counters(gpu: Ints, at: Ints) -> Ints:
    """Millijoules after second `at` of the cycle; a whole cycle uses the same for every GPU."""
    begin = _place(gpu, np.zeros_like(gpu))
    end = begin + at
    used = end // CYCLE_S * _ENERGY_MJ[-1] + _ENERGY_MJ[end % CYCLE_S] - _ENERGY_MJ[begin]
    return 1_000_000_000 + gpu * 1_000 + used


def _decoded(day: Day, headers: list[BatchHeader], flat: dict[str, Ints]) -> TelemetryBlock:
    rows = len(flat["at"])
    place = _place(flat["gpu"], flat["at"] - 1)
    sm = _ACTIVE[place].astype(np.float32)
    mw = _POWER_MW[place]
    known: dict[str, pa.Array] = {
        "ts_ms": pa.array(day.start_ms + flat["at"] * 1000),
        "device": pa.array(flat["device"], type=pa.int16()),
        "gpu_util_pct": pa.array((sm * 100).astype(np.float32)),
        "sm_active": pa.array(sm),
        "tensor_active": pa.array((sm / 2).astype(np.float32)),
        "dram_active": pa.array((sm / 3).astype(np.float32)),
        "memory_used_bytes": pa.array(np.where(sm > 0, 60 << 30, 1 << 30)),
        "energy_mj": pa.array(_counters(flat["gpu"], flat["at"])),
        "power_mw": pa.array(mw),
        "temperature_gpu_c": pa.array((40 + mw / 20_000).astype(np.float32)),
    }
    schema = telemetry_schema()
    arrays = [known.get(column.name, pa.nulls(rows, schema.field(column.name).type)) for column in COLUMNS]
    return TelemetryBlock(
        headers=headers,
        appended_ms=np.full(len(headers), day.start_ms + CYCLE_S * 1000, dtype=np.int64),
        source=np.arange(len(headers)),
        message=flat["message"],
        columns=pa.Table.from_arrays(arrays, schema=schema),
        rejected=[],
    )
