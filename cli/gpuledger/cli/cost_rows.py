"""The figures of `gpuledger cost`: GPU time from the ledger, money from the charges, added up by tenant, pool or job.

Money is exact for whole price intervals. Of an interval that the range cuts, its share of time is taken and the row is
labelled an estimate; so is everything that is not complete yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from clickhouse_connect.driver.client import Client

__all__ = ["OPERATOR", "By", "Filters", "cost_rows", "total_rows"]

By = Literal["tenant", "pool", "job"]
#: Who bears the cost of what nobody reserved; the parentheses keep it apart from a tenant of that name.
OPERATOR = "(operator)"

_HELD = ("active", "idle", "unobserved", "down", "pending")
_KINDS = ("unconfirmed", "reserved_unused", "free", "unsliced")
_TIMES = ("held", *_HELD, *_KINDS)

_RANGE = """minute >= fromUnixTimestamp64Milli({from_ms:Int64}, 'UTC')
    AND minute < fromUnixTimestamp64Milli({to_ms:Int64}, 'UTC') AND ({pool:String} = '' OR pool = {pool:String})
    AND ({tenant:String} = '' OR tenant = {tenant:String})"""
_MINUTES = """
    SELECT pool, tenant, '' AS job, kind, activity, sum(toInt128(gpu_us)) AS us, sum(toInt128(energy_mj)) AS mj,
        min(complete) = 0 AS estimate
    FROM v_ledger_minute WHERE $range AND kind != 'overcommitted'
    GROUP BY pool, tenant, kind, activity"""
# An interval has at most a day, so its start is not further back; `part` of `whole` milliseconds lie in the range.
_CHARGED = """
    SELECT *, toUnixTimestamp64Milli(interval_start) AS start_ms, toUnixTimestamp64Milli(interval_end) AS end_ms,
        least(end_ms, {to_ms:Int64}) - greatest(start_ms, {from_ms:Int64}) AS part, end_ms - start_ms AS whole
    FROM $view
    WHERE interval_start >= fromUnixTimestamp64Milli({from_ms:Int64} - 86400000, 'UTC')
        AND interval_start < fromUnixTimestamp64Milli({to_ms:Int64}, 'UTC')
        AND interval_end > fromUnixTimestamp64Milli({from_ms:Int64}, 'UTC') AND interval_end > interval_start
        AND ({pool:String} = '' OR pool = {pool:String})"""
_MONEY = """
    SELECT pool, tenant, $job AS job, payer, asset_currency, charge_currency,
        CAST(round(sum(toDecimal256(asset_cost, 18) * part / whole), 9), 'Nullable(Decimal(38, 9))') AS cost,
        CAST(round(sum(toDecimal256(charge, 18) * part / whole), 9), 'Nullable(Decimal(38, 9))') AS charged,
        max(estimate = 1 OR part < whole) AS estimated, max(incomplete = 1 OR isNull(asset_cost)) AS lacks
    FROM ($charged)
    WHERE {tenant:String} = '' OR tenant = {tenant:String} OR payer = {tenant:String}
    GROUP BY pool, tenant, job, payer, asset_currency, charge_currency"""
_CHARGED_TIME = """
    SELECT pool, tenant, job_id AS job, kind, activity, sum(intDiv(toInt128(gpu_us) * part, whole)) AS us,
        sum(intDiv(toInt128(energy_mj) * part, whole)) AS mj, max(estimate = 1 OR part < whole) AS estimated
    FROM ($charged)
    WHERE kind != 'overcommitted' AND ({tenant:String} = '' OR tenant = {tenant:String})
    GROUP BY pool, tenant, job, kind, activity"""
_PRICED_HOURS = """
    SELECT DISTINCT pool,
        arrayJoin(range(toUInt64(intDiv(start_ms, 3600000)), toUInt64(intDiv(end_ms - 1, 3600000) + 1))) AS hour
    FROM ($charged)"""
# Jobs of pools without prices: by the hour, of the last hour what has passed.
_UNPRICED_JOBS = """
    SELECT pool, tenant, job_id AS job, kind, activity, sum(intDiv(toInt128(gpu_us) * part, whole)) AS us,
        sum(intDiv(toInt128(energy_mj) * part, whole)) AS mj, max(part < whole) AS estimated
    FROM (
        SELECT *, toUnixTimestamp64Milli(hour) AS start_ms, least(start_ms + 3600000, {now_ms:Int64}) AS end_ms,
            least(end_ms, {to_ms:Int64}) - greatest(start_ms, {from_ms:Int64}) AS part,
            greatest(end_ms - start_ms, 1) AS whole
        FROM v_job_hour
        WHERE hour > fromUnixTimestamp64Milli({from_ms:Int64} - 3600000, 'UTC')
            AND hour < fromUnixTimestamp64Milli({to_ms:Int64}, 'UTC') AND ({pool:String} = '' OR pool = {pool:String})
            AND ({tenant:String} = '' OR tenant = {tenant:String})
    )
    WHERE part > 0 AND (pool, toUInt64(intDiv(start_ms, 3600000))) NOT IN ($priced)
    GROUP BY pool, tenant, job, kind, activity"""
_UNPRICED_REST = """
    SELECT pool, tenant, '' AS job, kind, activity, sum(toInt128(gpu_us)) AS us, sum(toInt128(energy_mj)) AS mj,
        min(complete) = 0 AS estimate
    FROM v_ledger_minute
    WHERE $range AND kind IN ('reserved_unused', 'free', 'unsliced')
        AND (pool, toUInt64(intDiv(toUnixTimestamp64Milli(minute), 3600000))) NOT IN ($priced)
    GROUP BY pool, tenant, kind, activity"""
#: Minutes of each pool that no price interval covers: their cost is not known.
_UNCOVERED = """
    SELECT pool FROM (
        SELECT pool, count() * 60000 AS ms, 0 AS priced_ms FROM v_recomputes
        WHERE minute >= fromUnixTimestamp64Milli({from_ms:Int64}, 'UTC')
            AND minute < fromUnixTimestamp64Milli({to_ms:Int64}, 'UTC') AND service_us > 0
        GROUP BY pool
        UNION ALL
        SELECT pool, 0 AS ms, sum(part) AS priced_ms FROM ($charged) WHERE isNotNull(asset_cost) GROUP BY pool
    )
    GROUP BY pool HAVING sum(ms) > sum(priced_ms)"""


@dataclass(frozen=True, slots=True)
class Filters:
    """[from_ms, to_ms), and one pool or tenant alone ("" for all). `now_ms`: the end of the open minute."""

    from_ms: int
    to_ms: int
    now_ms: int
    pool: str = ""
    tenant: str = ""

    def parameters(self) -> dict[str, Any]:
        """For the queries."""
        return {name: getattr(self, name) for name in ("from_ms", "to_ms", "now_ms", "pool", "tenant")}


@dataclass(slots=True)
class _Account:
    """One row being added up. Money by currency: sums over currencies mean nothing."""

    us: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_TIMES, 0))
    energy_mj: int | None = None
    cost: dict[str, Decimal] = field(default_factory=dict[str, Decimal])
    charge: dict[str, Decimal] = field(default_factory=dict[str, Decimal])
    estimate: bool = False
    incomplete: bool = False

    def add_time(self, kind: str, activity: str, us: int, energy_mj: int | None) -> None:
        self.us[kind] += us
        if kind == "held":
            self.us[activity] += us
        if energy_mj is not None:
            self.energy_mj = (self.energy_mj or 0) + energy_mj

    def add(self, other: _Account) -> None:
        for name, us in other.us.items():
            self.us[name] += us
        if other.energy_mj is not None:
            self.energy_mj = (self.energy_mj or 0) + other.energy_mj
        for mine, theirs in ((self.cost, other.cost), (self.charge, other.charge)):
            for currency, amount in theirs.items():
                mine[currency] = mine.get(currency, Decimal(0)) + amount
        self.estimate |= other.estimate
        self.incomplete |= other.incomplete

    def rows(self, key: Mapping[str, Any]) -> list[dict[str, Any]]:
        """One row; a further one for each further currency, without the time, which is told once."""
        flags = {"estimate": self.estimate, "incomplete": self.incomplete}
        times = {f"{name}_gpu_us": us for name, us in self.us.items()} | {"energy_mj": self.energy_mj}
        costs, charges = sorted(self.cost.items()), sorted(self.charge.items())
        # A cost and a charge in one currency stand in one row.
        currencies = sorted({*self.cost, *self.charge})
        pairs = [(c, c) for c in currencies] if len(costs) > 1 or len(charges) > 1 else []
        if not pairs:
            pairs = [(costs[0][0] if costs else "", charges[0][0] if charges else "")]
        out: list[dict[str, Any]] = []
        for n, (cost_in, charge_in) in enumerate(pairs):
            money = {
                "asset_cost": self.cost.get(cost_in),
                "asset_currency": cost_in if cost_in in self.cost else None,
                "charge": self.charge.get(charge_in),
                "charge_currency": charge_in if charge_in in self.charge else None,
            }
            out.append({**key, **(times if n == 0 else {}), **money, **flags})
        return out


Accounts = dict[tuple[str, ...], _Account]


def _key(by: By, pool: str, tenant: str, job: str) -> tuple[str, ...]:
    who = tenant or OPERATOR
    return {"tenant": (who,), "pool": (pool,), "job": (job, who, pool)}[by]


KEYS: dict[By, tuple[str, ...]] = {"tenant": ("tenant",), "pool": ("pool",), "job": ("job_id", "tenant", "pool")}


def cost_rows(client: Client, by: By, filters: Filters) -> list[dict[str, Any]]:
    """Rows by cost, then charge, then held time, the greatest first.

    By tenant the asset cost is what the tenant bears (its payer's), by job what the job's time cost. Time that no job
    holds has job_id "".
    """
    accounts: Accounts = {}
    for pool, tenant, job, kind, activity, us, mj, estimate in _times(client, by, filters):
        account = accounts.setdefault(_key(by, pool, tenant, job), _Account())
        account.add_time(kind, activity, int(us), None if mj is None else int(mj))
        account.estimate |= bool(estimate)
    _add_money(client, by, filters, accounts)
    _mark_uncovered(client, by, filters, accounts)

    def order(item: tuple[tuple[str, ...], _Account]) -> tuple[Any, ...]:
        key, account = item
        return -sum(account.cost.values()), -sum(account.charge.values()), -account.us["held"], key

    rows: list[dict[str, Any]] = []
    for key, account in sorted(accounts.items(), key=order):
        rows += account.rows(dict(zip(KEYS[by], key, strict=True)))
    return rows


def total_rows(rows: Iterable[Mapping[str, Any]], by: By) -> list[dict[str, Any]]:
    """The sum of all rows, as one row, or one for each currency."""
    total = _Account()
    for row in rows:
        part = _Account(estimate=row["estimate"], incomplete=row["incomplete"], energy_mj=row.get("energy_mj"))
        part.us = {name: row.get(f"{name}_gpu_us") or 0 for name in _TIMES}
        part.cost = {row["asset_currency"]: row["asset_cost"]} if row["asset_currency"] is not None else {}
        part.charge = {row["charge_currency"]: row["charge"]} if row["charge_currency"] is not None else {}
        total.add(part)
    return total.rows({KEYS[by][0]: "total"})


def _query(client: Client, sql: str, filters: Filters, **parts: str) -> list[tuple[Any, ...]]:
    """`$name` in the query stands for one of our own fragments of SQL; what a user gives is bound."""
    parts = {"priced": _PRICED_HOURS, "charged": _CHARGED, "range": _RANGE, **parts}
    for name in ("priced", "charged", "range", "job", "view"):
        sql = sql.replace(f"${name}", parts.get(name, ""))
    return [tuple(row) for row in client.query(sql, parameters=filters.parameters()).result_rows]


def _times(client: Client, by: By, filters: Filters) -> list[tuple[Any, ...]]:
    if by != "job":
        return _query(client, _MINUTES, filters)
    return [
        *_query(client, _CHARGED_TIME, filters, view="v_charges"),
        *_query(client, _UNPRICED_JOBS, filters, view="v_asset_cost"),
        *_query(client, _UNPRICED_REST, filters, view="v_asset_cost"),
    ]


def _add_money(client: Client, by: By, filters: Filters, accounts: Accounts) -> None:
    job_column = "job_id" if by == "job" else "''"
    for row in _query(client, _MONEY, filters, view="v_charges", job=job_column):
        pool, tenant, job, payer, cost_in, charge_in, cost, charge, estimate, lacks = row
        bears = payer if by == "tenant" else tenant
        for who, name, amount, currency in ((bears, "cost", cost, cost_in), (tenant, "charge", charge, charge_in)):
            if amount is None or filters.tenant not in ("", who if by == "tenant" else tenant):
                continue
            if not tenant and name == "charge":  # nobody is charged for what nobody holds
                continue
            account = accounts.setdefault(_key(by, pool, who, job), _Account())
            sums: dict[str, Decimal] = getattr(account, name)
            sums[currency] = sums.get(currency, Decimal(0)) + amount
            account.estimate |= bool(estimate)
            account.incomplete |= bool(lacks)


def _mark_uncovered(client: Client, by: By, filters: Filters, accounts: Accounts) -> None:
    """Rows with time of a pool whose cost is not known for all of the range say that their cost lacks it."""
    uncovered = {pool for (pool,) in _query(client, _UNCOVERED, filters, view="v_asset_cost")}
    if not uncovered:
        return
    for pool, tenant, job, *_ in _times(client, by, filters):
        if pool in uncovered:
            accounts[_key(by, pool, tenant, job)].incomplete = True
