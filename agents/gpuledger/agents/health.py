"""`/healthz`, `/readyz` and `/metrics` of a process, by plain HTTP on loopback and the standard library alone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from gpuledger.agents.exceptions import AgentError

__all__ = ["HealthServer", "Metric", "prometheus_text"]

_TIMEOUT_S = 5.0
_MAX_REQUEST_BYTES = 8192


@dataclass(frozen=True, slots=True)
class Metric:
    """One value; `kind` is ``counter`` or ``gauge``. None is not shown: unknown is not 0."""

    name: str
    kind: str
    help: str
    value: int | float | None


def prometheus_text(metrics: Iterable[Metric]) -> str:
    """The metrics in Prometheus' text format."""
    lines: list[str] = []
    for metric in metrics:
        if metric.value is not None:
            lines += [
                f"# HELP {metric.name} {metric.help}",
                f"# TYPE {metric.name} {metric.kind}",
                f"{metric.name} {metric.value}",
            ]
    return "\n".join(lines) + "\n"


class HealthServer:
    """Serves what its three functions say: (good, text) for health and readiness, text for metrics."""

    def __init__(
        self,
        healthy: Callable[[], tuple[bool, str]],
        ready: Callable[[], tuple[bool, str]],
        metrics: Callable[[], str],
    ) -> None:
        self._healthy = healthy
        self._ready = ready
        self._metrics = metrics
        self._server: asyncio.Server | None = None

    async def start(self, host: str, port: int) -> tuple[str, int]:
        """Listens; the address, with the real port where 0 was asked for.

        Raises:
            AgentError: the address cannot be listened on.
        """
        try:
            self._server = await asyncio.start_server(self._serve, host, port, limit=_MAX_REQUEST_BYTES)
        except OSError as error:
            raise AgentError(
                f"agent.listen: cannot listen on {host}:{port}: {error.strerror}; write another address, or port 0"
            ) from error
        name = self._server.sockets[0].getsockname()
        return str(name[0]), int(name[1])

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                request = await reader.readuntil(b"\r\n\r\n")
                writer.write(self._answer(request))
                await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def _answer(self, request: bytes) -> bytes:
        method, _, rest = request.decode("latin-1").partition(" ")
        path = rest.split(" ", 1)[0].split("?", 1)[0]
        status, text = "200 OK", ""
        if method not in ("GET", "HEAD"):
            status, text = "405 Method Not Allowed", "only GET\n"
        elif path == "/metrics":
            text = self._metrics()
        elif path in ("/healthz", "/readyz"):
            good, text = self._healthy() if path == "/healthz" else self._ready()
            text += "\n"
            status = status if good else "503 Service Unavailable"
        else:
            status, text = "404 Not Found", "there are /healthz, /readyz and /metrics\n"
        body = text.encode()
        kind = "text/plain; version=0.0.4; charset=utf-8" if path == "/metrics" else "text/plain; charset=utf-8"
        head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        return head.encode() + (b"" if method == "HEAD" else body)
