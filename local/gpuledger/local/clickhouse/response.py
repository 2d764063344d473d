"""Answers as ClickHouse's HTTP port gives them: headers, summary, errors, and the block that ends a body in which an
error came too late for the status line.
"""

import asyncio
import json
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from gpuledger.local.clickhouse.body import Disconnected
from gpuledger.local.clickhouse.compression import choose_encoding, encoder
from gpuledger.local.clickhouse.engine import Stats
from gpuledger.local.clickhouse.errors import EngineError

__all__ = ["DISPLAY_NAME", "Response", "Send"]

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

DISPLAY_NAME = "gpuledger"

_PIECE_BYTES = 1024 * 1024

_CONTENT_TYPES = {
    "CSV": "text/csv; charset=UTF-8; header=absent",
    "CSVWITHNAMES": "text/csv; charset=UTF-8; header=present",
    "CSVWITHNAMESANDTYPES": "text/csv; charset=UTF-8; header=present",
    "XML": "application/xml; charset=UTF-8",
    "PROMETHEUS": "text/plain; version=0.0.4; charset=UTF-8",
}
_TEXT = ("PRETTY", "VERTICAL", "MARKDOWN", "VALUES", "TSKV", "SQLINSERT", "LINEASSTRING")


class Response:
    """One response. Send a whole body with all(), a long one with start(), piece() … and finish().

    `before_end` is called just before the last bytes go out: what the client may use again the moment it has them, its
    session, must be free by then.
    """

    def __init__(self, send: Send, query_id: str, accept_encoding: str, version: str, send_timeout_s: float) -> None:
        self.before_end: Callable[[], None] = _nothing
        self._send = send
        self._query_id = query_id
        self._accept = accept_encoding
        self._version = version
        self._timeout_s = send_timeout_s
        self._begun_s = time.monotonic()
        self._tag = secrets.token_hex(8)
        self._encoder = encoder(None)
        self.started = False

    async def all(self, data: bytes, output_format: str | None, stats: Stats) -> None:
        """A complete answer; `output_format` None for a statement without a result."""
        self._encoder = encoder(choose_encoding(self._accept) if data else None)
        if len(data) <= _PIECE_BYTES:
            body = self._encoder.feed(data) + self._encoder.finish()
            headers = self._headers(output_format, stats, bool(data))
            await self._begin(200, [*headers, (b"content-length", str(len(body)).encode())])
            await self._write(body, more=False)
            return
        await self._begin(200, self._headers(output_format, stats, True))
        for start in range(0, len(data), _PIECE_BYTES):
            # On a thread: compressing a large answer must not stop all others.
            piece = await asyncio.to_thread(self._encoder.feed, data[start : start + _PIECE_BYTES])
            await self._write(piece)
        await self._write(self._encoder.finish(), more=False)

    async def start(self, output_format: str, stats: Stats) -> None:
        """Sends the headers of an answer that is still being read."""
        self._encoder = encoder(choose_encoding(self._accept))
        headers = self._headers(output_format, stats, True)
        await self._begin(200, [*headers, (b"x-clickhouse-exception-tag", self._tag.encode())])

    async def piece(self, data: bytes) -> None:
        encoded = await asyncio.to_thread(self._encoder.feed, data)
        if encoded:
            await self._write(encoded)

    async def finish(self) -> None:
        await self._write(self._encoder.finish(), more=False)

    async def error(self, error: EngineError) -> None:
        """Tells the client what went wrong: as the whole answer, or in the body where one has begun."""
        text = f"{error.text} (version {self._version} (official build))\n".encode("utf-8", "replace")
        if self.started:
            block = (
                f"\r\n__exception__\r\n{self._tag}\r\n".encode()
                + text
                + f"{len(text)} {self._tag}\r\n__exception__\r\n".encode()
            )
            await self._write(self._encoder.feed(block) + self._encoder.finish(), more=False)
            return
        headers = [
            *self._common(),
            (b"x-clickhouse-exception-code", str(error.code).encode()),
            (b"content-type", b"text/plain; charset=UTF-8"),
            (b"content-length", str(len(text)).encode()),
        ]
        if error.status == 401:
            headers.append((b"www-authenticate", b'Basic realm="ClickHouse server HTTP API"'))
        if error.status == 503:
            headers.append((b"retry-after", b"1"))
        await self._begin(error.status, headers)
        await self._write(text, more=False)

    async def plain(self, status: int, text: str) -> None:
        """An answer outside the query protocol."""
        body = text.encode()
        await self._begin(
            status,
            [(b"content-type", b"text/html; charset=UTF-8"), (b"content-length", str(len(body)).encode())],
        )
        await self._write(body, more=False)

    def _common(self) -> list[tuple[bytes, bytes]]:
        # The client chose the id: it must not be able to write headers.
        query_id = "".join(c for c in self._query_id if c.isprintable()).encode("latin-1", "replace")
        return [
            (b"x-clickhouse-server-display-name", DISPLAY_NAME.encode()),
            (b"x-clickhouse-query-id", query_id),
            (b"x-clickhouse-timezone", b"UTC"),
        ]

    def _headers(self, output_format: str | None, stats: Stats, has_body: bool) -> list[tuple[bytes, bytes]]:
        headers = [*self._common(), (b"x-clickhouse-summary", self._summary(stats))]
        if output_format is not None:
            headers += [
                (b"x-clickhouse-format", output_format.encode("latin-1", "replace")),
                (b"content-type", _content_type(output_format).encode()),
            ]
        encoding = choose_encoding(self._accept) if has_body else None
        if encoding is not None:
            headers += [(b"content-encoding", encoding.encode()), (b"vary", b"Accept-Encoding")]
        return headers

    def _summary(self, stats: Stats) -> bytes:
        values = {
            "read_rows": stats.read_rows,
            "read_bytes": stats.read_bytes,
            "written_rows": stats.written_rows,
            "written_bytes": stats.written_bytes,
            "total_rows_to_read": 0,
            "result_rows": stats.result_rows or stats.written_rows,
            "result_bytes": stats.result_bytes or stats.written_bytes,
            "elapsed_ns": int((time.monotonic() - self._begun_s) * 1_000_000_000),
        }
        return json.dumps({name: str(value) for name, value in values.items()}, separators=(",", ":")).encode()

    async def _begin(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.started = True
        await self._put({"type": "http.response.start", "status": status, "headers": headers})

    async def _write(self, data: bytes, more: bool = True) -> None:
        if not more:
            self.before_end()
        await self._put({"type": "http.response.body", "body": data, "more_body": more})

    async def _put(self, message: MutableMapping[str, Any]) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._send(message)
        except TimeoutError:
            # The client takes nothing: the connection is dropped.
            raise Disconnected from None


def _nothing() -> None:
    pass


def _content_type(output_format: str) -> str:
    name = output_format.upper()
    if name in _CONTENT_TYPES:
        return _CONTENT_TYPES[name]
    if name.startswith(("TABSEPARATED", "TSV")):
        return "text/tab-separated-values; charset=UTF-8"
    if "EACHROW" in name and name.startswith("JSON"):
        return "application/x-ndjson; charset=UTF-8"
    if name.startswith("JSON"):
        return "application/json; charset=UTF-8"
    if name.startswith(_TEXT):
        return "text/plain; charset=UTF-8"
    return "application/octet-stream"
