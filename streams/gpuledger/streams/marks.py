"""Which minutes of which pools have to be computed again: sets of minute ranges, and what makes them dirty. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

__all__ = ["HOUR_MS", "MINUTE_MS", "Marks", "Ranges"]

MINUTE_MS = 60_000
HOUR_MS = 3_600_000


class Ranges:
    """A set of milliseconds as disjoint, sorted, half-open ranges."""

    __slots__ = ("_ranges",)

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self._ranges: list[tuple[int, int]] = []
        self.update(ranges)

    def update(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Adds ranges; empty ones are ignored, touching ones merge."""
        merged: list[tuple[int, int]] = []
        for start, end in sorted([*self._ranges, *((a, b) for a, b in ranges if a < b)]):
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(merged[-1][1], end))
            else:
                merged.append((start, end))
        self._ranges = merged

    def remove(self, start: int, end: int) -> None:
        """Takes [start, end) out."""
        kept: list[tuple[int, int]] = []
        for a, b in self._ranges:
            kept += [(x, y) for x, y in ((a, min(b, start)), (max(a, end), b)) if x < y]
        self._ranges = kept

    def clip(self, start: int, end: int) -> Ranges:
        """The part inside [start, end)."""
        return Ranges((max(a, start), min(b, end)) for a, b in self._ranges)

    def widen(self, unit: int) -> Ranges:
        """Bounds moved outwards to multiples of `unit`."""
        return Ranges((a // unit * unit, -(-b // unit) * unit) for a, b in self._ranges)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._ranges)

    def __bool__(self) -> bool:
        return bool(self._ranges)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ranges) and self._ranges == other._ranges

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Ranges({self._ranges})"


class Marks:
    """Dirty ranges by pool, whole minutes, with why they are dirty (the first reason given for a pool)."""

    __slots__ = ("_pools", "_why")

    def __init__(self) -> None:
        self._pools: dict[str, list[tuple[int, int]]] = {}
        self._why: dict[str, str] = {}

    def add(self, pool: str, start_ms: int, end_ms: int, why: str) -> None:
        """Marks the minutes that [start_ms, end_ms) touches."""
        if start_ms < end_ms:
            widened = (start_ms // MINUTE_MS * MINUTE_MS, -(-end_ms // MINUTE_MS) * MINUTE_MS)
            self._pools.setdefault(pool, []).append(widened)
            self._why.setdefault(pool, why)

    def merged(self) -> dict[str, Ranges]:
        """Disjoint ranges by pool."""
        return {pool: Ranges(ranges) for pool, ranges in self._pools.items()}

    def why(self, pool: str) -> str:
        """The first reason that was given for the pool."""
        return self._why[pool]

    def __bool__(self) -> bool:
        return bool(self._pools)
