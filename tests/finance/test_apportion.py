"""The parts sum to the whole, are the exact shares rounded, and ties fall the same way always."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpuledger.finance import apportion
from gpuledger.finance.apportion import apportion_groups, largest_remainder, largest_remainder_exact
from gpuledger.finance.exact import divide_products

HUGE = 2**63 - 1
weight_lists = st.lists(
    st.one_of(st.integers(0, 4), st.integers(0, 10**6), st.integers(0, 2**55), st.integers(0, HUGE)), max_size=12
)
totals = st.one_of(
    st.integers(-20, 20), st.integers(-(10**13), 10**13), st.integers(-(2**62), 2**62), st.integers(-HUGE, HUGE)
)


def oracle(total: int, weights: list[int]) -> list[int]:
    """Hamilton's method as a person would do it with fractions: floors, then one each to the largest fractions."""
    whole = sum(weights)
    if whole == 0:
        return [0] * len(weights)
    shares = [Fraction(abs(total) * weight, whole) for weight in weights]
    parts = [int(share) for share in shares]
    for _ in range(abs(total) - sum(parts)):
        best = max(range(len(shares)), key=lambda n: (shares[n] - parts[n], -n))
        parts[best] += 1
    return [-part for part in parts] if total < 0 else parts


def array(values: list[int]) -> np.ndarray:
    return np.array(values, dtype=np.int64)


@settings(max_examples=1000, deadline=None)
@given(total=totals, weights=weight_lists)
@example(total=2**62 - 1, weights=[2**61, 2**61 - 1])  # largest sum that the 64-bit path takes
@example(total=2**62 - 1, weights=[1, 2**62 - 2])
@example(total=-HUGE, weights=[HUGE, HUGE, 1])
@example(total=10, weights=[1, 1, 1])
@example(total=-1, weights=[1])
def test_one_group_equals_the_fractions(total: int, weights: list[int]) -> None:
    if sum(weights) == 0:
        total = 0
    expected = oracle(total, weights)
    assert largest_remainder(total, array(weights)).tolist() == expected
    assert largest_remainder_exact(total, weights) == expected
    assert sum(expected) == total


@settings(max_examples=500, deadline=None)
@given(st.lists(st.tuples(totals, weight_lists), max_size=8))
def test_groups_are_independent(groups: list[tuple[int, list[int]]]) -> None:
    groups = [(total if sum(weights) else 0, weights) for total, weights in groups]
    ids = np.repeat(np.arange(len(groups)), [len(weights) for _, weights in groups]).astype(np.intp)
    flat = array([weight for _, weights in groups for weight in weights])
    parts = apportion_groups(array([total for total, _ in groups]), ids, flat)
    assert parts.tolist() == [part for total, weights in groups for part in oracle(total, weights)]


def test_ties_go_to_the_earlier_position() -> None:
    assert largest_remainder(2, array([1, 1, 1])).tolist() == [1, 1, 0]
    assert largest_remainder(-2, array([1, 1, 1])).tolist() == [-1, -1, 0]
    # 7 over 2:1:2:1 is 2.33, 1.17, 2.33, 1.17: one is missing and the first of the two equal largest gets it.
    assert largest_remainder(7, array([2, 1, 2, 1])).tolist() == [3, 1, 2, 1]


def test_zero_weights_take_nothing() -> None:
    assert largest_remainder(5, array([0, 1, 0, 1])).tolist() == [0, 3, 0, 2]


def test_single_rows_take_all() -> None:
    ids = np.arange(3, dtype=np.intp)
    assert apportion_groups(array([5, -7, HUGE]), ids, array([1, 10**18, HUGE])).tolist() == [5, -7, HUGE]


def test_empty_groups_and_no_groups() -> None:
    assert apportion_groups(array([]), np.array([], dtype=np.intp), array([])).tolist() == []
    assert apportion_groups(array([0, 4, 0]), np.array([1, 1], dtype=np.intp), array([1, 1])).tolist() == [2, 2]


@pytest.mark.parametrize(
    ("totals", "group", "weights", "message"),
    [
        ([3], [0, 0], [0, 0], "all of group 0 are zero"),
        ([0, 3], [0], [1], "all of group 1 are zero"),
        ([1], [0, 0], [-1, 2], "-1 is negative"),
        ([1, 1], [1, 0], [1, 1], "decrease"),
        ([1, 1, 1], [0, 2, 1], [1, 1, 1], "decrease"),  # not below the first
        ([1], [1], [1], "from 0 to 0"),
        ([1], [0, 1], [1, 1], "from 0 to 0"),
        ([1], [-1, 0], [1, 1], "from 0 to 0"),
        ([1], [0, 0], [1], "shape"),
    ],
)
def test_what_cannot_be_divided_is_an_error(
    totals: list[int], group: list[int], weights: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        apportion_groups(array(totals), np.array(group, dtype=np.intp), array(weights))


def test_what_cannot_be_divided_exactly_is_an_error_too() -> None:
    with pytest.raises(ValueError, match="all are zero, nothing can bear the total -1"):
        largest_remainder_exact(-1, [0, 0])
    with pytest.raises(ValueError, match="a weight is negative"):
        largest_remainder_exact(1, [-1, 3])
    assert largest_remainder_exact(0, [0, 0]) == [0, 0]
    assert largest_remainder_exact(0, []) == []


def test_the_first_group_that_cannot_bear_its_total_is_named() -> None:
    with pytest.raises(ValueError, match="all of group 1 are zero, nothing can bear its total 7"):
        apportion_groups(array([3, 7, 9]), np.array([0, 1, 2]), array([1, 0, 0]))


def test_other_integer_types_are_widened_first() -> None:
    # |-2^31| does not fit in 32 bits, and the database's counts are unsigned.
    totals = np.array([-(2**31), 3], dtype=np.int32)
    weights = np.array([1, 1, 1], dtype=np.uint64)
    parts = apportion_groups(totals, np.array([0, 0, 1]), weights)  # pyright: ignore[reportArgumentType]
    assert parts.dtype == np.int64
    assert parts.tolist() == [-(2**30), -(2**30), 3]


def test_sums_of_weights_around_2_to_the_62() -> None:
    # Each group's sum decides alone whether 64 bits are enough: far below, just below, at, and beyond 64 bits.
    groups = [[1, 2], [2**61, 2**61 - 1], [2**61, 2**61], [HUGE, HUGE, HUGE], [2**32 - 1] * 3, [2**61] * 5]
    ids = np.repeat(np.arange(6), [len(weights) for weights in groups])
    flat = array([weight for weights in groups for weight in weights])
    parts = apportion_groups(array([7, 7, 7, 8, 7, 6]), ids, flat)
    assert parts.tolist() == [2, 5, 4, 3, 4, 3, 3, 3, 2, 3, 2, 2, 2, 1, 1, 1, 1]
    for total, weights in zip((7, 7, 7, 8, 7, 6), groups, strict=True):
        assert largest_remainder(total, array(weights)).tolist() == largest_remainder_exact(total, weights)


@pytest.mark.parametrize(
    ("total", "weights", "exact"),
    [
        (2**62 - 1, [1], False),
        (-(2**62) + 1, [1], False),
        (2**62, [1], True),
        (-(2**62), [1], True),
        (5, [2**61, 2**61 - 1], False),
        (5, [2**61 - 1, 2**61], False),
        (5, [2**61, 2**61], True),
        (5, [2**61 - 1, 2**61 + 1], True),  # the lower halves carry
        (5, [2**62 - 1, 0, 0], False),  # three times the largest weight would be too much
        (5, [2**31] * 8, False),
    ],
)
def test_only_what_64_bits_cannot_divide_is_divided_one_by_one(
    monkeypatch: pytest.MonkeyPatch, total: int, weights: list[int], exact: bool
) -> None:
    # `divide_products` wants operands below 2^62. Beside the group in question there is one that is small.
    slow: list[int] = []

    def divided(amount: np.ndarray, factor: np.ndarray, divisor: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        assert max(int(operand.max()) for operand in (amount, factor, divisor)) < 2**62
        return divide_products(amount, factor, divisor)

    def one_by_one(total: int, weights: list[int]) -> list[int]:
        slow.append(total)
        return oracle(total, weights)

    monkeypatch.setattr(apportion, "divide_products", divided)
    monkeypatch.setattr(apportion, "largest_remainder_exact", one_by_one)
    ids = np.array([0] * len(weights) + [1, 1])
    parts = apportion_groups(array([total, 3]), ids, array([*weights, 1, 1]))
    assert parts.tolist() == [*oracle(total, weights), 2, 1]
    assert slow == ([total] if exact else [])


def test_a_group_without_weight_divides_nothing_by_nothing() -> None:
    with np.errstate(all="raise"):
        assert apportion_groups(array([0, 4]), np.array([0, 0, 1]), array([0, 0, 1])).tolist() == [0, 0, 4]


def test_a_total_beyond_64_bits_is_refused_here_and_divided_exactly_there() -> None:
    for total in (2**63, -(2**63), 2**64):
        with pytest.raises(ValueError, match="does not fit"):
            largest_remainder(total, array([1, 1]))
    assert largest_remainder_exact(2**70 + 1, [1, 1]) == [2**69 + 1, 2**69]


def test_a_million_rows() -> None:
    rng = np.random.default_rng(7)
    ids = np.sort(rng.integers(0, 50_000, 1_000_000)).astype(np.intp)
    weights = rng.integers(1, 60_000_000, 1_000_000)
    amounts = rng.integers(-(10**15), 10**15, 50_000)
    parts = apportion_groups(amounts, ids, weights)
    running = np.concatenate([[0], np.cumsum(parts)])
    starts = np.searchsorted(ids, np.arange(50_001))
    assert np.array_equal(running[starts[1:]] - running[starts[:-1]], amounts)
