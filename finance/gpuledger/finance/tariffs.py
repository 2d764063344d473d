"""What a kilowatt-hour costs at an instant: the price series of an energy tariff, found by bisection.

Where no price is known the answer is None, never 0: a cost without its energy is incomplete, not cheap.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from decimal import Decimal

from gpuledger.schemas.events import EnergyTariff

__all__ = ["Tariff"]


class Tariff:
    """The prices of one energy tariff over [first price, end)."""

    def __init__(self, tariff: EnergyTariff) -> None:
        self.tariff = tariff
        self._starts = [point.start_ms for point in tariff.prices]

    @property
    def start_ms(self) -> int:
        return self._starts[0]

    @property
    def end_ms(self) -> int:
        return self.tariff.end_ms

    def price(self, at_ms: int) -> Decimal | None:
        """The price per kWh at an instant; None before the first price and from the end on."""
        if not self.start_ms <= at_ms < self.end_ms:
            return None
        return self.tariff.prices[bisect_right(self._starts, at_ms) - 1].per_kwh

    def cuts(self, from_ms: int, to_ms: int) -> list[int]:
        """Instants inside the open (from_ms, to_ms) at which the price changes or ends, ascending.

        Two consecutive prices that are equal make no cut: a 15-minute series of hourly prices costs no more rows.
        """
        first, last = bisect_right(self._starts, from_ms), bisect_left(self._starts, to_ms)
        prices = self.tariff.prices
        cuts = [prices[n].start_ms for n in range(first, last) if n == 0 or prices[n].per_kwh != prices[n - 1].per_kwh]
        if from_ms < self.end_ms < to_ms:
            cuts.append(self.end_ms)
        return cuts
