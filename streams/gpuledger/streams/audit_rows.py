"""What an audit compares row by row: the time of single GPUs with their placements, and a sample with what a recompute
gives now.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from decimal import Decimal
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gpuledger.finance.charges import Quantities, charge_interval
from gpuledger.finance.charges_table import charges_table
from gpuledger.finance.rates import Rates, price_intervals, rates_from
from gpuledger.streams import ledger_rows
from gpuledger.streams.audit_checks import Finding, Unit
from gpuledger.streams.fingerprints import RatePrints
from gpuledger.streams.holders import spans
from gpuledger.streams.ledger_digest import row_hashes
from gpuledger.streams.marks import MINUTE_MS, Ranges
from gpuledger.streams.pieces import expand
from gpuledger.streams.pool_facts import PoolFacts
from gpuledger.streams.recomputer import LedgerRules, Recomputer
from gpuledger.streams.store import Store

__all__ = [
    "Service",
    "doubtful_minutes",
    "gpu_counts",
    "gpu_time",
    "hour_differences",
    "minute_differences",
    "money_differences",
    "same_money",
    "service_of",
]

Ints = NDArray[np.int64]
Rows = dict[tuple[str, ...], tuple[Any, ...]]

#: More GPUs than this that came or went in a range are compared all at once instead of by name.
_MOST_NAMES = 5_000


def _at(sql: str) -> str:
    """The query of one pool and one time; `$at` stands for the time."""
    return sql.replace("$at", "fromUnixTimestamp64Milli({at_ms:Int64}, 'UTC')")


_MINUTE_ROWS = _at("""
    SELECT tenant, kind, activity, gpu_us, energy_mj
    FROM v_ledger_minute WHERE pool = {pool:String} AND minute = $at""")
_GPU_MINUTE_ROWS = _at("""
    SELECT gpu, tenant, job_id, instance, kind, activity, gpu_us, energy_mj
    FROM v_gpu_minute WHERE pool = {pool:String} AND minute = $at""")
_GPU_HOUR_ROWS = _GPU_MINUTE_ROWS.replace("minute", "hour")
_JOB_HOUR_ROWS = _at("""
    SELECT tenant, job_id, user, kind, activity, gpu_us, energy_mj
    FROM v_job_hour WHERE pool = {pool:String} AND hour = $at""")
_CHARGE_ROWS = _at("""
    SELECT tenant, job_id, kind, activity, payer, gpu_us, energy_mj, asset_cost, energy_cost, asset_currency, charge,
        charge_currency, rate_card, incomplete, toUnixTimestamp64Milli(interval_end) AS end_ms
    FROM v_charges WHERE pool = {pool:String} AND interval_start = $at""")
_GPU_SUMS = """
    SELECT gpu, toUnixTimestamp64Milli($time) AS at_ms, sum(toInt128(gpu_us)) AS us, min(gpu_us) AS least
    FROM $view
    WHERE pool = {pool:String} AND $time >= fromUnixTimestamp64Milli({from_ms:Int64}, 'UTC')
        AND $time < fromUnixTimestamp64Milli({to_ms:Int64}, 'UTC') $among
    GROUP BY gpu, $time
    HAVING us != {unit_us:Int64} OR least < 0 OR {all:UInt8} OR gpu IN {odd:Array(String)}
        OR gpu NOT IN (SELECT gpu FROM placements WHERE pool = {pool:String})
    ORDER BY at_ms, gpu
"""
# Of hashes, because a set of numbers is several times quicker than one of names.
_GPU_COUNTS = """
    SELECT at_ms, sumIf(gpus, side = 0) AS expected, sumIf(gpus, side = 1) AS found
    FROM (
        SELECT toUnixTimestamp64Milli(minute) AS at_ms, uniqExact(cityHash64(gpu)) AS gpus, 0 AS side FROM fragments
        WHERE minute >= fromUnixTimestamp64Milli({from_ms:Int64}, 'UTC')
            AND minute < fromUnixTimestamp64Milli({to_ms:Int64}, 'UTC') AND arraySum(segment_duration_ms) > 0
            AND gpu IN (SELECT gpu FROM placements WHERE pool = {pool:String}) AND gpu NOT IN {odd:Array(String)}
        GROUP BY minute
        UNION ALL
        SELECT toUnixTimestamp64Milli(minute) AS at_ms, uniqExact(cityHash64(gpu)) AS gpus, 1 AS side FROM v_gpu_minute
        WHERE pool = {pool:String} AND minute >= fromUnixTimestamp64Milli({from_ms:Int64}, 'UTC')
            AND minute < fromUnixTimestamp64Milli({to_ms:Int64}, 'UTC') AND gpu NOT IN {odd:Array(String)}
        GROUP BY minute
    )
    GROUP BY at_ms HAVING found != expected ORDER BY at_ms
"""


# As in `audit_sums`: the GPUs that were in service all the time, of which those that have rows sum to whole units.
_IN_DOUBT = """
    SELECT toUnixTimestamp64Milli(minute) AS at_ms,
        sumIf(toUInt64(gpu_us) * number, even) != {unit_us:UInt64} * sum(DISTINCT if(even, number, 0))
            OR minIf(gpu_us, even) < 0 OR countIf(strange) > 0 AS wrong
    FROM (
        SELECT minute, version, gpu_us, bitOr(cityHash64({salt:UInt64}, gpu), 1) AS number,
            kind != 'marker' AND gpu NOT IN {odd:Array(String)} AS even,
            kind != 'marker' AND gpu NOT IN (SELECT gpu FROM placements WHERE pool = {pool:String}) AS strange
        FROM ledger_gpu_minute
        WHERE pool = {pool:String} AND minute >= fromUnixTimestamp64Milli({from_ms:Int64}, 'UTC')
            AND minute < fromUnixTimestamp64Milli({to_ms:Int64}, 'UTC')
    )
    GROUP BY minute, version ORDER BY minute, version DESC LIMIT 1 BY minute
"""


class Service:
    """How long each GPU was in service of a pool in each unit of [from_ms, to_ms), in microseconds."""

    def __init__(self, gpus: list[str], us: Ints, from_ms: int, unit_ms: int) -> None:
        self.from_ms, self.unit_ms = from_ms, unit_ms
        self.to_ms = from_ms + us.shape[1] * unit_ms
        self._us = us
        self._index = {gpu: n for n, gpu in enumerate(gpus)}
        self.odd = [gpus[n] for n in np.flatnonzero((us != unit_ms * 1000).any(axis=1)).tolist()]

    def us(self, gpu: str, at_ms: int) -> int:
        """Of one GPU in the unit that begins at `at_ms`; 0 for a GPU that was never placed in the pool."""
        row = self._index.get(gpu)
        return 0 if row is None else int(self._us[row, (at_ms - self.from_ms) // self.unit_ms])


def service_of(facts: PoolFacts, from_ms: int, to_ms: int, unit_ms: int) -> Service:
    """From placements alone; `from_ms` and `to_ms` are multiples of `unit_ms`."""
    found = spans(replace(facts, allocations=facts.allocations.slice(0, 0)), from_ms, to_ms, 1)
    us = np.zeros((len(found.gpus), (to_ms - from_ms) // unit_ms), dtype=np.int64)
    first, last = (found.start - from_ms) // unit_ms, -((from_ms - found.end) // unit_ms)
    span, position = expand(last - first)
    unit = first[span] + position
    begin = np.maximum(found.start[span], from_ms + unit * unit_ms)
    finish = np.minimum(found.end[span], from_ms + (unit + 1) * unit_ms)
    np.add.at(us, (found.gpu[span], unit), (finish - begin) * 1000)
    return Service(found.gpus, us, from_ms, unit_ms)


def gpu_time(
    store: Store, pool: str, service: Service, unit: Literal["minute", "hour"], *, only_odd: bool = False
) -> list[Finding]:
    """GPUs whose rows of a minute or hour do not sum to their time in service then; `only_odd`: of those that were not
    in service all the time."""
    every = len(service.odd) > _MOST_NAMES
    if only_odd and (every or not service.odd):
        return []
    sql = _GPU_SUMS.replace("$view", f"v_gpu_{unit}").replace("$time", unit)
    sql = sql.replace("$among", "AND gpu IN {odd:Array(String)}" if only_odd else "")
    parameters = {
        "pool": pool,
        "from_ms": service.from_ms,
        "to_ms": service.to_ms,
        "unit_us": service.unit_ms * 1000,
        "all": int(every),
        "odd": [] if every else service.odd,
    }
    found: list[Finding] = []
    for gpu, at_ms, us, least in store.rows(sql, parameters):
        expected = service.us(gpu, int(at_ms))
        about = (unit, int(at_ms), pool, gpu, f"gpu {unit} against placements")
        if least < 0:
            found.append(Finding(*about, "negative amount", "0", str(least)))
        elif us != expected:
            found.append(Finding(*about, "time in service", str(expected), str(us)))
    return found


def doubtful_minutes(store: Store, pool: str, service: Service, salt: int) -> list[tuple[int, int]]:
    """Stretches of minutes in which the rows of a GPU that was in service all the time may not sum to that, or a GPU
    has rows that was never placed in the pool."""
    if len(service.odd) > _MOST_NAMES:
        return [(service.from_ms, service.to_ms)]
    bounds = {"pool": pool, "from_ms": service.from_ms, "to_ms": service.to_ms, "odd": service.odd}
    rows = store.rows(_IN_DOUBT, {**bounds, "unit_us": service.unit_ms * 1000, "salt": salt})
    return list(Ranges((int(at), int(at) + service.unit_ms) for at, wrong in rows if wrong))


def gpu_counts(store: Store, pool: str, service: Service) -> list[Finding]:
    """Minutes that lack GPUs that were seen, or have GPUs that nobody saw; of the GPUs always in service."""
    if len(service.odd) > _MOST_NAMES:
        return []
    bounds = {"pool": pool, "from_ms": service.from_ms, "to_ms": service.to_ms, "odd": service.odd}
    return [
        Finding("minute", int(at_ms), pool, "", "gpus of the minute", "GPUs seen", str(expected), str(found))
        for at_ms, expected, found in store.rows(_GPU_COUNTS, bounds)
    ]


# ------------------------------------------------------------------------------------------------- recomputed


def _summed(rows: Iterable[tuple[Any, ...]], keys: int) -> Rows:
    """Rows of equal keys as one; NULL energy stays NULL only where all of it is."""
    out: Rows = {}
    for row in rows:
        key, us, energy = tuple(map(str, row[:keys])), int(row[keys]), row[keys + 1]
        before = out.get(key, (0, None))
        known = [each for each in (before[1], energy) if each is not None]
        out[key] = before[0] + us, sum(map(int, known)) if known else None
    return out


def _of_table(table: pa.Table, names: tuple[str, ...]) -> Rows:
    kinds = table.column("kind").to_pylist()
    columns = [table.column(name).to_pylist() for name in (*names, "gpu_us", "energy_mj")]
    rows = zip(kinds, *columns, strict=True)
    return _summed(((*row[1:],) for row in rows if row[0] != "marker"), len(names))


def _compare(
    where: tuple[Unit, int, str], check: str, names: tuple[str, ...], must: Mapping[Any, Any], have: Mapping[Any, Any]
) -> list[Finding]:
    found: list[Finding] = []
    for key in sorted(set(must) | set(have)):
        if must.get(key) == have.get(key):
            continue
        named = dict(zip(names, key, strict=True))
        gpu = named.pop("gpu", "")
        subject = ", ".join(f"{name} {value}" for name, value in named.items() if value not in ("", "0"))
        found.append(Finding(*where, gpu, check, subject, _amounts(must.get(key)), _amounts(have.get(key))))
    return found


def _amounts(values: tuple[Any, ...] | None) -> str:
    if values is None:
        return "no row"
    return ", ".join(_amount(value) for value in values)


def _amount(value: Any) -> str:
    if value is None:
        return "unknown"
    return format(value, "f") if isinstance(value, Decimal) else str(value)


_MINUTE_KEY = ("tenant", "kind", "activity")
_GPU_KEY = ("gpu", "tenant", "job_id", "instance", "kind", "activity")
_JOB_KEY = ("tenant", "job_id", "user", "kind", "activity")


def _stored(store: Store, sql: str, pool: str, at_ms: int, keys: int) -> Rows:
    return _summed(store.rows(sql, {"pool": pool, "at_ms": at_ms}), keys)


def minute_differences(store: Store, recomputer: Recomputer, pool: str, at_ms: int) -> list[Finding]:
    """Rows (GPU-us, mJ) of one complete minute that are not what a recompute gives now; GPU rows first."""
    ledger, prints, _ = recomputer.compute(pool, at_ms, at_ms + MINUTE_MS)
    must = _of_table(ledger_rows.gpu_minute_rows(ledger, prints), _GPU_KEY)
    have = _stored(store, _GPU_MINUTE_ROWS, pool, at_ms, len(_GPU_KEY))
    found = _compare(("minute", at_ms, pool), "recomputed gpu minute", _GPU_KEY, must, have)
    must = _of_table(ledger_rows.minute_rows(ledger, prints), _MINUTE_KEY)
    have = _stored(store, _MINUTE_ROWS, pool, at_ms, len(_MINUTE_KEY))
    return found + _compare(("minute", at_ms, pool), "recomputed minute", _MINUTE_KEY, must, have)


def hour_differences(store: Store, recomputer: Recomputer, pool: str, from_ms: int, to_ms: int) -> list[Finding]:
    """As `minute_differences` for the GPU and job rows of whole, complete hours."""
    ledger, _, _ = recomputer.compute(pool, from_ms, to_ms)
    found: list[Finding] = []
    for name, table, sql, keys in (
        ("gpu", ledger_rows.gpu_hour_rows(ledger), _GPU_HOUR_ROWS, _GPU_KEY),
        ("job", ledger_rows.job_hour_rows(ledger), _JOB_HOUR_ROWS, _JOB_KEY),
    ):
        hours = table.column("hour").cast(pa.int64()).to_numpy()
        for at_ms in np.unique(hours).tolist():
            must = _of_table(table.filter(pa.array(hours == at_ms)), keys)
            have = _stored(store, sql, pool, at_ms, len(keys))
            found += _compare(("hour", at_ms, pool), f"recomputed {name} hour", keys, must, have)
    return found


_MONEY_KEY = ("tenant", "job_id", "kind", "activity")
_MONEY = (
    "payer",
    "asset_cost",
    "energy_cost",
    "asset_currency",
    "charge",
    "charge_currency",
    "rate_card",
    "incomplete",
)


def same_money(store: Store, pool: str, at_ms: int, rates: Rates, rows_sum: int) -> bool:
    """Whether the stored quantities of a price interval, charged again, give rows whose hashes sum to `rows_sum`."""
    stored = store.table(_CHARGE_ROWS, {"pool": pool, "at_ms": at_ms})
    if stored.num_rows == 0:
        return False
    # As Arrow sorts text, by bytes of UTF-8, so does Python.
    rows = stored.sort_by([(name, "ascending") for name in _MONEY_KEY])
    energy = rows.column("energy_mj")
    quantities = Quantities(
        *(rows.column(name).to_numpy() for name in _MONEY_KEY),
        gpu_us=rows.column("gpu_us").to_numpy(),
        energy_mj=energy.fill_null(0).to_numpy(),
        energy_known=energy.is_valid().to_numpy(),
    )
    end_ms = int(stored.column("end_ms")[0].as_py())
    try:
        charges = charge_interval(pool, at_ms, end_ms, quantities, rates)
    except ValueError:  # rows that no recompute could have written; `money_differences` says which
        return False
    again = charges_table([charges], [False], [RatePrints(pool, rates).of(at_ms, end_ms)])
    return int(row_hashes("charges", again).sum(dtype=np.uint64)) == rows_sum


def money_differences(store: Store, rules: LedgerRules, pool: str, at_ms: int) -> list[Finding]:
    """Charges of one price interval that are not what its stored quantities and today's rates give."""
    stored = store.table(_CHARGE_ROWS, {"pool": pool, "at_ms": at_ms})
    if stored.num_rows == 0:
        return []
    rates = rates_from(store.rates(pool))
    end_ms = int(stored.column("end_ms")[0].as_py())
    if (at_ms, end_ms) not in price_intervals(pool, at_ms, end_ms, rates, rules.price_interval_minutes):
        what = f"ends at {end_ms}"
        return [Finding("money", at_ms, pool, "", "recomputed money", "price interval", "as the rates cut it", what)]
    keys = _MONEY_KEY
    # Python's order of strings, in which the quantities were sorted when they were charged.
    rows = sorted(stored.to_pylist(), key=lambda row: tuple(row[name] for name in keys))
    texts = [np.array([row[name] for row in rows], dtype=object) for name in keys]
    energy = [row["energy_mj"] for row in rows]
    quantities = Quantities(
        *texts,
        gpu_us=np.array([row["gpu_us"] for row in rows], dtype=np.int64),
        energy_mj=np.array([value or 0 for value in energy], dtype=np.int64),
        energy_known=np.array([value is not None for value in energy], dtype=np.bool_),
    )
    try:
        charges = charge_interval(pool, at_ms, end_ms, quantities, rates)
    except ValueError as error:  # rows that no recompute could have written, such as one key twice
        return [Finding("money", at_ms, pool, "", "recomputed money", "rows", "rows that can be charged", str(error))]
    again = charges_table([charges], [False]).to_pylist()
    must = _money_rows((row for row in again if row["kind"] != "marker"), keys)
    return _compare(("money", at_ms, pool), "recomputed money", keys, must, _money_rows(rows, keys))


def _money_rows(rows: Iterable[dict[str, Any]], keys: tuple[str, ...]) -> dict[tuple[str, ...], tuple[Any, ...]]:
    out: dict[tuple[str, ...], list[tuple[Any, ...]]] = defaultdict(list)
    for row in rows:
        out[tuple(row[name] for name in keys)].append(tuple(row[name] for name in _MONEY))
    return {key: tuple(value for part in sorted(parts, key=str) for value in part) for key, parts in out.items()}
