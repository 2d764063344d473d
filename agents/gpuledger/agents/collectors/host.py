"""The node itself: CPU, memory, network, disks and pressure, each None where this machine does not tell it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from gpuledger.schemas.telemetry import HostReading

__all__ = ["HostCollector", "read_pressure"]

#: Interfaces whose traffic is not the node's: it would count twice.
_VIRTUAL = re.compile(r"^(lo|veth|docker|br-|virbr|cni|flannel|cali|tun|tap)")


def read_pressure(resource: str, folder: Path = Path("/proc/pressure")) -> float | None:
    """The share of the last ten seconds in which some task waited for ``cpu``, ``memory`` or ``io``, 0..100.

    None where the kernel does not tell it (no PSI, or switched off).
    """
    try:
        text = (folder / resource).read_text(encoding="ascii")
    except OSError:
        return None
    match = re.search(r"^some avg10=([0-9.]+)", text, re.MULTILINE)
    return float(match[1]) if match is not None else None


def _ask(call: Callable[[], Any]) -> Any:
    """What the machine says, None where it cannot."""
    try:
        return call()
    except (OSError, RuntimeError, NotImplementedError, psutil.Error):
        return None


class HostCollector:
    """Reads the node; the CPU share is that since the previous reading, None in the first."""

    name = "host"

    def __init__(self, pressure: Path = Path("/proc/pressure")) -> None:
        self._pressure = pressure
        self._cpu: tuple[float, float] | None = None
        self._cpu_share()

    def read(self, ts_ms: int) -> HostReading:
        """The node now; `ts_ms` is the time of the run that the reading carries."""
        memory = _ask(psutil.virtual_memory)
        disk = _ask(psutil.disk_io_counters)
        load = _ask(os.getloadavg)
        received, sent = self._network()
        return HostReading(
            ts_ms=ts_ms,
            cpu_util_pct=self._cpu_share(),
            cpu_count=os.cpu_count(),
            load_1m=load[0] if load is not None else None,
            memory_used_bytes=memory.total - memory.available if memory is not None else None,
            memory_total_bytes=memory.total if memory is not None else None,
            network_rx_bytes=received,
            network_tx_bytes=sent,
            disk_read_bytes=disk.read_bytes if disk is not None else None,
            disk_write_bytes=disk.write_bytes if disk is not None else None,
            psi_cpu_pct=read_pressure("cpu", self._pressure),
            psi_memory_pct=read_pressure("memory", self._pressure),
            psi_io_pct=read_pressure("io", self._pressure),
        )

    def _network(self) -> tuple[int | None, int | None]:
        counters = _ask(lambda: psutil.net_io_counters(pernic=True)) or {}
        real = [counter for name, counter in counters.items() if not _VIRTUAL.match(name)]
        if not real:
            return None, None
        return sum(counter.bytes_recv for counter in real), sum(counter.bytes_sent for counter in real)

    def _cpu_share(self) -> float | None:
        times = _ask(psutil.cpu_times)
        if times is None:
            return None
        total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
        idle = times.idle + getattr(times, "iowait", 0.0)
        before, self._cpu = self._cpu, (total, idle)
        if before is None or total <= before[0]:
            return None
        return round(100.0 * (1.0 - (idle - before[1]) / (total - before[0])), 2)
