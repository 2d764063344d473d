"""The simulated site as a pure function of scenario, seed and start: tick by tick, the messages it would publish.

No clock and no broker here: the same scenario, start and saved state give the same bytes. `runner` paces it.
"""

from __future__ import annotations

import hashlib
import random
from collections import deque

import msgspec

from gpuledger.agents.messages import Message, event_message
from gpuledger.agents.simulator.facts import DAY_MS, capacity_facts, rate_facts, transfer_fact
from gpuledger.agents.simulator.fleet import Node, build_fleet
from gpuledger.agents.simulator.scenario import Failure, Scenario
from gpuledger.agents.simulator.scheduler import Scheduler
from gpuledger.schemas.events import Allocation, Event

__all__ = ["World", "WorldState", "pregenerate"]

_HOUR_MS = 3_600_000


class NodeState(msgspec.Struct, frozen=True):
    """What of a node outlives the simulator: its boot, and the counters in microjoules."""

    boot_id: str
    boot_start_ms: int
    energy_uj: int
    gpu_energy_uj: list[int]


class WorldState(msgspec.Struct, frozen=True):
    """What a later start on the same data needs; `open` are the allocations that ran at `last_ms`."""

    scenario: str
    seed: int
    born_ms: int
    last_ms: int
    nodes: dict[str, NodeState]
    open: list[Allocation]


class World:
    """A site from `start_ms` on. `now_ms` is the end of the last tick: no event so far is later than it.

    With a saved `state` of the same scenario it goes on: same GPUs, boots and counters, scenario times counted from
    the first start, new agent runs. Jobs do not outlive the simulator: what ran when it stopped ended then
    (`state.last_ms`), and the first tick says so.
    """

    def __init__(self, scenario: Scenario, start_ms: int, state: WorldState | None = None) -> None:
        if state is not None and (state.scenario, state.seed) != (scenario.name, scenario.seed):
            raise ValueError(f"the saved state is of scenario {state.scenario}, seed {state.seed}")
        start_ms -= start_ms % scenario.period_ms
        if state is not None:
            start_ms = max(start_ms, state.last_ms)
        self.scenario = scenario
        self.born_ms = start_ms if state is None else state.born_ms
        self.now_ms = start_ms
        self._start_ms = start_ms
        self._tick = 0
        self._hash = hashlib.sha256(msgspec.json.encode(scenario)).hexdigest()[:12]
        self._random = random.Random(f"{scenario.seed}/{start_ms}")
        self.fleet = build_fleet(scenario, start_ms, self.born_ms)
        self.nodes: list[Node] = [node for nodes in self.fleet.values() for node in nodes]
        self.scheduler = Scheduler(scenario, self.fleet, start_ms, self._random)
        self._late: deque[tuple[int, Message]] = deque()
        self._inherited: list[Allocation] = []
        if state is not None:
            self._restore(state)
            for change in scenario.reconfigurations:
                if self.born_ms + change.at_s * 1000 <= state.last_ms:
                    node = self.fleet[change.pool][change.node - 1]
                    node.recut(node.gpus[change.gpu], change.slices, self.born_ms + change.at_s * 1000)

    def _restore(self, state: WorldState) -> None:
        for node in self.nodes:
            saved = state.nodes.get(node.name)
            if saved is None or len(saved.gpu_energy_uj) != len(node.gpus):
                continue
            node.boot_id, node.boot_start_ms = saved.boot_id, saved.boot_start_ms
            node.energy_uj = saved.energy_uj
            for gpu, energy in zip(node.gpus, saved.gpu_energy_uj, strict=True):
                gpu.energy_uj = energy
            node.restore(state.last_ms)
        self._inherited = [
            msgspec.structs.replace(old, end_ms=state.last_ms, revision=state.last_ms + 1, claimed_at_ms=state.last_ms)
            for old in state.open
        ]

    def state(self) -> WorldState:
        """What to save so that a later start can go on from here."""
        return WorldState(
            scenario=self.scenario.name,
            seed=self.scenario.seed,
            born_ms=self.born_ms,
            last_ms=self.now_ms,
            nodes={
                node.name: NodeState(
                    node.boot_id, node.boot_start_ms, node.energy_uj, [gpu.energy_uj for gpu in node.gpus]
                )
                for node in self.nodes
            },
            open=[allocation for job in self.scheduler.running() for allocation in job.allocations()],
        )

    # -- a tick -----------------------------------------------------------------------------------------------------

    def tick(self) -> list[Message]:
        """The messages of the next period: facts and events at its beginning, then the batches that are flushed."""
        now = self.now_ms
        events: list[Event] = [*self._facts(now), *self._inherited, *self._failures(now), *self._reconfigurations(now)]
        self._inherited = []
        events += self.scheduler.advance(now, self.born_ms)
        messages = [event_message(event) for event in events]
        flush_every = self.scenario.flush_ms // self.scenario.period_ms
        for n, node in enumerate(self.nodes):
            if not node.up:
                continue
            node.sample(now)
            # Nodes flush by turns, as the jitter of real agents has it.
            if (self._tick + n) % flush_every == 0:
                batch = node.flush()
                if batch is not None:
                    messages += self._deliver(batch, now)
        while self._late and self._late[0][0] <= now:
            messages.append(self._late.popleft()[1])
        self._tick += 1
        self.now_ms = now + self.scenario.period_ms
        return messages

    def finish(self) -> list[Message]:
        """The batches not flushed yet, and those held back as late: nothing measured is lost by a clean stop."""
        batches = [node.flush() for node in self.nodes if node.up]
        messages = [batch for batch in batches if batch is not None] + [message for _, message in self._late]
        self._late.clear()
        return messages

    def _deliver(self, batch: Message, now: int) -> list[Message]:
        delivery = self.scenario.delivery
        if not delivery.late_permille and not delivery.duplicate_permille:
            return [batch]
        if self._random.randrange(1000) < delivery.late_permille:
            self._late.append((now + delivery.late_by_s * 1000, batch))
            return []
        return [batch, batch] if self._random.randrange(1000) < delivery.duplicate_permille else [batch]

    def _facts(self, now: int) -> list[Event]:
        """All facts at the start, then what changes: inventories hourly, tariffs twice a day, transfers in their time.

        What runs is told again hourly, as real agents do.
        """
        first = self._tick == 0
        period = self.scenario.period_ms

        def passed(every_ms: int) -> bool:
            return now // every_ms != (now - period) // every_ms

        events: list[Event] = []
        if first or passed(DAY_MS // 2):
            events += rate_facts(self.scenario, self.born_ms, now)
        if first:
            events += capacity_facts(self.scenario, self.born_ms, now)
        else:
            for n, plan in enumerate(self.scenario.transfers):
                if now - period < self.born_ms + plan.at_s * 1000 <= now:
                    events.append(transfer_fact(self.scenario, n, self.born_ms, now))
        if first or passed(_HOUR_MS):
            events += [node.inventory(now, self._hash) for node in self.nodes if node.up]
        if not first and passed(_HOUR_MS):
            events += [allocation for job in self.scheduler.running() for allocation in job.allocations()]
        return events

    def _failures(self, now: int) -> list[Event]:
        events: list[Event] = []
        offset = now - self.born_ms
        for failure in self.scenario.failures:
            begins, ends = failure.at_s * 1000, (failure.at_s + failure.for_s) * 1000
            node = self.fleet[failure.pool][failure.node - 1]
            if offset - self.scenario.period_ms < begins <= offset:
                events += self._break(failure, node, now)
            elif offset - self.scenario.period_ms < ends <= offset:
                events += self._repair(failure, node, now)
        return events

    def _reconfigurations(self, now: int) -> list[Event]:
        events: list[Event] = []
        for change in self.scenario.reconfigurations:
            at = self.born_ms + change.at_s * 1000
            if now - self.scenario.period_ms < at <= now:
                node = self.fleet[change.pool][change.node - 1]
                gpu = node.gpus[change.gpu]
                events += self.scheduler.fail([gpu], now)
                node.recut(gpu, change.slices, now)
                events.append(node.inventory(now, self._hash))
        return events

    def _break(self, failure: Failure, node: Node, now: int) -> list[Event]:
        match failure.kind:
            case "node_reboot":
                events = self.scheduler.fail(node.gpus, now)
                node.stop()
                return events
            case "gpu_lost":
                gpu = node.gpus[failure.gpu]
                if gpu.lost:
                    return []
                return [*self.scheduler.lose(node, gpu, now), node.inventory(now, self._hash)]
            case "agent_gap":
                node.agent_up = False
                return []

    def _repair(self, failure: Failure, node: Node, now: int) -> list[Event]:
        match failure.kind:
            case "node_reboot" if not node.up:
                node.reboot(now)
                return [node.inventory(now, self._hash)]
            case "gpu_lost" if node.gpus[failure.gpu].lost:
                self.scheduler.regain(node, node.gpus[failure.gpu])
                return [node.inventory(now, self._hash)]
            case "agent_gap" if not node.agent_up:
                node.begin_run(now)
                return [node.inventory(now, self._hash)]
            case _:
                return []


def pregenerate(scenario: Scenario, start_ms: int, ticks: int) -> list[list[Message]]:
    """The messages of the first `ticks` periods, one list per period: load for fleets larger than one core makes."""
    world = World(scenario, start_ms)
    return [world.tick() for _ in range(ticks)]
