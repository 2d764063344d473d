"""Energy between two readings of a counter: linear, cut by floor, so that no cut changes a sum. Pure.

Exact also where a counter jumps, or was read days apart, and the product in between needs more than 64 bits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["linear"]

Ints = NDArray[np.int64]


def linear(at: Ints, start: Ints, end: Ints, first: Ints, last: Ints) -> Ints:
    """floor of the energy at `at` on the line from (start, first) to (end, last); start <= at <= end, start < end."""
    rise, run, width = last - first, at - start, end - start
    found = first + rise * run // width
    for n in np.flatnonzero(rise.astype(np.float64) * run >= 2.0**62).tolist():
        found[n] = int(first[n]) + int(rise[n]) * int(run[n]) // int(width[n])
    return found
