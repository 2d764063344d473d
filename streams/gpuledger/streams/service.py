"""Placements to time in service: which pool each GPU serves, and when. Pure.

Of claims that contradict each other the newest counts, and a conflict says so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gpuledger.streams.pool_facts import OPEN_END_MS, Conflict, PoolFacts, codes, strings, times

__all__ = ["Claim", "Service", "service_of"]

Ints = NDArray[np.int64]


@dataclass(slots=True)
class Claim:
    """A placement that covers some of the window."""

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


def _winners(claims: Sequence[Claim], from_ms: int, to_ms: int) -> list[tuple[int, int, Claim, Claim | None]]:
    """(start, end, winner, the best claim it beat) over [from, to); pieces without a claim are left out."""
    cuts = sorted({from_ms, to_ms} | {t for c in claims for t in (c.start, c.end) if from_ms < t < to_ms})
    out: list[tuple[int, int, Claim, Claim | None]] = []
    for start, end in pairwise(cuts):
        here = sorted((c for c in claims if c.start <= start < c.end), key=lambda claim: claim.rank)
        if here:
            best = here[0]
            rival = next((claim for claim in here if (claim.pool, claim.node) != (best.pool, best.node)), None)
            out.append((start, end, best, rival))
    return out


@dataclass(slots=True)
class Service:
    """Stretches in which a GPU serves a pool; `mine` where it is this one."""

    gpu: Ints
    start: Ints
    end: Ints
    mine: NDArray[np.bool_]


def service_of(facts: PoolFacts, gpu: Ints, from_ms: int, to_ms: int, conflicts: list[Conflict]) -> Service:
    """`gpu`: the code of each placement's GPU. A GPU with one placement, as nearly all are, needs no comparing."""
    table = facts.placements
    start, end = times(table, "start_ms", 0), times(table, "end_ms", OPEN_END_MS)
    inside = (start < to_ms) & (end > from_ms) & (start < end)
    claims = np.bincount(gpu[inside], minlength=int(gpu.max(initial=-1)) + 1)
    pool_code, pools = codes(table.column("pool"))
    mine = pool_code == (pools.index(facts.pool) if facts.pool in pools else -1)
    alone = np.flatnonzero(inside & (claims[gpu] == 1))
    lo, hi = np.maximum(start, from_ms), np.minimum(end, to_ms)
    parts = [np.stack([gpu[alone], lo[alone], hi[alone], mine[alone]], axis=1)]
    several = np.flatnonzero(inside & (claims[gpu] > 1))
    if len(several):
        parts.append(_contested(facts, several, gpu, (from_ms, to_ms), conflicts))
    rows = np.concatenate(parts).astype(np.int64)
    rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
    return Service(rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3].astype(bool))


def _contested(
    facts: PoolFacts, rows: Ints, gpu: Ints, window: tuple[int, int], conflicts: list[Conflict]
) -> NDArray[np.int64]:
    """(gpu, start, end, of this pool) of the GPUs that several placements claim."""
    table = facts.placements.take(pa.array(rows))
    by_gpu: dict[int, list[Claim]] = defaultdict(list)
    columns = (
        gpu[rows].tolist(),
        table.column("claimed_at").cast(pa.int64()).to_pylist(),
        strings(table, "node"),
        strings(table, "id"),
        strings(table, "pool"),
        times(table, "start_ms", 0).tolist(),
        times(table, "end_ms", OPEN_END_MS).tolist(),
    )
    names = dict(zip(gpu[rows].tolist(), strings(table, "gpu"), strict=True))
    for code, claimed_at, node, id_, pool, start_ms, end_ms in zip(*columns, strict=True):
        by_gpu[code].append(Claim(claimed_at, node, id_, pool, start_ms, end_ms))
    out: list[tuple[int, int, int, bool]] = []
    for code, claims in by_gpu.items():
        for begin, finish, winner, beaten in _winners(claims, *window):
            out.append((code, begin, finish, winner.pool == facts.pool))
            if beaten is not None and facts.pool in (winner.pool, beaten.pool):
                detail = f"{winner.node} in {winner.pool} (newer claim) against {beaten.node} in {beaten.pool}"
                conflicts.append(Conflict("placement", names[code], beaten.id, begin, finish, detail))
    return np.array(out, dtype=np.int64).reshape(-1, 4)
