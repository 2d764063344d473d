"""Encodes what one node saw between two flushes as one self-sufficient Kafka message.

The value is an Arrow IPC stream written with nanoarrow, whose schema bytes are the same in every message. Batches
whose columns are all known or all unknown (nearly every one) are written from a template of the same layout.
"""

from __future__ import annotations

import io
from array import array
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import nanoarrow as na
from nanoarrow.ipc import StreamWriter

from gpuledger.agents.exceptions import BatchError
from gpuledger.agents.messages import Message
from gpuledger.schemas.telemetry import COLUMN_NAMES, COLUMNS, HEADER_KEY, BatchHeader, Column, encode_header

__all__ = ["Cell", "Columns", "encode_batch", "encode_rows"]

Cell = int | float | None
Columns = Mapping[str, Sequence[Cell]]

_ARROW: dict[str, Any] = {"int16": na.int16, "int32": na.int32, "int64": na.int64, "float32": na.float32}
_CODE = {"int16": "h", "int32": "i", "int64": "q", "float32": "f"}
_FIELDS: list[Any] = [_ARROW[column.type](nullable=column.nullable) for column in COLUMNS]
_SCHEMA: Any = na.c_schema(na.struct(dict(zip(COLUMN_NAMES, _FIELDS, strict=True)), nullable=False))
_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
#: Rows x patterns of known columns that are kept as templates: one per flush size and kind of device.
_TEMPLATES = 64


def encode_batch(header: BatchHeader, columns: Columns) -> Message:
    """The message of one batch: every column of the contract in its order, key the node, the header beside it.

    `columns` maps column names to one cell per row; a column that is absent is unknown (NULL) in every row. Rows are
    in the order of (`ts_ms`, `device`) the caller chose; zero rows are a valid batch.

    Raises:
        BatchError: an unknown column, unequal lengths, NULL where the contract forbids it, a value that does not fit
            its type, or a device index that the header does not list.
    """
    indexes = columns.get("device", ())
    if indexes:
        numbers = [n for n in indexes if n is not None]
        if min(numbers, default=0) < 0 or max(numbers, default=0) >= len(header.devices):
            raise BatchError(f"device: an index is outside the {len(header.devices)} devices of the header")
    return Message("telemetry", header.node, encode_rows(columns), ((HEADER_KEY, encode_header(header)),))


def encode_rows(columns: Columns) -> bytes:
    """The Arrow IPC stream of the rows, alone (see `encode_batch` for the rules and the errors)."""
    rows = _row_count(columns)
    cells: list[array[Any] | None] = []
    known: list[bool] = []
    for column in COLUMNS:
        values = columns.get(column.name)
        if values is None or rows == 0 or (values[0] is None and values.count(None) == rows):
            if rows and not column.nullable:
                raise BatchError(f"{column.name}: is missing; every row needs one")
            known.append(rows == 0)
            cells.append(None)
        elif None in values:
            return _encode(rows, [_child(c, rows, columns.get(c.name)) for c in COLUMNS])
        else:
            known.append(True)
            cells.append(_pack(column, values))
    template = _template(rows, tuple(known))
    if template is None:
        return _encode(rows, [_child(c, rows, columns.get(c.name)) for c in COLUMNS])
    prefix, tails = template
    parts = [prefix]
    for data, tail in zip(cells, tails, strict=True):
        if data is not None:
            parts.append(data.tobytes())
        parts.append(tail)
    parts.append(_END_OF_STREAM)
    return b"".join(parts)


def _row_count(columns: Columns) -> int:
    rows: int | None = None
    for name, values in columns.items():
        if name not in _NAMES:
            raise BatchError(f"{name}: is no telemetry column; expected one of {', '.join(COLUMN_NAMES)}")
        if rows is None:
            rows = len(values)
        elif len(values) != rows:
            raise BatchError(f"{name}: has {len(values)} rows where the columns before it have {rows}")
    return rows or 0


_NAMES = frozenset(COLUMN_NAMES)


def _pack(column: Column, values: Sequence[Cell]) -> array[Any]:
    try:
        return array(_CODE[column.type], values)  # pyright: ignore[reportArgumentType, reportCallIssue]
    except (TypeError, OverflowError) as error:
        raise BatchError(f"{column.name}: expected {column.type} values: {error}") from error


def _child(column: Column, rows: int, values: Sequence[Cell] | None) -> Any:
    """One column as a nanoarrow array; NULLs have the value 0 under them, so equal rows are equal bytes."""
    field = _FIELDS[COLUMN_NAMES.index(column.name)]
    if values is None:
        values = [None] * rows
    nulls = values.count(None)
    if nulls and not column.nullable:
        raise BatchError(f"{column.name}: is NULL in row {values.index(None)}; every row needs one")
    data = _pack(column, [0 if value is None else value for value in values] if nulls else values)
    validity = None
    if nulls:
        bits = 0
        for n, value in enumerate(values):
            if value is not None:
                bits |= 1 << n
        validity = bits.to_bytes((rows + 7) // 8, "little")
    return na.c_array_from_buffers(field, rows, [validity, data], null_count=nulls)


def _encode(rows: int, children: list[Any]) -> bytes:
    out = io.BytesIO()
    batch = na.c_array_from_buffers(_SCHEMA, rows, [None], null_count=0, children=children)
    StreamWriter.from_writable(out).serialize_stream(batch)
    return out.getvalue()


@lru_cache(_TEMPLATES)
def _template(rows: int, known: tuple[bool, ...]) -> tuple[bytes, tuple[bytes, ...]] | None:
    """What surrounds the data of a batch in which each column is known in all rows or in none.

    Returns the bytes before the body, and per column what follows its data in the body (for an unknown column its
    whole validity and data). They are cut from nanoarrow's own output, which must have the layout computed here
    (validity of unknown columns only, then data, each padded to 8 bytes); None where another version writes another.
    """
    children = [_child(c, rows, [1] * rows if is_known else None) for c, is_known in zip(COLUMNS, known, strict=True)]
    stream = _encode(rows, children)
    tails: list[bytes] = []
    body = 0
    for column, is_known in zip(COLUMNS, known, strict=True):
        data = rows * array(_CODE[column.type]).itemsize
        if is_known:
            tails.append(bytes(-data % 8))
            body += data + len(tails[-1])
        else:
            validity = (rows + 7) // 8
            tails.append(bytes(validity + -validity % 8 + data + -data % 8))
            body += len(tails[-1])
    prefix = stream[: len(stream) - body - len(_END_OF_STREAM)]
    rebuilt = [prefix]
    for column, is_known, tail in zip(COLUMNS, known, tails, strict=True):
        rebuilt += [_pack(column, [1] * rows).tobytes() if is_known else b"", tail]
    if b"".join([*rebuilt, _END_OF_STREAM]) != stream:
        return None
    return prefix, tuple(tails)
