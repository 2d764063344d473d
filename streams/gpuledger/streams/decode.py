"""Telemetry messages to columns: one Arrow table and one header list for a whole block of messages.

The schema bytes are the same in every message of a version, so after the first only record batches are decoded.
A message that does not follow the contract is returned with its reason; the others are not affected by it.
"""

from __future__ import annotations

import struct
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gpuledger.schemas.exceptions import MessageError
from gpuledger.schemas.telemetry import COLUMNS, GAUGES, HEADER_KEY, MAX_CLOCK_AHEAD_MS, BatchHeader, decode_header
from gpuledger.streams.batch_checks import MAX_HEADER_BYTES, MAX_ROWS, check_header, check_rows, suspects
from gpuledger.streams.layouts import Layout, Layouts, layout_of, read

__all__ = ["READ_COLUMNS", "TelemetryBlock", "TelemetryMessage", "decode_block", "telemetry_schema"]

Ints = NDArray[np.int64]

#: The columns of the contract that the ledger reads; the others are checked and left where they are.
READ_COLUMNS = ("ts_ms", "device", "down_cause", "energy_mj", *GAUGES)

_MAX_SCHEMA_BYTES = 1 << 16
_MOST_SCHEMAS = 64
_CONTINUATION = b"\xff\xff\xff\xff"
#: What may follow the record batch: nothing, or the end of the stream as one of two versions writes it.
_ENDS = (b"", _CONTINUATION + bytes(4), bytes(4))
_U16, _U32, _I32 = struct.Struct("<H"), struct.Struct("<I"), struct.Struct("<i")
#: Slots of a flatbuffer's vtable: `header` of Message (field 2), `compression` of RecordBatch (field 3).
_HEADER_SLOT, _COMPRESSION_SLOT = 8, 10
#: What pyarrow raises for bytes that are no batch of that schema.
_UNREADABLE = (pa.ArrowException, OSError, EOFError, ValueError, OverflowError, MemoryError, struct.error)


class TelemetryMessage(Protocol):
    """What decoding needs of a Kafka record."""

    @property
    def value(self) -> bytes | None: ...
    @property
    def headers(self) -> Sequence[tuple[str, bytes | None]]: ...
    @property
    def timestamp_ms(self) -> int: ...


@dataclass(frozen=True, slots=True)
class TelemetryBlock:
    """The accepted messages of a block.

    `columns` has READ_COLUMNS of the rows of all messages one after another, in one chunk; `message` (int64, one per
    row) is the index of a row's message in `headers` and `appended_ms`. `source` maps it to the index in the block that
    was given to `decode_block`. `rejected` are (index in the block, reason).
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
_READ = pa.schema([_EXPECTED.field(name) for name in READ_COLUMNS])
_layouts = Layouts()
#: Schema bytes → the schema, and whether it is the contract's, column by column.
_known_schemas: dict[bytes, tuple[pa.Schema, bool]] = {}


def _schema_length(value: bytes) -> int:
    """Bytes of the first encapsulated IPC message: continuation marker, int32 length, metadata."""
    if len(value) < 8 or value[:4] != _CONTINUATION:
        raise MessageError("value: not an Arrow IPC stream (no continuation marker at its start)")
    length = int.from_bytes(value[4:8], "little", signed=True)
    if not 0 < length <= min(_MAX_SCHEMA_BYTES, len(value) - 8):
        raise MessageError(f"value: Arrow schema of {length} bytes in a message of {len(value)}")
    return 8 + length


def _schema(prefix: bytes) -> tuple[pa.Schema, bool]:
    found = _known_schemas.get(prefix)
    if found is not None:
        return found
    schema = pa.ipc.read_schema(pa.py_buffer(prefix))
    for column in _EXPECTED:
        places = schema.get_all_field_indices(column.name)
        if not places and not column.nullable:
            raise MessageError(f"value: column {column.name} is missing")
        if len(places) > 1:
            raise MessageError(f"value: column {column.name} is there {len(places)} times")
        if places and schema.field(places[0]).type != column.type:
            raise MessageError(
                f"value: column {column.name}: expected {column.type}, got {schema.field(places[0]).type}"
            )
    if len(_known_schemas) >= _MOST_SCHEMAS:  # the oldest goes: a flood of strange ones must not keep a new one out
        del _known_schemas[next(iter(_known_schemas))]
    _known_schemas[prefix] = schema, schema.equals(_EXPECTED)
    return _known_schemas[prefix]


def _is_compressed(value: bytes, at: int) -> bool:
    """Whether the record batch whose encapsulated message begins at `at` has compressed buffers.

    Read from the flatbuffer by hand: unpacking is what must not happen. Raises struct.error where there is none.
    """
    root = at + 8 + _U32.unpack_from(value, at + 8)[0]
    table = root - _I32.unpack_from(value, root)[0]
    if _U16.unpack_from(value, table)[0] <= _HEADER_SLOT:
        return False
    field = root + _U16.unpack_from(value, table + _HEADER_SLOT)[0]
    batch = field + _U32.unpack_from(value, field)[0]
    table = batch - _I32.unpack_from(value, batch)[0]
    return (
        _U16.unpack_from(value, table)[0] > _COMPRESSION_SLOT
        and _U16.unpack_from(value, table + _COMPRESSION_SLOT)[0] != 0
    )


def _decode_rows(value: bytes | None) -> pa.RecordBatch:
    """The batch of one message as Arrow reads it. What it has learned of the message's layout is kept."""
    if not value:
        raise MessageError("value: is empty; expected an Arrow IPC stream with one record batch")
    cut = _schema_length(value)
    try:
        schema, as_expected = _schema(value[:cut])
        if _is_compressed(value, cut):
            raise MessageError("value: its Arrow buffers are compressed; leave compression to Kafka")
        reader = pa.BufferReader(value)
        reader.seek(cut)
        batch = pa.ipc.read_record_batch(pa.ipc.read_message(reader), schema)
        rest = value[reader.tell() :]
        if batch.num_rows > MAX_ROWS:
            raise MessageError(f"value: {batch.num_rows} rows; a batch has at most {MAX_ROWS}")
        batch.validate(full=True)
    except _UNREADABLE as error:
        raise MessageError(f"value: {error or type(error).__name__}") from error
    if rest not in _ENDS:
        raise MessageError(f"value: {len(rest)} bytes after its record batch; a message holds one batch")
    if as_expected:
        _learn(value, cut + 8 + _I32.unpack_from(value, cut + 4)[0], rest, batch)
        return batch
    rows = batch.num_rows
    arrays = [
        batch.column(field.name) if batch.schema.get_field_index(field.name) >= 0 else pa.nulls(rows, field.type)
        for field in _EXPECTED
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=_EXPECTED)


def _learn(value: bytes, body: int, rest: bytes, batch: pa.RecordBatch) -> None:
    if _layouts.is_wanted(value, body):
        layout = layout_of(value, body, rest, batch, READ_COLUMNS)
        if layout is not None:
            _layouts.add(layout)


class _Rows:
    """Gathers the rows of the messages that are kept, and gives them in the order of the messages."""

    def __init__(self) -> None:
        self._batches: list[pa.RecordBatch] = []
        self._of_batches: list[int] = []
        self._alike: dict[int, tuple[Layout, list[int], list[bytes]]] = {}

    def add(self, message: int, value: bytes | None) -> None:
        """Takes the rows of a message. Raises MessageError where it cannot be read; `read` may still find that."""
        layout = None if value is None else _layouts.find(value)
        if layout is None or value is None:
            self._batches.append(_decode_rows(value))
            self._of_batches.append(message)
            return
        _, messages, values = self._alike.setdefault(id(layout), (layout, [], []))
        messages.append(message)
        values.append(value)

    def read(self) -> tuple[pa.Table, Ints, dict[int, str]]:
        """READ_COLUMNS of all rows, the message of each row, and the messages that cannot be read with the reasons."""
        tables: list[pa.Table] = []
        owners: list[Ints] = []
        wrong: dict[int, str] = {}
        for layout, messages, values in self._alike.values():
            table, as_told = read(layout, values)
            owner = np.repeat(np.array(messages, dtype=np.int64), layout.rows)
            if not as_told.all():
                table, owner = (
                    table.filter(pa.array(np.repeat(as_told, layout.rows))),
                    owner[np.repeat(as_told, layout.rows)],
                )
                for n in np.flatnonzero(~as_told).tolist():
                    try:
                        self._batches.append(_decode_rows(values[n]))
                        self._of_batches.append(messages[n])
                    except MessageError as error:
                        wrong[messages[n]] = str(error)
            tables.append(table.select(_READ.names).cast(_READ))
            owners.append(owner)
        if self._batches or not tables:
            # One chunk: whatever reads a column would pay for each of thousands.
            read_by_arrow = pa.Table.from_batches(self._batches, schema=_EXPECTED)
            tables.append(read_by_arrow.select(_READ.names).combine_chunks())
            rows = [batch.num_rows for batch in self._batches]
            owners.append(np.repeat(np.array(self._of_batches, dtype=np.int64), rows))
        if len(tables) == 1:
            return tables[0], owners[0], wrong
        owner = np.concatenate(owners)
        order = np.argsort(owner, kind="stable")
        return pa.concat_tables(tables).combine_chunks().take(order), owner[order], wrong


def decode_block(records: Sequence[TelemetryMessage], ahead_ms: int = MAX_CLOCK_AHEAD_MS) -> TelemetryBlock:
    """Decodes every record of a block; never raises for what a record holds.

    A message with event time later than its broker time + `ahead_ms` is quarantined: rejected with that reason.
    """
    headers: list[BatchHeader] = []
    source: list[int] = []
    rejected: list[tuple[int, str]] = []
    gathered = _Rows()
    for n, record in enumerate(records):
        try:
            raw = next((value for key, value in record.headers if key == HEADER_KEY), None)
            if raw is None:
                raise MessageError(f"header {HEADER_KEY}: is missing; only agents write to this topic")
            if len(raw) > MAX_HEADER_BYTES:
                raise MessageError(f"header {HEADER_KEY}: {len(raw)} bytes; expected at most {MAX_HEADER_BYTES}")
            header = decode_header(raw)
            check_header(header, raw, record.timestamp_ms, ahead_ms)
            gathered.add(len(headers), record.value)
        except MessageError as error:
            rejected.append((n, str(error)))
            continue
        headers.append(header)
        source.append(n)
    columns, message, wrong = gathered.read()
    appended_ms = np.array([records[n].timestamp_ms for n in source], dtype=np.int64)
    rows = np.bincount(message, minlength=len(headers))
    for n in suspects(headers, rows, appended_ms, columns, ahead_ms):
        first = int(np.searchsorted(message, n))
        try:
            check_rows(headers[n], columns.slice(first, int(rows[n])), int(appended_ms[n]), ahead_ms)
        except MessageError as error:
            wrong[n] = str(error)
    rejected += [(source[n], reason) for n, reason in wrong.items()]
    block = TelemetryBlock(headers, appended_ms, np.array(source, dtype=np.int64), message, columns, sorted(rejected))
    return _without(block, wrong) if wrong else block


def _without(block: TelemetryBlock, wrong: Container[int]) -> TelemetryBlock:
    kept = np.array([n not in wrong for n in range(len(block.headers))], dtype=bool)
    rows = kept[block.message]
    return replace(
        block,
        headers=[header for header, keep in zip(block.headers, kept.tolist(), strict=True) if keep],
        appended_ms=block.appended_ms[kept],
        source=block.source[kept],
        message=(np.cumsum(kept) - 1)[block.message[rows]],
        columns=block.columns.filter(pa.array(rows)).combine_chunks(),
    )
