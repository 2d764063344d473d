"""Runs calls that may hang for ever, such as a driver's, without ever waiting for them longer than a deadline.

Daemon threads and no executor: at its end Python waits for executor threads, and a hung driver would keep the agent
alive.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["CallHung", "Watched"]

T = TypeVar("T")


class CallHung(Exception):
    """The call did not return before its deadline, or an earlier one still has not."""


class _Answer(Generic[T]):
    def __init__(self) -> None:
        self.done = threading.Event()
        self.values: list[T] = []
        self.error: BaseException | None = None


class Watched:
    """One thread that does one call at a time. While a call hangs, further ones fail at once; none pile up."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._hung: threading.Event | None = None
        self._thread: threading.Thread | None = None

    @property
    def hung(self) -> bool:
        """Whether a call that missed its deadline has still not returned."""
        if self._hung is not None and self._hung.is_set():
            self._hung = None
        return self._hung is not None

    def start(self, call: Callable[[], T]) -> Callable[[float], T]:
        """Begins the call; the function returned waits for it at most so many seconds and gives its result.

        The function raises what the call raised, or CallHung.
        """
        if self.hung:

            def refuse(_: float) -> T:
                raise CallHung(f"{self._name}: an earlier call still hangs")

            return refuse
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
            self._thread.start()
        answer: _Answer[T] = _Answer()

        def work() -> None:
            try:
                answer.values.append(call())
            except BaseException as error:  # whoever waits must get it
                answer.error = error
            answer.done.set()

        def wait(seconds: float) -> T:
            if not answer.done.wait(max(0.0, seconds)):
                self._hung = answer.done
                raise CallHung(f"{self._name}: no answer in {seconds:.1f} s")
            if answer.error is not None:
                raise answer.error
            return answer.values[0]

        self._work.put(work)
        return wait

    def call(self, call: Callable[[], T], seconds: float) -> T:
        """Does the call and waits for it; raises as the function of `start`."""
        return self.start(call)(seconds)

    def close(self) -> None:
        """Lets the thread end once it is idle."""
        self._work.put(None)

    def _serve(self) -> None:
        while True:
            work = self._work.get()
            if work is None:
                return
            work()
