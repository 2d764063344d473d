"""Which GPUs are placed on this node since when: kept over restarts, so that no restart of an agent moves a GPU."""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

from gpuledger.agents.collectors.interface import DeviceInfo
from gpuledger.schemas.events import Placement

__all__ = ["ENDED_KEPT_MS", "place_devices", "pool_of_model"]

#: Ended placements stay in the inventory this long: the topic is compacted, and a reader may be late.
ENDED_KEPT_MS = 30 * 86_400_000


def pool_of_model(model: str) -> str:
    """The pool of GPUs that nobody gave one: their model in small letters, ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-") or "gpus"


def place_devices(
    devices: Sequence[DeviceInfo], known: Sequence[Placement], node: str, pool: str, site: str, now_ms: int
) -> list[Placement]:
    """The placements to tell and to keep: those of `devices` now, and ended ones that are not forgotten yet.

    A GPU that is where it was keeps its placement. One whose node, pool or site changed ends there now and begins
    here now. A known GPU that is not among `devices` stays placed: what is not seen is unobserved, not gone.
    """
    placements = [
        placement for placement in known if placement.end_ms is None or placement.end_ms > now_ms - ENDED_KEPT_MS
    ]
    for device in devices:
        if device.instance:
            continue
        wanted = (node, pool or pool_of_model(device.model), site)
        current = next((one for one in placements if one.gpu == device.gpu and one.end_ms is None), None)
        if current is not None:
            if (current.node, current.pool, current.site) == wanted:
                placements[placements.index(current)] = _described(current, device, now_ms)
                continue
            end_ms = max(now_ms, current.start_ms)
            placements[placements.index(current)] = msgspec.structs.replace(
                current, end_ms=end_ms, revision=max(now_ms, current.revision + 1), claimed_at_ms=now_ms
            )
        placements.append(_new(device, wanted, now_ms))
    return placements


def _new(device: DeviceInfo, where: tuple[str, str, str], now_ms: int) -> Placement:
    node, pool, site = where
    return Placement(
        id=f"placement:{node}:{device.gpu}:{now_ms}",
        revision=now_ms,
        claimed_at_ms=now_ms,
        gpu=device.gpu,
        node=node,
        pool=pool,
        site=site,
        model=device.model,
        index=device.index,
        pci_bus_id=device.pci_bus_id,
        serial=device.serial,
        memory_total_bytes=device.memory_total_bytes,
        start_ms=now_ms,
    )


def _described(placement: Placement, device: DeviceInfo, now_ms: int) -> Placement:
    """The same placement; a newer revision where the device is described otherwise (index after a slot change)."""
    described = msgspec.structs.replace(
        placement,
        index=device.index,
        model=device.model or placement.model,
        pci_bus_id=device.pci_bus_id or placement.pci_bus_id,
        serial=device.serial or placement.serial,
        memory_total_bytes=device.memory_total_bytes or placement.memory_total_bytes,
    )
    if described == placement:
        return placement
    return msgspec.structs.replace(described, revision=max(now_ms, placement.revision + 1))
