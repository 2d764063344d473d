"""What the energy of GPUs costs: integer millijoules x node factor x PUE x price per kWh, as one exact ratio.

The rule of rounding: per pool and price interval, thus per one tariff price, the sum of the energy is priced and
rounded half-even to nano-units ONCE; its division among holders is apportionment, which rounds nothing away.
"""

from __future__ import annotations

from decimal import Decimal

from gpuledger.finance.exact import NANO, half_even

__all__ = ["MJ_PER_KWH", "energy_cost_nano"]

#: 1 kWh = 3.6e6 J = 3.6e9 mJ.
MJ_PER_KWH = 3_600_000_000


def energy_cost_nano(
    energy_mj: int, per_kwh: Decimal, pue: Decimal = Decimal(1), node_energy_factor: Decimal = Decimal(1)
) -> int:
    """Cost in nano-units, of the sign of the price, rounded half-even once. Decimals of any length are used exactly."""
    numerator, denominator = energy_mj * NANO, MJ_PER_KWH
    for factor in (per_kwh, pue, node_energy_factor):
        over, under = factor.as_integer_ratio()
        numerator *= over
        denominator *= under
    return half_even(numerator, denominator)
