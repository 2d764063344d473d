"""Allocations to claims: which holder has which share of a GPU, and when; confirmed and unconfirmed time apart. Pure.

Each allocation is cut where the account map changes, and ends where its own end, its job or a boot says so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gpuledger.finance.charges import UNATTRIBUTED
from gpuledger.schemas.events import Tenant
from gpuledger.streams.pool_facts import OPEN_END_MS, PoolFacts, codes, strings, times

__all__ = ["SOURCES", "Claims", "Holders", "boot_ends", "claims_of"]

Ints = NDArray[np.int64]

#: Claims of several sources for one job on one GPU count once: the first of these wins.
SOURCES = ("slurm", "kubernetes", "manual", "process")


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


@dataclass(slots=True)
class Claims:
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
    since = times(facts.boots, "start_ms", 0).tolist()
    for node, boot, start in zip(strings(facts.boots, "node"), strings(facts.boots, "boot_id"), since, strict=True):
        starts[node].append((start, boot))
    rows = np.flatnonzero(open_)
    some = facts.allocations.select(["node", "boot_id"]).take(pa.array(rows))
    for row, node, boot in zip(rows.tolist(), strings(some, "node"), strings(some, "boot_id"), strict=True):
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
    ended = times(facts.allocations, "job_ended_ms", OPEN_END_MS)
    return np.where(open_ & (ended > times(facts.allocations, "start_ms", 0)), ended, OPEN_END_MS)


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
    changes = {t for *_, rule in rules for t in (rule.start_ms, rule.end_ms) if t is not None and from_ms < t < to_ms}
    cuts = sorted({from_ms, to_ms} | changes)
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
    names = zip(*(strings(some, name) for name in some.column_names), strict=True)
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
    code, names = codes(table.column("source"))
    return np.array([SOURCES.index(name) for name in names], dtype=np.int64)[code] if names else code


def claims_of(
    facts: PoolFacts, gpus: Mapping[str, int], from_ms: int, to_ms: int, confirm_ms: int
) -> tuple[Claims, Holders]:
    """All allocations of the window as claims with one holder each; confirmed and unconfirmed time apart."""
    table = facts.allocations
    start = times(table, "start_ms", 0)
    explicit = times(table, "end_ms", OPEN_END_MS)
    open_ = ~table.column("end_ms").is_valid().to_numpy()
    end = np.where(open_, np.minimum(boot_ends(facts, open_), _job_ends(facts, open_)), explicit)
    confirmed = np.where(open_, np.maximum(start, times(table, "named_ms", 0)) + confirm_ms, OPEN_END_MS)
    code, names = codes(table.column("gpu"))
    gpu = np.array([gpus.get(name, -1) for name in names], dtype=np.int64)[code] if names else code
    num = times(table, "weight_num", 0)

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
    tenant_code, tenants = codes(pa.array([tenant[n] for n in pick], type=pa.string()))
    job_code, jobs = codes(taken.column("job_id"))
    user_code, users = codes(taken.column("user"))
    id_code, ids = codes(taken.column("id"))
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
    claims = Claims(
        gpu=gpu[row],
        start=begin,
        end=finish,
        holder=holder.reshape(-1).astype(np.int64),
        job=job_code,
        source=_source_ranks(taken),
        num=num[row],
        den=times(table, "weight_den", 1)[row],
        order=id_code,
        id=[ids[n] for n in id_code],
    )
    return claims, holders
