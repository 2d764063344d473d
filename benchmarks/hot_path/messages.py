"""The load of the hot path: telemetry of a small fleet as our own encoder makes it, always the same for the same size.

A message is what a node with 8 GPUs saw in 10 seconds at one sample per second, in 30 known columns. Node and flush
alone decide its bytes, so a topic can be loaded without holding it in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from work import GPUS, METRICS, SAMPLES

from gpuledger.agents.batch import encode_batch
from gpuledger.agents.messages import Message
from gpuledger.schemas.telemetry import BatchHeader, Device, HostReading

__all__ = ["PERIOD_MS", "messages", "node_name"]

PERIOD_MS = 1_000
_FLUSH_MS = SAMPLES * PERIOD_MS
_INTEGER = ("_bytes", "_mj", "_mw", "_mhz", "_ns", "_kib", "_per_s", "reasons", "corrected")

#: Idle value, active value, and the width of the noise on it; counters are made apart.
_SHAPES: dict[str, tuple[float, float, float]] = {
    "gpu_util_pct": (0, 96, 3),
    "mem_util_pct": (0, 60, 4),
    "sm_active": (0, 0.84, 0.04),
    "sm_occupancy": (0, 0.45, 0.04),
    "tensor_active": (0, 0.38, 0.03),
    "dram_active": (0, 0.5, 0.05),
    "encoder_util_pct": (0, 0, 0),
    "decoder_util_pct": (0, 0, 0),
    "memory_used_bytes": (4 << 20, 61 << 30, 1 << 20),
    "memory_reserved_bytes": (640 << 20, 640 << 20, 0),
    "memory_total_bytes": (80 << 30, 80 << 30, 0),
    "power_mw": (72_000, 610_000, 6_000),
    "power_mean_mw": (72_000, 610_000, 5_000),
    "power_instant_mw": (72_000, 610_000, 9_000),
    "power_limit_mw": (700_000, 700_000, 0),
    "temperature_gpu_c": (31, 62, 2),
    "temperature_memory_c": (38, 74, 2),
    "sm_clock_mhz": (345, 1_935, 45),
    "memory_clock_mhz": (2_619, 2_619, 0),
    "clocks_event_reasons": (1, 0, 0),
    "pcie_tx_bytes_per_s": (0, 3_000_000_000, 400_000_000),
    "pcie_rx_bytes_per_s": (0, 2_000_000_000, 400_000_000),
}
#: Counters and what they gain in an active millisecond.
_COUNTERS = {
    "throttle_power_ns": 40_000,
    "throttle_thermal_ns": 0,
    "nvlink_tx_kib": 90_000,
    "nvlink_rx_kib": 90_000,
    "ecc_corrected": 0,
}


def node_name(node: int) -> str:
    return f"bench-{node:05d}"


class _Node:
    """One node's eight GPUs: jobs of 8 GPUs that train, with a pause of 6 s in each 50."""

    def __init__(self, node: int, start_ms: int) -> None:
        self._number = node
        self._start_ms = start_ms + node % PERIOD_MS
        self._random = np.random.default_rng(node)
        self._gpus = [f"GPU-{node:08x}-0000-4000-8000-{gpu:012x}" for gpu in range(GPUS)]
        self._energy_uj = self._random.integers(10**13, 10**14, GPUS)
        self._counters = {name: self._random.integers(0, 10**9, GPUS) for name in _COUNTERS}
        self._previous: list[tuple[int, int]] | None = None
        self._seq = 0

    def flush(self) -> Message:
        first_ms = self._start_ms + self._seq * _FLUSH_MS
        ts = first_ms + np.arange(SAMPLES) * PERIOD_MS
        active = np.repeat((ts // PERIOD_MS + self._number) % 50 >= 6, GPUS)
        noise = self._random.random(SAMPLES * GPUS)
        columns: dict[str, list[Any]] = {
            "ts_ms": np.repeat(ts, GPUS).tolist(),
            "device": np.tile(np.arange(GPUS), SAMPLES).tolist(),
        }
        cells: dict[str, NDArray[Any]] = {}
        for name, (idle, busy, width) in _SHAPES.items():
            values = np.where(active, busy + (noise - 0.5) * width, idle)
            cells[name] = values.astype(np.int64) if name.endswith(_INTEGER) else values.astype(np.float32)
        cells["energy_mj"] = self._counted(cells["power_mw"] * PERIOD_MS, self._energy_uj) // 1000
        for name, gain in _COUNTERS.items():
            cells[name] = self._counted(np.where(active, gain * PERIOD_MS, 0), self._counters[name])
        columns |= {name: cells[name].tolist() for name in METRICS}
        message = encode_batch(self._header(ts), columns)
        self._previous = [(int(ts[-1]), int(energy)) for energy in cells["energy_mj"][-GPUS:]]
        self._seq += 1
        return message

    def _counted(self, gains: NDArray[Any], counter: NDArray[np.int64]) -> NDArray[np.int64]:
        """The counter after each row, which `counter` then is."""
        after = counter + np.cumsum(gains.reshape(SAMPLES, GPUS), axis=0, dtype=np.int64)
        counter[:] = after[-1]
        return after.ravel()

    def _header(self, ts: NDArray[np.int64]) -> BatchHeader:
        previous = self._previous or [(None, None)] * GPUS
        return BatchHeader(
            node=node_name(self._number),
            boot_id=f"b0070000-0000-4000-8000-{self._number:012x}",
            boot_start_ms=self._start_ms - 86_400_000,
            run_id=f"a9e00000-0000-4000-8000-{self._number:012x}",
            run_start_ms=self._start_ms,
            seq=self._seq,
            period_ms=PERIOD_MS,
            anchor_wall_ms=self._start_ms,
            anchor_boottime_ms=86_400_000,
            devices=[Device(gpu, 0, at, energy) for gpu, (at, energy) in zip(self._gpus, previous, strict=True)],
            running=[f"slurm:{self._number}:{gpu}" for gpu in range(GPUS)],
            host=HostReading(
                ts_ms=int(ts[-1]), cpu_count=192, node_power_mw=6_000_000, node_energy_mj=int(ts[-1]) * 6000
            ),
            agent_version="benchmark",
        )


def messages(nodes: int, flushes: int, start_ms: int) -> Iterator[Message]:
    """`flushes` rounds of one message from each of `nodes` nodes; the first sample is at `start_ms` or up to a period
    later."""
    fleet = [_Node(node, start_ms) for node in range(nodes)]
    for _ in range(flushes):
        for node in fleet:
            yield node.flush()
