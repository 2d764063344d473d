"""The load of a run of the fault suite: 2,000 simulated GPUs, one episode per wave, each in an hour of its own.

All hours are over when the load is recorded, so that everything in them can become complete. Nothing in an episode says
anything new about an earlier hour: what a fault breaks in its pool and hour stays broken until it is looked at. All
pools but one are closed after the last hour: ten that are computed every second would only slow the faults down.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from gpuledger.agents.messages import Message, event_message
from gpuledger.agents.simulator.scenario import Scenario, parse_scenario
from gpuledger.agents.simulator.world import World
from gpuledger.schemas.events import Allocation, AssetCost, Commitment, Inventory, decode_event
from tests.e2e.load import HOUR_MS
from tests.faults.drawing import POOLS, Fault, Wave

__all__ = ["EPISODE_S", "Episode", "FaultLoad", "record", "stored_messages"]

EPISODE_S = 60
_NODES, _GPUS_PER_NODE = 25, 8
#: An episode crosses a quarter of an hour, where prices change.
_INTO_THE_HOUR_MS = 840_000 + 30_000
#: Facts that reach back to the beginning; told once.
_TOLD_ONCE = ("rates", "inventory")


@dataclass(frozen=True, slots=True)
class Episode:
    """Numbers of messages: `main` up to there under load, then `probes[n]` up to there for the n-th barrier."""

    start_ms: int
    main: int
    probes: Sequence[int]


@dataclass(frozen=True, slots=True)
class FaultLoad:
    """The messages lie in `file`, numbered from 0 in the order of sending; `hours` are whole ones, UTC milliseconds."""

    file: Path
    episodes: Sequence[Episode]
    hours: tuple[int, int]
    messages: int
    gpus: int

    def counts(self) -> Counter[tuple[str, str, bytes]]:
        """(topic, key, value) -> how often the load itself has it."""
        return Counter((m.topic, m.key, m.value) for _, m in stored_messages(self.file, 0, self.messages))


def stored_messages(file: Path, first: int, end: int) -> Iterator[tuple[int, Message]]:
    """The messages [first, end) with their numbers."""
    db = sqlite3.connect(f"file:{file}?mode=ro", uri=True)
    try:
        sql = "SELECT number, topic, key, value, headers FROM messages WHERE number >= ? AND number < ? ORDER BY number"
        for number, topic, key, value, headers in db.execute(sql, (first, end)):
            yield number, Message(topic, key, value, msgspec.msgpack.decode(headers, type=list[tuple[str, bytes]]))
    finally:
        db.close()


def record(waves: Sequence[Wave], seed: int, file: Path) -> FaultLoad:
    """Simulates an episode per wave into `file`; the last lies in the hour that was over last."""
    scenario = _scenario(seed)
    first_ms = (time.time_ns() // 1_000_000 // HOUR_MS - len(waves)) * HOUR_MS
    db = sqlite3.connect(file)
    db.execute(
        "CREATE TABLE messages (number INTEGER PRIMARY KEY, topic TEXT, key TEXT, value BLOB, headers BLOB) STRICT"
    )
    episodes: list[Episode] = []
    state, sent = None, 0
    for n, wave in enumerate(waves):
        world = World(scenario, first_ms + n * HOUR_MS + _INTO_THE_HOUR_MS, state)
        messages = _episode(world, first=n == 0)
        messages = _closed(messages, first_ms + len(waves) * HOUR_MS)
        # Ended here, in the episode's own hour; otherwise the next one would say so.
        state = msgspec.structs.replace(world.state(), open=[])
        main, probes = _hold_back(messages, wave.barred)
        ends = [sent := sent + len(main), *(sent := sent + len(probe) for probe in probes)]
        rows = [message for part in (main, *probes) for message in part]
        db.executemany(
            "INSERT INTO messages VALUES (?, ?, ?, ?, ?)",
            [
                (sent - len(rows) + k, m.topic, m.key, m.value, msgspec.msgpack.encode(list(m.headers)))
                for k, m in enumerate(rows)
            ],
        )
        episodes.append(Episode(world.now_ms - EPISODE_S * 1000, ends[0], ends[1:]))
    db.commit()
    db.close()
    return FaultLoad(file, episodes, (first_ms, first_ms + len(waves) * HOUR_MS), sent, scenario.gpus)


def _episode(world: World, first: bool) -> list[Message]:
    messages = [m for _ in range(EPISODE_S * 1000 // world.scenario.period_ms) for m in world.tick()]
    messages += world.finish()
    for job in world.scheduler.running():
        messages += [event_message(end) for end in job.allocations(world.now_ms)]
        messages.append(event_message(job.event(world.now_ms, "COMPLETED")))
    return [m for m in messages if first or m.topic not in _TOLD_ONCE]


def _closed(messages: Sequence[Message], end_ms: int) -> list[Message]:
    """The messages with the facts of all pools but the first ending at `end_ms`."""
    made: dict[int, Message | None] = {}
    for message in messages:
        if message.topic not in ("inventory", "capacity", "rates") or id(message) in made:
            continue
        event = decode_event(message.value)
        if isinstance(event, Inventory) and event.placements and event.placements[0].pool != POOLS[0]:
            placements = [msgspec.structs.replace(each, end_ms=end_ms) for each in event.placements]
            made[id(message)] = event_message(msgspec.structs.replace(event, placements=placements))
        elif isinstance(event, Commitment) and event.pool != POOLS[0]:
            made[id(message)] = event_message(msgspec.structs.replace(event, end_ms=end_ms))
        elif isinstance(event, AssetCost) and event.pool != POOLS[0]:
            last = event_message(msgspec.structs.replace(event, end_ms=end_ms))
            made[id(message)] = last if event.start_ms < end_ms else None
    found = [made.get(id(message), message) for message in messages]
    return [message for message in found if message is not None]


def _hold_back(messages: Sequence[Message], faults: Sequence[Fault]) -> tuple[list[Message], list[list[Message]]]:
    """The messages without the last ones of each fault's pool that its barrier needs, and these."""
    times = Counter(map(id, messages))
    held: set[int] = set()
    probes: list[list[Message]] = []
    for fault in faults:
        topic = "allocations" if fault.agent == "allocations" else "telemetry"
        nodes: set[str] = set()
        found: list[Message] = []
        for n in range(len(messages) - 1, -1, -1):
            message = messages[n]
            if len(found) == fault.probes:
                break
            # Of another node each, and never one that is sent twice: its twin would be there already.
            if message.topic != topic or not message.key.startswith(f"{fault.pool}-") or message.key in nodes:
                continue
            if n in held or times[id(message)] > 1 or (topic == "allocations" and not _ends(message)):
                continue
            held.add(n)
            nodes.add(message.key)
            found.append(message)
        probes.append(found)
    return [message for n, message in enumerate(messages) if n not in held], probes


def _ends(message: Message) -> bool:
    event = decode_event(message.value)
    return isinstance(event, Allocation) and event.end_ms is not None


def _scenario(seed: int) -> Scenario:
    """Ten pools of 200 GPUs, three tenants, and one of everything that moves a ledger."""
    first, second, third = POOLS[:3]
    large = {
        "sizes": [{"gpus": 32, "weight": 2}, {"gpus": 16, "weight": 3}, {"gpus": 4, "weight": 2}],
        "shortest_s": 40,
        "longest_s": 400,
        "duties": [
            {"name": "training", "weight": 4, "active_s": 25, "idle_s": 4, "level_pct": 94},
            {"name": "forgotten", "weight": 1, "active_s": 1, "idle_s": 600, "level_pct": 3},
        ],
    }
    shared = {
        "sizes": [{"gpus": "1/4", "weight": 5}, {"gpus": "1/2", "weight": 2}, {"gpus": "1/3", "weight": 1}],
        "shortest_s": 20,
        "longest_s": 200,
        "duties": [{"name": "notebook", "active_s": 6, "idle_s": 14, "level_pct": 40}],
    }
    demand = [{"pool": pool, "share_pct": 92, "swing_pct": 8, "ramp_gpus_per_s": 100} for pool in POOLS]
    few = [{"pool": pool, "gpus": 6, "swing_pct": 20, "swing_period_s": 60} for pool in POOLS]
    money = {"currency": "EUR"}
    scenario = {
        "name": "faults",
        "seed": seed,
        "period_ms": 2000,
        "flush_ms": 20_000,
        "sites": [{"name": "narvik", "country": "NO", "pue": 1.1}],
        "pools": [
            {"name": p, "site": "narvik", "model": "H100", "nodes": _NODES, "gpus_per_node": _GPUS_PER_NODE}
            for p in POOLS
        ],
        "tenants": [
            {"id": "north", "accounts": ["north-train", "north-eval"], "demand": demand, "jobs": large},
            {"id": "south", "accounts": ["south"], "demand": demand, "jobs": large},
            {"id": "campus", "accounts": ["physics"], "demand": few, "jobs": shared},
        ],
        "commitments": [
            {"pool": pool, "tenant": tenant, "gpus": gpus}
            for pool in POOLS
            for tenant, gpus in (("north", 120), ("south", 60), ("campus", 6))
        ],
        "transfers": [{"pool": first, "gpus": 40, "from_tenant": "north", "to_tenant": "south", "at_s": 30}],
        "failures": [
            {"kind": "gpu_lost", "pool": first, "node": 3, "gpu": 5, "at_s": 20, "for_s": 20},
            {"kind": "agent_gap", "pool": second, "node": 6, "at_s": 30, "for_s": 10},
            {"kind": "node_reboot", "pool": third, "node": 2, "at_s": 30, "for_s": 10},
        ],
        "delivery": {"late_permille": 40, "late_by_s": 20, "duplicate_permille": 60},
        "tariffs": [{"name": "spot", "per_kwh": 0.05, "swing_pct": 60, "step_minutes": 15, **money}],
        "asset_costs": [
            {"pool": pool, "period_cost": 684_000, "period_days": 30, "tariff": "spot", **money} for pool in POOLS
        ],
        "rate_cards": [
            {"pool": pool, "per_gpu_hour": 2.45, "reserved_unused_per_gpu_hour": 1.05, **money} for pool in POOLS
        ],
    }
    return parse_scenario(json.dumps(scenario), "the load of the fault suite")  # JSON is YAML
