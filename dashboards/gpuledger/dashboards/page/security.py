"""What every answer of the page says and refuses: no foreign host name reaches it, no foreign script runs in it."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["HEADERS", "Guard", "allowed_hosts", "host_name"]

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; connect-src 'self'; font-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_METHODS = frozenset({"GET", "HEAD"})


def host_name(host: str) -> str:
    """The name in a Host header, lower case, without port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.rpartition(":")[0].lower() if host.count(":") == 1 else host.lower()


def allowed_hosts(bound: str, extra: Iterable[str] = ()) -> frozenset[str]:
    """Host names to answer to: loopback, the address listened on, and `extra`. An unspecified address adds nothing."""
    names = {host_name(name) for name in extra}
    try:
        if not ipaddress.ip_address(bound).is_unspecified:
            names.add(bound.lower())
    except ValueError:
        names.add(bound.lower())
    return _LOOPBACK | names


class Guard:
    """ASGI middleware: refuses unknown Host headers (DNS rebinding) and methods that change things; adds HEADERS."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str]) -> None:
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def guarded_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, text in HEADERS.items():
                    headers[name] = text
            await send(message)

        host = host_name(Headers(scope=scope).get("host", ""))
        if host not in self._hosts:
            answer = PlainTextResponse(
                f"{host or 'no host'}: not a name of this page. Start it with --allow-host NAME to use that name.\n",
                421,
            )
            await answer(scope, receive, guarded_send)
        elif scope["method"] not in _METHODS:
            answer = PlainTextResponse("only GET and HEAD\n", 405, {"Allow": "GET, HEAD"})
            await answer(scope, receive, guarded_send)
        else:
            await self._app(scope, receive, guarded_send)
