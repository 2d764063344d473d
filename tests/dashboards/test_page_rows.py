"""What goes to the browser: exact values, and differences that lead from one refresh to the next."""

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuledger.dashboards.boards.live import COST_BY_TENANT, COST_RATE
from gpuledger.dashboards.exceptions import PanelError
from gpuledger.dashboards.page.rows import Row, difference, key_columns, project, value
from gpuledger.dashboards.panels import Column

MONEY = Column("m", "M", "value", "money")
COUNT = Column("n", "N", "value", "count")


@pytest.mark.parametrize(
    ("given_value", "column", "expected"),
    [
        (Decimal("0E-9"), MONEY, "0.000000000"),
        (Decimal("12345678901234567890.123456789"), MONEY, "12345678901234567890.123456789"),
        (2**60, COUNT, str(2**60)),
        (7, COUNT, 7),
        (7, MONEY, "7"),
        (None, MONEY, None),
        (float("nan"), COUNT, None),
        (datetime(2026, 3, 1, 12, 0, 0, 5000), COUNT, "2026-03-01T12:00:00.005Z"),
        (datetime(2026, 3, 1, 12, tzinfo=UTC), COUNT, "2026-03-01T12:00:00.000Z"),
        ("<b>", COUNT, "<b>"),
    ],
)
def test_values_stay_exact(given_value: Any, column: Column, expected: Any) -> None:
    assert value(given_value, column) == expected


def test_a_panel_takes_its_columns_of_a_shared_query_once_each() -> None:
    names = ["state", "cost_per_hour", "currency", "cost_per_second"]
    rows = [["active", Decimal(36), "EUR", Decimal("0.01")], ["idle", Decimal(36), "EUR", Decimal("0.01")]]
    assert project(COST_RATE, names, rows) == [("EUR", "0.01", "36")]


def test_a_missing_column_is_named() -> None:
    with pytest.raises(PanelError, match="cost-rate: the query returns no column currency"):
        project(COST_RATE, ["cost_per_second", "cost_per_hour"], [[1, 2]])


_rows = st.dictionaries(st.tuples(st.integers(0, 5), st.sampled_from("ab")), st.integers(0, 3)).map(
    lambda found: [(minute, tenant, "EUR", cost) for (minute, tenant), cost in found.items()]
)


@given(_rows, _rows)
def test_a_difference_leads_from_before_to_after(before: list[Row], after: list[Row]) -> None:
    key = key_columns(COST_BY_TENANT)
    changed, removed = difference(before, after, key)
    rows = {tuple(row[n] for n in key): row for row in before}
    for gone in removed:
        del rows[gone]
    rows.update({tuple(row[n] for n in key): row for row in changed})
    assert sorted(rows.values()) == sorted(after)
    assert not set(changed) & set(before), "what is the same is not sent"
