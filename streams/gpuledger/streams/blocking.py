"""Blocking calls of an asyncio program, one after the other in one daemon thread.

An executor would do the same until a call hangs: then the interpreter waits for its thread for ever on the way out.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from typing import TypeVar, cast

__all__ = ["BlockingThread"]

_log = logging.getLogger(__name__)

R = TypeVar("R")


class BlockingThread:
    """Runs calls in the order they come; a call that hangs holds up later ones, but never the end of the process.

    The thread begins with the first call.
    """

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)

    async def call(self, function: Callable[[], R]) -> R:
        """The result of `function()`, or what it raised. Cancelling the wait does not stop the call."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[R] = loop.create_future()

        def settle(result: R | None, error: BaseException | None) -> None:
            if answer.cancelled():
                return
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(cast(R, result))

        def work() -> None:
            result: R | None = None
            error: BaseException | None = None
            try:
                result = function()
            except BaseException as exc:
                # A future refuses StopIteration, and the caller would then wait for ever.
                error = RuntimeError(repr(exc)) if isinstance(exc, StopIteration) else exc
            try:
                loop.call_soon_threadsafe(settle, result, error)
            except RuntimeError:
                _log.info("a blocking call ended after its event loop had closed")

        self._calls.put(work)
        if self._thread.ident is None:
            self._thread.start()
        return await answer

    def close(self) -> None:
        """End the thread after the calls already made; does not wait for it."""
        self._calls.put(None)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
