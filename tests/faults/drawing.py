"""What will happen in a run of the fault suite: drawn by the seed alone, before anything is started. Pure.

Faults come in waves. One half of a wave strikes at any moment of its load; the other half is injected at barriers, each
with a message of a pool and hour of its own that nothing comes after: later marks of the same hour would heal what a
lost one left wrong, and the run would look exact.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

__all__ = ["POOLS", "POOLS_PER_WAVE", "Fault", "Wave", "draw"]

POOLS = tuple(f"pool-{letter}" for letter in "abcdefghij")
#: Faults at barriers in a wave, each in a pool of its own.
POOLS_PER_WAVE = len(POOLS)

T = TypeVar("T")
Victim = Literal["agent", "broker", "worker", "clickhouse"]
How = Literal["kill -9", "stopped past its session", "network cut", "disk full", "overtaken"]


@dataclass(frozen=True, slots=True)
class Fault:
    """`victim` suffers `how`. At a barrier: while process `agent` stands at `point` with data of `pool` in hand.

    `after_ms`: of the load that the fault strikes into, so much passes first; `for_ms`: how long a pause lasts.
    """

    victim: Victim
    how: How
    after_ms: int
    for_ms: int
    agent: str = ""
    point: str = ""
    pool: str = ""

    @property
    def place(self) -> str:
        """Where it strikes, in words."""
        return f"{self.agent}: {self.point}" if self.agent else "any moment"

    @property
    def probes(self) -> int:
        """Messages of its pool that are held back for it."""
        return 0 if not self.agent else 2 if self.how == "overtaken" else 1


@dataclass(frozen=True, slots=True)
class Wave:
    """Faults under load, then those at barriers."""

    free: Sequence[Fault]
    barred: Sequence[Fault]

    @property
    def faults(self) -> list[Fault]:
        return [*self.free, *self.barred]


#: (agent, point): between each two steps of store, mark, commit, and of read and write. "sender" is the agent: a
#: message is in the spool and not yet noted as done, or the broker has it and the spool does not know.
_POINTS = (
    *((agent, point) for agent in ("telemetry", "allocations") for point in ("stored", "marked", "acknowledged")),
    *(("dirty", point) for point in ("before_read", "read", "torn", "written", "acknowledged")),
    ("sender", "sealed"),
    ("sender", "sent"),
)
_FREE: tuple[tuple[Victim, How], ...] = (
    ("agent", "kill -9"),
    ("worker", "kill -9"),
    ("broker", "kill -9"),
    ("clickhouse", "kill -9"),
    ("agent", "kill -9"),
    ("worker", "kill -9"),
    ("broker", "kill -9"),
    ("clickhouse", "kill -9"),
    ("worker", "stopped past its session"),
    ("broker", "network cut"),
    ("clickhouse", "network cut"),
    ("clickhouse", "disk full"),
    ("agent", "disk full"),
    ("broker", "disk full"),
)
_KILLED: tuple[Victim, How] = ("worker", "kill -9")
#: What happens while a worker stands at a barrier: mostly it is killed there itself.
_BARRED: tuple[tuple[Victim, How], ...] = (
    *[_KILLED] * 8,
    ("worker", "stopped past its session"),
    ("worker", "stopped past its session"),
    ("broker", "kill -9"),
    ("clickhouse", "kill -9"),
    ("broker", "network cut"),
    ("clickhouse", "network cut"),
    ("clickhouse", "disk full"),
)


def draw(kills: int, seed: int) -> list[Wave]:
    """`kills` faults, half of them at barriers (the greater half of an odd number)."""
    rng = random.Random(f"faults/{seed}")
    free, points, barred = _deck(_FREE, rng), _deck(_POINTS, rng), _deck(_BARRED, rng)
    waves: list[Wave] = []
    left = kills
    while left > 0:
        size = min(left, 2 * POOLS_PER_WAVE)
        left -= size
        at_barriers = [_at_barrier(next(points), barred, pool, rng) for pool in rng.sample(POOLS, (size + 1) // 2)]
        if size >= POOLS_PER_WAVE:
            # In every whole wave one recompute is overtaken between its reads and its writes.
            first = next((n for n, fault in enumerate(at_barriers) if fault.agent == "dirty"), 0)
            at_barriers[first] = _fault("worker", "overtaken", rng, "dirty", "read", at_barriers[first].pool)
        waves.append(Wave([_fault(*next(free), rng) for _ in range(size // 2)], at_barriers))
    return waves


def _at_barrier(where: tuple[str, str], deck: Iterator[tuple[Victim, How]], pool: str, rng: random.Random) -> Fault:
    if where[0] == "sender":
        return _fault("agent", "kill -9", rng, *where, pool)
    return _fault(*next(deck), rng, *where, pool)


def _fault(victim: Victim, how: How, rng: random.Random, agent: str = "", point: str = "", pool: str = "") -> Fault:
    return Fault(victim, how, rng.randrange(0, 800), rng.randrange(1_000, 3_000), agent, point, pool)


def _deck(cards: Sequence[T], rng: random.Random) -> Iterator[T]:
    """All of them in a drawn order, again and again: no kind is left out by chance."""
    while True:
        yield from rng.sample(cards, len(cards))
