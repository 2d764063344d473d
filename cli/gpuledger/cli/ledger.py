"""`gpuledger ledger`: its rows as they are, why they are so, and a range computed again."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gpuledger.cli.database import data_option, database
from gpuledger.cli.exceptions import CommandError
from gpuledger.cli.explain import explain
from gpuledger.cli.ledger_store import Access, opened
from gpuledger.cli.moments import MINUTE_MS, iso, range_options, time_range
from gpuledger.cli.output import Column, Format, format_option, write_rows
from gpuledger.cli.session import Session, pass_session
from gpuledger.schemas.config import Kafka
from gpuledger.schemas.events import Dirty

if TYPE_CHECKING:
    from gpuledger.streams.ledger_rows import Version

__all__ = ["ledger"]

_DAY_MS = 86_400_000
#: Time that one slice of an offline recompute aims at; decides how many hours are computed at once.
_SLICE_S = 2.0
_MOST_UNITS = 24 * 31


@click.group()
def ledger() -> None:
    """Show the ledger's rows, explain one minute of a GPU, or compute a range again."""


ledger.add_command(explain)


# -- show -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Rows:
    """What `show` can show: the view, its time and its columns in order; `most_ms` is the longest range."""

    view: str
    time: str
    columns: tuple[str, ...]
    most_ms: int | None = None
    needs_pool: bool = False


_AMOUNTS = ("kind", "activity", "gpu_us", "energy_mj")
_GPU = ("gpu", "instance", "tenant", "job_id", *_AMOUNTS)
_ROWS = {
    "minute": _Rows("v_ledger_minute", "minute", ("tenant", *_AMOUNTS, "complete")),
    "gpu-minute": _Rows("v_gpu_minute", "minute", _GPU, _DAY_MS, needs_pool=True),
    "gpu-hour": _Rows("v_gpu_hour", "hour", _GPU),
    "job-hour": _Rows("v_job_hour", "hour", ("tenant", "job_id", "user", *_AMOUNTS)),
    "charge": _Rows(
        "v_charges",
        "interval_start",
        (
            *("interval_end", "tenant", "job_id", "kind", "activity", "payer", "gpu_us", "energy_mj", "asset_cost"),
            *("energy_cost", "asset_currency", "charge", "charge_currency", "rate_card", "estimate", "incomplete"),
        ),
    ),
    "conflict": _Rows("v_conflicts", "hour", ("kind", "subject", "other", "from_ms", "to_ms", "detail")),
}
_EXACT = ("gpu_us", "energy_mj", "from_ms", "to_ms")


@ledger.command()
@click.option(
    "--rows", "what", type=click.Choice(list(_ROWS)), default="minute", show_default=True, help="Which of its rows."
)
@range_options
@click.option("--pool", metavar="POOL", help="Only this pool; needed for gpu-minute.")
@click.option("--gpu", metavar="GPU", help="Only this GPU.")
@click.option("--tenant", metavar="TENANT", help="Only this tenant.")
@click.option("--job", "job_id", metavar="JOB", help="Only this job.")
@click.option("--kind", metavar="KIND", help="held, unconfirmed, unallocated, reserved_unused, free or overcommitted.")
@click.option("--limit", type=click.IntRange(1), default=1000, show_default=True, help="Rows, at most.")
@format_option
@data_option
@pass_session
def show(
    session: Session,
    what: str,
    from_ms: int | None,
    to_ms: int | None,
    pool: str | None,
    gpu: str | None,
    tenant: str | None,
    job_id: str | None,
    kind: str | None,
    limit: int,
    layout: Format,
    data: Path | None,
) -> None:
    """Show rows of the ledger in order of time.

    Amounts are GPU-microseconds and millijoules. Rows of GPU and minute exist only where telemetry was seen; at most a
    day of one pool is shown.
    """
    rows = _ROWS[what]
    start, end = time_range(from_ms, to_ms)
    if rows.needs_pool and pool is None:
        raise CommandError(f"--pool: missing; rows of {what} are many, and belong to one pool")
    if rows.most_ms is not None and end - start > rows.most_ms:
        raise CommandError(f"--to: {iso(end)} is more than a day after --from {iso(start)}; show gpu-hour, or less")
    wanted = {"pool": pool, "gpu": gpu, "tenant": tenant, "job_id": job_id, "kind": kind}
    given = {name: value for name, value in wanted.items() if value is not None}
    for name in given:
        if name != "pool" and name not in rows.columns:
            raise CommandError(f"--{name.removesuffix('_id')}: rows of {what} have none; see --rows")
    with database(session, data) as client:
        sql = _select(rows, tuple(given))
        answer = client.query(sql, parameters={**given, "from_ms": start, "to_ms": end, "limit": limit + 1})
        found = list(answer.named_results())
    columns = ("pool", rows.time, *rows.columns)
    write_rows([Column(key, exact=key in _EXACT) for key in columns], found[:limit], layout)
    if len(found) > limit:
        click.echo(f"only the first {limit:,} rows; narrow the range or raise --limit", err=True)


def _select(rows: _Rows, filters: tuple[str, ...]) -> str:
    """Names are our own; values are bound."""
    conditions = "".join(" AND $name = {$name:String}".replace("$name", name) for name in filters)
    columns = ", ".join(("pool", rows.time, *rows.columns))
    sql = """
        SELECT $columns FROM $view
        WHERE $time >= fromUnixTimestamp64Milli({from_ms:Int64}, 'UTC')
            AND $time < fromUnixTimestamp64Milli({to_ms:Int64}, 'UTC')$conditions
        ORDER BY $columns LIMIT {limit:UInt64}"""
    parts = {"columns": columns, "view": rows.view, "time": rows.time, "conditions": conditions}
    for name, part in parts.items():
        sql = sql.replace(f"${name}", part)
    return sql


# -- recompute ------------------------------------------------------------------------------------------------------


@ledger.command()
@click.option("--pool", "pools", multiple=True, metavar="POOL", help="This pool; repeat for more.  [default: all]")
@range_options
@data_option
@pass_session
def recompute(
    session: Session, pools: tuple[str, ...], from_ms: int | None, to_ms: int | None, data: Path | None
) -> None:
    """Compute minutes, hours and money of a range again, from what is stored.

    Where a worker runs it is sent a dirty mark, and does it. On the data directory of a `gpuledger up` that does not
    run, it is done here. Repeating it changes nothing.
    """
    start, end = time_range(from_ms, to_ms)
    with opened(session, data) as access:
        known = access.store.pools()
        for pool in pools:
            if pool not in known:
                raise CommandError(f"--pool: there is no pool {pool!r}; known: {', '.join(known) or 'none yet'}")
        names = list(pools) or known
        if not names:
            raise CommandError("--pool: there is no pool yet; nothing to compute")
        if access.kafka is not None:
            marks = [Dirty(pool=pool, from_ms=start, to_ms=end, why="gpuledger ledger recompute") for pool in names]
            asyncio.run(_publish(access.kafka, marks))
            click.echo(f"marked {iso(start)} to {iso(end)} of {', '.join(names)}; the worker computes it")
            return
        for pool in names:
            rows = _recompute_here(access, pool, start, end)
            click.echo(f"computed {iso(start)} to {iso(end)} of {pool}: {rows:,} rows")


async def _publish(kafka: Kafka, marks: list[Dirty]) -> None:
    # Here and not above: showing rows needs no Kafka client.
    from gpuledger.agents.messages import event_message
    from gpuledger.agents.publisher import Publisher

    async with Publisher(kafka, "gpuledger-cli") as publisher:
        await publisher.publish_many([event_message(mark) for mark in marks])


def _recompute_here(access: Access, pool: str, from_ms: int, to_ms: int) -> int:
    """In slices of whole hours, the newest first. The engine's lock on the directory keeps every worker away."""
    from gpuledger.streams.recomputer import Recomputer

    unit = access.rules.unit_ms
    open_end = time.time_ns() // 1_000_000 // MINUTE_MS * MINUTE_MS + MINUTE_MS
    begin, finish = from_ms // unit * unit, min(-(-to_ms // unit) * unit, open_end)
    version = _next_version(access, pool)
    recomputer = Recomputer(access.store, access.rules)
    rows, units, end = 0, 1, finish
    while end > begin:
        start = max(begin, (end - 1) // unit * unit - (units - 1) * unit)
        started_s = time.monotonic()
        rows += recomputer.hours(pool, start, end, version)
        took_s = max(0.001, time.monotonic() - started_s)
        units = max(1, min(_MOST_UNITS, 2 * units, int(units * _SLICE_S / took_s)))
        end = start
    return rows


_VERSION_TABLES = (
    *("ledger_minute", "ledger_gpu_minute", "ledger_gpu_hour", "ledger_job_hour", "conflicts", "charges"),
)


def _next_version(access: Access, pool: str) -> Version:
    """The greatest version of the pool, in any table, + 1: below every mark that a worker takes later."""
    from gpuledger.streams.ledger_rows import Version

    greatest = 0
    for table in _VERSION_TABLES:
        sql = "SELECT max(version) FROM $table WHERE pool = {pool:String}".replace("$table", table)
        greatest = max(greatest, int(access.store.rows(sql, {"pool": pool})[0][0]))
    number = greatest + 1
    return Version(number >> 96, number >> 40 & (1 << 56) - 1, number & (1 << 40) - 1)
