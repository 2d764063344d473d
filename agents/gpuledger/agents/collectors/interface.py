"""What every GPU collector gives, whatever the vendor: devices, and one row of cells per device and sample.

A cell that a device or driver does not support is NULL (absent), never 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from gpuledger.agents.batch import Cell

__all__ = ["DeviceInfo", "GpuCollector", "Row"]

#: Column of the telemetry contract → value; a column that is absent is NULL.
Row = Mapping[str, Cell]


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """One GPU (instance 0) or one instance of it, as the inventory tells it. `gpu` is its lasting unique id."""

    gpu: str
    index: int
    instance: int = 0
    model: str = ""
    pci_bus_id: str | None = None
    serial: str | None = None
    memory_total_bytes: int | None = None


class GpuCollector(Protocol):
    """Reads the GPUs of one vendor. No call blocks longer than the collector's deadline, whatever the driver does."""

    name: str

    def devices(self) -> Sequence[DeviceInfo]:
        """The devices, in the order of `sample`'s rows; the same until `refresh` returns True."""
        ...

    def refresh(self) -> bool:
        """Looks again at what there is (a driver reload, a GPU replaced); True when `devices` has changed."""
        ...

    def sample(self) -> Sequence[Row]:
        """One row per device, now. A device that does not answer has `down_cause` and nothing else."""
        ...

    def processes(self) -> Mapping[str, Sequence[int]]:
        """GPU → the pids that have a context on it; a GPU that cannot say is absent, which is not "none"."""
        ...

    def versions(self) -> Mapping[str, str]:
        """``driver`` and ``cuda``, where known."""
        ...

    def close(self) -> None:
        """Lets go of the driver, without waiting for it."""
        ...
