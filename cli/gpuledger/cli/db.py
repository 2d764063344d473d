"""`gpuledger db`: the database's tables and views follow the numbered migrations."""

from __future__ import annotations

from pathlib import Path

import click

from gpuledger.cli.database import data_option, migrate_database, pending_migrations, served_database
from gpuledger.cli.output import Column, Format, format_option, write_rows
from gpuledger.cli.session import Session, pass_session
from gpuledger.schemas.migrate import migrations

__all__ = ["db"]


@click.group()
def db() -> None:
    """Bring the database up to date, or show its state."""


@db.command("migrate")
@data_option
@pass_session
def migrate_command(session: Session, data: Path | None) -> None:
    """Make the database where it is missing, apply what is pending, renew the views. May be run again at any time."""
    with served_database(session, data) as settings:
        applied = migrate_database(settings)
        for migration in applied:
            click.echo(f"applied {migration.name}")
        click.echo(f"{settings.database}: up to date, {len(migrations())} migrations")


@db.command()
@data_option
@format_option
@pass_session
def status(session: Session, data: Path | None, layout: Format) -> None:
    """List the migrations. Exit status 1 where some are pending."""
    with served_database(session, data) as settings:
        waiting = {migration.number for migration in pending_migrations(settings)}
    rows = [
        {
            "number": migration.number,
            "name": migration.name,
            "state": "pending" if migration.number in waiting else "applied",
        }
        for migration in migrations()
    ]
    write_rows([Column("number"), Column("name"), Column("state")], rows, layout)
    if waiting:
        click.echo(f"{len(waiting)} pending; apply them with: gpuledger db migrate", err=True)
        raise click.exceptions.Exit(1)
