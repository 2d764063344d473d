"""From a query's rows to what the browser gets, and the difference between two refreshes. Pure.

Amounts stay exact: decimals and integers that a column's type allows past 2^53 travel as strings, times as ISO 8601.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

from gpuledger.dashboards.exceptions import PanelError
from gpuledger.dashboards.panels import Column, Panel

__all__ = ["Row", "difference", "key_columns", "project", "value"]

Row = tuple[Any, ...]
_EXACT_IN_A_FLOAT = 2**53


def value(given: Any, column: Column) -> Any:
    """One value as JSON has it. Integers are numbers in columns of unit count and in unitless ones up to 2^53."""
    if isinstance(given, Decimal):
        return format(given, "f")
    if isinstance(given, datetime):
        # Every DateTime of ours is UTC; the driver leaves the zone away.
        at = given.replace(tzinfo=UTC) if given.tzinfo is None else given.astimezone(UTC)
        return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    if isinstance(given, date):
        return given.isoformat()
    if isinstance(given, int) and not isinstance(given, bool):
        amount = column.unit not in ("", "count", "status")
        return str(given) if amount or abs(given) >= _EXACT_IN_A_FLOAT else given
    if isinstance(given, float) and given != given:
        return None
    return given


def project(panel: Panel, names: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[Row]:
    """The panel's columns of each row, in its order, equal rows once (panels may share a query and use part of it).

    Raises:
        PanelError: the query does not return a column that the panel names.
    """
    if not names and not rows:  # the embedded engine names no columns when there is nothing in them
        return []
    missing = [column.name for column in panel.columns if column.name not in names]
    if missing:
        raise PanelError(f"{panel.id}: the query returns no column {', '.join(missing)}; it returns {', '.join(names)}")
    at = [(names.index(column.name), column) for column in panel.columns]
    return list(dict.fromkeys(tuple(value(row[n], column) for n, column in at) for row in rows))


def key_columns(panel: Panel) -> tuple[int, ...]:
    """Positions of the key in the panel's columns."""
    names = [column.name for column in panel.columns]
    return tuple(names.index(name) for name in panel.key)


def difference(before: Sequence[Row], after: Sequence[Row], key: tuple[int, ...]) -> tuple[list[Row], list[Row]]:
    """(rows to set, keys to remove) that lead from `before` to `after`, by key."""
    old = {tuple(row[n] for n in key): row for row in before}
    new = {tuple(row[n] for n in key): row for row in after}
    return [row for k, row in new.items() if old.get(k) != row], [k for k in old if k not in new]
