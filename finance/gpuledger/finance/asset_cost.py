"""What the operator pays for a pool whether its GPUs work or not, for any stretch of whole minutes.

A period's cost T over its N minutes is spent as floor(T b / N) - floor(T a / N) between minutes a and b, in nano-units:
however the period is cut, the pieces sum to T, of either sign, in leap years too.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable

from gpuledger.finance.exact import to_nano
from gpuledger.schemas.events import AssetCost

__all__ = ["AssetCosts", "fixed_cost_nano"]

_MINUTE_MS = 60_000


def fixed_cost_nano(cost: AssetCost, from_ms: int, to_ms: int) -> int:
    """The part of `cost.period_cost` that falls on [from_ms, to_ms), in nano-units.

    Raises:
        ValueError: the bounds are not whole minutes inside the period, or the period's cost has more than 9 decimals.
    """
    if not cost.start_ms <= from_ms <= to_ms <= cost.end_ms:
        raise ValueError(f"[{from_ms}, {to_ms}) is not inside the period [{cost.start_ms}, {cost.end_ms}) of {cost.id}")
    if (from_ms - cost.start_ms) % _MINUTE_MS or (to_ms - cost.start_ms) % _MINUTE_MS:
        raise ValueError(f"[{from_ms}, {to_ms}): asset cost is spread over whole minutes; align the bounds")
    total = to_nano(cost.period_cost)
    minutes = (cost.end_ms - cost.start_ms) // _MINUTE_MS
    first = (from_ms - cost.start_ms) // _MINUTE_MS
    last = (to_ms - cost.start_ms) // _MINUTE_MS
    return total * last // minutes - total * first // minutes


class AssetCosts:
    """The asset costs of one pool by time. Of two that overlap (an error at apply time) the later start wins."""

    def __init__(self, costs: Iterable[AssetCost]) -> None:
        self.costs = sorted(costs, key=lambda cost: (cost.start_ms, cost.revision, cost.id))
        self._starts = [cost.start_ms for cost in self.costs]
        self._edges = sorted(self.cuts())

    def at(self, at_ms: int) -> AssetCost | None:
        """The asset cost in force at an instant; None: none is known."""
        for cost in reversed(self.costs[: bisect_right(self._starts, at_ms)]):
            if at_ms < cost.end_ms:
                return cost
        return None

    def changes_inside(self, from_ms: int, to_ms: int) -> bool:
        """Whether an asset cost begins or ends inside the open (from_ms, to_ms)."""
        return bisect_right(self._edges, from_ms) < bisect_left(self._edges, to_ms)

    def cuts(self) -> set[int]:
        """Every instant at which the asset cost in force may change."""
        return {edge for cost in self.costs for edge in (cost.start_ms, cost.end_ms)}
