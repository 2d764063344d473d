"""Spans to pieces: held time in integer GPU-microseconds, apportioned once per span and minute. Pure.

A long span is one piece for all its whole minutes, because each of them gets the same amounts: a trace without
telemetry costs as many pieces as it has facts, not as many as it has minutes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpuledger.finance.apportion import apportion_groups
from gpuledger.streams.holders import Spans

__all__ = ["MINUTE_MS", "US_PER_MS", "Pieces", "expand", "pieces"]

Ints = NDArray[np.int64]

MINUTE_MS = 60_000
US_PER_MS = 1000


@dataclass(frozen=True, slots=True)
class Pieces:
    """Pieces sorted by (gpu, start), and the entries (holders and what is left) of each.

    Piece p lies in `count[p]` minutes from minute `minute[p]` (since 1970): a part [start, start + length) of one, or
    `count` whole ones (length 60,000 ms each). Entry k belongs to piece `piece[k]` and gives `amount[k]` GPU-us *per
    minute* to `holder[k]`; the holders `unallocated` and `unsliced` (the last codes) are nobody: capacity that no
    allocation holds, and capacity that no MIG instance has. Amounts of a piece sum to 1000 x length.
    """

    span: Ints
    gpu: Ints
    minute: Ints
    count: Ints
    start: Ints
    length: Ints
    piece: Ints
    holder: Ints
    weight: Ints
    amount: Ints
    offsets: Ints
    unallocated: int
    unsliced: int


def expand(counts: Ints) -> tuple[Ints, Ints]:
    """(owner, position) of the flattened ranges 0..counts[owner)-1."""
    owner = np.repeat(np.arange(len(counts)), counts)
    position = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    return owner, position


def _cut(spans: Spans, complete_until_ms: int) -> tuple[Ints, Ints, Ints, Ints]:
    """(span, start, length, count): head, whole minutes before and after `complete_until_ms`, tail of every span."""
    number = np.arange(len(spans.start))
    first_whole = -(-spans.start // MINUTE_MS) * MINUTE_MS
    last_whole = spans.end // MINUTE_MS * MINUTE_MS
    border = complete_until_ms // MINUTE_MS * MINUTE_MS
    middle = np.clip(border, first_whole, np.maximum(last_whole, first_whole))
    head = np.flatnonzero(spans.start < np.minimum(first_whole, spans.end))
    early = np.flatnonzero((first_whole < last_whole) & (first_whole < middle))
    late = np.flatnonzero((first_whole < last_whole) & (middle < last_whole))
    tail = np.flatnonzero((last_whole < spans.end) & (last_whole >= first_whole))
    head_end = np.minimum(first_whole, spans.end)
    span = np.concatenate([number[head], number[early], number[late], number[tail]])
    start = np.concatenate([spans.start[head], first_whole[early], middle[late], last_whole[tail]])
    whole = np.full(len(early) + len(late), MINUTE_MS, dtype=np.int64)
    length = np.concatenate([head_end[head] - spans.start[head], whole, spans.end[tail] - last_whole[tail]])
    minutes = np.concatenate([middle[early] - first_whole[early], last_whole[late] - middle[late]]) // MINUTE_MS
    count = np.concatenate([np.ones(len(head), np.int64), minutes, np.ones(len(tail), np.int64)])
    order = np.lexsort((start, span))
    return span[order], start[order], length[order], count[order]


def pieces(spans: Spans, complete_until_ms: int) -> Pieces:
    """Cuts every span at minutes and apportions each piece to its holders by largest remainder.

    Whole minutes are also cut at `complete_until_ms`, so that a piece is complete or not.
    """
    span, start, length, count = _cut(spans, complete_until_ms)
    unallocated = len(spans.holders)
    unsliced = unallocated + 1
    holders = np.diff(spans.offsets)[span]
    piece, position = expand(holders + 2)
    nobody = position - holders[piece]  # 0: unallocated, 1: unsliced
    source = np.where(nobody >= 0, 0, spans.offsets[span[piece]] + position)
    weights = spans.weight if len(spans.weight) else np.zeros(1, dtype=np.int64)
    names = spans.holder if len(spans.holder) else np.zeros(1, dtype=np.int64)
    left = np.where(nobody == 0, spans.leftover[span[piece]], spans.unsliced[span[piece]])
    weight = np.where(nobody >= 0, left, weights[source])
    holder = np.where(nobody >= 0, unallocated + nobody, names[source])
    kept = weight > 0
    piece, holder, weight = piece[kept], holder[kept], weight[kept]

    entries = np.bincount(piece, minlength=len(span))
    alone = entries[piece] == 1
    amount = length[piece] * US_PER_MS
    shared = np.flatnonzero(~alone)
    if len(shared):
        _, group = np.unique(piece[shared], return_inverse=True)
        totals = length[np.unique(piece[shared])] * US_PER_MS
        amount[shared] = apportion_groups(totals, group.astype(np.intp), weight[shared])
    return Pieces(
        span=span,
        gpu=spans.gpu[span],
        minute=start // MINUTE_MS,
        count=count,
        start=start,
        length=length,
        piece=piece,
        holder=holder,
        weight=weight,
        amount=amount,
        offsets=np.searchsorted(piece, np.arange(len(span) + 1)),
        unallocated=unallocated,
        unsliced=unsliced,
    )
