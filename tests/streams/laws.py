"""The ledger's laws, each a function of a world that raises AssertionError where the product breaks it.

`test_ledger_laws*.py` ask them of generated worlds; `test_ledger_laws_fail.py` sees each of them fail on a product that
was made wrong on purpose.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pyarrow as pa

from gpuledger.streams.pool_facts import Conflict, PoolFacts
from gpuledger.streams.recompute import recompute
from tests.streams.computed import (
    Figures,
    World,
    by_minute,
    compute,
    differences,
    figures,
    stored,
    whole,
)
from tests.streams.inputs import facts
from tests.streams.oracle import Books, books, totals
from tests.streams.worlds import POOLS

__all__ = [
    "additivity",
    "agreement",
    "conservation",
    "energy",
    "held_time",
    "order_and_repetition",
    "replay",
    "unobserved",
]

MINUTE_MS = 60_000
HOUR_MS = 3_600_000
#: Where GPUs are shared, each piece of a minute is rounded to a microsecond and each segment to a millijoule.
ROUNDING = 25
FRAGMENT_KEY = ("minute", "gpu", "instance", "run_start_ms", "run_id", "seq", "epoch_ms")


def _in_hours(us: dict[Any, Any]) -> dict[Any, Any]:
    """(pool, gpu, hour) -> time, from (pool, gpu, minute)."""
    hours: dict[Any, Any] = defaultdict(int)
    for (pool, gpu, minute), amount in us.items():
        hours[pool, gpu, minute // HOUR_MS * HOUR_MS] += amount
    return hours


# ------------------------------------------------------------------------------------------------- 0: the oracle


def agreement(w: World) -> None:
    """Every minute row is what the oracle counts: exactly where a GPU has one holder, else up to rounding; and energy
    is known in the same rows."""
    want, table = books(w), stored(w)
    columns = ("pool", "minute", "tenant", "kind", "activity")
    us, mj = totals(want.us, *columns), totals(want.mj, *columns)
    shared = shared_minutes(want)
    for pool in POOLS:
        found = by_minute(w, pool, table)
        rounding = {key: ROUNDING for key in us if (pool, key[1]) in shared}
        got_us = {(pool, *key): amount for key, (amount, _) in found.minutes.items() if amount}
        assert differences(got_us, _of(us, pool), rounding) == {}
        got_mj = {(pool, *key): amount for key, (_, amount) in found.minutes.items() if amount}
        assert differences(got_mj, _of(mj, pool), rounding) == {}
        known = {(pool, *key) for key, (_, amount) in found.minutes.items() if amount is not None}
        assert known == {tuple(getattr(key, c) for c in columns) for key in want.mj if key.pool == pool}
        got = {(pool, *key): amount for key, amount in found.unheld.items()}
        unheld = {tuple(key): amount for key, amount in want.unheld.items() if key.pool == pool}
        rounding = {key: ROUNDING for key in unheld if amount_is_divided(want, key)}
        assert differences(got, unheld, rounding) == {}


def _of(table: dict[Any, Any], pool: str) -> dict[Any, Any]:
    return {key: amount for key, amount in table.items() if key[0] == pool}


def shared_minutes(want: Books) -> set[tuple[str, int]]:
    """(pool, minute) in which a row's time is no whole number of ticks, or could be rounded on the way to one."""
    return {(key.pool, key.minute) for key in want.shared}


def amount_is_divided(want: Books, key: Any) -> bool:
    """Whether a pool row may be rounded: GPUs are shared in its minute, or more is promised than there is."""
    pool, minute = key[0], key[1]
    over = any((k.pool, k.minute, k.kind) == (pool, minute, "overcommitted") for k in want.unheld)
    return over or (pool, minute) in shared_minutes(want)


# ------------------------------------------------------------------------------------------------- 1: conservation


def conservation(w: World) -> None:
    """For every GPU in service and every minute the rows sum to exactly that GPU's time in that minute, none of them
    negative; and minutes, hours, jobs and what nobody holds are sums of the same time."""
    want, table = books(w), stored(w)
    service = totals(want.us, "pool", "gpu", "minute")
    for pool in POOLS:
        found = by_minute(w, pool, table)
        seen = {(pool, key[1], key[0]) for key in found.gpu_minutes}
        assert seen == {k for k in service if k[0] == pool} & _fragment_minutes(pool, table)
        minutes = {(pool, gpu, minute): us for (minute, gpu), us in whole(found.gpu_minutes, 0, 1).items()}
        assert minutes == {key: us for key, us in service.items() if key in seen}
        hours = {(pool, gpu, hour): us for (hour, gpu), us in whole(found.gpu_hours, 0, 1).items()}
        assert hours == _in_hours(_of(service, pool))
        for rows in (found.minutes, found.gpu_minutes, found.gpu_hours, found.jobs):
            assert [key for key, (us, mj) in rows.items() if us < 0 or (mj or 0) < 0] == []
        assert whole(found.minutes, 0) == {(at,): us for at, us in found.service.items() if us}
        assert whole(found.jobs, 1, 4, 5) == whole(found.minutes, 1, 2, 3)
        assert whole(found.jobs, 1, 2, 4, 5) == whole(found.gpu_hours, 2, 3, 5, 6)
        _unheld_is_all(found)


def _unheld_is_all(found: Figures) -> None:
    """Reserved-unused, unsliced and free are what the GPU rows call unsliced and unallocated."""
    nobody: dict[int, int] = defaultdict(int)
    for (minute, _, kind, _), (us, _) in found.minutes.items():
        nobody[minute] += us * (kind in ("unallocated", "unsliced"))
    divided: dict[int, int] = defaultdict(int)
    for (minute, _, kind), us in found.unheld.items():
        assert us > 0
        divided[minute] += us * (kind != "overcommitted")
    assert {k: v for k, v in nobody.items() if v} == {k: v for k, v in divided.items() if v}


def _fragment_minutes(pool: str, table: pa.Table) -> set[tuple[str, str, int]]:
    minutes = table.column("minute").cast(pa.int64()).to_pylist()
    return {(pool, gpu, minute) for gpu, minute in zip(table.column("gpu").to_pylist(), minutes, strict=True)}


# ------------------------------------------------------------------------------------------------- 2 and 3: arrival


def shuffled(table: pa.Table, r: random.Random) -> pa.Table:
    """The rows in another order."""
    order = list(range(table.num_rows))
    r.shuffle(order)
    return table.take(pa.array(order, type=pa.int64()))


def shuffled_facts(known: PoolFacts, r: random.Random) -> PoolFacts:
    tables = ("placements", "allocations", "geometries", "boots", "commitments", "transfers")
    mixed = {name: shuffled(getattr(known, name), r) for name in tables}
    return replace(known, **mixed, tenants=sorted(known.tenants, key=lambda _: r.random()))


def kept(parts: Iterable[pa.Table]) -> dict[Any, dict[str, Any]]:
    """What a table that replaces rows of equal keys holds after these inserts; a row that comes again is the same."""
    rows: dict[Any, dict[str, Any]] = {}
    for part in parts:
        for row in part.to_pylist():
            key = tuple(row[name] for name in FRAGMENT_KEY)
            assert rows.setdefault(key, row) == row, f"{key} came again and is another row"
    return rows


def _cut_blocks(batches: list[dict[str, Any]], r: random.Random) -> list[list[dict[str, Any]]]:
    cuts = sorted({0, len(batches), *(r.randint(0, len(batches)) for _ in range(r.randint(0, 4)))})
    return [batches[a:b] for a, b in pairwise(cuts) if a < b]


def order_and_repetition(w: World) -> None:
    """Neither the order in which batches and facts arrive, nor how they are cut into blocks, nor that they come again
    changes a figure. (Through the store: `test_ledger_laws_store.py`.)"""
    r = random.Random(w["salt"])
    usual = stored(w)
    mixed = list(w["batches"]) + [b for b in w["batches"] if r.random() < 0.3]
    r.shuffle(mixed)
    rows = kept(stored(w, block) for block in _cut_blocks(mixed, r))
    assert rows == kept([usual])
    again = shuffled(pa.Table.from_pylist(list(rows.values()), schema=usual.schema), r)
    for pool in POOLS:
        known = facts(w, pool)
        window = compute(w, pool, usual).window
        once = figures(recompute(known, usual, window))
        assert figures(recompute(shuffled_facts(known, r), again, window)) == once


def replay(w: World) -> None:
    """Reading a partition again from any offset, in blocks cut at other places, writes the rows that are there."""
    r = random.Random(w["salt"])
    by_node: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for batch in w["batches"]:
        by_node[batch["node"]].append(batch)
    first = [stored(w, block) for log in by_node.values() for block in _cut_blocks(log, r)]
    rows = kept(first)
    for log in by_node.values():
        offset = r.randrange(len(log))
        assert kept([*first, *(stored(w, block) for block in _cut_blocks(log[offset:], r))]) == rows


# ------------------------------------------------------------------------------------------------- 4: additivity


def _joined(parts: list[dict[Any, tuple[int, int | None]]]) -> dict[Any, tuple[int, int | None]]:
    sums: dict[Any, tuple[int, int | None]] = {}
    for part in parts:
        for key, (us, mj) in part.items():
            before_us, before_mj = sums.get(key, (0, None))
            known = mj is not None or before_mj is not None
            sums[key] = (before_us + us, (mj or 0) + (before_mj or 0) if known else None)
    return sums


def _ranges(conflicts: Iterable[Conflict]) -> set[tuple[Any, ...]]:
    """Conflicts with those that touch and say the same joined."""
    out: dict[tuple[Any, ...], list[tuple[int, int]]] = defaultdict(list)
    for c in sorted(conflicts, key=lambda c: (c.kind, c.subject, c.other, c.detail, c.from_ms, c.to_ms)):
        known = out[c.kind, c.subject, c.other, c.detail]
        if known and known[-1][1] >= c.from_ms:
            known[-1] = (known[-1][0], max(known[-1][1], c.to_ms))
        else:
            known.append((c.from_ms, c.to_ms))
    return {(*key, *span) for key, spans in out.items() for span in spans}


def additivity(w: World) -> None:
    """Computed in one piece or in any pieces of whole minutes, the figures are the same."""
    r = random.Random(w["salt"])
    table = stored(w)
    minutes = range(w["from_ms"], w["to_ms"] + 1, MINUTE_MS)
    inner = [t for t in minutes[1:-1] if r.random() < 0.6]
    edges = [w["from_ms"], *inner, w["to_ms"]]
    for pool in POOLS:
        at_once = figures(compute(w, pool, table, buckets=inner))
        parts = [figures(compute(w, pool, table, (a, b))) for a, b in pairwise(edges)]
        for name in ("minutes", "gpu_minutes", "gpu_hours", "jobs"):
            assert _joined([getattr(part, name) for part in parts]) == getattr(at_once, name), name
        for name in ("unheld", "unheld_mj", "service"):
            joined = {key: value for part in parts for key, value in getattr(part, name).items()}
            assert joined == getattr(at_once, name), name
        assert _ranges(c for part in parts for c in part.conflicts) == _ranges(at_once.conflicts)


# ------------------------------------------------------------------------------------------------- 5 and 6: held time


def _held(rows: dict[Any, tuple[int, int | None]]) -> dict[Any, int]:
    """Time by (hour, gpu, tenant, job, instance, kind), whatever was done in it."""
    return whole(rows, 0, 1, 2, 3, 4, 5)


def lies(w: World) -> list[dict[str, Any]]:
    """The world's batches with everything in them turned round that is not a fact: what was seen, and its energy."""
    other = {"active": "idle", "idle": "active", "down": "unobserved", "unobserved": "active"}
    return [
        {
            **batch,
            "devices": [
                {**device, "samples": [(ts, other[activity], None) for ts, activity, _ in device["samples"]]}
                for device in batch["devices"]
            ],
        }
        for batch in w["batches"]
    ]


def held_time(w: World) -> None:
    """Held time is that of the allocations' intervals, whatever telemetry says or whether there is any; exactly where
    a GPU has one holder."""
    want, table = books(w), stored(w)
    per_hour: dict[Any, Any] = defaultdict(int)
    for key, us in want.us.items():
        hour = key.minute // HOUR_MS * HOUR_MS
        per_hour[key.pool, hour, key.gpu, key.tenant, key.job, key.instance, key.kind] += us
    shared = {(key.pool, key.minute // HOUR_MS * HOUR_MS, key.gpu) for key in want.shared}
    rounding = {key: ROUNDING for key in per_hour if key[:3] in shared}
    for pool in POOLS:
        found = _held(by_minute(w, pool, table).gpu_hours)
        assert _held(by_minute(w, pool, table.slice(0, 0)).gpu_hours) == found
        assert _held(by_minute(w, pool, stored(w, lies(w))).gpu_hours) == found
        assert differences({(pool, *key): us for key, us in found.items()}, _of(per_hour, pool), rounding) == {}


def unobserved(w: World) -> None:
    """What is not observed is what is held less what was observed, and never negative: unobserved in complete minutes,
    pending in the others, in every row of every GPU."""
    want, table = books(w), stored(w)
    columns = ("pool", "minute", "gpu", "tenant", "job", "instance", "kind", "activity")
    us = totals(want.us, *columns)
    shared = {(key.pool, key.minute, key.gpu) for key in want.shared}
    rounding = {key: ROUNDING for key in us if key[:3] in shared}
    for pool in POOLS:
        found = by_minute(w, pool, table)
        got = {(pool, *key): amount for key, (amount, _) in found.gpu_minutes.items() if amount}
        assert [key for key, amount in got.items() if amount < 0] == []
        here = {key[:3] for key in got}
        assert differences(got, {k: v for k, v in us.items() if k[:3] in here}, rounding) == {}
        for (_, minute, *_, activity), amount in got.items():
            assert activity != "pending" or minute >= w["complete_until_ms"], amount
        without = _held(by_minute(w, pool, table.slice(0, 0)).gpu_hours)
        assert _held(found.gpu_hours) == without


# ------------------------------------------------------------------------------------------------- 8: energy


def spent(w: World) -> dict[tuple[str, int], int]:
    """(gpu, minute) -> the counter's difference over that minute, where one run saw all of it with a known counter:
    read off the samples themselves."""
    runs: dict[tuple[str, int], set[str]] = defaultdict(set)
    steps: dict[tuple[str, int], dict[int, tuple[int, int]]] = defaultdict(dict)
    for batch in w["batches"]:
        for device in batch["devices"]:
            before_ts, before_mj = device["previous_ts_ms"], device["previous_energy_mj"]
            for ts, _, mj in device["samples"] if device["instance"] == 0 else ():
                start = ts if before_ts is None else before_ts
                for minute in range(start // MINUTE_MS * MINUTE_MS, ts, MINUTE_MS):
                    runs[device["gpu"], minute].add(batch["run_id"])
                    seen = ts - start <= 3 * batch["period_ms"]
                    if seen and mj is not None and before_mj is not None and mj >= before_mj:
                        steps[device["gpu"], minute][start] = (ts, mj - before_mj)
                before_ts, before_mj = ts, mj
    out: dict[tuple[str, int], int] = {}
    for (gpu, minute), known in steps.items():
        at, total = minute, 0
        while at in known and known[at][0] <= minute + MINUTE_MS:
            total += known[at][1]
            at = known[at][0]
        if at == minute + MINUTE_MS and len(runs[gpu, minute]) == 1:
            out[gpu, minute] = total
    return out


def energy(w: World) -> None:
    """The energy of a GPU's rows sums to the difference of its counter, to the millijoule, and where several runs saw
    it to that of the one that is believed; it is divided by weight."""
    want, table = books(w), stored(w)
    per_minute = totals(want.mj, "pool", "gpu", "minute")
    service = totals(want.us, "pool", "gpu", "minute")
    read = spent(w)
    columns = ("pool", "minute", "gpu", "tenant", "job", "instance", "kind", "activity")
    by_row = totals(want.mj, *columns)
    for pool in POOLS:
        found = by_minute(w, pool, table)
        got: dict[Any, int] = defaultdict(int)
        for (minute, gpu, *_), (_, mj) in found.gpu_minutes.items():
            got[pool, gpu, minute] += mj or 0
        assert {key: mj for key, mj in got.items() if mj} == _of(per_minute, pool)
        for (_, gpu, minute), mj in got.items():
            if (gpu, minute) in read and service[pool, gpu, minute] == MINUTE_MS * 1000:
                assert mj == read[gpu, minute]
        rows = {(pool, *key): mj for key, (_, mj) in found.gpu_minutes.items() if mj}
        assert differences(rows, _of(by_row, pool), ROUNDING) == {}
        assert sum(mj or 0 for _, mj in found.minutes.values()) == sum(got.values())
        assert sum(mj or 0 for _, mj in found.gpu_hours.values()) == sum(got.values())
        assert sum(mj or 0 for _, mj in found.jobs.values()) == sum(got.values())
        _unheld_energy(found)


def _unheld_energy(found: Figures) -> None:
    nobody: dict[int, int] = defaultdict(int)
    for (minute, _, kind, _), (_, mj) in found.minutes.items():
        nobody[minute] += (mj or 0) * (kind in ("unallocated", "unsliced"))
    assert {k: v for k, v in nobody.items() if v} == found.unheld_mj
