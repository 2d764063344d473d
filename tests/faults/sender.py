"""The agent of the fault suite: a process that sends the recorded load through the agents' own spool and publisher.

Started as ``python -m tests.faults.sender DIR SPOOL``. It sends what DIR/wanted allows and notes in DIR/position how
far it has come, always after the fact: killed at any point it sends again what it cannot know to be safe, so its end
means duplicates and never a loss.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gpuledger.agents.exceptions import SpoolChanged
from gpuledger.agents.messages import Message
from gpuledger.agents.publisher import Publisher
from gpuledger.agents.spool import MEMORY_MAX_BYTES, Spool
from gpuledger.schemas.config import load_config
from tests.e2e.orders import Orders
from tests.faults.load import stored_messages

__all__ = ["read_number", "write_number"]

log = logging.getLogger("tests.faults.sender")

_STEP = 40
_POLL_S = 0.05
_SPOOL_BYTES = 1 << 30
_SPOOL_AGE_MS = 48 * 3_600_000


def read_number(file: Path) -> int:
    """0 where there is none yet."""
    try:
        return int(file.read_text())
    except FileNotFoundError:
        return 0


def write_number(file: Path, number: int) -> None:
    """A reader never sees half of it, whatever kills the writer."""
    part = file.with_name(f"{file.name}.part")
    part.write_text(str(number))
    part.replace(file)


class _WatchedSpool(Spool):
    """The agents' spool, with a point between the broker's acknowledgement and its own deletion."""

    orders: Orders

    def acknowledge(self, numbers: Sequence[int]) -> None:
        if numbers:
            _come(self.orders, "sent")
        super().acknowledge(numbers)


def _come(orders: Orders, point: str) -> None:
    order = orders.look()
    if order is not None and (order.agent, order.point) == ("sender", point) and orders.take():
        log.warning("obeys: %s", order)
        os.kill(os.getpid(), signal.SIGKILL if order.action == "kill" else signal.SIGSTOP)


class _Sender:
    def __init__(self, directory: Path, spool_directory: Path) -> None:
        self._directory = directory
        self._orders = Orders(directory / "orders")
        self._spool = _WatchedSpool(spool_directory, _SPOOL_BYTES, _SPOOL_AGE_MS, _now_ms())
        self._spool.orders = self._orders
        self._position = read_number(directory / "position")
        self._wake = asyncio.Event()

    async def run(self) -> None:
        config = load_config(None, os.environ)
        async with Publisher(config.kafka, "faults-agent", patience_s=600) as publisher:
            draining = asyncio.create_task(publisher.drain(self._spool, self._wake, asyncio.Event()))
            while not draining.done():
                wanted = read_number(self._directory / "wanted")
                while self._position < wanted:
                    await self._step(min(wanted, self._position + _STEP))
                waiting = await asyncio.to_thread(self._spool.stats)
                if waiting.messages == 0:
                    write_number(self._directory / "position", self._position)
                    write_number(self._directory / "drained", self._position)
                await asyncio.sleep(_POLL_S)
            draining.result()

    async def _step(self, end: int) -> None:
        for _, message in stored_messages(self._directory / "load.db", self._position, end):
            await asyncio.to_thread(self._seal, message)
        self._wake.set()
        self._position = end
        # A spool stays in memory for a minute after its disk was full: this point is passed there too.
        _come(self._orders, "sealed")
        # What is in memory would be lost with this process: it is noted only when the broker has it.
        if self._spool.in_memory:
            (self._directory / "memory").touch()
            await self._room_in_memory()
        else:
            write_number(self._directory / "position", end)

    async def _room_in_memory(self) -> None:
        """Memory has a bound above which the oldest is dropped: this agent can wait, one that measures could not."""
        for _ in iter(lambda: self._spool.stats().bytes > MEMORY_MAX_BYTES // 4, False):
            await asyncio.sleep(_POLL_S)

    def _seal(self, message: Message) -> None:
        while True:
            now_ms = _now_ms()
            try:
                if message.topic == "telemetry":
                    self._spool.seal_batch("recorded", now_ms, now_ms, now_ms, lambda seq, gaps: message)
                else:
                    self._spool.seal_event(message, now_ms)
                return
            except SpoolChanged as change:
                log.warning("seals again: %s", change)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def main(directory: str, spool: str) -> None:
    """Runs until it is ended."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    asyncio.run(_Sender(Path(directory), Path(spool)).run())


if __name__ == "__main__":
    main(*sys.argv[1:])
