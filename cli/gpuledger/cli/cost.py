"""`gpuledger cost`: who held what, and what it cost."""

from __future__ import annotations

import sys
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import click

from gpuledger.cli.cost_rows import KEYS, By, Filters, cost_rows, total_rows
from gpuledger.cli.database import data_option, database
from gpuledger.cli.moments import MINUTE_MS, iso, range_options, time_range
from gpuledger.cli.output import Column, Format, format_option, write_rows
from gpuledger.cli.session import Session, pass_session

__all__ = ["cost"]

_US_PER_HOUR = 3_600_000_000
_MJ_PER_KWH = 3_600_000_000


def _hours(us: int) -> str:
    return f"{Decimal(us) / _US_PER_HOUR:,.2f}"


def _kwh(mj: int) -> str:
    return f"{Decimal(mj) / _MJ_PER_KWH:,.3f}"


def _money(amount: Decimal) -> str:
    return f"{amount:,.2f}"


def _flag(value: bool) -> str:
    return "yes" if value else ""


_TIME_TITLES = {
    "held": "held h",
    "active": "active h",
    "idle": "idle h",
    "unobserved": "unobserved h",
    "down": "down h",
    "pending": "pending h",
    "unconfirmed": "unconfirmed h",
    "reserved_unused": "reserved unused h",
    "free": "free h",
    "unsliced": "unsliced h",
}
_COLUMNS = (
    *(Column(f"{name}_gpu_us", title, exact=True, show=_hours) for name, title in _TIME_TITLES.items()),
    Column("energy_mj", "kWh", exact=True, show=_kwh),
    Column("asset_cost", "asset cost", show=_money),
    Column("asset_currency", " "),
    Column("charge", show=_money),
    Column("charge_currency", " "),
    Column("estimate", show=_flag),
    Column("incomplete", show=_flag),
)
#: Always in a table; other columns only where something is in them.
_ALWAYS = ("held_gpu_us", "asset_cost", "asset_currency", "charge", "charge_currency")


@click.command()
@click.option("--by", type=click.Choice(["tenant", "pool", "job"]), default="tenant", show_default=True)
@range_options
@click.option("--pool", default="", metavar="POOL", help="Only this pool.")
@click.option("--tenant", default="", metavar="TENANT", help="Only this tenant.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Only the first N rows; the total is of all.")
@format_option
@data_option
@pass_session
def cost(
    session: Session,
    by: By,
    from_ms: int | None,
    to_ms: int | None,
    pool: str,
    tenant: str,
    limit: int | None,
    layout: Format,
    data: Path | None,
) -> None:
    """Show GPU time and money by tenant, pool or job.

    Keys of json and csv: tenant, pool or job_id (with tenant and pool); held_gpu_us, of which active_, idle_,
    unobserved_, down_ and pending_gpu_us; unconfirmed_, reserved_unused_, free_ and unsliced_gpu_us; energy_mj;
    asset_cost (what the operator pays, by who bears it) with asset_currency; charge (what the tenant owes) with
    charge_currency; estimate; incomplete. Times are GPU-microseconds; integers and decimals are text in json; null is
    not known.

    A row is an estimate where the range cuts price intervals or minutes are not complete, and incomplete where its
    asset cost lacks something: energy that is not known, or a pool or time without an applied asset cost. A second
    row of one name has another currency and no time of its own.
    """
    start, end = time_range(from_ms, to_ms)
    open_end = time.time_ns() // 1_000_000 // MINUTE_MS * MINUTE_MS + MINUTE_MS
    filters = Filters(start, end, open_end, pool, tenant)
    with database(session, data) as client:
        rows = cost_rows(client, by, filters)
    shown = rows if limit is None else rows[:limit]
    if len(shown) < len(rows):
        click.echo(f"{len(rows) - len(shown):,} more rows; leave out --limit to see them", err=True)
    keys = [Column(name, title) for name, title in zip(KEYS[by], _titles(by), strict=True)]
    if layout != "table":
        write_rows([*keys, *_COLUMNS], shown, layout)
        return
    total = total_rows(rows, by)
    used = [c for c in _COLUMNS if c.key in _ALWAYS or any(row.get(c.key) for row in rows)]
    span = f"{iso(start)} to {iso(end)}"
    if not sys.stdout.isatty():
        click.echo(span)
    columns = [*keys, *used]
    lines = [{column.key: row.get(column.key) for column in columns} for row in [*shown, *total]] if rows else []
    write_rows(columns, lines, layout, title=span)
    _explain(rows)


def _titles(by: By) -> tuple[str, ...]:
    return {"tenant": ("tenant",), "pool": ("pool",), "job": ("job", "tenant", "pool")}[by]


def _explain(rows: list[dict[str, Any]]) -> None:
    if not rows:
        click.echo("no ledger rows in this range; gpuledger status shows how far it has come", err=True)
    if any(row["estimate"] for row in rows):
        click.echo("estimate: the range cuts price intervals, or holds minutes that are not complete yet", err=True)
    if any(row["incomplete"] for row in rows):
        click.echo("incomplete: the cost lacks energy or an asset cost that is not known", err=True)
