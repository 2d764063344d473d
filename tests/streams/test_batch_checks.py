"""What a batch may not do: each rule by an example, and the screen of a whole block held to the rules one by one."""

from __future__ import annotations

import json
import random
import struct
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest

from gpuledger.agents.batch import encode_batch, encode_rows
from gpuledger.schemas.exceptions import MessageError
from gpuledger.schemas.telemetry import HEADER_KEY, BatchHeader, Device, encode_header
from gpuledger.streams import decode
from gpuledger.streams.batch_checks import check_rows, suspects
from gpuledger.streams.blocks import Record
from gpuledger.streams.decode import decode_block
from gpuledger.streams.fragments import fragments

T0 = 1_760_000_000_000
MINUTE = 60_000
AHEAD = 120_000


def header(devices: list[Device] | None = None, **changes: Any) -> BatchHeader:
    made = BatchHeader(
        node="n",
        boot_id="b",
        boot_start_ms=T0,
        run_id="r",
        run_start_ms=T0,
        seq=0,
        period_ms=1000,
        anchor_wall_ms=T0,
        anchor_boottime_ms=0,
        devices=[Device("g", 0, T0, 5)] if devices is None else devices,
    )
    return msgspec.structs.replace(made, **changes)


def record(value: bytes, of: BatchHeader | None = None, appended_ms: int = T0 + 60_000) -> Record:
    made = encode_header(header() if of is None else of)
    return Record("telemetry", 0, 0, appended_ms, b"n", value, ((HEADER_KEY, made),))


def reason(value: bytes, of: BatchHeader | None = None) -> str:
    """Why it is refused; "" where it is not."""
    rejected = decode_block([record(value, of)]).rejected
    return rejected[0][1] if rejected else ""


GOOD = encode_batch(header(), {"ts_ms": [T0 + 1000], "device": [0]}).value


def stream(batch: pa.RecordBatch, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def rows(**columns: list[Any]) -> pa.RecordBatch:
    schema = decode.telemetry_schema()
    arrays = [pa.array(values, type=schema.field(name).type) for name, values in columns.items()]
    return pa.RecordBatch.from_arrays(arrays, names=list(columns))


# -- bytes


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_compressed_buffers_are_refused_before_they_are_unpacked(codec: str) -> None:
    zeros = np.zeros(1_000_000, dtype=np.int64)
    batch = pa.RecordBatch.from_arrays([pa.array(zeros), pa.array(zeros.astype(np.int16))], names=["ts_ms", "device"])
    packed = stream(batch, compression=codec)
    assert len(packed) < 100_000
    before = pa.total_allocated_bytes()
    assert "its Arrow buffers are compressed; leave compression to Kafka" in reason(packed)
    assert pa.total_allocated_bytes() - before < 1_000_000


def test_a_second_batch_is_not_dropped_in_silence() -> None:
    end = 8 + struct.unpack_from("<i", GOOD, 4)[0]
    assert not reason(GOOD) and not reason(GOOD[:-8]), "with and without the end of the stream"
    assert "after its record batch; a message holds one batch" in reason(GOOD[:-8] + GOOD[end:])


def test_a_column_that_is_there_twice_is_refused() -> None:
    once = rows(ts_ms=[T0 + 1000], device=[0], energy_mj=[7])
    assert "column energy_mj is there 2 times" in reason(stream(once.append_column("energy_mj", once.column(2))))


def test_other_flags_of_a_column_do_not_spoil_the_block() -> None:
    """pyarrow puts no two batches into one table whose columns differ in whether NULL is allowed."""
    wide = pa.schema([field.with_nullable(True) for field in decode.telemetry_schema()])
    arrays = [pa.array([T0 + 1000 if n == 0 else 0 if n == 1 else None], type=f.type) for n, f in enumerate(wide)]
    odd = stream(pa.RecordBatch.from_arrays(arrays, schema=wide))
    block = decode_block([record(GOOD), record(odd)])
    assert block.rejected == [] and block.columns.num_rows == 2


def test_strange_schemas_do_not_keep_a_new_one_from_being_remembered() -> None:
    decode._known_schemas.clear()
    for n in range(200):
        batch = rows(ts_ms=[T0 + 1000], device=[0])
        assert not reason(stream(batch.append_column(f"later_{n}", pa.array([n]))))
    # Of a layout that was not seen before, so that its schema is looked at.
    assert not reason(encode_rows({"ts_ms": [T0 + n for n in range(1, 38)], "device": [0] * 37}))
    assert len(decode._known_schemas) == 64
    assert any(expected for _, expected in decode._known_schemas.values())


# -- how much


def test_a_small_batch_may_not_become_a_mountain_of_pieces() -> None:
    devices = [Device(f"g{n}", 0, T0 - 8_000_000) for n in range(1_500)]
    long = header(devices, period_ms=3_600_000)
    value = encode_rows({"ts_ms": [T0] * 1_500, "device": list(range(1_500))})
    assert "minutes of devices, and a batch may cover" in reason(value, long)
    assert not reason(encode_rows({"ts_ms": [T0] * 900, "device": list(range(900))}), long)


def test_a_long_sleep_of_a_node_is_no_mountain() -> None:
    """What counts is what is covered, three periods a sample, and not how far apart the samples are."""
    asleep = header([Device(f"g{n}", 0, T0 - 40 * 86_400_000) for n in range(64)])
    assert not reason(encode_rows({"ts_ms": [T0] * 64, "device": list(range(64))}), asleep)


@pytest.mark.parametrize("count", [65_536, 65_537])
def test_a_batch_has_bounded_rows(count: int) -> None:
    batch = rows(ts_ms=list(range(T0 + 1, T0 + 1 + count)), device=[0] * count)
    assert (reason(stream(batch)) != "") == (count > 65_536)


def test_a_header_has_a_bounded_size() -> None:
    assert "expected at most 1048576" in reason(GOOD, header(running=["x" * 250] * 5_000))


# -- names and times of the header


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"node": "a\x1b[2J"}, "node: holds the control character U+001B"),
        ({"run_id": "a\u202eb"}, "run_id: holds the control character U+202E"),
        ({"boot_id": "\x7f"}, "boot_id: holds the control character U+007F"),
        ({"node": "n" * 257}, "node: expected at most 256 characters, got 257"),
        ({"running": ["ok", "x" * 300]}, "running: expected at most 256 characters"),
        ({"devices": [Device("")]}, "devices[0].gpu: is empty"),
        ({"period_ms": 3_600_001}, "period_ms: expected 1 to 3600000"),
        (
            {"boot_start_ms": 1 << 2_000},
            "boot_start_ms: expected 946684800000 to 7258118399999, got a number of 2001 bits",
        ),
        ({"boot_start_ms": T0 + 10**10}, "quarantine: header gpuledger-batch: boot_start_ms"),
        ({"run_start_ms": T0 + 10**10}, "quarantine: header gpuledger-batch: boot_start_ms, run_start_ms"),
    ],
)
def test_a_header_is_refused_by_name(change: dict[str, Any], text: str) -> None:
    raw = json.loads(encode_header(header()))
    raw |= {name: msgspec.to_builtins(value) for name, value in change.items()}
    made = json.dumps(raw).encode()
    rejected = decode_block([Record("t", 0, 0, T0, b"n", GOOD, ((HEADER_KEY, made),))]).rejected
    assert text in rejected[0][1]


def test_names_in_any_script_are_taken() -> None:
    assert not reason(GOOD, header(node="узел-7 «ä» 節点", run_id='a"b\\c'))


# -- values


@pytest.mark.parametrize(("name", "value"), [("power_mw", 10**9 + 1), ("power_mw", -1), ("energy_mj", (1 << 53) + 1)])
def test_a_value_that_cannot_be_computed_with_is_refused(name: str, value: int) -> None:
    assert f"{name}: expected 0.." in reason(encode_rows({"ts_ms": [T0 + 1000], "device": [0], name: [value]}))


def test_energy_is_exact_where_64_bits_do_not_hold_the_product() -> None:
    last = 1 << 53
    sent = header([Device("g", 0, T0 - 400 * 86_400_000, 0)], period_ms=60_000)
    table = fragments(decode_block([record(encode_rows({"ts_ms": [T0], "device": [0], "energy_mj": [last]}), sent)]))
    assert table is not None
    width = 400 * 86_400_000
    (first, *_), ends = table.table["energy_first_mj"].to_pylist(), table.table["energy_last_mj"].to_pylist()
    lo = width - 180_000
    energy_lo = last * lo // width
    assert first == energy_lo and ends[-1] == last
    cut = T0 // MINUTE * MINUTE
    expected = energy_lo + (last - energy_lo) * (cut - (T0 - 180_000)) // 180_000
    assert table.table.slice(table.table.num_rows - 1)["energy_first_mj"].to_pylist() == [expected]


# -- the screen


def chance(rng: random.Random) -> tuple[BatchHeader, dict[str, list[Any]]]:
    """A batch that breaks a rule of the rows now and then."""
    count = rng.randrange(1, 4)
    previous = [rng.choice([None, T0, T0 + 4_000]) for _ in range(count)]
    devices = [Device(f"g{n}", 0, at) for n, at in enumerate(previous)]
    wild = rng.random() < 0.2
    n = rng.randrange(0, 6)
    times = [T0 + rng.randrange(1, 9) * 1_000 for _ in range(n)]
    hostile = [0, 5, T0 + 10**9, (1 << 63) - 1, -(1 << 63), 946_684_799_999]
    columns: dict[str, list[Any]] = {
        "ts_ms": [rng.choice(hostile) if wild and rng.random() < 0.3 else at for at in times],
        "device": [rng.randrange(-1 if wild else 0, count + (1 if wild else 0)) for _ in times],
        "energy_mj": [rng.choice([None, 7, *((-1, 1 << 60) if wild else ())]) for _ in times],
        "power_mw": [rng.choice([None, 9, *((-1, 1 << 40) if wild else ())]) for _ in times],
    }
    return header(devices, period_ms=rng.choice([1_000, 3_600_000])), columns


@pytest.mark.parametrize("seed", range(30))
def test_the_screen_lets_nothing_through_that_a_rule_refuses(seed: int) -> None:
    rng = random.Random(seed)
    made = [chance(rng) for _ in range(60)]
    schema = decode.telemetry_schema()
    batches: list[pa.RecordBatch] = []
    for _, columns in made:
        count = len(columns["ts_ms"])
        arrays = [
            pa.array(columns[f.name], type=f.type) if f.name in columns else pa.nulls(count, f.type) for f in schema
        ]
        batches.append(pa.RecordBatch.from_arrays(arrays, schema=schema))
    appended = T0 + 3_600_000
    wrong: set[int] = set()
    for n, (of, _) in enumerate(made):
        try:
            if batches[n].num_rows:
                check_rows(of, pa.Table.from_batches([batches[n]]), appended, AHEAD)
        except MessageError:
            wrong.add(n)
    counts = np.array([batch.num_rows for batch in batches], dtype=np.int64)
    table = pa.Table.from_batches(batches).combine_chunks()
    found = set(suspects([of for of, _ in made], counts, np.full(len(made), appended), table, AHEAD))
    assert 5 < len(wrong) < 50
    assert wrong == found, "hardly any other is suspected; none here"
