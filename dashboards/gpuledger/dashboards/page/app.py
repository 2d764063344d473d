"""The page's routes: one screen, its figures as JSON, and a stream of what has changed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from gpuledger.dashboards.boards import LIVE
from gpuledger.dashboards.page.feed import Feed
from gpuledger.dashboards.page.metrics import metrics_text
from gpuledger.dashboards.page.security import Guard, allowed_hosts
from gpuledger.dashboards.page.source import Source, SourceThread
from gpuledger.dashboards.page.static import load_static
from gpuledger.dashboards.panels import RANGES, Board

__all__ = ["PageSettings", "create_app"]

#: Proxies and browsers give up on a silent stream after half a minute or more.
_HEARTBEAT_S = 10.0
#: More than any fleet has people looking; each costs a socket and a few kilobytes.
_MAX_STREAMS = 500


@dataclass(frozen=True, slots=True)
class PageSettings:
    """`echarts` is the path of echarts.esm.min.js; `hosts` are names to answer to beside loopback and `host`."""

    echarts: Path
    title: str = "GPULedger"
    host: str = "127.0.0.1"
    hosts: tuple[str, ...] = ()
    refresh_ms: int = 1000


def board_json(board: Board, title: str) -> dict[str, Any]:
    """The board's definition for the browser: everything but its SQL."""
    panels: list[dict[str, Any]] = []
    for panel in board.panels:
        fields = asdict(panel)
        del fields["sql"], fields["refresh_s"]
        panels.append({**fields, "range_s": RANGES[panel.range or board.range]})
    return {
        "id": board.id,
        "title": board.title,
        "description": board.description,
        "site": title,
        "status": board.status,
        "annotations": [annotation.id for annotation in board.annotations],
        "panels": panels,
    }


class _Page:
    def __init__(self, settings: PageSettings, feed: Feed) -> None:
        self.feed = feed
        self.static = load_static(settings.echarts)
        self.board = board_json(feed.board, settings.title)
        self.streams = 0
        self.closing = False

    def close_streams(self) -> None:
        """Ends every event stream: a server that stops would wait for them."""
        self.closing = True
        self.feed.wake_readers()

    async def index(self, request: Request) -> Response:
        self.feed.touch()
        return self.static.index.response(request)

    async def live(self, request: Request) -> Response:
        """The board, its rows and the status, all at once."""
        await self.feed.fresh(timeout_s=10)
        panels = {
            name: {"version": state.version, "error": state.error, "rows": state.rows}
            for name, state in self.feed.panels.items()
        }
        body = {"board": self.board, "panels": panels, "status": self.feed.status(), "now": _now()}
        return JSONResponse(body, headers={"Cache-Control": "no-store"})

    async def events(self, request: Request) -> Response:
        if self.streams >= _MAX_STREAMS:
            return PlainTextResponse("too many open pages; close some\n", 503, {"Retry-After": "30"})
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(self._stream(), media_type="text/event-stream", headers=headers)

    async def _stream(self) -> AsyncIterator[str]:
        """Events: `board` once, `panel` for each that changed, `status` when it changed and as heartbeat."""
        self.streams += 1
        self.feed.watchers += 1
        self.feed.touch()
        sent: dict[str, int] = {}
        status = ""
        try:
            yield f"retry: 2000\nevent: board\ndata: {json.dumps(self.board)}\n\n"
            while not self.closing:
                change, silent = self.feed.next_change(), True
                for message in self.feed.updates(sent):
                    silent = False
                    yield f"event: panel\ndata: {message}\n\n"
                now = {**self.feed.status(), "now": _now()}
                if silent or json.dumps(self.feed.status()) != status:
                    status = json.dumps(self.feed.status())
                    yield f"event: status\ndata: {json.dumps(now)}\n\n"
                with suppress(TimeoutError):
                    await asyncio.wait_for(change.wait(), _HEARTBEAT_S)
        finally:
            self.streams -= 1
            self.feed.watchers -= 1

    async def healthz(self, request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(self, request: Request) -> Response:
        """200 when the database answers."""
        await self.feed.fresh(timeout_s=5)
        status = self.feed.status()
        return JSONResponse(status, 200 if status["database"] == "ok" else 503)

    async def metrics(self, request: Request) -> Response:
        text = metrics_text(self.feed, self.streams)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def create_app(settings: PageSettings, source: Source, board: Board = LIVE) -> Starlette:
    """The ASGI application; reads `source` from one thread of its own, and only while somebody looks.

    Raises:
        AssetMissing: `settings.echarts` cannot be read.
    """
    thread = SourceThread(source)
    feed = Feed(board, thread, refresh_ms=settings.refresh_ms)
    page = _Page(settings, feed)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[None, None]:
        task = asyncio.create_task(feed.run(), name="feed")
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            thread.close()

    hosts = allowed_hosts(settings.host, settings.hosts)
    app = Starlette(
        lifespan=lifespan,
        # Compression leaves event streams and what is compressed already alone.
        middleware=[Middleware(Guard, hosts=hosts), Middleware(GZipMiddleware, minimum_size=1024)],
        routes=[
            Route("/", page.index),
            Route("/api/board/live", page.live),
            Route("/events", page.events),
            Route("/static/{name}", page.static.serve),
            Route("/healthz", page.healthz),
            Route("/readyz", page.readyz),
            Route("/metrics", page.metrics),
        ],
    )
    app.state.close_streams = page.close_streams
    return app
