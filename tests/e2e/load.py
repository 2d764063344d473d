"""A recorded load: the simulator's messages made beforehand, so that several runs are sent the very same bytes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from gpuledger.agents.messages import Message
from gpuledger.agents.publisher import Publisher
from gpuledger.agents.simulator.scenario import load_scenario
from gpuledger.agents.simulator.world import World
from gpuledger.schemas.config import Kafka

__all__ = ["HOUR_MS", "SITE", "Load", "Offsets", "publish", "record"]

HOUR_MS = 3_600_000
SITE = Path(__file__).with_name("site.yaml")

#: (topic of the contract, partition) -> the last offset sent.
Offsets = dict[tuple[str, int], int]


@dataclass(frozen=True, slots=True)
class Load:
    """Messages by tick; event times lie in [start_ms, end_ms), all in hours that were over when it was recorded."""

    ticks: Sequence[Sequence[Message]]
    start_ms: int
    end_ms: int
    pools: frozenset[str]

    @property
    def hours(self) -> tuple[int, int]:
        """The whole hours around it, [from, to) in UTC milliseconds."""
        return self.start_ms // HOUR_MS * HOUR_MS, -(-self.end_ms // HOUR_MS) * HOUR_MS

    def cut(self, *shares: float) -> list[Sequence[Sequence[Message]]]:
        """Its ticks cut at these shares of it, in order."""
        at = [0, *(int(len(self.ticks) * share) for share in shares), len(self.ticks)]
        return [self.ticks[a:b] for a, b in pairwise(at)]

    def telemetry(self) -> list[Message]:
        """Its batches, in the order of sending."""
        return [message for tick in self.ticks for message in tick if message.topic == "telemetry"]


def record(ticks: int, before_the_hour_s: int = 110) -> Load:
    """Simulates `ticks` seconds of the site, from so long before the hour that ended an hour ago.

    The load crosses an hour (and a price interval), and both hours are over: everything in them can become complete.
    """
    scenario = load_scenario(SITE)
    start_ms = (time.time_ns() // 1_000_000 // HOUR_MS - 1) * HOUR_MS - before_the_hour_s * 1000
    world = World(scenario, start_ms)
    made = [world.tick() for _ in range(ticks)]
    return Load([*made, world.finish()], start_ms, world.now_ms, frozenset(pool.name for pool in scenario.pools))


async def publish(kafka: Kafka, ticks: Sequence[Sequence[Message]], over_s: float) -> Offsets:
    """Sends the ticks, spread evenly over `over_s`; where they came to lie."""
    last: Offsets = {}
    prefix = len(kafka.topic_prefix)
    began_s = time.monotonic()
    async with Publisher(kafka, "endtoend") as publisher:
        for n, messages in enumerate(ticks):
            for place in await publisher.publish_many(messages):
                key = place.topic[prefix:], place.partition
                last[key] = max(place.offset, last.get(key, -1))
            await asyncio.sleep(max(0.0, began_s + over_s * (n + 1) / len(ticks) - time.monotonic()))
    return last
