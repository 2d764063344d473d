"""The product's ledger of a world, and its figures by names instead of codes, so that tests can compare them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa

from gpuledger.schemas.telemetry import Activity
from gpuledger.streams.decode import decode_block
from gpuledger.streams.fragments import fragments
from gpuledger.streams.observed import FRAGMENT_COLUMNS
from gpuledger.streams.pool_facts import Conflict
from gpuledger.streams.recompute import Amounts, Ledger, Window, recompute
from tests.streams.inputs import empty_fragments, facts, message

__all__ = ["Figures", "by_gpu", "by_minute", "compute", "differences", "figures", "kind_of", "stored", "whole"]

MINUTE_MS = 60_000
HOUR_MS = 3_600_000
World = dict[str, Any]
Key = tuple[Any, ...]


def stored(
    w: World, batches: Sequence[dict[str, Any]] | None = None, bounds: tuple[int, int] | None = None
) -> pa.Table:
    """The fragments of batches (by default all of the world) inside the window, as the store would read them."""
    messages = [message(batch) for batch in (w["batches"] if batches is None else batches)]
    found = fragments(decode_block(messages, w["ahead_ms"]))
    if found is None:
        return empty_fragments()
    table = found.table.select(list(FRAGMENT_COLUMNS))
    return _between(table, *(bounds or (w["from_ms"], w["to_ms"])))


def _between(table: pa.Table, from_ms: int, to_ms: int) -> pa.Table:
    minute = table.column("minute").cast(pa.int64()).to_numpy()
    return table.filter(pa.array((minute >= from_ms) & (minute < to_ms)))


def compute(
    w: World,
    pool: str,
    table: pa.Table | None = None,
    bounds: tuple[int, int] | None = None,
    buckets: Iterable[int] = (),
) -> Ledger:
    """The ledger of a pool over the world's window, or the part of it in `bounds`."""
    from_ms, to_ms = bounds or (w["from_ms"], w["to_ms"])
    table = _between(stored(w) if table is None else table, from_ms, to_ms)
    hours = range((from_ms // HOUR_MS + 1) * HOUR_MS, to_ms, HOUR_MS)
    edges = sorted({from_ms, to_ms, *hours, *(t for t in buckets if from_ms < t < to_ms)})
    window = Window(from_ms, to_ms, w["complete_until_ms"], w["confirm_ms"], np.array(edges, dtype=np.int64))
    return recompute(facts(w, pool), table, window)


# ------------------------------------------------------------------------------------------------- figures


@dataclass
class Figures:
    """GPU-microseconds and, where it is known, energy by key:

    `minutes`: (minute, tenant, kind, activity); `gpu_minutes`: (minute, gpu, tenant, job, instance, kind, activity);
    `gpu_hours` the same by hour; `jobs`: (bucket, tenant, job, user, kind, activity). `unheld`: time by (minute,
    tenant, kind). `service`: time by minute.
    """

    minutes: dict[Key, tuple[int, int | None]] = field(default_factory=dict[Key, "tuple[int, int | None]"])
    gpu_minutes: dict[Key, tuple[int, int | None]] = field(default_factory=dict[Key, "tuple[int, int | None]"])
    gpu_hours: dict[Key, tuple[int, int | None]] = field(default_factory=dict[Key, "tuple[int, int | None]"])
    jobs: dict[Key, tuple[int, int | None]] = field(default_factory=dict[Key, "tuple[int, int | None]"])
    unheld: dict[Key, int] = field(default_factory=dict[Key, int])
    unheld_mj: dict[int, int] = field(default_factory=dict[int, int])
    service: dict[int, int] = field(default_factory=dict[int, int])
    conflicts: set[Conflict] = field(default_factory=set[Conflict])


def kind_of(names: Sequence[tuple[Any, ...]], code: int) -> str:
    """The kind of an account, job or use of a `Ledger`; the codes after the last name are what nobody holds."""
    if code < len(names):
        return "unconfirmed" if names[code][-1] else "held"
    return ("unallocated", "unsliced")[code - len(names)]


def _named(
    amounts: Amounts, names: Sequence[tuple[Any, ...]], empty: tuple[Any, ...], *columns: Sequence[Any]
) -> dict[Key, tuple[int, int | None]]:
    """Amounts by key: the columns' values, then who, kind and activity."""
    out: dict[Key, tuple[int, int | None]] = {}
    rows = zip(
        *(key.tolist() for key in amounts.keys),
        amounts.us.tolist(),
        amounts.energy_mj.tolist(),
        amounts.energy_known.tolist(),
        strict=True,
    )
    for *codes, name, activity, us, mj, known in rows:
        where = tuple(column[code] for column, code in zip(columns, codes, strict=True))
        who = names[name][:-1] if name < len(names) else empty
        key = (*where, *who, kind_of(names, name), Activity(activity).name.lower())
        assert key not in out, f"{key} is there twice"
        out[key] = (us, mj if known else None)
    return out


def figures(found: Ledger) -> Figures:
    """A ledger by names."""
    window = found.window
    minutes = range(window.from_ms, window.to_ms, MINUTE_MS)
    first_hour = window.from_ms // HOUR_MS * HOUR_MS
    hours = range(first_hour, window.to_ms, HOUR_MS)
    made = Figures(
        minutes=_named(found.by_minute, found.accounts, ("",), minutes),
        gpu_minutes=_named(found.by_gpu_minute, found.uses, ("", "", 0), minutes, found.spans.gpus),
        gpu_hours=_named(found.by_gpu_hour, found.uses, ("", "", 0), hours, found.spans.gpus),
        jobs=_named(found.by_job, found.jobs, ("", "", ""), window.buckets_ms.tolist()),
        service=dict(zip(minutes, found.service_us.tolist(), strict=True)),
        conflicts=set(found.conflicts),
    )
    unheld = found.unheld
    for n, at in enumerate(minutes):
        if int(found.unallocated_mj[n]):
            made.unheld_mj[at] = int(found.unallocated_mj[n])
        amounts = {("", "free"): unheld.free_us, ("", "unsliced"): unheld.unsliced_us}
        amounts |= {(tenant, "reserved_unused"): unheld.reserved_us[k] for k, tenant in enumerate(unheld.tenants)}
        amounts |= {(tenant, "overcommitted"): unheld.overcommitted_us[k] for k, tenant in enumerate(unheld.tenants)}
        made.unheld.update({(at, *who): int(us[n]) for who, us in amounts.items() if int(us[n])})
    return made


def by_gpu(w: World, pool: str, table: pa.Table | None = None) -> dict[Key, tuple[int, int | None]]:
    """(minute, gpu, tenant, job, instance, kind, activity) of every minute, computed minute by minute: unlike the rows
    that are stored, also where there are no fragments."""
    table = stored(w) if table is None else table
    out: dict[Key, tuple[int, int | None]] = {}
    for at in range(w["from_ms"], w["to_ms"], MINUTE_MS):
        found = figures(compute(w, pool, table, (at, at + MINUTE_MS)))
        out.update({(at, *key[1:]): amounts for key, amounts in found.gpu_hours.items()})
    return out


def by_minute(w: World, pool: str, table: pa.Table | None = None) -> Figures:
    """The figures of a pool over the whole window."""
    return figures(compute(w, pool, table))


def whole(rows: Mapping[Key, tuple[int, int | None]], *columns: int) -> dict[Key, int]:
    """Time by some columns of the key, without zeros."""
    sums: dict[Key, int] = defaultdict(int)
    for key, (us, _) in rows.items():
        sums[tuple(key[n] for n in columns)] += us
    return {key: us for key, us in sums.items() if us}


def differences(
    got: Mapping[Any, int | Fraction], want: Mapping[Any, int | Fraction], tolerance: int | Mapping[Any, int] = 0
) -> dict[Any, tuple[Any, Any]]:
    """Keys whose values differ by more than the tolerance (of all, or by key)."""
    found: dict[Any, tuple[Any, Any]] = {}
    for key in set(got) | set(want):
        allowed = tolerance if isinstance(tolerance, int) else tolerance.get(key, 0)
        if abs(got.get(key, 0) - want.get(key, 0)) > allowed:
            found[key] = (got.get(key), want.get(key))
    return found
