"""Reads the database for the page on one daemon thread: a hung query then stops neither the event loop nor the end of
the process.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from clickhouse_connect import get_client
from clickhouse_connect.driver.client import Client
from clickhouse_connect.driver.exceptions import ClickHouseError, DatabaseError

from gpuledger.dashboards.exceptions import QueryFailed, SourceError, SourceUnavailable

__all__ = ["ClickHouseSource", "Result", "Source", "SourceThread"]

log = logging.getLogger(__name__)

#: ClickHouse's codes that mean "not now": too many queries, timeout, memory limit, shutting down, read-only mode.
_TRY_AGAIN = frozenset({159, 202, 209, 210, 236, 241, 242, 286})
_TIMEOUT_S = 15


@dataclass(frozen=True, slots=True)
class Result:
    """`rows` in the order of the query, values as Python has them."""

    columns: tuple[str, ...]
    rows: Sequence[Sequence[Any]]


class Source(Protocol):
    """Answers a query, blocking. Raises SourceUnavailable or QueryFailed, nothing else on purpose."""

    def query(self, sql: str, /) -> Result: ...

    def close(self) -> None: ...


class ClickHouseSource:
    """A ClickHouse over HTTP. `arguments` are those of ``clickhouse_connect.get_client`` (host, port, username, …).

    The client is made by the first query and again after the server could not be reached. For one thread at a time.
    """

    def __init__(self, arguments: Mapping[str, Any], connect: Callable[..., Client] = get_client) -> None:
        self._arguments: dict[str, Any] = {
            "connect_timeout": 5,
            **arguments,
            # A session would be one more thing that a restarted server has forgotten.
            "autogenerate_session_id": False,
            "send_receive_timeout": min(_TIMEOUT_S, int(arguments.get("send_receive_timeout", _TIMEOUT_S))),
            "client_name": "gpuledger-page",
        }
        self._connect = connect
        self._client: Client | None = None

    def query(self, sql: str, /) -> Result:
        try:
            if self._client is None:
                self._client = self._connect(**self._arguments)
            answer = self._client.query(sql)
        except DatabaseError as error:
            code = _code(error)
            if code is None or code in _TRY_AGAIN:
                self.close()
                raise SourceUnavailable(_first_line(error)) from error
            raise QueryFailed(_first_line(error), code) from error
        except (ClickHouseError, OSError) as error:
            self.close()
            raise SourceUnavailable(_first_line(error)) from error
        return Result(tuple(answer.column_names), answer.result_rows)

    def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            try:
                client.close()
            except (ClickHouseError, OSError) as error:
                log.debug("closing the client failed: %s", error)


def _code(error: DatabaseError) -> int | None:
    code: object = getattr(error, "code", None)
    if isinstance(code, int):
        return code
    _, found, rest = str(error).partition("Code: ")
    digits = rest.split(".", 1)[0] if found else ""
    return int(digits) if digits.isdigit() else None


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0][:300] or type(error).__name__


_Job = tuple[str, "asyncio.Future[Result]", asyncio.AbstractEventLoop]


class SourceThread:
    """Runs the queries of a `Source` one after the other on a daemon thread of its own."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="page-queries", daemon=True)
        self._thread.start()

    async def query(self, sql: str) -> Result:
        """Raises SourceUnavailable or QueryFailed."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        self._jobs.put((sql, future, loop))
        return await future

    def close(self) -> None:
        """Ends the thread after what is queued; does not wait for it."""
        self._jobs.put(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            sql, future, loop = job
            if future.cancelled():
                continue
            try:
                outcome: Result | Exception = self._source.query(sql)
            except SourceError as error:
                outcome = error
            except Exception as error:  # whatever a driver raises must reach the caller, or it waits for ever
                log.exception("a query failed in an unexpected way")
                outcome = QueryFailed(f"{type(error).__name__}: {_first_line(error)}", None)
            try:
                loop.call_soon_threadsafe(_settle, future, outcome)
            except RuntimeError:  # the loop is closed: nobody waits any more
                break
        self._source.close()


def _settle(future: asyncio.Future[Result], outcome: Result | Exception) -> None:
    if future.done():
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
