"""`gpuledger up`: everything on this machine."""

from __future__ import annotations

import sys
from pathlib import Path

import click
import msgspec

from gpuledger.cli.database import migrate_database
from gpuledger.cli.durations import DURATION_MS
from gpuledger.cli.session import Session, pass_session

__all__ = ["up"]


@click.command()
@click.option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("data"),
    show_default=True,
    help="Where everything is kept; start again on it and it goes on.",
)
@click.option(
    "--scenario",
    type=click.Path(dir_okay=False, exists=True, path_type=Path),
    help="A simulated site instead of the demo's.",
)
@click.option("--no-simulation", is_flag=True, help="No simulated site: only what agents and commands send.")
@click.option("--node", is_flag=True, help="Send this machine's own telemetry too.")
@click.option("--port", type=click.IntRange(0, 65535), help="Of the page; instead of page.port; 0: a free one.")
@click.option("--kafka-port", type=click.IntRange(0, 65535), default=0, help="Of Kafka; default: a free one.")
@click.option("--clickhouse-port", type=click.IntRange(0, 65535), default=0, help="Of ClickHouse; default: a free one.")
@click.option("--for", "for_ms", type=DURATION_MS, help="Stop by itself after this long, e.g. 90s.")
@pass_session
def up(
    session: Session,
    data: Path,
    scenario: Path | None,
    no_simulation: bool,
    node: bool,
    port: int | None,
    kafka_port: int,
    clickhouse_port: int,
    for_ms: int | None,
) -> None:
    """Run the whole product on this machine: Kafka, ClickHouse, a worker, the page and a simulated site.

    Prints the page's address when it is ready. Ctrl-C stops everything within ten seconds and loses nothing.
    """
    # Here and not above: the engine and the simulator are heavy, and `--help` should be quick.
    from gpuledger.agents.simulator.scenario import demo_scenario_path
    from gpuledger.local.up import UpOptions
    from gpuledger.local.up import up as run

    config = session.config
    options = UpOptions(
        data=data,
        scenario=None if no_simulation else scenario or demo_scenario_path(),
        node=node,
        page_port=config.page.port if port is None else port,
        kafka_port=kafka_port,
        clickhouse_port=clickhouse_port,
        for_s=None if for_ms is None else max(1, for_ms // 1000),
        config_path=session.config_path,
    )

    def migrate(url: str) -> object:
        plain = {"url": url, "user": "default", "password": None, "password_file": None, "ca_file": None}
        return migrate_database(msgspec.structs.replace(config.clickhouse, **plain))

    signal = run(options, migrate, click.echo, _progress)
    click.echo("stopped" if signal is None else f"stopped by {signal.name}")


def _progress(ready: int, total: int, coordinate: str) -> None:
    if sys.stderr.isatty():
        click.echo(f"\r\033[Kassets {ready}/{total} {coordinate}", err=True, nl=ready == total)
    elif ready == total:
        click.echo(f"assets: {total} checked", err=True)
