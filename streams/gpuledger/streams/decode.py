"""Telemetry messages to columns: one Arrow table and one header list for a whole block of messages.

The schema bytes are the same in every message of a version, so after the first only record batches are decoded.
A message that does not follow the contract is returned with its reason; the others are not affected by it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gpuledger.schemas.exceptions import MessageError
from gpuledger.schemas.telemetry import COLUMNS, HEADER_KEY, MAX_CLOCK_AHEAD_MS, BatchHeader, HostReading, decode_header

__all__ = ["TelemetryBlock", "TelemetryMessage", "decode_block", "telemetry_schema"]

_MAX_SCHEMA_BYTES = 1 << 16
_MAX_ENERGY_MJ = 1 << 53
_FROM_2000_MS, _TO_2200_MS = 946_684_800_000, 7_258_118_400_000
_HOST_COUNTERS = tuple(name for name in HostReading.__struct_fields__ if name.endswith(("_bytes", "_mw", "_mj")))


class TelemetryMessage(Protocol):
    """What decoding needs of a Kafka record."""

    @property
    def value(self) -> bytes | None: ...
    @property
    def headers(self) -> Sequence[tuple[str, bytes]]: ...
    @property
    def timestamp_ms(self) -> int: ...


@dataclass(frozen=True, slots=True)
class TelemetryBlock:
    """The accepted messages of a block.

    `columns` has the rows of all messages one after another; `message` (int64, one per row) is the index of a row's
    message in `headers` and `appended_ms`. `source` maps it to the index in the block that was given to
    `decode_block`. `rejected` are (index in the block, reason).
    """

    headers: list[BatchHeader]
    appended_ms: NDArray[np.int64]
    source: NDArray[np.int64]
    message: NDArray[np.int64]
    columns: pa.Table
    rejected: list[tuple[int, str]]


def telemetry_schema() -> pa.Schema:
    """The Arrow schema of the contract."""
    types: dict[str, Any] = {"int16": pa.int16(), "int32": pa.int32(), "int64": pa.int64(), "float32": pa.float32()}
    return pa.schema([pa.field(column.name, types[column.type], nullable=column.nullable) for column in COLUMNS])


_EXPECTED = telemetry_schema()
_known_schemas: dict[bytes, pa.Schema] = {}


def _schema_length(value: bytes) -> int:
    """Bytes of the first encapsulated IPC message: continuation marker, int32 length, metadata."""
    if len(value) < 8 or value[:4] != b"\xff\xff\xff\xff":
        raise MessageError("value: not an Arrow IPC stream (no continuation marker at its start)")
    length = int.from_bytes(value[4:8], "little", signed=True)
    if not 0 < length <= min(_MAX_SCHEMA_BYTES, len(value) - 8):
        raise MessageError(f"value: Arrow schema of {length} bytes in a message of {len(value)}")
    return 8 + length


def _schema(prefix: bytes) -> pa.Schema:
    found = _known_schemas.get(prefix)
    if found is not None:
        return found
    schema = pa.ipc.read_schema(pa.py_buffer(prefix))
    for column in _EXPECTED:
        n = schema.get_field_index(column.name)
        if n < 0:
            if not column.nullable:
                raise MessageError(f"value: column {column.name} is missing")
            continue
        if schema.field(n).type != column.type:
            raise MessageError(f"value: column {column.name}: expected {column.type}, got {schema.field(n).type}")
    if len(_known_schemas) < 64:
        _known_schemas[prefix] = schema
    return schema


def _decode_rows(value: bytes | None) -> pa.RecordBatch:
    if not value:
        raise MessageError("value: is empty; expected an Arrow IPC stream with one record batch")
    cut = _schema_length(value)
    try:
        schema = _schema(value[:cut])
        batch = pa.ipc.read_record_batch(pa.py_buffer(value)[cut:], schema)
        batch.validate(full=True)
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        raise MessageError(f"value: {error}") from error
    if batch.schema.names == _EXPECTED.names:
        return batch
    rows = batch.num_rows
    arrays = [
        batch.column(field.name) if batch.schema.get_field_index(field.name) >= 0 else pa.nulls(rows, field.type)
        for field in _EXPECTED
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=_EXPECTED)


def _bounded(header: BatchHeader) -> Iterator[tuple[str, int | None, int, int]]:
    """(field, value, least, bound) of the numbers that the tables hold in fewer bits than JSON has."""
    yield "boot_start_ms", header.boot_start_ms, _FROM_2000_MS, _TO_2200_MS
    yield "run_start_ms", header.run_start_ms, _FROM_2000_MS, _TO_2200_MS
    yield "period_ms", header.period_ms, 1, 1 << 31
    yield "seq", header.seq, 0, 1 << 32
    for gap in header.gaps:
        for name in ("first_seq", "last_seq", "batches"):
            yield f"gaps.{name}", getattr(gap, name), 0, 1 << 32
        for name in ("from_ms", "to_ms"):
            yield f"gaps.{name}", getattr(gap, name), _FROM_2000_MS, _TO_2200_MS
    if header.host is not None:
        yield "host.ts_ms", header.host.ts_ms, _FROM_2000_MS, _TO_2200_MS
        yield "host.cpu_count", header.host.cpu_count, 0, 1 << 31
        for name in _HOST_COUNTERS:
            yield f"host.{name}", getattr(header.host, name), -(1 << 63), 1 << 63
    for device in header.devices:
        yield "devices.instance", device.instance, 0, 1 << 16
        yield "devices.previous_ts_ms", device.previous_ts_ms, _FROM_2000_MS, _TO_2200_MS
        yield "devices.previous_energy_mj", device.previous_energy_mj, 0, _MAX_ENERGY_MJ + 1
        yield "devices.epoch_ms", device.epoch_ms, 0, _TO_2200_MS


def _check_header(header: BatchHeader) -> None:
    """Raises MessageError where a number does not fit. Refused by an insert instead, it would leave the fragments of
    a batch behind that is dead-lettered."""
    for field, value, least, bound in _bounded(header):
        if value is not None and not least <= value < bound:
            raise MessageError(f"header {HEADER_KEY}: {field}: expected {least} to {bound - 1}, got {value}")
    # Two rows of one key would replace each other in the table.
    names = {(device.gpu, device.instance, device.epoch_ms) for device in header.devices}
    if len(names) < len(header.devices):
        raise MessageError(f"header {HEADER_KEY}: devices: a device (gpu, instance, epoch_ms) is there twice")


def _check(header: BatchHeader, batch: pa.RecordBatch, appended_ms: int, ahead_ms: int) -> None:
    """Raises MessageError where rows and header contradict each other."""
    if batch.num_rows == 0:
        return
    ts, device = batch.column("ts_ms"), batch.column("device")
    if ts.null_count or device.null_count:
        raise MessageError("value: ts_ms and device may not be NULL")
    times, devices = ts.to_numpy(), device.to_numpy()
    if devices.min() < 0 or devices.max() >= len(header.devices):
        raise MessageError(f"device: {devices.max()} is not an index into the header's {len(header.devices)} devices")
    newest, oldest = int(times.max()), int(times.min())
    if newest > appended_ms + ahead_ms:
        raise MessageError(
            f"quarantine: ts_ms {newest} is {newest - appended_ms} ms after the broker's time {appended_ms}; "
            f"set the clock of node {header.node}"
        )
    if oldest < _FROM_2000_MS:
        raise MessageError(f"ts_ms: {oldest} is before the year 2000; set the clock of node {header.node}")
    order = np.lexsort((times, devices))
    same = np.diff(devices[order]) == 0
    if np.any(np.diff(times[order])[same] <= 0):
        raise MessageError("ts_ms: two samples of one device have the same time")
    previous = np.array([d.previous_ts_ms if d.previous_ts_ms is not None else -1 for d in header.devices])
    if np.any(times <= previous[devices]):
        raise MessageError("ts_ms: a sample is not after the device's previous_ts_ms in the header")
    energy = batch.column("energy_mj").fill_null(0).to_numpy()
    if energy.min() < 0 or energy.max() > _MAX_ENERGY_MJ:
        raise MessageError(f"energy_mj: expected 0..2^53, got {energy.min()}..{energy.max()}")


def decode_block(records: Sequence[TelemetryMessage], ahead_ms: int = MAX_CLOCK_AHEAD_MS) -> TelemetryBlock:
    """Decodes every record of a block; never raises for what a record holds.

    A message with event time later than its broker time + `ahead_ms` is quarantined: rejected with that reason.
    """
    headers: list[BatchHeader] = []
    batches: list[pa.RecordBatch] = []
    source: list[int] = []
    rejected: list[tuple[int, str]] = []
    for n, record in enumerate(records):
        try:
            raw = next((value for key, value in record.headers if key == HEADER_KEY), None)
            if raw is None:
                raise MessageError(f"header {HEADER_KEY}: is missing; only agents write to this topic")
            header = decode_header(raw)
            _check_header(header)
            batch = _decode_rows(record.value)
            _check(header, batch, record.timestamp_ms, ahead_ms)
        except MessageError as error:
            rejected.append((n, str(error)))
            continue
        headers.append(header)
        batches.append(batch)
        source.append(n)
    kept = np.array(source, dtype=np.int64)
    rows = np.array([batch.num_rows for batch in batches], dtype=np.int64)
    return TelemetryBlock(
        headers=headers,
        appended_ms=np.array([records[n].timestamp_ms for n in source], dtype=np.int64),
        source=kept,
        message=np.repeat(np.arange(len(headers)), rows),
        columns=pa.Table.from_batches(batches, schema=_EXPECTED),
        rejected=rejected,
    )
