"""Watching a process that is not our child, by a handle that cannot come to mean another one."""

import os
import select
from types import TracebackType

__all__ = ["ProcessHandle"]


class ProcessHandle:
    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._descriptor = os.pidfd_open(pid)

    def ended(self, within_s: float) -> bool:
        return bool(select.select([self._descriptor], [], [], within_s)[0])

    def __enter__(self) -> "ProcessHandle":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)
