"""What nobody holds, divided: reserved-unused per tenant, free, unsliced, and what was promised beyond what there is.

At every instant reserved-unused = max(0, committed - held), of what no MIG instance has last; the rest is free or
unsliced. When the claims exceed what there is they share it by largest remainder, and the excess is `overcommitted`, a
quantity that is shown and costs nothing. Pure.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gpuledger.finance.apportion import apportion_groups
from gpuledger.streams.holders import Spans
from gpuledger.streams.pieces import MINUTE_MS, US_PER_MS, Pieces, expand
from gpuledger.streams.pool_facts import OPEN_END_MS, Conflict, PoolFacts

__all__ = ["Levels", "Unheld", "levels", "unheld"]

Ints = NDArray[np.int64]

#: Shared pieces meet every change of any holder while they last: pairs of the two that are in memory at once, about.
_PAIRS_AT_ONCE = 50_000
_COUNTED_STATES = ("active", "ended")


@dataclass(frozen=True, slots=True)
class Levels:
    """GPUs committed per tenant: `gpus[t, k]` from `times[k]` to `times[k + 1]` (the window's end after the last)."""

    tenants: list[str]
    times: Ints
    gpus: Ints


@dataclass(frozen=True, slots=True)
class Unheld:
    """GPU-us per minute of the window; rows of the matrices are `tenants`, columns minutes."""

    tenants: list[str]
    reserved_us: Ints
    overcommitted_us: Ints
    free_us: Ints
    unsliced_us: Ints


def _rows(table: pa.Table, *names: str) -> zip[tuple[object, ...]]:
    return zip(*(table.column(name).to_pylist() for name in names), strict=True)


def levels(facts: PoolFacts, from_ms: int, to_ms: int, conflicts: list[Conflict]) -> Levels:
    """Commitments and the transfers between them, as steps over the window. A transfer of more than its giver has is
    applied and shown as a conflict."""
    steps: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))

    def step(tenant: object, gpus: int, start: object, end: object) -> None:
        begin = max(int(str(start)), from_ms)
        finish = min(OPEN_END_MS if end is None else int(str(end)), to_ms)
        if begin < finish:
            steps[str(tenant)][begin] += gpus
            if finish < to_ms:
                steps[str(tenant)][finish] -= gpus

    for tenant, gpus, start, end, state in _rows(facts.commitments, "tenant", "gpus", "start_ms", "end_ms", "state"):
        if state in _COUNTED_STATES:
            step(tenant, int(str(gpus)), start, end)
    names = ("from_tenant", "to_tenant", "gpus", "start_ms", "end_ms", "state")
    for giver, taker, gpus, start, end, state in _rows(facts.transfers, *names):
        if state == "active":
            step(giver, -int(str(gpus)), start, end)
            step(taker, int(str(gpus)), start, end)
    tenants = sorted(steps)
    times = sorted({from_ms} | {t for changes in steps.values() for t in changes})
    gpus_by_time = np.zeros((len(tenants), len(times)), dtype=np.int64)
    for row, tenant in enumerate(tenants):
        for column, time in enumerate(times):
            gpus_by_time[row, column] = steps[tenant].get(time, 0)
    held = np.cumsum(gpus_by_time, axis=1)
    for row, column in zip(*(axis.tolist() for axis in np.nonzero(held < 0)), strict=True):
        until = times[column + 1] if column + 1 < len(times) else to_ms
        detail = f"commitments less transfers are {int(held[row, column])} GPUs"
        conflicts.append(Conflict("transfer_beyond_commitment", tenants[row], facts.pool, times[column], until, detail))
    return Levels(tenants, np.array(times, dtype=np.int64), held)


def _held(pieces: Pieces, row_of_holder: Ints, rows: int, cuts: Ints) -> Ints:
    """GPU-us per row (tenant, or unsliced) and interval between cuts, in integers that sum to each minute's amounts."""
    entry = np.flatnonzero(pieces.holder != pieces.unallocated)
    piece = pieces.piece[entry]
    row = row_of_holder[pieces.holder[entry]]
    first = np.searchsorted(cuts, pieces.start[piece])
    last = np.searchsorted(cuts, pieces.start[piece] + pieces.length[piece] * pieces.count[piece])
    whole = pieces.amount[entry] == pieces.length[piece] * US_PER_MS
    steps = np.zeros((rows, len(cuts)), dtype=np.int64)
    np.add.at(steps, (row[whole], first[whole]), 1)
    np.add.at(steps, (row[whole], last[whole]), -1)
    held = np.cumsum(steps, axis=1)[:, :-1] * (np.diff(cuts) * US_PER_MS)

    part = np.flatnonzero(~whole)
    pairs = int((last[part] - first[part]).sum())
    for some in np.array_split(part, pairs // _PAIRS_AT_ONCE + 1):
        owner, position = expand(last[some] - first[some])
        owner = some[owner]
        cell = first[owner] + position
        begin = np.maximum(pieces.start[piece[owner]], cuts[cell] // MINUTE_MS * MINUTE_MS)
        amount, length = pieces.amount[entry[owner]], pieces.length[piece[owner]]
        share = amount * (cuts[cell + 1] - begin) // length - amount * (cuts[cell] - begin) // length
        np.add.at(held, (row[owner], cell), share)
    return held


def _share(available: Ints, want: Ints) -> Ints:
    """What each tenant (row) gets of `available` per interval: all it wants, or its part by largest remainder."""
    got = want.copy()
    short = np.flatnonzero(want.sum(axis=0) > np.maximum(available, 0))
    if len(short):
        group = np.repeat(np.arange(len(short)), want.shape[0]).astype(np.intp)
        weights = want[:, short].T.reshape(-1)
        parts = apportion_groups(np.maximum(available[short], 0), group, weights)
        got[:, short] = parts.reshape(len(short), -1).T
    return got


def unheld(
    facts: PoolFacts, spans: Spans, pieces: Pieces, from_ms: int, to_ms: int, conflicts: list[Conflict]
) -> Unheld:
    """Divides the unallocated time of every minute of the window, exactly."""
    level = levels(facts, from_ms, to_ms, conflicts)
    tenants, minutes = level.tenants, (to_ms - from_ms) // MINUTE_MS
    bounds = np.arange(from_ms, to_ms + 1, MINUTE_MS)
    cuts = np.unique(np.concatenate([bounds, spans.start, spans.end, level.times])) if tenants else bounds
    length_us = np.diff(cuts) * US_PER_MS

    index = {tenant: n for n, tenant in enumerate(tenants)}
    others, unsliced = len(tenants), len(tenants) + 1
    rows = [index.get(tenant, others) for tenant in spans.holders.tenant]
    row_of_holder = np.array([*rows, others, unsliced], dtype=np.int64)
    serving = np.zeros(len(cuts), dtype=np.int64)
    if tenants:
        np.add.at(serving, np.searchsorted(cuts, spans.start), 1)
        np.add.at(serving, np.searchsorted(cuts, spans.end), -1)
        held = _held(pieces, row_of_holder, len(tenants) + 2, cuts)
        shapeless = held[unsliced]
        available = np.cumsum(serving)[:-1] * length_us - held[:unsliced].sum(axis=0)
    else:
        held = np.zeros((2, minutes), dtype=np.int64)
        shapeless = _per_minute(pieces, pieces.holder == pieces.unsliced, from_ms, minutes)
        available = _per_minute(pieces, pieces.holder >= pieces.unallocated, from_ms, minutes)
    of_level = np.searchsorted(level.times, cuts[:-1], side="right") - 1
    want = np.maximum(level.gpus[:, of_level] * length_us - held[:others], 0)
    got = _share(available, want)

    at = np.searchsorted(cuts, bounds[:-1])
    reserved = np.add.reduceat(got, at, axis=1) if tenants else np.zeros((0, minutes), dtype=np.int64)
    wanted = np.add.reduceat(want, at, axis=1) if tenants else reserved
    total = np.add.reduceat(available, at)
    # Cutting a shared GPU's minute can leave one microsecond too many in an interval: the minute decides.
    short = np.flatnonzero(reserved.sum(axis=0) > total)
    reserved[:, short] = _share(total[short], reserved[:, short])
    rest = total - reserved.sum(axis=0)
    # A claim takes what is in no instance last, so that as much of it as possible is seen as unsliced.
    beside = np.maximum(np.minimum(shapeless, available - got.sum(axis=0)), 0)
    unclaimed = np.minimum(np.add.reduceat(beside, at), rest)
    return Unheld(tenants, reserved, wanted - reserved, rest - unclaimed, unclaimed)


def _per_minute(pieces: Pieces, chosen: NDArray[np.bool_], from_ms: int, minutes: int) -> Ints:
    """GPU-us per minute of the chosen entries."""
    entry = np.flatnonzero(chosen)
    piece = pieces.piece[entry]
    first = pieces.minute[piece] - from_ms // MINUTE_MS
    steps = np.zeros(minutes + 1, dtype=np.int64)
    np.add.at(steps, first, pieces.amount[entry])
    np.add.at(steps, first + pieces.count[piece], -pieces.amount[entry])
    return np.cumsum(steps)[:-1]
