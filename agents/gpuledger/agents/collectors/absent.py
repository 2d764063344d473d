"""GPUs that this node is known to have while their driver does not answer: reported `down`, never silently gone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gpuledger.agents.collectors.interface import DeviceInfo, Row
from gpuledger.schemas.events import Placement
from gpuledger.schemas.telemetry import DownCause

__all__ = ["AbsentDriver"]


class AbsentDriver:
    """Stands in for a collector that could not start; its devices are the placements of earlier starts."""

    name = "absent"

    def __init__(self, placements: Sequence[Placement]) -> None:
        self._devices = [
            DeviceInfo(
                gpu=placement.gpu,
                index=n if placement.index is None else placement.index,
                model=placement.model,
                pci_bus_id=placement.pci_bus_id,
                serial=placement.serial,
                memory_total_bytes=placement.memory_total_bytes,
            )
            for n, placement in enumerate(one for one in placements if one.end_ms is None)
        ]

    def devices(self) -> Sequence[DeviceInfo]:
        return self._devices

    def refresh(self) -> bool:
        return False

    def sample(self) -> Sequence[Row]:
        return [{"down_cause": int(DownCause.DRIVER)} for _ in self._devices]

    def processes(self) -> Mapping[str, Sequence[int]]:
        return {}

    def versions(self) -> Mapping[str, str]:
        return {}

    def close(self) -> None:
        pass
