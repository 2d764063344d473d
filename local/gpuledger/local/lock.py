"""One process at a time per data directory.

The kernel holds the lock (flock), so a holder that dies, even by kill -9, frees it at once; the pid in the file
only serves the error message.
"""

import fcntl
import os
import time
from pathlib import Path
from types import TracebackType

from gpuledger.local.exceptions import DirectoryInUse

__all__ = ["LOCK_FILE_NAME", "DirectoryLock"]

LOCK_FILE_NAME = ".gpuledger.lock"

# A holder writes its pid just after it got the lock: a rival that looks in between waits this long for it.
_PID_ATTEMPTS = 20
_PID_PAUSE_S = 0.01


class DirectoryLock:
    """Exclusive use of the directory `path` by this process, for the service named `what`.

    The directory is made where it is missing. The lock file stays behind after a release: deleting it would let two
    processes lock two different files of the same name. The lock is not inherited by child processes.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path = path
        self.what = what
        self._file_descriptor: int | None = None

    def acquire(self) -> None:
        """Takes the lock without waiting; taking it again is a no-op.

        Raises DirectoryInUse where another process, or another DirectoryLock of this one, holds it; OSError where the
        directory cannot be made or written.
        """
        if self._file_descriptor is not None:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        # Opened without O_TRUNC: the pid of a living holder must not be wiped by whoever only tries.
        descriptor = os.open(self.path / LOCK_FILE_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = _read_pid(descriptor)
            os.close(descriptor)
            raise DirectoryInUse(self.path, self.what, pid) from None
        except BaseException:
            os.close(descriptor)
            raise
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        self._file_descriptor = descriptor

    def release(self) -> None:
        """Gives the directory back; without a held lock a no-op."""
        descriptor, self._file_descriptor = self._file_descriptor, None
        if descriptor is not None:
            os.ftruncate(descriptor, 0)
            os.close(descriptor)

    @property
    def held(self) -> bool:
        return self._file_descriptor is not None

    def __enter__(self) -> "DirectoryLock":
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _read_pid(descriptor: int) -> int | None:
    for _ in range(_PID_ATTEMPTS):
        text = os.pread(descriptor, 32, 0).strip()
        if text.isdigit():
            return int(text)
        time.sleep(_PID_PAUSE_S)
    return None
