"""Exact integers where 64 bits and floats are not enough: money in nano-units, products, ratios, one way of rounding.

Inside, money is an integer count of nano-units (10^-9 of a currency unit); `Decimal` appears only where people or
ClickHouse read it.
"""

from __future__ import annotations

from decimal import Context, Decimal

import numpy as np
from numpy.typing import NDArray

__all__ = ["NANO", "divide_products", "from_nano", "half_even", "scale_half_even", "to_nano"]

NANO = 10**9
#: Below this, numbers leave room for the correction step of `divide_products` in 64-bit arithmetic.
_BOUND = 2**62
#: The estimate of a quotient below 2^62 must be wrong by at most 1, which takes a 64-bit mantissa. Where long double is
#: no wider than double (Windows, Apple), products beyond 64 bits are computed with Python integers.
WIDE_LONG_DOUBLE = np.finfo(np.longdouble).nmant >= 63
#: Decimal(38, 9) and beyond: the default context would round a sum of money at 28 digits.
_CONTEXT = Context(prec=80)


def to_nano(value: Decimal) -> int:
    """`value` in nano-units, exactly.

    Raises:
        ValueError: more than 9 decimals, or not a finite number.
    """
    try:
        numerator, denominator = value.as_integer_ratio()
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{value} is not a number") from error
    nano, rest = divmod(numerator * NANO, denominator)
    if rest:
        raise ValueError(f"{value} has more than 9 decimals; money is exact to 0.000000001")
    return nano


def from_nano(nano: int) -> Decimal:
    """Nano-units as a decimal with 9 places."""
    return Decimal(int(nano)).scaleb(-9, context=_CONTEXT)


def half_even(numerator: int, denominator: int) -> int:
    """numerator / denominator (denominator > 0) rounded to the nearest integer, halves to the even one."""
    quotient, rest = divmod(numerator, denominator)
    twice = 2 * rest
    return quotient + (twice > denominator or (twice == denominator and quotient % 2 == 1))


def scale_half_even(amount: NDArray[np.int64], factor: NDArray[np.int64], divisor: int) -> NDArray[np.int64]:
    """amount x factor / divisor per row, rounded half-even; factors may be negative, amounts not.

    Raises:
        OverflowError: an operand or a result is 2^62 or more; `half_even` takes those.
    """
    if len(amount) == 0:
        return np.zeros(0, dtype=np.int64)
    size = np.abs(factor)
    estimate = amount.astype(np.float64) * size.astype(np.float64) / divisor
    if max(int(amount.max()), int(size.max()), float(estimate.max())) >= _BOUND:
        raise OverflowError(f"{int(amount.max())} x {int(size.max())} / {divisor} does not fit in 62 bits")
    quotient, rest = divide_products(amount, size, np.full(len(amount), divisor, dtype=np.int64))
    up = (rest > divisor - rest) | ((rest == divisor - rest) & (quotient % 2 == 1))
    quotient += up
    return np.where(factor < 0, -quotient, quotient)


def divide_products(
    amount: NDArray[np.int64], factor: NDArray[np.int64], divisor: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Quotient and remainder of amount x factor / divisor per row, exact although the product may need 124 bits.

    All operands are >= 0 and below 2^62, divisors > 0, and so must be every quotient. Where the products fit in 64 bits
    no estimate is needed. Else the quotient is estimated in long double, wrong by at most 1, so that the true remainder
    lies in [-divisor, 2 divisor) and its low 64 bits are all of it.
    """
    if len(amount) == 0:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    if int(amount.max()) * int(factor.max()) < 2**63:
        product = amount * factor
        quotient = product // divisor
        return quotient, product - quotient * divisor
    if not WIDE_LONG_DOUBLE:
        pairs = [divmod(a * f, d) for a, f, d in zip(amount.tolist(), factor.tolist(), divisor.tolist(), strict=True)]
        both = np.array(pairs, dtype=np.int64)
        return both[:, 0].copy(), both[:, 1].copy()
    estimate = amount.astype(np.longdouble)
    estimate *= factor
    estimate /= divisor
    quotient = estimate.astype(np.int64)
    # Array multiplication of int64 wraps modulo 2^64, which is what is wanted here.
    remainder = amount * factor - quotient * divisor
    correction = remainder // divisor
    return quotient + correction, remainder - correction * divisor
