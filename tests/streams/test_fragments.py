"""Telemetry to fragments, by worked examples: given these samples, a minute's timeline, energy and gauges are these.

All times are offsets from `M`, the start of a minute. Counters are in mJ, so a GPU that draws 100 W adds 100,000 in a
second.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pyarrow as pa
import pytest

from gpuledger.agents.batch import encode_batch
from gpuledger.schemas.telemetry import GAUGES, Activity, BatchHeader, Device, DownCause
from gpuledger.streams.decode import TelemetryBlock, decode_block
from gpuledger.streams.fragments import SLOPE_BIN_MW, Fragments, fragments

M = 1_700_000_040_000
S, MINUTE = 1000, 60_000
ACTIVE, IDLE, UNOBSERVED, DOWN = (int(a) for a in (Activity.ACTIVE, Activity.IDLE, Activity.UNOBSERVED, Activity.DOWN))
APPENDED = M + 7_200_123


class Message(NamedTuple):
    value: bytes
    headers: tuple[tuple[str, bytes], ...]
    timestamp_ms: int


class Sample(NamedTuple):
    """One row: `at` after M; the other columns by name."""

    at: int
    device: int
    columns: dict[str, Any]


def sample(at: int, energy_mj: int | None = None, device: int = 0, **columns: Any) -> Sample:
    """A sample of an active GPU, unless the columns say otherwise."""
    return Sample(at, device, {"energy_mj": energy_mj, "sm_active": 0.5} | columns)


def gpu(
    name: str = "g", previous: int | None = 0, energy_mj: int | None = None, instance: int = 0, epoch_ms: int = 0
) -> Device:
    """A device whose previous sample was `previous` after M."""
    at = None if previous is None else M + previous
    return Device(name, instance=instance, previous_ts_ms=at, previous_energy_mj=energy_mj, epoch_ms=epoch_ms)


def message(devices: list[Device], *samples: Sample, appended: int = APPENDED, **header: Any) -> Message:
    """What an agent sends: here with a period of 10 s."""
    times: dict[str, Any] = {
        "boot_start_ms": M - 9_000_000,
        "run_start_ms": M - 5_000,
        "anchor_wall_ms": 0,
        "anchor_boottime_ms": 0,
    }
    names: dict[str, Any] = {"node": "n0", "boot_id": "boot", "run_id": "run", "seq": 7, "period_ms": 10 * S}
    made = encode_batch(
        BatchHeader(devices=devices, **(times | names | header)),
        {
            "ts_ms": [M + each.at for each in samples],
            "device": [each.device for each in samples],
            **{name: [each.columns.get(name) for each in samples] for each in samples for name in each.columns},
        },
    )
    return Message(made.value, tuple(made.headers), appended)


def block(*messages: Message) -> TelemetryBlock:
    found = decode_block(messages)
    assert found.rejected == []
    return found


def fold(*messages: Message) -> Fragments:
    found = fragments(block(*messages))
    assert found is not None
    return found


def rows(*messages: Message) -> list[dict[str, Any]]:
    """The fragments, with the minute as an offset from M."""
    found = fold(*messages)
    table = found.table.set_column(0, "minute", found.table.column("minute").cast(pa.int64()))
    listed = table.to_pylist()
    assert {(row["minute"], row["gpu"]) for row in listed} == {(m, gpu) for m in found.seen for gpu in found.seen[m]}
    return [{**row, "minute": row["minute"] - M} for row in listed]


def timeline(row: dict[str, Any]) -> list[tuple[int, int, int, int | None, int | None]]:
    """(start, duration, activity, counter at the start, counter at the end) of the segments."""
    names = ("start_ms", "duration_ms", "activity", "energy_from_mj", "energy_to_mj")
    return list(zip(*(row[f"segment_{name}"] for name in names), strict=True))


def activities(*samples: Sample, **header: Any) -> list[int]:
    """What each of the samples, 10 s apart, says that the GPU did."""
    (row,) = rows(message([gpu()], *samples, **header))
    starts = [start for start, *_ in timeline(row)]
    spread = [max(n for n, start in enumerate(starts) if start < each.at) for each in samples]
    return [row["segment_activity"][n] for n in spread]


# ------------------------------------------------------------------------------------------------- the whole row


def test_one_sample_makes_this_row() -> None:
    # 20 s at 300 W: the counter goes from 1,000,000 to 7,000,000 mJ; NVML said 295 W meanwhile.
    readings: dict[str, Any] = {
        "gpu_util_pct": 98.0,
        "power_mw": 295_000,
        "temperature_gpu_c": 61.0,
        "memory_used_bytes": 1 << 36,
    }
    sent = message([gpu("GPU-1", 5 * S, 1_000_000)], sample(25 * S, 7_000_000, tensor_active=0.25, **readings))
    (row,) = rows(sent)
    appended = row.pop("appended_at")
    assert (appended.timestamp(), appended.tzinfo is not None) == (APPENDED / 1000, True)
    assert row == {
        "minute": 0,
        "gpu": "GPU-1",
        "instance": 0,
        "run_start_ms": M - 5_000,
        "run_id": "run",
        "seq": 7,
        "epoch_ms": 0,
        "node": "n0",
        "segment_start_ms": [5_000],
        "segment_duration_ms": [20_000],
        "segment_activity": [ACTIVE],
        "segment_energy_from_mj": [1_000_000],
        "segment_energy_to_mj": [7_000_000],
        "energy_first_mj": 1_000_000,
        "energy_last_mj": 7_000_000,
        "power_integral_mj": 5_900_000,
        "samples": 1,
        "gpu_util_pct_count": 1,
        "gpu_util_pct_sum": 98.0,
        "gpu_util_pct_max": 98.0,
        "sm_active_count": 1,
        "sm_active_sum": 0.5,
        "sm_active_max": 0.5,
        "tensor_active_count": 1,
        "tensor_active_sum": 0.25,
        "tensor_active_max": 0.25,
        "dram_active_count": 0,
        "dram_active_sum": 0.0,
        "dram_active_max": 0.0,
        "memory_used_bytes_count": 1,
        "memory_used_bytes_sum": 2.0**36,
        "memory_used_bytes_max": 2.0**36,
        "power_mw_count": 1,
        "power_mw_sum": 295_000.0,
        "power_mw_max": 295_000.0,
        "temperature_gpu_c_count": 1,
        "temperature_gpu_c_sum": 61.0,
        "temperature_gpu_c_max": 61.0,
    }


def test_the_columns_have_the_types_of_the_table() -> None:
    found = fold(message([gpu()], sample(S))).table.schema
    expected: dict[str, pa.DataType] = {
        "minute": pa.timestamp("ms", tz="UTC"),
        "gpu": pa.string(),
        "instance": pa.uint16(),
        "run_start_ms": pa.int64(),
        "run_id": pa.string(),
        "seq": pa.uint32(),
        "epoch_ms": pa.int64(),
        "node": pa.string(),
        "segment_start_ms": pa.list_(pa.uint16()),
        "segment_duration_ms": pa.list_(pa.uint16()),
        "segment_activity": pa.list_(pa.uint8()),
        "segment_energy_from_mj": pa.list_(pa.int64()),
        "segment_energy_to_mj": pa.list_(pa.int64()),
        "energy_first_mj": pa.int64(),
        "energy_last_mj": pa.int64(),
        "power_integral_mj": pa.int64(),
        "samples": pa.uint16(),
        "appended_at": pa.timestamp("ms", tz="UTC"),
    }
    for name in GAUGES:
        expected |= {f"{name}_count": pa.uint16(), f"{name}_sum": pa.float64(), f"{name}_max": pa.float32()}
    assert dict(zip(found.names, found.types, strict=True)) == expected


# ------------------------------------------------------------------------------------------------- what is covered


def test_nothing_is_made_of_nothing() -> None:
    assert fragments(block()) is None
    assert fragments(block(message([gpu()]))) is None


def test_the_first_sample_of_a_run_covers_nothing_and_starts_the_clock() -> None:
    first = [gpu(previous=None)]
    assert fragments(block(message(first, sample(10 * S, 100)))) is None
    (row,) = rows(message(first, sample(10 * S, 100), sample(20 * S, 400_100)))
    assert timeline(row) == [(10 * S, 10 * S, ACTIVE, 100, 400_100)]
    assert row["samples"] == 1


def test_a_sample_covers_at_most_three_periods() -> None:
    # Period 10 s, so the sample at 45 s speaks for what came after 15 s. The counter's line is between its readings:
    # 45 s at 400 W are 18,000,000 mJ, of which the first 15 s had 6,000,000.
    (row,) = rows(message([gpu(energy_mj=0)], sample(45 * S, 18_000_000)))
    assert timeline(row) == [(15 * S, 30 * S, ACTIVE, 6_000_000, 18_000_000)]
    # Exactly three periods, and one millisecond less: all of it is covered.
    for last in (30_000, 29_999):
        (row,) = rows(message([gpu()], sample(last)))
        assert timeline(row) == [(0, last, ACTIVE, None, None)]
    (row,) = rows(message([gpu()], sample(30_001)))
    assert timeline(row) == [(1, 30_000, ACTIVE, None, None)]


def test_each_batch_has_its_own_period() -> None:
    fast = message([gpu("a")], sample(50 * S), period_ms=1 * S)
    slow = message([gpu("b")], sample(50 * S), period_ms=20 * S)
    assert [timeline(row)[0][:2] for row in rows(fast, slow)] == [(47 * S, 3 * S), (0, 50 * S)]


# ------------------------------------------------------------------------------------------------- minutes


def test_an_interval_is_cut_at_minutes_and_its_energy_by_floor() -> None:
    # 3 ms before the minute to 4 ms after it, 10 mJ: at the cut the counter stands at 50 + floor(10 x 3 / 7) = 54.
    sent = message([gpu(previous=MINUTE - 3, energy_mj=50)], sample(MINUTE + 4, 60, power_mw=1_000_000))
    first, second = rows(sent)
    assert (first["minute"], second["minute"]) == (0, MINUTE)
    assert timeline(first) == [(MINUTE - 3, 3, ACTIVE, 50, 54)]
    assert timeline(second) == [(0, 4, ACTIVE, 54, 60)]
    # 1 kW is a millijoule per microsecond: 3 ms and 4 ms of it.
    assert (first["power_integral_mj"], second["power_integral_mj"]) == (3_000, 4_000)
    # The sample itself, and its gauges, belong to the minute in which its interval ends.
    assert [(row["samples"], row["power_mw_count"]) for row in (first, second)] == [(0, 0), (1, 1)]
    assert [(row["energy_first_mj"], row["energy_last_mj"]) for row in (first, second)] == [(50, 54), (54, 60)]


def test_an_interval_over_several_minutes_has_a_fragment_in_each() -> None:
    # 150 s from 30 s on, at 1 W: one mJ per ms.
    sent = message([gpu(previous=30 * S, energy_mj=0)], sample(180 * S, 150_000), period_ms=MINUTE)
    found = rows(sent)
    assert [row["minute"] for row in found] == [0, MINUTE, 2 * MINUTE]
    assert [timeline(row) for row in found] == [
        [(30 * S, 30 * S, ACTIVE, 0, 30_000)],
        [(0, MINUTE, ACTIVE, 30_000, 90_000)],
        [(0, MINUTE, ACTIVE, 90_000, 150_000)],
    ]
    assert [row["samples"] for row in found] == [0, 0, 1]


def test_a_sample_on_the_border_of_minutes_belongs_to_the_minute_before() -> None:
    (row,) = rows(message([gpu(previous=MINUTE - S)], sample(MINUTE)))
    assert (row["minute"], timeline(row), row["samples"]) == (0, [(59 * S, S, ACTIVE, None, None)], 1)
    (row,) = rows(message([gpu(previous=MINUTE)], sample(MINUTE + 1)))
    assert (row["minute"], timeline(row), row["samples"]) == (MINUTE, [(0, 1, ACTIVE, None, None)], 1)


def test_samples_of_one_minute_are_one_fragment_and_of_two_are_two() -> None:
    sent = message([gpu(previous=40 * S)], *(sample(at * S) for at in (50, 60, 70, 80)))
    assert [(row["minute"], timeline(row), row["samples"]) for row in rows(sent)] == [
        (0, [(40 * S, 20 * S, ACTIVE, None, None)], 2),
        (MINUTE, [(0, 20 * S, ACTIVE, None, None)], 2),
    ]


# ------------------------------------------------------------------------------------------------- activity


def test_activity_by_the_threshold_of_the_batch() -> None:
    shares = [sample(at * 10 * S, sm_active=share) for at, share in enumerate((0.25, 0.2, 0.0), start=1)]
    assert activities(*shares, active_threshold=0.25) == [ACTIVE, IDLE, IDLE]
    assert activities(*shares, active_threshold=0.1) == [ACTIVE, ACTIVE, IDLE]


def test_each_batch_has_its_own_threshold() -> None:
    low = message([gpu("a")], sample(S, sm_active=0.3), active_threshold=0.2)
    high = message([gpu("b")], sample(S, sm_active=0.3), active_threshold=0.4)
    assert [row["segment_activity"] for row in rows(low, high)] == [[ACTIVE], [IDLE]]


def test_utilisation_decides_where_sm_activity_is_not_known() -> None:
    util = [sample(at * 10 * S, sm_active=None, gpu_util_pct=pct) for at, pct in enumerate((25.0, 24.9), start=1)]
    assert activities(*util, active_threshold=0.25) == [ACTIVE, IDLE]
    # SM activity wins where both are known, either way.
    both = [sample(10 * S, sm_active=0.9, gpu_util_pct=0.0), sample(20 * S, sm_active=0.0, gpu_util_pct=100.0)]
    assert activities(*both) == [ACTIVE, IDLE]


@pytest.mark.parametrize("unknown", [None, math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_unobserved_and_not_idle(unknown: float | None) -> None:
    assert activities(sample(10 * S, sm_active=unknown), sample(20 * S)) == [UNOBSERVED, ACTIVE]


def test_a_cause_is_down_whatever_the_rest_says() -> None:
    causes = [sample(10 * S, down_cause=int(DownCause.HUNG)), sample(20 * S, down_cause=0), sample(30 * S)]
    assert activities(*causes) == [DOWN, DOWN, ACTIVE]


# ------------------------------------------------------------------------------------------------- segments


def test_neighbours_that_agree_are_one_segment() -> None:
    # 10 s at 300 W and 10 s at 310 W fall into one bin of 25 W.
    sent = message([gpu(energy_mj=0)], sample(10 * S, 3_000_000), sample(20 * S, 6_100_000))
    (row,) = rows(sent)
    assert timeline(row) == [(0, 20 * S, ACTIVE, 0, 6_100_000)]
    assert (row["energy_first_mj"], row["energy_last_mj"], row["samples"]) == (0, 6_100_000, 2)


def test_another_activity_begins_a_segment() -> None:
    (row,) = rows(message([gpu()], sample(10 * S), sample(20 * S, sm_active=0.0), sample(30 * S)))
    assert timeline(row) == [
        (0, 10 * S, ACTIVE, None, None),
        (10 * S, 10 * S, IDLE, None, None),
        (20 * S, 10 * S, ACTIVE, None, None),
    ]


def test_another_bin_of_power_begins_a_segment() -> None:
    # A second at p mW adds p mJ. Bins are [0, 25 W), [25 W, 50 W), ...
    def segments(*powers_mw: int) -> int:
        energies = [sum(powers_mw[: n + 1]) for n in range(len(powers_mw))]
        samples = [sample((n + 1) * S, energy) for n, energy in enumerate(energies)]
        return len(timeline(rows(message([gpu(energy_mj=0)], *samples))[0]))

    assert SLOPE_BIN_MW == 25_000
    assert segments(0, 24_999) == 1
    assert segments(24_999, 25_000) == 2
    assert segments(25_000, 49_999, 25_000) == 1
    assert segments(49_999, 50_000) == 2
    assert segments(100_000, 10_000, 10_000) == 2


def test_power_is_energy_by_the_length_of_the_interval() -> None:
    # 60 W for 10 s, then 60 W for 1 s: 600,000 mJ and 60,000 mJ are one slope.
    (row,) = rows(message([gpu(energy_mj=0)], sample(10 * S, 600_000), sample(11 * S, 660_000)))
    assert timeline(row) == [(0, 11 * S, ACTIVE, 0, 660_000)]
    # 20 mJ in 1 ms are 20 W, 30 mJ are 30 W.
    (row,) = rows(message([gpu(energy_mj=0)], sample(1, 20), sample(2, 40), sample(3, 70)))
    assert [duration for _, duration, *_ in timeline(row)] == [2, 1]


def test_a_hole_begins_a_segment() -> None:
    # The sample at 55 s covers only 30 s: nobody saw 10 s to 25 s.
    (row,) = rows(message([gpu()], sample(10 * S), sample(55 * S)))
    assert timeline(row) == [(0, 10 * S, ACTIVE, None, None), (25 * S, 30 * S, ACTIVE, None, None)]


def test_energy_not_known_is_no_power_of_zero() -> None:
    # No draw at all, then a counter that is not known: two segments.
    (row,) = rows(message([gpu(energy_mj=5)], sample(10 * S, 5), sample(20 * S)))
    assert timeline(row) == [(0, 10 * S, ACTIVE, 5, 5), (10 * S, 10 * S, ACTIVE, None, None)]
    assert (row["energy_first_mj"], row["energy_last_mj"]) == (5, None)
    # Nor is it any other power.
    for watts in (0, 10, 30, 60):
        (row,) = rows(message([gpu(energy_mj=0)], sample(10 * S, watts * 10 * S), sample(20 * S)))
        assert len(timeline(row)) == 2


def test_segments_of_two_fragments_stay_apart() -> None:
    sent = message([gpu("a"), gpu("b")], sample(10 * S), sample(10 * S, device=1), sample(20 * S, device=1))
    first, second = rows(sent)
    assert timeline(first) == [(0, 10 * S, ACTIVE, None, None)]
    assert timeline(second) == [(0, 20 * S, ACTIVE, None, None)]


# ------------------------------------------------------------------------------------------------- energy


def test_a_counter_that_ran_backwards_starts_a_new_span() -> None:
    sent = message([gpu(energy_mj=9_000)], sample(10 * S, 1_000), sample(20 * S, 1_500))
    (row,) = rows(sent)
    assert timeline(row) == [(0, 10 * S, ACTIVE, None, None), (10 * S, 10 * S, ACTIVE, 1_000, 1_500)]
    assert (row["energy_first_mj"], row["energy_last_mj"]) == (None, 1_500)


def test_an_interval_with_one_reading_has_no_known_energy() -> None:
    sent = message([gpu(energy_mj=None)], sample(10 * S, 100), sample(20 * S, None), sample(30 * S, 300))
    (row,) = rows(sent)
    assert timeline(row) == [(0, 30 * S, ACTIVE, None, None)]
    (row,) = rows(message([gpu(energy_mj=0)], sample(10 * S, 0)))
    assert timeline(row) == [(0, 10 * S, ACTIVE, 0, 0)]


def test_a_counter_that_jumps_is_cut_exactly() -> None:
    # 2^53 mJ in 45 s, of which 30 s are covered, with a minute's border after 5 of them: floor(2^53 / 3) and
    # floor(2^53 x 20 / 45), whose products need 68 bits.
    sent = message([gpu(previous=40 * S, energy_mj=0)], sample(85 * S, 1 << 53))
    first, second = rows(sent)
    assert timeline(first) == [(55 * S, 5 * S, ACTIVE, 3002399751580330, 4003199668773774)]
    assert timeline(second) == [(0, 25 * S, ACTIVE, 4003199668773774, 1 << 53)]


def test_an_instance_has_no_energy_of_its_own() -> None:
    devices = [gpu("g", 0, 0), gpu("g", 0, 0, instance=3, epoch_ms=M - 77)]
    whole, part = rows(message(devices, sample(10 * S, 900), sample(10 * S, 900, device=1)))
    assert timeline(whole) == [(0, 10 * S, ACTIVE, 0, 900)]
    assert timeline(part) == [(0, 10 * S, ACTIVE, None, None)]
    assert [(row["instance"], row["epoch_ms"]) for row in (whole, part)] == [(0, 0), (3, M - 77)]


def test_power_is_integrated_where_it_is_known() -> None:
    powers = {10: 300_000, 20: None, 30: 1_001}
    (row,) = rows(message([gpu()], *(sample(at * S, power_mw=mw) for at, mw in powers.items())))
    # 300 W x 10 s + 1.001 W x 10 s.
    assert row["power_integral_mj"] == 3_000_000 + 10_010
    (row,) = rows(message([gpu()], sample(10 * S)))
    assert row["power_integral_mj"] is None
    # 999 mW for a millisecond are 999 uJ, less than a mJ; it was known to be.
    (row,) = rows(message([gpu()], sample(1, power_mw=999)))
    assert row["power_integral_mj"] == 0
    (row,) = rows(message([gpu()], sample(1, power_mw=1_999)))
    assert row["power_integral_mj"] == 1


# ------------------------------------------------------------------------------------------------- gauges


def test_gauges_count_sum_and_take_the_largest_of_what_is_known() -> None:
    readings = (40.0, None, math.nan, 70.0, 55.0, math.inf)
    sent = message([gpu()], *(sample((n + 1) * S, temperature_gpu_c=c) for n, c in enumerate(readings)))
    (row,) = rows(sent)
    found = row["temperature_gpu_c_count"], row["temperature_gpu_c_sum"], row["temperature_gpu_c_max"]
    assert found == (3, 165.0, 70.0)
    assert row["samples"] == 6


def test_the_largest_of_negative_readings_is_negative() -> None:
    cold = (-30.0, -20.0, -25.0)
    (row,) = rows(message([gpu()], *(sample((n + 1) * S, temperature_gpu_c=c) for n, c in enumerate(cold))))
    assert (row["temperature_gpu_c_sum"], row["temperature_gpu_c_max"]) == (-75.0, -20.0)


def test_gauges_of_fragments_stay_apart() -> None:
    # Two GPUs over two minutes: each fragment has its own samples only.
    samples = [
        sample((10 + 50 * n) * S, device=device, gpu_util_pct=10.0 * device + n) for n in (0, 1, 2) for device in (0, 1)
    ]
    found = rows(message([gpu("a"), gpu("b")], *samples))
    assert [(row["gpu"], row["minute"]) for row in found] == [("a", 0), ("a", MINUTE), ("b", 0), ("b", MINUTE)]
    taken = [(row["gpu_util_pct_count"], row["gpu_util_pct_sum"], row["gpu_util_pct_max"]) for row in found]
    assert taken == [(2, 1.0, 1.0), (1, 2.0, 2.0), (2, 21.0, 11.0), (1, 12.0, 12.0)]


# ------------------------------------------------------------------------------------------------- blocks


def test_rows_of_several_devices_may_lie_in_any_order() -> None:
    devices = [gpu("a", 0, 100), gpu("b", 5 * S, 200)]
    samples = [
        sample(20 * S, 900, device=1),
        sample(10 * S, 300),
        sample(10 * S, 500, device=1, sm_active=0.0),
        sample(20 * S, 700),
    ]
    expected = [
        ("a", [(0, 20 * S, ACTIVE, 100, 700)]),
        ("b", [(5 * S, 5 * S, IDLE, 200, 500), (10 * S, 10 * S, ACTIVE, 500, 900)]),
    ]
    for order in (samples, samples[::-1], sorted(samples, key=lambda each: each.at)):
        assert [(row["gpu"], timeline(row)) for row in rows(message(devices, *order))] == expected


def test_messages_of_a_block_are_independent() -> None:
    # The same device index in each message is another GPU; a message without rows and one of two GPUs are between.
    first = message([gpu("a"), gpu("b", 1 * S)], sample(2 * S, device=1), sample(3 * S), seq=1, appended=APPENDED + 1)
    empty = message([gpu("c")], seq=2)
    last = message(
        [gpu("d", 4 * S)],
        sample(6 * S),
        seq=3,
        node="n1",
        run_id="other",
        run_start_ms=M - 9_000,
        appended=APPENDED + 3,
    )
    found = rows(first, empty, last)
    assert [(row["gpu"], timeline(row)[0][:2]) for row in found] == [
        ("a", (0, 3 * S)),
        ("b", (1 * S, 1 * S)),
        ("d", (4 * S, 2 * S)),
    ]
    headers = [(row["node"], row["run_id"], row["run_start_ms"], row["seq"]) for row in found]
    assert headers == [("n0", "run", M - 5_000, 1)] * 2 + [("n1", "other", M - 9_000, 3)]
    times = [round(row["appended_at"].timestamp() * 1000) - APPENDED for row in found]
    assert times == [1, 1, 3]
    # A block cut differently gives the same rows.
    assert rows(first) + rows(last) == found


def test_two_batches_of_one_gpu_are_two_fragments() -> None:
    one = message([gpu("g", 0, 0)], sample(10 * S, 1_000), seq=1)
    two = message([gpu("g", 10 * S, 1_000)], sample(20 * S, 2_000), seq=2)
    assert [(row["seq"], timeline(row)) for row in rows(one, two)] == [
        (1, [(0, 10 * S, ACTIVE, 0, 1_000)]),
        (2, [(10 * S, 10 * S, ACTIVE, 1_000, 2_000)]),
    ]
