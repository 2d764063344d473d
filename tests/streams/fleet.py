"""What really happens on the nodes of a random world, and the sealed batches that their agents send of it.

Times are true UTC milliseconds on the world's ticks; only what a run writes into its batches is moved by its clock.
Powers are whole watts far apart, so that energies are whole millijoules at every tick and no two of them merge.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tests.streams.chance import Chance

__all__ = ["AHEAD_MS", "BATCH_DELAY_MS", "DAY_MS", "Instance", "Plan", "Run", "batches"]

Fact = dict[str, Any]

#: How far a batch's time may be after the broker's before it is quarantined (DESIGN section 3).
AHEAD_MS = 120_000
#: From a flush to the broker.
BATCH_DELAY_MS = 1_000
DAY_MS = 86_400_000
WATTS = (2_050, 50, 4_050)
ACTIVITIES = ("active", "idle", "down", "unobserved")


@dataclass
class Run:
    """One run of a node's agent over [start_ms, stop_ms). Samples in `silent` ranges were not taken; the batches of
    the numbers in `lost` were never sent, those in `late` come after everything else."""

    node: str
    run_id: str
    boot_id: str
    boot_start_ms: int
    start_ms: int
    stop_ms: int
    period_ms: int
    flush_ms: int
    skew_ms: int = 0
    liar: bool = False
    lost: set[int] = field(default_factory=set[int])
    late: set[int] = field(default_factory=set[int])
    silent: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])


@dataclass
class Instance:
    """A GPU (instance 0) or a MIG instance of it over [start_ms, stop_ms); `states` are (from, activity), ascending."""

    gpu: str
    instance: int
    epoch_ms: int
    start_ms: int
    stop_ms: int
    states: list[tuple[int, str]]
    slices: int = 0


@dataclass
class Plan:
    """A world in the making: the facts that will be told, and what the agents will see.

    `serves` says which node sees a GPU over which time; `truth` when an allocation really ran, which is what its node's
    agent names in its batches; `powers` (from, watts), `resets` and `blind` ranges are of the energy counter of a GPU.
    """

    chance: Chance
    tick_ms: int
    from_ms: int
    to_ms: int
    gpus: list[str] = field(default_factory=list[str])
    facts: dict[str, list[Fact]] = field(default_factory=dict[str, list[Fact]])
    runs: list[Run] = field(default_factory=list[Run])
    serves: dict[str, list[tuple[str, int, int]]] = field(default_factory=dict[str, list[tuple[str, int, int]]])
    instances: list[Instance] = field(default_factory=list[Instance])
    powers: dict[str, list[tuple[int, int]]] = field(default_factory=dict[str, list[tuple[int, int]]])
    resets: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    blind: dict[str, list[tuple[int, int]]] = field(default_factory=dict[str, list[tuple[int, int]]])
    truth: dict[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])
    happened: list[str] = field(default_factory=list[str])

    @property
    def before_ms(self) -> int:
        """When everything that was there from the beginning began."""
        return self.from_ms - 3_600_000

    @property
    def after_ms(self) -> int:
        """When the agents stop."""
        return self.to_ms + 20 * self.tick_ms

    @property
    def nodes(self) -> list[str]:
        return sorted({node for shifts in self.serves.values() for node, _, _ in shifts})

    def moment(self, low_ms: int | None = None, high_ms: int | None = None) -> int:
        """An instant of [low, high], by default of the window, on a tick; shrinks to the middle of its first minute."""
        low = self.from_ms if low_ms is None else low_ms
        high = self.to_ms if high_ms is None else high_ms
        ticks = max(0, (high - low) // self.tick_ms)
        middle = min(ticks, 30_000 // self.tick_ms)
        return low + (self.chance.integer(0, ticks) + middle) % (ticks + 1) * self.tick_ms

    def while_(self, low_ms: int | None = None, longest_ms: int | None = None) -> tuple[int, int]:
        """Two instants in order."""
        start = self.moment(low_ms)
        longest = (self.to_ms - self.from_ms) if longest_ms is None else longest_ms
        return start, start + self.chance.integer(0, longest // self.tick_ms) * self.tick_ms

    def number(self, prefix: str, table: str) -> str:
        """An id that no other fact of the table has."""
        return f"{prefix}{len({fact['id'] for fact in self.facts[table]})}"

    def node_of(self, gpu: str, t: int) -> str:
        """The node that sees the GPU at t, or saw it last."""
        shifts = self.serves[gpu]
        return next((node for node, start, stop in reversed(shifts) if start <= t < stop), shifts[-1][0])

    def runs_of(self, node: str) -> list[Run]:
        return [run for run in self.runs if run.node == node]


def state_at(changes: list[tuple[int, Any]], t: int) -> Any:
    """The value in force at t of (from, value) in order; the first one also before it."""
    value = changes[0][1]
    for start, new in changes:
        if start <= t:
            value = new
    return value


def counter(plan: Plan, gpu: str, t: int) -> int | None:
    """The GPU's energy counter at t in millijoules; None while it cannot be read."""
    if any(start <= t < stop for start, stop in plan.blind.get(gpu, ())):
        return None
    since = max([plan.before_ms, *(r for r in plan.resets.get(gpu, ()) if r <= t)])
    powers = plan.powers[gpu]
    energy = 0
    for n, (start, watts) in enumerate(powers):
        stop = powers[n + 1][0] if n + 1 < len(powers) else 1 << 60
        begin = since if n == 0 else max(start, since)
        energy += watts * max(0, min(stop, t) - begin)
    return energy


def _samples(plan: Plan, run: Run, device: Instance) -> list[tuple[int, str, int | None]]:
    """(true time, activity, counter) of everything the run saw of a device."""
    seen: list[tuple[int, str, int | None]] = []
    shifts = [(start, stop) for node, start, stop in plan.serves[device.gpu] if node == run.node]
    for t in range(run.start_ms, run.stop_ms, run.period_ms):
        here = device.start_ms <= t < device.stop_ms and any(start <= t < stop for start, stop in shifts)
        if not here or any(start <= t < stop for start, stop in run.silent):
            continue
        activity = state_at(device.states, t)
        if run.liar:
            activity = "idle" if activity == "active" else "active"
        seen.append((t, activity, counter(plan, device.gpu, t) if device.instance == 0 else None))
    return seen


def _running(plan: Plan, run: Run, last_ms: int) -> list[str]:
    """The allocations that the agent knows to run at the last sample of a batch."""
    first = {fact["id"]: fact for fact in reversed(plan.facts["allocations"])}
    names: list[str] = []
    for id_, (start, stop) in plan.truth.items():
        fact = first[id_]
        if start <= last_ms < stop and fact["node"] == run.node and fact["boot_id"] in ("", run.boot_id):
            names.append(id_)
    return names


def _sealed(plan: Plan, run: Run) -> list[Fact]:
    devices = [device for device in plan.instances if any(n == run.node for n, _, _ in plan.serves[device.gpu])]
    series = [(device, _samples(plan, run, device)) for device in devices]
    before: dict[int, tuple[int | None, int | None]] = {}
    out: list[Fact] = []
    for seq, edge in enumerate(range(run.start_ms, run.stop_ms, run.flush_ms)):
        until = edge + run.flush_ms
        listed: list[Fact] = []
        last = 0
        for n, (device, samples) in enumerate(series):
            mine = [sample for sample in samples if edge <= sample[0] < until]
            if not mine:
                continue
            previous = before.get(n, (None, None))
            listed.append(
                {
                    "gpu": device.gpu,
                    "instance": device.instance,
                    "epoch_ms": device.epoch_ms,
                    "previous_ts_ms": None if previous[0] is None else previous[0] + run.skew_ms,
                    "previous_energy_mj": previous[1],
                    "samples": [(t + run.skew_ms, activity, energy) for t, activity, energy in mine],
                }
            )
            before[n] = (mine[-1][0], mine[-1][2])
            last = max(last, mine[-1][0])
        if seq in run.lost or not listed:
            continue
        late = seq in run.late
        out.append(
            {
                "node": run.node,
                "boot_id": run.boot_id,
                "boot_start_ms": run.boot_start_ms,
                "run_id": run.run_id,
                "run_start_ms": run.start_ms + run.skew_ms,
                "seq": seq,
                "period_ms": run.period_ms,
                "devices": listed,
                "running": _running(plan, run, last),
                "appended_ms": until + BATCH_DELAY_MS + (DAY_MS // 4 if late else 0),
                "late": late,
            }
        )
    return out


def batches(plan: Plan) -> list[Fact]:
    """Everything that the agents sent and the broker took, in the order of the broker's time."""
    sent = [batch for run in plan.runs for batch in _sealed(plan, run)]
    return sorted(sent, key=lambda batch: (batch["appended_ms"], batch["run_id"], batch["seq"]))
