"""`gpuledger serve`: the built-in page on a ClickHouse that runs somewhere."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from gpuledger.cli.exceptions import CommandError
from gpuledger.cli.session import Session, pass_session

__all__ = ["serve"]


@click.command()
@click.option("--host", default=None, help="Address to listen on; the page has no login, keep it private.")
@click.option("--port", type=click.IntRange(0, 65535), default=None, help="0: a free one, which is printed.")
@click.option("--title", default=None, help="Shown at the top and in the browser's tab.")
@click.option("--allow-host", multiple=True, metavar="NAME", help="Name that browsers may use beside loopback; repeat.")
@click.option("--clickhouse-url", default=None, metavar="URL", help="HTTP interface of ClickHouse.")
@click.option("--database", default=None, help="ClickHouse database.")
@click.option("--user", default=None, help="ClickHouse user; reading is enough.")
@click.option(
    "--password-file", type=click.Path(path_type=Path, dir_okay=False, exists=True), help="File with its password."
)
@click.option(
    "--echarts", type=click.Path(path_type=Path, dir_okay=False, exists=True), help="The chart library's file."
)
@pass_session
def serve(
    session: Session,
    host: str | None,
    port: int | None,
    title: str | None,
    allow_host: tuple[str, ...],
    clickhouse_url: str | None,
    database: str | None,
    user: str | None,
    password_file: Path | None,
    echarts: Path | None,
) -> None:
    """Serve the built-in page until Ctrl-C.

    What the options leave out comes from the configuration. The page starts, and says so, while the database is away.
    """
    from gpuledger.dashboards.page import PageSettings, create_app
    from gpuledger.dashboards.page.server import serve as serve_app
    from gpuledger.dashboards.page.source import ClickHouseSource

    session.start_logging()
    page = session.config.page
    clickhouse = session.config.clickhouse
    given = {"url": clickhouse_url, "database": database, "user": user}
    clickhouse = msgspec.structs.replace(clickhouse, **{name: text for name, text in given.items() if text is not None})
    arguments = clickhouse.client_arguments()
    if password_file is not None:
        arguments["password"] = password_file.read_text(encoding="utf-8").strip()
    host = page.host if host is None else host
    settings = PageSettings(
        echarts=echarts or _echarts_file(),
        title=page.title if title is None else title,
        host=host,
        hosts=allow_host,
        refresh_ms=page.refresh_ms,
    )
    app = create_app(settings, ClickHouseSource(arguments))
    serve_app(app, host, page.port if port is None else port, lambda url: click.echo(f"page: {url}"))


def _echarts_file() -> Path:
    """The chart library as an image or a wheel brings it ($GPULEDGER_CACHE_DIR), fetched once where it is missing."""
    try:
        from gpuledger.local.jars import echarts_file

        return echarts_file()
    except ImportError as error:
        raise CommandError(
            f"--echarts: missing, and the Python module {error.name} that would fetch the chart library is not "
            "installed; give its path, or run: pip install 'gpuledger[local]'"
        ) from error
