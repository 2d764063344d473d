"""The equal work: Arrow batches to sums of 28 metrics per GPU and minute, with the schema known beforehand.

Every framework calls these functions and no other, so that what differs is the framework. Only numpy and pyarrow are
imported here: the peers run in an environment without the product.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

__all__ = ["GPUS", "METRICS", "SAMPLES", "Clock", "Fold", "decode"]

#: Of each message.
GPUS, SAMPLES = 8, 10
_MINUTE_MS = 60_000

METRICS = (
    "gpu_util_pct",
    "mem_util_pct",
    "sm_active",
    "sm_occupancy",
    "tensor_active",
    "dram_active",
    "encoder_util_pct",
    "decoder_util_pct",
    "memory_used_bytes",
    "memory_reserved_bytes",
    "memory_total_bytes",
    "energy_mj",
    "power_mw",
    "power_mean_mw",
    "power_instant_mw",
    "power_limit_mw",
    "temperature_gpu_c",
    "temperature_memory_c",
    "sm_clock_mhz",
    "memory_clock_mhz",
    "clocks_event_reasons",
    "throttle_power_ns",
    "throttle_thermal_ns",
    "pcie_tx_bytes_per_s",
    "pcie_rx_bytes_per_s",
    "nvlink_tx_kib",
    "nvlink_rx_kib",
    "ecc_corrected",
)

_schemas: dict[bytes, pa.Schema] = {}

# pyarrow loads pandas, where it is installed, at the first conversion: a second that is no part of anybody's work.
pa.chunked_array([[0]]).to_numpy()


def decode(value: bytes) -> pa.RecordBatch:
    """The record batch of one message: its schema bytes, the same in all, are read once."""
    cut = 8 + int.from_bytes(value[4:8], "little")
    prefix = value[:cut]
    schema = _schemas.get(prefix)
    if schema is None:
        schema = _schemas[prefix] = pa.ipc.read_schema(pa.py_buffer(prefix))
    return pa.ipc.read_record_batch(pa.py_buffer(value)[cut:], schema)


@dataclass
class Clock:
    """Wall and CPU time (all threads of the process) from the first messages that came to the last that were done."""

    _began: tuple[float, float] | None = None
    _ended: tuple[float, float] = (0.0, 0.0)

    def begin(self) -> None:
        if self._began is None:
            self._began = time.monotonic(), time.process_time()

    def end(self) -> None:
        self._ended = time.monotonic(), time.process_time()

    def result(self) -> dict[str, float]:
        wall_s, cpu_s = self._began or self._ended
        return {"seconds": self._ended[0] - wall_s, "cpu_seconds": self._ended[1] - cpu_s}


@dataclass
class Fold:
    """Sums per (node, minute): rows by GPU, columns as METRICS and last the number of samples."""

    messages: int = 0
    clock: Clock = field(default_factory=Clock)
    sums: dict[tuple[bytes, int], NDArray[np.float64]] = field(
        default_factory=dict[tuple[bytes, int], NDArray[np.float64]]
    )

    def add(self, keys: Sequence[bytes], values: Sequence[bytes]) -> None:
        """Folds the messages of these Kafka keys (nodes) and values, one or many."""
        self.clock.begin()
        self._fold(keys, [decode(value) for value in values])
        self.messages += len(values)
        self.clock.end()

    def _fold(self, keys: Sequence[bytes], batches: Sequence[pa.RecordBatch]) -> None:
        places: dict[bytes, int] = {}
        place = np.array([places.setdefault(key, len(places)) for key in keys])
        # A table of one batch costs more than the batch.
        columns = batches[0] if len(batches) == 1 else pa.Table.from_batches(batches)
        rows = [batch.num_rows for batch in batches]
        minute = columns.column("ts_ms").to_numpy() // _MINUTE_MS
        first = int(minute.min())
        span = int(minute.max()) - first + 1
        device = columns.column("device").to_numpy()
        code = ((np.repeat(place, rows) * span) + (minute - first)) * GPUS + device
        size = len(places) * span * GPUS
        sums = np.empty((size, len(METRICS) + 1))
        for n, name in enumerate(METRICS):
            sums[:, n] = np.bincount(code, weights=columns.column(name).to_numpy(), minlength=size)
        sums[:, -1] = np.bincount(code, minlength=size)
        by_node = sums.reshape(len(places), span, GPUS, len(METRICS) + 1)
        seen: NDArray[np.bool_] = np.any(by_node[:, :, :, -1], axis=2)
        for key, n in places.items():
            for at in np.flatnonzero(seen[n]).tolist():
                before = self.sums.get((key, first + at))
                if before is None:
                    self.sums[key, first + at] = by_node[n, at].copy()
                else:
                    before += by_node[n, at]

    @property
    def samples(self) -> int:
        """GPU-samples that were counted in."""
        return round(sum(float(found[:, -1].sum()) for found in self.sums.values()))

    def totals(self) -> list[float]:
        """Of each metric over all: what two frameworks must agree on but for rounding."""
        return sum((found.sum(axis=0) for found in self.sums.values()), np.zeros(len(METRICS) + 1)).tolist()

    def result(self) -> dict[str, object]:
        """What a program prints as its last line, as JSON."""
        return {
            "messages": self.messages,
            "samples": self.samples,
            "totals": self.totals(),
            **self.clock.result(),
        }
