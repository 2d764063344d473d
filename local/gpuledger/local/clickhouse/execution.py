"""Runs one prepared statement on the right thread and answers with its result, streamed where the format allows."""

import asyncio
import contextlib
import re
import threading
import uuid
from collections.abc import Awaitable, Callable, Generator
from dataclasses import dataclass, replace
from typing import TypeVar

from gpuledger.local.clickhouse.body import Disconnected
from gpuledger.local.clickhouse.engine import Engine, Handle, Setup, Stats, Stream
from gpuledger.local.clickhouse.errors import EngineError
from gpuledger.local.clickhouse.hello import hello_block
from gpuledger.local.clickhouse.request import Request
from gpuledger.local.clickhouse.response import DISPLAY_NAME, Response
from gpuledger.local.clickhouse.sessions import Session
from gpuledger.local.clickhouse.sql import quote_string
from gpuledger.local.clickhouse.statement import Prepared

__all__ = ["Execution"]

T = TypeVar("T")

# Formats whose chunks may simply follow each other. ArrowStream is spliced; all others repeat headers per chunk.
_STREAMED = {
    name.upper(): name
    for name in (
        "Native",
        "TabSeparated",
        "TSV",
        "TabSeparatedRaw",
        "TSVRaw",
        "CSV",
        "RowBinary",
        "JSONEachRow",
        "JSONCompactEachRow",
        "JSONStringsEachRow",
        "TSKV",
        "LineAsString",
        "MsgPack",
        "ArrowStream",
    )
}
_PIECE_BYTES = 1024 * 1024
_PIECE_SECONDS = 0.2
# What a reader may set: how its result looks and how long it may take. Grafana's driver sends max_execution_time.
_READER_SETTINGS = re.compile(
    r"max_execution_time|max_result_rows|max_result_bytes|result_overflow_mode|max_block_size|readonly"
    r"|(output_format|format|date_time_output)_\w+"
)


@dataclass(slots=True)
class _Opened:
    handle: Handle
    stream: Stream
    first: bytes


class Execution:
    """One request's statement. `gone` completes when the client disconnects."""

    def __init__(
        self, engine: Engine, request: Request, readonly: int, session: Session | None, gone: "asyncio.Future[None]"
    ) -> None:
        self._engine = engine
        self._request = request
        self._session = session
        self._gone = gone
        # Unique even where a client reuses its query id: a disconnect must cancel this statement alone.
        self._tag = request.query_id or str(uuid.uuid4())
        if readonly == 1:
            _check_reader_settings(request)
        database = request.database or (session.database if session is not None else engine.database)
        self._setup = Setup(
            # Clients whose configuration names no database ask for this one.
            database=engine.database if database == "default" else database,
            tag=self._tag,
            session=session.statements if session is not None else (),
            settings={name: value for name, value in request.settings.items() if name != "readonly"}
            if readonly == 1
            else request.settings,
            readonly=readonly,
        )

    async def run(self, prepared: Prepared, response: Response) -> None:
        """Raises EngineError where the client must be told, Disconnected where there is no client any more."""
        if self._setup.readonly and not prepared.runs_as_read:
            # The engine itself lets read-only users stop merges, undrop tables and kill the queries of others.
            raise EngineError.of("READONLY", "Cannot execute query in readonly mode")
        if prepared.is_hello and self._request.protocol_version and self._output_format(prepared) == "Native":
            block = hello_block(DISPLAY_NAME, self._engine.version, self._request.protocol_version)
            await response.all(block, "Native", Stats())
        elif prepared.verb == "KILL" and prepared.data is None:
            await self._kill(prepared, response)
        elif not prepared.runs_as_read:
            await self._write(prepared, response)
        elif self._streams(prepared):
            with self._engine.read_slot():
                await self._stream(prepared, response)
        else:
            with self._engine.read_slot():
                await self._read(prepared, response)

    def _output_format(self, prepared: Prepared) -> str:
        return prepared.statement.format or self._request.default_format

    def _streams(self, prepared: Prepared) -> bool:
        return (
            prepared.kind.reads
            and prepared.verb in ("SELECT", "WITH", "FROM")
            and not prepared.statement.with_totals
            and "extremes" not in self._request.settings
            and self._output_format(prepared).upper() in _STREAMED
            and (self._session is None or self._session.handle is None)
        )

    async def _stream(self, prepared: Prepared, response: Response) -> None:
        name = _STREAMED[self._output_format(prepared).upper()]

        def open_stream() -> _Opened:
            handle = self._open(prepared, self._setup)
            try:
                stream = handle.stream(prepared.sql, name, self._request.params)
                first = stream.fetch(_PIECE_BYTES, _PIECE_SECONDS)
                if not first and name == "ArrowStream":
                    # A stream without rows brings no schema either; the whole result does.
                    first = handle.query(prepared.sql, name, self._request.params)
                opened = _Opened(handle, stream, first)
                if stream.finished:
                    _close_opened(opened)
                return opened
            except BaseException:
                handle.close()
                raise

        opened = await self._unless_gone(self._engine.read(open_stream), _close_opened)
        try:
            await self._send_stream(opened, self._output_format(prepared), response)
        finally:
            if not opened.handle.closed:
                await self._engine.read(lambda: _close_opened(opened))

    async def _send_stream(self, opened: _Opened, output_format: str, response: Response) -> None:
        stream, stats = opened.stream, opened.handle.stats
        held = [opened.first]
        size = len(opened.first)
        limit = self._engine.limits.held_back_bytes if self._request.wait_end_of_query else 0
        while not stream.finished and size < limit:
            held.append(await self._next(stream))
            size += len(held[-1])
        if stream.finished:
            await response.all(b"".join(held), output_format, stats)
            return
        await response.start(output_format, stats)
        for piece in held:
            await response.piece(piece)
        held.clear()
        while not stream.finished:
            await response.piece(await self._next(stream))
        await response.finish()

    async def _next(self, stream: Stream) -> bytes:
        return await self._unless_gone(self._engine.read(lambda: stream.fetch(_PIECE_BYTES, _PIECE_SECONDS)))

    async def _read(self, prepared: Prepared, response: Response) -> None:
        output_format = self._output_format(prepared)
        setup = self._setup
        if prepared.kind.reads:
            setup = replace(setup, defaults={"max_result_bytes": str(self._engine.limits.unstreamed_bytes)})
        elif prepared.kind.kind == "UNKNOWN":
            setup = replace(setup, readonly=setup.readonly or 1)

        def job() -> tuple[bytes, Handle]:
            with self._handle(prepared, setup) as handle:
                data = handle.query(prepared.sql, output_format, self._request.params)
                self._remember(prepared, handle)
                return data, handle

        data, handle = await self._unless_gone(self._engine.read(job))
        await response.all(data, output_format if prepared.kind.reads else None, handle.stats)

    async def _kill(self, prepared: Prepared, response: Response) -> None:
        # Clients know their own query ids; the engine knows them as tags.
        sql = re.sub(r"\bquery_id\b", "Settings['log_comment']", prepared.sql)

        def job() -> tuple[bytes, Handle]:
            with self._handle(prepared, replace(self._setup, tag=str(uuid.uuid4()))) as handle:
                return handle.query(sql, self._request.default_format), handle

        data, handle = await self._engine.control(job)
        await response.all(data, self._request.default_format, handle.stats)

    async def _write(self, prepared: Prepared, response: Response) -> None:
        abandoned = threading.Event()

        def job() -> Handle:
            if abandoned.is_set():
                raise EngineError.of("QUERY_WAS_CANCELLED", "The client left before the statement began")
            with self._handle(prepared, self._setup) as handle:
                self._run_write(prepared, handle)
                return handle

        running = asyncio.ensure_future(self._engine.write(job))
        await asyncio.wait({running, self._gone}, return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            # What has begun goes on to its end; what waits is dropped.
            abandoned.set()
        handle = await running
        await response.all(b"", None, handle.stats)

    def _run_write(self, prepared: Prepared, handle: Handle) -> None:
        params = self._request.params
        if prepared.data is None:
            handle.query(prepared.sql, "Null", params)
            self._remember(prepared, handle)
            return
        data_format = prepared.statement.format or "Values"
        for name, value in params.items():
            if not name.isidentifier():
                raise EngineError.of("BAD_ARGUMENTS", f"{name!r} is not the name of a parameter")
            handle.apply([f"SET param_{name} = {quote_string(value)}"])
        handle.insert(prepared.sql, data_format, prepared.data)

    @contextlib.contextmanager
    def _handle(self, prepared: Prepared, setup: Setup) -> Generator[Handle]:
        """A handle for one statement: the session's own, or a fresh one."""
        session = self._session
        if session is None or session.handle is None:
            handle = self._open(prepared, setup)
            try:
                yield handle
            finally:
                if session is None or session.handle is not handle:
                    handle.close()
            return
        handle = session.handle
        handle.begin()
        handle.apply(setup.statements())
        try:
            yield handle
        finally:
            with contextlib.suppress(EngineError):
                # As the session had it: what came with this request must not last.
                handle.apply(f"SET {name} = DEFAULT" for name in setup.settings)
                handle.apply(session.statements)

    def _open(self, prepared: Prepared, setup: Setup) -> Handle:
        handle = self._engine.handle(setup)
        try:
            for table in prepared.external:
                handle.external(table.name, table.structure, table.format, table.data)
            handle.apply(setup.lock())
        except BaseException:
            handle.close()
            raise
        return handle

    def _remember(self, prepared: Prepared, handle: Handle) -> None:
        session = self._session
        if session is None:
            return
        if prepared.verb == "SET":
            session.remember(prepared.sql.rstrip("; \n\t"))
        elif prepared.verb == "USE":
            session.database = handle.query("SELECT currentDatabase()", "TSVRaw").decode().strip()
        elif prepared.statement.temporary and session.handle is None:
            session.handle = handle

    async def _unless_gone(self, work: Awaitable[T], clean: Callable[[T], None] | None = None) -> T:
        """The result of `work`; where the client leaves first, the statement is cancelled and Disconnected raised."""
        running = asyncio.ensure_future(work)
        await asyncio.wait({running, self._gone}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            return running.result()
        await self._engine.cancel(self._tag)
        try:
            result = await running
        except EngineError:
            raise Disconnected from None
        if clean is not None:
            clean(result)
        raise Disconnected


def _close_opened(opened: _Opened) -> None:
    opened.stream.close()
    opened.handle.close()


def _check_reader_settings(request: Request) -> None:
    for name, value in request.settings.items():
        if not _READER_SETTINGS.fullmatch(name) or (name == "readonly" and value not in ("1", "2")):
            raise EngineError.of("READONLY", f"Cannot modify '{name}' setting in readonly mode")
