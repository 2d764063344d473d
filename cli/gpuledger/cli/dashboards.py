"""`gpuledger dashboards`: the boards of the built-in page as files for Grafana."""

from __future__ import annotations

from pathlib import Path

import click

from gpuledger.cli.exceptions import CommandError
from gpuledger.cli.session import Session, pass_session

__all__ = ["dashboards"]


@click.group()
def dashboards() -> None:
    """Build the Grafana dashboards."""


@dashboards.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder to write to.")
@click.option("--currency", default="", metavar="CODE", help="ISO code that amounts are shown in, for instance EUR.")
@click.option(
    "--dashboards-path",
    default="/etc/grafana/provisioning/dashboards/json",
    show_default=True,
    help="Where Grafana will see the dashboards' folder.",
)
@click.option("--clickhouse-url", default=None, metavar="URL", help="Where Grafana reaches ClickHouse.")
@click.option("--database", default=None, help="ClickHouse database.")
@click.option("--user", default=None, help="ClickHouse user of Grafana; give it read rights only.")
@pass_session
def build(
    session: Session,
    out: Path,
    currency: str,
    dashboards_path: str,
    clickhouse_url: str | None,
    database: str | None,
    user: str | None,
) -> None:
    """Write dashboards and provisioning files for Grafana with the ClickHouse data source.

    What the options leave out comes from the configuration. Mount the folder as Grafana's provisioning folder; Grafana
    takes the password from its environment variable GPULEDGER_CLICKHOUSE_PASSWORD.
    """
    from gpuledger.dashboards.boards import BOARDS
    from gpuledger.dashboards.provisioning import DataSource, build_files, write_files

    if currency and not (len(currency) == 3 and currency.isascii() and currency.isalpha()):
        raise CommandError(f"--currency: expected an ISO code of three letters, got {currency!r}; write EUR or USD")
    clickhouse = session.config.clickhouse
    source = DataSource(clickhouse_url or clickhouse.url, database or clickhouse.database, user or clickhouse.user)
    files = build_files(BOARDS.values(), source, currency.upper(), dashboards_path)
    try:
        written = write_files(files, out)
    except OSError as error:
        raise CommandError(f"--out: {out}: cannot be written: {error.strerror}; name a folder of your own") from error
    for path in written:
        click.echo(path)
