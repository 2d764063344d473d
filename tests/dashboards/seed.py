"""Plausible ledger rows for the dashboards' tests: a site of 1,000 GPUs, five tenants, half a pool changing hands.

Pure and deterministic for a given instant; amounts are integers made here by plain loops, so a test can sum them in
Python and compare with what a panel says. Every tenth minute also has an older version with wrong numbers, which no
panel may show.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

from clickhouse_connect.driver.client import Client

__all__ = ["EMPTY_PAYER", "GB200", "H100", "Seed", "make_seed", "store"]

H100, GB200 = "narvik-h100", "narvik-gb200"
GPUS = {H100: 640, GB200: 360}
#: Nano-euros per pool and minute (fixed) and per GPU-minute held (energy).
FIXED_NANO = {H100: 14_933_333_333, GB200: 15_600_000_007}
ENERGY_NANO_PER_GPU_MINUTE = {H100: 1_166_667, GB200: 1_900_003}
PRICE_PER_GPU_HOUR = {H100: Decimal("2.35"), GB200: Decimal("4.10")}
EMPTY_PAYER = "(operator)"
SHIFT_MINUTES_AGO, SHIFT_GPUS = 38, 320
MINUTE_US = 60_000_000

Row = dict[str, Any]


@dataclass
class Seed:
    """`tables`: rows by table name, each a dict of columns. `now` is when they were made, `minute` the open minute."""

    now: datetime
    minute: datetime
    tables: dict[str, list[Row]] = field(default_factory=dict)

    def add(self, table: str, **columns: Any) -> None:
        self.tables.setdefault(table, []).append(columns)

    def newest(self, table: str) -> list[Row]:
        """Rows of the current version only, without the markers."""
        return [row for row in self.tables.get(table, []) if not row.get("stale") and row.get("kind") != "marker"]


def _held(pool: str, tenant: str, minutes_ago: int) -> int:
    """GPUs held; a slow wobble that needs no random numbers."""
    wave = (minutes_ago * 7 + len(tenant) * 13) % 23 - 11
    after = minutes_ago <= SHIFT_MINUTES_AGO
    ramp = min(SHIFT_MINUTES_AGO - minutes_ago, 12) if after else 0
    base = {
        (H100, "openhorizon"): 184 + wave // 3 if after else 468 + wave,
        (H100, "nordic-lm"): 90 + ramp * 26 + wave // 4 if after else 84 + wave // 2,
        (H100, "fjord-bio"): 32,
        (GB200, "openhorizon"): 176 + wave // 2,
        (GB200, "havn-robotics"): 64,
        (GB200, "uio-physics"): 40 + wave // 5,
        (GB200, "unattributed"): 4,
    }
    return base.get((pool, tenant), 0)


def _reserved(pool: str, tenant: str, minutes_ago: int) -> int:
    shift = SHIFT_GPUS if minutes_ago <= SHIFT_MINUTES_AGO else 0
    reserved = {
        (H100, "openhorizon"): 512 - shift,
        (H100, "nordic-lm"): 96 + shift,
        (GB200, "openhorizon"): 216,
        (GB200, "havn-robotics"): 64,
    }
    return reserved.get((pool, tenant), 0)


TENANTS = ("openhorizon", "nordic-lm", "fjord-bio", "havn-robotics", "uio-physics", "unattributed")
ACTIVE_PERCENT = {"openhorizon": 91, "nordic-lm": 78, "fjord-bio": 43, "havn-robotics": 86, "uio-physics": 61}


def _minute_rows(pool: str, minutes_ago: int, elapsed_us: int) -> list[tuple[str, str, str, int]]:
    """(tenant, kind, activity, gpu_us) of a minute of which `elapsed_us` have passed."""
    rows: list[tuple[str, str, str, int]] = []
    left = GPUS[pool] * MINUTE_US
    for tenant in TENANTS:
        held = _held(pool, tenant, minutes_ago) * MINUTE_US
        if not held:
            continue
        seen = held * elapsed_us // MINUTE_US
        active = seen * ACTIVE_PERCENT.get(tenant, 20) // 100
        unobserved = seen // 200 if tenant == "fjord-bio" else 0
        parts = {
            "active": active,
            "idle": seen - active - unobserved,
            "unobserved": unobserved,
            "pending": held - seen,
        }
        rows += [(tenant, "held", activity, us) for activity, us in parts.items() if us]
        left -= held
    for tenant in TENANTS:
        unused = max(0, _reserved(pool, tenant, minutes_ago) - _held(pool, tenant, minutes_ago)) * MINUTE_US
        if unused:
            rows.append((tenant, "reserved_unused", "", unused))
            left -= unused
    assert left >= 0, (pool, minutes_ago, left)
    rows.append(("", "free", "", left))
    return rows


def largest_remainder(total: int, weights: list[int]) -> list[int]:
    """`total` split in proportion to `weights`, summing to it exactly; ties go to the earlier."""
    whole = sum(weights)
    shares = [total * weight // whole for weight in weights]
    order = sorted(range(len(weights)), key=lambda n: (-(total * weights[n] % whole), n))
    for n in order[: total - sum(shares)]:
        shares[n] += 1
    return shares


def _jobs(pool: str, tenant: str) -> list[tuple[str, int]]:
    """(job id, weight) of a tenant in a pool."""
    names = {
        "openhorizon": [("pretrain-70b", 5), ("pretrain-eval", 1), ("sft-sweep", 2)],
        "nordic-lm": [("norsk-gpt-34b", 6), ("tokenizer-ablation", 1)],
        "fjord-bio": [("protein-folding", 1)],
        "havn-robotics": [("sim-to-real", 3), ("vla-finetune", 1)],
        "uio-physics": [("lattice-qcd", 1)],
        "unattributed": [("jupyter-4471", 1)],
    }
    return [(f"{pool.split('-')[1]}-{name}", weight) for name, weight in names[tenant]]


def _marker(pool: str, minute: datetime, complete: int, version: int) -> Row:
    return {
        "pool": pool,
        "minute": minute,
        "tenant": "",
        "kind": "marker",
        "activity": "",
        "gpu_us": GPUS[pool] * MINUTE_US,
        "energy_mj": None,
        "version": version,
        "complete": complete,
    }


def _add_minutes(seed: Seed, minutes: int) -> None:
    for ago in range(minutes, -1, -1):
        minute = seed.minute - timedelta(minutes=ago)
        elapsed_us = int((seed.now - minute) / timedelta(microseconds=1))
        complete = int(ago > 1)
        for pool in GPUS:
            seed.add("ledger_minute", **_marker(pool, minute, complete, 100))
            for tenant, kind, activity, us in _minute_rows(pool, ago, min(elapsed_us, MINUTE_US)):
                seed.add(
                    "ledger_minute",
                    **{
                        **_marker(pool, minute, complete, 100),
                        "tenant": tenant,
                        "kind": kind,
                        "activity": activity,
                        "gpu_us": us,
                        "energy_mj": us // MINUTE_US * 42_000_000 if kind == "held" and activity != "pending" else None,
                    },
                )
            if ago % 10 == 3:
                wrong = {**_marker(pool, minute, complete, 99), "tenant": "ghost", "kind": "held", "activity": "active"}
                seed.add("ledger_minute", **wrong, stale=True)


def _interval_rows(seed: Seed, pool: str, start: datetime) -> None:
    # The open interval ends with the open minute, as its estimate does.
    end = min(start + timedelta(minutes=15), seed.minute + timedelta(minutes=1))
    held: dict[tuple[str, str, str, str], int] = {}
    minutes: set[datetime] = set()
    for row in seed.newest("ledger_minute"):
        if row["pool"] != pool or not start <= row["minute"] < end:
            continue
        minutes.add(row["minute"])
        jobs = _jobs(pool, row["tenant"]) if row["kind"] == "held" else [("", 1)]
        parts = largest_remainder(row["gpu_us"], [weight for _, weight in jobs])
        for (job, _), us in zip(jobs, parts, strict=True):
            key = (row["tenant"], job, row["kind"], row["activity"])
            held[key] = held.get(key, 0) + us
    if not minutes:
        return
    keys = sorted(held)
    fixed = largest_remainder(FIXED_NANO[pool] * len(minutes), [held[key] for key in keys])
    estimate = int(end > seed.minute - timedelta(minutes=2))
    base: Row = {"pool": pool, "interval_start": start, "interval_end": end, "estimate": estimate, "version": 50}
    total_energy = 0
    for key, fixed_nano in zip(keys, fixed, strict=True):
        tenant, job, kind, activity = key
        energy = ENERGY_NANO_PER_GPU_MINUTE[pool] * held[key] // MINUTE_US if kind == "held" else 0
        total_energy += energy
        hours = Decimal(held[key]) / Decimal(3_600_000_000)
        price = PRICE_PER_GPU_HOUR[pool] if kind in ("held", "reserved_unused") else None
        charged = None if price is None or tenant == "unattributed" else (hours * price).quantize(Decimal("1e-9"))
        seed.add(
            "charges",
            **base,
            tenant=tenant,
            job_id=job,
            kind=kind,
            activity=activity,
            payer=tenant,
            gpu_us=held[key],
            energy_mj=None,
            asset_cost=Decimal(fixed_nano + energy).scaleb(-9),
            energy_cost=Decimal(energy).scaleb(-9),
            asset_currency="EUR",
            charge=charged,
            charge_currency="EUR" if charged is not None else "",
            rate_card=f"{pool}-2026" if charged is not None else "",
            incomplete=0,
        )
    total = Decimal(FIXED_NANO[pool] * len(minutes) + total_energy).scaleb(-9)
    marker: Row = {**base, "kind": "marker", "gpu_us": sum(held.values()), "asset_cost": total, "asset_currency": "EUR"}
    seed.add("charges", **marker, energy_cost=Decimal(total_energy).scaleb(-9))
    wrong: Row = {**base, "kind": "held", "tenant": "ghost", "payer": "ghost", "gpu_us": MINUTE_US, "version": 49}
    seed.add("charges", **wrong, asset_cost=Decimal(99_999), asset_currency="EUR", stale=True)


def _ms(at: datetime) -> int:
    return int(at.timestamp() * 1000)


def _add_facts(seed: Seed) -> None:
    now, claimed = seed.now, seed.now - timedelta(hours=6)
    common: Row = {"rank": 1, "claimed_at": claimed, "recorded_at": claimed}
    start_ms = _ms(now - timedelta(days=20))
    number = 0
    jobs: dict[str, tuple[str, list[str]]] = {}
    for pool, count in GPUS.items():
        holders = [
            (job, tenant, gpus)
            for tenant in TENANTS
            if _held(pool, tenant, 0)
            for (job, _), gpus in zip(
                _jobs(pool, tenant),
                largest_remainder(_held(pool, tenant, 0), [weight for _, weight in _jobs(pool, tenant)]),
                strict=True,
            )
        ]
        free = [holder for job, tenant, gpus in holders for holder in [(job, tenant)] * gpus]
        for n in range(count):
            gpu, node = f"GPU-{pool}-{n:04d}", f"{pool}-n{n // 8:03d}"
            seed.add("placements", id=f"{gpu}@{node}", **common, gpu=gpu, node=node, pool=pool, site="Narvik",
                     model="H100" if pool == H100 else "GB200", gpu_index=n % 8,
                     start_ms=start_ms, end_ms=None, void=0)  # fmt: skip
            if n < len(free):
                job, tenant = free[n]
                jobs.setdefault(job, (tenant, []))[1].append(gpu)
                number += 1
                seed.add("allocations", id=f"a{number}", **common, node=node, boot_id="b", gpu=gpu, instance=0,
                         job_id=job, source="slurm", account=tenant, user="u-" + tenant[:4], namespace="",
                         tenant="" if tenant == "unattributed" else tenant, weight_num=1, weight_den=1,
                         start_ms=_ms(now - timedelta(minutes=20 + len(job) * 3)), end_ms=None,
                         confidence_pct=100, void=0)  # fmt: skip
    for job, (tenant, gpus) in jobs.items():
        seed.add("jobs", id=job, **common, source="slurm", cluster="narvik", name=job.split("-", 1)[1], account=tenant,
                 user="u-" + tenant[:4], tenant=tenant, queue="gpu", gpus=len(gpus), submitted_ms=None, started_ms=None,
                 ended_ms=None, state="RUNNING", tags={})  # fmt: skip
    seed.add("allocations", id="ended", **common, node="n", boot_id="b", gpu="GPU-x", instance=0, job_id="ended-job",
             source="slurm", account="", user="", namespace="", tenant="nordic-lm", weight_num=1, weight_den=1,
             start_ms=start_ms, end_ms=_ms(now - timedelta(hours=1)), confidence_pct=100, void=0)  # fmt: skip
    # Reservations as they were before the shift: the transfer moves them.
    for n, (pool, tenant) in enumerate((pool, tenant) for pool in GPUS for tenant in TENANTS):
        if gpus := _reserved(pool, tenant, SHIFT_MINUTES_AGO + 1):
            seed.add("commitments", id=f"c{n}", **common, pool=pool, tenant=tenant, gpus=gpus, start_ms=start_ms,
                     end_ms=None, state="active", contract=f"2026-{n:03d}", by="desk", why="contract")  # fmt: skip
    shift = seed.minute - timedelta(minutes=SHIFT_MINUTES_AGO)
    for name, at, gpus, state, why in (
        ("t1", shift, SHIFT_GPUS, "active", "contracted handover of half the pool"),
        ("t2", seed.minute + timedelta(minutes=95), 64, "planned", "second tranche"),
        ("t3", seed.minute - timedelta(minutes=5), 500, "cancelled", "withdrawn"),
    ):
        seed.add("transfers", id=name, **common, pool=H100, gpus=gpus, from_tenant="openhorizon",
                 to_tenant="nordic-lm", start_ms=_ms(at), end_ms=None, state=state, by="desk", why=why)  # fmt: skip


def _add_health(seed: Seed) -> None:
    now = seed.now
    for partition in range(4):
        seed.add("progress", topic="telemetry", partition=partition, appended_ms=_ms(now) - 900, offset=1000)
    common: Row = {"claimed_at": now, "recorded_at": now, "rank": 1, "currency": "EUR", "severity": "warning"}
    seed.add("alerts", **common, id="f1", rule="reserved_unused", status="firing", pool=GB200, tenant="openhorizon",
             started_at=now - timedelta(minutes=47), ended_at=None, money_per_hour=Decimal("164.000000000"),
             summary="40 reserved GPUs of narvik-gb200 unused for 47 minutes",
             action="Ask openhorizon for them, or offer them until they are needed.", evidence={})  # fmt: skip
    seed.add("alerts", **common, id="f2", rule="reserved_unused", status="resolved", pool=H100, tenant="nordic-lm",
             started_at=now - timedelta(hours=3), ended_at=now - timedelta(hours=2), money_per_hour=Decimal(10),
             summary="resolved long ago", action="", evidence={})  # fmt: skip
    seed.add("dead_letters", topic="jobs", partition=0, offset=4711, appended_at=now - timedelta(hours=2),
             reason="gpus: expected int, got str", key="j1", value="{}", value_bytes=2)  # fmt: skip
    # The second row of a run has grown out of the first, which was told before; the last is of the day before.
    for node, run, first, last, hours_ago, hours, reason in (
        ("narvik-h100-0007", "r1", 0, 3, 5.0, 0.05, "spool full"),
        ("narvik-h100-0007", "r1", 0, 719, 5.0, 2.0, "spool full"),
        ("narvik-h100-0007", "r1", 725, 725, 2.9, 0.003, "spool full, perhaps sent"),
        ("narvik-gb200-0002", "r2", 40, 89, 4.0, 0.14, "spool: too old"),
        ("narvik-gb200-0002", "r0", 0, 9, 60.0, 0.03, "spool full"),
    ):
        start = now - timedelta(hours=hours_ago)
        seed.add("gaps", node=node, run_id=run, first_seq=first, last_seq=last, from_ms=_ms(start),
                 to_ms=_ms(start + timedelta(hours=hours)), batches=last - first + 1, reason=reason)  # fmt: skip


def make_seed(now: datetime, minutes: int = 180) -> Seed:
    """Rows for the `minutes` before `now` (UTC), the open minute included."""
    assert now.tzinfo is UTC
    seed = Seed(now, now.replace(second=0, microsecond=0))
    _add_minutes(seed, minutes)
    first = seed.minute - timedelta(minutes=minutes)
    start = first - timedelta(minutes=first.minute % 15)
    while start <= seed.minute:
        for pool in GPUS:
            _interval_rows(seed, pool, start)
        start += timedelta(minutes=15)
    _add_facts(seed)
    _add_health(seed)
    return seed


def store(client: Client, seed: Seed) -> None:
    """Inserts all rows, one block per table and set of columns."""
    for table, rows in seed.tables.items():
        shapes: dict[tuple[str, ...], list[list[Any]]] = {}
        for row in rows:
            columns = tuple(name for name in row if name != "stale")
            shapes.setdefault(columns, []).append([row[name] for name in columns])
        for columns, block in shapes.items():
            client.insert(table, block, column_names=list(columns))
