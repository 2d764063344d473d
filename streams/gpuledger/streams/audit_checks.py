"""What an audit asks of the database: each check is one query that adds up two sides and returns only what differs.

The sides come from different tables (minutes, GPU minutes, hours, jobs, charges), so a row that is lost, doubled or
changed in one of them cannot hide.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from gpuledger.streams.marks import HOUR_MS
from gpuledger.streams.store import Store

__all__ = ["CHECKS", "MOST_ROWS", "UNITS", "Check", "Finding", "Unit", "run_check"]

Unit = Literal["minute", "hour", "money"]
UNITS: tuple[Unit, ...] = ("minute", "hour", "money")

#: Differences that one check returns for one range; more say nothing more.
MOST_ROWS = 1_000


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it must be. `at_ms` is where its `unit` (minute, hour or money) begins; `gpu` and
    `subject` are "" where the trouble has no such name. `expected` and `found` are for people."""

    unit: Unit
    at_ms: int
    pool: str
    gpu: str
    check: str
    subject: str
    expected: str
    found: str

    @property
    def place(self) -> tuple[int, int, int, str, bool, str, str, str]:
        """What makes two looks' findings the same one. Sorts by time, and within an hour a minute comes before the
        hour it is in, and a named GPU before none."""
        level = UNITS.index(self.unit)
        return (
            *(self.at_ms // HOUR_MS, level, self.at_ms, self.pool),
            *(not self.gpu, self.gpu, self.check, self.subject),
        )


@dataclass(frozen=True, slots=True)
class Check:
    """`sql` returns (at_ms, names…, expected, found) with `unit` 'minute', 'hour' or 'money' deciding its range.

    `titles` say what the names are. Money and hours are checked for whole units only.
    """

    name: str
    unit: Unit
    titles: tuple[str, ...]
    sql: str


_MINUTE = """
    pool = {pool:String} AND minute >= fromUnixTimestamp64Milli({from_ms:Int64}, 'UTC')
    AND minute < fromUnixTimestamp64Milli({to_ms:Int64}, 'UTC')"""
_HOUR = _MINUTE.replace("minute", "hour")
_INTERVAL = _MINUTE.replace("minute", "interval_start")
_LIMIT = f"ORDER BY at_ms LIMIT {MOST_ROWS}"


def _fill(sql: str) -> str:
    """The query with ranges and sums written in. `$unit(x)` is the start of x's unit in milliseconds; `us` of `side` 0
    is what must be, of `side` 1 what was found."""
    sql = sql.replace("$sides", "sumIf(us, side = 0) AS expected, sumIf(us, side = 1) AS found")
    sql = sql.replace("$minute", _MINUTE).replace("$hour", _HOUR).replace("$interval", _INTERVAL)
    for name in ("minute", "hour", "interval_start"):
        start = "intDiv(toUnixTimestamp64Milli(" + name + "), {unit_ms:Int64}) * {unit_ms:Int64}"
        sql = sql.replace(f"$unit({name})", start)
    return f"{sql} {_LIMIT}"


CHECKS: tuple[Check, ...] = (
    Check(
        "minute",
        "minute",
        ("",),
        _fill("""
SELECT toUnixTimestamp64Milli(minute) AS at_ms,
    multiIf(markers != 1, 'markers', least < 0, 'negative amount', '') AS name,
    multiIf(markers != 1, 1, least < 0, 0, toInt128(service)) AS expected,
    multiIf(markers != 1, toInt128(markers), least < 0, toInt128(least), segments) AS found
FROM (
    SELECT minute, countIf(kind = 'marker') AS markers, minIf(gpu_us, kind != 'marker') AS least,
        maxIf(gpu_us, kind = 'marker') AS service,
        sumIf(toInt128(gpu_us), kind IN ('held', 'unconfirmed', 'reserved_unused', 'free', 'unsliced')) AS segments
    FROM (SELECT *, max(version) OVER (PARTITION BY pool, minute) AS newest FROM ledger_minute)
    WHERE version = newest AND $minute
    GROUP BY minute
)
WHERE markers != 1 OR least < 0 OR segments != service"""),
    ),
    Check(
        "gpu rows of the minute",
        "minute",
        ("tenant", "kind", "activity"),
        _fill("""
SELECT toUnixTimestamp64Milli(minute) AS at_ms, tenant, kind, activity, $sides
FROM (
    SELECT minute, tenant, kind, activity, toInt128(gpu_us) AS us, 0 AS side FROM v_ledger_minute
    WHERE $minute AND kind IN ('held', 'unconfirmed')
    UNION ALL
    SELECT minute, tenant, kind, activity, sum(toInt128(gpu_us)) AS us, 1 AS side FROM v_gpu_minute
    WHERE $minute AND kind IN ('held', 'unconfirmed') GROUP BY minute, tenant, kind, activity
)
GROUP BY minute, tenant, kind, activity
HAVING if(activity IN ('active', 'idle', 'down'), found != expected, found > expected)"""),
    ),
    Check(
        "gpu hour",
        "hour",
        ("tenant", "kind", "activity"),
        _fill("""
SELECT at_ms, who, what, did, $sides
FROM (
    SELECT $unit(minute) AS at_ms, tenant AS who, kind AS what, activity AS did, sum(toInt128(gpu_us)) AS us, 0 AS side
    FROM v_ledger_minute WHERE $minute AND kind IN ('held', 'unconfirmed') GROUP BY at_ms, who, what, did
    UNION ALL
    SELECT $unit(minute) AS at_ms, '' AS who, 'unallocated' AS what, '' AS did, sum(toInt128(gpu_us)) AS us, 0 AS side
    FROM v_ledger_minute WHERE $minute AND kind IN ('reserved_unused', 'free', 'unsliced') GROUP BY at_ms
    UNION ALL
    SELECT $unit(hour) AS at_ms, tenant AS who, if(kind = 'unsliced', 'unallocated', kind) AS what,
        if(kind IN ('unallocated', 'unsliced'), '', activity) AS did,
        sum(toInt128(gpu_us)) AS us, 1 AS side
    FROM v_gpu_hour WHERE $hour GROUP BY at_ms, who, what, did
)
GROUP BY at_ms, who, what, did HAVING found != expected"""),
    ),
    Check(
        "job hour",
        "hour",
        ("tenant", "kind", "activity"),
        _fill("""
SELECT at_ms, tenant, kind, activity, $sides
FROM (
    SELECT $unit(minute) AS at_ms, tenant, kind, activity, sum(toInt128(gpu_us)) AS us, 0 AS side
    FROM v_ledger_minute WHERE $minute AND kind IN ('held', 'unconfirmed') GROUP BY at_ms, tenant, kind, activity
    UNION ALL
    SELECT $unit(hour) AS at_ms, tenant, kind, activity, sum(toInt128(gpu_us)) AS us, 1 AS side FROM v_job_hour
    WHERE $hour GROUP BY at_ms, tenant, kind, activity
)
GROUP BY at_ms, tenant, kind, activity HAVING found != expected"""),
    ),
    Check(
        "job hour of a job",
        "hour",
        ("tenant", "job", "kind", "activity"),
        _fill("""
SELECT at_ms, tenant, job_id, kind, activity, $sides
FROM (
    SELECT $unit(hour) AS at_ms, tenant, job_id, kind, activity, sum(toInt128(gpu_us)) AS us, 0 AS side
    FROM v_gpu_hour WHERE $hour AND kind IN ('held', 'unconfirmed') GROUP BY at_ms, tenant, job_id, kind, activity
    UNION ALL
    SELECT $unit(hour) AS at_ms, tenant, job_id, kind, activity, sum(toInt128(gpu_us)) AS us, 1 AS side
    FROM v_job_hour WHERE $hour GROUP BY at_ms, tenant, job_id, kind, activity
)
GROUP BY at_ms, tenant, job_id, kind, activity HAVING found != expected"""),
    ),
    Check(
        "charged time",
        "money",
        ("tenant", "job", "kind", "activity"),
        _fill("""
WITH priced AS (SELECT DISTINCT $unit(interval_start) AS at_ms FROM v_asset_cost WHERE $interval)
SELECT at_ms, tenant, job_id, kind, activity, $sides
FROM (
    SELECT $unit(hour) AS at_ms, tenant, job_id, kind, activity, sum(toInt128(gpu_us)) AS us, 0 AS side
    FROM v_job_hour WHERE $hour GROUP BY at_ms, tenant, job_id, kind, activity
    UNION ALL
    SELECT $unit(minute) AS at_ms, tenant, '' AS job_id, kind, activity, sum(toInt128(gpu_us)) AS us, 0 AS side
    FROM v_ledger_minute WHERE $minute AND kind IN ('reserved_unused', 'free', 'unsliced', 'overcommitted')
    GROUP BY at_ms, tenant, kind, activity
    UNION ALL
    SELECT $unit(interval_start) AS at_ms, tenant, job_id, kind, activity, sum(toInt128(gpu_us)) AS us, 1 AS side
    FROM v_charges WHERE $interval GROUP BY at_ms, tenant, job_id, kind, activity
)
WHERE at_ms IN (SELECT at_ms FROM priced)
GROUP BY at_ms, tenant, job_id, kind, activity HAVING found != expected"""),
    ),
    Check(
        "asset cost",
        "money",
        ("",),
        _fill("""
SELECT toUnixTimestamp64Milli(interval_start) AS at_ms,
    multiIf(markers != 1, 'markers', service != us, 'gpu_us', cost_differs, 'asset_cost', 'energy_cost') AS name,
    multiIf(markers != 1, '1', service != us, toString(service), cost_differs, toString(cost), toString(energy))
        AS expected,
    multiIf(markers != 1, toString(markers), service != us, toString(us), cost_differs, toString(parts),
        toString(energy_parts)) AS found
FROM (
    SELECT interval_start, countIf(kind = 'marker') AS markers,
        maxIf(gpu_us, kind = 'marker') AS service,
        sumIf(toInt128(gpu_us), kind NOT IN ('marker', 'overcommitted')) AS us,
        maxIf(asset_cost, kind = 'marker') AS cost, sumIf(asset_cost, kind != 'marker') AS parts,
        maxIf(energy_cost, kind = 'marker') AS energy, sumIf(energy_cost, kind != 'marker') AS energy_parts,
        ifNull(cost != ifNull(parts, 0), isNotNull(parts)) AS cost_differs,
        ifNull(energy != ifNull(energy_parts, 0), 0) AS energy_differs
    FROM (SELECT *, max(version) OVER (PARTITION BY pool, interval_start) AS newest FROM charges)
    WHERE version = newest AND $interval
    GROUP BY interval_start
)
WHERE markers != 1 OR service != us OR cost_differs OR energy_differs"""),
    ),
)


def run_check(store: Store, check: Check, pool: str, from_ms: int, to_ms: int, unit_ms: int) -> list[Finding]:
    """What the check finds in [from_ms, to_ms): the first MOST_ROWS differences. `unit_ms`: of money, or an hour."""
    unit = unit_ms if check.unit == "money" else HOUR_MS
    rows = store.rows(check.sql, {"pool": pool, "from_ms": from_ms, "to_ms": to_ms, "unit_ms": unit})
    found: list[Finding] = []
    for at_ms, *names, expected, value in rows:
        titled = zip(check.titles, names, strict=True)
        subject = ", ".join(f"{title} {name}".strip() for title, name in titled if name)
        found.append(Finding(check.unit, int(at_ms), pool, "", check.name, subject, _text(expected), _text(value)))
    return found


def _text(value: object) -> str:
    if value is None:
        return "nothing"
    return format(value, "f") if isinstance(value, Decimal) else str(value)
