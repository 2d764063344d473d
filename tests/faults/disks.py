"""A disk that can be made full and free again, for a process whose data lie on it.

As root it is a small file system in memory, shrunk to what it holds. Without that right the process's own limit of file
size does it: every write that would make a file longer fails, the space of the machine is left alone.
"""

from __future__ import annotations

import ctypes
import logging
import resource
import shutil
import subprocess
from pathlib import Path
from typing import Protocol

__all__ = ["Disk", "LimitedDisk", "SmallDisk", "make_disk", "private_mounts"]

log = logging.getLogger("tests.faults")

_CLONE_NEWNS = 0x0002_0000
_MS_REC_PRIVATE = 0x4000 | 0x4_0000
#: Left free on a full disk: less than one insert needs.
_LEFT_BYTES = 16 * 1024


class Disk(Protocol):
    """Where one process keeps its data."""

    directory: Path
    kind: str

    def fill(self, pid: int) -> None:
        """From now on `pid` cannot write there."""
        ...

    def free(self, pid: int) -> None:
        """It can again. May be repeated."""
        ...

    def close(self) -> None: ...


def private_mounts() -> bool:
    """Whether this process may mount; then what it mounts is seen by it and its children only, and ends with them.

    Call it first, while there is one thread."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS):
        return False
    return libc.mount(b"none", b"/", None, _MS_REC_PRIVATE, None) == 0


def make_disk(directory: Path, may_mount: bool, size_mib: int) -> Disk:
    """A disk at `directory`, small where mounting works."""
    directory.mkdir(parents=True, exist_ok=True)
    if may_mount:
        try:
            return SmallDisk(directory, size_mib)
        except subprocess.CalledProcessError as error:
            log.warning("no small disk: %s; a limit of file size instead", error.stderr.decode().strip())
    return LimitedDisk(directory)


class SmallDisk:
    """A tmpfs."""

    kind = "small tmpfs"

    def __init__(self, directory: Path, size_mib: int) -> None:
        """Raises CalledProcessError where it may not be mounted."""
        self.directory = directory
        self._size = size_mib << 20
        self._mount(f"size={self._size},mode=0700", "-t", "tmpfs", "tmpfs")

    def _mount(self, options: str, *rest: str) -> None:
        subprocess.run(["mount", "-o", options, *rest, str(self.directory)], check=True, capture_output=True)

    def fill(self, pid: int) -> None:
        del pid
        for _ in range(20):
            used = shutil.disk_usage(self.directory).used
            try:
                self._mount(f"remount,size={used + _LEFT_BYTES}")
                return
            except subprocess.CalledProcessError:
                continue  # it grew meanwhile
        raise OSError(f"{self.directory}: could not be made full")

    def free(self, pid: int) -> None:
        del pid
        self._mount(f"remount,size={self._size}")

    def close(self) -> None:
        # Lazily: a process that was killed may not be quite gone.
        subprocess.run(["umount", "--lazy", str(self.directory)], check=False, capture_output=True)


class LimitedDisk:
    """A plain directory; full is what its process is told by RLIMIT_FSIZE (EFBIG instead of ENOSPC)."""

    kind = "limit of file size"

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def fill(self, pid: int) -> None:
        self._limit(pid, _LEFT_BYTES)

    def free(self, pid: int) -> None:
        try:
            self._limit(pid, resource.prlimit(pid, resource.RLIMIT_FSIZE)[1])
        except ProcessLookupError:
            pass  # it did not survive; the next one starts without a limit

    def _limit(self, pid: int, limit: int) -> None:
        # Only the soft limit: a process of ours could not raise the hard one again.
        hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, hard))

    def close(self) -> None:
        pass
