"""The simulated site obeys the laws a real one obeys, and is the same site every time."""

from __future__ import annotations

import asyncio
import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pytest

from gpuledger.agents.exceptions import BrokerUnavailable, ScenarioError
from gpuledger.agents.messages import Message
from gpuledger.agents.simulator.facts import entitlements
from gpuledger.agents.simulator.runner import Progress, load_state, run_simulation, save_state
from gpuledger.agents.simulator.scenario import Scenario, demo_scenario_path, load_scenario, parse_scenario
from gpuledger.agents.simulator.world import World, pregenerate
from gpuledger.schemas.events import (
    Allocation,
    AssetCost,
    EnergyTariff,
    Inventory,
    Placement,
    Tenant,
    Transfer,
    decode_event,
)
from gpuledger.schemas.telemetry import COLUMN_NAMES, BatchHeader, DownCause, decode_header
from gpuledger.schemas.topics import TOPICS

START = 1_790_000_000_000
SCENARIO = """
name: small
seed: 5
period_ms: 1000
flush_ms: 4000
sites: [{name: oslo, country: "NO", pue: 1.1}]
pools:
  - {name: h100, site: oslo, model: H100, nodes: 12, gpus_per_node: 4, tdp_w: 700, idle_w: 70}
  - {name: l4, site: oslo, model: L4, nodes: 2, gpus_per_node: 2, tdp_w: 72, idle_w: 12, memory_gib: 24}
tenants:
  - id: big
    accounts: [big-one, big-two]
    demand: [{pool: h100, share_pct: 70, ramp_gpus_per_s: 8}]
    jobs:
      sizes: [{gpus: 8}, {gpus: 4}, {gpus: 1}]
      shortest_s: 20
      longest_s: 90
      duties: [{name: train, active_s: 10, idle_s: 2}, {name: nothing, level_pct: 0}]
  - id: grower
    accounts: [grow]
    demand: [{pool: h100, share_pct: 100, swing_pct: 0}]
    jobs:
      sizes: [{gpus: 2}, {gpus: 1}]
      shortest_s: 15
      longest_s: 60
      duties: [{name: serve, active_s: 3, idle_s: 3}]
  - id: small
    accounts: [tiny]
    demand: [{pool: h100, gpus: 6}, {pool: l4, gpus: 3}]
    jobs:
      sizes: [{gpus: 1/4, weight: 3}, {gpus: 1/2}, {gpus: 1}]
      shortest_s: 5
      longest_s: 40
      arrivals_per_hour: 3600
      duties: [{name: notebook, active_s: 2, idle_s: 5, level_pct: 40}]
commitments:
  - {pool: h100, tenant: big, gpus: 36}
  - {pool: h100, tenant: grower, gpus: 6}
transfers:
  - {pool: h100, gpus: 20, from_tenant: big, to_tenant: grower, at_s: 60, by: desk, why: contract}
failures:
  - {kind: gpu_lost, pool: h100, node: 1, gpu: 2, at_s: 30, for_s: 40}
  - {kind: node_reboot, pool: h100, node: 2, at_s: 45, for_s: 20}
  - {kind: agent_gap, pool: h100, node: 3, at_s: 50, for_s: 15}
delivery: {late_permille: 50, late_by_s: 7, duplicate_permille: 50}
tariffs: [{name: spot, currency: NOK, per_kwh: 0.5, step_minutes: 3}]
asset_costs: [{pool: h100, currency: NOK, period_cost: 100000.00, tariff: spot}]
rate_cards: [{pool: h100, currency: NOK, per_gpu_hour: 25}]
"""


@pytest.fixture(scope="module")
def scenario() -> Scenario:
    return parse_scenario(SCENARIO, "small.yaml")


@pytest.fixture(scope="module")
def messages(scenario: Scenario) -> list[Message]:
    """150 seconds of the site, to its clean end."""
    world = World(scenario, START)
    out = [message for _ in range(150) for message in world.tick()]
    return out + world.finish()


def _events(messages: Iterable[Message], kind: type[Any]) -> list[Any]:
    decoded = [decode_event(message.value) for message in messages if message.topic != "telemetry"]
    return [event for event in decoded if isinstance(event, kind)]


def _facts(events: Iterable[Any]) -> dict[str, Any]:
    """The greatest revision of each id."""
    facts: dict[str, Any] = {}
    for event in events:
        if event.id not in facts or event.revision > facts[event.id].revision:
            facts[event.id] = event
    return facts


def _batches(messages: Iterable[Message]) -> list[tuple[BatchHeader, list[dict[str, Any]]]]:
    """Every batch once, in the order of runs and numbers."""
    found: dict[tuple[str, int, str, int], tuple[BatchHeader, bytes]] = {}
    for message in messages:
        if message.topic == "telemetry":
            header = decode_header(message.headers[0][1])
            key = (header.node, header.run_start_ms, header.run_id, header.seq)
            assert found.get(key, (header, message.value)) == (header, message.value), "a number used twice"
            found[key] = (header, message.value)
    return [(header, pa.ipc.open_stream(value).read_all().to_pylist()) for _, (header, value) in sorted(found.items())]


# -- sameness ----------------------------------------------------------------------------------------------------------


def test_same_seed_scenario_and_start_give_the_same_bytes(scenario: Scenario, messages: list[Message]) -> None:
    again = [message for tick in pregenerate(scenario, START, 150) for message in tick]
    assert again == messages[: len(again)]
    assert len(messages) - len(again) < 30


def test_another_seed_gives_other_gpus_and_other_jobs(scenario: Scenario) -> None:
    other = msgspec.structs.replace(scenario, seed=6)
    gpus = [
        {gpu.uuid for node in World(which, START).nodes for gpu in node.gpus} for which in (scenario, other, scenario)
    ]
    assert gpus[0] == gpus[2]
    assert not gpus[0] & gpus[1]


def test_every_message_is_of_its_topic_with_its_key(messages: list[Message]) -> None:
    seen: set[str] = set()
    for message in messages:
        seen.add(message.topic)
        if message.topic != "telemetry":
            event = decode_event(message.value)
            assert event.kind in TOPICS[message.topic].types
            if message.topic in ("allocations", "inventory"):
                assert isinstance(event, Allocation | Inventory)
                assert message.key == event.node
    assert seen == {"telemetry", "allocations", "inventory", "jobs", "capacity", "rates"}


# -- telemetry ---------------------------------------------------------------------------------------------------------


def test_the_energy_counter_is_the_exact_integral_of_power(messages: list[Message]) -> None:
    """E(b) - E(a) is the sum of power x time to the millijoule, in every run, and never falls within a boot."""
    last: dict[str, tuple[str, int]] = {}
    checked = 0
    for header, rows in _batches(messages):
        integral: dict[int, tuple[int, int, int]] = {}  # device → (first counter, microjoules since, last time)
        for row in rows:
            gpu, energy = header.devices[row["device"]].gpu, row["energy_mj"]
            if energy is None:
                integral.pop(row["device"], None)
                continue
            boot, before = last.get(gpu, (header.boot_id, 0))
            assert boot != header.boot_id or energy >= before
            last[gpu] = (header.boot_id, energy)
            if row["device"] in integral:
                first, added, ts_ms = integral[row["device"]]
                added += row["power_mw"] * (row["ts_ms"] - ts_ms)
                # The counter is floored to millijoules at both ends.
                assert abs(energy - first - added // 1000) <= 1
                integral[row["device"]] = (first, added, row["ts_ms"])
                checked += 1
            else:
                integral[row["device"]] = (energy, 0, row["ts_ms"])
    assert checked > 4000


def test_batches_of_a_run_are_numbered_without_gaps_and_carry_the_last_sample_on(messages: list[Message]) -> None:
    previous: dict[str, tuple[int, list[tuple[int | None, int | None]]]] = {}
    starts = 0
    for header, rows in _batches(messages):
        told = [(device.previous_ts_ms, device.previous_energy_mj) for device in header.devices]
        if header.run_id in previous:
            seq, expected = previous[header.run_id]
            assert header.seq == seq + 1
            assert told == expected
        else:
            starts += 1
            assert header.seq == 0
            assert told == [(None, None)] * len(header.devices)
        last = {row["device"]: (row["ts_ms"], row["energy_mj"]) for row in rows}
        previous[header.run_id] = (header.seq, [last[n] for n in range(len(header.devices))])
    # One run per node, and one more after the reboot and after the agent's gap.
    assert starts == 14 + 2


def test_the_rows_know_what_the_simulator_knows_and_nothing_else(messages: list[Message]) -> None:
    known: set[str] = set()
    for _, rows in _batches(messages):
        for row in rows:
            if row["down_cause"] is not None:
                assert [name for name in COLUMN_NAMES if row[name] is not None] == ["ts_ms", "device", "down_cause"]
                assert row["down_cause"] == DownCause.LOST
            known |= {name for name in COLUMN_NAMES if row[name] is not None}
    assert {"sm_active", "gpu_util_pct", "tensor_active", "dram_active", "memory_used_bytes", "energy_mj"} <= known
    assert {"xid_last", "nvlink_tx_kib", "throttle_power_ns"} & known == set()


def test_failures_leave_the_holes_they_say(messages: list[Message]) -> None:
    times: dict[str, list[int]] = defaultdict(list)
    boots: dict[str, set[str]] = defaultdict(set)
    lost: set[int] = set()
    for header, rows in _batches(messages):
        boots[header.node].add(header.boot_id)
        times[header.node] += [row["ts_ms"] for row in rows if row["device"] == 0]
        lost |= {row["ts_ms"] for row in rows if row["down_cause"] is not None}
    assert {node: len(ids) for node, ids in boots.items() if len(ids) > 1} == {"h100-0002": 2}
    assert (min(lost) - START) // 1000 == 30
    assert (max(lost) - START) // 1000 == 69
    for node, hole_ms in (("h100-0002", 20_000), ("h100-0003", 15_000), ("h100-0004", 0)):
        steps = {b - a for a, b in itertools.pairwise(times[node])}
        assert max(steps) - 1000 >= hole_ms if hole_ms else steps == {1000}


def test_some_batches_come_late_and_some_twice(messages: list[Message]) -> None:
    telemetry = [message for message in messages if message.topic == "telemetry"]
    assert len({(m.key, m.headers[0][1]) for m in telemetry}) < len(telemetry)
    order = [(m.key, decode_header(m.headers[0][1])) for m in telemetry]
    last: dict[str, int] = {}
    late = 0
    for _, header in order:
        late += header.seq < last.get(header.run_id, -1)
        last[header.run_id] = max(header.seq, last.get(header.run_id, -1))
    assert late > 0


# -- who holds what ----------------------------------------------------------------------------------------------------


def _weight(allocation: Allocation) -> Fraction:
    return Fraction(allocation.weight_num, allocation.weight_den)


def test_no_gpu_is_ever_given_away_more_than_once(messages: list[Message]) -> None:
    held: dict[str, list[tuple[int, int, Fraction]]] = defaultdict(list)
    shared = 0
    for fact in _facts(_events(messages, Allocation)).values():
        shared += _weight(fact) < 1
        end_ms = fact.end_ms if fact.end_ms is not None else START + 10**9
        held[fact.gpu].append((fact.start_ms, end_ms, _weight(fact)))
    assert shared > 10
    for spans in held.values():
        for start_ms, _, _ in spans:
            assert sum(weight for begin, end, weight in spans if begin <= start_ms < end) <= 1


def test_allocations_lie_within_the_placement_of_their_gpu_on_their_node(messages: list[Message]) -> None:
    placements: dict[str, Placement] = {}
    for inventory in _events(messages, Inventory):
        for placement in inventory.placements:
            assert placements.setdefault(placement.gpu, placement) == placement
    assert len(placements) == 52
    for allocation in _facts(_events(messages, Allocation)).values():
        placement = placements[allocation.gpu]
        assert (placement.node, placement.end_ms) == (allocation.node, None)
        assert placement.start_ms <= allocation.start_ms


def test_nothing_runs_on_what_is_broken(messages: list[Message]) -> None:
    for allocation in _facts(_events(messages, Allocation)).values():
        if allocation.node == "h100-0002":
            end_ms = allocation.end_ms or START + 10**9
            assert end_ms <= START + 45_000 or allocation.start_ms >= START + 65_000


def test_running_ids_are_the_allocations_that_run_on_the_node(messages: list[Message]) -> None:
    facts = _facts(_events(messages, Allocation))
    named = 0
    for header, rows in _batches(messages):
        ts_ms = max(row["ts_ms"] for row in rows)
        tick_ms = ts_ms - (ts_ms - START) % 1000
        expected = sorted(
            fact.id
            for fact in facts.values()
            if fact.node == header.node and fact.start_ms <= tick_ms and (fact.end_ms is None or fact.end_ms > tick_ms)
        )
        # After a failure of its agent a node may flush rows measured before: compare where the times agree.
        if header.node not in ("h100-0002", "h100-0003"):
            assert header.running == expected
            named += len(expected)
    assert named > 200


def _held(facts: dict[str, Allocation], accounts: Sequence[str], pool: str, ts_ms: int) -> Fraction:
    return sum(
        (
            _weight(fact)
            for fact in facts.values()
            if fact.account in accounts
            and fact.node.startswith(pool)
            and fact.start_ms <= ts_ms
            and (fact.end_ms is None or fact.end_ms > ts_ms)
        ),
        Fraction(0),
    )


def test_committed_tenants_stay_within_what_they_hold_and_the_receiver_grows(
    scenario: Scenario, messages: list[Message]
) -> None:
    facts = _facts(_events(messages, Allocation))
    for second in range(0, 150, 3):
        limits = entitlements(scenario, second * 1000)
        at_ms = START + second * 1000
        for tenant in ("big", "grower"):
            accounts = next(plan.accounts for plan in scenario.tenants if plan.id == tenant)
            assert _held(facts, accounts, "h100", at_ms) <= limits["h100", tenant]
        assert sum(_held(facts, plan.accounts, "h100", at_ms) for plan in scenario.tenants) <= 48
    # A big tenant leaves part of its reservation idle; the receiver uses what it is given.
    assert 0 < _held(facts, ["big-one", "big-two"], "h100", START + 55_000) < 30
    assert _held(facts, ["grow"], "h100", START + 59_000) <= 6
    assert _held(facts, ["grow"], "h100", START + 110_000) >= 20


def test_the_transfer_is_announced_and_then_takes_effect(messages: list[Message]) -> None:
    transfers = _events(messages, Transfer)
    assert [(one.state, one.start_ms - START) for one in transfers] == [("planned", 60_000), ("active", 60_000)]
    assert transfers[1].revision > transfers[0].revision
    assert (transfers[1].by, transfers[1].why) == ("desk", "contract")


def test_rates_cover_the_present_and_the_price_moves(messages: list[Message]) -> None:
    (tariff,) = _events(messages, EnergyTariff)
    now = [point for point in tariff.prices if START - 1_800_000 <= point.start_ms <= START + 1_800_000]
    assert len({point.per_kwh for point in now}) > 5
    assert {b.start_ms - a.start_ms for a, b in itertools.pairwise(now)} == {180_000}
    assert tariff.end_ms > START + 86_400_000
    costs = _events(messages, AssetCost)
    assert costs[0].start_ms <= START
    assert [tenant.id for tenant in _events(messages, Tenant)] == ["big", "grower", "small"]


def test_the_tariff_grows_by_revisions_that_change_no_earlier_price(scenario: Scenario) -> None:
    slow = msgspec.structs.replace(scenario, period_ms=60_000, flush_ms=60_000, failures=[])
    world = World(slow, START)
    found = [message for _ in range(1500) for message in world.tick() if message.topic == "rates"]
    tariffs = _events(found, EnergyTariff)
    assert len(tariffs) > 2
    for before, after in itertools.pairwise(tariffs):
        assert after.revision > before.revision
        assert after.prices[: len(before.prices)] == before.prices


# -- going on ----------------------------------------------------------------------------------------------------------


def test_a_later_start_on_the_same_data_goes_on(scenario: Scenario) -> None:
    first = World(scenario, START)
    before = [message for _ in range(100) for message in first.tick()] + first.finish()
    state = msgspec.json.decode(msgspec.json.encode(first.state()), type=type(first.state()))
    second = World(scenario, START + 400_000, state)
    after = [message for _ in range(20) for message in second.tick()]

    open_before = {i: f for i, f in _facts(_events(before, Allocation)).items() if f.end_ms is None}
    facts = _facts([*_events(before, Allocation), *_events(after, Allocation)])
    assert len(open_before) > 10
    assert {facts[one].end_ms for one in open_before} == {START + 100_000}
    assert not {fact.id for fact in open_before.values()} & {
        fact.id for fact in facts.values() if fact.start_ms >= START + 400_000
    }

    energy: dict[str, int] = {}
    boots: dict[str, str] = {}
    runs: dict[str, set[str]] = {}
    for part in (before, after):
        for header, rows in _batches(part):
            runs.setdefault(header.node, set()).add(header.run_id)
            if part is after:
                assert boots[header.node] == header.boot_id
                assert header.run_start_ms == START + 400_000
            boots[header.node] = header.boot_id
            for row in rows:
                gpu = header.devices[row["device"]].gpu
                if row["energy_mj"] is not None and header.node != "h100-0002":
                    assert row["energy_mj"] >= energy.get(gpu, 0)
                    energy[gpu] = row["energy_mj"]
    assert all(len(ids) >= 2 for ids in runs.values())

    inventories = _events([*before, *after], Inventory)
    assert len({p.start_ms for i in inventories for p in i.placements}) == 1
    assert {fact.id: fact for fact in _events(after, AssetCost)} == {
        fact.id: fact for fact in _events(before, AssetCost)
    }
    assert [one.state for one in _events(after, Transfer)] == ["active"]


class _Sink:
    def __init__(self, failures: int = 0) -> None:
        self.messages: list[Message] = []
        self.failures = failures

    async def publish_many(self, messages: Sequence[Message]) -> None:
        if self.failures:
            self.failures -= 1
            raise BrokerUnavailable("away")
        self.messages += messages


class _Clock:
    """Wall time that moves a little with every look at it, and by pauses."""

    def __init__(self, step_ms: int) -> None:
        self.now = START + 777
        self.step_ms = step_ms

    def wall_ms(self) -> int:
        self.now += self.step_ms
        return self.now

    def boottime_ms(self) -> int:
        return self.now

    async def pause(self, stop: asyncio.Event, seconds: float) -> None:
        self.now += max(1, int(seconds * 1000))


async def _run(scenario: Scenario, sink: _Sink, clock: _Clock, for_ms: int, state: Path | None) -> list[Progress]:
    progress: list[Progress] = []
    await run_simulation(
        scenario,
        sink,
        asyncio.Event(),
        state_path=state,
        for_ms=for_ms,
        clock=clock,
        pause=clock.pause,
        on_progress=progress.append,
    )
    return progress


def test_event_time_never_passes_wall_time(scenario: Scenario) -> None:
    fast = msgspec.structs.replace(scenario, speed=100, start_back_s=300, tenants=[], commitments=[], transfers=[])
    clock = _Clock(step_ms=1)
    seen: list[int] = []

    class Checked(_Sink):
        async def publish_many(self, messages: Sequence[Message]) -> None:
            for message in messages:
                if message.topic == "telemetry":
                    header = decode_header(message.headers[0][1])
                    assert header.host is not None
                    assert header.host.ts_ms <= clock.now
                    seen.append(header.host.ts_ms)

    asyncio.run(_run(fast, Checked(), clock, 8_000, None))
    # It began 300 s back and caught up with the wall clock.
    assert min(seen) < START - 290_000
    assert max(seen) > START


def test_a_broker_that_is_away_is_waited_for_and_nothing_is_left_out(scenario: Scenario) -> None:
    away, there = _Sink(failures=1), _Sink()
    asyncio.run(_run(scenario, away, _Clock(1), 5_000, None))
    asyncio.run(_run(scenario, there, _Clock(1), 5_000, None))
    assert away.messages == there.messages
    assert len(there.messages) > 50


def test_the_saved_state_is_of_one_site(scenario: Scenario, tmp_path: Path) -> None:
    path = tmp_path / "simulator.json"
    assert load_state(path, scenario) is None
    asyncio.run(_run(scenario, _Sink(), _Clock(1), 5_000, path))
    state = load_state(path, scenario)
    assert state is not None
    assert state.open
    with pytest.raises(ScenarioError, match="seed 5, not small, seed 6"):
        load_state(path, msgspec.structs.replace(scenario, seed=6))
    save_state(path, state)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ScenarioError, match="cannot be read"):
        load_state(path, scenario)


def test_the_demo_leaves_reserved_capacity_idle_and_shifts_half_the_site() -> None:
    demo = load_scenario(demo_scenario_path())
    world = World(demo, START)
    shown: dict[int, dict[str, float]] = {}
    for second in range(170):
        world.tick()
        if second in (95, 165):
            shown[second] = {
                client.tenant.id: client.held_units / 840
                for client in world.scheduler.clients
                if client.demand.pool == "narvik-h100"
            }
    assert 380 < shown[95]["aurora-ai"] < 520  # of 720
    assert shown[165]["aurora-ai"] <= 220
    assert shown[165]["fjord-labs"] > shown[95]["fjord-labs"] + 250
