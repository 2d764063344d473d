"""The HTTP content encodings that ClickHouse's clients use, incrementally in both directions.

clickhouse-connect sends and accepts lz4 frames and zstd, Grafana's driver and curl gzip. ClickHouse's own block framing
(`compress=1`) is none of them and is refused by the front.
"""

import zlib
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import lz4.frame
from backports import zstd

from gpuledger.local.clickhouse.errors import EngineError

__all__ = ["ENCODINGS", "Encoder", "choose_encoding", "decode", "encoder"]

# In the order of our preference: on loopback the cheapest wins.
ENCODINGS = ("lz4", "zstd", "gzip", "deflate")

_GZIP = 31
_FAST = 1
_OUTPUT_BYTES = 1024 * 1024


class Encoder(Protocol):
    """Compresses one response body, piece by piece."""

    def feed(self, data: bytes) -> bytes: ...

    def finish(self) -> bytes: ...


class _Lz4Encoder:
    def __init__(self) -> None:
        self._frame = lz4.frame.LZ4FrameCompressor()
        self._head: bytes = self._frame.begin()

    def feed(self, data: bytes) -> bytes:
        head, self._head = self._head, b""
        return head + self._frame.compress(data)

    def finish(self) -> bytes:
        head, self._head = self._head, b""
        return head + self._frame.flush()


class _ZstdEncoder:
    def __init__(self) -> None:
        self._frame: Any = zstd.ZstdCompressor(level=_FAST)

    def feed(self, data: bytes) -> bytes:
        return self._frame.compress(data)

    def finish(self) -> bytes:
        return self._frame.flush()


class _ZlibEncoder:
    def __init__(self, window_bits: int) -> None:
        self._stream = zlib.compressobj(_FAST, zlib.DEFLATED, window_bits)

    def feed(self, data: bytes) -> bytes:
        return self._stream.compress(data)

    def finish(self) -> bytes:
        return self._stream.flush()


class _Plain:
    def feed(self, data: bytes) -> bytes:
        return data

    def finish(self) -> bytes:
        return b""


def encoder(encoding: str | None) -> Encoder:
    """A fresh encoder for one of ENCODINGS; None passes through."""
    if encoding is None:
        return _Plain()
    if encoding == "lz4":
        return _Lz4Encoder()
    if encoding == "zstd":
        return _ZstdEncoder()
    return _ZlibEncoder(_GZIP if encoding == "gzip" else zlib.MAX_WBITS)


def choose_encoding(accept: str) -> str | None:
    """The encoding for a client's Accept-Encoding header, None where it takes none of ours."""
    offered: set[str] = set()
    for part in accept.split(","):
        name, _, quality = part.strip().lower().partition(";")
        if quality.replace(" ", "") not in ("q=0", "q=0.0"):
            offered.add(name.strip())
    return next((name for name in ENCODINGS if name in offered), None)


def decode(chunks: Iterable[bytes], encoding: str | None, max_bytes: int) -> Iterator[bytes]:
    """The chunks of a request body, decompressed, each at most about 1 MiB.

    Raises EngineError for an unknown encoding (415), for a damaged or cut-off body (400), and once more than
    `max_bytes` came out (413): a small body may hold a very large one.
    """
    if encoding in (None, "", "identity"):
        pieces: Iterator[bytes] = iter(chunks)
    elif encoding == "lz4":
        pieces = _frames(chunks, lz4.frame.LZ4FrameDecompressor)
    elif encoding == "zstd":
        pieces = _frames(chunks, zstd.ZstdDecompressor)
    elif encoding in ("gzip", "x-gzip"):
        pieces = _inflate(chunks, _GZIP)
    elif encoding == "deflate":
        pieces = _inflate(chunks, zlib.MAX_WBITS)
    else:
        raise EngineError.of(
            "UNSUPPORTED_MEDIA_TYPE",
            f"Unknown Content-Encoding {encoding!r}: send {', '.join(ENCODINGS)} or none",
        )
    total = 0
    try:
        for piece in pieces:
            total += len(piece)
            if total > max_bytes:
                raise EngineError.of(
                    "QUERY_IS_TOO_LARGE", f"The request body is larger than {max_bytes} bytes when decompressed"
                )
            if piece:
                yield piece
    except (RuntimeError, EOFError, zlib.error, zstd.ZstdError) as error:
        raise EngineError.of("CANNOT_DECOMPRESS", f"The request body is not valid {encoding}: {error}", 400) from error


def _frames(chunks: Iterable[bytes], make: Any) -> Iterator[bytes]:
    """Any number of lz4 or zstd frames after each other: clients send one per block."""
    frame = make()
    fresh = True
    for chunk in chunks:
        data = chunk
        while data or not (fresh or frame.needs_input):
            if fresh and not data:
                break
            piece = frame.decompress(data, _OUTPUT_BYTES)
            fresh = False
            data = b""
            yield piece
            if frame.eof:
                data = frame.unused_data or b""
                frame = make()
                fresh = True
    if not fresh:
        raise EOFError("it ends in the middle of a frame")


def _inflate(chunks: Iterable[bytes], window_bits: int) -> Iterator[bytes]:
    stream = zlib.decompressobj(window_bits)
    fresh = True
    for chunk in chunks:
        data = chunk
        while data:
            if stream.eof:
                stream = zlib.decompressobj(window_bits)
            piece = stream.decompress(data, _OUTPUT_BYTES)
            fresh = False
            data = stream.unused_data if stream.eof else stream.unconsumed_tail
            yield piece
    if not fresh and not stream.eof:
        raise EOFError("it ends in the middle of the stream")
