"""Telemetry to fragments: what one batch of one run saw one device do in one minute.

A pure function of each batch alone: cutting a block differently, repeating or reordering messages gives the same rows.
Neighbouring samples merge only where activity and power agree (`SLOPE_BIN_MW`), so the ledger's laws hold for batches
as they were sealed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gpuledger.schemas.telemetry import GAUGES, PERIODS_COVERED, Activity
from gpuledger.streams.counters import linear
from gpuledger.streams.decode import TelemetryBlock

__all__ = ["MINUTE_MS", "SLOPE_BIN_MW", "Fragments", "fragments"]

Ints = NDArray[np.int64]

MINUTE_MS = 60_000
#: Samples of one activity merge while their mean power falls into the same bin of this width.
SLOPE_BIN_MW = 25_000
#: In arrays of times and counters, which are never negative.
_UNKNOWN = -1


@dataclass(frozen=True, slots=True)
class Fragments:
    """`table` has the columns of the ClickHouse table `fragments`; `seen` are the GPUs by minute (UTC milliseconds)
    that its rows are of, for looking up the pools to mark."""

    table: pa.Table
    seen: dict[int, set[str]]


@dataclass(slots=True)
class _Pieces:
    """Covered intervals, one minute each, sorted by (device, start). Energies are `_UNKNOWN` where not known."""

    device: Ints
    sample: Ints
    start: Ints
    end: Ints
    activity: NDArray[np.uint8]
    energy_from: Ints
    energy_to: Ints
    last_of_sample: NDArray[np.bool_]


def _column(block: TelemetryBlock, name: str, order: Ints) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    column = block.columns.column(name)
    known = column.is_valid().to_numpy()[order]
    return column.fill_null(0).to_numpy()[order].astype(np.float64), known


def _integers(block: TelemetryBlock, name: str, order: Ints) -> tuple[Ints, NDArray[np.bool_]]:
    """The values, 0 where they are not known, and where they are."""
    column = block.columns.column(name)
    known = column.is_valid().to_numpy()[order]
    return column.fill_null(0).to_numpy()[order].astype(np.int64), known


def _or_unknown(values: list[int | None]) -> Ints:
    return np.array([_UNKNOWN if value is None else value for value in values], dtype=np.int64)


def _activities(block: TelemetryBlock, order: Ints) -> NDArray[np.uint8]:
    """Activity by the batch's threshold on SM activity, else utilisation; NULL is UNOBSERVED; a cause is DOWN."""
    sm_active, sm_known = _column(block, "sm_active", order)
    utilisation, utilisation_known = _column(block, "gpu_util_pct", order)
    down = block.columns.column("down_cause").is_valid().to_numpy()[order]
    threshold = np.array([header.active_threshold for header in block.headers])[block.message[order]]
    share = np.where(sm_known, sm_active, utilisation / 100)
    known = (sm_known | utilisation_known) & np.isfinite(share)
    activity = np.where(share >= threshold, int(Activity.ACTIVE), int(Activity.IDLE))
    activity = np.where(known, activity, int(Activity.UNOBSERVED))
    return np.where(down, int(Activity.DOWN), activity).astype(np.uint8)


def _cover(block: TelemetryBlock) -> tuple[_Pieces, Ints]:
    """The covered intervals of all samples, cut at minutes, and the order of the samples they refer to."""
    base = np.cumsum([0] + [len(header.devices) for header in block.headers])
    raw_device = base[block.message] + block.columns.column("device").to_numpy()
    raw_ts = block.columns.column("ts_ms").to_numpy()
    order = np.lexsort((raw_ts, raw_device))
    device, ts = raw_device[order], raw_ts[order]

    devices = [device_ for header in block.headers for device_ in header.devices]
    previous_ts = _or_unknown([d.previous_ts_ms for d in devices])
    previous_mj = _or_unknown([d.previous_energy_mj for d in devices])
    whole = np.array([d.instance == 0 for d in devices], dtype=bool)
    period = np.array([header.period_ms for header in block.headers], dtype=np.int64)[block.message[order]]

    energy, energy_known = _integers(block, "energy_mj", order)
    energy = np.where(energy_known & whole[device], energy, _UNKNOWN)
    first = np.ones(len(ts), dtype=bool)
    first[1:] = device[1:] != device[:-1]
    before = np.where(first, previous_ts[device], np.roll(ts, 1))
    energy_before = np.where(first, previous_mj[device], np.roll(energy, 1))

    lo = np.maximum(before, ts - PERIODS_COVERED * period)
    # A counter that ran backwards starts a new span: the energy of that interval is not known.
    known = (energy_before != _UNKNOWN) & (energy >= energy_before)
    line_start = np.where(known, before, lo)
    covered = np.flatnonzero(before != _UNKNOWN)

    first_minute, last_minute = lo[covered] // MINUTE_MS, (ts[covered] - 1) // MINUTE_MS
    count = last_minute - first_minute + 1
    sample = np.repeat(covered, count)
    nth = np.arange(len(sample)) - np.repeat(np.cumsum(count) - count, count)
    minute = np.repeat(first_minute, count) + nth
    start = np.maximum(lo[sample], minute * MINUTE_MS)
    end = np.minimum(ts[sample], (minute + 1) * MINUTE_MS)
    is_known = known[sample]
    line = line_start[sample], ts[sample], energy_before[sample], energy[sample]
    pieces = _Pieces(
        device=device[sample],
        sample=sample,
        start=start,
        end=end,
        activity=_activities(block, order)[sample],
        energy_from=np.where(is_known, linear(start, *line), _UNKNOWN),
        energy_to=np.where(is_known, linear(end, *line), _UNKNOWN),
        last_of_sample=nth == np.repeat(count, count) - 1,
    )
    return pieces, order


def _runs(pieces: _Pieces, group_start: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """True where a piece begins a new segment: another group, activity, power bin, or not adjacent."""
    duration = pieces.end - pieces.start
    power_mw = (pieces.energy_to - pieces.energy_from) * 1000 // duration
    power_bin = np.where(pieces.energy_from == _UNKNOWN, _UNKNOWN, power_mw // SLOPE_BIN_MW)
    new = np.ones(len(group_start), dtype=bool)
    new[1:] = (
        group_start[1:]
        | (pieces.activity[1:] != pieces.activity[:-1])
        | (pieces.start[1:] != pieces.end[:-1])
        | (power_bin[1:] != power_bin[:-1])
    )
    return new


def _nullable(values: Ints) -> pa.Array:
    return pa.array(values, type=pa.int64(), mask=values < 0)


def _list(offsets: Ints, values: pa.Array) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets, type=pa.int32()), values)


def _gauges(block: TelemetryBlock, order: Ints, pieces: _Pieces, groups: Ints) -> dict[str, pa.Array]:
    """Count, sum and maximum per fragment; a sample belongs to the minute in which its interval ends."""
    columns: dict[str, pa.Array] = {}
    for name in GAUGES:
        values, known = _column(block, name, order)
        known &= np.isfinite(values)
        use = known[pieces.sample] & pieces.last_of_sample
        taken = values[pieces.sample]
        count = np.add.reduceat(use.astype(np.int64), groups)
        columns[f"{name}_count"] = pa.array(count, type=pa.uint16())
        columns[f"{name}_sum"] = pa.array(np.add.reduceat(np.where(use, taken, 0.0), groups))
        largest = np.maximum.reduceat(np.where(use, taken, -np.inf), groups)
        columns[f"{name}_max"] = pa.array(np.where(count > 0, largest, 0.0).astype(np.float32))
    return columns


def _power_integral(block: TelemetryBlock, order: Ints, pieces: _Pieces, groups: Ints) -> pa.Array:
    """Millijoules of integrated power over the pieces where it is known; NULL where it never is."""
    power_mw, known = _integers(block, "power_mw", order)
    microjoules = np.add.reduceat(power_mw[pieces.sample] * (pieces.end - pieces.start), groups)
    ever = np.logical_or.reduceat(known[pieces.sample], groups)
    return pa.array(microjoules // 1000, type=pa.int64(), mask=~ever)


def _segments(pieces: _Pieces, group_start: NDArray[np.bool_]) -> tuple[dict[str, pa.Array], Ints]:
    """The timeline columns, and where each fragment's pieces begin."""
    groups = np.flatnonzero(group_start)
    segment_start = _runs(pieces, group_start)
    segments = np.flatnonzero(segment_start)
    last = np.append(segments[1:], len(segment_start)) - 1
    offsets = np.append((np.cumsum(segment_start) - 1)[groups], len(segments))
    group_last = np.append(groups[1:], len(segment_start)) - 1
    columns: dict[str, pa.Array] = {
        "segment_start_ms": _list(offsets, pa.array(pieces.start[segments] % MINUTE_MS, type=pa.uint16())),
        "segment_duration_ms": _list(offsets, pa.array(pieces.end[last] - pieces.start[segments], type=pa.uint16())),
        "segment_activity": _list(offsets, pa.array(pieces.activity[segments])),
        "segment_energy_from_mj": _list(offsets, _nullable(pieces.energy_from[segments])),
        "segment_energy_to_mj": _list(offsets, _nullable(pieces.energy_to[last])),
        "energy_first_mj": _nullable(pieces.energy_from[groups]),
        "energy_last_mj": _nullable(pieces.energy_to[group_last]),
    }
    return columns, groups


def fragments(block: TelemetryBlock) -> Fragments | None:
    """All fragments of a block, or None when nothing was covered (first samples of a run cover nothing).

    A sample covers [max(previous sample, ts - 3 periods), ts). Segments of a fragment do not overlap and are in order;
    energy between two readings is linear and cut by floor, so no cut changes a sum.
    """
    pieces, order = _cover(block)
    if len(pieces.start) == 0:
        return None
    minute = pieces.start // MINUTE_MS
    group_start = np.ones(len(minute), dtype=bool)
    group_start[1:] = (pieces.device[1:] != pieces.device[:-1]) | (minute[1:] != minute[:-1])
    timeline, groups = _segments(pieces, group_start)

    owner = np.repeat(np.arange(len(block.headers)), [len(header.devices) for header in block.headers])
    devices = [device for header in block.headers for device in header.devices]
    of_device = pieces.device[groups]
    of_header = owner[of_device]
    minutes_ms = minute[groups] * MINUTE_MS
    timestamp = pa.timestamp("ms", tz="UTC")
    columns: dict[str, pa.Array] = {
        "minute": pa.array(minutes_ms).cast(timestamp),
        "gpu": pa.array([device.gpu for device in devices], type=pa.string()).take(of_device),
        "instance": pa.array([device.instance for device in devices], type=pa.uint16()).take(of_device),
        "run_start_ms": pa.array([header.run_start_ms for header in block.headers], type=pa.int64()).take(of_header),
        "run_id": pa.array([header.run_id for header in block.headers], type=pa.string()).take(of_header),
        "seq": pa.array([header.seq for header in block.headers], type=pa.uint32()).take(of_header),
        "epoch_ms": pa.array([device.epoch_ms for device in devices], type=pa.int64()).take(of_device),
        "node": pa.array([header.node for header in block.headers], type=pa.string()).take(of_header),
        **timeline,
        "power_integral_mj": _power_integral(block, order, pieces, groups),
        "samples": pa.array(np.add.reduceat(pieces.last_of_sample.astype(np.int64), groups), type=pa.uint16()),
        **_gauges(block, order, pieces, groups),
        "appended_at": pa.array(block.appended_ms[of_header]).cast(timestamp),
    }
    seen: dict[int, set[str]] = {}
    for device, at_ms in zip(of_device.tolist(), minutes_ms.tolist(), strict=True):
        seen.setdefault(at_ms, set()).add(devices[device].gpu)
    return Fragments(table=pa.table(columns), seen=seen)
