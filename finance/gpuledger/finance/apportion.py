"""The one largest-remainder rule of the project: it divides a whole so that the parts sum to it exactly.

GPU time, energy and money all go through here, so that no two places can divide the same amount differently. Ties are
fixed (larger remainder first, then earlier position): the same input gives the same parts wherever it is computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gpuledger.finance.exact import divide_products

__all__ = ["apportion_groups", "largest_remainder", "largest_remainder_exact"]

#: Below this, a total or a sum of weights leaves room for the correction step in 64-bit arithmetic.
_BOUND = 2**62


def largest_remainder(total: int, weights: NDArray[np.int64]) -> NDArray[np.int64]:
    """Divide `total` in proportion to `weights`; the parts sum to exactly `total`.

    Args:
        total: of either sign, |total| < 2^63; a negative one is divided as |total| and negated.
        weights: shape (n,), each >= 0.

    Raises:
        ValueError: a weight is negative, or all are zero (or there are none) while `total` is not 0.
    """
    if not -(2**63) < total < 2**63:
        raise ValueError(f"total: {total} does not fit in 64 bits; use largest_remainder_exact")
    group = np.zeros(len(weights), dtype=np.intp)
    return apportion_groups(np.array([total], dtype=np.int64), group, weights)


def largest_remainder_exact(total: int, weights: Sequence[int]) -> list[int]:
    """The same rule in Python integers of any size: the definition that the vectorised one must equal."""
    whole = sum(weights)
    if any(weight < 0 for weight in weights):
        raise ValueError("weights: a weight is negative; expected 0 or more")
    if whole == 0:
        if total:
            raise ValueError(f"weights: all are zero, nothing can bear the total {total}")
        return [0] * len(weights)
    amount = abs(total)
    parts = [amount * weight // whole for weight in weights]
    remainders = [amount * weight % whole for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda n: (-remainders[n], n))
    for n in by_remainder[: amount - sum(parts)]:
        parts[n] += 1
    return parts if total == amount else [-part for part in parts]


def apportion_groups(
    totals: NDArray[np.int64], group: NDArray[np.intp], weights: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Divide each group's total among its rows, as `largest_remainder` does; groups are independent.

    Args:
        totals: shape (G,), the total of each group, |total| < 2^63.
        group: shape (n,), each row's group 0..G-1, non-decreasing. A group may have no rows.
        weights: shape (n,), each >= 0.

    Returns:
        Shape (n,): the parts; those of a group sum to exactly its total.

    Raises:
        ValueError: shapes differ, `group` is not sorted or out of range, a weight is negative, or a group's weights
            are all zero (or it has no rows) while its total is not 0.
    """
    totals = np.asarray(totals, dtype=np.int64)
    weights = np.asarray(weights, dtype=np.int64)
    starts = _group_starts(len(totals), group, weights)
    whole, wide = _sum_weights(weights, starts)
    empty = (whole == 0) & ~wide & (totals != 0)
    if empty.any():
        first = int(np.argmax(empty))
        raise ValueError(f"weights: all of group {first} are zero, nothing can bear its total {int(totals[first])}")
    wide |= (totals >= _BOUND) | (totals <= -_BOUND)
    if not wide.any():
        return _apportion(totals, group, weights, starts, whole)
    # A group beyond 64-bit arithmetic counts as nothing here, and is divided one by one below.
    narrow = ~wide
    parts = _apportion(totals * narrow, group, weights * narrow[group], starts, whole * narrow)
    for n in np.flatnonzero(wide).tolist():
        rows = slice(int(starts[n]), int(starts[n + 1]))
        parts[rows] = largest_remainder_exact(int(totals[n]), weights[rows].tolist())
    return parts


def _group_starts(count: int, group: NDArray[np.intp], weights: NDArray[np.int64]) -> NDArray[np.intp]:
    """First row of each group, and the number of rows at the end: shape (count + 1,)."""
    if group.shape != weights.shape or group.ndim != 1:
        raise ValueError(f"group: shape {group.shape} differs from the weights' shape {weights.shape}")
    if len(weights):
        if int(weights.min()) < 0:
            raise ValueError(f"weights: {int(weights.min())} is negative; expected 0 or more")
        if int(group[0]) < 0 or int(group[-1]) >= count:
            raise ValueError(f"group: expected ids from 0 to {count - 1}, one per total")
        if bool((group[1:] < group[:-1]).any()):
            raise ValueError("group: ids decrease; sort the rows by group")
    return np.searchsorted(group, np.arange(count + 1))


def _sums(values: NDArray[np.int64], starts: NDArray[np.intp]) -> NDArray[np.int64]:
    """Sum per group modulo 2^64 (differences of a wrapping running sum are exact where the sum itself fits)."""
    running = np.zeros(len(values) + 1, dtype=np.int64)
    np.cumsum(values, out=running[1:])
    return running[starts[1:]] - running[starts[:-1]]


def _sum_weights(weights: NDArray[np.int64], starts: NDArray[np.intp]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Each group's sum of weights, and where it is 2^62 or more (the sum given there is meaningless)."""
    whole = _sums(weights, starts)
    if len(weights) == 0 or int(weights.max()) * int(np.diff(starts).max()) < _BOUND:
        return whole, np.zeros(len(whole), dtype=np.bool_)
    high = _sums(weights >> 32, starts) + (_sums(weights & 0xFFFFFFFF, starts) >> 32)
    return whole, high >= _BOUND >> 32


def _apportion(
    totals: NDArray[np.int64],
    group: NDArray[np.intp],
    weights: NDArray[np.int64],
    starts: NDArray[np.intp],
    whole: NDArray[np.int64],
) -> NDArray[np.int64]:
    """`apportion_groups` where every |total| and every sum of weights is below 2^62."""
    amounts = np.abs(totals)
    divisor = np.maximum(whole, 1)  # groups without weight have the total 0: 0 / 1
    parts, remainders = divide_products(amounts[group], weights, divisor[group])
    missing = amounts - _sums(parts, starts)
    # Where a group's parts miss n, more than n of its rows have a remainder: the remainders sum to n divisors.
    candidates = np.flatnonzero(remainders)
    if len(candidates):
        of = group[candidates]
        # By group, as they are already, then by remainder; lexsort is stable, so equal ones keep their positions.
        order = np.lexsort((-remainders[candidates], of))
        rank = np.arange(len(of)) - np.searchsorted(of, of)
        parts[candidates[order[rank < missing[of]]]] += 1
    return parts * np.sign(totals)[group]
