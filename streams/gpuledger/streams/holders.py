"""Facts to spans: who held which part of which GPU, and when. Pure; knows no telemetry.

A span is a stretch of one GPU's time in service of a pool during which nothing changes: its holders and their weights.
Everything that decides a span is content (claim times, ids, revisions), never the order in which facts arrived.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import gcd
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gpuledger.streams.claims import Claims, Holders, claims_of
from gpuledger.streams.geometries import geometries_of, slices_at
from gpuledger.streams.pool_facts import OPEN_END_MS, Conflict, PoolFacts, codes, strings, times
from gpuledger.streams.service import service_of

__all__ = ["UNPLACED_POOL", "Spans", "spans", "unplaced"]

Ints = NDArray[np.int64]

#: The pool under which allocations on GPUs that no placement knows are shown.
UNPLACED_POOL = "unplaced"
#: Common denominators beyond this are rounded to it (weights of dozens of unrelated fractions on one GPU).
_MAX_DENOMINATOR = 1 << 40


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


def _once_per_job(span: Ints, claim: Ints, claims: Claims) -> NDArray[np.bool_]:
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


def spans(facts: PoolFacts, from_ms: int, to_ms: int, confirm_ms: int) -> Spans:
    """The spans of a pool over [from_ms, to_ms).

    `confirm_ms`: how long an allocation without an end counts after the last batch that named it (DESIGN section 4).
    """
    conflicts: list[Conflict] = []
    placed, gpus = codes(facts.placements.column("gpu"))
    index = {gpu: n for n, gpu in enumerate(gpus)}
    service = service_of(facts, placed, from_ms, to_ms, conflicts)
    claims, holders = claims_of(facts, index, from_ms, to_ms, confirm_ms)
    shapes = geometries_of(facts, index, from_ms, to_ms)

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
    slices, unsliced = slices_at(shapes, shape_from, shape_to, cuts[kept])
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
    start, end = times(allocations, "start_ms", 0), times(allocations, "end_ms", OPEN_END_MS)
    lo, hi = np.maximum(start, from_ms), np.minimum(end, to_ms)
    names: Any = zip(
        strings(allocations, "id"),
        strings(allocations, "gpu"),
        strings(allocations, "job_id"),
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
