"""The facts behind a minute of a GPU: what each revision changed, where the GPU served, who held it and why. Pure.

Says in words what `holders` decides in arrays. What it says is compared with what the ledger computed, so that an
explanation that no longer fits is seen.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import msgspec

from gpuledger.finance.charges import UNATTRIBUTED
from gpuledger.schemas.events import (
    AccountRule,
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
from gpuledger.streams.claims import SOURCES
from gpuledger.streams.explanation import Change, Claim, FactHistory, Placed, Revision, TenantPart
from gpuledger.streams.marks import MINUTE_MS
from gpuledger.streams.pool_facts import OPEN_END_MS

__all__ = ["Learnt", "Naming", "claims", "current", "histories", "moment", "overlap", "placed"]

#: What identifies a revision rather than says something.
_NOT_CONTENT = ("id", "revision", "claimed_at_ms")
_MATCHES = ("account", "namespace", "user")


@dataclass(frozen=True, slots=True)
class Learnt:
    """A revision of a fact as the table `facts` has it."""

    fact: Fact
    rank: int
    topic: str
    partition: int
    offset: int
    recorded_ms: int


@dataclass(frozen=True, slots=True)
class Naming:
    """What else decides how long an open allocation lasts: when batches named each, the starts of each node's boots,
    and how long a naming confirms."""

    named_ms: Mapping[str, int]
    boots: Mapping[str, Mapping[str, int]]
    confirm_ms: int


def moment(at_ms: int) -> str:
    """UTC as people and JSON read it."""
    at = datetime.fromtimestamp(0, UTC) + timedelta(milliseconds=at_ms)
    return at.isoformat(timespec="milliseconds" if at_ms % 1000 else "seconds").replace("+00:00", "Z")


def overlap(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int] | None:
    """What two half-open ranges share; None for nothing."""
    start, end = max(a[0], b[0]), min(a[1], b[1])
    return (start, end) if start < end else None


# ------------------------------------------------------------------------------------------------- revisions


def _shown(name: str, value: Any) -> str | None:
    if value is None:
        return None
    if name.endswith("_ms") and isinstance(value, int) and value:
        return moment(value)
    plain = msgspec.to_builtins(value)
    return plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False)


def _changes(before: Fact, after: Fact) -> list[Change]:
    fields = [name for name in after.__struct_fields__ if name not in _NOT_CONTENT]
    pairs = ((name, getattr(before, name), getattr(after, name)) for name in fields)
    return [Change(name, _shown(name, old), _shown(name, new)) for name, old, new in pairs if old != new]


def _about(fact: Fact) -> str:
    match fact:
        case Placement():
            return f"node {fact.node}, pool {fact.pool}"
        case Geometry():
            return f"{len(fact.instances)} instances, {fact.sliced} of {fact.slices} slices"
        case Allocation():
            part = "" if fact.weight_num == fact.weight_den else f", {fact.weight_num}/{fact.weight_den} of the GPU"
            return f"job {fact.job_id}{part}, by {fact.source}"
        case Job():
            return f"state {fact.state or 'not told'}, by {fact.source}"
        case Commitment():
            return f"{fact.gpus} GPUs of {fact.pool} for {fact.tenant}, {fact.state}"
        case Transfer():
            return f"{fact.gpus} GPUs of {fact.pool} from {fact.from_tenant} to {fact.to_tenant}, {fact.state}"
        case Tenant():
            return f"{len(fact.rules)} rules of the account map"
        case AssetCost():
            return f"{fact.period_cost} {fact.currency} for the period"
        case RateCard():
            return f"{fact.per_gpu_hour} {fact.currency} per GPU-hour of {fact.pool} for {fact.tenant or 'everybody'}"
        case EnergyTariff():
            return f"{len(fact.prices)} prices in {fact.currency} until {moment(fact.end_ms)}"
        case _:
            return fact.kind


def histories(learnt: Iterable[Learnt]) -> list[FactHistory]:
    """Every fact with its revisions in order of rank. A revision that was heard several times was learnt the first."""
    by_fact: dict[tuple[str, str], dict[int, Learnt]] = {}
    for each in learnt:
        of_rank = by_fact.setdefault((each.fact.kind, each.fact.id), {})
        before = of_rank.get(each.rank)
        if before is None or (each.recorded_ms, each.offset) < (before.recorded_ms, before.offset):
            of_rank[each.rank] = each
    return [
        _history([of_rank[rank] for rank in sorted(of_rank)])
        for _, of_rank in sorted(by_fact.items(), key=lambda item: item[0])
    ]


def _history(ordered: Sequence[Learnt]) -> FactHistory:
    revisions: list[Revision] = []
    for n, each in enumerate(ordered):
        newer = ordered[n + 1 :]
        late = any((other.recorded_ms, other.offset) < (each.recorded_ms, each.offset) for other in newer)
        revisions.append(
            Revision(
                revision=each.fact.revision,
                claimed_ms=each.fact.claimed_at_ms,
                learnt_ms=each.recorded_ms,
                topic=each.topic,
                partition=each.partition,
                offset=each.offset,
                state="counts" if not newer else "late" if late else "superseded",
                changes=_changes(ordered[n - 1].fact, each.fact) if n else [],
            )
        )
    last = ordered[-1].fact
    return FactHistory(last.kind, last.id, _about(last), revisions)


def current(learnt: Iterable[Learnt]) -> list[Fact]:
    """The revision of each fact that counts, sorted by kind and id."""
    best: dict[tuple[str, str], Learnt] = {}
    for each in learnt:
        key = each.fact.kind, each.fact.id
        if key not in best or each.rank > best[key].rank:
            best[key] = each
    return [best[key].fact for key in sorted(best)]


# ------------------------------------------------------------------------------------------------- placements


def placed(facts: Iterable[Placement], minute_ms: int) -> list[Placed]:
    """The placements of one GPU that touch the minute, with where each decides: the newer claim, then the smaller node,
    then the smaller id."""
    minute = minute_ms, minute_ms + MINUTE_MS
    here = [fact for fact in facts if not fact.void and overlap(_interval(fact), minute)]
    here.sort(key=lambda fact: (-fact.claimed_at_ms, fact.node, fact.id))
    cuts = sorted({*minute, *(t for fact in here for t in _interval(fact) if minute[0] < t < minute[1])})
    serves: dict[str, list[tuple[int, int]]] = {fact.id: [] for fact in here}
    beaten: dict[str, str] = {}
    for start, end in pairwise(cuts):
        alive = [fact for fact in here if _interval(fact)[0] <= start < _interval(fact)[1]]
        for loser in alive[1:]:
            beaten.setdefault(loser.id, alive[0].id)
        if alive:
            _extend(serves[alive[0].id], start, end)
    return [
        Placed(f.id, f.node, f.pool, f.start_ms, f.end_ms, f.claimed_at_ms, serves[f.id], beaten.get(f.id, ""))
        for f in here
    ]


def _interval(fact: Placement | Geometry | Allocation | Commitment | Transfer) -> tuple[int, int]:
    return fact.start_ms, OPEN_END_MS if fact.end_ms is None else fact.end_ms


def _extend(ranges: list[tuple[int, int]], start: int, end: int) -> None:
    """Adds a range after the others; touching ones become one."""
    if ranges and ranges[-1][1] == start:
        ranges[-1] = (ranges[-1][0], end)
    else:
        ranges.append((start, end))


# ------------------------------------------------------------------------------------------------- claims


def _ends(fact: Allocation, jobs: Mapping[str, Job], naming: Naming) -> tuple[int | None, str]:
    """When an allocation ends, and what ended it: its source; else the end of its job or the next boot of its node."""
    if fact.end_ms is not None:
        return fact.end_ms, "its source"
    ends: list[tuple[int, str]] = []
    job = jobs.get(fact.job_id)
    if job is not None and job.ended_ms is not None and job.ended_ms > fact.start_ms:
        ends.append((job.ended_ms, f"job {job.id}"))
    boots = naming.boots.get(fact.node, {})
    mine = boots.get(fact.boot_id)
    later = [(start, boot) for boot, start in boots.items() if mine is not None and start > mine]
    if later:
        ends.append((min(later)[0], f"boot {min(later)[1]} of node {fact.node}"))
    return min(ends) if ends else (None, "")


def _rules(fact: Allocation, tenants: Sequence[Tenant]) -> list[tuple[Tenant, AccountRule]]:
    """The rules of the account map that match, the first in force counts: account before namespace before user, a rule
    of the source before one of any, then the smaller tenant."""
    found = [
        ((_order(rule), rule.source is None, tenant.id), tenant, rule)
        for tenant in tenants
        for rule in tenant.rules
        if getattr(fact, rule.match) == rule.value and rule.source in (None, fact.source)
    ]
    found.sort(key=lambda item: item[0])
    return [(tenant, rule) for _, tenant, rule in found]


def _order(rule: AccountRule) -> int:
    return _MATCHES.index(rule.match)


def _tenants(fact: Allocation, tenants: Sequence[Tenant], minute_ms: int) -> list[TenantPart]:
    minute = minute_ms, minute_ms + MINUTE_MS
    if fact.tenant:
        return [TenantPart(fact.tenant, *minute, f"{fact.source} names the tenant")]
    rules = _rules(fact, tenants)
    cuts = {t for _, rule in rules for t in (rule.start_ms, rule.end_ms) if t is not None and minute[0] < t < minute[1]}
    parts: list[TenantPart] = []
    for start, end in pairwise(sorted({*minute, *cuts})):
        tenant, why = UNATTRIBUTED, _no_rule(fact, bool(rules))
        for owner, rule in rules:
            if (rule.start_ms or 0) <= start < (OPEN_END_MS if rule.end_ms is None else rule.end_ms):
                tenant, why = owner.id, _rule(rule)
                break
        if parts and (parts[-1].tenant, parts[-1].because) == (tenant, why):
            start = parts.pop().start_ms
        parts.append(TenantPart(tenant, start, end, why))
    return parts


def _rule(rule: AccountRule) -> str:
    since = "" if rule.start_ms is None else f" from {moment(rule.start_ms)}"
    until = "" if rule.end_ms is None else f" until {moment(rule.end_ms)}"
    return f"account map: {rule.match} = {rule.value}, source {rule.source or 'any'}{since}{until}"


def _no_rule(fact: Allocation, expired: bool) -> str:
    names = [f"{name} {getattr(fact, name)}" for name in _MATCHES if getattr(fact, name)]
    if expired:
        return f"the account map's rules for {', '.join(names)} are not in force then"
    return f"no rule of the account map matches {', '.join(names) or 'an allocation without names'}"


def claims(
    allocations: Iterable[Allocation],
    jobs: Mapping[str, Job],
    tenants: Sequence[Tenant],
    naming: Naming,
    where: Sequence[Placed],
    minute_ms: int,
) -> list[Claim]:
    """The allocations on one GPU that touch the minute, with the stretches in which each counts and why not elsewhere.
    `where` is what `placed` says of the GPU."""
    minute = minute_ms, minute_ms + MINUTE_MS
    lives: list[tuple[Allocation, tuple[int, int] | None, int | None, str]] = []
    for fact in allocations:
        ends_ms, ended_by = _ends(fact, jobs, naming)
        if overlap(_interval(fact), minute) is not None:
            alive = overlap((fact.start_ms, OPEN_END_MS if ends_ms is None else ends_ms), minute)
            lives.append((fact, alive, ends_ms, ended_by))
    service = [part for each in where for part in each.serves]
    cuts = {*minute, *(t for _, alive, _, _ in lives for t in alive or ()), *(t for part in service for t in part)}
    counts: dict[str, list[tuple[int, int]]] = {fact.id: [] for fact, *_ in lives}
    why_not: dict[str, str] = {}
    for start, end in pairwise(sorted(cuts)):
        here = [fact for fact, alive, _, _ in lives if _takes_part(fact, alive, start, why_not)]
        in_service = any(a <= start < b for a, b in service)
        for fact in here:
            better = [f for f in here if f.job_id == fact.job_id and _source(f) < _source(fact)]
            if not in_service:
                why_not[fact.id] = "the GPU is in no pool then"
            elif better:
                why_not[fact.id] = f"{better[0].source} claims the same job too ({better[0].id}), and comes first"
            else:
                _extend(counts[fact.id], start, end)
    out: list[Claim] = []
    for fact, _, ends_ms, ended_by in sorted(lives, key=lambda item: item[0].id):
        named_ms = naming.named_ms.get(fact.id)
        until = None if fact.end_ms is not None else max(fact.start_ms, named_ms or 0) + naming.confirm_ms
        out.append(
            Claim(
                id=fact.id,
                job_id=fact.job_id,
                source=fact.source,
                user=fact.user,
                node=fact.node,
                instance=fact.instance,
                epoch_ms=fact.epoch_ms,
                weight=f"{fact.weight_num}/{fact.weight_den}",
                start_ms=fact.start_ms,
                end_ms=fact.end_ms,
                ends_ms=ends_ms,
                ended_by=ended_by,
                named_ms=named_ms,
                confirmed_until_ms=until,
                tenants=_tenants(fact, tenants, minute_ms),
                counts=counts[fact.id],
                not_counted=why_not.get(fact.id, "" if counts[fact.id] else f"it had ended by then ({ended_by})"),
            )
        )
    return out


def _takes_part(fact: Allocation, alive: tuple[int, int] | None, at_ms: int, why_not: dict[str, str]) -> bool:
    if fact.void:
        why_not[fact.id] = "it is void: it never happened"
    elif fact.weight_num == 0:
        why_not[fact.id] = "its weight is 0"
    return not fact.void and fact.weight_num > 0 and alive is not None and alive[0] <= at_ms < alive[1]


def _source(fact: Allocation) -> int:
    return SOURCES.index(fact.source)
