"""A batch holds exactly what was measured, whatever reads it."""

from __future__ import annotations

import struct
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuledger.agents.batch import Cell, encode_batch, encode_rows
from gpuledger.agents.exceptions import BatchError
from gpuledger.schemas.telemetry import COLUMN_NAMES, COLUMNS, HEADER_KEY, BatchHeader, Device, decode_header

_ARROW = {"int16": pa.int16(), "int32": pa.int32(), "int64": pa.int64(), "float32": pa.float32()}
_BITS = {"int16": 15, "int32": 31, "int64": 63}


def _header(devices: int) -> BatchHeader:
    return BatchHeader(
        node="node-1",
        boot_id="boot",
        boot_start_ms=1_789_000_000_000,
        run_id="run",
        run_start_ms=1_790_000_000_000,
        seq=7,
        period_ms=1000,
        anchor_wall_ms=1_790_000_000_000,
        anchor_boottime_ms=1_000_000_000,
        devices=[Device(f"GPU-{n}") for n in range(devices)],
        running=["b", "a"],
    )


def _table(value: bytes) -> pa.Table:
    table: pa.Table = pa.ipc.open_stream(value).read_all()
    table.validate(full=True)
    return table


def _cell(kind: str) -> st.SearchStrategy[Cell]:
    if kind == "float32":
        return st.floats(width=32, allow_nan=False)
    bits = _BITS[kind]
    return st.integers(-(2**bits), 2**bits - 1)


@st.composite
def _columns(draw: st.DrawFn) -> dict[str, list[Cell]]:
    rows = draw(st.integers(0, 20))
    columns: dict[str, list[Cell]] = {}
    for column in COLUMNS:
        cell = _cell(column.type)
        if column.name == "device":
            cell = st.integers(0, 7)
        how = draw(st.sampled_from(["absent", "null", "full", "mixed"])) if column.nullable else "full"
        if how == "null":
            columns[column.name] = [None] * rows
        elif how != "absent":
            wanted = st.one_of(st.none(), cell) if how == "mixed" else cell
            columns[column.name] = draw(st.lists(wanted, min_size=rows, max_size=rows))
    return columns


@settings(max_examples=60, deadline=None)
@given(_columns())
def test_what_is_encoded_is_read_by_pyarrow(columns: dict[str, list[Cell]]) -> None:
    message = encode_batch(_header(8), columns)
    table = _table(message.value)
    rows = len(columns["ts_ms"])
    assert table.num_rows == rows
    for name in COLUMN_NAMES:
        assert table.column(name).to_pylist() == columns.get(name, [None] * rows)


def test_all_columns_of_the_contract_in_order_with_their_types() -> None:
    schema = _table(encode_rows({"ts_ms": [1], "device": [0]})).schema
    expected = [pa.field(column.name, _ARROW[column.type], column.nullable) for column in COLUMNS]
    assert list(schema) == expected


def _schema_bytes(value: bytes) -> bytes:
    """The first IPC message of the stream: continuation mark, length, metadata."""
    mark, length = struct.unpack_from("<Ii", value)
    assert mark == 0xFFFFFFFF
    return value[: 8 + length]


def test_schema_bytes_are_the_same_in_every_message() -> None:
    batches: list[dict[str, list[Cell]]] = [
        {"ts_ms": [], "device": []},
        {"ts_ms": [1], "device": [0]},
        {"ts_ms": [1] * 80, "device": [0] * 80, "power_mw": [700_000] * 80},
        {"ts_ms": [1, 2], "device": [0, 1], "power_mw": [None, 5]},
    ]
    schemas = {_schema_bytes(encode_rows(columns)) for columns in batches}
    assert len(schemas) == 1
    assert pa.ipc.read_schema(pa.py_buffer(schemas.pop())).names == list(COLUMN_NAMES)


def test_the_header_key_and_topic_go_beside_the_rows() -> None:
    message = encode_batch(_header(1), {"ts_ms": [5], "device": [0]})
    assert (message.topic, message.key) == ("telemetry", "node-1")
    assert [key for key, _ in message.headers] == [HEADER_KEY]
    assert decode_header(message.headers[0][1]) == _header(1)


def test_a_node_without_gpus_sends_no_rows() -> None:
    message = encode_batch(_header(0), {})
    assert _table(message.value).num_rows == 0


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        ({"ts_ms": [1], "device": [0], "gpu_util": [1.0]}, "gpu_util: is no telemetry column"),
        ({"ts_ms": [1, 2], "device": [0]}, "device: has 1 rows"),
        ({"ts_ms": [1, None], "device": [0, 0]}, "ts_ms: is NULL in row 1"),
        ({"device": [0]}, "ts_ms: is missing"),
        ({"ts_ms": [None], "device": [0]}, "ts_ms: is missing"),
        ({"ts_ms": [1], "device": [0], "power_mw": [1.5]}, "power_mw: expected int64"),
        ({"ts_ms": [1], "device": [0], "remap_pending": [2**15]}, "remap_pending: expected int16"),
        ({"ts_ms": [1], "device": [1]}, "device: an index is outside the 1 devices"),
    ],
)
def test_wrong_rows_are_named(columns: dict[str, Any], text: str) -> None:
    with pytest.raises(BatchError, match=text):
        encode_batch(_header(1), columns)
