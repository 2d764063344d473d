"""The small supervisor behind `gpuledger up`: starts services one after the other, notices the first that dies, and
stops them in reverse order within a fixed time.
"""

import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol

from gpuledger.local.exceptions import ServiceFailed, StartCancelled
from gpuledger.local.guard import spawn

__all__ = ["STOP_TIMEOUT_S", "Child", "ChildSpec", "Service", "Supervisor", "describe_exit", "read_tail"]

STOP_TIMEOUT_S = 10.0

# What a service that is slow to stop must leave to each one that is stopped after it.
_RESERVE_S = 1.5
_POLL_S = 0.05
_TAIL_LINES = 20
_TAIL_BYTES = 16_384


def _never() -> bool:
    return False


class Service(Protocol):
    """What the supervisor needs of a service; Child and EmbeddedKafka are such."""

    @property
    def name(self) -> str: ...

    @property
    def pid(self) -> int:
        """The process whose end is the service's end."""
        ...

    def start(self, cancelled: Callable[[], bool] = ...) -> None:
        """Returns when ready; raises a LocalError otherwise, StartCancelled once `cancelled()` is true."""
        ...

    def poll(self) -> int | None:
        """None while it runs, else its exit status as in subprocess."""
        ...

    def stop(self, timeout_s: float = ...) -> None:
        """Asks it to end and kills it when `timeout_s` has passed; returns when it has ended. May be repeated."""
        ...

    def kill(self) -> None:
        """Ends it at once, without waiting; may be called from a signal handler."""
        ...

    def failure(self) -> ServiceFailed:
        """The error that tells how it ended, with the tail of its log."""
        ...


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """How to run one child process.

    `env` None inherits ours. `ready` is asked repeatedly until it is true; None means ready at once. What the child
    prints goes to `log_file`; that of the previous run is kept beside it as `<name>.1`.
    """

    name: str
    argv: Sequence[str]
    log_file: Path
    env: Mapping[str, str] | None = None
    cwd: Path | None = None
    ready: Callable[[], bool] | None = None
    ready_timeout_s: float = 30.0


class Child:
    """One child process that dies with this one; see ChildSpec."""

    def __init__(self, spec: ChildSpec) -> None:
        self.spec = spec
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def pid(self) -> int:
        return self._started().pid

    def start(self, cancelled: Callable[[], bool] = _never) -> None:
        """Starts the process and returns when it is ready.

        Raises ServiceFailed where it ends before or is not ready in time, StartCancelled once `cancelled()` is true;
        the process is ended in all these cases.
        """
        if self._process is not None and self._process.poll() is None:
            raise ServiceFailed(self.name, f"runs already, as process {self._process.pid}")
        log_file = self.spec.log_file
        log_file.parent.mkdir(parents=True, exist_ok=True)
        if log_file.exists():
            log_file.replace(log_file.with_name(log_file.name + ".1"))
        with log_file.open("wb") as output:
            self._process = spawn(self.spec.argv, output=output, env=self.spec.env, cwd=self.spec.cwd)
        try:
            self._wait_ready(cancelled)
        except BaseException:
            self.stop(0)
            raise

    def _wait_ready(self, cancelled: Callable[[], bool]) -> None:
        deadline = time.monotonic() + self.spec.ready_timeout_s
        while self.spec.ready is not None and not self.spec.ready():
            if self.poll() is not None:
                raise self.failure("before it was ready")
            if cancelled():
                raise StartCancelled(self.name)
            if time.monotonic() > deadline:
                raise ServiceFailed(
                    self.name, f"not ready after {self.spec.ready_timeout_s:g} s", self.spec.log_file, self.log_tail()
                )
            time.sleep(_POLL_S)

    def poll(self) -> int | None:
        return self._started().poll()

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """SIGTERM, then after `timeout_s` SIGKILL to it and whatever it started. A no-op where it never ran."""
        process = self._process
        if process is None:
            return
        if process.poll() is None and timeout_s > 0:
            process.terminate()
            try:
                process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                pass
        self.kill()
        process.wait()

    def kill(self) -> None:
        process = self._process
        # Only while it has not been waited for: afterwards its number may belong to a stranger.
        if process is not None and process.returncode is None:
            try:
                # It leads a group of its own (guard.spawn).
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                process.kill()

    def log_tail(self) -> str:
        return read_tail(self.spec.log_file)

    def failure(self, when: str = "") -> ServiceFailed:
        how = describe_exit(self.poll())
        return ServiceFailed(self.name, f"{how} {when}".rstrip(), self.spec.log_file, self.log_tail())

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise ServiceFailed(self.name, "was not started")
        return self._process


def describe_exit(status: int | None) -> str:
    """`status` as of subprocess, in words."""
    if status is None:
        return "still runs"
    if status < 0:
        return f"was ended by signal {signal.Signals(-status).name}"
    return f"ended with status {status}"


def read_tail(log_file: Path, lines: int = _TAIL_LINES) -> str:
    """The last lines of a log, at most 16 KiB of them; empty where there is none."""
    try:
        with log_file.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
    except FileNotFoundError:
        return ""


class Supervisor:
    """Owns services while its `with` block runs; use it in the main thread to have SIGTERM and SIGINT handled.

        with Supervisor() as supervisor:
            supervisor.start(kafka)
            supervisor.start(worker)
            supervisor.wait()

    Leaving the block stops everything. A second signal during the stop kills what is left at once.
    """

    def __init__(self, stop_timeout_s: float = STOP_TIMEOUT_S) -> None:
        self._stop_timeout_s = stop_timeout_s
        self._services: list[Service] = []
        self._signal: signal.Signals | None = None
        self._stopping = False
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def signal_received(self) -> signal.Signals | None:
        """The first signal that asked for the end, if any."""
        return self._signal

    def __enter__(self) -> "Supervisor":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.stop()
        finally:
            for number, handler in self._previous.items():
                signal.signal(number, handler)
            os.close(self._wake_read)
            os.close(self._wake_write)

    def start(self, service: Service) -> None:
        """Starts `service` and returns when it is ready.

        Raises what its start raises, StartCancelled after a signal, and ServiceFailed for a service started earlier
        that has ended meanwhile.
        """
        if self._signal is not None:
            raise StartCancelled(service.name)
        # Listed first: a second signal must find it even while it starts.
        self._services.append(service)
        try:
            service.start(lambda: self._signal is not None)
        except BaseException:
            self._services.remove(service)
            raise
        self.check()

    def check(self) -> None:
        """Raises ServiceFailed for the first service that has ended."""
        for service in self._services:
            if service.poll() is not None:
                raise service.failure()

    def wait(self, timeout_s: float | None = None) -> signal.Signals | None:
        """Sleeps until a signal comes (returned) or the time is over (None); raises ServiceFailed when one ends."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        poller = select.poll()
        poller.register(self._wake_read, select.POLLIN)
        descriptors = [os.pidfd_open(service.pid) for service in self._services if service.poll() is None]
        try:
            for descriptor in descriptors:
                poller.register(descriptor, select.POLLIN)
            while self._signal is None:
                self.check()
                remaining_s = None if deadline is None else deadline - time.monotonic()
                if remaining_s is not None and remaining_s <= 0:
                    return None
                poller.poll(None if remaining_s is None else remaining_s * 1000)
            return self._signal
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def stop(self) -> None:
        """Stops the services, the last started first, all within the stop timeout; may be repeated."""
        self._stopping = True
        deadline = time.monotonic() + self._stop_timeout_s
        while self._services:
            reserve_s = _RESERVE_S * (len(self._services) - 1)
            self._services[-1].stop(max(0.0, deadline - reserve_s - time.monotonic()))
            self._services.pop()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None and self._stopping:
            for service in self._services:
                service.kill()
        self._signal = self._signal or signal.Signals(number)
        try:
            os.write(self._wake_write, b"x")
        except BlockingIOError:
            pass  # the pipe is full of earlier wake-ups
