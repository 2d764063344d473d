"""Random small worlds for the ledger's laws: a calm fleet, and the disturbances that happen to it.

`worlds()` are hypothesis strategies whose failing examples shrink and print as a story; `world(seed)` is the same
generator on a seed. A world is a dictionary of plain values that `oracle.books` reads; `inputs` makes the product's own
inputs of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from tests.streams.chance import Chance, Drawn, Seeded
from tests.streams.disturbances import DISTURBANCES, POOLS, add_run, allocate
from tests.streams.fleet import AHEAD_MS, WATTS, Instance, Plan, batches
from tests.streams.inputs import message
from tests.streams.story import World

__all__ = [
    "BASES",
    "MINUTES",
    "POOLS",
    "START_MS",
    "World",
    "asked",
    "message",
    "world",
    "worlds",
]

MINUTE_MS = 60_000
#: Where worlds begin that do not say otherwise, and how long they are at most.
START_MS = 1_700_000_040_000 // 3_600_000 * 3_600_000 + 600_000
MINUTES = 5
TABLES = ("placements", "allocations", "geometries", "jobs", "commitments", "transfers", "tenants")


def _utc(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()) * 1000


#: Times at which clocks and calendars do something: an hour, a day, a leap day, a year and both changes of the clocks
#: in Europe and America. Far enough ahead that no table forgets them.
BASES: tuple[int, ...] = (
    _utc("2096-03-06T11:10"),
    _utc("2096-02-28T23:58"),
    _utc("2096-02-29T23:57"),
    _utc("2096-12-31T23:58"),
    _utc("2096-03-25T00:58"),
    _utc("2096-10-28T00:58"),
    _utc("2096-11-04T05:58"),
    _utc("2096-06-30T23:57"),
)


def asked(examples: int = 25) -> settings:
    """How a law is asked: of the same few worlds in every run, of many others where somebody asks for so many."""
    many = int(os.environ.get("GPULEDGER_LAW_EXAMPLES", "0"))
    return settings(
        max_examples=many or examples,
        derandomize=not many,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


# ------------------------------------------------------------------------------------------------- the calm fleet


def _fleet(plan: Plan, nodes: int, gpus_of_node: int, whole: bool) -> None:
    chance = plan.chance
    for n in range(nodes):
        node = f"n{n}"
        for _ in range(gpus_of_node):
            gpu = f"g{len(plan.gpus)}"
            plan.gpus.append(gpu)
            placed = {"id": f"p-{gpu}", "revision": 1, "claimed_at_ms": plan.before_ms - 5000, "gpu": gpu, "node": node}
            placed |= {"pool": chance.one_of(POOLS), "start_ms": plan.before_ms, "end_ms": None, "void": False}
            plan.facts["placements"].append(placed)
            plan.serves[gpu] = [(node, plan.before_ms, 1 << 60)]
            state = [(plan.before_ms, chance.one_of(["active", "idle"]))]
            plan.instances.append(Instance(gpu, 0, 0, plan.before_ms, 1 << 60, state))
            plan.powers[gpu] = [(plan.before_ms, chance.one_of(WATTS))]
            if chance.happens(70) or whole:
                start = plan.moment(plan.from_ms - MINUTE_MS)
                allocate(plan, gpu, start, plan.moment(start, max(start, plan.to_ms)))
        if chance.happens(85):
            add_run(plan, node, plan.moment(plan.from_ms - MINUTE_MS, plan.from_ms + MINUTE_MS), plan.after_ms)


def _build(
    chance: Chance, base_ms: int, minutes: int, tick_ms: int, nodes: int, each: int, most: int, kinds: Sequence[Any]
) -> World:
    plan = Plan(chance, tick_ms, base_ms, base_ms + minutes * MINUTE_MS)
    plan.facts = {table: [] for table in TABLES}
    plan.facts["tenants"] += [
        {
            "id": "X",
            "revision": 1,
            "rules": [
                {"match": "account", "value": "acc", "source": None, "start_ms": None, "end_ms": base_ms + 90_000}
            ],
        },
        {
            "id": "Y",
            "revision": 1,
            "rules": [
                {"match": "account", "value": "acc", "source": None, "start_ms": base_ms + 90_000, "end_ms": None}
            ],
        },
    ]
    _fleet(plan, nodes, each, whole=False)
    for _ in range(chance.integer(0, most)):
        plan.happened.append(chance.one_of(kinds)(plan))
    border = chance.integer(0, minutes)
    return World(
        from_ms=plan.from_ms,
        to_ms=plan.to_ms,
        tick_ms=tick_ms,
        ahead_ms=AHEAD_MS,
        confirm_ms=tick_ms * chance.one_of([45, 90, 600]),
        complete_until_ms=plan.to_ms - border * MINUTE_MS,
        happened=plan.happened,
        salt=chance.integer(0, 9999),
        **plan.facts,
        batches=batches(plan),
    )


def _few(chance: Chance, bases: Sequence[int], kinds: Sequence[Any], most: int = 9) -> World:
    """Few GPUs, many disturbances."""
    minutes, tick_ms = chance.one_of([(2, 1000), (3, 1000), (MINUTES, 1000), (1, 250)])
    nodes, each = chance.one_of([(1, 1), (2, 1), (1, 2), (2, 2)])
    return _build(chance, chance.one_of(bases), minutes, tick_ms, nodes, each, most, kinds)


def _many(chance: Chance, bases: Sequence[int], kinds: Sequence[Any]) -> World:
    """Many GPUs, few disturbances."""
    nodes, each = chance.integer(2, 4), chance.integer(2, 4)
    return _build(chance, chance.one_of(bases), chance.one_of([1, 2]), 1000, nodes, each, 2, kinds)


def world(
    seed: int, bases: Sequence[int] | None = None, most: int = 9, kinds: Sequence[Callable[[Plan], str]] = ()
) -> World:
    """The world of a seed: one in five has many GPUs, but with `kinds` a few GPUs to which only these things happen."""
    chance = Seeded(seed)
    where = (START_MS,) if bases is None else bases
    if kinds:
        return _few(chance, where, kinds, most)
    if chance.happens(20):
        return _many(chance, where, DISTURBANCES)
    return _few(chance, where, DISTURBANCES, most)


@st.composite
def worlds(
    draw: st.DrawFn,
    kinds: Sequence[Callable[[Plan], str]] = DISTURBANCES,
    bases: Sequence[int] = BASES,
) -> World:
    """Worlds in which only these disturbances happen."""
    chance = Drawn(draw)
    return _many(chance, bases, kinds) if chance.happens(20) else _few(chance, bases, kinds)
