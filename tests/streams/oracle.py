"""A naive ledger, instant by instant: ticks, not intervals, and exact fractions. It imports nothing from the product.

A world is plain dictionaries (see `tests/streams/worlds.py`). Slow and obvious on purpose.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any

TICK_MS = 1000
MINUTE_MS = 60_000
FOREVER = 1 << 60
ORDER = {"slurm": 0, "kubernetes": 1, "manual": 2, "process": 3}


def observations(batches: Iterable[Mapping[str, Any]]) -> dict[tuple[str, int, int], tuple[Any, ...]]:
    """(gpu, instance, tick) -> (run start, run id, activity, energy of the tick) of the run that is believed."""
    seen: dict[tuple[str, int, int], tuple[Any, ...]] = {}
    for batch in batches:
        for device in batch["devices"]:
            before_ts, before_mj = device["previous_ts_ms"], device["previous_energy_mj"]
            for ts, activity, energy in device["samples"]:
                if before_ts is not None:
                    for t in range(max(before_ts, ts - 3 * batch["period_ms"]), ts, TICK_MS):
                        known = energy is not None and before_mj is not None and energy >= before_mj
                        tick_mj = Fraction((energy - before_mj) * TICK_MS, ts - before_ts) if known else None
                        key = (device["gpu"], device["instance"], t)
                        value = (batch["run_start_ms"], batch["run_id"], activity, tick_mj)
                        if key not in seen or value[:2] < seen[key][:2]:
                            seen[key] = value
                before_ts, before_mj = ts, energy
    return seen


def greatest(facts: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    best: dict[str, Mapping[str, Any]] = {}
    for fact in facts:
        if fact["id"] not in best or fact["revision"] > best[fact["id"]]["revision"]:
            best[fact["id"]] = fact
    return list(best.values())


def pool_of(placements: Iterable[Mapping[str, Any]], gpu: str, t: int) -> str | None:
    here = [p for p in placements if p["gpu"] == gpu and p["start_ms"] <= t < (p["end_ms"] or FOREVER)]
    if not here:
        return None
    return min(here, key=lambda p: (-p["claimed_at_ms"], p["node"], p["id"]))["pool"]


def tenant_of(world: Mapping[str, Any], allocation: Mapping[str, Any], t: int) -> str:
    if allocation["tenant"]:
        return allocation["tenant"]
    for tenant, account, start, end in sorted(world["accounts"]):
        if account == allocation["account"] and start <= t < end:
            return tenant
    return "unattributed"


def holders(world: Mapping[str, Any], allocations: list[Mapping[str, Any]], gpu: str, t: int) -> list[tuple[Any, ...]]:
    """(tenant, job, instance, confirmed, weight) of everybody who holds a part of the GPU at t."""
    found: list[tuple[Any, ...]] = []
    for a in allocations:
        if a["gpu"] != gpu or t < a["start_ms"]:
            continue
        end, confirmed = a["end_ms"], True
        if end is None:
            mine = world["boots"].get((a["node"], a["boot_id"]))
            later = [
                s for (node, _), s in world["boots"].items() if node == a["node"] and mine is not None and s > mine
            ]
            end = min(later, default=FOREVER)
            named = max([n for i, n in world["named"] if i == a["id"]], default=0)
            confirmed = t < max(a["start_ms"], named) + world["confirm_ms"]
        if t < end:
            weight = Fraction(a["weight_num"], a["weight_den"])
            found.append((tenant_of(world, a, t), a["job_id"], a["instance"], confirmed, weight, ORDER[a["source"]]))
    best = {job: min(f[5] for f in found if f[1] == job) for job in {f[1] for f in found}}
    return [f[:5] for f in found if f[5] == best[f[1]]]


def ledger(world: Mapping[str, Any], pool: str) -> tuple[dict[Any, Fraction], dict[Any, Fraction], dict[Any, Fraction]]:
    """(GPU-us, mJ, GPU-us by job) by (minute, tenant, kind, activity) and (minute, tenant, job, kind, activity)."""
    placements, allocations = greatest(world["placements"]), greatest(world["allocations"])
    commitments = greatest(world["commitments"])
    seen = observations(world["batches"])
    us: dict[Any, Fraction] = defaultdict(Fraction)
    mj: dict[Any, Fraction] = defaultdict(Fraction)
    jobs: dict[Any, Fraction] = defaultdict(Fraction)
    tick_us = TICK_MS * 1000
    for t in range(world["from_ms"], world["to_ms"], TICK_MS):
        minute = t // MINUTE_MS * MINUTE_MS
        nothing = "unobserved" if minute < world["complete_until_ms"] else "pending"
        held: dict[str, Fraction] = defaultdict(Fraction)
        left = Fraction(0)
        for gpu in sorted({p["gpu"] for p in placements}):
            if pool_of(placements, gpu, t) != pool:
                continue
            here = holders(world, allocations, gpu, t)
            total = sum((h[4] for h in here), Fraction(0))
            parts = [(*h[:4], h[4] / max(total, Fraction(1))) for h in here]
            if total < 1:
                parts.append(("", "", 0, None, 1 - total))
                left += 1 - total
            whole = seen.get((gpu, 0, t))
            for tenant, job, instance, confirmed, weight in parts:
                kind = "unallocated" if confirmed is None else "held" if confirmed else "unconfirmed"
                sight = seen.get((gpu, instance, t))
                activity = sight[2] if sight else nothing
                us[minute, tenant, kind, activity] += weight * tick_us
                if kind != "unallocated":
                    jobs[minute, tenant, job, kind, activity] += weight * tick_us
                    held[tenant] += weight
                if whole and whole[3] is not None:
                    at = activity if instance == 0 else "unobserved"
                    mj[minute, tenant, kind, at] += weight * whole[3]
        want: dict[str, Fraction] = {}
        moves = world["transfers"]
        parties = {c["tenant"] for c in commitments} | {x[k] for x in moves for k in ("from_tenant", "to_tenant")}
        for tenant in parties:
            level = sum(
                c["gpus"]
                for c in commitments
                if c["pool"] == pool
                and c["tenant"] == tenant
                and c["state"] in ("active", "ended")
                and c["start_ms"] <= t < (c["end_ms"] or FOREVER)
            )
            for x in moves:
                if x["pool"] == pool and x["start_ms"] <= t < (x["end_ms"] or FOREVER):
                    level += x["gpus"] * ((x["to_tenant"] == tenant) - (x["from_tenant"] == tenant))
            want[tenant] = max(Fraction(0), level - held[tenant])
        asked = sum(want.values(), Fraction(0))
        for tenant, amount in want.items():
            got = amount if asked <= left else amount * left / asked
            us[minute, tenant, "reserved_unused", ""] += got * tick_us
            us[minute, tenant, "overcommitted", ""] += (amount - got) * tick_us
        us[minute, "", "free", ""] += max(Fraction(0), left - asked) * tick_us
    keep = lambda table: {key: value for key, value in table.items() if value}  # noqa: E731
    return keep(us), keep(mj), keep(jobs)
