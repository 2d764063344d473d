"""The process that serves the embedded ClickHouse: takes the directory and the port, opens the engine, answers until it
is told to stop, and is gone within ten seconds.
"""

import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
import socket
import sys
from collections.abc import Generator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import uvicorn

from gpuledger.local.clickhouse.app import ClickHouseApp
from gpuledger.local.clickhouse.connection import Connection
from gpuledger.local.clickhouse.engine import MIN_FREE_BYTES, Engine, Limits
from gpuledger.local.clickhouse.users import Users, server_xml, users_xml
from gpuledger.local.exceptions import LocalError, PortTaken
from gpuledger.local.lock import DirectoryLock

__all__ = ["DEFAULT_DATABASE", "NAME", "JsonLogs", "serve"]

log = logging.getLogger("gpuledger.local.clickhouse")

NAME = "clickhouse"
# The engine's own `default` database also reads files; ours is an ordinary one, and requests for `default` get it.
DEFAULT_DATABASE = "gpuledger"

_BACKLOG = 128
# Together under the ten seconds that a supervisor waits.
_DRAIN_S = 2
_CLOSE_S = 4.0
_MIN_MEMORY_BYTES = 512 * 1024 * 1024
#: uvicorn's ticks, of 0.1 s, between two looks at what the engine merged; `KEEP_MERGED_S` must be much longer.
_TICKS_PER_LOOK = 20


def serve(
    data_dir: Path,
    host: str = "127.0.0.1",
    port: int = 0,
    users: Mapping[str, Any] | Users | None = None,
    *,
    database: str = DEFAULT_DATABASE,
    memory_bytes: int | None = None,
    limits: Limits | None = None,
    port_file: Path | None = None,
) -> None:
    """Serves until SIGTERM or SIGINT; call it in the main thread of a process of its own.

    `users` is what Users.parse takes; None means the user `default` without password, on loopback only.
    `memory_bytes` None takes half of what is free. `port` 0 takes a free one, written to `port_file` when ready.
    Where the disk did not take what the engine wrote it ends by itself, with status 1: the next start heals that.
    Raises UsersError, DirectoryInUse and PortTaken before anything is opened, EngineError where the engine does not
    open.
    """
    accounts = users if isinstance(users, Users) else Users.parse(users)
    accounts.check_host(host)
    data_dir = data_dir.absolute()
    if "?" in str(data_dir):
        raise LocalError(f"{NAME}: the path {data_dir} must not contain a question mark")
    data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    with DirectoryLock(data_dir, NAME), _listen(host, port) as listener:
        spool_dir = data_dir / "spool"
        shutil.rmtree(spool_dir, ignore_errors=True)
        spool_dir.mkdir(mode=0o700)
        engine = Engine(
            data_dir / "data", _write_config(data_dir, accounts, memory_bytes), database, limits or Limits(), spool_dir
        )
        engine.open()
        url = f"http://{_bracketed(host)}:{listener.getsockname()[1]}"
        _run(engine, ClickHouseApp(engine, accounts, spool_dir), listener, url, port_file)
        if not engine.close(_CLOSE_S):
            log.warning("the engine did not close in time; the process ends regardless")
    if engine.damage:
        # The last line of the log is what whoever started this process is shown.
        log.error("%s; make room and start again, nothing acknowledged is lost", engine.damage)
    else:
        log.info("stopped", extra={"url": url})
    # The engine's threads may still run; nothing acknowledged is lost by leaving them.
    logging.shutdown()
    os._exit(1 if engine.damage else 0)


def _run(engine: Engine, app: ClickHouseApp, listener: socket.socket, url: str, port_file: Path | None) -> None:
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        server_header=False,
        # Longer than the pauses of usual clients, whose pools would otherwise reuse a connection just closed.
        timeout_keep_alive=30,
        timeout_graceful_shutdown=_DRAIN_S,
        backlog=_BACKLOG,
    )
    server = _Server(engine, config, url, port_file)
    server.run(sockets=[listener])


class _Server(uvicorn.Server):
    """Says when it is ready, and comes back from a signal: uvicorn would raise it again, and the engine never close."""

    def __init__(self, engine: Engine, config: uvicorn.Config, url: str, port_file: Path | None) -> None:
        super().__init__(config)
        self._engine = engine
        self._look: asyncio.Future[None] | None = None
        self._url = url
        self._port_file = port_file

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle_exit)
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self._port_file is not None and sockets:
            # Renamed into place: a reader never sees half of it.
            partial = self._port_file.with_name(self._port_file.name + ".partial")
            partial.write_text(f"{sockets[0].getsockname()[1]}\n")
            partial.replace(self._port_file)
        log.info("ready", extra={"url": self._url})

    async def on_tick(self, counter: int) -> bool:
        """Whether to end: asked ten times a second."""
        if counter % _TICKS_PER_LOOK == 0 and (self._look is None or self._look.done()):
            self._look = asyncio.ensure_future(self._engine.look_at_parts())
        return await super().on_tick(counter) or bool(self._engine.damage)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sets TCP_NODELAY only where the protocol is named; without it every answer waits 40 ms for an ACK.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise PortTaken(host, port, NAME, error.strerror or str(error)) from error
    return listener


def _write_config(data_dir: Path, users: Users, memory_bytes: int | None) -> Path:
    memory = memory_bytes or max(_MIN_MEMORY_BYTES, psutil.virtual_memory().available // 2)
    config_dir = data_dir / "config"
    config_dir.mkdir(mode=0o700, exist_ok=True)
    users_file, server_file = config_dir / "users.xml", config_dir / "server.xml"
    texts = {
        users_file: users_xml(users, memory * 3 // 4),
        server_file: server_xml(users_file, memory, MIN_FREE_BYTES),
    }
    for path, text in texts.items():
        path.touch(mode=0o600)
        path.write_text(text, encoding="utf-8")
    return server_file


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


class JsonLogs(logging.Formatter):
    """One JSON object per line: time, level, logger, message and the fields given as `extra`."""

    _KNOWN = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName", "color_message"}

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry |= {key: value for key, value in record.__dict__.items() if key not in self._KNOWN}
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def configure_logs() -> None:
    """JSON to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLogs())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    # How the application drops a client that takes nothing; it says so itself.
    logging.getLogger("uvicorn.error").addFilter(
        lambda record: record.getMessage() != "ASGI callable returned without completing response."
    )
