"""Numbers of a header that the tables cannot hold are refused by name, before anything of the batch is stored."""

from typing import Any

import msgspec
import pytest

from gpuledger.agents.batch import encode_batch
from gpuledger.schemas.telemetry import HEADER_KEY, BatchHeader, Device, Gap, HostReading, encode_header
from gpuledger.streams.blocks import Record
from gpuledger.streams.decode import decode_block

T0 = 1_760_000_000_000
GOOD = BatchHeader(
    node="n",
    boot_id="b",
    boot_start_ms=T0,
    run_id="r",
    run_start_ms=T0,
    seq=0,
    period_ms=1000,
    anchor_wall_ms=T0,
    anchor_boottime_ms=0,
    devices=[Device("g", 0, T0, 5)],
    host=HostReading(ts_ms=T0, memory_used_bytes=1),
    gaps=[Gap("r", 0, 3, T0, T0 + 1, 4)],
)
VALUE = encode_batch(GOOD, {"ts_ms": [T0 + 1000], "device": [0]}).value


def refused(header: BatchHeader) -> list[str]:
    """The reasons for which a batch with this header is not stored."""
    record = Record("telemetry", 0, 0, T0 + 2000, b"n", VALUE, ((HEADER_KEY, encode_header(header)),))
    return [reason for _, reason in decode_block([record]).rejected]


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("boot_start_ms", {"boot_start_ms": 1 << 70}),
        ("boot_start_ms", {"boot_start_ms": 0}),
        ("run_start_ms", {"run_start_ms": -1}),
        ("seq", {"seq": 1 << 32}),
        ("period_ms", {"period_ms": 1 << 40}),
        ("devices.instance", {"devices": [Device("g", 1 << 16)]}),
        ("devices.previous_ts_ms", {"devices": [Device("g", 0, 1 << 65)]}),
        ("devices.previous_energy_mj", {"devices": [Device("g", 0, T0, -1)]}),
        ("host.memory_used_bytes", {"host": HostReading(ts_ms=T0, memory_used_bytes=1 << 63)}),
        ("host.ts_ms", {"host": HostReading(ts_ms=5)}),
        ("gaps.last_seq", {"gaps": [Gap("r", 0, 1 << 33, T0, T0, 1)]}),
        ("gaps.from_ms", {"gaps": [Gap("r", 0, 1, 1 << 64, T0, 1)]}),
    ],
)
def test_a_number_out_of_bounds_is_named(field: str, change: dict[str, Any]) -> None:
    assert not refused(GOOD)
    reasons = refused(msgspec.structs.replace(GOOD, **change))
    assert len(reasons) == 1 and reasons[0].startswith(f"header {HEADER_KEY}: {field}: expected "), reasons
