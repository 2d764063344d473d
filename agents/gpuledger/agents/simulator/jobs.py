"""The simulated jobs: what they ask for, how they use their GPUs, and the events that tell of them."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

from gpuledger.agents.simulator.scenario import MIG_SLICES, UNITS_PER_GPU, Duty, JobMix, JobSize, TenantPlan
from gpuledger.schemas.events import Allocation, Job

__all__ = ["JobAsk", "RunningJob", "Slot", "draw_job"]


@dataclass(frozen=True, slots=True)
class JobAsk:
    """A job before it runs: its size in units, how long it runs, what it does."""

    units: int
    duration_ms: int
    duty: Duty
    phase_ms: int
    submitted_ms: int


def draw_job(mix: JobMix, sizes: list[JobSize], now_ms: int, rng: random.Random) -> JobAsk:
    """One job of the mix, its size one of `sizes`."""
    size = rng.choices(sizes, [size.weight for size in sizes])[0]
    duty = rng.choices(mix.duties, [duty.weight for duty in mix.duties])[0]
    low, high = math.log(mix.shortest_s), math.log(mix.longest_s)
    seconds = round(math.exp(low + (high - low) * rng.random()))
    phase_ms = rng.randrange((duty.active_s + duty.idle_s) * 1000)
    return JobAsk(size.units(), seconds * 1000, duty, phase_ms, now_ms)


@dataclass(slots=True, eq=False)
class Slot:
    """A MIG instance: its number, when it was made, its slices, and the job that has it."""

    instance: int
    epoch_ms: int
    slices: int
    job: RunningJob | None = None


@dataclass(slots=True, eq=False)
class RunningJob:
    """A job on its GPUs: (node, boot, GPU) of each, `units_each` of every one of them; or on one MIG instance."""

    id: str
    tenant: TenantPlan
    pool: str
    account: str
    user: str
    ask: JobAsk
    units_each: int
    start_ms: int
    places: list[tuple[str, str, str]] = field(default_factory=list[tuple[str, str, str]])
    slot: Slot | None = None
    sm_level: float = 0.0
    tensor_level: float = 0.0
    dram_level: float = 0.0
    memory_share: float = 0.0
    _cycle_ms: int = 0
    _active_ms: int = 0

    def __post_init__(self) -> None:
        duty = self.ask.duty
        self.sm_level = duty.level_pct / 100
        self.tensor_level = duty.tensor_pct / 100
        self.dram_level = duty.dram_pct / 100
        self.memory_share = duty.memory_pct / 100
        self._active_ms = duty.active_s * 1000 if duty.level_pct else 0
        self._cycle_ms = (duty.active_s + duty.idle_s) * 1000

    @property
    def ends_ms(self) -> int:
        return self.start_ms + self.ask.duration_ms

    def is_active(self, ts_ms: int) -> bool:
        """Whether the duty cycle is in its active part."""
        return (ts_ms - self.start_ms + self.ask.phase_ms) % self._cycle_ms < self._active_ms

    def allocation_id(self, gpu: str) -> str:
        return f"{self.id}/{gpu}"

    def allocations(self, end_ms: int | None = None) -> list[Allocation]:
        """One allocation per GPU, running or ended."""
        claimed_ms = self.start_ms if end_ms is None else end_ms
        # An end in the very millisecond of the start must still be the newer claim.
        revision = claimed_ms if end_ms is None else end_ms + 1
        slot = self.slot
        weight = (slot.slices, MIG_SLICES) if slot else (1, UNITS_PER_GPU // self.units_each)
        return [
            Allocation(
                id=self.allocation_id(gpu),
                revision=revision,
                claimed_at_ms=claimed_ms,
                node=node,
                boot_id=boot_id,
                gpu=gpu,
                instance=slot.instance if slot else 0,
                epoch_ms=slot.epoch_ms if slot else 0,
                job_id=self.id,
                source="slurm",
                account=self.account,
                user=self.user,
                weight_num=weight[0],
                weight_den=weight[1],
                start_ms=self.start_ms,
                end_ms=end_ms,
            )
            for node, boot_id, gpu in self.places
        ]

    def event(self, end_ms: int | None = None, state: str = "RUNNING") -> Job:
        """The job as its scheduler would tell it."""
        claimed_ms = self.start_ms if end_ms is None else end_ms
        return Job(
            id=self.id,
            revision=claimed_ms if end_ms is None else end_ms + 1,
            claimed_at_ms=claimed_ms,
            source="slurm",
            cluster="simulated",
            name=self.ask.duty.name,
            account=self.account,
            user=self.user,
            queue=self.pool,
            gpus=len(self.places),
            submitted_ms=self.ask.submitted_ms,
            started_ms=self.start_ms,
            ended_ms=end_ms,
            state=state,
        )
