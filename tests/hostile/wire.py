"""Kafka's record batches by hand, and a client that sends any bytes as one: producers refuse what is tested here."""

from __future__ import annotations

import asyncio
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import cramjam
from aiokafka.codec import snappy_encode
from aiokafka.record.util import calc_crc32c

__all__ = ["CODECS", "Placed", "RawRecord", "WireClient", "bomb", "packed", "record_batch", "records"]

CODECS = {"none": 0, "gzip": 1, "snappy": 2, "lz4": 3, "zstd": 4}
#: Produce, in a version that every broker from 0.11 to 4 speaks.
_PRODUCE, _VERSION = 0, 7
_TIMEOUT_MS = 30_000
_ZEROS = bytes(1 << 20)

RawHeader = tuple[bytes, bytes | None]


class RawRecord(NamedTuple):
    """What a record holds; header names are bytes, as on the wire."""

    key: bytes | None
    value: bytes | None
    headers: Sequence[RawHeader] = ()


@dataclass(frozen=True, slots=True)
class Placed:
    """The broker's answer to one batch: 0 and where it lies, or an error code."""

    error: int
    offset: int


def varint(value: int) -> bytes:
    """Zigzag, of any size up to 64 bits."""
    number = (value << 1) ^ (value >> 63)
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _sized(data: bytes | None) -> bytes:
    return varint(-1) if data is None else varint(len(data)) + data


def records(given: Iterable[RawRecord]) -> bytes:
    """The records of a batch, not packed."""
    out: list[bytes] = []
    for n, record in enumerate(given):
        headers = b"".join(_sized(name) + _sized(value) for name, value in record.headers)
        body = b"\0\0" + varint(n) + _sized(record.key) + _sized(record.value) + varint(len(record.headers)) + headers
        out.append(varint(len(body)) + body)
    return b"".join(out)


def packed(data: bytes, codec: str) -> bytes:
    """The records as the codec has them."""
    if codec == "none":
        return data
    if codec == "gzip":
        packer = zlib.compressobj(wbits=31)
        return packer.compress(data) + packer.flush()
    if codec == "snappy":
        return snappy_encode(data)
    packer = _packer(codec)
    packer.compress(data)
    return bytes(packer.finish())


def _packer(codec: str) -> Any:
    kind: Any = getattr(cramjam, codec)
    # Kafka does not take linked blocks.
    return kind.Compressor(level=9, content_checksum=False, block_linked=False) if codec == "lz4" else kind.Compressor()


def bomb(codec: str, size_bytes: int, count: int = 1, key: bytes = b"bomb") -> tuple[bytes, int]:
    """`count` records whose values are zeros, packed piece by piece; and how many records that are."""
    if codec == "gzip":
        deflate = zlib.compressobj(wbits=31)
        feed, finish = deflate.compress, deflate.flush
        out = [feed(piece) for piece in _pieces(size_bytes, count, key)]
        return b"".join([*out, finish()]), count
    if codec == "snappy":
        # As Java's library writes it: blocks, each with its length.
        block = bytes(cast(Any, cramjam.snappy).compress_raw(_ZEROS))
        head = b"\x82SNAPPY\x00" + struct.pack(">ii", 1, 1)
        out = [head]
        for piece in _pieces(size_bytes, count, key):
            made = block if piece is _ZEROS else bytes(cast(Any, cramjam.snappy).compress_raw(piece))
            out.append(struct.pack(">i", len(made)) + made)
        return b"".join(out), count
    packer = _packer(codec)
    for piece in _pieces(size_bytes, count, key):
        packer.compress(piece)
    return bytes(packer.finish()), count


def _pieces(size_bytes: int, count: int, key: bytes) -> Iterable[bytes]:
    for n in range(count):
        size = size_bytes // count
        head = b"\0\0" + varint(n) + _sized(key) + varint(size)
        yield varint(len(head) + size + 1) + head
        for _ in range(size // len(_ZEROS)):
            yield _ZEROS
        yield bytes(size % len(_ZEROS))
        yield varint(0)


def record_batch(payload: bytes, count: int, codec: str = "none", last_delta: int | None = None) -> bytes:
    """A batch of format 2 around `payload`, with a true checksum whatever it holds."""
    delta = count - 1 if last_delta is None else last_delta
    rest = struct.pack(">hiqqqhii", CODECS[codec], delta, 0, 0, -1, -1, -1, count) + payload
    body = struct.pack(">ibI", -1, 2, calc_crc32c(rest)) + rest
    return struct.pack(">qi", 0, len(body)) + body


class WireClient:
    """One connection to a broker that leads every partition (the embedded one does)."""

    def __init__(self, bootstrap: str) -> None:
        host, _, port = bootstrap.rpartition(":")
        self._address = host, int(port)
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def __aenter__(self) -> WireClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        streams, self._streams = self._streams, None
        if streams is not None:
            streams[1].close()

    async def produce(self, topic: str, partition: int, batch: bytes) -> Placed | None:
        """Sends a batch and waits for all replicas; None where the broker hung up (a request above its limit)."""
        name, client = topic.encode(), b"hostile"
        body = struct.pack(">h", -1) + struct.pack(">hi", -1, _TIMEOUT_MS)
        body += struct.pack(">ih", 1, len(name)) + name + struct.pack(">iii", 1, partition, len(batch))
        head = struct.pack(">hhih", _PRODUCE, _VERSION, 1, len(client)) + client
        try:
            reader, writer = await self._connected()
            writer.write(struct.pack(">i", len(head) + len(body) + len(batch)))
            writer.write(head + body)
            writer.write(batch)
            await writer.drain()
            (size,) = struct.unpack(">i", await reader.readexactly(4))
            answer = await reader.readexactly(size)
        except (ConnectionError, asyncio.IncompleteReadError):
            await self.close()
            return None
        # correlation id, topics, name, partitions, index
        at = 4 + 4 + 2 + len(name) + 4 + 4
        error, offset = struct.unpack(">hq", answer[at : at + 10])
        return Placed(error, offset)

    async def _connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._streams is None:
            self._streams = await asyncio.open_connection(*self._address)
        return self._streams
