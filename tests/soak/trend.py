"""Whether a series of readings is flat: of the windows' medians none strays, and no line through all of them rises.

A single reading says nothing (an allocator gives memory back when it likes), so only medians of windows are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import linear_regression, median

__all__ = ["Flatness", "Reading", "flatness", "medians"]


@dataclass(frozen=True, slots=True)
class Reading:
    """One look at the worker, `at_s` seconds after the load began.

    `behind_ms` is how old the oldest partition's newest stored record is, `incomplete_ms` how far the end of the newest
    complete minute lies back; both are None while there is none.
    """

    at_s: float
    rss_bytes: int
    anonymous_bytes: int
    behind_ms: int | None
    incomplete_ms: int | None
    backlog_minutes: int


@dataclass(frozen=True, slots=True)
class Flatness:
    """How far the medians stray from the middle of them (share of it), and what a line through all values rises by
    from the first to the last (share of it too; below 0: it falls)."""

    middle: float
    strays: float
    rises: float

    def within(self, tolerance: float) -> bool:
        return self.strays <= tolerance and abs(self.rises) <= tolerance


def medians(
    readings: Sequence[Reading], window_s: float, value: Callable[[Reading], int | None]
) -> list[tuple[float, float]]:
    """(start of the window in seconds, median of its known values), without windows that have none."""
    windows: dict[int, list[int]] = {}
    for reading in readings:
        found = value(reading)
        if found is not None:
            windows.setdefault(int(reading.at_s // window_s), []).append(found)
    return [(number * window_s, median(values)) for number, values in sorted(windows.items())]


def flatness(readings: Sequence[Reading], window_s: float, value: Callable[[Reading], int | None]) -> Flatness:
    """Of the readings given: leave out the warm-up before.

    Raises:
        ValueError: there are fewer than three windows, of which nothing can be said.
    """
    found = medians(readings, window_s, value)
    if len(found) < 3:
        raise ValueError(f"window_s: {len(found)} windows of {window_s:g} s; at least 3 are needed to see a trend")
    middle = median(level for _, level in found)
    known = [(reading.at_s, level) for reading in readings if (level := value(reading)) is not None]
    slope, _ = linear_regression([at_s for at_s, _ in known], [level for _, level in known])
    scale = middle or 1
    return Flatness(
        middle,
        max(abs(level - middle) for _, level in found) / scale,
        slope * (known[-1][0] - known[0][0]) / scale,
    )
