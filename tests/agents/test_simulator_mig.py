"""Simulated GPUs in MIG mode: jobs on instances, a GPU cut anew, batches that the contract accepts."""

from __future__ import annotations

from itertools import pairwise

import pytest

from gpuledger.agents.exceptions import ScenarioError
from gpuledger.agents.messages import Message
from gpuledger.agents.simulator.scenario import parse_scenario
from gpuledger.agents.simulator.world import World
from gpuledger.schemas.events import Allocation, Geometry, Inventory, decode_event
from gpuledger.streams.blocks import Record
from gpuledger.streams.decode import TelemetryBlock, decode_block

START = 1_790_000_000_000
CUT_S = 22
SCENARIO = """
name: sliced
seed: 3
period_ms: 1000
flush_ms: 5000
sites: [{name: oslo}]
pools: [{name: mig, site: oslo, model: H100, nodes: 2, gpus_per_node: 2, mig: [2, 3, 1]}]
tenants:
  - id: campus
    accounts: [physics]
    demand: [{pool: mig, gpus: 4, swing_pct: 0}]
    jobs:
      sizes: [{gpus: 1/8}, {gpus: 1/4}, {gpus: 1/2}, {gpus: 1}]
      shortest_s: 5
      longest_s: 20
      duties: [{name: notebook, active_s: 2, idle_s: 3, level_pct: 40}]
reconfigurations: [{pool: mig, node: 1, gpu: 1, at_s: 22, slices: [4]}]
"""


@pytest.fixture(scope="module")
def messages() -> list[Message]:
    world = World(parse_scenario(SCENARIO, "sliced.yaml"), START)
    return [message for _ in range(60) for message in world.tick()] + world.finish()


def block(messages: list[Message]) -> TelemetryBlock:
    batches = [message for message in messages if message.topic == "telemetry"]
    records = [
        Record("telemetry", 0, n, START + 3_600_000, b"n", message.value, tuple(message.headers))
        for n, message in enumerate(batches)
    ]
    return decode_block(records)


def events(messages: list[Message]) -> list[object]:
    return [decode_event(message.value) for message in messages if message.topic != "telemetry"]


def geometries(messages: list[Message]) -> dict[str, Geometry]:
    return {g.id: g for event in events(messages) if isinstance(event, Inventory) for g in event.geometries}


def test_every_gpu_is_cut_and_one_is_cut_anew(messages: list[Message]) -> None:
    found = sorted(geometries(messages).values(), key=lambda g: g.start_ms)
    assert [[i.slices for i in g.instances] for g in found] == [[1, 2, 3]] * 4 + [[4]]
    assert [g.start_ms for g in found] == [START] * 4 + [START + CUT_S * 1000]
    assert {i.profile for i in found[0].instances} == {"1g.10gb", "2g.20gb", "3g.30gb"}


def test_batches_are_accepted_and_one_holds_both_instances_of_a_number(messages: list[Message]) -> None:
    decoded = block(messages)
    assert not decoded.rejected
    epochs = [{(d.gpu, d.instance): 0 for d in header.devices} for header in decoded.headers]
    assert any(len(names) < len(header.devices) for names, header in zip(epochs, decoded.headers, strict=True))


def test_instances_have_no_energy_and_whole_gpus_no_utilisation(messages: list[Message]) -> None:
    decoded = block(messages)
    rows = decoded.columns.to_pylist()
    devices = [decoded.headers[m].devices[row["device"]] for m, row in zip(decoded.message, rows, strict=True)]
    whole = [row for row, device in zip(rows, devices, strict=True) if device.instance == 0]
    parts = [row for row, device in zip(rows, devices, strict=True) if device.instance]
    assert whole
    assert parts
    assert all(row["gpu_util_pct"] is None and row["sm_active"] is None and row["energy_mj"] for row in whole)
    assert all(row["energy_mj"] is None and row["power_mw"] is None for row in parts)
    assert {round(row["sm_active"], 6) for row in parts} == {0.0, 0.4}


def test_jobs_hold_one_instance_each_and_never_one_that_is_gone(messages: list[Message]) -> None:
    sizes = {(g.gpu, i.instance, i.epoch_ms): i.slices for g in geometries(messages).values() for i in g.instances}
    allocations: dict[str, Allocation] = {}
    for event in events(messages):
        if isinstance(event, Allocation) and event.revision >= getattr(allocations.get(event.id), "revision", 0):
            allocations[event.id] = event
    held = {a.id: (a.gpu, a.instance, a.epoch_ms) for a in allocations.values()}
    assert all((a.weight_num, a.weight_den) == (sizes[held[a.id]], 7) for a in allocations.values())
    assert {a.epoch_ms for a in allocations.values()} == {START, START + CUT_S * 1000}
    ends = sorted((held[a.id], a.start_ms, a.end_ms or START + 10**9) for a in allocations.values())
    for (one, _, end), (other, start, _) in pairwise(ends):
        assert one != other or end <= start
    recut = {gpu for gpu, _, epoch in sizes if epoch > START}
    old = [a for a in allocations.values() if a.gpu in recut and a.epoch_ms == START]
    assert old
    assert all(a.end_ms is not None and a.end_ms <= START + CUT_S * 1000 for a in old)


@pytest.mark.parametrize(
    ("wrong", "path"),
    [
        (("mig: [2, 3, 1]", "mig: [4, 3, 1]"), "pools[0].mig"),
        (("slices: [4]", "slices: [4, 4]"), "reconfigurations[0].slices"),
        (("gpu: 1, at_s", "gpu: 2, at_s"), "reconfigurations[0].gpu"),
        ((", mig: [2, 3, 1]", ""), "reconfigurations[0].pool"),
    ],
)
def test_wrong_slices_name_their_place(wrong: tuple[str, str], path: str) -> None:
    with pytest.raises(ScenarioError, match=path.replace("[", r"\[").replace("]", r"\]")):
        parse_scenario(SCENARIO.replace(*wrong), "sliced.yaml")
