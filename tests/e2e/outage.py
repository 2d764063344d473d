"""Agents with real spools and publishers around simulated hardware: eight hours of a small site, in seconds.

What the simulator would send goes through each node's own spool first, numbered there and stamped with the simulated
time, so that bounds and gap records are those of an agent that lived through these hours.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa

from gpuledger.agents.messages import Message
from gpuledger.agents.publisher import Publisher, SpooledMessage
from gpuledger.agents.simulator.scenario import parse_scenario
from gpuledger.agents.simulator.world import World
from gpuledger.agents.spool import Spool
from gpuledger.schemas.config import Kafka
from gpuledger.schemas.telemetry import HEADER_KEY, BatchHeader, Gap, decode_header, encode_header
from tests.e2e.load import HOUR_MS, Load

__all__ = ["OUTAGE_HOURS", "Batch", "SpooledNode", "batches", "in_hours", "outage_load", "seal"]

PERIOD_MS = 10_000
FLUSH_MS = 60_000
OUTAGE_HOURS = (1, 7)
_HOURS = 8
_BIG_BYTES = 1 << 30
_WEEK_MS = 7 * 24 * HOUR_MS


def outage_load(nodes: int = 3, gpus_per_node: int = 2) -> Load:
    """Eight whole hours, the last of which ended an hour ago or more; a sample every 10 s, a batch every minute."""
    gpus = nodes * gpus_per_node
    duty = {"name": "training", "active_s": 400, "idle_s": 90, "level_pct": 90}
    scenario = {
        "name": "outage",
        "seed": 4,
        "period_ms": PERIOD_MS,
        "flush_ms": FLUSH_MS,
        "sites": [{"name": "narvik"}],
        "pools": [{"name": "deep", "site": "narvik", "model": "H100", "nodes": nodes, "gpus_per_node": gpus_per_node}],
        "tenants": [
            {
                "id": tenant,
                "accounts": [tenant],
                "demand": [{"pool": "deep", "gpus": gpus // 2 - 1, "swing_pct": 20, "swing_period_s": 5000}],
                "jobs": {"sizes": sizes, "duties": [duty], "shortest_s": 900, "longest_s": 20_000},
            }
            for tenant, sizes in (("north", [{"gpus": 2}, {"gpus": 1}]), ("south", [{"gpus": 1}, {"gpus": "1/2"}]))
        ],
        "commitments": [{"pool": "deep", "tenant": "north", "gpus": gpus // 2}],
        "tariffs": [{"name": "spot", "currency": "EUR", "per_kwh": 0.05}],
        "asset_costs": [
            {"pool": "deep", "currency": "EUR", "period_cost": 9000, "period_days": 30, "tariff": "spot"}
            | {"node_energy_factor": 1.3}
        ],
        "rate_cards": [{"pool": "deep", "currency": "EUR", "per_gpu_hour": 2.45}],
    }
    parsed = parse_scenario(json.dumps(scenario), "outage")  # JSON is YAML
    start_ms = (time.time_ns() // 1_000_000 // HOUR_MS - 1 - _HOURS) * HOUR_MS
    world = World(parsed, start_ms)
    made = [world.tick() for _ in range(_HOURS * HOUR_MS // PERIOD_MS)]
    return Load([*made, world.finish()], start_ms, world.now_ms, frozenset({"deep"}))


def in_hours(load: Load, first: int, last: int) -> Sequence[tuple[int, Sequence[Message]]]:
    """(simulated time, messages) of the ticks in hours [first, last) of the load; hour 8 has what comes at the end."""
    ticks = range(first * HOUR_MS // PERIOD_MS, min(last * HOUR_MS // PERIOD_MS, len(load.ticks)))
    return [(load.start_ms + n * PERIOD_MS, load.ticks[n]) for n in ticks]


@dataclass(frozen=True, slots=True)
class Batch:
    """What one batch of the load covers: [from_ms, to_ms)."""

    node: str
    from_ms: int
    to_ms: int


def _header(message: Message) -> BatchHeader:
    return decode_header(dict(message.headers)[HEADER_KEY])


def _span(header: BatchHeader, value: bytes) -> tuple[int, int]:
    times = pa.ipc.open_stream(value).read_all().column("ts_ms").to_numpy()
    before = [device.previous_ts_ms for device in header.devices if device.previous_ts_ms is not None]
    return min([*before, int(times.min())]), int(times.max())


def batches(load: Load) -> dict[tuple[str, int], Batch]:
    """(run, number in it) -> the batch. A run's first sample covers nothing: a batch of it alone is left out."""
    found: dict[tuple[str, int], Batch] = {}
    for message in load.telemetry():
        header = _header(message)
        from_ms, to_ms = _span(header, message.value)
        if from_ms < to_ms:
            found[header.run_id, header.seq] = Batch(header.node, from_ms, to_ms)
    return found


class WatchedSpool(Spool):
    """A spool that knows how many messages have been taken to be sent."""

    taken = 0

    def take(self, max_messages: int, max_bytes: int) -> list[SpooledMessage]:
        found = super().take(max_messages, max_bytes)
        self.taken += len(found)
        return found


class SpooledNode:
    """One node: its spool on disk, and a publisher that drains it in a thread of its own until `kill` or `stop`."""

    def __init__(self, kafka: Kafka, directory: Path, name: str, now_ms: int, max_bytes: int = _BIG_BYTES) -> None:
        self._kafka = kafka
        self._directory = directory / name
        self._max_bytes = max_bytes
        self.name = name
        self.start(now_ms)

    def start(self, now_ms: int) -> None:
        """Begins, or goes on after `kill`, on the same spool."""
        self.spool = WatchedSpool(self._directory, self._max_bytes, _WEEK_MS, now_ms)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"node {self.name}", daemon=True)
        self._thread.start()
        self._wake, self._end = asyncio.Event(), asyncio.Event()
        self._publisher = Publisher(self._kafka, self.name)
        self._drain = asyncio.run_coroutine_threadsafe(
            self._publisher.drain(self.spool, self._wake, self._end), self._loop
        )

    def _do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    def seal(self, message: Message, now_ms: int) -> None:
        """Into the spool, as an agent does: a batch gets the number and the gaps that the spool gives it."""
        if message.topic == "telemetry":
            header = _header(message)

            def build(seq: int, gaps: list[Gap]) -> Message:
                assert seq == header.seq, f"the spool gives number {seq} to batch {header.seq} of {header.run_id}"
                stamped = msgspec.structs.replace(header, gaps=gaps)
                return Message(message.topic, message.key, message.value, ((HEADER_KEY, encode_header(stamped)),))

            self.spool.seal_batch(header.run_id, *_span(header, message.value), now_ms, build)
        else:
            self.spool.seal_event(message, now_ms)
        self._loop.call_soon_threadsafe(self._wake.set)

    def waiting(self) -> int:
        return self.spool.stats().messages

    def wait_until_empty(self, timeout_s: float = 60) -> None:
        deadline_s = time.monotonic() + timeout_s
        while self.waiting():
            if self._drain.done():
                self._drain.result()
            assert time.monotonic() < deadline_s, f"{self.name}: {self.waiting()} messages still wait in the spool"
            time.sleep(0.05)

    def kill(self) -> None:
        """The agent ends as it stands, whatever is on its way."""

        async def die() -> None:
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self._do(die())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()
        self.spool.close()

    def stop(self) -> None:
        async def close() -> None:
            self._end.set()
            await self._publisher.close(1)

        if self._loop.is_closed():
            return
        try:
            self._do(close())
        finally:
            self.kill()


def seal(nodes: dict[str, SpooledNode], ticks: Iterable[tuple[int, Sequence[Message]]]) -> None:
    """Each message into the spool of the node whose key it bears; what is no node's into that of ``control``."""
    for now_ms, messages in ticks:
        for message in messages:
            nodes.get(message.key, nodes["control"]).seal(message, now_ms)
