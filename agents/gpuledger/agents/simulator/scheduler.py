"""A first-fit scheduler over the simulated fleet that respects who holds which capacity.

A tenant runs within what it has committed; a tenant that wants more, or has committed nothing, uses what nobody
reserved. When a transfer takes capacity away, the newest jobs of the giver end until it fits again.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from gpuledger.agents.simulator.facts import entitlements
from gpuledger.agents.simulator.fleet import Gpu, Node
from gpuledger.agents.simulator.jobs import JobAsk, RunningJob, Slot, draw_job
from gpuledger.agents.simulator.scenario import UNITS_PER_GPU, UNITS_PER_SLICE, Demand, Scenario, TenantPlan
from gpuledger.schemas.events import Event

__all__ = ["Scheduler"]

#: A GPU, or an instance of it.
Place = tuple[Node, Gpu, Slot | None]


@dataclass(slots=True)
class _Client:
    """One tenant's wish for one pool, and what runs for it there."""

    tenant: TenantPlan
    demand: Demand
    phase: float
    next_arrival_ms: int | None = None
    waiting: deque[JobAsk] = field(default_factory=deque[JobAsk])
    running: dict[str, RunningJob] = field(default_factory=dict[str, RunningJob])
    held_units: int = 0


class Scheduler:
    """Starts and ends jobs; every method returns the events of what it did, in order."""

    def __init__(self, scenario: Scenario, fleet: dict[str, list[Node]], start_ms: int, rng: random.Random) -> None:
        self._scenario = scenario
        self._fleet = fleet
        self._nodes = {node.name: node for nodes in fleet.values() for node in nodes}
        self._random = rng
        self._base = f"{scenario.name}-{_base36(start_ms // 1000)}"
        self._number = 0
        self._ends: list[tuple[int, int, _Client, RunningJob]] = []
        self.clients = [
            _Client(tenant, demand, rng.random() * 2 * math.pi)
            for tenant in scenario.tenants
            for demand in tenant.demand
        ]

    def running(self) -> Iterator[RunningJob]:
        """Every job that runs, in the order of tenants and of starts."""
        for client in self.clients:
            yield from client.running.values()

    # -- ending -----------------------------------------------------------------------------------------------------

    def _end(self, client: _Client, job: RunningJob, end_ms: int, state: str) -> list[Event]:
        del client.running[job.id]
        client.held_units -= job.units_each * len(job.places)
        for name in dict.fromkeys(name for name, _, _ in job.places):
            node = self._nodes[name]
            for gpu in node.gpus:
                if any(held is job for held, _ in gpu.jobs):
                    self._release(node, gpu, job)
        return [*job.allocations(end_ms), job.event(end_ms, state)]

    def _release(self, node: Node, gpu: Gpu, job: RunningJob) -> None:
        gpu.jobs = [(held, units) for held, units in gpu.jobs if held is not job]
        if job.slot is not None:
            job.slot.job = None
            return
        gpu.free_units += job.units_each
        if gpu.free_units == UNITS_PER_GPU:
            gpu.slot_units = 0
            if not gpu.lost:
                node.free_gpus += 1

    def fail(self, gpus: list[Gpu], now_ms: int) -> list[Event]:
        """The jobs on these GPUs end, everywhere they ran."""
        events: list[Event] = []
        for client in self.clients:
            for job in list(client.running.values()):
                if any(held is job for gpu in gpus for held, _ in gpu.jobs):
                    events += self._end(client, job, now_ms, "NODE_FAIL")
        return events

    def lose(self, node: Node, gpu: Gpu, now_ms: int) -> list[Event]:
        """The GPU falls off the bus: its jobs end and none starts on it."""
        events = self.fail([gpu], now_ms)
        gpu.lost = True
        node.free_gpus -= not gpu.in_mig_mode
        return events

    def regain(self, node: Node, gpu: Gpu) -> None:
        """The GPU is back, empty."""
        gpu.lost = False
        node.free_gpus += not gpu.in_mig_mode

    # -- a tick -----------------------------------------------------------------------------------------------------

    def advance(self, now_ms: int, start_ms: int) -> list[Event]:
        """Ends what is due at `now_ms`, gives back what was transferred away, starts what is wanted and fits."""
        events: list[Event] = []
        while self._ends and self._ends[0][0] <= now_ms:
            end_ms, _, client, job = heapq.heappop(self._ends)
            if job.id in client.running:
                events += self._end(client, job, end_ms, "COMPLETED")
        held = entitlements(self._scenario, now_ms - start_ms)
        for client in self.clients:
            events += self._shrink(client, self._limit_units(client, held), now_ms)
        for client in self.clients:
            events += self._grow(client, held, now_ms)
        return events

    def _limit_units(self, client: _Client, held: dict[tuple[str, str], int]) -> int:
        """The most the client may hold: what is committed to it, or more where nobody reserved the rest."""
        pool = client.demand.pool
        own = held.get((pool, client.tenant.id), 0) * UNITS_PER_GPU
        if client.demand.share_pct is not None:
            return own
        reserved = 0
        for other in self.clients:
            if other.demand.pool == pool:
                theirs = held.get((pool, other.tenant.id), 0) * UNITS_PER_GPU
                reserved += theirs if other is client else max(theirs, other.held_units)
        return max(own, own + self._scenario.pool(pool).gpus * UNITS_PER_GPU - reserved)

    def _shrink(self, client: _Client, limit: int, now_ms: int) -> list[Event]:
        events: list[Event] = []
        while client.held_units > limit and client.running:
            newest = next(reversed(client.running.values()))
            events += self._end(client, newest, now_ms, "PREEMPTED")
        return events

    def _wanted_units(self, client: _Client, held: dict[tuple[str, str], int], now_ms: int) -> int:
        demand = client.demand
        if demand.share_pct is not None:
            base = held.get((demand.pool, client.tenant.id), 0) * demand.share_pct / 100
        else:
            base = demand.gpus or 0
        angle = 2 * math.pi * now_ms / (demand.swing_period_s * 1000) + client.phase
        wish = int(base * (1 + demand.swing_pct / 100 * math.sin(angle)) * UNITS_PER_GPU)
        return min(wish, self._limit_units(client, held))

    def _grow(self, client: _Client, held: dict[tuple[str, str], int], now_ms: int) -> list[Event]:
        room = self._wanted_units(client, held, now_ms) - client.held_units
        pace = client.demand.ramp_gpus_per_s * UNITS_PER_GPU * self._scenario.period_ms // 1000
        if client.tenant.jobs.arrivals_per_hour is not None:
            self._arrive(client, client.tenant.jobs.arrivals_per_hour, now_ms)
        events: list[Event] = []
        sizes = list(client.tenant.jobs.sizes)
        while room > 0 and pace > 0:
            if client.tenant.jobs.arrivals_per_hour is not None:
                ask = client.waiting[0] if client.waiting and client.waiting[0].units <= room else None
            else:
                sizes = [size for size in sizes if size.units() <= room]
                ask = draw_job(client.tenant.jobs, sizes, now_ms, self._random) if sizes else None
            if ask is None:
                break
            places = self._place(client.demand.pool, ask.units)
            if places is None:
                if client.waiting:
                    break
                sizes = [size for size in sizes if size.units() < ask.units]
                continue
            if client.waiting:
                client.waiting.popleft()
            events += self._start(client, ask, places, now_ms)
            room -= ask.units
            pace -= ask.units
        return events

    def _arrive(self, client: _Client, per_hour: int, now_ms: int) -> None:
        """Jobs that came since the last tick, at exponential intervals, join the queue."""
        if client.next_arrival_ms is None:
            client.next_arrival_ms = now_ms
        while client.next_arrival_ms <= now_ms:
            mix = client.tenant.jobs
            client.waiting.append(draw_job(mix, mix.sizes, client.next_arrival_ms, self._random))
            client.next_arrival_ms += 1 + int(self._random.expovariate(per_hour / 3_600_000))

    def _start(self, client: _Client, ask: JobAsk, places: list[Place], now_ms: int) -> list[Event]:
        self._number += 1
        slot = places[0][2]
        account = client.tenant.accounts[self._number % len(client.tenant.accounts)]
        job = RunningJob(
            id=f"{self._base}-{self._number}",
            tenant=client.tenant,
            pool=client.demand.pool,
            account=account,
            user=f"{client.tenant.id}-u{1 + self._random.randrange(6)}",
            ask=ask,
            units_each=min(ask.units, UNITS_PER_GPU) if slot is None else slot.slices * UNITS_PER_SLICE,
            start_ms=now_ms,
            places=[(node.name, node.boot_id, gpu.uuid) for node, gpu, _ in places],
            slot=slot,
        )
        for node, gpu, _ in places:
            if slot is not None:
                slot.job = job
                gpu.jobs.append((job, job.units_each))
                continue
            if gpu.free_units == UNITS_PER_GPU:
                node.free_gpus -= 1
                gpu.slot_units = job.units_each
            gpu.free_units -= job.units_each
            gpu.jobs.append((job, job.units_each))
        client.running[job.id] = job
        client.held_units += job.units_each * len(places)
        heapq.heappush(self._ends, (job.ends_ms, self._number, client, job))
        return [job.event(), *job.allocations()]

    # -- first fit --------------------------------------------------------------------------------------------------

    def _place(self, pool: str, units: int) -> list[Place] | None:
        """The first GPUs that fit: part of one GPU, GPUs of one node, or whole nodes and a rest; None: no room."""
        nodes = [node for node in self._fleet[pool] if node.up]
        if units < UNITS_PER_GPU:
            return self._place_part(nodes, units)
        gpus = units // UNITS_PER_GPU
        places: list[Place] = []
        for node in nodes:
            size = len(node.gpus)
            if gpus >= size and node.free_gpus == size:
                places += [(node, gpu, None) for gpu in node.gpus]
                gpus -= size
            if gpus < size:
                break
        if gpus == 0:
            return places
        taken = {node.name for node, _, _ in places}
        for node in nodes:
            if gpus <= node.free_gpus and node.name not in taken:
                free = [gpu for gpu in node.gpus if gpu.free_units == UNITS_PER_GPU and not gpu.lost]
                return places + [(node, gpu, None) for gpu in free[:gpus]]
        return None

    def _place_part(self, nodes: list[Node], units: int) -> list[Place] | None:
        """The first MIG instance that is large enough; a part of a GPU already shared in such parts, else of the first
        free one."""
        free: Place | None = None
        for node in nodes:
            for gpu in node.gpus:
                if gpu.lost:
                    continue
                for slot in gpu.slots:
                    if slot.job is None and slot.slices * UNITS_PER_SLICE >= units:
                        return [(node, gpu, slot)]
                if gpu.slot_units == units and gpu.free_units >= units:
                    return [(node, gpu, None)]
                if free is None and gpu.free_units == UNITS_PER_GPU:
                    free = (node, gpu, None)
        return None if free is None else [free]


def _base36(number: int) -> str:
    digits = ""
    while number:
        number, digit = divmod(number, 36)
        digits = "0123456789abcdefghijklmnopqrstuvwxyz"[digit] + digits
    return digits or "0"
