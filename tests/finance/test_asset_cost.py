"""A period's cost is spent over its minutes so that any cut sums to it; energy is priced and rounded once."""

from __future__ import annotations

import itertools
from decimal import Decimal
from fractions import Fraction
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuledger.finance import exact
from gpuledger.finance.asset_cost import AssetCosts, fixed_cost_nano
from gpuledger.finance.energy import energy_cost_nano
from gpuledger.finance.exact import divide_products, from_nano, half_even, scale_half_even, to_nano
from tests.finance.builders import asset_cost, ms

MINUTE = 60_000


def test_a_leap_year_of_capex_sums_to_the_nano_unit() -> None:
    # 2028 has 366 days = 527,040 minutes. EUR 1,000,000.000000001 over them: a minute costs 1.89738..., and no minute
    # is exact. The first is floor(1000000000000001 / 527040) = 1897389192 nano (527040 x 1897389192 = 999999999751680).
    cost = asset_cost(
        period_cost=Decimal("1000000.000000001"), start_ms=ms("2028-01-01"), end_ms=ms("2029-01-01"), currency="NOK"
    )
    assert fixed_cost_nano(cost, cost.start_ms, cost.start_ms + MINUTE) == 1_897_389_192
    days = [fixed_cost_nano(cost, day, day + 1440 * MINUTE) for day in range(cost.start_ms, cost.end_ms, 1440 * MINUTE)]
    assert len(days) == 366
    assert sum(days) == 1_000_000_000_000_001
    assert len(set(days)) > 1, "the days cannot all cost the same: 366 does not divide the cost"


def test_negative_cost_is_spent_too() -> None:
    # A credit of 0.000000010 over 3 minutes: floors at -10/3 = -3.33 and -20/3 = -6.67 give -4, -3, -3.
    cost = asset_cost(period_cost=Decimal("-0.00000001"), end_ms=ms("2026-01-01T00:03"))
    edges = [cost.start_ms + n * MINUTE for n in range(4)]
    assert [fixed_cost_nano(cost, a, b) for a, b in itertools.pairwise(edges)] == [-4, -3, -3]


@settings(max_examples=200, deadline=None)
@given(
    total=st.integers(-(10**24), 10**24),
    minutes=st.integers(1, 600_000),
    cuts=st.lists(st.floats(0, 1), max_size=20),
)
def test_any_partition_sums_to_the_period(total: int, minutes: int, cuts: list[float]) -> None:
    start = ms("2026-01-01")
    cost = asset_cost(period_cost=from_nano(total), start_ms=start, end_ms=start + minutes * MINUTE)
    edges = sorted({0, minutes, *(int(cut * minutes) for cut in cuts)})
    parts = [fixed_cost_nano(cost, start + a * MINUTE, start + b * MINUTE) for a, b in itertools.pairwise(edges)]
    assert sum(parts) == total
    for part, (a, b) in zip(parts, itertools.pairwise(edges), strict=True):
        assert abs(part - Fraction(total * (b - a), minutes)) < 1


@pytest.mark.parametrize(
    ("start", "end", "message"),
    [("2025-12-31", "2026-01-01", "not inside"), ("2026-01-01", "2026-01-03", "not inside")],
)
def test_outside_of_the_period_nothing_is_spent(start: str, end: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fixed_cost_nano(asset_cost(), ms(start), ms(end))
    with pytest.raises(ValueError, match="whole minutes"):
        fixed_cost_nano(asset_cost(), ms("2026-01-01"), ms("2026-01-01") + 1)


def test_the_cost_in_force() -> None:
    january, march = (
        asset_cost(end_ms=ms("2026-02-01")),
        asset_cost(id="m", start_ms=ms("2026-03-01"), end_ms=ms("2027-01-01")),
    )
    costs = AssetCosts([march, january])
    assert costs.at(ms("2025-12-31")) is None
    assert costs.at(ms("2026-01-01")) is january
    assert costs.at(ms("2026-02-01")) is None
    assert costs.at(ms("2026-03-01")) is march
    assert costs.changes_inside(ms("2026-01-01"), ms("2026-02-01")) is False
    assert costs.changes_inside(ms("2026-01-01"), ms("2026-02-02")) is True


def test_energy_by_hand() -> None:
    # 8 GPUs x 700 W x 15 min = 1.4 kWh = 5,040,000,000 mJ. Node factor 1.25, PUE 1.2, 0.10 per kWh:
    # 1.4 x 1.25 x 1.2 x 0.10 = 0.21.
    mj = 8 * 700 * 900 * 1000
    assert energy_cost_nano(mj, Decimal("0.10"), Decimal("1.2"), Decimal("1.25")) == 210_000_000
    # Norway NO2, 2024-07-14: the price was below zero; the cost is negative, not zero.
    assert energy_cost_nano(mj, Decimal("-0.06164")) == -86_296_000


def test_energy_rounds_halves_to_even_once() -> None:
    # 1 mJ at 1.80 per kWh is 1.8 / 3.6e9 = 0.5e-9: half a nano-unit goes to 0; 3 mJ make 1.5, which goes to 2.
    assert energy_cost_nano(1, Decimal("1.80")) == 0
    assert energy_cost_nano(3, Decimal("1.80")) == 2
    assert energy_cost_nano(3, Decimal("-1.80")) == -2
    assert energy_cost_nano(1, Decimal("1.8000001")) == 1


def test_nano_units_are_exact() -> None:
    assert to_nano(Decimal("12345678901234567890123456789.123456789")) == 12345678901234567890123456789123456789
    assert str(from_nano(-12345678901234567890123456789123456789)) == "-12345678901234567890123456789.123456789"
    assert str(from_nano(5)) == "5E-9" and from_nano(1_500_000_000) == Decimal("1.5")
    with pytest.raises(ValueError, match="more than 9 decimals"):
        to_nano(Decimal("0.0000000001"))
    with pytest.raises(ValueError, match="not a number"):
        to_nano(Decimal("NaN"))


@settings(max_examples=300, deadline=None)
@given(numerator=st.integers(-(10**30), 10**30), denominator=st.integers(1, 10**12))
def test_half_even_is_that_of_fractions(numerator: int, denominator: int) -> None:
    assert half_even(numerator, denominator) == round(Fraction(numerator, denominator))


@pytest.mark.parametrize("wide", [True, False], ids=["long double", "without long double"])
@settings(max_examples=300, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 2**50), st.integers(-(2**42), 2**42)), min_size=1, max_size=6),
    divisor=st.sampled_from([1 << 31, 3_600_000_000]),
)
def test_columns_round_as_single_values_do(wide: bool, rows: list[tuple[int, int]], divisor: int) -> None:
    # False is what a platform takes on which long double is no wider than double.
    with patch.object(exact, "WIDE_LONG_DOUBLE", exact.WIDE_LONG_DOUBLE and wide):
        amount, factor = (np.array(column, dtype=np.int64) for column in zip(*rows, strict=True))
        expected = [round(Fraction(a * f, divisor)) for a, f in rows]
        if max(map(abs, expected)) >= 2**61:
            return
        assert scale_half_even(amount, factor, divisor).tolist() == expected
        size = np.abs(factor)
        quotient, rest = divide_products(amount, size, np.full(len(rows), divisor))
        assert (quotient.tolist(), rest.tolist()) == tuple(
            map(list, zip(*(divmod(a * abs(f), divisor) for a, f in rows), strict=True))
        )


def test_what_does_not_fit_is_an_error() -> None:
    with pytest.raises(OverflowError, match="62 bits"):
        scale_half_even(np.array([2**40]), np.array([2**40]), 1)
