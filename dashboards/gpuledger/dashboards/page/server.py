"""Runs the page in a process or a thread of its own, and stops it within seconds even while browsers are attached."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import cast

import uvicorn
from starlette.applications import Starlette

from gpuledger.dashboards.exceptions import DashboardError

__all__ = ["PageServer", "serve"]

#: Event streams are ended at the stop; a browser that does not read its last bytes would hold it up for ever.
_GRACE_S = 1


class PageServer(uvicorn.Server):
    """A uvicorn server on an address of its own choice; `port` is the real one, also when 0 was asked for."""

    def __init__(self, app: Starlette, host: str, port: int) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.socket = socket.socket(family)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self.socket.bind((host, port))
            # Who connects before the loop runs waits; nobody is refused.
            self.socket.listen(128)
        except OSError as error:
            self.socket.close()
            raise DashboardError(
                f"{host}:{port}: cannot listen there: {error.strerror}; choose another with --host and --port"
            ) from error
        self.port: int = self.socket.getsockname()[1]
        shown = f"[{host}]" if family == socket.AF_INET6 else host
        self.url = f"http://{shown}:{self.port}/"
        # Logging belongs to the process; its own access log would name every heartbeat.
        config = uvicorn.Config(
            app, log_config=None, access_log=False, timeout_graceful_shutdown=_GRACE_S, server_header=False
        )
        super().__init__(config)
        self._close_streams = cast("Callable[[], None]", app.state.close_streams)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._close_streams()
        await super().shutdown(sockets)

    def start_in_thread(self) -> threading.Thread:
        """Serves from a daemon thread; set `should_exit` to end it."""
        thread = threading.Thread(target=self.run, kwargs={"sockets": [self.socket]}, name="page", daemon=True)
        thread.start()
        return thread


def serve(app: Starlette, host: str, port: int, ready: Callable[[str], None] = lambda url: None) -> None:
    """Serves until SIGTERM or Ctrl-C; calls `ready` with the page's address once connections are accepted.

    Raises:
        DashboardError: the address cannot be listened on.
    """
    server = PageServer(app, host, port)
    ready(server.url)
    server.run(sockets=[server.socket])
