"""A request body taken in completely before anything runs: a broken or slow upload inserts nothing and holds no thread,
and what is too large for memory waits in a file.
"""

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

from gpuledger.local.clickhouse.engine import Limits
from gpuledger.local.clickhouse.errors import EngineError

__all__ = ["Body", "Disconnected", "Receive", "receive_body"]

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

_CHUNK_BYTES = 1024 * 1024


class Disconnected(Exception):
    """The client went away."""


class Body:
    """A complete body, still in its content encoding; read from one thread at a time."""

    def __init__(self, file: tempfile.SpooledTemporaryFile[bytes], size: int) -> None:
        self._file = file
        self.size = size

    def chunks(self) -> Iterator[bytes]:
        """From the beginning."""
        self._file.seek(0)
        while chunk := self._file.read(_CHUNK_BYTES):
            yield chunk

    def close(self) -> None:
        self._file.close()


async def receive_body(receive: Receive, limits: Limits, directory: Path) -> Body:
    """Reads the whole body; past `limits.body_memory_bytes` into a file without name in `directory`.

    Raises Disconnected, EngineError 209 (408) where the client sends nothing for `limits.receive_timeout_s`, 229 (413)
    for a body over `limits.max_body_bytes`, and 243 where the disk is full.
    """
    # Unlinked at once, so that a killed process leaves nothing behind; the caller closes it with the body.
    file = tempfile.SpooledTemporaryFile(max_size=limits.body_memory_bytes, dir=str(directory))  # noqa: SIM115
    size = 0
    try:
        while True:
            try:
                async with asyncio.timeout(limits.receive_timeout_s):
                    message = await receive()
            except TimeoutError:
                raise EngineError.of(
                    "SOCKET_TIMEOUT", f"No data received for {limits.receive_timeout_s:g} seconds", 408
                ) from None
            if message["type"] == "http.disconnect":
                raise Disconnected
            data: bytes = message.get("body", b"")
            size += len(data)
            if size > limits.max_body_bytes:
                raise EngineError.of(
                    "QUERY_IS_TOO_LARGE", f"The request body is larger than {limits.max_body_bytes} bytes"
                )
            try:
                file.write(data)
            except OSError as error:
                raise EngineError.of("NOT_ENOUGH_SPACE", f"Cannot take the request body: {error}") from error
            if not message.get("more_body", False):
                return Body(file, size)
    except BaseException:
        file.close()
        raise
