"""What a Kafka fetch may unpack to: bounded in bytes and records, whatever the compressed batches claim.

aiokafka unpacks a batch whole, so 16 kB from anybody who may write could take all memory, again after every restart.
Here such a batch becomes one record that says why it was not read, and the stream goes on behind it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from importlib.metadata import version
from types import ModuleType
from typing import Any, NamedTuple, cast

import cramjam
from aiokafka.consumer import fetcher
from aiokafka.errors import KafkaError
from aiokafka.record import default_records
from aiokafka.record.memory_records import MemoryRecords

from gpuledger.streams.exceptions import UnsupportedClientError

__all__ = ["MAX_BATCH_BYTES", "MAX_BATCH_RECORDS", "MAX_FETCH_BYTES", "BoundedBatches", "Unreadable", "install"]

#: A batch that unpacks to more is not read. The broker bounds the packed size (16 MiB) only.
MAX_BATCH_BYTES = 32 * 1024 * 1024
#: A batch with more records is not read: 16 kB can hold millions of empty ones, each a message to account for.
MAX_BATCH_RECORDS = 1 << 18
#: One fetch of a partition hands out no more than about this; the rest of it waits, packed.
MAX_FETCH_BYTES = 16 * 1024 * 1024

#: What a record costs as an object, beside its bytes.
_RECORD_OVERHEAD_BYTES = 600
_CODECS = ("none", "gzip", "snappy", "lz4", "zstd")
_XERIAL_HEADER = b"\x82SNAPPY\x00"
_XERIAL_HEADER_BYTES = 16
#: Of a record batch (format 2): where the fields lie that are read here, and where its records begin.
_LENGTH_AT, _COUNT_AT, _RECORDS_AT = 8, 57, 61
_FETCHER_PARTS = ("MemoryRecords", "FetchResult", "PartitionRecords")


class TooLarge(Exception):
    """Does not unpack into MAX_BATCH_BYTES, or not at all."""


class Unreadable(NamedTuple):
    """Why a whole batch was not read. It travels as the only header of a record that stands for the batch at its last
    offset; no producer can send one, as theirs are plain tuples."""

    reason: str
    first_offset: int
    packed_bytes: int


class _Stand(NamedTuple):
    """The record that stands for an unreadable batch, as aiokafka knows records."""

    offset: int
    timestamp: int
    timestamp_type: int
    headers: list[Unreadable]
    key: bytes | None = None
    value: bytes | None = None
    checksum: None = None


class _Lenient(NamedTuple):
    """A record of a batch that aiokafka refused, read by the rules of the broker."""

    offset: int
    timestamp: int
    timestamp_type: int
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes | None]]
    checksum: None = None


class BoundedBatches:
    """aiokafka's `MemoryRecords` (the batches of one fetched partition), each of them guarded."""

    def __init__(self, fetched: bytes) -> None:
        self._fetched = fetched
        self._batches: Any = MemoryRecords(fetched)
        self._at = 0

    def size_in_bytes(self) -> int:
        return self._batches.size_in_bytes()

    def has_next(self) -> bool:
        return self._batches.has_next()

    def next_batch(self) -> Any:
        batch: Any = self._batches.next_batch()
        start = self._at
        self._at += 12 + int.from_bytes(self._fetched[start + _LENGTH_AT : start + _LENGTH_AT + 4], "big")
        if getattr(batch, "magic", 0) < 2 or batch.is_control_batch:
            return batch
        return _GuardedBatch(batch, memoryview(self._fetched)[start : self._at])


class _GuardedBatch:
    """One batch: its records, or the one that stands for it."""

    def __init__(self, batch: Any, raw: memoryview) -> None:
        self._batch = batch
        self._raw = raw

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batch, name)

    def __iter__(self) -> Iterator[Any]:
        count = int.from_bytes(self._raw[_COUNT_AT : _COUNT_AT + 4], "big", signed=True)
        if count > MAX_BATCH_RECORDS:
            yield self._stand(f"it claims {count} records, and at most {MAX_BATCH_RECORDS} are read")
            return
        last = -1
        try:
            for record in self._batch:
                last = record.offset
                yield record
        except TooLarge as error:
            yield self._stand(str(error))
        except (KafkaError, ValueError, IndexError) as error:
            # The broker takes header names that are no UTF-8; aiokafka does not.
            yield from self._again(last, count, error)

    def _again(self, last: int, count: int, refusal: Exception) -> Iterator[Any]:
        """The records after offset `last`, read less strictly; else the record that stands for the batch."""
        try:
            records = list(self._lenient(count))
        except (TooLarge, ValueError, IndexError):
            yield self._stand(f"it cannot be taken apart ({refusal})")
            return
        yield from (record for record in records if record.offset > last)

    def _stand(self, reason: str) -> _Stand:
        batch = self._batch
        first, last = batch.base_offset, batch.next_offset - 1
        codec = dict(enumerate(_CODECS)).get(batch.compression_type, "unknown")
        told = (
            f"batch of offsets {first} to {last} ({len(self._raw)} bytes, compression {codec}): {reason}; "
            "send smaller batches"
        )
        return _Stand(last, batch.max_timestamp, batch.timestamp_type, [Unreadable(told, first, len(self._raw))])

    def _lenient(self, count: int) -> Iterator[_Lenient]:
        """Raises TooLarge, ValueError or IndexError where the bytes are no records."""
        batch = self._batch
        data = bytes(self._raw[_RECORDS_AT:])
        if batch.compression_type:
            data = _DECODERS[_CODECS[batch.compression_type]](data)
        at = 0
        for _ in range(count):
            length, at = _varint(data, at)
            end = at + length
            if not at < end <= len(data):
                raise ValueError(f"a record of {length} bytes at byte {at} of {len(data)}")
            yield _read(memoryview(data)[at + 1 : end], batch)
            at = end


def _read(body: memoryview, batch: Any) -> _Lenient:
    """One record after its attributes: timestamp delta, offset delta, key, value, headers."""
    delta_ms, at = _varint(body, 0)
    offset_delta, at = _varint(body, at)
    key, at = _bytes(body, at)
    value, at = _bytes(body, at)
    count, at = _varint(body, at)
    headers: list[tuple[str, bytes | None]] = []
    for _ in range(count):
        name, at = _bytes(body, at)
        content, at = _bytes(body, at)
        headers.append(((name or b"").decode(errors="backslashreplace"), content))
    when = batch.max_timestamp if batch.timestamp_type else batch.first_timestamp + delta_ms
    return _Lenient(batch.base_offset + offset_delta, when, batch.timestamp_type, key, value, headers)


def _bytes(data: memoryview, at: int) -> tuple[bytes | None, int]:
    length, at = _varint(data, at)
    if length < 0:
        return None, at
    if at + length > len(data):
        raise ValueError(f"{length} bytes at byte {at} of {len(data)}")
    return bytes(data[at : at + length]), at + length


def _varint(data: bytes | memoryview, at: int) -> tuple[int, int]:
    """A zigzag variable-length integer and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return (value >> 1) ^ -(value & 1), at
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than ten bytes")


class _BoundedResult(fetcher.FetchResult):
    """aiokafka's fetched partition, handing out at most about MAX_FETCH_BYTES at once."""

    def getall(self, max_records: int | None = None) -> list[Any]:
        # Untyped: aiokafka has no type information.
        this: Any = self
        if not this.check_assignment(this._topic_partition) or not this.has_more():
            return []
        out: list[Any] = []
        left = MAX_FETCH_BYTES
        for record in this._partition_records:
            out.append(record)
            left -= _RECORD_OVERHEAD_BYTES + record.serialized_key_size + record.serialized_value_size
            for header in record.headers:
                left -= len(header[0]) + (len(header[1]) if isinstance(header[1], bytes) else 0)
            if left <= 0 or (max_records is not None and len(out) >= max_records):
                this._update_position()
                return out
        this._update_position()
        this._partition_records = None
        return out


# -- decompression into a buffer of fixed size

_scratch = threading.local()


def _into(inflate: Callable[[Any, Any], int]) -> Callable[[Any], bytes]:
    def decode(packed: Any) -> bytes:
        buffer = getattr(_scratch, "buffer", None)
        if buffer is None:
            # Only the pages that are written to become memory.
            buffer = _scratch.buffer = memoryview(bytearray(MAX_BATCH_BYTES))
        try:
            size = inflate(packed, buffer)
        except cramjam.DecompressionError as error:
            raise TooLarge(f"it does not unpack into {MAX_BATCH_BYTES} bytes ({error})") from error
        return bytes(buffer[:size])

    return decode


def _unsnap(packed: Any, buffer: memoryview) -> int:
    """Raw snappy, or the blocks of it that Java's library writes."""
    data = memoryview(packed)
    if bytes(data[: len(_XERIAL_HEADER)]) != _XERIAL_HEADER:
        return _unsnap_block(data, buffer)
    at, size = _XERIAL_HEADER_BYTES, 0
    while at < len(data):
        end = at + 4 + int.from_bytes(data[at : at + 4], "big", signed=True)
        if not at + 4 <= end <= len(data):
            raise cramjam.DecompressionError(f"a snappy block ends at byte {end} of {len(data)}")
        size += _unsnap_block(data[at + 4 : end], buffer[size:])
        at = end
    return size


def _unsnap_block(block: memoryview, buffer: memoryview) -> int:
    if cramjam.snappy.decompress_raw_len(block) > len(buffer):
        raise cramjam.DecompressionError("failed to write whole buffer")
    return cramjam.snappy.decompress_raw_into(block, buffer)


_DECODERS: dict[str, Callable[[Any], bytes]] = {
    "gzip": _into(cast(Any, cramjam.gzip).decompress_into),
    "snappy": _into(_unsnap),
    "lz4": _into(cast(Any, cramjam.lz4).decompress_into),
    "zstd": _into(cast(Any, cramjam.zstd).decompress_into),
}


def install() -> None:
    """Puts the bounds under every aiokafka consumer of this process. May be called again.

    Raises UnsupportedClientError where aiokafka is not the version whose parts are replaced here.
    """
    installed = version("aiokafka")
    modules: list[ModuleType] = [default_records]
    batch = default_records.DefaultRecordBatch
    if batch.__module__ != default_records.__name__:  # the compiled one looks its decoders up in its own module
        from aiokafka.record._crecords import default_records as compiled

        modules.append(compiled)
    parts = [(fetcher, name) for name in _FETCHER_PARTS]
    parts += [(module, f"{name}_decode") for module in modules for name in _DECODERS]
    missing = [f"{module.__name__}.{name}" for module, name in parts if not hasattr(module, name)]
    if missing or not installed.startswith("0.14."):
        raise UnsupportedClientError(
            f"aiokafka {installed} is installed, but gpuledger.streams.record_batches replaces parts of 0.14"
            f"{f' (not found: {missing[0]})' if missing else ''}; install aiokafka 0.14"
        )
    for module in modules:
        for name, decode in _DECODERS.items():
            setattr(module, f"{name}_decode", decode)
    setattr(fetcher, "MemoryRecords", BoundedBatches)  # noqa: B010
    setattr(fetcher, "FetchResult", _BoundedResult)  # noqa: B010
