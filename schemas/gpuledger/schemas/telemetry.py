"""The telemetry message: what one node saw of its GPUs between two flushes.

The Kafka value is one Arrow IPC stream (schema, one record batch, end of stream) with a row per device and sample; the
Kafka header ``gpuledger-batch`` is a `BatchHeader` as JSON. The schema bytes are the same in every message of one
version, so a reader that has seen them decodes only the record batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import msgspec

from gpuledger.schemas.exceptions import MessageError

__all__ = [
    "COLUMNS",
    "COLUMN_NAMES",
    "GAUGES",
    "HEADER_KEY",
    "MAX_CLOCK_AHEAD_MS",
    "PERIODS_COVERED",
    "TELEMETRY_VERSION",
    "Activity",
    "BatchHeader",
    "Column",
    "Device",
    "DownCause",
    "Gap",
    "HostReading",
    "decode_header",
    "encode_header",
]

TELEMETRY_VERSION = 1
HEADER_KEY = "gpuledger-batch"

#: A sample covers [max(previous sample, ts - PERIODS_COVERED * period), ts): after more nobody saw the device.
PERIODS_COVERED = 3
#: Event time later than broker time by more than this is quarantined (a node with its clock in 2036 stops nothing).
MAX_CLOCK_AHEAD_MS = 120_000

ColumnType = Literal["int16", "int32", "int64", "float32"]


class Activity(IntEnum):
    """What a device was seen doing. PENDING and UNOBSERVED are decided by the ledger, never sent by an agent."""

    ACTIVE = 1
    IDLE = 2
    UNOBSERVED = 3
    DOWN = 4
    PENDING = 5


class DownCause(IntEnum):
    """Value of the `down_cause` column; NULL means the device answered."""

    LOST = 1  # the driver says the GPU has fallen off the bus
    HUNG = 2  # a driver call did not return before its deadline
    DRIVER = 3  # the driver is not loaded or refuses to talk
    DRAINED = 4  # taken out of service by an operator or an ECC/XID policy


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the record batch. Every column but `ts_ms` and `device` is nullable: NULL is "not known"."""

    name: str
    type: ColumnType
    doc: str
    nullable: bool = True


COLUMNS: tuple[Column, ...] = (
    Column("ts_ms", "int64", "UTC milliseconds: wall anchor of the run plus CLOCK_BOOTTIME since it", nullable=False),
    Column("device", "int16", "index into BatchHeader.devices", nullable=False),
    Column("down_cause", "int16", "DownCause, NULL when the device answered"),
    # what it did
    Column("gpu_util_pct", "float32", "share of time any kernel ran, 0..100 (DCGM DEV_GPU_UTIL)"),
    Column("mem_util_pct", "float32", "share of time memory was read or written, 0..100"),
    Column("sm_active", "float32", "share of SM-cycles with a warp resident, 0..1 (GPM; DCGM PROF_SM_ACTIVE)"),
    Column("sm_occupancy", "float32", "resident warps of the possible, 0..1 (GPM)"),
    Column("tensor_active", "float32", "tensor pipe active, 0..1 (GPM; DCGM PROF_PIPE_TENSOR_ACTIVE)"),
    Column("dram_active", "float32", "DRAM bandwidth used of the possible, 0..1 (GPM; DCGM PROF_DRAM_ACTIVE)"),
    Column("encoder_util_pct", "float32", "0..100"),
    Column("decoder_util_pct", "float32", "0..100"),
    # memory
    Column("memory_used_bytes", "int64", "without the reserved part (nvmlMemory_v2)"),
    Column("memory_reserved_bytes", "int64", "driver and firmware"),
    Column("memory_total_bytes", "int64", ""),
    # energy and heat
    Column("energy_mj", "int64", "cumulative counter since driver load, integer millijoules"),
    Column("power_mw", "int64", "as nvmlDeviceGetPowerUsage gives it"),
    Column("power_mean_mw", "int64", "1 s mean (field 185)"),
    Column("power_instant_mw", "int64", "instant (field 186)"),
    Column("power_limit_mw", "int64", "enforced limit"),
    Column("temperature_gpu_c", "float32", "degrees Celsius"),
    Column("temperature_memory_c", "float32", "degrees Celsius"),
    Column("fan_pct", "float32", "0..100"),
    # clocks and throttling
    Column("sm_clock_mhz", "int32", ""),
    Column("memory_clock_mhz", "int32", ""),
    Column("clocks_event_reasons", "int64", "bitmask of nvmlDeviceGetCurrentClocksEventReasons"),
    Column("throttle_power_ns", "int64", "cumulative time throttled by power"),
    Column("throttle_thermal_ns", "int64", "cumulative time throttled by heat"),
    Column("throttle_hw_ns", "int64", "cumulative time in hardware slowdown"),
    Column("throttle_sync_ns", "int64", "cumulative time in sync boost"),
    # links
    Column("pcie_tx_bytes_per_s", "int64", "device to host"),
    Column("pcie_rx_bytes_per_s", "int64", "host to device"),
    Column("nvlink_tx_kib", "int64", "cumulative counter over all links"),
    Column("nvlink_rx_kib", "int64", "cumulative counter over all links"),
    # health
    Column("ecc_corrected", "int64", "cumulative, volatile"),
    Column("ecc_uncorrected", "int64", "cumulative, volatile"),
    Column("remapped_corrected", "int32", "rows remapped after corrected errors"),
    Column("remapped_uncorrected", "int32", "rows remapped after uncorrected errors"),
    Column("remap_pending", "int16", "1 when a remap waits for a reset"),
    Column("retired_pages", "int32", "before Ampere"),
    Column("xid_count", "int64", "XID events seen by this run"),
    Column("xid_last", "int32", "code of the last one"),
    Column("processes", "int32", "compute processes on the device"),
)
COLUMN_NAMES: tuple[str, ...] = tuple(column.name for column in COLUMNS)

#: Columns whose count, sum and maximum a fragment keeps, in this order.
GAUGES: tuple[str, ...] = (
    "gpu_util_pct",
    "sm_active",
    "tensor_active",
    "dram_active",
    "memory_used_bytes",
    "power_mw",
    "temperature_gpu_c",
)


class Device(msgspec.Struct, frozen=True, omit_defaults=True):
    """One GPU (instance 0) or one MIG instance of it, and its last sample in the previous batch of the same run.

    `previous_ts_ms` is None in the first batch of a run: its first sample covers nothing and only starts the clock.
    `previous_energy_mj` is that sample's counter, None when unknown; instances other than 0 have no energy.
    `epoch_ms` is when that MIG instance was made (UTC), because its number is used again after a reconfiguration: a
    batch may list one number twice, with two epochs. 0: the whole GPU, or not known.
    """

    gpu: str
    instance: int = 0
    previous_ts_ms: int | None = None
    previous_energy_mj: int | None = None
    epoch_ms: int = 0


class HostReading(msgspec.Struct, frozen=True, omit_defaults=True):
    """The node itself at the time of the flush; None where it cannot be read. Cumulative counters since boot."""

    ts_ms: int
    cpu_util_pct: float | None = None
    cpu_count: int | None = None
    load_1m: float | None = None
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    network_rx_bytes: int | None = None
    network_tx_bytes: int | None = None
    disk_read_bytes: int | None = None
    disk_write_bytes: int | None = None
    psi_cpu_pct: float | None = None
    psi_memory_pct: float | None = None
    psi_io_pct: float | None = None
    node_power_mw: int | None = None
    node_energy_mj: int | None = None


class Gap(msgspec.Struct, frozen=True):
    """Batches of this node that its spool dropped before they were sent. Gaps merge; they are never dropped."""

    run_id: str
    first_seq: int
    last_seq: int
    from_ms: int
    to_ms: int
    batches: int
    reason: str = "spool full"


class BatchHeader(msgspec.Struct, frozen=True, omit_defaults=True):
    """All that a worker needs beside the rows. Times are UTC milliseconds; no pool, no price, no tenant.

    `run_id` is random and new at every agent start (and after every step of the wall clock); `seq` counts from 0
    within it. The wall anchor is fixed for a run: ts = anchor_wall_ms + (CLOCK_BOOTTIME - anchor_boottime_ms).
    `running` holds the ids of the allocations the agent knows to run at the last sample of the batch.
    A device is active when sm_active (else gpu_util_pct / 100) is at least `active_threshold`.
    """

    node: str
    boot_id: str
    boot_start_ms: int
    run_id: str
    run_start_ms: int
    seq: int
    period_ms: int
    anchor_wall_ms: int
    anchor_boottime_ms: int
    devices: list[Device]
    version: int = TELEMETRY_VERSION
    active_threshold: float = 0.01
    running: list[str] = []
    host: HostReading | None = None
    gaps: list[Gap] = []
    agent_version: str = ""

    def __post_init__(self) -> None:
        for field in ("node", "boot_id", "run_id"):
            if not getattr(self, field):
                raise ValueError(f"{field}: is empty; an agent sets it at start")
        if self.period_ms <= 0:
            raise ValueError(f"period_ms: expected a positive number of milliseconds, got {self.period_ms}")
        if self.seq < 0:
            raise ValueError(f"seq: expected 0 or more, got {self.seq}")
        if not 0 < self.active_threshold <= 1:
            raise ValueError(f"active_threshold: expected a share in (0, 1], got {self.active_threshold}")


_decoder = msgspec.json.Decoder(BatchHeader)
_encoder = msgspec.json.Encoder()


def encode_header(header: BatchHeader) -> bytes:
    """The header as the bytes of the Kafka header `HEADER_KEY`."""
    return _encoder.encode(header)


def decode_header(data: bytes) -> BatchHeader:
    """The inverse of `encode_header`.

    Raises:
        MessageError: it is not JSON, a field is missing or wrong (named), or the version is unknown.
    """
    try:
        header = _decoder.decode(data)
    except RecursionError as error:
        raise MessageError(f"header {HEADER_KEY}: JSON is nested too deeply") from error
    except (msgspec.DecodeError, ValueError, OverflowError) as error:
        raise MessageError(f"header {HEADER_KEY}: {error}") from error
    if header.version != TELEMETRY_VERSION:
        raise MessageError(
            f"header {HEADER_KEY}: version: this worker reads {TELEMETRY_VERSION}, got {header.version}; "
            "upgrade the workers before the agents"
        )
    return header
