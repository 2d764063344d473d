"""Messages read by their layout are what Arrow reads of them, byte for byte, and refused where Arrow refuses them."""

import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from gpuledger.agents.batch import Cell, encode_batch
from gpuledger.schemas.telemetry import COLUMNS, HEADER_KEY, BatchHeader, Device
from gpuledger.streams import decode
from gpuledger.streams.decode import READ_COLUMNS, TelemetryBlock, decode_block
from gpuledger.streams.layouts import Layouts

NOW_MS = 1_800_000_000_000
START_MS = NOW_MS - 600_000


@pytest.fixture(autouse=True)
def nothing_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "_layouts", Layouts())


class _Ignorant(Layouts):
    """Never learns: every message goes through Arrow."""

    def is_wanted(self, value: bytes, body: int) -> bool:
        return False


def by_arrow(records: list[Any]) -> TelemetryBlock:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "_layouts", _Ignorant())
        return decode_block(records)


def header(seq: int, devices: int) -> BatchHeader:
    gpus = [Device(f"GPU-{n}", 0, START_MS, 5) for n in range(devices)]
    return BatchHeader("node", "boot", START_MS, "run", START_MS, seq, 1000, START_MS, 0, gpus)


def message(seq: int, rows: int, devices: int, unknown: dict[str, int], seed: int) -> Any:
    """A batch of `rows` samples of `devices`; `unknown` says how many cells of a column are NULL (all where more)."""
    chance = random.Random(seed)
    columns: dict[str, list[Cell]] = {
        "ts_ms": [START_MS + 1000 * (n + 1) for n in range(rows) for _ in range(devices)],
        "device": [n for _ in range(rows) for n in range(devices)],
    }
    count = rows * devices
    for column in COLUMNS[2:]:
        cells: list[Cell] = [chance.randrange(0, 30_000) for _ in range(count)]
        if column.type == "float32":
            cells = [chance.random() for _ in range(count)]
        for n in chance.sample(range(count), min(count, unknown.get(column.name, 0))):
            cells[n] = None
        columns[column.name] = cells
    made = encode_batch(header(seq, devices), columns)
    return record(made.value, dict(made.headers)[HEADER_KEY])


def record(value: bytes, raw: bytes) -> Any:
    return SimpleNamespace(value=value, headers=[(HEADER_KEY, raw)], timestamp_ms=NOW_MS)


def same(found: TelemetryBlock, expected: TelemetryBlock) -> None:
    assert found.headers == expected.headers
    assert found.rejected == expected.rejected
    for name in ("appended_ms", "source", "message"):
        assert getattr(found, name).tolist() == getattr(expected, name).tolist()
    assert found.columns.schema.names == list(READ_COLUMNS)
    # Floats bit for bit: a NaN is not equal to itself.
    for name in READ_COLUMNS:
        mine, others = (block.columns.column(name).combine_chunks() for block in (found, expected))
        assert mine.type == others.type
        assert mine.is_valid().to_pylist() == others.is_valid().to_pylist()
        width = {pa.float32(): pa.int32()}.get(mine.type, mine.type)
        assert mine.fill_null(0).view(width).to_pylist() == others.fill_null(0).view(width).to_pylist()


UNKNOWNS: list[dict[str, int]] = [
    {},
    {"sm_active": 999, "energy_mj": 999, "xid_last": 999},
    {"sm_active": 3, "power_mw": 1, "nvlink_tx_kib": 2},
    {column.name: 999 for column in COLUMNS[2:]},
    {"down_cause": 999, "gpu_util_pct": 5},
]


def mixed(seed: int, count: int) -> Iterator[Any]:
    chance = random.Random(seed)
    for seq in range(count):
        yield message(seq, chance.choice([1, 3, 10]), chance.choice([1, 8]), chance.choice(UNKNOWNS), seed + seq)


@pytest.mark.parametrize("seed", range(2))
def test_a_block_of_many_layouts_is_what_arrow_reads(seed: int) -> None:
    records = list(mixed(seed * 1000, 60))
    expected = by_arrow(records)
    for _ in range(3):  # unknown layouts, then partly, then all known
        same(decode_block(records), expected)
    assert not expected.rejected


def test_layouts_are_learned_from_the_second_message_on(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    by_hand = decode._decode_rows  # pyright: ignore[reportPrivateUsage]

    def counted(value: bytes | None) -> pa.RecordBatch:
        read.append(1)
        return by_hand(value)

    monkeypatch.setattr(decode, "_decode_rows", counted)
    records = [message(seq, 10, 8, {"xid_last": 999}, seq) for seq in range(50)]
    assert not decode_block(records).rejected
    assert len(read) == 2


def test_bytes_changed_anywhere_are_read_or_refused_as_arrow_does() -> None:
    chance = random.Random(5)
    known = [message(seq, 10, 3, {"sm_active": 4, "xid_last": 999, "energy_mj": 999}, seq) for seq in range(3)]
    decode_block(known)
    records: list[Any] = []
    for seq in range(200):
        good = message(seq, 10, 3, {"sm_active": 4, "xid_last": 999, "energy_mj": 999}, seq)
        value = bytearray(good.value)
        for _ in range(chance.choice([1, 1, 4])):
            value[chance.randrange(len(value))] = chance.randrange(256)
        if seq % 10 == 0:
            value = value[: -chance.randrange(1, 20)]
        if seq % 10 == 1:
            value += bytes(chance.randrange(1, 20))
        records.append(record(bytes(value), good.headers[0][1]))
    expected = by_arrow(records)
    assert 5 < len(expected.rejected) < 195
    same(decode_block(records), expected)
    same(decode_block(records), expected)


def test_an_end_or_a_count_of_unknown_values_that_is_not_the_layouts_is_looked_at_by_arrow() -> None:
    known = [message(seq, 10, 3, {"xid_last": 7}, seq) for seq in range(4)]
    decode_block(known)
    raw = known[0].headers[0][1]
    bitmap_lies = bytearray(known[0].value)
    at = next(n for n in range(len(bitmap_lies)) if bitmap_lies[n] != known[1].value[n] and n > 5000)
    bitmap_lies[at] ^= 1
    end_lies = known[0].value[:-4] + b"\x01\x00\x00\x00"
    records = [known[0], record(bytes(bitmap_lies), raw), record(end_lies, raw), known[1]]
    expected = by_arrow(records)
    assert {n for n, _ in expected.rejected} >= {2}
    same(decode_block(records), expected)


def test_a_flood_of_layouts_is_forgotten_and_a_usual_one_learned_again() -> None:
    usual = [message(seq, 10, 1, {}, seq) for seq in range(3)]
    decode_block(usual)
    for rows in range(1, 100):
        once_more = [message(seq, rows, 1, {"power_mw": rows}, seq) for seq in range(3)]
        same(decode_block(once_more), by_arrow(once_more))
    same(decode_block(usual), by_arrow(usual))
    layouts = decode._layouts  # pyright: ignore[reportPrivateUsage]
    assert layouts.find(usual[0].value) is not None
