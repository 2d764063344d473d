"""ClickHouse's HTTP port as a plain ASGI application: who asks, what for, and what answers."""

import asyncio
import logging
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gpuledger.local.clickhouse.body import Body, Disconnected, Receive, receive_body
from gpuledger.local.clickhouse.engine import Engine
from gpuledger.local.clickhouse.errors import EngineError
from gpuledger.local.clickhouse.execution import Execution
from gpuledger.local.clickhouse.request import Request, parse_request
from gpuledger.local.clickhouse.response import Response, Send
from gpuledger.local.clickhouse.sessions import Lease, Sessions
from gpuledger.local.clickhouse.statement import Prepared, prepare
from gpuledger.local.clickhouse.users import User, Users, is_loopback

__all__ = ["ClickHouseApp"]

log = logging.getLogger(__name__)

_SMALL_BYTES = 16 * 1024
_METHODS = ("GET", "HEAD", "POST", "PUT")


class ClickHouseApp:
    """Serves `engine` to `users`; bodies too large for memory wait in `spool_dir`."""

    def __init__(self, engine: Engine, users: Users, spool_dir: Path) -> None:
        self._engine = engine
        self._users = users
        self._spool_dir = spool_dir
        self._sessions = Sessions()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"no {scope['type']} connections here")
        headers = dict(scope["headers"])
        response = Response(send, "", "", self._engine.version, self._engine.limits.send_timeout_s)
        try:
            if scope["method"] not in _METHODS:
                raise EngineError.of(
                    "UNSUPPORTED_METHOD", f"Method {scope['method']} is not supported; use GET or POST", 405
                )
            if scope["path"] in ("/ping", "/replicas_status"):
                await response.plain(200, "Ok.\n")
                return
            if scope["path"] not in ("/", "/query"):
                await response.plain(404, f"There is no handle {scope['path']}\n")
                return
            self._check_browser(headers)
            request = parse_request(scope)
            response = Response(
                send,
                request.query_id,
                request.accept_encoding,
                self._engine.version,
                self._engine.limits.send_timeout_s,
            )
            await self._answer(request, receive, response)
        except EngineError as error:
            try:
                await response.error(error)
            except Disconnected:
                log.info("the client left before it was told of an error", extra={"code": error.code})
        except Disconnected:
            # Returning without a complete answer makes the server drop the connection.
            log.info("the client left or took nothing for too long")

    async def _answer(self, request: Request, receive: Receive, response: Response) -> None:
        user = self._login(request)
        body = await receive_body(receive, self._engine.limits, self._spool_dir)
        try:
            if request.is_get and not request.query and not body.size:
                await response.plain(200, "Ok.\n")
                return
            gone = asyncio.ensure_future(_until_gone(receive))
            try:
                prepared = await self._prepare(request, body)
                lease = self._lease(request, user)
                if lease is not None:
                    response.before_end = lease.release
                try:
                    readonly = 1 if user.readonly else 2 if request.is_get else 0
                    session = lease.session if lease is not None else None
                    await Execution(self._engine, request, readonly, session, gone).run(prepared, response)
                finally:
                    response.before_end()
            finally:
                gone.cancel()
        finally:
            body.close()

    async def _prepare(self, request: Request, body: Body) -> Prepared:
        if body.size + len(request.query) <= _SMALL_BYTES and "content-encoding" not in request.headers:
            # 0.1 ms here; two changes of thread cost more.
            return prepare(self._engine, request, body, self._engine.limits)
        return await self._engine.read(lambda: prepare(self._engine, request, body, self._engine.limits))

    def _login(self, request: Request) -> User:
        credentials = request.credentials
        user = self._users.login(credentials.user, credentials.password)
        if user is None:
            raise EngineError.of(
                "AUTHENTICATION_FAILED",
                f"{credentials.user}: Authentication failed: password is incorrect, or there is no user with such name",
            )
        return user

    def _lease(self, request: Request, user: User) -> Lease | None:
        if request.session_id is None:
            return None
        return self._sessions.acquire(
            user.name,
            request.session_id,
            database=self._engine.database,
            timeout_s=request.session_timeout_s,
            must_exist=request.session_check,
        )

    def _check_browser(self, headers: MutableMapping[bytes, bytes]) -> None:
        """Keeps web pages of other origins away from a port that needs no password.

        A page may send simple POSTs to any address (then Origin differs from Host), or have its own name resolve to
        127.0.0.1 (then Host is that name).
        """
        host = headers.get(b"host", b"").decode("latin-1")
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and urlsplit(origin).netloc != host:
            raise EngineError.of("ACCESS_DENIED", f"Requests of the web page {origin} are not allowed")
        name = urlsplit(f"//{host}").hostname or ""
        unprotected = any(user.password_sha256 is None for user in self._users.by_name.values())
        if unprotected and host and not is_loopback(name):
            raise EngineError.of(
                "ACCESS_DENIED", f"The host name {name} is not allowed without passwords; use 127.0.0.1"
            )


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
