"""`python -m gpuledger.local.clickhouse`: one embedded ClickHouse as a process of its own."""

import os
import sys
import time
from pathlib import Path

import click

from gpuledger.local.clickhouse.errors import EngineError
from gpuledger.local.clickhouse.users import Users
from gpuledger.local.exceptions import LocalError


@click.command()
@click.option("--data", required=True, type=click.Path(path_type=Path, file_okay=False), help="Data directory.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=0, type=click.IntRange(0, 65535), help="Port to listen on; 0 takes a free one.")
@click.option("--port-file", type=click.Path(path_type=Path), help="File to write the port to when ready.")
@click.option("--users", type=click.Path(path_type=Path), help="JSON or YAML file of the users.")
@click.option("--database", default="gpuledger", show_default=True, help="Database of requests that name none.")
@click.option("--memory", type=click.IntRange(min=1), help="Memory limit in bytes; default half of what is free.")
def main(
    data: Path,
    host: str,
    port: int,
    port_file: Path | None,
    users: Path | None,
    database: str,
    memory: int | None,
) -> None:
    """Serves the embedded ClickHouse on its own HTTP protocol until SIGTERM or SIGINT."""
    # The engine takes the server's time zone from here while it is loaded, not from its configuration.
    os.environ["TZ"] = "UTC"
    time.tzset()
    from gpuledger.local.clickhouse.server import configure_logs, serve

    configure_logs()
    try:
        accounts = Users.load(users) if users is not None else None
        serve(data, host, port, accounts, database=database, memory_bytes=memory, port_file=port_file)
    except (LocalError, EngineError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
