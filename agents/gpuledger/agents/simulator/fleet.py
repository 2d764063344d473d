"""The simulated hardware: nodes and GPUs, what they measure, and the batches their agents would send.

Power follows what the jobs do; the energy counter is its exact integral (power in milliwatts times milliseconds is
microjoules), so that the ledger's energy can be checked against it to the millijoule.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field

from gpuledger.agents.batch import Cell, encode_batch
from gpuledger.agents.messages import Message
from gpuledger.agents.simulator.jobs import RunningJob, Slot
from gpuledger.agents.simulator.scenario import MIG_SLICES, UNITS_PER_GPU, PoolPlan, Scenario
from gpuledger.schemas.events import Geometry, Instance, Inventory, Placement
from gpuledger.schemas.telemetry import BatchHeader, Device, DownCause, HostReading

__all__ = ["Gpu", "Node", "build_fleet"]

AGENT_VERSION = "simulator"
_MEASURED = (
    "down_cause",
    "gpu_util_pct",
    "mem_util_pct",
    "sm_active",
    "tensor_active",
    "dram_active",
    "memory_used_bytes",
    "memory_reserved_bytes",
    "memory_total_bytes",
    "energy_mj",
    "power_mw",
    "power_limit_mw",
    "temperature_gpu_c",
    "sm_clock_mhz",
    "memory_clock_mhz",
    "processes",
)
_LOST: tuple[Cell, ...] = (int(DownCause.LOST), *[None] * (len(_MEASURED) - 1))
_GIB = 1 << 30
#: What the driver holds for itself, and what an idle GPU shows as used.
_RESERVED_BYTES = 640 << 20
_IDLE_MEMORY_BYTES = 4 << 20
#: A node without its GPUs: host CPUs, memory, network, fans; and what a watt of GPU adds to them.
_NODE_IDLE_MW = 900_000
_NODE_PER_GPU_PERCENT = 9


#: GPU, number of the MIG instance, and when that was made; 0 and 0 for the whole GPU.
_Device = tuple[str, int, int]


def seeded_uuid(*parts: object) -> str:
    """A UUID that depends on its parts alone."""
    return str(uuid.UUID(int=random.Random("/".join(map(str, parts))).getrandbits(128), version=4))


@dataclass(slots=True)
class Gpu:
    """One GPU: who is on it (job, share of it in units) and its counters. `energy_uj` is in microjoules. In MIG mode
    its `slots` are its instances, smallest first, and no part of it is free for anything else."""

    uuid: str
    index: int
    energy_uj: int
    free_units: int = UNITS_PER_GPU
    slot_units: int = 0
    jobs: list[tuple[RunningJob, int]] = field(default_factory=list[tuple[RunningJob, int]])
    temperature_c: float = 31.0
    lost: bool = False
    in_mig_mode: bool = False
    slots: list[Slot] = field(default_factory=list[Slot])
    cut_ms: int = 0

    def cut(self, slices: list[int], now_ms: int) -> None:
        """Makes instances of these numbers of slices, numbered from 1; those it had are gone."""
        self.in_mig_mode, self.cut_ms, self.free_units = True, now_ms, 0
        self.slots = [Slot(n, now_ms, size) for n, size in enumerate(sorted(slices), start=1)]


class Node:
    """A node, its boot and its agent's run; `sample` measures it, `flush` makes the batch of what was measured."""

    def __init__(self, name: str, plan: PoolPlan, scenario: Scenario, start_ms: int, born_ms: int) -> None:
        seed = scenario.seed
        self.name = name
        self.plan = plan
        self.born_ms = born_ms
        self.up = True
        self.agent_up = True
        self.gpus = [
            Gpu(
                "GPU-" + seeded_uuid(seed, name, index),
                index,
                random.Random(f"{seed}/{name}/{index}/energy").randrange(10**14),
            )
            for index in range(plan.gpus_per_node)
        ]
        if plan.mig:
            for gpu in self.gpus:
                gpu.cut(plan.mig, born_ms)
        self.free_gpus = 0 if plan.mig else len(self.gpus)
        self.phase_ms = random.Random(f"{seed}/{name}/phase").randrange(scenario.period_ms)
        self.energy_uj = 0
        self._seed = seed
        self._period_ms = scenario.period_ms
        self._random = random.Random(f"{seed}/{name}/{start_ms}/noise")
        self._measured_ms: int | None = None
        self.boot_start_ms = born_ms - random.Random(f"{seed}/{name}/uptime").randrange(3_600_000, 90 * 86_400_000)
        self.boot_id = seeded_uuid(seed, name, self.boot_start_ms, "boot")
        self.begin_run(start_ms)

    # -- identity ---------------------------------------------------------------------------------------------------

    def begin_run(self, now_ms: int) -> None:
        """A new agent run: fresh numbers, and its first sample covers nothing. Rows not flushed are lost with it."""
        self.agent_up = True
        self._run_id = seeded_uuid(self._seed, self.name, now_ms, "run")
        self._run_start_ms = now_ms
        self._seq = 0
        self._devices = [device for gpu in self.gpus for device in _devices(gpu)]
        self._previous: dict[_Device, tuple[int, int | None]] = {}
        self._clear()

    def recut(self, gpu: Gpu, slices: list[int], now_ms: int) -> None:
        """The GPU is cut into other instances. Its next batch has rows of those it had and of those it has."""
        gpu.cut(slices, now_ms)
        self._devices += _devices(gpu)[1:]

    def reboot(self, now_ms: int) -> None:
        """A new boot: counters that live in the driver begin again at 0."""
        self.up = True
        self.boot_start_ms = now_ms
        self.boot_id = seeded_uuid(self._seed, self.name, now_ms, "boot")
        for gpu in self.gpus:
            gpu.energy_uj = 0
        self.energy_uj = 0
        self._measured_ms = now_ms
        self.begin_run(now_ms)

    def stop(self) -> None:
        """The node goes down; what was not sent is lost."""
        self.up = False
        self._clear()

    def restore(self, last_ms: int) -> None:
        """Goes on from counters of an earlier simulation that ended at `last_ms`: the hole is integrated as idle."""
        self._measured_ms = last_ms

    def placements(self, revision: int) -> list[Placement]:
        return [
            Placement(
                id=f"placement:{gpu.uuid}",
                revision=revision,
                claimed_at_ms=revision,
                gpu=gpu.uuid,
                node=self.name,
                pool=self.plan.name,
                site=self.plan.site,
                model=self.plan.model,
                index=gpu.index,
                memory_total_bytes=self.plan.memory_gib * _GIB,
                start_ms=self.born_ms,
            )
            for gpu in self.gpus
        ]

    def inventory(self, now_ms: int, config_hash: str) -> Inventory:
        lost = sum(gpu.lost for gpu in self.gpus)
        return Inventory(
            node=self.name,
            claimed_at_ms=now_ms,
            boot_id=self.boot_id,
            agent_version=AGENT_VERSION,
            config_hash=config_hash,
            health=f"{lost} of {len(self.gpus)} GPUs lost" if lost else "ok",
            placements=self.placements(self.born_ms),
            geometries=[self._geometry(gpu) for gpu in self.gpus if gpu.in_mig_mode],
        )

    def _geometry(self, gpu: Gpu) -> Geometry:
        size_gib = self.plan.memory_gib
        return Geometry(
            id=f"geometry:{gpu.uuid}:{gpu.cut_ms}",
            revision=gpu.cut_ms,
            claimed_at_ms=gpu.cut_ms,
            gpu=gpu.uuid,
            node=self.name,
            slices=MIG_SLICES,
            instances=[
                Instance(s.instance, s.epoch_ms, s.slices, f"{s.slices}g.{s.slices * size_gib // 8}gb")
                for s in gpu.slots
            ],
            start_ms=gpu.cut_ms,
        )

    # -- measuring --------------------------------------------------------------------------------------------------

    def _clear(self) -> None:
        self._ts: list[Cell] = []
        self._device: list[Cell] = []
        self._rows: list[tuple[Cell, ...]] = []
        self._index = {device: n for n, device in enumerate(self._devices)}

    def sample(self, tick_ms: int) -> None:
        """Measures every GPU once in the period that begins at `tick_ms`, at this node's own phase."""
        ts = tick_ms + self.phase_ms
        elapsed = 0 if self._measured_ms is None else ts - self._measured_ms
        self._measured_ms = ts
        total_mw = 0
        if len(self._index) < len(self._devices):
            self._index = {device: n for n, device in enumerate(self._devices)}
        for gpu in self.gpus:
            if gpu.lost:
                row = _LOST
            else:
                row, power_mw = self._measure(gpu, ts, elapsed)
                total_mw += power_mw
            if self.agent_up:
                self._note(ts, (gpu.uuid, 0, 0), row)
                if gpu.in_mig_mode and not gpu.lost:
                    for slot in gpu.slots:
                        self._note(ts, (gpu.uuid, slot.instance, slot.epoch_ms), self._measure_slot(slot, ts))
        self._node_power_mw = total_mw + _NODE_IDLE_MW + total_mw * _NODE_PER_GPU_PERCENT // 100
        self.energy_uj += self._node_power_mw * elapsed

    def _note(self, ts: int, device: _Device, row: tuple[Cell, ...]) -> None:
        self._ts.append(ts)
        self._device.append(self._index[device])
        self._rows.append(row)

    def _measure_slot(self, slot: Slot, ts: int) -> tuple[Cell, ...]:
        """The row of a MIG instance: what its multiprocessors do, and its memory; the driver knows no utilisation,
        power or energy of it."""
        job = slot.job
        active = job is not None and job.is_active(ts)
        memory = self.plan.memory_gib * _GIB * slot.slices // (MIG_SLICES + 1)
        cells: dict[str, Cell] = {
            "sm_active": job.sm_level if job and active else 0.0,
            "tensor_active": job.tensor_level if job and active else 0.0,
            "dram_active": job.dram_level if job and active else 0.0,
            "memory_used_bytes": int(job.memory_share * memory) if job else 0,
            "memory_total_bytes": memory,
            "processes": int(job is not None),
        }
        return tuple(cells.get(name) for name in _MEASURED)

    def _measure(self, gpu: Gpu, ts: int, elapsed: int) -> tuple[tuple[Cell, ...], int]:
        """The row of a GPU (as `_MEASURED`) and its power; its counter moves on by power x `elapsed`."""
        plan = self.plan
        sm = tensor = dram = 0.0
        memory = _IDLE_MEMORY_BYTES
        for job, units in gpu.jobs:
            share = units / UNITS_PER_GPU
            memory += int(job.memory_share * share * (plan.memory_gib * _GIB - _RESERVED_BYTES - _IDLE_MEMORY_BYTES))
            if job.is_active(ts):
                sm += job.sm_level * share
                tensor += job.tensor_level * share
                dram += job.dram_level * share
        noise = self._random.random()
        idle_mw = plan.idle_w * 1000
        if sm > 0.0:
            sm = min(1.0, sm * (0.97 + 0.06 * noise))
            utilisation = float(min(100, round(100 * (0.25 + 0.75 * sm))))
            power_mw = idle_mw + int((plan.tdp_w - plan.idle_w) * 1000 * min(1.0, 0.22 + 0.5 * sm + 0.3 * tensor))
            sm_clock = plan.sm_clock_mhz - 15 * int(noise * 8)
            memory_clock = plan.memory_clock_mhz
        else:
            utilisation = 0.0
            power_mw = idle_mw + int(2000 * noise)
            sm_clock, memory_clock = 345, plan.memory_clock_mhz
        gpu.energy_uj += power_mw * elapsed
        gpu.temperature_c += (29.0 + 38.0 * power_mw / (plan.tdp_w * 1000) - gpu.temperature_c) * 0.2
        if gpu.in_mig_mode:
            return self._row_in_mig_mode(gpu, memory, power_mw), power_mw
        row = (
            None,
            utilisation,
            float(round(dram * 90)),
            sm,
            tensor,
            dram,
            memory,
            _RESERVED_BYTES,
            plan.memory_gib * _GIB,
            gpu.energy_uj // 1000,
            power_mw,
            plan.tdp_w * 1000,
            float(round(gpu.temperature_c)),
            sm_clock,
            memory_clock,
            len(gpu.jobs),
        )
        return row, power_mw

    def _row_in_mig_mode(self, gpu: Gpu, memory: int, power_mw: int) -> tuple[Cell, ...]:
        """Of a whole GPU in MIG mode the driver tells no utilisation."""
        cells: dict[str, Cell] = {
            "memory_used_bytes": memory,
            "memory_total_bytes": self.plan.memory_gib * _GIB,
            "energy_mj": gpu.energy_uj // 1000,
            "power_mw": power_mw,
            "power_limit_mw": self.plan.tdp_w * 1000,
            "temperature_gpu_c": float(round(gpu.temperature_c)),
            "processes": len(gpu.jobs),
        }
        return tuple(cells.get(name) for name in _MEASURED)

    # -- sending ----------------------------------------------------------------------------------------------------

    def _running(self) -> Iterator[str]:
        for gpu in self.gpus:
            for job, _ in gpu.jobs:
                yield job.allocation_id(gpu.uuid)

    def flush(self) -> Message | None:
        """The batch of what was measured since the last flush, None when there is nothing."""
        if not self._rows:
            return None
        columns: dict[str, list[Cell]] = {"ts_ms": self._ts, "device": self._device}
        for name, cells in zip(_MEASURED, zip(*self._rows, strict=True), strict=True):
            columns[name] = list(cells)
        last_ts = self._ts[-1]
        assert isinstance(last_ts, int)
        header = BatchHeader(
            node=self.name,
            boot_id=self.boot_id,
            boot_start_ms=self.boot_start_ms,
            run_id=self._run_id,
            run_start_ms=self._run_start_ms,
            seq=self._seq,
            period_ms=self._period_ms,
            anchor_wall_ms=self._run_start_ms,
            anchor_boottime_ms=self._run_start_ms - self.boot_start_ms,
            devices=[
                Device(gpu, instance, *self._previous.get((gpu, instance, epoch_ms), (None, None)), epoch_ms)
                for gpu, instance, epoch_ms in self._devices
            ],
            running=sorted(self._running()),
            host=HostReading(
                ts_ms=last_ts,
                cpu_count=192,
                node_power_mw=self._node_power_mw,
                node_energy_mj=self.energy_uj // 1000,
            ),
            agent_version=AGENT_VERSION,
        )
        self._seq += 1
        self._remember()
        message = encode_batch(header, columns)
        self._clear()
        return message

    def _remember(self) -> None:
        """The last sample of every device that there still is; where its energy is not known the next row's is not."""
        last: dict[int, tuple[int, int | None]] = {}
        energy = _MEASURED.index("energy_mj")
        for ts, device, row in zip(self._ts, self._device, self._rows, strict=True):
            assert isinstance(ts, int) and isinstance(device, int)
            mj = row[energy]
            last[device] = (ts, mj if isinstance(mj, int) else None)
        known = {self._devices[device]: seen for device, seen in last.items()}
        self._devices = [device for gpu in self.gpus for device in _devices(gpu)]
        self._previous = {device: known[device] for device in self._devices if device in known}


def _devices(gpu: Gpu) -> list[_Device]:
    return [(gpu.uuid, 0, 0), *((gpu.uuid, slot.instance, slot.epoch_ms) for slot in gpu.slots)]


def build_fleet(scenario: Scenario, start_ms: int, born_ms: int) -> dict[str, list[Node]]:
    """Pool → its nodes in order. `born_ms` is when they were placed, `start_ms` when this simulation begins."""
    return {
        plan.name: [Node(f"{plan.name}-{n + 1:04d}", plan, scenario, start_ms, born_ms) for n in range(plan.nodes)]
        for plan in scenario.pools
    }
