"""The ClickHouse engine in this process, used the one way that was found safe: a root handle kept open, a fresh handle
per request, a few reader threads, and exactly one writer thread that owns all writes.

Nothing here knows HTTP.
"""

import asyncio
import contextlib
import logging
import re
import shutil
import threading
import time
from collections.abc import Awaitable, Callable, Generator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import chdb

from gpuledger.local.clickhouse.errors import EngineError
from gpuledger.local.clickhouse.insert_data import InsertData
from gpuledger.local.clickhouse.parts import Parts
from gpuledger.local.clickhouse.sql import insert_from_file, quote_identifier, quote_string

__all__ = ["ARROW_END", "MIN_FREE_BYTES", "Engine", "Handle", "Limits", "Setup", "StatementClass", "Stats", "Stream"]

log = logging.getLogger(__name__)

T = TypeVar("T")

_SETTING_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

# Below it nothing is written: room for what is being written when it is noticed, and for the engine to start again.
MIN_FREE_BYTES = 64 * 1024 * 1024

# Ends every Arrow IPC stream.
ARROW_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"


@dataclass(frozen=True, slots=True)
class Limits:
    """What one server process takes on at most; beyond it requests are refused with 503."""

    reader_threads: int = 4
    # Open reads, those of slow clients included: each holds a paused query in the engine.
    open_reads: int = 64
    waiting_writes: int = 32
    max_sql_bytes: int = 16 * 1024 * 1024
    max_body_bytes: int = 1024 * 1024 * 1024
    body_memory_bytes: int = 16 * 1024 * 1024
    # A result that the client wants whole before the status line (wait_end_of_query) is held back up to this size.
    held_back_bytes: int = 64 * 1024 * 1024
    # Of a result whose format cannot be streamed, such as JSON, Arrow and Parquet.
    unstreamed_bytes: int = 1024 * 1024 * 1024
    receive_timeout_s: float = 30.0
    send_timeout_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Setup:
    """What is set on a handle before its statement runs: `session` are earlier SET statements of its session.

    `defaults` come first, as a session may have made itself read-only; `readonly` last, so that nothing before it can
    lift it; 0 leaves it alone.
    """

    database: str
    tag: str
    session: tuple[str, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict[str, str])
    defaults: Mapping[str, str] = field(default_factory=dict[str, str])
    readonly: int = 0

    def statements(self) -> list[str]:
        """Raises EngineError 115 for what cannot be the name of a setting."""
        for name in self.settings:
            if not _SETTING_NAME.fullmatch(name):
                raise EngineError.of("UNKNOWN_SETTING", f"{name!r} is not the name of a setting")
        statements = [_set({"log_comment": self.tag, **self.defaults}), f"USE {quote_identifier(self.database)}"]
        statements += self.session
        if self.settings:
            statements.append(_set(self.settings))
        return statements

    def lock(self) -> list[str]:
        """What makes the handle read-only, to be applied last."""
        return [f"SET readonly = {self.readonly}"] if self.readonly else []


@dataclass(slots=True)
class Stats:
    """What a statement read, wrote and returned so far."""

    read_rows: int = 0
    read_bytes: int = 0
    written_rows: int = 0
    written_bytes: int = 0
    result_rows: int = 0
    result_bytes: int = 0

    def add_read(self, result: Any, size: int) -> None:
        self.read_rows += int(result.storage_rows_read())
        self.read_bytes += int(result.storage_bytes_read())
        self.result_rows += int(result.rows_read())
        self.result_bytes += size


@dataclass(frozen=True, slots=True)
class StatementClass:
    """The engine's own judgement of a text: how many statements, and whether they only read."""

    kind: str
    statements: int

    @property
    def reads(self) -> bool:
        return self.kind == "READ_ONLY"


class Stream:
    """A query whose result is fetched chunk by chunk; between fetches it holds no thread of ours."""

    def __init__(self, result: Any, stats: Stats, arrow: bool) -> None:
        self._result = result
        self._stats = stats
        self._arrow = arrow
        self._started = False
        self.finished = False

    def fetch(self, min_bytes: int, max_seconds: float) -> bytes:
        """The next piece, of about `min_bytes`, sooner after `max_seconds`; empty only at the end (`finished`).

        Raises EngineError when the query fails.
        """
        pieces: list[bytes] = []
        size = 0
        until = time.monotonic() + max_seconds
        while size < min_bytes and (not size or time.monotonic() < until):
            try:
                chunk = self._result.fetch()
            except Exception as error:
                self.finished = True
                raise EngineError.from_engine(error) from error
            if chunk is None:
                self.finished = True
                if self._arrow and self._started:
                    pieces.append(ARROW_END)
                break
            piece: bytes = chunk.bytes()
            self._stats.add_read(chunk, len(piece))
            if self._arrow:
                piece = self._splice(piece)
            self._started = True
            pieces.append(piece)
            size += len(piece)
        return b"".join(pieces)

    def _splice(self, piece: bytes) -> bytes:
        """Each chunk comes as an Arrow stream of its own: the schema of all but the first and the ends are cut."""
        start = 8 + int.from_bytes(piece[4:8], "little") if self._started else 0
        end = len(piece) - len(ARROW_END) if piece.endswith(ARROW_END) else len(piece)
        return piece[start:end]

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._result.close()


class Handle:
    """One connection to the engine, for one request at a time; not shared between concurrent requests."""

    def __init__(self, connection: Any, memory_bytes: int, spool_dir: Path) -> None:
        self._connection = connection
        self._memory_bytes = memory_bytes
        self._spool_dir = spool_dir
        self.stats = Stats()
        self.closed = False

    def apply(self, statements: Iterable[str]) -> None:
        """Runs statements that return nothing. Raises EngineError."""
        script = "; ".join(statements)
        if script:
            # As one: each call costs 0.2 ms.
            self._run(script, "Null", None)

    def classify(self, sql: str) -> StatementClass:
        # The only call that the package does not export on its own connection class.
        found: dict[str, Any] = self._connection._conn.classify_query(sql)
        return StatementClass(str(found["query_class"].name), int(found["statement_count"]))

    def begin(self) -> None:
        """Forgets the figures of earlier statements."""
        self.stats = Stats()

    def external(self, name: str, structure: str, data_format: str, data: bytes) -> None:
        """Makes a temporary table that came along with a query. Raises EngineError."""
        self.apply([f"CREATE TEMPORARY TABLE {quote_identifier(name)} ({structure})"])
        self.insert(f"INSERT INTO {quote_identifier(name)}", data_format, [data])
        self.stats = Stats()

    def query(self, sql: str, output_format: str, params: Mapping[str, str] | None = None) -> bytes:
        """The whole result. Raises EngineError."""
        result = self._run(sql, output_format, params)
        data: bytes = result.bytes()
        self.stats.add_read(result, len(data))
        self.stats.written_rows += int(result.rows_written())
        self.stats.written_bytes += int(result.bytes_written())
        return data

    def stream(self, sql: str, output_format: str, params: Mapping[str, str] | None = None) -> Stream:
        """Starts a SELECT. Raises EngineError, though most errors come with the first fetch."""
        try:
            result = self._connection.send_query(sql, output_format, params=dict(params or {}))
        except Exception as error:
            raise EngineError.from_engine(error) from error
        return Stream(result, self.stats, output_format == "ArrowStream")

    def insert(self, head: str, data_format: str, chunks: Iterable[bytes]) -> None:
        """Runs `INSERT INTO t (…)` on the data. Returns when it is on disk; raises EngineError."""
        try:
            data = InsertData(chunks, self._memory_bytes, self._spool_dir)
        except OSError as error:
            raise EngineError.of("NOT_ENOUGH_SPACE", f"Cannot take the data of the INSERT: {error}") from error
        with data:
            result = self._run(f"{insert_from_file(head, data.path)} FORMAT {data_format}", "Null", None)
        self.stats.written_rows += int(result.rows_written())
        self.stats.written_bytes += int(result.bytes_written())

    def close(self) -> None:
        self.closed = True
        with contextlib.suppress(Exception):
            self._connection.close()

    def _run(self, sql: str, output_format: str, params: Mapping[str, str] | None) -> Any:
        try:
            return self._connection.query(sql, output_format, params=dict(params or {}))
        except Exception as error:
            raise EngineError.from_engine(error) from error


class Engine:
    """The engine on one data directory. open() and close() block; everything else is for one event loop."""

    def __init__(self, data_dir: Path, config_file: Path, database: str, limits: Limits, spool_dir: Path) -> None:
        self._spool_dir = spool_dir
        self._data_dir = data_dir
        self._source = f"{data_dir}?config-file={config_file}"
        self.database = database
        self.limits = limits
        self.version = ""
        #: Why nothing may be written any more, and the process must end; empty where all is well.
        self.damage = ""
        self._root: Handle | None = None
        self._looking: Handle | None = None
        self._parts: Parts | None = None
        self._readers = ThreadPoolExecutor(limits.reader_threads, "clickhouse-reader")
        self._writer = ThreadPoolExecutor(1, "clickhouse-writer")
        # Cancelling must not wait behind what it cancels.
        self._control = ThreadPoolExecutor(1, "clickhouse-control")
        self._open_reads = 0
        self._waiting_writes = 0
        # Opening and closing handles at once from several threads is serialised: it costs 0.3 ms.
        self._connecting = threading.Lock()
        self._classifying = threading.Lock()

    def open(self) -> None:
        """Starts the engine and makes the default database. Raises EngineError."""
        self._root = self.handle()
        self._root.apply([f"CREATE DATABASE IF NOT EXISTS {quote_identifier(self.database)} ENGINE = Atomic"])
        self.version = self._root.query("SELECT version()", "TSVRaw").decode().strip()
        self._looking = looking = self.handle()
        self._parts = Parts(lambda sql: looking.query(sql, "JSONEachRow"))

    def handle(self, setup: Setup | None = None) -> Handle:
        """A fresh handle, set up. Blocks; raises EngineError."""
        try:
            with self._connecting:
                connection = chdb.connect(self._source)
            handle = Handle(connection, self.limits.body_memory_bytes, self._spool_dir)
        except Exception as error:
            raise EngineError.from_engine(error) from error
        if setup is not None:
            try:
                handle.apply(setup.statements())
            except BaseException:
                handle.close()
                raise
        return handle

    @contextlib.contextmanager
    def read_slot(self) -> Generator[None]:
        """Held while a read is open. Raises EngineError 202 (503) where too many are."""
        if self._open_reads >= self.limits.open_reads:
            raise _too_many("reads", self.limits.open_reads)
        self._open_reads += 1
        try:
            yield
        finally:
            self._open_reads -= 1

    def classify(self, sql: str) -> StatementClass:
        """Parses without running; costs some 50 µs."""
        with self._classifying:
            return self._opened().classify(sql)

    def _opened(self) -> Handle:
        if self._root is None:
            raise EngineError.of("ABORTED", "The engine is not open", 503)
        return self._root

    async def read(self, job: Callable[[], T]) -> T:
        """Runs `job` on a reader thread."""
        return await _in(self._readers, job)

    async def write(self, job: Callable[[], T]) -> T:
        """Runs `job` on the writer thread, after those before it. Returns when what it wrote is whole on the disk.

        Raises EngineError: 202 (503) where too many wait, 243 where the disk is full or did not take all of it.
        """
        if self._waiting_writes >= self.limits.waiting_writes:
            raise _too_many("writes", self.limits.waiting_writes)
        self._waiting_writes += 1
        try:
            return await _in(self._writer, lambda: self._checked(job))
        finally:
            self._waiting_writes -= 1

    async def look_at_parts(self) -> None:
        """Looks at what the engine merged by itself; where a part is short, `damage` says so."""

        def look() -> None:
            with contextlib.suppress(EngineError):
                self._check_parts()

        await _in(self._writer, look)

    def _checked(self, job: Callable[[], T]) -> T:
        if self.damage:
            raise EngineError.of("NOT_ENOUGH_SPACE", self.damage)
        free = shutil.disk_usage(self._data_dir).free
        if free < MIN_FREE_BYTES:
            raise EngineError.of(
                "NOT_ENOUGH_SPACE",
                f"{free >> 20} MiB are free where {self._data_dir} is; nothing is written below {MIN_FREE_BYTES >> 20}",
            )
        try:
            return job()
        finally:
            # After a failure too: it may have come from a part that is short.
            self._check_parts()

    def _check_parts(self) -> None:
        if self._parts is None or self.damage:
            return
        trouble = self._parts.find_short()
        if trouble:
            self.damage = f"{trouble}: the disk did not take what was written"
            raise EngineError.of("NOT_ENOUGH_SPACE", self.damage)

    async def control(self, job: Callable[[], T]) -> T:
        """Runs `job` beside the readers and the writer."""
        return await _in(self._control, job)

    async def cancel(self, tag: str) -> None:
        """Asks the engine to end the statement that runs with this tag; its owner sees error 394."""

        def kill() -> None:
            handle = self.handle()
            try:
                handle.query(f"KILL QUERY WHERE Settings['log_comment'] = {quote_string(tag)} ASYNC", "Null")
            except EngineError as error:
                log.warning("a statement could not be cancelled", extra={"error": error.text})
            finally:
                handle.close()

        await self.control(kill)

    def close(self, timeout_s: float) -> bool:
        """Ends running statements and closes the engine; False where that took longer than `timeout_s`."""
        closed = threading.Event()

        def end() -> None:
            handle = self.handle()
            with contextlib.suppress(EngineError):
                handle.query("KILL QUERY WHERE query_kind = 'Select' ASYNC", "Null")
            handle.close()
            for pool in (self._control, self._readers, self._writer):
                pool.shutdown(wait=True, cancel_futures=True)
            for opened in (self._looking, self._root):
                if opened is not None:
                    opened.close()
            closed.set()

        # A daemon: a statement that does not end must not keep the process from ending.
        threading.Thread(target=end, name="clickhouse-close", daemon=True).start()
        return closed.wait(timeout_s)


def _in(pool: ThreadPoolExecutor, job: Callable[[], T]) -> Awaitable[T]:
    return asyncio.get_running_loop().run_in_executor(pool, job)


def _set(values: Mapping[str, str]) -> str:
    return "SET " + ", ".join(f"{name} = {quote_string(value)}" for name, value in values.items())


def _too_many(what: str, limit: int) -> EngineError:
    return EngineError.of(
        "TOO_MANY_SIMULTANEOUS_QUERIES", f"Too many simultaneous {what}, maximum: {limit}; try again later", 503
    )
