"""Whether every minute was computed from all that is stored: its marker's numbers against those of today's facts and
fragments. Sums alone are blind to a lost mark, after which every minute still adds up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpuledger.streams.audit_checks import MOST_ROWS, Finding
from gpuledger.streams.audit_sums import Grid, Places
from gpuledger.streams.fingerprints import FACTS_FORMULA, facts_hashes
from gpuledger.streams.marks import MINUTE_MS
from gpuledger.streams.pool_facts import PoolFacts
from gpuledger.streams.store import Store

__all__ = ["PoolMinutes", "differing_minutes", "pool_fragments", "print_findings", "written_until"]

Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class PoolMinutes:
    """One pool's minutes of [from_ms, to_ms): how many fragments are `seen` now, and the sum of their `hashes`."""

    pool: str
    from_ms: int
    to_ms: int
    markers: Places
    seen: Ints
    hashes: Hashes


def differing_minutes(total: Places, markers: Mapping[str, Places], from_ms: int, to_ms: int, kept_ms: int) -> Mask:
    """Minutes in which the fragments of all GPUs are not those that the pools' markers name, all together.

    Where they are, each pool's are, too: a fragment belongs to the pools that have a placement of its GPU, so for one
    pool to have too much of what another lacks a placement must have changed, which the facts' hash shows.
    """
    stored = Grid(total, from_ms, to_ms, MINUTE_MS)
    named = np.zeros((to_ms - from_ms) // MINUTE_MS, dtype=np.uint64)
    hashes = named.copy()
    for places in markers.values():
        grid = Grid(places, from_ms, to_ms, MINUTE_MS)
        named += grid["fragments"].astype(np.uint64)
        hashes += grid["fragments_hash"].astype(np.uint64)
    differ = (stored["fragments"].astype(np.uint64) != named) | (stored["hash"].astype(np.uint64) != hashes)
    return differ & (from_ms + np.arange(len(named)) * MINUTE_MS >= kept_ms)


def pool_fragments(
    store: Store, pool: str, markers: Places, from_ms: int, to_ms: int, differ: Mask, merge_minutes: int = 30
) -> PoolMinutes:
    """The pool's fragments: read where minutes `differ`, as a recompute reads them, and elsewhere as named."""
    grid = Grid(markers, from_ms, to_ms, MINUTE_MS)
    seen, hashes = grid["fragments"].astype(np.int64), grid["fragments_hash"].astype(np.uint64)
    for first, last in _stretches(np.flatnonzero(differ).tolist(), merge_minutes):
        seen[first:last], hashes[first:last] = 0, 0
        found = store.fragment_prints(pool, from_ms + first * MINUTE_MS, from_ms + last * MINUTE_MS)
        at = (found.column("at_ms").to_numpy() - from_ms) // MINUTE_MS
        seen[at], hashes[at] = found.column("fragments").to_numpy(), found.column("hash").to_numpy()
    return PoolMinutes(pool, from_ms, to_ms, markers, seen, hashes)


def _stretches(places: Iterable[int], gap: int) -> list[tuple[int, int]]:
    """[first, last) of places that are less than `gap` apart."""
    out: list[tuple[int, int]] = []
    for at in places:
        if out and at - out[-1][1] < gap:
            out[-1] = (out[-1][0], at + 1)
        else:
            out.append((at, at + 1))
    return out


def written_until(minutes: PoolMinutes, settled_ms: int) -> int:
    """Where the complete minutes end: those after `settled_ms` may not be written as complete yet."""
    grid = Grid(minutes.markers, minutes.from_ms, minutes.to_ms, MINUTE_MS)
    at = minutes.from_ms + np.arange(len(grid.there)) * MINUTE_MS
    done = np.flatnonzero(~((at >= settled_ms) & ~(grid["complete"].astype(np.int64) == 1)))
    return minutes.from_ms + (int(done[-1]) + 1 if len(done) else 0) * MINUTE_MS


def print_findings(minutes: PoolMinutes, facts: PoolFacts, confirm_ms: int, end_ms: int, kept_ms: int) -> list[Finding]:
    """Minutes before `end_ms` whose marker is missing, not complete, or names other facts or fragments."""
    start = minutes.from_ms
    grid = Grid(minutes.markers, start, minutes.to_ms, MINUTE_MS)
    there, complete = grid.there, grid["complete"].astype(np.int64) == 1
    had = {name: grid[name].astype(np.uint64) for name in ("fragments", "fragments_hash", "facts_hash")}
    # Each minute by the formula of its own marker. A minute without one is no loss where only the account map holds.
    plain = facts_hashes(facts, start, minutes.to_ms, confirm_ms, formula=0)
    must = facts_hashes(facts, start, minutes.to_ms, confirm_ms)
    must = np.where(there & (grid["facts_formula"].astype(np.int64) < FACTS_FORMULA), plain, must)
    kept = start + np.arange(len(there)) * MINUTE_MS >= kept_ms
    seen = minutes.seen.astype(np.uint64)
    absent = ~there & ((plain != 0) | (seen > 0))
    one = np.ones(len(there), np.int64)
    problems = {
        "marker": (absent, one, there.astype(np.int64)),
        "complete": (there & ~complete, one, complete.astype(np.int64)),
        "facts": (there & (had["facts_hash"] != must), must, had["facts_hash"]),
        "fragments": (there & kept & (had["fragments"] != seen), seen, had["fragments"]),
        "fragments' hash": (
            there & kept & (had["fragments_hash"] != minutes.hashes),
            minutes.hashes,
            had["fragments_hash"],
        ),
    }
    size = (end_ms - start) // MINUTE_MS
    return [
        Finding(
            *("minute", start + n * MINUTE_MS, minutes.pool, ""),
            *(f"fingerprint: {name}", "", str(expected[n]), str(found[n])),
        )
        for name, (wrong, expected, found) in problems.items()
        for n in np.flatnonzero(wrong[:size])[:MOST_ROWS].tolist()
    ]
