"""A computed ledger as rows of the ClickHouse tables, each with its markers and one version. Pure.

Rows come sorted by minute (hour, interval), so that a caller can cut them into insert blocks that hold every row of a
minute; the marker of a minute is among its rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gpuledger.finance.apportion import apportion_groups
from gpuledger.finance.charges import Quantities
from gpuledger.schemas.telemetry import Activity
from gpuledger.streams.marks import HOUR_MS, MINUTE_MS
from gpuledger.streams.pool_facts import Conflict
from gpuledger.streams.recompute import Amounts, Ledger, kinds

__all__ = ["Fingerprints", "Version", "conflict_rows", "gpu_hour_rows", "gpu_minute_parts"]
__all__ += ["gpu_minute_rows", "job_hour_rows", "merge", "minute_rows", "quantities", "stamp"]

Ints = NDArray[np.int64]

#: Rows of GPUs by minute that are made at once.
GPU_ROWS = 10_000
_NONE = np.empty(0, dtype=np.int64)

_TIME = pa.timestamp("ms", tz="UTC")
_ACTIVITIES = ["", *(activity.name.lower() for activity in Activity)]
_MARKER = "marker"


@dataclass(frozen=True, slots=True)
class Version:
    """(epoch, offset of the last dirty mark taken, random): the greatest of a (pool, minute) is the one that counts."""

    epoch: int
    offset: int
    random: int

    def to_bytes(self) -> bytes:
        """UInt128 as ClickHouse reads it from Arrow: 16 bytes, little endian."""
        return (self.epoch << 96 | self.offset << 40 | self.random & (1 << 40) - 1).to_bytes(16, "little")


@dataclass(frozen=True, slots=True)
class Fingerprints:
    """What each minute of the window was computed from: count and order-free hash of its fragments, hash of facts and
    by which formula that was made."""

    fragments: Ints
    fragments_hash: NDArray[np.uint64]
    facts_hash: NDArray[np.uint64]
    facts_formula: int


def stamp(rows: pa.Table, version: Version) -> pa.Table:
    """The rows with their version."""
    data = pa.py_buffer(version.to_bytes() * rows.num_rows)
    column = pa.Array.from_buffers(pa.binary(16), rows.num_rows, [None, data])
    return rows.append_column("version", column)


def _names(codes: Ints, names: Sequence[str]) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(codes, type=pa.int32()), pa.array(names, type=pa.string()))


def _constant(value: str, rows: int) -> pa.DictionaryArray:
    return _names(np.zeros(rows, dtype=np.int64), [value])


def _times(values: Ints) -> pa.Array:
    return pa.array(values, type=pa.int64()).cast(_TIME)


def _energy(values: Ints, known: NDArray[np.bool_]) -> pa.Array:
    return pa.array(values, type=pa.int64(), mask=~known)


def _sorted(rows: pa.Table, by: str) -> pa.Table:
    order = np.argsort(rows.column(by).cast(pa.int64()).to_numpy(), kind="stable")
    return rows.take(pa.array(order)).combine_chunks()


def _join(parts: Sequence[pa.Table], by: str) -> pa.Table:
    plain = [part.cast(pa.schema([(f.name, _plain(f.type)) for f in part.schema])) for part in parts if part.num_rows]
    return _sorted(pa.concat_tables(plain or [parts[0]]), by)


def _plain(type_: pa.DataType) -> pa.DataType:
    return type_.value_type if pa.types.is_dictionary(type_) else type_


# ------------------------------------------------------------------------------------------------- pool x minute


def _minute_part(ledger: Ledger, minute: Ints, who: Sequence[pa.Array], us: Ints, energy: pa.Array) -> pa.Table:
    """Rows of minutes (of the window); `who` is tenant, kind and activity."""
    at = ledger.window.from_ms + minute * MINUTE_MS
    zeros = np.zeros(len(minute), dtype=np.int64)
    return pa.table(
        {
            "pool": _constant(ledger.pool, len(minute)),
            "minute": _times(at),
            **dict(zip(("tenant", "kind", "activity"), who, strict=True)),
            "gpu_us": pa.array(us),
            "energy_mj": energy,
            "complete": pa.array((at < ledger.window.complete_until_ms).astype(np.uint8)),
            "fragments": pa.array(zeros, type=pa.uint32()),
            "fragments_hash": pa.array(zeros.astype(np.uint64)),
            "facts_hash": pa.array(zeros.astype(np.uint64)),
            "facts_formula": pa.array(zeros, type=pa.uint8()),
        }
    )


@dataclass(frozen=True, slots=True)
class _Nobody:
    """Time that nobody held, one row each; `kind` is a code of _NOBODY_KINDS, `tenant` of [*tenants, ""]."""

    minute: Ints
    tenant: Ints
    kind: Ints
    us: Ints
    energy_mj: Ints
    energy_known: NDArray[np.bool_]


_NOBODY_KINDS = ["reserved_unused", "free", "unsliced", "overcommitted"]


def _nobody(ledger: Ledger) -> _Nobody:
    """Who bears the time that nobody held, and its energy by time."""
    unheld, minutes = ledger.unheld, ledger.window.minutes
    stacked = np.concatenate([unheld.reserved_us, unheld.free_us[None, :], unheld.unsliced_us[None, :]])
    row, minute = np.nonzero(stacked)
    us = stacked[row, minute]
    order = np.lexsort((row, minute))
    row, minute, us = row[order], minute[order], us[order]
    energy = apportion_groups(ledger.unallocated_mj, minute.astype(np.intp), np.maximum(us, 0))
    total = np.zeros(minutes, dtype=np.int64)
    np.add.at(total, minute, us)
    known = (total > ledger.unallocated_blind_us)[minute] | (energy != 0)
    over_tenant, over_minute = np.nonzero(unheld.overcommitted_us)
    nobody = len(unheld.tenants)
    none = np.zeros(len(over_tenant), dtype=np.int64)
    return _Nobody(
        minute=np.concatenate([minute, over_minute]),
        tenant=np.concatenate([np.minimum(row, nobody), over_tenant]),
        kind=np.concatenate([np.maximum(row - nobody + 1, 0), none + 3]),
        us=np.concatenate([us, unheld.overcommitted_us[over_tenant, over_minute]]),
        energy_mj=np.concatenate([energy, none]),
        energy_known=np.concatenate([known, none.astype(bool)]),
    )


def minute_rows(ledger: Ledger, prints: Fingerprints) -> pa.Table:
    """Rows of `ledger_minute` without `version`, with a marker for every minute of the window."""
    amounts = ledger.by_minute
    held = np.flatnonzero(amounts.keys[1] < len(ledger.accounts))
    minute, account, activity = (key[held] for key in amounts.keys)
    rows = _minute_part(
        ledger,
        minute,
        [
            _names(account, [tenant for tenant, _ in ledger.accounts]),
            _names(account, kinds(ledger.accounts)),
            _names(activity, _ACTIVITIES),
        ],
        amounts.us[held],
        _energy(amounts.energy_mj[held], amounts.energy_known[held]),
    )
    nobody = _nobody(ledger)
    rest = _minute_part(
        ledger,
        nobody.minute,
        [
            _names(nobody.tenant, [*ledger.unheld.tenants, ""]),
            _names(nobody.kind, _NOBODY_KINDS),
            _constant("", len(nobody.minute)),
        ],
        nobody.us,
        _energy(nobody.energy_mj, nobody.energy_known),
    )
    every = np.arange(ledger.window.minutes)
    none = _constant("", len(every))
    unknown = _energy(every, np.zeros(len(every), dtype=bool))
    markers = _minute_part(ledger, every, [none, _constant(_MARKER, len(every)), none], ledger.service_us, unknown)
    formula = np.full(len(every), prints.facts_formula)
    for name in ("fragments", "fragments_hash", "facts_hash", "facts_formula"):
        values = formula if name == "facts_formula" else getattr(prints, name)
        at = markers.schema.get_field_index(name)
        markers = markers.set_column(at, name, pa.array(values, type=markers.schema.field(at).type))
    return _join([rows, rest, markers], "minute")


# ------------------------------------------------------------------------------------------------- gpu


def _gpu_rows(ledger: Ledger, amounts: Amounts, at: Ints, name: str, markers: Ints) -> pa.Table:
    gpu, use, activity = amounts.keys[1:]
    nobody = ("", "", 0, False)
    tenants, jobs, instances, unconfirmed = zip(*ledger.uses, nobody, nobody, strict=True)
    kind = kinds(list(zip(tenants[:-2], unconfirmed[:-2], strict=True)))
    rows = pa.table(
        {
            "pool": _constant(ledger.pool, len(amounts)),
            name: _times(at),
            "gpu": _names(gpu, ledger.spans.gpus),
            "instance": pa.array(np.array(instances, dtype=np.int64)[use], type=pa.uint16()),
            "tenant": _names(use, tenants),
            "job_id": _names(use, jobs),
            "kind": _names(use, kind),
            "activity": _names(activity, _ACTIVITIES),
            "gpu_us": pa.array(amounts.us),
            "energy_mj": _energy(amounts.energy_mj, amounts.energy_known),
        }
    )
    zeros = np.zeros(len(markers), dtype=np.int64)
    none = _constant("", len(markers))
    marks = pa.table(
        {
            "pool": _constant(ledger.pool, len(markers)),
            name: _times(markers),
            "gpu": none,
            "instance": pa.array(zeros, type=pa.uint16()),
            "tenant": none,
            "job_id": none,
            "kind": _constant(_MARKER, len(markers)),
            "activity": none,
            "gpu_us": pa.array(zeros),
            "energy_mj": _energy(zeros, zeros.astype(bool)),
        }
    )
    return _join([rows, marks], name)


def gpu_minute_rows(ledger: Ledger, prints: Fingerprints) -> pa.Table:
    """Rows of `ledger_gpu_minute` without `version`: the complete minutes that have fragments."""
    parts = list(gpu_minute_parts(ledger, prints))
    return (
        pa.concat_tables(parts)
        if parts
        else _gpu_rows(ledger, ledger.by_gpu_minute.take(_NONE), _NONE, "minute", _NONE)
    )


def gpu_minute_parts(ledger: Ledger, prints: Fingerprints) -> Iterator[pa.Table]:
    """The same in the order of time, in tables of whole minutes and about `GPU_ROWS` rows."""
    window, amounts = ledger.window, ledger.by_gpu_minute
    at = window.from_ms + np.arange(window.minutes) * MINUTE_MS
    written = np.flatnonzero((at < window.complete_until_ms // MINUTE_MS * MINUTE_MS) & (prints.fragments > 0))
    first = np.searchsorted(amounts.keys[0], written, side="left")
    last = np.searchsorted(amounts.keys[0], written, side="right")
    begin = 0
    while begin < len(written):
        until = int(np.searchsorted(np.cumsum(last[begin:] - first[begin:]), GPU_ROWS)) + 1 + begin
        minutes = written[begin:until]
        kept = amounts.take(np.flatnonzero(np.isin(amounts.keys[0], minutes)))
        yield _gpu_rows(ledger, kept, at[kept.keys[0]], "minute", at[minutes])
        begin = until


def _hour_starts(ledger: Ledger) -> Ints:
    """Start of each hour of the window, the first rounded down."""
    first = ledger.window.from_ms // HOUR_MS * HOUR_MS
    return np.arange(first, ledger.window.to_ms, HOUR_MS)


def gpu_hour_rows(ledger: Ledger) -> pa.Table:
    """Rows of `ledger_gpu_hour` without `version`. The window must begin with an hour."""
    hours = _hour_starts(ledger)
    return _gpu_rows(ledger, ledger.by_gpu_hour, hours[ledger.by_gpu_hour.keys[0]], "hour", hours)


# ------------------------------------------------------------------------------------------------- job


def job_hour_rows(ledger: Ledger) -> pa.Table:
    """Rows of `ledger_job_hour` without `version`. The window must begin with an hour; buckets are cut at hours."""
    hours = _hour_starts(ledger)
    amounts = ledger.by_job
    held = np.flatnonzero(amounts.keys[1] < len(ledger.jobs))
    hour = ledger.window.buckets_ms[amounts.keys[0][held]] // HOUR_MS * HOUR_MS
    job, activity = amounts.keys[1][held], amounts.keys[2][held]
    keys = np.stack([hour, job, activity], axis=1)
    unique, inverse = np.unique(keys, axis=0, return_inverse=True)
    sums = [np.zeros(len(unique), dtype=np.int64) for _ in range(3)]
    for total, values in zip(sums, (amounts.us, amounts.energy_mj, amounts.blind_us), strict=True):
        np.add.at(total, inverse.reshape(-1), values[held])
    us, energy, blind = sums
    rows = pa.table(
        {
            "pool": _constant(ledger.pool, len(unique)),
            "hour": _times(unique[:, 0]),
            "tenant": _names(unique[:, 1], [job[0] for job in ledger.jobs]),
            "job_id": _names(unique[:, 1], [job[1] for job in ledger.jobs]),
            "user": _names(unique[:, 1], [job[2] for job in ledger.jobs]),
            "kind": _names(unique[:, 1], ["unconfirmed" if job[3] else "held" for job in ledger.jobs]),
            "activity": _names(unique[:, 2], _ACTIVITIES),
            "gpu_us": pa.array(us),
            "energy_mj": _energy(energy, (us > blind) | (energy != 0)),
        }
    )
    none = _constant("", len(hours))
    zeros = np.zeros(len(hours), dtype=np.int64)
    marks = pa.table(
        {
            "pool": _constant(ledger.pool, len(hours)),
            "hour": _times(hours),
            **dict.fromkeys(("tenant", "job_id", "user"), none),
            "kind": _constant(_MARKER, len(hours)),
            "activity": none,
            "gpu_us": pa.array(zeros),
            "energy_mj": _energy(zeros, zeros.astype(bool)),
        }
    )
    return _join([rows, marks], "hour")


def conflict_rows(pool: str, conflicts: Sequence[Conflict], from_ms: int, to_ms: int) -> pa.Table:
    """Rows of `conflicts` without `version`: each conflict cut at hours, and a marker for every hour."""
    cut: set[tuple[int, str, str, str, int, int, str]] = set()
    for conflict in conflicts:
        start = conflict.from_ms
        while start < conflict.to_ms:
            end = min(conflict.to_ms, (start // HOUR_MS + 1) * HOUR_MS)
            hour = start // HOUR_MS * HOUR_MS
            cut.add((hour, conflict.kind, conflict.subject, conflict.other, start, end, conflict.detail))
            start = end
    for hour in range(from_ms // HOUR_MS * HOUR_MS, to_ms, HOUR_MS):
        cut.add((hour, _MARKER, "", "", hour, hour, ""))
    rows = sorted(cut)
    columns = list(zip(*rows, strict=True))
    names = ("hour", "kind", "subject", "other", "from_ms", "to_ms", "detail")
    table = {name: pa.array(column) for name, column in zip(names, columns, strict=True)}
    table["hour"] = _times(np.array(columns[0], dtype=np.int64))
    return pa.table({"pool": _constant(pool, len(rows)), **table})


# ------------------------------------------------------------------------------------------------- money


def quantities(ledger: Ledger) -> list[Quantities]:
    """For every bucket of the window its quantities by (tenant, job, kind, activity), sorted, as finance wants them."""
    amounts = ledger.by_job
    held = np.flatnonzero(amounts.keys[1] < len(ledger.jobs))
    nobody = _nobody(ledger)
    bucket_of_minute = (
        np.searchsorted((ledger.window.buckets_ms - ledger.window.from_ms) // MINUTE_MS, nobody.minute, side="right")
        - 1
    )
    names = [(tenant, job, "unconfirmed" if unconfirmed else "held") for tenant, job, _, unconfirmed in ledger.jobs]
    tenants = [*ledger.unheld.tenants, ""]
    rest_names = [(tenant, "", kind) for kind in _NOBODY_KINDS for tenant in tenants]
    all_keys = {(*name, activity) for name in names for activity in _ACTIVITIES[1:]}
    keys = sorted(all_keys | {(*name, "") for name in rest_names})
    code = {key: n for n, key in enumerate(keys)}
    of_job = np.array([[code.get((*name, a), 0) for a in _ACTIVITIES] for name in names], dtype=np.int64).reshape(-1, 6)
    of_rest = np.array([code[*name, ""] for name in rest_names], dtype=np.int64)
    rest = of_rest[nobody.kind * len(tenants) + nobody.tenant]
    bucket = np.concatenate([amounts.keys[0][held], bucket_of_minute])
    key = np.concatenate([of_job[amounts.keys[1][held], amounts.keys[2][held]], rest])
    us = np.concatenate([amounts.us[held], nobody.us])
    energy = np.concatenate([amounts.energy_mj[held], nobody.energy_mj])
    known = np.concatenate([amounts.energy_known[held], nobody.energy_known])
    unique, inverse = np.unique(bucket * len(keys) + key, return_inverse=True)
    total_us, total_mj, unknown = (np.zeros(len(unique), dtype=np.int64) for _ in range(3))
    np.add.at(total_us, inverse, us)
    np.add.at(total_mj, inverse, energy)
    np.add.at(unknown, inverse, ~known & (us != 0))
    columns = [np.array([key[n] for key in keys], dtype=object) for n in range(4)]
    out: list[Quantities] = []
    edges = np.searchsorted(unique, np.arange(len(ledger.window.buckets_ms)) * len(keys))
    for first, last in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        rows = unique[first:last] % len(keys)
        tenant, job_id, kind, activity = (column[rows] for column in columns)
        sums = total_us[first:last], total_mj[first:last], unknown[first:last] == 0
        out.append(Quantities(tenant, job_id, kind, activity, *sums))
    return out


def merge(parts: Sequence[Quantities]) -> Quantities:
    """The quantities of neighbouring buckets as those of one interval."""
    if len(parts) == 1:
        return parts[0]
    keys: dict[tuple[str, str, str, str], list[int]] = {}
    for part in parts:
        names = zip(part.tenant, part.job_id, part.kind, part.activity, strict=True)
        rows = zip(names, part.gpu_us, part.energy_mj, part.energy_known, strict=True)
        for key, us, mj, known in rows:
            sums = keys.setdefault(key, [0, 0, 1])
            sums[0] += int(us)
            sums[1] += int(mj)
            sums[2] &= int(known)
    order = sorted(keys)
    text = [np.array([key[n] for key in order], dtype=object) for n in range(4)]
    us, mj, known = (np.array([keys[key][n] for key in order], dtype=np.int64) for n in range(3))
    return Quantities(text[0], text[1], text[2], text[3], us, mj, known.astype(bool))
