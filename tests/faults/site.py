"""One installation on the services of a fault run: its workers, its agent, and when all that was sent is accounted.

The services may be away at any moment: whatever is asked of them here waits, within bounds, until they are back.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpuledger.local.children import describe_exit, read_tail
from gpuledger.local.guard import spawn
from gpuledger.schemas.topics import TOPICS
from gpuledger.streams.brokers import end_offsets
from tests.e2e.load import Offsets
from tests.e2e.orders import Order, Orders
from tests.e2e.pipeline import REPOSITORY, Installation, WorkerProcess
from tests.faults.disks import Disk
from tests.faults.sender import read_number, write_number
from tests.faults.services import SESSION_TIMEOUT_S, Service

__all__ = ["FaultsFailed", "Site"]

_POLL_S = 0.2
#: Older minutes wait so long for more marks of their pool: shorter than in production, so that faults find slices.
_SETTLE_MS = 300
#: One wait; many times what a busy machine needs.
PATIENCE_S = 420.0
_NOT_MARKS = [name for name in TOPICS if name not in ("dirty", "alerts", "deadletter")]


class FaultsFailed(Exception):
    """The run cannot go on: what was waited for never came."""


@dataclass
class Site:
    """`wanted` workers are kept running: one that ended is replaced, and noted in `ended_alone` unless we ended it."""

    installation: Installation
    services: Sequence[Service]
    directory: Path
    spool: Disk
    load_file: Path
    wrong: str | None = None
    wanted: int = 1
    ended_alone: dict[int, str] = field(default_factory=dict[int, str])
    sender_starts: int = 0
    _killed: set[int] = field(default_factory=set[int])
    _sender: Any = None

    def __post_init__(self) -> None:
        self.orders = Orders(self.directory / "orders")
        (self.directory / "load.db").symlink_to(self.load_file)

    # -- processes

    @property
    def workers(self) -> list[WorkerProcess]:
        """Those that have not ended."""
        return [worker for worker in self.installation.workers if worker.running]

    @property
    def memory(self) -> Path:
        """Made by the agent when its spool turns to memory."""
        return self.directory / "memory"

    def refusals(self) -> int:
        """How often the workers were refused for want of disk."""
        logs = (worker.log() for worker in self.installation.workers)
        return sum(len(re.findall(r"NOT_ENOUGH_SPACE|No space left|File too large", log)) for log in logs)

    @property
    def sender_pid(self) -> int:
        return int(self._sender.pid)

    def killed(self, pid: int) -> None:
        """Its end is ours, not its own."""
        self._killed.add(pid)
        self.ended_alone.pop(pid, None)

    def tend(self) -> None:
        """Replaces what has ended. A service ends by itself where its disk did not take what it wrote."""
        for service in self.services:
            service.tend()
        for worker in self.installation.workers:
            status = worker.process.poll()
            if status is not None and worker.process.pid not in self._killed:
                name = worker.log_file.name
                self.ended_alone[worker.process.pid] = f"{name} {describe_exit(status)}: {_last_error(worker.log())}"
        for _ in range(self.wanted - len(self.workers)):
            options = ["--orders", str(self.orders.path), "--session-timeout", str(SESSION_TIMEOUT_S)]
            options += ["--settle", str(_SETTLE_MS), *(["--wrong", self.wrong] if self.wrong else [])]
            self.installation.start_worker(None, *options)
        if self._sender is None or self._sender.poll() is not None:
            if self._sender is not None and self._sender.pid not in self._killed:
                self.ended_alone[self._sender.pid] = f"the agent {describe_exit(self._sender.returncode)}"
            self._start_sender()

    def _start_sender(self) -> None:
        argv = [sys.executable, "-m", "tests.faults.sender", str(self.directory), str(self.spool.directory / "spool")]
        with (self.directory / "sender.log").open("ab") as log:
            self._sender = spawn(argv, output=log, env=self.installation.env, cwd=REPOSITORY)
        self.sender_starts += 1

    def kill(self, pid: int) -> None:
        """kill -9 of a worker or the agent."""
        self.killed(pid)
        os.kill(pid, signal.SIGKILL)
        self.ended(pid)

    def ended(self, pid: int) -> None:
        """Returns when the process has ended."""
        for process in (self._sender, *(worker.process for worker in self.installation.workers)):
            if process.pid == pid:
                process.wait(PATIENCE_S)

    def retire(self, left: int) -> None:
        """Workers leave by SIGTERM, the oldest first, until `left` are there."""
        self.wanted = left
        for worker in self.workers[: max(0, len(self.workers) - left)]:
            self.killed(worker.process.pid)
            try:
                status = worker.stop()
            except Exception:
                self.ended_alone[worker.process.pid] = f"{worker.log_file.name} did not end on SIGTERM within 20 s"
                worker.end()
                continue
            if status:
                self.ended_alone[worker.process.pid] = f"{worker.log_file.name} {describe_exit(status)} on SIGTERM"

    def close(self) -> None:
        if self._sender is not None and self._sender.poll() is None:
            self._sender.kill()
            self._sender.wait(10)

    # -- waiting

    def until(self, condition: Callable[[], object], what: str, patience_s: float = PATIENCE_S) -> Any:
        """The first true answer. Raises FaultsFailed with the ends of the logs."""
        deadline_s = time.monotonic() + patience_s
        error: Exception | None = None
        while True:
            self.tend()
            try:
                found = condition()
            except Exception as away:  # the services may be gone or starting: every kind of client error
                found, error = None, away
            if found:
                return found
            if time.monotonic() > deadline_s:
                raise FaultsFailed(f"gave up waiting until {what}; last error: {error}\n{self.logs()}")
            time.sleep(_POLL_S)

    def logs(self) -> str:
        """The ends of all logs, for a person."""
        parts = [(worker.log_file.name, worker.log()) for worker in self.installation.workers[-3:]]
        parts += [("sender.log", read_tail(self.directory / "sender.log"))]
        parts += [(service.name, service.log()) for service in self.services]
        errors = [f"--- error of {worker.log_file.name}: {_last_error(worker.log())}" for worker in self.workers]
        ends = [f"--- {name}\n" + "\n".join(text.splitlines()[-20:]) for name, text in parts]
        return "\n".join([*ends, *errors])

    # -- the load

    def allow(self, messages: int) -> None:
        """The agent may send up to there."""
        write_number(self.directory / "wanted", messages)

    def sent(self) -> bool:
        """Whether the broker has all that was allowed."""
        return read_number(self.directory / "drained") >= read_number(self.directory / "wanted")

    def give(self, order: Order) -> None:
        self.orders.give(order)

    def ends(self, topics: Sequence[str] = _NOT_MARKS) -> Offsets:
        """The last offsets of the topics."""
        found: Offsets = {}
        for topic in topics:
            counts = self.installation.config.kafka.partitions[topic]
            ends = asyncio.run(_bounded(end_offsets(self.installation.config.kafka, topic, counts)))
            found |= {(topic, partition): end - 1 for partition, end in ends.items()}
        return found

    def caught_up(self) -> None:
        """Returns when all that was allowed is sent, stored, marked and worked off."""
        self.until(self.sent, "the agent has sent everything")
        stored = self.until(self.ends, "the broker tells its offsets")
        self.until(self.installation.reached(stored), "everything is stored")
        marked = self.until(lambda: self.ends(["dirty"]), "the broker tells its offsets")
        self.until(self.installation.reached(marked), "all marks are worked off")


async def _bounded(coroutine: Any) -> Any:
    async with asyncio.timeout(20):
        return await coroutine


def _last_error(log: str) -> str:
    lines = [line for line in log.splitlines() if re.search(r"rror|obeys|failed", line)]
    return (lines or log.splitlines() or [""])[-1][:300]
