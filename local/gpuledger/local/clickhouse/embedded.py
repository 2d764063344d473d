"""The embedded ClickHouse as a child process, for the supervisor and for tests."""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from gpuledger.local.children import STOP_TIMEOUT_S, Child, ChildSpec
from gpuledger.local.clickhouse.users import Users
from gpuledger.local.exceptions import ServiceFailed
from gpuledger.local.lock import DirectoryLock
from gpuledger.local.ports import LOOPBACK, check_port

__all__ = ["EmbeddedClickHouse"]

_NAME = "clickhouse"


class EmbeddedClickHouse:
    """One ClickHouse with its data under `directory`; start() returns when clients can use it.

    `port` 0 or None takes a free one, new at each start. `users` is `{name: {password | password_sha256, readonly}}`;
    None means the user `default` without password. It listens on loopback.
    """

    def __init__(
        self,
        directory: Path,
        port: int | None = None,
        *,
        users: Mapping[str, Any] | None = None,
        memory_bytes: int | None = None,
        ready_timeout_s: float = 60.0,
    ) -> None:
        self.directory = directory.absolute()
        self._wanted_port = port or 0
        self._users = users
        self._memory_bytes = memory_bytes
        self._ready_timeout_s = ready_timeout_s
        self._child: Child | None = None
        self._port: int | None = None

    @property
    def name(self) -> str:
        return _NAME

    @property
    def port(self) -> int:
        """Raises ServiceFailed before the first start."""
        if self._port is None:
            raise ServiceFailed(_NAME, "was not started")
        return self._port

    @property
    def url(self) -> str:
        """Without a user; raises ServiceFailed before the first start."""
        return f"http://{LOOPBACK}:{self.port}"

    @property
    def pid(self) -> int:
        return self._started().pid

    @property
    def log_file(self) -> Path:
        return self.directory / "logs" / "clickhouse.log"

    def start(self, cancelled: Callable[[], bool] = lambda: False) -> None:
        """Starts the process and returns when it answers.

        Raises UsersError, DirectoryInUse, PortTaken (only for a port asked for), ServiceFailed with the tail of the
        log, StartCancelled; nothing runs afterwards.
        """
        if self._child is not None and self._child.poll() is None:
            raise ServiceFailed(_NAME, f"runs already, as process {self._child.pid}")
        Users.parse(self._users)
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Asked here for a good error; the child takes the lock itself.
        with DirectoryLock(self.directory, _NAME):
            pass
        if self._wanted_port:
            check_port(self._wanted_port, _NAME)
        port_file = self.directory / "port"
        port_file.unlink(missing_ok=True)
        spec = ChildSpec(
            name=_NAME,
            argv=self._argv(port_file),
            log_file=self.log_file,
            ready=port_file.exists,
            ready_timeout_s=self._ready_timeout_s,
        )
        self._child = Child(spec)
        self._child.start(cancelled)
        self._port = int(port_file.read_text())

    def poll(self) -> int | None:
        return self._started().poll()

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Stops the process, by SIGKILL once `timeout_s` has passed. May be repeated."""
        if self._child is not None:
            self._child.stop(timeout_s)

    def kill(self) -> None:
        """Ends it at once; nothing acknowledged is lost."""
        if self._child is not None:
            self._child.kill()

    def failure(self) -> ServiceFailed:
        return self._started().failure()

    def __enter__(self) -> "EmbeddedClickHouse":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _argv(self, port_file: Path) -> list[str]:
        argv = [sys.executable, "-m", "gpuledger.local.clickhouse", "--data", str(self.directory)]
        argv += ["--host", LOOPBACK, "--port", str(self._wanted_port), "--port-file", str(port_file)]
        if self._memory_bytes is not None:
            argv += ["--memory", str(self._memory_bytes)]
        if self._users is not None:
            # Not on the command line, which every local user can read.
            users_file = self.directory / "users.json"
            with contextlib.suppress(FileNotFoundError):
                users_file.unlink()
            descriptor = os.open(users_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(self._users, file)
            argv += ["--users", str(users_file)]
        return argv

    def _started(self) -> Child:
        if self._child is None:
            raise ServiceFailed(_NAME, "was not started")
        return self._child
