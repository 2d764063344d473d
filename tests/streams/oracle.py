"""A naive ledger, instant by instant: ticks, not intervals, and exact fractions. It imports nothing from the product.

A world is plain dictionaries (see `tests/streams/worlds.py`), all of whose times lie on its ticks. Slow and obvious on
purpose: every rule is the sentence of the design that states it, asked again at every tick.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NamedTuple

__all__ = ["Books", "Row", "Unheld", "books", "totals"]

MINUTE_MS = 60_000
US_PER_MS = 1000
FOREVER = 1 << 60
#: Of several sources that claim one job on one GPU the first of these counts.
SOURCES = ("slurm", "kubernetes", "manual", "process")
#: A sample covers no more than this many periods before it.
PERIODS_COVERED = 3

World = Mapping[str, Any]
Fact = Mapping[str, Any]


class Row(NamedTuple):
    """The key of a GPU row. Kinds: held, unconfirmed, unsliced, unallocated."""

    pool: str
    gpu: str
    minute: int
    tenant: str
    job: str
    user: str
    instance: int
    kind: str
    activity: str


class Unheld(NamedTuple):
    """The key of a pool row of what nobody holds. Kinds: reserved_unused, overcommitted, unsliced, free."""

    pool: str
    minute: int
    tenant: str
    kind: str


@dataclass
class Books:
    """GPU-microseconds and millijoules. A row in `us` that is not in `mj` has no known energy; those in `shared` had
    less than the whole GPU at some tick, so that the product may round them."""

    us: dict[Row, Fraction] = field(default_factory=dict[Row, Fraction])
    mj: dict[Row, Fraction] = field(default_factory=dict[Row, Fraction])
    unheld: dict[Unheld, Fraction] = field(default_factory=dict[Unheld, Fraction])
    shared: set[Row] = field(default_factory=set[Row])


def totals(table: Mapping[Any, Fraction], *columns: str) -> dict[Any, Fraction]:
    """Sums of a table of `Books` by some columns of its key, without zeros."""
    sums: dict[Any, Fraction] = defaultdict(Fraction)
    for key, amount in table.items():
        sums[tuple(getattr(key, column) for column in columns)] += amount
    return {key: amount for key, amount in sums.items() if amount}


# ------------------------------------------------------------------------------------------------- telemetry


class Sight(NamedTuple):
    """What the believed batch saw of one (GPU, instance) at one tick; `tick_mj` is None where it is not known."""

    rank: tuple[int, str, int]
    epoch_ms: int
    activity: str
    tick_mj: Fraction | int | None


def accepted(world: World) -> list[Fact]:
    """The batches that are not quarantined: no sample is later than the broker's time and what clocks may be ahead."""
    return [
        batch
        for batch in world["batches"]
        if all(
            ts <= batch["appended_ms"] + world["ahead_ms"]
            for device in batch["devices"]
            for ts, _, _ in device["samples"]
        )
    ]


def _per_tick(before_mj: int | None, mj: int | None, tick_ms: int, span_ms: int) -> Fraction | int | None:
    """The energy of a tick between two readings; None where one is not known or the counter ran backwards."""
    if before_mj is None or mj is None or mj < before_mj:
        return None
    energy = (mj - before_mj) * tick_ms
    return Fraction(energy, span_ms) if energy % span_ms else energy // span_ms


def observations(batches: Iterable[Fact], tick_ms: int) -> dict[tuple[str, int, int], Sight]:
    """(gpu, instance, tick) -> what was seen. Of several batches the smallest (run start, run id, seq) is believed."""
    seen: dict[tuple[str, int, int], Sight] = {}
    for batch in batches:
        rank = (batch["run_start_ms"], batch["run_id"], batch["seq"])
        for device in batch["devices"]:
            before_ts, before_mj = device["previous_ts_ms"], device["previous_energy_mj"]
            for ts, activity, energy in device["samples"]:
                if before_ts is not None:
                    tick_mj = _per_tick(before_mj, energy, tick_ms, ts - before_ts)
                    sight = Sight(rank, device["epoch_ms"], activity, tick_mj)
                    for t in range(max(before_ts, ts - PERIODS_COVERED * batch["period_ms"]), ts, tick_ms):
                        key = (device["gpu"], device["instance"], t)
                        if key not in seen or rank < seen[key].rank:
                            seen[key] = sight
                before_ts, before_mj = ts, energy
    return seen


def boot_starts(batches: Iterable[Fact]) -> dict[str, dict[str, int]]:
    """node -> boot -> the smallest start that any batch gave for it."""
    boots: dict[str, dict[str, int]] = defaultdict(dict)
    for batch in batches:
        known = boots[batch["node"]]
        known[batch["boot_id"]] = min(batch["boot_start_ms"], known.get(batch["boot_id"], FOREVER))
    return boots


def last_named(batches: Iterable[Fact]) -> dict[str, int]:
    """allocation -> the last sample of the latest batch that names it as running."""
    named: dict[str, int] = {}
    for batch in batches:
        last = max((ts for device in batch["devices"] for ts, _, _ in device["samples"]), default=0)
        for allocation in batch["running"]:
            named[allocation] = max(last, named.get(allocation, 0))
    return named


# ------------------------------------------------------------------------------------------------- facts


def current(facts: Iterable[Fact]) -> list[Fact]:
    """The greatest revision of every id, without those that never happened."""
    best: dict[str, Fact] = {}
    for fact in facts:
        if fact["id"] not in best or fact["revision"] > best[fact["id"]]["revision"]:
            best[fact["id"]] = fact
    return [fact for fact in best.values() if not fact.get("void")]


def in_force(fact: Fact, t: int) -> bool:
    end = fact["end_ms"]
    return fact["start_ms"] <= t < (FOREVER if end is None else end)


def pool_of(placements: Iterable[Fact], t: int) -> str | None:
    """The pool of a GPU with these placements: the newest claim counts, then the smaller node, then the smaller id."""
    here = [p for p in placements if in_force(p, t)]
    return min(here, key=lambda p: (-p["claimed_at_ms"], p["node"], p["id"]))["pool"] if here else None


def slices_of(geometries: Iterable[Fact], t: int) -> tuple[int, int]:
    """(slices that belong to instances, slices of the GPU); (1, 1) where it is not partitioned."""
    here = [g for g in geometries if in_force(g, t)]
    if not here:
        return 1, 1
    geometry = min(here, key=lambda g: (-g["start_ms"], g["node"], g["id"]))
    return sum(instance["slices"] for instance in geometry["instances"]), geometry["slices"]


def tenant_of(tenants: Iterable[Fact], allocation: Fact, t: int) -> str:
    """Who pays: the allocation's tenant, else the account map (account before namespace before user, a rule of the
    source before one of any, then the smaller tenant), else unattributed."""
    if allocation["tenant"]:
        return allocation["tenant"]
    found = [
        (("account", "namespace", "user").index(rule["match"]), rule["source"] is None, tenant["id"])
        for tenant in tenants
        for rule in tenant["rules"]
        if allocation[rule["match"]] == rule["value"]
        and rule["source"] in (None, allocation["source"])
        and (rule["start_ms"] or 0) <= t < (FOREVER if rule["end_ms"] is None else rule["end_ms"])
    ]
    return min(found)[2] if found else "unattributed"


class Ends(NamedTuple):
    """What closes allocations that have no end of their own, and what confirms them."""

    boots: Mapping[str, Mapping[str, int]]
    jobs: Mapping[str, int | None]
    named: Mapping[str, int]
    confirm_ms: int

    def of(self, allocation: Fact) -> int:
        """The end, or the start of the next boot of its node or the job's end, whichever comes first."""
        if allocation["end_ms"] is not None:
            return allocation["end_ms"]
        known = self.boots.get(allocation["node"], {})
        mine = known.get(allocation["boot_id"])
        ends = [start for start in known.values() if mine is not None and start > mine]
        job_end = self.jobs.get(allocation["job_id"])
        if job_end is not None and job_end > allocation["start_ms"]:
            ends.append(job_end)
        return min(ends, default=FOREVER)

    def confirmed(self, allocation: Fact, t: int) -> bool:
        """An open allocation counts as confirmed for a while after the latest batch that named it."""
        if allocation["end_ms"] is not None:
            return True
        return t < max(allocation["start_ms"], self.named.get(allocation["id"], 0)) + self.confirm_ms


class Claim(NamedTuple):
    """Somebody who holds num/den of a GPU at a tick, as the allocation says it."""

    tenant: str
    job: str
    user: str
    instance: int
    kind: str
    activity: str
    num: int
    den: int


def holders(allocations: Iterable[Fact], ends: Ends, t: int) -> list[Fact]:
    """The allocations that hold a part of their GPU at t: of several sources for one job the first counts."""
    here = [a for a in allocations if a["weight_num"] and a["start_ms"] <= t < ends.of(a)]
    if len({a["source"] for a in here}) < 2:
        return here
    best = {
        job: min(SOURCES.index(a["source"]) for a in here if a["job_id"] == job) for job in {a["job_id"] for a in here}
    }
    return [a for a in here if SOURCES.index(a["source"]) == best[a["job_id"]]]


def _activity(sight: Sight | None, epoch_ms: int, nothing: str) -> str:
    """What a holder was seen doing on its instance; an instance of another epoch is another instance."""
    if sight is None or (sight.epoch_ms != epoch_ms and 0 not in (sight.epoch_ms, epoch_ms)):
        return nothing
    return sight.activity


# ------------------------------------------------------------------------------------------------- the ledger


class Look(NamedTuple):
    """All that is so of one GPU at a tick. Ticks of a minute that look the same are booked together."""

    pool: str
    gpu: str
    minute: int
    claims: tuple[Claim, ...]
    slices: tuple[int, int]
    activity: str
    tick_mj: Fraction | int | None


class Entry(NamedTuple):
    """A holder, or what is left of a GPU, and its true share."""

    tenant: str
    job: str
    user: str
    instance: int
    kind: str
    activity: str
    weight: Fraction


def entries(look: Look) -> list[Entry]:
    """The holders' shares, in proportion where they claim more than there is; what is left is unsliced as far as the
    geometry gives it to no instance, the rest unallocated."""
    weights = [Fraction(claim.num, claim.den) for claim in look.claims]
    total = sum(weights, Fraction(0))
    found = [
        Entry(*claim[:6], weight / max(total, Fraction(1))) for claim, weight in zip(look.claims, weights, strict=True)
    ]
    left = max(Fraction(0), 1 - total)
    unsliced = min(left, max(Fraction(0), 1 - Fraction(*look.slices)))
    found.append(Entry("", "", "", 0, "unsliced", look.activity, unsliced))
    found.append(Entry("", "", "", 0, "unallocated", look.activity, left - unsliced))
    return [entry for entry in found if entry.weight]


@dataclass
class _Gpu:
    name: str
    placements: list[Fact]
    allocations: list[Fact]
    geometries: list[Fact]


class _Looker:
    """Looks at every GPU at every tick."""

    def __init__(self, world: World) -> None:
        batches = accepted(world)
        jobs = {job["id"]: job["ended_ms"] for job in current(world["jobs"])}
        self.tenants = current(world["tenants"])
        self.ends = Ends(boot_starts(batches), jobs, last_named(batches), world["confirm_ms"])
        self.seen = observations(batches, world["tick_ms"])
        self.complete_until_ms = world["complete_until_ms"]
        tables = [current(world[name]) for name in ("placements", "allocations", "geometries")]
        names = sorted({fact["gpu"] for fact in tables[0]})
        self.gpus = [_Gpu(name, *([f for f in table if f["gpu"] == name] for table in tables)) for name in names]

    def look(self, gpu: _Gpu, t: int) -> Look | None:
        """None: the GPU is not in service."""
        pool = pool_of(gpu.placements, t)
        if pool is None:
            return None
        minute = t // MINUTE_MS * MINUTE_MS
        nothing = "unobserved" if minute < self.complete_until_ms else "pending"
        claims = tuple(
            Claim(
                tenant_of(self.tenants, a, t),
                a["job_id"],
                a["user"],
                a["instance"],
                "held" if self.ends.confirmed(a, t) else "unconfirmed",
                _activity(self.seen.get((gpu.name, a["instance"], t)), a["epoch_ms"], nothing),
                a["weight_num"],
                a["weight_den"],
            )
            for a in holders(gpu.allocations, self.ends, t)
        )
        whole = self.seen.get((gpu.name, 0, t))
        activity, tick_mj = (whole.activity, whole.tick_mj) if whole else (nothing, None)
        return Look(pool, gpu.name, minute, claims, slices_of(gpu.geometries, t), activity, tick_mj)


def levels(world: World) -> Callable[[str, str, int], int]:
    """(pool, tenant, t) -> the GPUs promised: commitments, and the transfers between them."""
    commitments = [c for c in current(world["commitments"]) if c["state"] in ("active", "ended")]
    transfers = [x for x in current(world["transfers"]) if x["state"] == "active"]

    def level(pool: str, tenant: str, t: int) -> int:
        gpus = sum(c["gpus"] for c in commitments if (c["pool"], c["tenant"]) == (pool, tenant) and in_force(c, t))
        for x in transfers:
            if x["pool"] == pool and in_force(x, t):
                gpus += x["gpus"] * ((x["to_tenant"] == tenant) - (x["from_tenant"] == tenant))
        return gpus

    return level


def books(world: World) -> Books:
    """The ledger of every pool over the world's window, from what was accepted and is current."""
    looker, level, tick_us = _Looker(world), levels(world), world["tick_ms"] * US_PER_MS
    parties = {c["tenant"] for c in world["commitments"]}
    parties |= {x[k] for x in world["transfers"] for k in ("from_tenant", "to_tenant")}
    pools = {fact["pool"] for table in ("placements", "commitments", "transfers") for fact in world[table]}
    alone: dict[Look, int] = defaultdict(int)
    together: dict[tuple[str, int, tuple[Look, ...], tuple[tuple[str, int], ...]], int] = defaultdict(int)
    for t in range(world["from_ms"], world["to_ms"], world["tick_ms"]):
        looks = [look for gpu in looker.gpus if (look := looker.look(gpu, t)) is not None]
        for look in looks:
            alone[look] += 1
        for pool in pools if parties else ():
            promised = tuple((tenant, level(pool, tenant, t)) for tenant in sorted(parties))
            here = tuple(look for look in looks if look.pool == pool)
            together[pool, t // MINUTE_MS * MINUTE_MS, here, promised] += 1
        if not parties:
            for look in looks:
                together[look.pool, look.minute, (look,), ()] += 1
    found = Books()
    for look, ticks in alone.items():
        for entry in entries(look):
            key = Row(look.pool, look.gpu, look.minute, *entry[:6])
            found.us[key] = found.us.get(key, Fraction(0)) + entry.weight * ticks * tick_us
            found.shared |= {key} if entry.weight != 1 else set()
            if look.tick_mj is not None:
                found.mj[key] = found.mj.get(key, Fraction(0)) + entry.weight * ticks * look.tick_mj
    for (pool, minute, looks, promised), ticks in together.items():
        for (tenant, kind), gpus in divided([entry for look in looks for entry in entries(look)], promised).items():
            key = Unheld(pool, minute, tenant, kind)
            found.unheld[key] = found.unheld.get(key, Fraction(0)) + gpus * ticks * tick_us
    return found


def divided(found: Sequence[Entry], promised: Iterable[tuple[str, int]]) -> dict[tuple[str, str], Fraction]:
    """(tenant, kind) -> GPUs of what nobody holds in a pool at a tick: first to those who reserved it (all they want,
    or in proportion where it does not reach), then as unsliced, then as free."""
    held: dict[str, Fraction] = defaultdict(Fraction)
    left = {"unsliced": Fraction(0), "unallocated": Fraction(0)}
    for entry in found:
        if entry.kind in left:
            left[entry.kind] += entry.weight
        else:
            held[entry.tenant] += entry.weight
    want = {tenant: max(Fraction(0), gpus - held[tenant]) for tenant, gpus in promised}
    asked, available = sum(want.values(), Fraction(0)), sum(left.values(), Fraction(0))
    given = min(asked, available)
    unsliced = min(left["unsliced"], available - given)
    out = {("", "unsliced"): unsliced, ("", "free"): available - given - unsliced}
    for tenant, amount in want.items():
        if amount:
            out[tenant, "reserved_unused"] = amount * given / asked
            out[tenant, "overcommitted"] = amount - out[tenant, "reserved_unused"]
    return {key: gpus for key, gpus in out.items() if gpus}
