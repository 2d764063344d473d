"""Attacks on telemetry: Arrow that is torn, forged or packed, rows that contradict their header, and headers."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from gpuledger.agents.batch import encode_rows
from gpuledger.agents.messages import Message
from gpuledger.schemas.telemetry import HEADER_KEY, BatchHeader, decode_header, encode_header
from gpuledger.streams.decode import telemetry_schema
from tests.hostile.attack import Attack, Headers, Kind, Kinds

__all__ = ["add_telemetry_kinds"]

_KEY = HEADER_KEY.encode()
_EOS = b"\xff\xff\xff\xff\0\0\0\0"
_HOSTILE_INTEGERS = (-1, 1, 0x7FFFFFFF, -0x80000000, 1 << 40, (1 << 63) - 1, -(1 << 63), 1 << 32, -8)
_PERIOD_MS = 1000


def _header(message: Message) -> BatchHeader:
    return decode_header(dict(message.headers)[HEADER_KEY])


def _attack(
    message: Message,
    kind: str,
    value: bytes | None,
    reason: str = "value: ",
    header: bytes | BatchHeader | None = None,
    certain: bool = True,
) -> Attack:
    """The message with another value, and with another header where one is given."""
    raw = dict(message.headers)[HEADER_KEY] if header is None else header
    headers: Headers = ((_KEY, encode_header(raw) if isinstance(raw, BatchHeader) else raw),)
    return Attack("telemetry", kind, message.key.encode(), value, headers, reason, certain)


# -- bytes


def _places(value: bytes) -> tuple[int, int, int]:
    """Where the schema ends, where the batch's metadata end, and where its body ends."""
    schema = 8 + struct.unpack_from("<i", value, 4)[0]
    metadata = schema + 8 + struct.unpack_from("<i", value, schema + 4)[0]
    return schema, metadata, len(value) - len(_EOS)


def _cut(rng: random.Random, message: Message) -> Attack:
    schema, metadata, body = _places(message.value)
    end = rng.choice(
        [
            *(1, 4, 7, 8, schema - 1, schema, schema + 4, schema + 8, metadata - 1, metadata),
            *(rng.randrange(1, schema), rng.randrange(schema, metadata), rng.randrange(metadata, body), body - 1),
        ]
    )
    return _attack(message, "truncated", message.value[:end])


def _flip(rng: random.Random, message: Message) -> Attack:
    value = bytearray(message.value)
    _, metadata, _ = _places(message.value)
    for _ in range(rng.choice([1, 1, 2, 8, 40])):
        value[rng.randrange(metadata)] ^= 1 << rng.randrange(8)
    return _attack(message, "flipped", bytes(value), "", certain=False)


def _length(rng: random.Random, message: Message) -> Attack:
    """A huge or negative number at some place of the flatbuffers, where lengths, offsets and counts stand."""
    value = bytearray(message.value)
    schema, metadata, _ = _places(message.value)
    low, high = rng.choice([(0, schema), (schema, metadata), (schema, metadata)])
    for _ in range(rng.choice([1, 1, 3])):
        size, form = rng.choice([(4, "<I"), (8, "<Q"), (8, "<Q")])
        at = rng.randrange(low, high - size) // 4 * 4
        struct.pack_into(form, value, at, rng.choice(_HOSTILE_INTEGERS) % (1 << 8 * size))
    return _attack(message, "length", bytes(value), "", certain=False)


def _claims(rng: random.Random, message: Message) -> Attack:
    value = bytearray(message.value)
    schema, _, _ = _places(message.value)
    struct.pack_into("<i", value, rng.choice([4, schema + 4]), rng.choice([-1, 0x7FFFFFFF, -0x80000000, 1 << 24, 0]))
    return _attack(message, "claimed length", bytes(value))


def _garbage(rng: random.Random, message: Message) -> Attack:
    value = rng.choice(
        [
            *(b"{}", b"ARROW1\0\0" + message.value, b"\0" + message.value, message.value[8:], b"PAR1" + message.value),
            *(
                b"\xff\xff\xff\xff",
                _EOS,
                _EOS * 2,
                bytes(rng.randrange(1, 500)),
                rng.randbytes(rng.randrange(1, 5_000)),
            ),
        ]
    )
    return _attack(message, "no Arrow", value)


def _nothing(rng: random.Random, message: Message) -> Attack:
    return _attack(message, "no value", rng.choice([None, b""]), "value: is empty")


def _more(rng: random.Random, message: Message) -> Attack:
    schema, _, body = _places(message.value)
    batch = message.value[schema:body]
    value = message.value[:schema] + rng.choice(
        [batch + batch + _EOS, batch + rng.randbytes(rng.randrange(1, 200)), batch + _EOS + _EOS, batch + b"\0"]
    )
    return _attack(message, "more than one batch", value, "after its record batch")


# -- schemas


def _written(batch: pa.RecordBatch, options: pa.ipc.IpcWriteOptions | None = None) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema, options=options) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def _valid_rows(message: Message) -> pa.RecordBatch:
    return pa.ipc.open_stream(message.value).read_next_batch()


def _strange_columns(rng: random.Random, rows: int) -> pa.Array:
    texts = [f"{n}" for n in range(rows)]
    return rng.choice(
        [
            lambda: pa.array(texts),
            lambda: pa.array(texts).dictionary_encode(),
            lambda: pa.array([[n] for n in range(rows)]),
            lambda: pa.array([{"a": n, "b": {"c": n}} for n in range(rows)]),
            lambda: pa.array([[("k", n)] for n in range(rows)], type=pa.map_(pa.string(), pa.int64())),
            lambda: pa.nulls(rows),
            lambda: pa.array([n % 2 == 0 for n in range(rows)]),
            lambda: pa.array([float(n) for n in range(rows)], type=pa.float64()),
            lambda: pa.array([0] * rows, type=pa.decimal128(38, 0)),
            lambda: pa.array([b"x"] * rows, type=pa.binary(1)),
            lambda: pa.array(range(rows), type=pa.uint64()),
            lambda: pa.RunEndEncodedArray.from_arrays([max(rows, 1)], [1]) if rows else pa.nulls(0),
            lambda: pa.UnionArray.from_sparse(pa.array([0] * rows, type=pa.int8()), [pa.array(range(rows))]),
        ]
    )()


def _wrong_column(rng: random.Random, message: Message) -> Attack:
    batch = _valid_rows(message)
    n = rng.randrange(batch.num_columns)
    name = batch.schema.names[n]
    arrays = list(batch.columns)
    arrays[n] = _strange_columns(rng, batch.num_rows)
    fields = [field if m != n else pa.field(name, arrays[n].type) for m, field in enumerate(batch.schema)]
    made = pa.RecordBatch.from_arrays(arrays, schema=pa.schema(fields))
    return _attack(message, "wrong column", _written(made), f"column {name}: expected")


def _missing_column(rng: random.Random, message: Message) -> Attack:
    name = rng.choice(["ts_ms", "device"])
    batch = _valid_rows(message)
    return _attack(message, "missing column", _written(batch.drop_columns([name])), f"column {name} is missing")


def _double_column(rng: random.Random, message: Message) -> Attack:
    batch = _valid_rows(message)
    name = rng.choice(batch.schema.names)
    doubled = batch.append_column(name, batch.column(name))
    return _attack(message, "double column", _written(doubled), f"column {name} is there 2 times")


def _other_schema(rng: random.Random, message: Message) -> Attack:
    rows = rng.randrange(1, 50)
    made = pa.RecordBatch.from_arrays([_strange_columns(rng, rows)], names=[rng.choice(["x", "ts_ms", ""])])
    return _attack(message, "another schema", _written(made), "column ts_ms")


def _metadata(rng: random.Random, message: Message) -> Attack:
    batch = _valid_rows(message)
    size = rng.choice([70_000, 300_000, 3_000_000])
    schema = batch.schema.with_metadata({b"note": rng.randbytes(16) * (size // 16)})
    return _attack(message, "megabytes of metadata", _written(batch.cast(schema)), "Arrow schema of")


def _nested(rng: random.Random, message: Message) -> Attack:
    deep: Any = pa.int8()
    for _ in range(rng.choice([70, 130, 400])):
        deep = pa.list_(deep) if rng.random() < 0.5 else pa.struct([("a", deep)])
    batch = _valid_rows(message)
    try:
        value = _written(batch.append_column("deep", pa.nulls(batch.num_rows, deep)))
    except (pa.ArrowException, RecursionError):  # the writer refuses it itself
        value = b"deeper than can be written"
    return _attack(message, "nested type", value)


def _packed(rng: random.Random, message: Message) -> Attack:
    batch = _valid_rows(message)
    if rng.random() < 0.2:  # much of the same: it packs to nearly nothing
        rows = rng.choice([70_000, 500_000])
        columns = {"ts_ms": np.zeros(rows, np.int64), "device": np.zeros(rows, np.int16)}
        batch = pa.RecordBatch.from_arrays([pa.array(column) for column in columns.values()], names=list(columns))
    options = pa.ipc.IpcWriteOptions(compression=rng.choice(["lz4", "zstd"]))
    return _attack(message, "packed buffers", _written(batch, options), "compressed")


def _many_rows(rng: random.Random, message: Message) -> Attack:
    rows = 65_537 + rng.randrange(1_000)
    start = int(_valid_rows(message).column("ts_ms")[0].as_py())
    columns = {"ts_ms": start + np.arange(rows), "device": np.zeros(rows, np.int16)}
    batch = pa.RecordBatch.from_arrays([pa.array(column) for column in columns.values()], names=list(columns))
    return _attack(message, "too many rows", _written(batch), "rows; a batch has at most")


# -- rows against the header


def _rows_of(message: Message, reason: str, kind: str, header: BatchHeader, **columns: list[Any]) -> Attack:
    return _attack(message, kind, encode_rows(columns), reason, header)


def _bad_rows(rng: random.Random, message: Message) -> Attack:
    header = msgspec.structs.replace(_header(message), running=[], gaps=[], host=None)
    fresh = msgspec.structs.replace(
        header, devices=[msgspec.structs.replace(d, previous_ts_ms=None) for d in header.devices]
    )
    at = header.run_start_ms + 1_000
    n = len(header.devices)
    late = [msgspec.structs.replace(d, previous_ts_ms=at + 5) for d in header.devices]
    later = msgspec.structs.replace(header, devices=late)
    end = rng.choice([(1 << 63) - 1, -(1 << 63)])

    def rows(reason: str, kind: str, ts_ms: list[Any], device: list[Any], header: BatchHeader = fresh) -> Attack:
        return _rows_of(message, reason, kind, header, ts_ms=ts_ms, device=device)

    cases: list[Callable[[], Attack]] = [
        lambda: rows("is not an index", "no such device", [at], [n + rng.randrange(99)]),
        lambda: rows("is not an index", "no such device", [at], [-1 - rng.randrange(99)]),
        lambda: rows("the same time", "twice", [at, at + 1, at], [0, 0, 0]),
        lambda: rows("previous_ts_ms", "before the last", [at + 5], [n - 1], later),
        lambda: rows("quarantine", "future", [2_082_758_400_000], [0]),
        lambda: rows("quarantine", "year 9999", [253_402_300_799_000], [0]),
        lambda: rows("before the year 2000", "year 1", [-62_135_596_800_000], [0]),
        lambda: rows("ts_ms", "end of 64 bits", [end], [0]),
    ]
    for name, low in (("energy_mj", 1 << 53), ("power_mw", 10**9)):
        hostile = [-1, low + 1, (1 << 63) - 1, -(1 << 63)]
        cases.append(
            lambda name=name, hostile=hostile: _rows_of(
                message, f"{name}: expected 0..", f"{name} out of bounds", fresh,
                **{"ts_ms": [at, at + 9], "device": [0, 0], name: [5, rng.choice(hostile)]},
            )
        )  # fmt: skip
    return rng.choice(cases)()


def _null_rows(rng: random.Random, message: Message) -> Attack:
    name = rng.choice(["ts_ms", "device"])
    batch = _valid_rows(message)
    values = batch.column(name).to_pylist() or [None]
    values[rng.randrange(len(values))] = None
    n = batch.schema.get_field_index(name)
    array = pa.array(values, type=telemetry_schema().field(name).type)
    if batch.num_rows == 0:
        return _nothing(rng, message)
    made = batch.set_column(n, pa.field(name, array.type), array)
    return _attack(message, "NULL", _written(made), "may not be NULL")


def _centuries(rng: random.Random, message: Message) -> Attack:
    """A few rows that would become millions of pieces."""
    header = _header(message)
    start = 946_684_800_000 + rng.randrange(10**9)
    devices = [type(header.devices[0])(f"GPU-{n}", previous_ts_ms=start) for n in range(2_000)]
    long = msgspec.structs.replace(header, devices=devices, period_ms=3_600_000, host=None, running=[], gaps=[])
    rows = {"ts_ms": [start + 10_800_000] * 2_000, "device": list(range(2_000))}
    return _attack(message, "centuries", encode_rows(rows), "minutes of devices", long)


# -- headers

_NOW_MS = 1_700_000_000_000
_REVERSED = {"run_id": "r", "first_seq": 5, "last_seq": 2, "from_ms": _NOW_MS, "to_ms": _NOW_MS, "batches": 1}
_OUT_OF_BOUNDS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("boot_start_ms", (-1, 0, 1 << 70, 253_402_300_799_000, -62_135_596_800_000, 10**4000, "x", 1.5, None)),
    ("run_start_ms", (-1, 0, 1 << 64, 253_402_300_799_000, 4_102_444_800_000)),
    ("seq", (-1, 1 << 32, 1 << 63, 1 << 64, 1.5, "0")),
    ("period_ms", (0, -1, 3_600_001, 1 << 31, 1 << 63)),
    ("active_threshold", (0, -0.1, 1.01, 1e300, "high", None)),
    ("version", (0, -1, 99, 1 << 64, "1")),
    ("node", ("", "x" * 257, "a\x00b", "a\x1b[2J", "a\nb", 7, None, {}, "\u202eabc")),
    ("boot_id", ("", "b" * 100_000, "\x7f", [])),
    ("run_id", ("", "r" * 257, "\r\n", 0)),
    ("devices", (None, {}, "x", [1], [{}], [{"gpu": 1}], [{"gpu": ""}], [{"gpu": "g" * 300}], [{"gpu": "g"}] * 2)),
    ("running", ("x", [1], ["x" * 257], ["a\x00"], [None])),
    ("gaps", ("x", [{}], [_REVERSED], [{**_REVERSED, "last_seq": 9, "to_ms": 5}])),
    ("host", ("x", [], {"ts_ms": "now"}, {"ts_ms": 5}, {"ts_ms": 253_402_300_799_000})),
    ("host", ({"ts_ms": _NOW_MS, "memory_used_bytes": -1}, {"ts_ms": _NOW_MS, "load_1m": 1e300})),
)


def _header_field(rng: random.Random, message: Message) -> Attack:
    raw: dict[str, Any] = json.loads(dict(message.headers)[HEADER_KEY])
    name, values = rng.choice(_OUT_OF_BOUNDS)
    raw[name] = rng.choice(values)
    return _attack(message, f"header {name}", message.value, "header", json.dumps(raw).encode())


def _header_device(rng: random.Random, message: Message) -> Attack:
    raw: dict[str, Any] = json.loads(dict(message.headers)[HEADER_KEY])
    bounds = {"instance": (-1, 65_536, 1 << 64), "previous_ts_ms": (-1, 1 << 65), "previous_energy_mj": (-1, 1 << 60)}
    name = rng.choice([*bounds, "epoch_ms"])
    rng.choice(raw["devices"])[name] = rng.choice(bounds.get(name, (-1, 1 << 63)))
    return _attack(message, f"header devices.{name}", message.value, name, json.dumps(raw).encode())


def _header_missing(rng: random.Random, message: Message) -> Attack:
    raw: dict[str, Any] = json.loads(dict(message.headers)[HEADER_KEY])
    del raw[rng.choice(["node", "boot_id", "boot_start_ms", "run_id", "run_start_ms", "seq", "period_ms", "devices"])]
    return _attack(message, "header field missing", message.value, "missing required field", json.dumps(raw).encode())


def _header_bytes(rng: random.Random, message: Message) -> Attack:
    raw = dict(message.headers)[HEADER_KEY]
    deep = raw[:-1] + b',"x":' + b"[" * 5_000 + b"]" * 5_000 + b"}"
    made = rng.choice(
        [
            *(raw[: rng.randrange(len(raw))], b"\xff" + raw, raw.decode().encode("utf-16"), b"", b"null", b"[]", b"{}"),
            *(raw.replace(b'"seq":', b'"seq":NaN,"x":'), raw.replace(b'"node":"', b'"node":"\xff\xfe'), deep),
            *(rng.randbytes(rng.randrange(1, 400)), raw + raw, raw[:-1] + b',"x":"' + b"y" * (1 << 20) + b'"}'),
        ]
    )
    return _attack(message, "header bytes", message.value, "header", made)


def _header_none(rng: random.Random, message: Message) -> Attack:
    raw = dict(message.headers)[HEADER_KEY]
    headers: Headers = rng.choice(
        [
            (),
            ((_KEY, None),),
            ((_KEY.upper(), raw),),
            ((b"", raw),),
            ((_KEY + b"\0", raw),),
            ((b"\xff\xfe", raw),),
            ((_KEY, b"{"), (_KEY, raw)),
            tuple((b"h%d" % n, b"x") for n in range(rng.choice([150, 2_000]))),
            ((b"large", bytes(rng.choice([70_000, 2_000_000]))),),
            ((b"gpuledger-tick", b"1"),),
        ]
    )
    return Attack("telemetry", "no header", message.key.encode(), message.value, headers, "header")


_KINDS: tuple[Kind, ...] = (
    *(_cut, _cut, _flip, _flip, _length, _length, _length, _claims, _garbage, _nothing, _more),
    *(_wrong_column, _missing_column, _double_column, _other_schema, _nested, _packed, _bad_rows, _bad_rows, _bad_rows),
    *(_null_rows, _header_field, _header_field, _header_device, _header_missing, _header_bytes, _header_none),
)
#: Each of these has a megabyte or makes work for one.
_LARGE: tuple[Kind, ...] = (_metadata, _many_rows, _centuries)


def add_telemetry_kinds(kinds: Kinds, large: bool = True) -> None:
    """Every kind of attack on telemetry; `large` ones now and then."""
    for kind in _KINDS:
        kinds.add("telemetry", kind)
    if large:
        kinds.add("telemetry", lambda rng, message: rng.choice(_LARGE if rng.random() < 0.1 else _KINDS)(rng, message))
