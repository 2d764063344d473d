"""How a command reaches ClickHouse: the configured server, the one of a running `gpuledger up`, or, where nothing runs
on a data directory, the embedded engine for the length of the call.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
import msgspec

from gpuledger.cli.exceptions import CommandError, DatabaseError
from gpuledger.cli.session import Session
from gpuledger.schemas.config import ClickHouse
from gpuledger.schemas.migrate import Execute, Migration, Query, migrate, pending

if TYPE_CHECKING:
    from clickhouse_connect.driver.client import Client

__all__ = [
    "RUN_FILE_NAME",
    "Running",
    "connect",
    "connected",
    "data_option",
    "database",
    "migrate_database",
    "pending_migrations",
    "read_running",
    "served_database",
]

RUN_FILE_NAME = "run.json"
F = TypeVar("F", bound=Callable[..., Any])

#: Server errors that mean: the tables are not there (UNKNOWN_TABLE, UNKNOWN_DATABASE).
_NOT_MIGRATED = (60, 81)


class Running(msgspec.Struct, frozen=True):
    """What a running `gpuledger up` says of itself in ``run.json`` of its data directory."""

    pid: int
    clickhouse_url: str
    kafka_bootstrap: str
    page_url: str


def data_option(command: F) -> F:
    """``--data DIR``, passed on as `data` (a Path or None)."""
    return click.option(
        "--data",
        type=click.Path(file_okay=False, path_type=Path),
        metavar="DIR",
        help="Data directory of `gpuledger up`; where nothing runs on it, the engine is started for this call.",
    )(command)


def read_running(data: Path) -> Running | None:
    """Who serves the directory now; None where nobody does (a file left by a process that was killed says nothing).

    Raises CommandError where the file is there and cannot be read.
    """
    path = data / RUN_FILE_NAME
    try:
        running = msgspec.json.decode(path.read_bytes(), type=Running)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise CommandError(f"{path}: cannot be read: {error}; stop `gpuledger up` and remove the file") from error
    return running if _alive(running.pid) else None


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it lives, as another user's
        return True
    return True


@contextmanager
def served_database(session: Session, data: Path | None = None) -> Generator[ClickHouse]:
    """The settings of a server that answers inside the ``with`` block; see `database` for which, and what is raised."""
    settings = session.config.clickhouse
    if data is None:
        yield settings
        return
    running = read_running(data)
    if running is not None:
        yield _embedded(settings, running.clickhouse_url)
        return
    if not data.is_dir():
        raise CommandError(f"--data: there is no directory {data}; `gpuledger up --data {data}` makes it")
    # Here and not above: the engine weighs 250 MB, and a server's user has no use for it.
    from gpuledger.local.clickhouse import EmbeddedClickHouse

    with EmbeddedClickHouse(data / "clickhouse") as engine:
        yield _embedded(settings, engine.url)


@contextmanager
def database(session: Session, data: Path | None = None) -> Generator[Client]:
    """A ``clickhouse-connect`` client of the ledger's database; closed, and an engine of our own stopped, at the end.

    Without `data` the configured server. With it the one of a running `gpuledger up`, else the embedded engine on
    ``DIR/clickhouse``.

    Raises:
        DatabaseError: the server cannot be reached or refused a statement, here or in the ``with`` block.
        LocalError: the directory is in use, or the engine did not start.
        CommandError: `data` is not a data directory.
    """
    with served_database(session, data) as settings, connected(settings) as client:
        yield client


def _embedded(settings: ClickHouse, url: str) -> ClickHouse:
    """The embedded engine's settings: it listens on loopback, so users and certificates of a server do not hold."""
    return msgspec.structs.replace(settings, url=url, user="default", password=None, password_file=None, ca_file=None)


@contextmanager
def connected(settings: ClickHouse) -> Generator[Client]:
    """A client of the server inside the ``with`` block; as `database`, for a caller that has the settings."""
    client = connect(settings)
    from clickhouse_connect.driver.exceptions import ClickHouseError

    try:
        yield client
    except ClickHouseError as error:
        raise _translated(settings, error) from error
    finally:
        client.close()


def connect(settings: ClickHouse) -> Client:
    """A client of the server; the caller closes it. Raises DatabaseError."""
    import clickhouse_connect
    from clickhouse_connect.driver.exceptions import ClickHouseError

    try:
        return clickhouse_connect.get_client(**settings.client_arguments())
    except (ClickHouseError, OSError) as error:
        raise _translated(settings, error) from error


def _translated(settings: ClickHouse, error: Exception) -> DatabaseError:
    lines = str(error).splitlines()
    reason = lines[0] if lines else type(error).__name__
    code = getattr(error, "code", None)
    if code in _NOT_MIGRATED:
        return DatabaseError(f"clickhouse.database: {reason}; bring it up to date with: gpuledger db migrate")
    if code is None:
        # The driver wraps the system's answer in three layers of its own words.
        system = re.search(r"\[Errno -?\d+\] ([^\"')\]]+)", reason)
        reason = system[1].lower() if system is not None else reason
        return DatabaseError(
            f"clickhouse.url: cannot use {settings.url}: {reason}; is the server running, and is the address right?"
        )
    return DatabaseError(f"clickhouse.url: {settings.url} answers: {reason}")


def migrate_database(settings: ClickHouse) -> list[Migration]:
    """Makes the database where it is missing and applies what is pending; returns that. Raises DatabaseError."""
    with connected(msgspec.structs.replace(settings, database="default")) as client:
        client.command("CREATE DATABASE IF NOT EXISTS {name:Identifier}", parameters={"name": settings.database})
    with connected(settings) as client:
        return migrate(*_statements(client))


def pending_migrations(settings: ClickHouse) -> list[Migration]:
    """What `migrate_database` would apply. Raises DatabaseError, also where there is no database yet."""
    with connected(settings) as client:
        return pending(*_statements(client))


def _statements(client: Client) -> tuple[Query, Execute]:
    """The two functions that gpuledger.schemas.migrate wants."""

    def query(sql: str) -> Sequence[Sequence[object]]:
        return client.query(sql).result_rows

    def execute(sql: str, parameters: dict[str, object] | None = None, /) -> object:
        return client.command(sql, parameters=parameters)

    return query, execute
