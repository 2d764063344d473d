"""What a telemetry batch must satisfy beyond its types: numbers that the tables hold, names, times, bounded work.

Each rule names the field, the value and what to do. Rows are screened for a whole block at once, and only the messages
that the screen suspects are checked one by one, for the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gpuledger.schemas.exceptions import MessageError
from gpuledger.schemas.telemetry import HEADER_KEY, PERIODS_COVERED, BatchHeader, HostReading
from gpuledger.schemas.texts import CONTROLS, MAX_NAME, MAX_TEXT

__all__ = ["MAX_HEADER_BYTES", "MAX_ROWS", "check_header", "check_rows", "suspects"]

#: Far above the largest node (64 MIG instances, thousands of running allocations).
MAX_HEADER_BYTES = 1 << 20
MAX_ROWS = 1 << 16
#: A batch becomes up to this many pieces of a minute; without a bound one row could cover years, in gigabytes.
_MAX_PIECES = 1 << 17
_MAX_PERIOD_MS = 3_600_000

_MAX_ENERGY_MJ = 1 << 53
#: A megawatt. The integral of it over a minute must fit 64 bits.
_MAX_POWER_MW = 10**9
_FROM_2000_MS, _TO_2200_MS = 946_684_800_000, 7_258_118_400_000
_MINUTE_MS = 60_000
_HOST_VALUES = tuple(name for name in HostReading.__struct_fields__ if name not in ("ts_ms", "cpu_count"))

Ints = NDArray[np.int64]


# -- the header


def check_header(header: BatchHeader, raw: bytes, appended_ms: int, ahead_ms: int) -> None:
    """Raises MessageError where a number or a name does not fit. Refused by an insert instead, it would leave the
    fragments of a batch behind that is dead-lettered. `raw` is its JSON."""
    if not _plausible(header, raw):
        _find_wrong(header)
    latest = appended_ms + ahead_ms
    host = header.host
    if header.boot_start_ms > latest or header.run_start_ms > latest or (host is not None and host.ts_ms > latest):
        newest = max(header.boot_start_ms, header.run_start_ms, 0 if host is None else host.ts_ms)
        raise MessageError(
            f"quarantine: header {HEADER_KEY}: boot_start_ms, run_start_ms or host.ts_ms {newest} is "
            f"{newest - appended_ms} ms after the broker's time {appended_ms}; set the clock of node {header.node}"
        )
    # Two rows of one key would replace each other in the table.
    names = {(device.gpu, device.instance, device.epoch_ms) for device in header.devices}
    if len(names) < len(header.devices):
        raise MessageError(f"header {HEADER_KEY}: devices: a device (gpu, instance, epoch_ms) is there twice")


def _plausible(header: BatchHeader, raw: bytes) -> bool:
    """False where a rule may be broken; the usual header is told apart without looking at every rule."""
    # In JSON a control character below 0x20 is an escape.
    if b"\\" in raw or not raw.isascii() or b"\x7f" in raw or header.gaps:
        return False
    host = header.host
    if host is not None:
        known = [value for value in msgspec.structs.astuple(host) if value is not None]
        if min(known) < 0 or max(known) >= 1 << 63 or not _FROM_2000_MS <= host.ts_ms < _TO_2200_MS:
            return False
        if (host.cpu_count or 0) >= 1 << 31:
            return False
    for device in header.devices:
        previous, energy = device.previous_ts_ms, device.previous_energy_mj
        if (
            not 0 < len(device.gpu) <= MAX_NAME
            or not 0 <= device.instance < 1 << 16
            or not 0 <= device.epoch_ms < _TO_2200_MS
            or (previous is not None and not _FROM_2000_MS <= previous < _TO_2200_MS)
            or (energy is not None and not 0 <= energy <= _MAX_ENERGY_MJ)
        ):
            return False
    return (
        _FROM_2000_MS <= header.boot_start_ms < _TO_2200_MS
        and _FROM_2000_MS <= header.run_start_ms < _TO_2200_MS
        and header.period_ms <= _MAX_PERIOD_MS
        and header.seq < 1 << 32
        and len(header.node) <= MAX_NAME
        and len(header.boot_id) <= MAX_NAME
        and len(header.run_id) <= MAX_NAME
        and (not header.running or max(map(len, header.running)) <= MAX_NAME)
    )


def _find_wrong(header: BatchHeader) -> None:
    for field, value, least, bound in _bounded(header):
        if value is not None and not least <= value < bound:
            raise MessageError(f"header {HEADER_KEY}: {field}: expected {least} to {bound - 1}, got {_short(value)}")
    for field, name, most in _names(header):
        if len(name) > most:
            raise MessageError(f"header {HEADER_KEY}: {field}: expected at most {most} characters, got {len(name)}")
        found = CONTROLS.search(name)
        if found is not None:
            code = f"U+{ord(found[0]):04X}"
            raise MessageError(f"header {HEADER_KEY}: {field}: holds the control character {code}; send plain names")
    for n, device in enumerate(header.devices):
        if not device.gpu:
            raise MessageError(f"header {HEADER_KEY}: devices[{n}].gpu: is empty; an agent names the GPU by its UUID")
    for n, gap in enumerate(header.gaps):
        if gap.last_seq < gap.first_seq:
            raise MessageError(f"header {HEADER_KEY}: gaps[{n}].last_seq: {gap.last_seq} is before {gap.first_seq}")
        if gap.to_ms < gap.from_ms:
            raise MessageError(f"header {HEADER_KEY}: gaps[{n}].to_ms: {gap.to_ms} is before from_ms {gap.from_ms}")


def _short(value: int | float) -> str:
    # Beyond 4,300 digits Python refuses to write an integer down.
    if isinstance(value, float) or value.bit_length() < 256:
        return str(value)
    return f"a number of {value.bit_length()} bits"


def _bounded(header: BatchHeader) -> Iterator[tuple[str, int | float | None, int, int]]:
    """(field, value, least, bound) of the numbers that the tables hold in fewer bits than JSON has."""
    yield "boot_start_ms", header.boot_start_ms, _FROM_2000_MS, _TO_2200_MS
    yield "run_start_ms", header.run_start_ms, _FROM_2000_MS, _TO_2200_MS
    yield "period_ms", header.period_ms, 1, _MAX_PERIOD_MS + 1
    yield "seq", header.seq, 0, 1 << 32
    for gap in header.gaps:
        for name in ("first_seq", "last_seq", "batches"):
            yield f"gaps.{name}", getattr(gap, name), 0, 1 << 32
        for name in ("from_ms", "to_ms"):
            yield f"gaps.{name}", getattr(gap, name), _FROM_2000_MS, _TO_2200_MS
    if header.host is not None:
        yield from _host_bounds(header.host)
    for device in header.devices:
        yield "devices.instance", device.instance, 0, 1 << 16
        yield "devices.previous_ts_ms", device.previous_ts_ms, _FROM_2000_MS, _TO_2200_MS
        yield "devices.previous_energy_mj", device.previous_energy_mj, 0, _MAX_ENERGY_MJ + 1
        yield "devices.epoch_ms", device.epoch_ms, 0, _TO_2200_MS


def _host_bounds(host: HostReading) -> Iterator[tuple[str, int | float | None, int, int]]:
    yield "host.ts_ms", host.ts_ms, _FROM_2000_MS, _TO_2200_MS
    yield "host.cpu_count", host.cpu_count, 0, 1 << 31
    for name in _HOST_VALUES:
        yield f"host.{name}", getattr(host, name), 0, 1 << 63


def _names(header: BatchHeader) -> Iterator[tuple[str, str, int]]:
    """(field, name, characters allowed)."""
    yield "node", header.node, MAX_NAME
    yield "boot_id", header.boot_id, MAX_NAME
    yield "run_id", header.run_id, MAX_NAME
    yield "agent_version", header.agent_version, MAX_NAME
    yield from (("devices.gpu", device.gpu, MAX_NAME) for device in header.devices)
    yield from (("running", name, MAX_NAME) for name in header.running)
    for gap in header.gaps:
        yield "gaps.run_id", gap.run_id, MAX_NAME
        yield "gaps.reason", gap.reason, MAX_TEXT


# -- the rows


def suspects(
    headers: Sequence[BatchHeader], rows: Ints, appended_ms: Ints, columns: pa.Table, ahead_ms: int
) -> list[int]:
    """The messages of a block that may break a rule of `check_rows`: all that do, and hardly any other.

    `rows` and `appended_ms` have an entry per message; `columns` are their rows, one message after another.
    """
    if columns.num_rows == 0:
        return []
    count = len(headers)
    message = np.repeat(np.arange(count), rows)
    wrong = np.zeros(count, dtype=bool)
    ts, device = columns.column("ts_ms"), columns.column("device")
    if ts.null_count or device.null_count:
        wrong[message[~(ts.is_valid().to_numpy() & device.is_valid().to_numpy())]] = True
        ts, device = ts.fill_null(0), device.fill_null(0)
    times, devices = ts.to_numpy(), device.to_numpy().astype(np.int64)
    listed = np.array([len(header.devices) for header in headers], dtype=np.int64)
    known = (devices >= 0) & (devices < listed[message])
    wrong[message[~known]] = True
    previous = np.array(
        [-1 if d.previous_ts_ms is None else d.previous_ts_ms for header in headers for d in header.devices] or [-1],
        dtype=np.int64,
    )
    at = np.where(known, (np.cumsum(listed) - listed)[message] + devices, 0)
    bad = (times > (appended_ms + ahead_ms)[message]) | (times < _FROM_2000_MS) | (times <= previous[at])
    wrong[message[bad]] = True
    order = np.lexsort((times, at))
    repeated = (np.diff(at[order]) == 0) & (np.diff(times[order]) <= 0)
    wrong[message[order[1:][repeated]]] = True
    wrong[_long(headers, rows, times, listed)] = True
    for name, most in (("energy_mj", _MAX_ENERGY_MJ), ("power_mw", _MAX_POWER_MW)):
        values = columns.column(name).fill_null(0).to_numpy()
        if values.min() < 0 or values.max() > most:
            wrong[message[(values < 0) | (values > most)]] = True
    return np.flatnonzero(wrong).tolist()


def _long(headers: Sequence[BatchHeader], rows: Ints, times: Ints, listed: Ints) -> Ints:
    """Messages that could become more than _MAX_PIECES pieces."""
    some = np.flatnonzero(rows)
    starts = (np.cumsum(rows) - rows)[some]
    # In floats: a hostile time may be as far away as 64 bits reach.
    span = np.maximum.reduceat(times, starts).astype(np.float64) - np.minimum.reduceat(times, starts)
    period = np.array([headers[n].period_ms for n in some.tolist()], dtype=np.float64)
    pieces = 2 * rows[some] + listed[some] * ((span + PERIODS_COVERED * period) / _MINUTE_MS + 1)
    return some[pieces > _MAX_PIECES]


def check_rows(header: BatchHeader, columns: pa.Table, appended_ms: int, ahead_ms: int) -> None:
    """Raises MessageError where rows and header contradict each other, or a value is out of bounds."""
    ts, device = columns.column("ts_ms"), columns.column("device")
    if ts.null_count or device.null_count:
        raise MessageError("value: ts_ms and device may not be NULL")
    times, devices = ts.to_numpy(), device.to_numpy()
    if devices.min() < 0 or devices.max() >= len(header.devices):
        worst = devices.min() if devices.min() < 0 else devices.max()
        raise MessageError(f"device: {worst} is not an index into the header's {len(header.devices)} devices")
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
    steps = np.diff(times[order])[same]
    if np.any(steps <= 0):
        raise MessageError("ts_ms: two samples of one device have the same time")
    previous = np.array([d.previous_ts_ms if d.previous_ts_ms is not None else -1 for d in header.devices])
    if np.any(times <= previous[devices]):
        raise MessageError("ts_ms: a sample is not after the device's previous_ts_ms in the header")
    _check_pieces(header, times[order], devices[order], previous)
    _check_values(columns)


def _check_pieces(header: BatchHeader, times: Ints, devices: Ints, previous: Ints) -> None:
    first = np.append(True, np.diff(devices) != 0)
    before = np.where(first, previous[devices], np.roll(times, 1))
    covered_ms = np.where(before < 0, 0, np.minimum(times - before, PERIODS_COVERED * header.period_ms))
    minutes = len(times) + int((covered_ms // _MINUTE_MS + 1).sum())
    if minutes > _MAX_PIECES:
        raise MessageError(
            f"value: its samples cover {minutes} minutes of devices, and a batch may cover {_MAX_PIECES}; "
            "send batches more often"
        )


def _check_values(columns: pa.Table) -> None:
    # A gauge that is no number is not known (`fragments`): one such reading must not cost a node its batch.
    for name, most, text in (("energy_mj", _MAX_ENERGY_MJ, "2^53"), ("power_mw", _MAX_POWER_MW, str(_MAX_POWER_MW))):
        values = columns.column(name).fill_null(0).to_numpy()
        if values.min() < 0 or values.max() > most:
            raise MessageError(f"{name}: expected 0..{text}, got {values.min()}..{values.max()}")
