"""Why the ledger says what it says of one GPU in one minute: reads what is stored and puts `Explanation` together.

The segments are computed again from the GPU's own facts and fragments, by the ledger's function, and compared with the
rows that are stored; nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gpuledger.schemas.events import (
    Allocation,
    AssetCost,
    Commitment,
    EnergyTariff,
    Fact,
    Geometry,
    Job,
    Placement,
    RateCard,
    Tenant,
    Transfer,
)
from gpuledger.streams import ledger_rows
from gpuledger.streams.explain_facts import Learnt, claims, current, histories, moment, overlap, placed
from gpuledger.streams.explain_money import shares
from gpuledger.streams.explain_reads import Reads
from gpuledger.streams.explain_seen import seen, traced
from gpuledger.streams.explanation import Claim, Explanation, Mark, MinuteVersion, Placed, PoolMinute, Seen, Segment
from gpuledger.streams.holders import UNPLACED_POOL
from gpuledger.streams.marks import MINUTE_MS
from gpuledger.streams.observed import FRAGMENT_COLUMNS
from gpuledger.streams.pool_facts import OPEN_END_MS
from gpuledger.streams.recompute import Window, recompute
from gpuledger.streams.recomputer import LedgerRules
from gpuledger.streams.store import KEPT_MS, Store

__all__ = ["UnknownGPU", "VersionMarks", "explain"]

#: (pool, minute, versions oldest first, of the present epoch) → the marks that led to each: see `MinuteVersion.marks`.
VersionMarks = Callable[[str, int, Sequence[MinuteVersion]], Mapping[int, list[Mark]]]


class UnknownGPU(LookupError):
    """Nothing that is stored names the GPU; `close` are known ones with similar names."""

    def __init__(self, gpu: str, close: list[str]) -> None:
        super().__init__(gpu)
        self.gpu = gpu
        self.close = close


@dataclass(frozen=True, slots=True)
class _Known:
    """What the journal says about the GPU, and what of it counts."""

    learnt: list[Learnt]
    placements: list[Placement]
    allocations: list[Allocation]
    jobs: dict[str, Job]
    tenants: list[Tenant]


def explain(
    store: Store,
    rules: LedgerRules,
    gpu: str,
    minute_ms: int,
    *,
    now_ms: int,
    marks: VersionMarks | None = None,
) -> Explanation:
    """Everything about `gpu` in the minute that starts at `minute_ms` (a whole minute).

    Raises:
        UnknownGPU: no fact and, within two days, no telemetry names it.
    """
    reads = Reads(store, gpu, minute_ms)
    known = _known(reads)
    rows = reads.fragments()
    if not known.placements and not known.allocations and not rows and reads.last_seen() is None:
        raise UnknownGPU(gpu, reads.close_names())
    complete_until_ms, held_back_by = _completeness(reads, rules)
    where = placed(known.placements, minute_ms)
    naming = reads.naming(
        (fact.id for fact in known.allocations), (fact.node for fact in known.allocations), rules.confirm_ms
    )
    who = claims(known.allocations, known.jobs, known.tenants, naming, where, minute_ms)
    what = seen(rows)
    asked = _Asked(store, rules, reads, gpu, minute_ms, complete_until_ms, now_ms, marks)
    pools = [_pool(asked, pool, where, who, what) for pool in sorted({each.pool for each in where if each.serves})]
    nodes = {*(each.node for each in where), *(each.node for each in who), *(each.node for each in what)}
    names = {gpu, *(each.id for each in where), *(each.id for each in who)}
    found = Explanation(
        gpu=gpu,
        minute_ms=minute_ms,
        complete_until_ms=complete_until_ms,
        held_back_by=held_back_by,
        notes=[],
        pools=pools,
        placements=where,
        claims=who,
        fragments=what,
        gaps=reads.gaps(nodes),
        conflicts=reads.conflicts(names),
        facts=_relevant(reads, known, who, [each.pool for each in pools], minute_ms),
    )
    return replace(found, notes=_notes(found, known, reads, now_ms))


@dataclass(frozen=True, slots=True)
class _Asked:
    store: Store
    rules: LedgerRules
    reads: Reads
    gpu: str
    minute_ms: int
    complete_until_ms: int
    now_ms: int
    marks: VersionMarks | None

    @property
    def complete(self) -> bool:
        return self.minute_ms < self.complete_until_ms

    @property
    def expired(self) -> bool:
        return self.minute_ms < self.now_ms - KEPT_MS


def _completeness(reads: Reads, rules: LedgerRules) -> tuple[int, str]:
    """Until when minutes are complete, and the partition that decides it."""
    progress = reads.progress()
    gates = [(topic, n) for topic, count in rules.gates.items() for n in range(count)]
    slowest = min(gates, key=lambda gate: (progress.get(gate, 0), gate), default=None)
    if slowest is None:
        return 0, ""
    return rules.complete_until_ms(progress.get(slowest, 0)), f"{slowest[0]}/{slowest[1]}"


# ------------------------------------------------------------------------------------------------- facts


def _known(reads: Reads) -> _Known:
    learnt = reads.naming_gpu(("placement", "geometry", "allocation"))
    jobs = reads.with_ids("job", (each.fact.job_id for each in learnt if isinstance(each.fact, Allocation)))
    tenants = reads.all_of("tenant")
    now = current(learnt)
    return _Known(
        learnt=[*learnt, *jobs, *tenants],
        placements=[fact for fact in now if isinstance(fact, Placement) and fact.gpu == reads.gpu],
        allocations=[fact for fact in now if isinstance(fact, Allocation) and fact.gpu == reads.gpu],
        jobs={fact.id: fact for fact in current(jobs) if isinstance(fact, Job)},
        tenants=[fact for fact in current(tenants) if isinstance(fact, Tenant)],
    )


def _relevant(reads: Reads, known: _Known, who: Sequence[Claim], pools: Sequence[str], minute_ms: int) -> Any:
    """Histories of the facts of which any revision says something about the minute."""
    minute = minute_ms, minute_ms + MINUTE_MS
    of_pools = reads.naming_pools(("commitment", "transfer", "asset_cost", "rate_card"), pools)
    tariffs = {each.fact.tariff for each in of_pools if isinstance(each.fact, AssetCost) and each.fact.tariff}
    learnt = [*known.learnt, *of_pools, *reads.with_ids("energy_tariff", tariffs)]
    payers = {part.tenant for claim in who for part in claim.tenants} | {""}
    revisions = [each.fact for each in known.learnt if isinstance(each.fact, Allocation)]
    named = [fact for fact in revisions if overlap(_interval(fact), minute) is not None]
    jobs = {fact.job_id for fact in named}
    kept = {
        (each.fact.kind, each.fact.id)
        for each in learnt
        if (overlap(_interval(each.fact), minute) is not None and _speaks(each.fact, named, jobs, payers))
    }
    return histories(each for each in learnt if (each.fact.kind, each.fact.id) in kept)


def _interval(fact: Fact) -> tuple[int, int]:
    match fact:
        case Placement() | Geometry() | Allocation() | Commitment() | Transfer() | RateCard() | AssetCost():
            return fact.start_ms, OPEN_END_MS if fact.end_ms is None else fact.end_ms
        case EnergyTariff():
            return fact.prices[0].start_ms, fact.end_ms
        case _:
            return 0, OPEN_END_MS


def _speaks(fact: Fact, named: Sequence[Allocation], jobs: set[str], payers: set[str]) -> bool:
    """Whether a fact can decide anything for these allocations."""
    match fact:
        case Job():
            return fact.id in jobs
        case RateCard():
            return fact.tenant in payers
        case Tenant():
            rules = {(rule.match, rule.value) for rule in fact.rules}
            names = ("account", "namespace", "user")
            return any((name, getattr(one, name)) in rules for one in named if not one.tenant for name in names)
        case _:
            return True


# ------------------------------------------------------------------------------------------------- one pool


def _pool(asked: _Asked, pool: str, where: Sequence[Placed], who: Sequence[Claim], what: Sequence[Seen]) -> PoolMinute:
    service = [part for each in where if each.pool == pool for part in each.serves]
    stored = asked.reads.stored(pool)
    computed = [] if asked.expired else _computed(asked, pool)
    why_not = "" if stored else _why_not_stored(asked, what)
    segments = traced(stored or computed, who, what, service)
    versions = asked.reads.versions(pool)
    if asked.marks is not None and versions:
        epoch = asked.reads.epoch()
        known = asked.marks(pool, asked.minute_ms, [each for each in versions if each.epoch == epoch])
        versions = [replace(each, marks=known.get(each.offset) if each.epoch == epoch else None) for each in versions]
    longest_ms = asked.rules.price_interval_minutes * MINUTE_MS
    return PoolMinute(
        pool=pool,
        complete=asked.complete,
        service_us=sum(end - start for start, end in service) * 1000,
        segments=segments,
        stored=bool(stored),
        why_not=why_not,
        agrees=_amounts(stored) == _amounts(computed) if stored and not asked.expired else None,
        versions=versions,
        unheld=asked.reads.unheld(pool),
        money=shares(asked.reads.charges(pool, longest_ms), segments),
    )


def _why_not_stored(asked: _Asked, what: Sequence[Seen]) -> str:
    if asked.expired:
        return "rows of GPU and minute are kept for 90 days; the hour's are kept"
    if not asked.complete:
        return "the minute is not complete; rows of GPU and minute are written then"
    if not what:
        return "no telemetry of the GPU is stored for the minute: facts alone decide it, and no row is kept for it"
    return "the ledger has not computed the minute since its telemetry came; a dirty mark is on its way, or was lost"


def _amounts(segments: Sequence[Segment]) -> dict[tuple[Any, ...], tuple[int, int | None]]:
    return {
        (each.kind, each.tenant, each.job_id, each.instance, each.activity): (each.gpu_us, each.energy_mj)
        for each in segments
    }


def _computed(asked: _Asked, pool: str) -> list[Segment]:
    """The GPU's segments by the ledger's own function, from its own facts and fragments alone."""
    start, end = asked.minute_ms, asked.minute_ms + MINUTE_MS
    facts = asked.store.pool_facts(pool, start, end)

    def mine(table: pa.Table) -> pa.Table:
        return table.filter(pc.call_function("equal", [table.column("gpu"), asked.gpu]))

    facts = replace(
        facts,
        placements=mine(facts.placements),
        geometries=mine(facts.geometries),
        allocations=mine(facts.allocations),
    )
    buckets = np.array([start, end], dtype=np.int64)
    window = Window(start, end, asked.complete_until_ms, asked.rules.confirm_ms, buckets)
    found = recompute(facts, asked.reads.fragments_table(FRAGMENT_COLUMNS), window)
    names = ("kind", "tenant", "job_id", "instance", "activity", "gpu_us", "energy_mj")
    rows = ledger_rows.gpu_hour_rows(found).select(names).to_pylist()
    segments = [Segment(**row, facts=[], fragments=[]) for row in rows if row["kind"] != "marker"]
    return sorted(segments, key=lambda each: (each.kind, each.tenant, each.job_id, each.instance, each.activity))


# ------------------------------------------------------------------------------------------------- notes


def _notes(found: Explanation, known: _Known, reads: Reads, now_ms: int) -> list[str]:
    """What is not known and why, and what does not fit; empty where all is as it should be."""
    end_ms = found.minute_ms + MINUTE_MS
    notes: list[str] = []
    if found.minute_ms > now_ms:
        notes.append(f"the minute has not begun: it is {moment(now_ms)} now")
    elif found.minute_ms >= found.complete_until_ms:
        notes.append(
            f"the minute is not complete: {found.held_back_by or 'no partition'} has not stored anything from after it "
            f"and the grace time; complete until {moment(found.complete_until_ms)}. What nobody has seen is pending"
        )
    if found.minute_ms < now_ms - KEPT_MS:
        notes.append(
            "telemetry is kept for 90 days and this minute's has expired; hours and charges are kept: gpuledger "
            f"ledger show --rows gpu-hour --gpu {found.gpu} --from {moment(found.minute_ms // 3_600_000 * 3_600_000)}"
        )
    elif not found.fragments and found.minute_ms <= now_ms:
        last = reads.last_seen()
        until = "none in the two days before it or since" if last is None else f"the newest is of {moment(last)}"
        notes.append(f"no telemetry of the GPU is stored for this minute ({until}): what it did is not known")
    if not found.pools:
        notes.append(_not_in_service(known))
    for pool in found.pools:
        if pool.segments and pool.segments_us != pool.service_us:
            notes.append(
                f"pool {pool.pool}: the segments sum to {pool.segments_us} GPU-us, the GPU's time in service is "
                f"{pool.service_us}: run gpuledger audit"
            )
        if pool.agrees is False:
            notes.append(
                f"pool {pool.pool}: computed again from what is stored now, the segments differ from the stored rows: "
                "a dirty mark is on its way (gpuledger status), or was lost (gpuledger audit names it)"
            )
        untraced = [each for each in pool.segments if each.kind in ("held", "unconfirmed") and not each.facts]
        if untraced:
            notes.append(
                f"pool {pool.pool}: no allocation was found for job {untraced[0].job_id}: it is no longer stored"
            )
    if found.gaps:
        notes.append(
            f"{sum(gap.batches for gap in found.gaps)} batches that reach into this minute were dropped by a spool"
        )
    elsewhere = sorted(
        {
            each.fact.id
            for each in known.learnt
            if isinstance(each.fact, Allocation) and _touches(each.fact, found, end_ms)
        }
        - {claim.id for claim in found.claims}
    )
    if elsewhere:
        notes.append(f"said to be here by an earlier revision only: {', '.join(elsewhere)}")
    return notes


def _touches(fact: Allocation, found: Explanation, end_ms: int) -> bool:
    return fact.gpu == found.gpu and overlap(_interval(fact), (found.minute_ms, end_ms)) is not None


def _not_in_service(known: _Known) -> str:
    if not known.placements:
        held = f"; its allocations are conflicts of pool {UNPLACED_POOL}" if known.allocations else ""
        return f"no placement puts the GPU into a pool, so none of its time is accounted{held}"
    spans = [
        f"{moment(fact.start_ms)} to {'now' if fact.end_ms is None else moment(fact.end_ms)} in {fact.pool}"
        for fact in known.placements
        if not fact.void
    ]
    return f"the GPU was in no pool in this minute; it served {'; '.join(spans) or 'nowhere: its placements are void'}"
