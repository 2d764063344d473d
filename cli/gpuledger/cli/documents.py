"""`gpuledger rates`, `capacity` and `tenants`: apply a file, list what was applied.

A file is checked as a whole together with what holds already, the difference is shown, and only the difference is
published; the worker stores it.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from gpuledger.cli.applied import Applied, applied, known_pools, not_stored
from gpuledger.cli.database import connected, data_option, database, migrate_database, read_running, served_database
from gpuledger.cli.exceptions import CommandError
from gpuledger.cli.output import Column, Format, format_option, write_rows
from gpuledger.cli.session import Session, pass_session
from gpuledger.finance.documents import Change, Document, diff, parse_capacity, parse_rates, parse_tenants
from gpuledger.finance.rates import Rates, rates_from
from gpuledger.finance.validation import prices_end, validate
from gpuledger.schemas.config import Kafka
from gpuledger.schemas.events import AssetCost, Commitment, EnergyTariff, Fact, RateCard, Tenant, Transfer
from gpuledger.schemas.exceptions import DocumentError

if TYPE_CHECKING:
    from clickhouse_connect.driver.client import Client

__all__ = ["capacity", "rates", "tenants"]

#: How long `apply` waits for the worker to store what it published, and how often it looks.
_WAIT_S = 15.0
_LOOK_EVERY_S = 0.25


@dataclass(frozen=True, slots=True)
class Services:
    """The two that a command talks to. `stored`: somebody may be running who stores what is published."""

    client: Client
    kafka: Kafka
    stored: bool


@contextmanager
def _services(session: Session, data: Path | None) -> Generator[Services]:
    """The configured services, those of a running `gpuledger up`, or our own on `data` for the length of the call."""
    kafka = session.config.kafka
    running = read_running(data) if data is not None else None
    own = data is not None and running is None
    with served_database(session, data) as settings:
        if own:
            migrate_database(settings)
        with connected(settings) as client:
            if running is not None:
                kafka = msgspec.structs.replace(kafka, bootstrap=running.kafka_bootstrap)
            if data is None or not own:
                yield Services(client, kafka, stored=True)
                return
            # Here and not above: only a directory on which nothing runs needs a broker of our own.
            from gpuledger.local.kafka import EmbeddedKafka

            with EmbeddedKafka(data / "kafka") as broker:
                yield Services(client, msgspec.structs.replace(kafka, bootstrap=broker.bootstrap), stored=False)


# -- apply ----------------------------------------------------------------------------------------------------------


def _apply_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(
        (
            click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path)),
            click.option("--dry-run", is_flag=True, help="Only check the file and show what it would change."),
            click.option("--yes", is_flag=True, help="Do not ask on a terminal."),
            data_option,
            pass_session,
        )
    ):
        command = option(command)
    return command


_new_pools_option = click.option("--new-pools", is_flag=True, help="Take pools in which no GPU has been seen yet.")


def _apply(services: Services, document: Document, current: Applied, *, dry_run: bool, yes: bool, listing: str) -> None:
    changes = diff(current, document)
    unchanged = len(document.events) - len(changes)
    if not changes:
        click.echo(f"nothing to do: all {unchanged} entries are applied already")
        return
    _show(changes)
    click.echo(f"{len(changes)} of {len(document.events)} entries change, {unchanged} do not")
    if dry_run:
        click.echo("dry run: nothing was published")
        return
    if not yes and sys.stdin.isatty():
        click.confirm("Apply?", abort=True)
    events = [change.event for change in changes]
    asyncio.run(_publish(services.kafka, events))
    if not services.stored:
        click.echo(f"published {len(events)}; nothing runs here that stores them, the next start of gpuledger up does")
        return
    left = _wait(services.client, events)
    if left:
        click.echo(
            f"published {len(events)}; {len(left)} are not in the database after {_WAIT_S:.0f} s. Is a worker running? "
            f"Look with: gpuledger {listing} list",
            err=True,
        )
    else:
        click.echo(f"applied {len(events)}")


async def _publish(kafka: Kafka, events: Sequence[Fact]) -> None:
    # Here and not above: listing needs no Kafka client.
    from gpuledger.agents.broker_topics import create_topics
    from gpuledger.agents.messages import event_message
    from gpuledger.agents.publisher import Publisher

    await create_topics(kafka)
    async with Publisher(kafka, "gpuledger-cli") as publisher:
        await publisher.publish_many([event_message(event) for event in events])


def _wait(client: Client, events: Sequence[Fact]) -> list[Fact]:
    """Those that the database does not show when the time is over."""
    deadline = time.monotonic() + _WAIT_S
    left = not_stored(client, events)
    while left and time.monotonic() < deadline:
        time.sleep(_LOOK_EVERY_S)
        left = not_stored(client, left)
    return left


def _show(changes: Sequence[Change]) -> None:
    """One line for each field that changes; a new entry is one line."""
    rows: list[dict[str, Any]] = []
    for change in changes:
        about = {"change": change.action, "kind": change.event.kind, "id": change.event.id}
        if not change.fields:
            rows.append({**about, "after": _summary(change.event)})
        rows += [
            {**about, "field": name, "before": _value(name, before), "after": _value(name, after)}
            for name, before, after in change.fields
        ]
    write_rows([Column(key) for key in ("change", "kind", "id", "field", "before", "after")], rows, "table")


def _value(name: str, value: Any) -> str:
    if value is None:
        return "–"
    if name.endswith("_ms"):
        return _time(value).isoformat().replace("+00:00", "Z")
    if isinstance(value, list):
        return f"{len(value)} entries"  # pyright: ignore[reportUnknownArgumentType]
    return str(value)


def _summary(event: Fact) -> str:
    match event:
        case AssetCost():
            return f"{event.period_cost} {event.currency} for the period"
        case RateCard():
            return f"{event.per_gpu_hour} {event.currency} per GPU-hour"
        case EnergyTariff():
            return f"{len(event.prices)} prices in {event.currency}"
        case Commitment():
            return f"{event.gpus} GPUs, {event.state}"
        case Transfer():
            return f"{event.gpus} GPUs from {event.from_tenant} to {event.to_tenant}, {event.state}"
        case Tenant():
            return f"{event.name or event.id}, {len(event.rules)} rules"
        case _:
            return ""


def _time(at_ms: int | None) -> Any:
    return None if at_ms is None else datetime.fromtimestamp(at_ms / 1000, UTC)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"{file}: cannot be read: {error}") from error


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


# -- checks ---------------------------------------------------------------------------------------------------------


def _as_rates(facts: Collection[Fact]) -> Rates:
    return rates_from([fact for fact in facts if isinstance(fact, AssetCost | EnergyTariff | RateCard)])


def _check_rates(document: Document, current: Applied, pools: Collection[str] | None, now_ms: int) -> None:
    """Refuses what the file makes wrong; what was wrong before it is not the file's fault."""
    after = {**current, **{(event.kind, event.id): event for event in document.events}}
    positions = {key: f"applied {key[0].replace('_', ' ')} {key[1]}" for key in current} | document.positions
    old = set(validate(_as_rates(current.values()), pools, positions, now_ms))
    problems = [text for text in validate(_as_rates(after.values()), pools, positions, now_ms) if text not in old]
    if problems:
        raise DocumentError("\n".join(problems))
    for tariff, end_ms in prices_end(_as_rates(after.values()), now_ms).items():
        click.echo(
            f"note: the prices of {tariff} end at {_value('_ms', end_ms)}; energy cost after that is unknown until "
            f"more are applied",
            err=True,
        )


def _check_pools(document: Document, pools: Collection[str] | None) -> None:
    if pools is None:
        return
    problems = [
        f"{document.positions[event.kind, event.id]}.pool: there is no pool {event.pool!r}; "
        f"known: {', '.join(sorted(pools))}"
        for event in document.events
        if isinstance(event, Commitment | Transfer) and event.pool not in pools
    ]
    if problems:
        raise DocumentError("\n".join(problems))


def _pools(services: Services, new_pools: bool) -> set[str] | None:
    """The pools to hold a file to; None: any may come (a fleet that has not reported yet knows none)."""
    return None if new_pools else known_pools(services.client) or None


# -- commands -------------------------------------------------------------------------------------------------------

_RATE_KINDS = ("asset_cost", "energy_tariff", "rate_card")
_CAPACITY_KINDS = ("commitment", "transfer")


@click.group()
def rates() -> None:
    """Apply or list asset costs, energy tariffs and rate cards."""


@rates.command("apply")
@_apply_options
@_new_pools_option
def apply_rates(session: Session, file: Path, dry_run: bool, yes: bool, new_pools: bool, data: Path | None) -> None:
    """Apply the asset costs, tariffs and rate cards of FILE (docs/examples/rates.yaml)."""
    now_ms = _now_ms()
    document = parse_rates(_read(file), file.name, now_ms, lambda name: (file.parent / name).read_text("utf-8"))
    with _services(session, data) as services:
        current = applied(services.client, _RATE_KINDS)
        _check_rates(document, current, _pools(services, new_pools), now_ms)
        _apply(services, document, current, dry_run=dry_run, yes=yes, listing="rates")


@rates.command("list")
@data_option
@format_option
@pass_session
def list_rates(session: Session, data: Path | None, layout: Format) -> None:
    """List the asset costs, tariffs and rate cards that hold, past and future ones too."""
    keys = ("kind", "id", "pool", "tenant", "currency", "period_cost", "per_gpu_hour", "reserved_unused_per_gpu_hour")
    _list(session, data, layout, _RATE_KINDS, (*keys, "tariff", "prices", "start", "end"))


@click.group()
def capacity() -> None:
    """Apply or list commitments and transfers."""


@capacity.command("apply")
@_apply_options
@_new_pools_option
def apply_capacity(session: Session, file: Path, dry_run: bool, yes: bool, new_pools: bool, data: Path | None) -> None:
    """Apply the commitments and transfers of FILE (docs/examples/capacity.yaml)."""
    document = parse_capacity(_read(file), file.name, _now_ms())
    with _services(session, data) as services:
        _check_pools(document, _pools(services, new_pools))
        current = applied(services.client, _CAPACITY_KINDS)
        _apply(services, document, current, dry_run=dry_run, yes=yes, listing="capacity")


@capacity.command("list")
@data_option
@format_option
@pass_session
def list_capacity(session: Session, data: Path | None, layout: Format) -> None:
    """List commitments and transfers."""
    keys = ("kind", "id", "pool", "tenant", "from_tenant", "to_tenant", "gpus", "state", "start", "end")
    _list(session, data, layout, _CAPACITY_KINDS, (*keys, "contract", "by", "why"))


@click.group()
def tenants() -> None:
    """Apply or list tenants and the account map."""


@tenants.command("apply")
@_apply_options
def apply_tenants(session: Session, file: Path, dry_run: bool, yes: bool, data: Path | None) -> None:
    """Apply the tenants and account rules of FILE (docs/examples/tenants.yaml)."""
    document = parse_tenants(_read(file), file.name, _now_ms())
    with _services(session, data) as services:
        current = applied(services.client, ("tenant",))
        _apply(services, document, current, dry_run=dry_run, yes=yes, listing="tenants")


@tenants.command("list")
@data_option
@format_option
@pass_session
def list_tenants(session: Session, data: Path | None, layout: Format) -> None:
    """List the account map: one row for each rule, and one for a tenant without rules."""
    with database(session, data) as client:
        facts = applied(client, ("tenant",))
    rows = [row for fact in facts.values() if isinstance(fact, Tenant) for row in _rule_rows(fact)]
    columns = ("tenant", "name", "contact", "match", "value", "source", "start", "end")
    write_rows([Column(key) for key in columns], rows, layout)


def _rule_rows(tenant: Tenant) -> list[dict[str, Any]]:
    about = {"tenant": tenant.id, "name": tenant.name, "contact": tenant.contact}
    rules = [
        {"match": r.match, "value": r.value, "source": r.source, "start": _time(r.start_ms), "end": _time(r.end_ms)}
        for r in tenant.rules
    ]
    return [{**about, **rule} for rule in rules] or [about]


def _list(session: Session, data: Path | None, layout: Format, kinds: Sequence[str], keys: Sequence[str]) -> None:
    with database(session, data) as client:
        facts = applied(client, kinds)
    write_rows([Column(key) for key in keys], [_row(fact, keys) for fact in facts.values()], layout)


def _row(fact: Fact, keys: Sequence[str]) -> Mapping[str, Any]:
    row: dict[str, Any] = {key: getattr(fact, key) for key in keys if hasattr(fact, key)}
    if isinstance(fact, EnergyTariff):
        row["prices"] = len(fact.prices)
        row["start"] = _time(fact.prices[0].start_ms)
    else:
        row["start"] = _time(getattr(fact, "start_ms", None))
    row["end"] = _time(getattr(fact, "end_ms", None))
    return row
