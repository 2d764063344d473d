"""The broker and the engine of a fault run: the real embedded ones, which can be killed, paused, and lose their disk.

They keep their ports over restarts, as services of an installation do. All of them end with the run.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

from gpuledger.local.children import read_tail
from gpuledger.local.clickhouse import EmbeddedClickHouse
from gpuledger.local.exceptions import DirectoryInUse, PortTaken, ServiceFailed
from gpuledger.local.kafka import EmbeddedKafka
from gpuledger.local.ports import check_port
from tests.faults.disks import Disk, make_disk

__all__ = ["SESSION_TIMEOUT_S", "Service", "make_broker", "make_clickhouse", "resume", "stop"]

#: Short, so that a member that was killed or stopped is replaced soon. The broker must allow it.
SESSION_TIMEOUT_S = 4
_START_ATTEMPTS = 8
_MEMORY_BYTES = 2 << 30
#: A start on a machine that is busy with other things.
_READY_S = 240.0


def stop(pid: int) -> None:
    """SIGSTOP: it holds its connections and says nothing."""
    os.kill(pid, signal.SIGSTOP)


def resume(pid: int) -> None:
    """SIGCONT."""
    os.kill(pid, signal.SIGCONT)


class Service:
    """One of the two, on a disk of its own."""

    def __init__(self, service: EmbeddedKafka | EmbeddedClickHouse, disk: Disk) -> None:
        self._service = service
        self.disk = disk
        self.starts = 0
        self._full = False

    @property
    def name(self) -> str:
        return self._service.name

    @property
    def port(self) -> int:
        return self._service.port

    @property
    def pid(self) -> int:
        return self._service.pid

    @property
    def running(self) -> bool:
        return self.starts > 0 and self._service.poll() is None

    def start(self) -> None:
        """Returns when it answers. Raises ServiceFailed."""
        for attempt in range(_START_ATTEMPTS):
            try:
                self._service.start()
                self.starts += 1
                return
            except (PortTaken, DirectoryInUse):
                # The kernel still closes what the killed one had open.
                if attempt + 1 == _START_ATTEMPTS:
                    raise
                time.sleep(0.5)

    def kill(self) -> None:
        """kill -9; returns when it is gone."""
        self._service.stop(0)

    def fill_disk(self) -> None:
        """From now on it cannot write, and may end."""
        self._full = True
        self.disk.fill(self.pid)

    def free_disk(self) -> None:
        """It can again."""
        self.disk.free(self.pid)
        self._full = False
        self.tend()

    def tend(self) -> None:
        """Starts it again where it has ended, as a service manager does; on a full disk that has no sense."""
        if self.starts and not self._full and not self.running:
            self.kill()
            self.start()

    def log(self) -> str:
        return read_tail(self._service.log_file)

    def close(self) -> None:
        if self.starts:
            self._service.stop(5)
        self.disk.close()


def make_broker(directory: Path, may_mount: bool) -> Service:
    """Kafka, not started."""
    disk = make_disk(directory / "kafka", may_mount, 4096)
    # An index is laid out at its full size before it is used.
    settings = {"group.min.session.timeout.ms": 1000, "log.index.size.max.bytes": 1 << 20}
    broker = EmbeddedKafka(disk.directory / "broker", _lasting_port(), settings=settings, ready_timeout_s=_READY_S)
    return Service(broker, disk)


def make_clickhouse(directory: Path, may_mount: bool) -> Service:
    """ClickHouse's engine, not started."""
    disk = make_disk(directory / "clickhouse", may_mount, 4096)
    engine = EmbeddedClickHouse(
        disk.directory / "engine", _lasting_port(), memory_bytes=_MEMORY_BYTES, ready_timeout_s=_READY_S
    )
    return Service(engine, disk)


def _lasting_port() -> int:
    """One that nobody is given by the kernel while its service is down."""
    for port in random.SystemRandom().sample(range(20_000, 30_000), 50):
        try:
            check_port(port, "fault suite")
        except PortTaken:
            continue
        return port
    raise ServiceFailed("fault suite", "found no free port between 20000 and 30000")
