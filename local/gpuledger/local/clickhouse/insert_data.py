"""The data of an INSERT as a file that the engine can open, without a name that anybody else could.

The engine's own way to take data piece by piece (`send_insert`) loses the errors of the table it writes to: on a full
disk, or where a constraint is violated, it reports success and stores nothing. A statement that reads a file does not.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

__all__ = ["InsertData"]


class InsertData:
    """Holds the chunks, in memory up to `memory_bytes`, beyond that in an unlinked file in `directory`.

    `path` is for this process only and ends with the `with` block. Raises OSError where the disk is full.
    """

    def __init__(self, chunks: Iterable[bytes], memory_bytes: int, directory: Path) -> None:
        self._descriptor = os.memfd_create("insert", os.MFD_CLOEXEC)
        try:
            self._take(chunks, memory_bytes, directory)
        except BaseException:
            os.close(self._descriptor)
            raise

    def _take(self, chunks: Iterable[bytes], memory_bytes: int, directory: Path) -> None:
        size = 0
        in_memory = True
        for chunk in chunks:
            size += len(chunk)
            if in_memory and size > memory_bytes:
                in_memory = False
                self._move(directory)
            left = memoryview(chunk)
            while left:
                left = left[os.write(self._descriptor, left) :]

    def _move(self, directory: Path) -> None:
        """What is in memory goes to a file, and all that follows."""
        descriptor, name = tempfile.mkstemp(dir=directory)
        try:
            Path(name).unlink()
            os.lseek(self._descriptor, 0, os.SEEK_SET)
            while chunk := os.read(self._descriptor, 1 << 20):
                left = memoryview(chunk)
                while left:
                    left = left[os.write(descriptor, left) :]
        except BaseException:
            os.close(descriptor)
            raise
        os.close(self._descriptor)
        self._descriptor = descriptor

    @property
    def path(self) -> str:
        return f"/proc/self/fd/{self._descriptor}"

    def __enter__(self) -> InsertData:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)
