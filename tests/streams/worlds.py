"""Random small worlds for the ledger's laws, and their translation into the product's own inputs."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import pyarrow as pa

from gpuledger.agents.batch import encode_batch
from gpuledger.schemas.events import AccountRule, Tenant
from gpuledger.schemas.telemetry import BatchHeader, Device
from gpuledger.streams.holders import PoolFacts
from gpuledger.streams.observed import FRAGMENT_COLUMNS

START_MS = 1_700_000_040_000 // 3_600_000 * 3_600_000 + 600_000
MINUTES = 5
POOLS = ("a", "b")


class Message(NamedTuple):
    value: bytes
    headers: tuple[tuple[str, bytes], ...]
    timestamp_ms: int


def _samples(r: random.Random, start: int, stop: int, period: int) -> list[tuple[int, str, int | None]]:
    t, energy, out = start, r.randrange(10**6), []
    power = r.choice([100, 400, 700])
    while t < stop:
        step = period * r.choice([1] * 10 + [2, 5])
        t += step
        power = r.choice([power, power, 100, 400, 700])
        energy += power * step
        out.append((t, r.choice(["active", "idle", "active", "unobserved"]), None if r.random() < 0.05 else energy))
    return out


def _run(r: random.Random, node: str, gpus: list[str], start: int, stop: int, number: int) -> list[dict[str, Any]]:
    """The batches of one run of an agent, without those that were lost."""
    period = r.choice([1000, 2000, 5000])
    devices = [(gpu, instance) for gpu in gpus for instance in ([0, 1, 2] if r.random() < 0.3 else [0])]
    series = {d: _samples(r, start, stop, period) for d in devices}
    if any(d[1] for d in devices):
        series = {d: [(t, a, e if d[1] == 0 else None) for t, a, e in s] for d, s in series.items()}
    batches, before = [], dict.fromkeys(devices, (None, None))
    position = dict.fromkeys(devices, 0)
    seq, edge = 0, start
    while edge < stop:
        edge += r.choice([5000, 10_000, 30_000])
        rows = []
        for d in devices:
            mine = []
            while position[d] < len(series[d]) and series[d][position[d]][0] <= edge:
                mine.append(series[d][position[d]])
                position[d] += 1
            rows.append(
                {
                    "gpu": d[0],
                    "instance": d[1],
                    "previous_ts_ms": before[d][0],
                    "previous_energy_mj": before[d][1],
                    "samples": mine,
                }
            )
            if mine:
                before[d] = (mine[-1][0], mine[-1][2])
        if r.random() > 0.08:
            batches.append(
                {
                    "node": node,
                    "run_id": f"{node}-{number}",
                    "run_start_ms": start,
                    "seq": seq,
                    "period_ms": period,
                    "devices": rows,
                }
            )
        seq += 1
    return batches


def world(seed: int, whole_gpus: bool = False) -> dict[str, Any]:
    """A random history of three GPUs on two nodes over MINUTES minutes; `whole_gpus`: no shared GPUs."""
    r = random.Random(seed)
    end = START_MS + MINUTES * 60_000

    def at() -> int:
        return START_MS + r.randrange(-30, MINUTES * 60 + 30) * 1000

    gpus = {"g0": "n0", "g1": "n0", "g2": "n1"}
    placements, allocations, commitments, transfers, batches, named = [], [], [], [], [], []
    for gpu, node in gpus.items():
        base = {
            "id": f"p-{gpu}",
            "revision": 1,
            "claimed_at_ms": START_MS - 5000,
            "gpu": gpu,
            "node": node,
            "pool": r.choice(POOLS),
            "start_ms": START_MS - 3_600_000,
            "end_ms": None,
        }
        placements.append(base)
        if r.random() < 0.4:
            placements.append(
                {**base, "revision": 2, "pool": r.choice(POOLS), "end_ms": r.choice([None, max(at(), START_MS)])}
            )
        if r.random() < 0.3:
            start = at()
            placements.append(
                {
                    **base,
                    "id": f"q-{gpu}",
                    "node": r.choice(["n0", "n1"]),
                    "pool": r.choice(POOLS),
                    "claimed_at_ms": start,
                    "start_ms": start,
                }
            )
    boots = {("n0", "boot"): START_MS - 7_200_000, ("n1", "boot"): START_MS - 7_200_000}
    if r.random() < 0.4:
        boots["n0", "boot2"] = max(at(), START_MS)
    number = 0
    for node in ("n0", "n1"):
        mine = [gpu for gpu, where in gpus.items() if where == node]
        t = at()
        while t < end and r.random() < 0.85:
            stop = min(end + 20_000, t + r.randrange(30, 200) * 1000)
            batches += _run(r, node, mine, t, stop, number)
            number += 1
            t = stop + r.randrange(-40, 60) * 1000
    for n in range(r.randrange(7)):
        gpu, start = r.choice([*gpus, "unknown"]), at()
        num, den = r.choice([(1, 1)] if whole_gpus else [(1, 1), (1, 1), (1, 3), (1, 7), (1, 2), (2, 7), (333, 1000)])
        one = {
            "id": f"a{n}",
            "revision": 1,
            "node": gpus.get(gpu, "n9"),
            "boot_id": r.choice(["boot", ""]),
            "gpu": gpu,
            "instance": 0 if den == 1 or r.random() < 0.6 else r.choice([1, 2]),
            "job_id": f"j{r.randrange(5)}",
            "source": r.choice(["slurm", "slurm", "process", "manual"]),
            "account": r.choice(["acc", "other"]),
            "tenant": r.choice(["", "X", "Y", "Z"]),
            "weight_num": num,
            "weight_den": den,
            "start_ms": start,
            "end_ms": None,
        }
        allocations.append(one)
        if r.random() < 0.6:
            allocations.append({**one, "revision": 2, "end_ms": start + r.randrange(0, 200) * 1000})
        if r.random() < 0.5:
            named.append((one["id"], at()))
    if whole_gpus:
        allocations = _never_shared(allocations)
    for n in range(r.randrange(4)):
        one = {
            "id": f"c{n}",
            "revision": 1,
            "pool": r.choice(POOLS),
            "tenant": r.choice("XYZ"),
            "gpus": r.choice([1, 2, 3]),
            "start_ms": at(),
            "end_ms": None,
            "state": r.choice(["active", "active", "ended", "proposed"]),
        }
        commitments.append(one)
        if r.random() < 0.5:
            commitments.append({**one, "revision": 2, "end_ms": one["start_ms"] + r.randrange(0, 240) * 1000})
    for n in range(r.randrange(2)):
        start = at()
        transfers.append(
            {
                "id": f"t{n}",
                "revision": 1,
                "pool": r.choice(POOLS),
                "gpus": 1,
                "from_tenant": "X",
                "to_tenant": r.choice("YZ"),
                "start_ms": start,
                "end_ms": r.choice([None, start + 60_000]),
                "state": "active",
            }
        )
    border = r.randrange(MINUTES + 1)
    return {
        "from_ms": START_MS,
        "to_ms": end,
        "complete_until_ms": START_MS + border * 60_000,
        "confirm_ms": 45_000,
        "placements": placements,
        "allocations": allocations,
        "commitments": commitments,
        "transfers": transfers,
        "batches": batches,
        "named": named,
        "boots": boots,
        "accounts": [("X", "acc", 0, START_MS + 90_000), ("Y", "acc", START_MS + 90_000, 1 << 60)],
    }


def _never_shared(allocations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most one allocation per GPU, so that all amounts are whole numbers."""
    first: dict[str, str] = {}
    for a in allocations:
        first.setdefault(a["gpu"], a["id"])
    return [a for a in allocations if first[a["gpu"]] == a["id"]]


# --------------------------------------------------------------------------------------- the product's inputs


def _latest(facts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    best: dict[str, dict[str, Any]] = {}
    for fact in facts:
        if fact["id"] not in best or fact["revision"] > best[fact["id"]]["revision"]:
            best[fact["id"]] = fact
    return list(best.values())


def _table(rows: list[dict[str, Any]], **types: pa.DataType) -> pa.Table:
    return pa.table({name: pa.array([row[name] for row in rows], type=type_) for name, type_ in types.items()})


def facts(w: dict[str, Any], pool: str) -> PoolFacts:
    """What the store would read for a pool."""
    text, whole, small = pa.string(), pa.int64(), pa.uint32()
    placements = _latest(w["placements"])
    mine = {p["gpu"] for p in w["placements"] if p["pool"] == pool} if placements else set()
    mine = {p["gpu"] for p in placements if p["pool"] == pool} | mine
    placed = [{**p, "claimed_at": p["claimed_at_ms"]} for p in placements if p["gpu"] in mine]
    named: dict[str, int] = {}
    for id_, t in w["named"]:
        named[id_] = max(named.get(id_, 0), t)
    allocations = [
        {**a, "user": "", "namespace": "", "named_ms": named.get(a["id"])}
        for a in _latest(w["allocations"])
        if a["gpu"] in mine
    ]
    return PoolFacts(
        pool=pool,
        placements=_table(
            placed,
            id=text,
            claimed_at=pa.timestamp("ms", tz="UTC"),
            gpu=text,
            node=text,
            pool=text,
            start_ms=whole,
            end_ms=whole,
        ),
        allocations=_table(
            allocations,
            id=text,
            node=text,
            boot_id=text,
            gpu=text,
            instance=pa.uint16(),
            job_id=text,
            source=text,
            account=text,
            user=text,
            namespace=text,
            tenant=text,
            weight_num=small,
            weight_den=small,
            start_ms=whole,
            end_ms=whole,
            named_ms=whole,
        ),
        boots=_table(
            [{"node": n, "boot_id": b, "start_ms": s} for (n, b), s in w["boots"].items()],
            node=text,
            boot_id=text,
            start_ms=whole,
        ),
        commitments=_table(
            [c for c in _latest(w["commitments"]) if c["pool"] == pool],
            tenant=text,
            gpus=small,
            start_ms=whole,
            end_ms=whole,
            state=text,
        ),
        transfers=_table(
            [t for t in _latest(w["transfers"]) if t["pool"] == pool],
            from_tenant=text,
            to_tenant=text,
            gpus=small,
            start_ms=whole,
            end_ms=whole,
            state=text,
        ),
        tenants=[
            Tenant(
                id=tenant,
                revision=1,
                claimed_at_ms=START_MS,
                rules=[
                    AccountRule(
                        match="account",
                        value=account,
                        start_ms=max(start, 946_684_800_000),
                        end_ms=min(end, 7_258_118_400_000),
                    )
                ],
            )
            for tenant, account, start, end in w["accounts"]
        ],
    )


ACTIVITY = {"active": 0.9, "idle": 0.0, "unobserved": None}


def message(batch: dict[str, Any]) -> Message:
    """The Kafka message of a batch."""
    rows = sorted((s[0], n, s[1], s[2]) for n, device in enumerate(batch["devices"]) for s in device["samples"])
    header = BatchHeader(
        node=batch["node"],
        boot_id="boot",
        boot_start_ms=START_MS - 7_200_000,
        run_id=batch["run_id"],
        run_start_ms=batch["run_start_ms"],
        seq=batch["seq"],
        period_ms=batch["period_ms"],
        anchor_wall_ms=0,
        anchor_boottime_ms=0,
        devices=[
            Device(d["gpu"], d["instance"], d["previous_ts_ms"], d["previous_energy_mj"]) for d in batch["devices"]
        ],
    )
    columns = {
        "ts_ms": [row[0] for row in rows],
        "device": [row[1] for row in rows],
        "sm_active": [ACTIVITY[row[2]] for row in rows],
        "energy_mj": [row[3] for row in rows],
    }
    made = encode_batch(header, columns)
    return Message(made.value, tuple(made.headers), START_MS + 7_200_000)


def empty_fragments() -> pa.Table:
    lists = {"segment_start_ms": pa.uint16(), "segment_duration_ms": pa.uint16(), "segment_activity": pa.uint8()}
    plain = {
        "minute": pa.timestamp("ms", tz="UTC"),
        "gpu": pa.string(),
        "instance": pa.uint16(),
        "run_start_ms": pa.int64(),
    }
    plain |= {"run_id": pa.string(), "seq": pa.uint32()}
    types = [plain.get(name) or pa.list_(lists.get(name, pa.int64())) for name in FRAGMENT_COLUMNS]
    return pa.schema(list(zip(FRAGMENT_COLUMNS, types, strict=True))).empty_table()
