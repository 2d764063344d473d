"""Facts to spans: who held which part of which GPU, and when. Pure; knows no telemetry.

A span is a stretch of one GPU's time in service of a pool during which nothing changes: its holders and their weights.
Everything that decides a span is content (claim times, ids, revisions), never the order in which facts arrived.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import gcd
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gpuledger.schemas.events import Tenant

__all__ = [
    "OPEN_END_MS",
    "UNATTRIBUTED",
    "UNPLACED_POOL",
    "Conflict",
    "Holders",
    "PoolFacts",
    "Spans",
    "boot_ends",
    "spans",
    "unplaced",
]

Ints = NDArray[np.int64]

OPEN_END_MS = 1 << 46
UNATTRIBUTED = "unattributed"
#: The pool under which allocations on GPUs that no placement knows are shown.
UNPLACED_POOL = "unplaced"
#: Claims of several sources for one job on one GPU count once: the first of these wins.
SOURCES = ("slurm", "kubernetes", "manual", "process")
#: Common denominators beyond this are rounded to it (weights of dozens of unrelated fractions on one GPU).
_MAX_DENOMINATOR = 1 << 40


@dataclass(frozen=True, slots=True)
class Conflict:
    """Something that does not fit, over [from_ms, to_ms)."""

    kind: str
    subject: str
    other: str
    from_ms: int
    to_ms: int
    detail: str


@dataclass(frozen=True, slots=True)
class PoolFacts:
    """What was read for one pool and range, as tables with the columns of the ClickHouse tables, voids left out.

    `placements`: every placement of every GPU that any placement of the pool names. `allocations`: of those GPUs, with
    `named_ms` (latest naming, NULL for none) and `job_ended_ms` (when their job ended, NULL where that is not known).
    `geometries` of those GPUs. `boots`: node, boot_id, start_ms. `commitments` and `transfers` of the pool. `tenants`:
    the account map.
    """

    pool: str
    placements: pa.Table
    geometries: pa.Table
    allocations: pa.Table
    boots: pa.Table
    commitments: pa.Table
    transfers: pa.Table
    tenants: Sequence[Tenant] = ()


@dataclass(frozen=True, slots=True)
class Holders:
    """Who can hold: one entry per (tenant, job, user, instance, epoch, confirmed). Sorted, so that ties fall the same
    way. `epoch` is when the MIG instance was made, 0 where that is not known."""

    tenant: list[str]
    job_id: list[str]
    user: list[str]
    instance: Ints
    epoch: Ints
    unconfirmed: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.tenant)


@dataclass(frozen=True, slots=True)
class Spans:
    """Spans sorted by (gpu, start); times in UTC milliseconds, clipped to the window.

    Entry k of span s (offsets[s] <= k < offsets[s+1]) says that `holder[k]` has weight[k] / denominator[s] of the GPU.
    What is not allocated, max(0, denominator - sum of weights), is `unsliced` as far as the GPU's geometry gives it to
    no MIG instance, else `leftover`. Where the weights sum to more than the denominator they share the GPU in
    proportion (and a conflict says so).
    """

    gpus: list[str]
    holders: Holders
    gpu: Ints
    start: Ints
    end: Ints
    offsets: Ints
    holder: Ints
    weight: Ints
    denominator: Ints
    leftover: Ints
    unsliced: Ints
    conflicts: list[Conflict] = field(default_factory=list[Conflict])


def _strings(table: pa.Table, name: str) -> list[str]:
    return table.column(name).to_pylist()


def _times(table: pa.Table, name: str, null: int) -> Ints:
    return table.column(name).fill_null(null).to_numpy().astype(np.int64)


def _codes(values: pa.Array | pa.ChunkedArray) -> tuple[Ints, list[str]]:
    """Codes that sort as the strings do, and the strings by code."""
    column = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    encoded = column.dictionary_encode()
    names: list[str] = encoded.dictionary.to_pylist()
    order = sorted(range(len(names)), key=names.__getitem__)
    rank = np.empty(len(names), dtype=np.int64)
    rank[order] = np.arange(len(names))
    return rank[encoded.indices.to_numpy()] if names else np.empty(0, np.int64), [names[n] for n in order]


# ------------------------------------------------------------------------------------------------- service


@dataclass(slots=True)
class _Claim:
    claimed_at: int
    node: str
    id: str
    pool: str
    start: int
    end: int

    @property
    def rank(self) -> tuple[int, str, str]:
        """The smallest counts: the newest claim, of equal ones the smaller node, then the smaller fact id."""
        return -self.claimed_at, self.node, self.id


def _winners(claims: Sequence[_Claim], from_ms: int, to_ms: int) -> list[tuple[int, int, _Claim, _Claim | None]]:
    """(start, end, winner, the best claim it beat) over [from, to); pieces without a claim are left out."""
    cuts = sorted({from_ms, to_ms} | {t for c in claims for t in (c.start, c.end) if from_ms < t < to_ms})
    out: list[tuple[int, int, _Claim, _Claim | None]] = []
    for start, end in pairwise(cuts):
        here = sorted((c for c in claims if c.start <= start < c.end), key=lambda claim: claim.rank)
        if here:
            best = here[0]
            rival = next((claim for claim in here if (claim.pool, claim.node) != (best.pool, best.node)), None)
            out.append((start, end, best, rival))
    return out


@dataclass(slots=True)
class _Service:
    """Stretches in which a GPU serves a pool; `mine` where it is this one."""

    gpu: Ints
    start: Ints
    end: Ints
    mine: NDArray[np.bool_]


def _service(facts: PoolFacts, gpu: Ints, from_ms: int, to_ms: int, conflicts: list[Conflict]) -> _Service:
    """`gpu`: the code of each placement's GPU. A GPU with one placement, as nearly all are, needs no comparing."""
    table = facts.placements
    start, end = _times(table, "start_ms", 0), _times(table, "end_ms", OPEN_END_MS)
    inside = (start < to_ms) & (end > from_ms) & (start < end)
    claims = np.bincount(gpu[inside], minlength=int(gpu.max(initial=-1)) + 1)
    pool_code, pools = _codes(table.column("pool"))
    mine = pool_code == (pools.index(facts.pool) if facts.pool in pools else -1)
    alone = np.flatnonzero(inside & (claims[gpu] == 1))
    lo, hi = np.maximum(start, from_ms), np.minimum(end, to_ms)
    parts = [np.stack([gpu[alone], lo[alone], hi[alone], mine[alone]], axis=1)]
    several = np.flatnonzero(inside & (claims[gpu] > 1))
    if len(several):
        parts.append(_contested(facts, several, gpu, (from_ms, to_ms), conflicts))
    rows = np.concatenate(parts).astype(np.int64)
    rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
    return _Service(rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3].astype(bool))


def _contested(
    facts: PoolFacts, rows: Ints, gpu: Ints, window: tuple[int, int], conflicts: list[Conflict]
) -> NDArray[np.int64]:
    """(gpu, start, end, of this pool) of the GPUs that several placements claim."""
    table = facts.placements.take(pa.array(rows))
    by_gpu: dict[int, list[_Claim]] = defaultdict(list)
    columns = (
        gpu[rows].tolist(),
        table.column("claimed_at").cast(pa.int64()).to_pylist(),
        _strings(table, "node"),
        _strings(table, "id"),
        _strings(table, "pool"),
        _times(table, "start_ms", 0).tolist(),
        _times(table, "end_ms", OPEN_END_MS).tolist(),
    )
    names = dict(zip(gpu[rows].tolist(), _strings(table, "gpu"), strict=True))
    for code, claimed_at, node, id_, pool, start_ms, end_ms in zip(*columns, strict=True):
        by_gpu[code].append(_Claim(claimed_at, node, id_, pool, start_ms, end_ms))
    out: list[tuple[int, int, int, bool]] = []
    for code, claims in by_gpu.items():
        for begin, finish, winner, beaten in _winners(claims, *window):
            out.append((code, begin, finish, winner.pool == facts.pool))
            if beaten is not None and facts.pool in (winner.pool, beaten.pool):
                detail = f"{winner.node} in {winner.pool} (newer claim) against {beaten.node} in {beaten.pool}"
                conflicts.append(Conflict("placement", names[code], beaten.id, begin, finish, detail))
    return np.array(out, dtype=np.int64).reshape(-1, 4)


# ------------------------------------------------------------------------------------------------- claims


@dataclass(slots=True)
class _Claims:
    """Parts of allocations with one holder each; `order` sorts by content."""

    gpu: Ints
    start: Ints
    end: Ints
    holder: Ints
    job: Ints
    source: Ints
    num: Ints
    den: Ints
    order: Ints
    id: list[str]


def boot_ends(facts: PoolFacts, open_: NDArray[np.bool_]) -> Ints:
    """Per allocation the start of the next boot of its node, OPEN_END_MS where there is none or it has an end."""
    ends = np.full(facts.allocations.num_rows, OPEN_END_MS, dtype=np.int64)
    if not open_.any() or facts.boots.num_rows == 0:
        return ends
    starts: dict[str, list[tuple[int, str]]] = defaultdict(list)
    since = _times(facts.boots, "start_ms", 0).tolist()
    for node, boot, start in zip(_strings(facts.boots, "node"), _strings(facts.boots, "boot_id"), since, strict=True):
        starts[node].append((start, boot))
    rows = np.flatnonzero(open_)
    some = facts.allocations.select(["node", "boot_id"]).take(pa.array(rows))
    for row, node, boot in zip(rows.tolist(), _strings(some, "node"), _strings(some, "boot_id"), strict=True):
        known = starts.get(node)
        if known is None or len(known) == 1:
            continue
        mine = min((start for start, name in known if name == boot), default=None)
        if mine is not None:
            ends[row] = min((start for start, _ in known if start > mine), default=OPEN_END_MS)
    return ends


def _job_ends(facts: PoolFacts, open_: NDArray[np.bool_]) -> Ints:
    """Per allocation the end of its job, OPEN_END_MS where it is not known or the allocation has an end of its own. A
    job that ended before the allocation began is another run under the same id."""
    ended = _times(facts.allocations, "job_ended_ms", OPEN_END_MS)
    return np.where(open_ & (ended > _times(facts.allocations, "start_ms", 0)), ended, OPEN_END_MS)


def _tenant_parts(
    tenants: Sequence[Tenant], source: str, names: Mapping[str, str], from_ms: int, to_ms: int
) -> list[tuple[int, int, str]]:
    """Who pays for an allocation with these names, over [from, to): account before namespace before user, a rule of
    the source before one of any, then the smaller tenant id."""
    rules = [
        (("account", "namespace", "user").index(rule.match), rule.source is None, tenant.id, rule)
        for tenant in tenants
        for rule in tenant.rules
        if names[rule.match] == rule.value and rule.source in (None, source)
    ]
    rules.sort(key=lambda item: item[:3])
    times = {t for *_, rule in rules for t in (rule.start_ms, rule.end_ms) if t is not None and from_ms < t < to_ms}
    cuts = sorted({from_ms, to_ms} | times)
    parts: list[tuple[int, int, str]] = []
    for start, end in pairwise(cuts):
        who = next(
            (t for _, _, t, r in rules if (r.start_ms or 0) <= start < (OPEN_END_MS if r.end_ms is None else r.end_ms)),
            UNATTRIBUTED,
        )
        if parts and parts[-1][2] == who:
            parts[-1] = (parts[-1][0], end, who)
        else:
            parts.append((start, end, who))
    return parts


def _attribute(
    facts: PoolFacts, rows: Ints, start: Ints, end: Ints, from_ms: int, to_ms: int
) -> tuple[Ints, Ints, Ints, list[str]]:
    """(row, start, end, tenant): every allocation cut where the account map changes."""
    some = facts.allocations.select(["source", "account", "user", "namespace", "tenant"]).take(pa.array(rows))
    known: dict[tuple[str, ...], list[tuple[int, int, str]]] = {}
    out_row: list[int] = []
    out_start: list[int] = []
    out_end: list[int] = []
    out_tenant: list[str] = []
    names = zip(*(_strings(some, name) for name in some.column_names), strict=True)
    for row, begin, finish, key in zip(rows.tolist(), start.tolist(), end.tolist(), names, strict=True):
        parts = known.get(key)
        if parts is None:
            source, account, user, namespace, tenant = key
            who = {"account": account, "user": user, "namespace": namespace}
            parts = [(from_ms, to_ms, tenant)] if tenant else _tenant_parts(facts.tenants, source, who, from_ms, to_ms)
            known[key] = parts
        for part_start, part_end, tenant in parts:
            if begin < part_end and finish > part_start:
                out_row.append(row)
                out_start.append(max(begin, part_start))
                out_end.append(min(finish, part_end))
                out_tenant.append(tenant)
    return np.array(out_row, np.int64), np.array(out_start, np.int64), np.array(out_end, np.int64), out_tenant


def _source_ranks(table: pa.Table) -> Ints:
    code, names = _codes(table.column("source"))
    return np.array([SOURCES.index(name) for name in names], dtype=np.int64)[code] if names else code


def _claims(
    facts: PoolFacts, gpus: Mapping[str, int], from_ms: int, to_ms: int, confirm_ms: int
) -> tuple[_Claims, Holders]:
    """All allocations of the window as claims with one holder each; confirmed and unconfirmed time apart."""
    table = facts.allocations
    start = _times(table, "start_ms", 0)
    explicit = _times(table, "end_ms", OPEN_END_MS)
    open_ = ~table.column("end_ms").is_valid().to_numpy()
    end = np.where(open_, np.minimum(boot_ends(facts, open_), _job_ends(facts, open_)), explicit)
    confirmed = np.where(open_, np.maximum(start, _times(table, "named_ms", 0)) + confirm_ms, OPEN_END_MS)
    code, names = _codes(table.column("gpu"))
    gpu = np.array([gpus.get(name, -1) for name in names], dtype=np.int64)[code] if names else code
    num = _times(table, "weight_num", 0)

    lo, hi = np.maximum(start, from_ms), np.minimum(end, to_ms)
    rows = np.flatnonzero((lo < hi) & (gpu >= 0) & (num > 0))
    row, lo, hi, tenant = _attribute(facts, rows, lo[rows], hi[rows], from_ms, to_ms)
    sure, unsure = lo < np.minimum(hi, confirmed[row]), np.maximum(lo, confirmed[row]) < hi
    pick = np.concatenate([np.flatnonzero(sure), np.flatnonzero(unsure)])
    unconfirmed = np.concatenate([np.zeros(int(sure.sum()), bool), np.ones(int(unsure.sum()), bool)])
    begin = np.concatenate([lo[sure], np.maximum(lo, confirmed[row])[unsure]])
    finish = np.concatenate([np.minimum(hi, confirmed[row])[sure], hi[unsure]])
    row = row[pick]

    taken = table.select(["id", "job_id", "user", "source"]).take(pa.array(row))
    tenant_code, tenants = _codes(pa.array([tenant[n] for n in pick], type=pa.string()))
    job_code, jobs = _codes(taken.column("job_id"))
    user_code, users = _codes(taken.column("user"))
    id_code, ids = _codes(taken.column("id"))
    instance = table.column("instance").to_numpy().astype(np.int64)[row]
    epoch = table.column("epoch_ms").to_numpy().astype(np.int64)[row]
    keys = np.stack([tenant_code, job_code, user_code, instance, epoch, unconfirmed.astype(np.int64)], axis=1)
    unique, holder = np.unique(keys, axis=0, return_inverse=True)
    holders = Holders(
        tenant=[tenants[n] for n in unique[:, 0]],
        job_id=[jobs[n] for n in unique[:, 1]],
        user=[users[n] for n in unique[:, 2]],
        instance=unique[:, 3],
        epoch=unique[:, 4],
        unconfirmed=unique[:, 5].astype(bool),
    )
    claims = _Claims(
        gpu=gpu[row],
        start=begin,
        end=finish,
        holder=holder.reshape(-1).astype(np.int64),
        job=job_code,
        source=_source_ranks(taken),
        num=num[row],
        den=_times(table, "weight_den", 1)[row],
        order=id_code,
        id=[ids[n] for n in id_code],
    )
    return claims, holders


# ------------------------------------------------------------------------------------------------- geometry


@dataclass(slots=True)
class _Geometries:
    """Which geometry is in force, sorted by (gpu, start), disjoint. `unsliced` of `slices` belong to no instance."""

    gpu: Ints
    start: Ints
    end: Ints
    slices: Ints
    unsliced: Ints


def _geometries(facts: PoolFacts, gpus: Mapping[str, int], from_ms: int, to_ms: int) -> _Geometries:
    """Of those in force at an instant the latest start counts, then the smaller node, then the smaller id."""
    table = facts.geometries
    columns = (
        _strings(table, "gpu"),
        _times(table, "start_ms", 0).tolist(),
        _times(table, "end_ms", OPEN_END_MS).tolist(),
        _strings(table, "node"),
        _strings(table, "id"),
        table.column("slices").to_pylist(),
        table.column("sliced").to_pylist(),
    )
    by_gpu: dict[int, list[tuple[Any, ...]]] = defaultdict(list)
    for gpu, start, end, *rest in zip(*columns, strict=True):
        if gpu in gpus and start < min(end, to_ms) and end > from_ms:
            by_gpu[gpus[gpu]].append((start, end, *rest))
    out: list[tuple[int, ...]] = []
    for gpu in sorted(by_gpu):
        known = by_gpu[gpu]
        times = {t for start, end, *_ in known for t in (start, end) if from_ms < t < to_ms}
        for begin, finish in pairwise(sorted({from_ms, to_ms} | times)):
            here = [each for each in known if each[0] <= begin < each[1]]
            if here:
                *_, slices, sliced = min(here, key=lambda each: (-each[0], *each[2:4]))
                out.append((gpu, begin, finish, slices, max(0, slices - sliced)))
    return _Geometries(*np.array(out, dtype=np.int64).reshape(-1, 5).T)


# ------------------------------------------------------------------------------------------------- spans


def _once_per_job(span: Ints, claim: Ints, claims: _Claims) -> NDArray[np.bool_]:
    """False for a claim where a better source claims the same job on the same GPU at the same time."""
    if len(claim) == 0 or (claims.source == claims.source[0]).all():
        return np.ones(len(claim), dtype=bool)
    source = claims.source[claim]
    order = np.lexsort((source, claims.job[claim], span))
    first = np.ones(len(order), dtype=bool)
    first[1:] = (np.diff(span[order]) != 0) | (np.diff(claims.job[claim][order]) != 0)
    best = source[order][np.maximum.accumulate(np.where(first, np.arange(len(order)), 0))]
    keep = np.zeros(len(order), dtype=bool)
    keep[order] = source[order] == best
    return keep


def _common_denominators(den: Ints, offsets: Ints) -> Ints:
    """Least common multiple of each span's denominators, at most _MAX_DENOMINATOR; 1 for a span without holders."""
    out = np.ones(len(offsets) - 1, dtype=np.int64)
    filled = np.flatnonzero(np.diff(offsets) > 0)
    if len(filled) == 0:
        return out
    at = offsets[filled]
    product = np.multiply.reduceat(den.astype(np.float64), at)
    small = product <= _MAX_DENOMINATOR
    out[filled] = np.lcm.reduceat(np.where(np.repeat(small, np.diff(offsets)[filled]), den, 1), at)
    for span in filled[~small].tolist():
        lcm = 1
        for value in {int(d) for d in den[offsets[span] : offsets[span + 1]]}:
            lcm = lcm * value // gcd(lcm, value)
        out[span] = min(lcm, _MAX_DENOMINATOR)
    return out


def _covered(cuts: Ints, begin: Ints, finish: Ints) -> NDArray[np.bool_]:
    """For each cell [cuts[k], cuts[k+1]) whether any [begin, finish) covers it; the bounds are among the cuts."""
    depth = np.zeros(len(cuts) + 1, dtype=np.int64)
    np.add.at(depth, np.searchsorted(cuts, begin), 1)
    np.add.at(depth, np.searchsorted(cuts, finish), -1)
    return np.cumsum(depth)[: len(cuts)] > 0


def _sliced(shapes: _Geometries, begin: Ints, finish: Ints, cuts: Ints) -> tuple[Ints, Ints]:
    """(slices, unsliced of them) of the geometry in force from each of `cuts`; (1, 0) where there is none."""
    if len(begin) == 0:
        return np.ones(len(cuts), dtype=np.int64), np.zeros(len(cuts), dtype=np.int64)
    at = np.maximum(np.searchsorted(begin, cuts, side="right") - 1, 0)
    inside = (begin[at] <= cuts) & (cuts < finish[at])
    return np.where(inside, shapes.slices[at], 1), np.where(inside, shapes.unsliced[at], 0)


def spans(facts: PoolFacts, from_ms: int, to_ms: int, confirm_ms: int) -> Spans:
    """The spans of a pool over [from_ms, to_ms).

    `confirm_ms`: how long an allocation without an end counts after the last batch that named it (DESIGN section 4).
    """
    conflicts: list[Conflict] = []
    placed, gpus = _codes(facts.placements.column("gpu"))
    index = {gpu: n for n, gpu in enumerate(gpus)}
    service = _service(facts, placed, from_ms, to_ms, conflicts)
    claims, holders = _claims(facts, index, from_ms, to_ms, confirm_ms)
    shapes = _geometries(facts, index, from_ms, to_ms)

    width = to_ms - from_ms + 1  # one more than the window: the end of one GPU is not the start of the next
    service_from, service_to = (service.gpu * width + t - from_ms for t in (service.start, service.end))
    claim_from, claim_to = (claims.gpu * width + t - from_ms for t in (claims.start, claims.end))
    shape_from, shape_to = (shapes.gpu * width + t - from_ms for t in (shapes.start, shapes.end))
    cuts = np.unique(np.concatenate([service_from, service_to, claim_from, claim_to, shape_from, shape_to]))
    in_service = _covered(cuts, service_from[service.mine], service_to[service.mine])
    anywhere = _covered(cuts, service_from, service_to)
    length = np.append(np.diff(cuts), 0)

    first, last = np.searchsorted(cuts, claim_from), np.searchsorted(cuts, claim_to)
    count = last - first
    claim = np.repeat(np.arange(len(count)), count)
    cell = np.repeat(first, count) + np.arange(len(claim)) - np.repeat(np.cumsum(count) - count, count)
    for n in np.flatnonzero(~anywhere[cell]).tolist():
        begin = int(cuts[cell[n]] % width) + from_ms
        finish = begin + int(length[cell[n]])
        detail = "the allocation lies outside the GPU's time in service"
        id_, gpu_name = claims.id[claim[n]], gpus[claims.gpu[claim[n]]]
        conflicts.append(Conflict("outside_service", id_, gpu_name, begin, finish, detail))

    kept = np.flatnonzero(in_service)
    number = np.full(len(cuts), -1, dtype=np.int64)
    number[kept] = np.arange(len(kept))
    inside = in_service[cell]
    claim, span = claim[inside], number[cell[inside]]
    once = _once_per_job(span, claim, claims)
    claim, span = claim[once], span[once]
    order = np.lexsort((claims.order[claim], claims.holder[claim], span))
    claim, span = claim[order], span[order]
    offsets = np.searchsorted(span, np.arange(len(kept) + 1))

    denominator = _common_denominators(claims.den[claim], offsets)
    slices, unsliced = _sliced(shapes, shape_from, shape_to, cuts[kept])
    denominator = np.where(denominator * slices <= _MAX_DENOMINATOR, np.lcm(denominator, slices), denominator)
    mine = denominator[span]
    exact = mine % np.maximum(claims.den[claim], 1) == 0
    num, den = claims.num[claim], claims.den[claim]
    weight = np.where(exact, num * (mine // den), num * mine // den)
    total = np.zeros(len(kept), dtype=np.int64)
    np.add.at(total, span, weight)
    left = np.maximum(denominator - total, 0)
    unsliced = np.minimum(left, denominator * unsliced // slices)
    gpu, start = cuts[kept] // width, cuts[kept] % width + from_ms
    end = start + length[kept]
    for n in np.flatnonzero(total > denominator).tolist():
        detail = f"weights sum to {int(total[n])}/{int(denominator[n])}; shared in proportion"
        jobs = sorted({holders.job_id[h] for h in (claims.holder[claim[offsets[n] : offsets[n + 1]]]).tolist()})
        conflicts.append(Conflict("overweight", gpus[int(gpu[n])], ",".join(jobs), int(start[n]), int(end[n]), detail))
    return Spans(
        gpus=gpus,
        holders=holders,
        gpu=gpu,
        start=start,
        end=end,
        offsets=offsets,
        holder=claims.holder[claim],
        weight=weight,
        denominator=denominator,
        leftover=left - unsliced,
        unsliced=unsliced,
        conflicts=conflicts,
    )


def unplaced(allocations: pa.Table, from_ms: int, to_ms: int) -> list[Conflict]:
    """A conflict for every allocation on a GPU that no placement knows, over its time in [from_ms, to_ms)."""
    start, end = _times(allocations, "start_ms", 0), _times(allocations, "end_ms", OPEN_END_MS)
    lo, hi = np.maximum(start, from_ms), np.minimum(end, to_ms)
    names: Any = zip(
        _strings(allocations, "id"),
        _strings(allocations, "gpu"),
        _strings(allocations, "job_id"),
        allocations.column("weight_num").to_pylist(),
        allocations.column("weight_den").to_pylist(),
        lo.tolist(),
        hi.tolist(),
        strict=True,
    )
    return [
        Conflict("unknown_gpu", id_, gpu, begin, finish, f"job {job} holds {num}/{den} of a GPU in no placement")
        for id_, gpu, job, num, den, begin, finish in names
        if begin < finish
    ]
