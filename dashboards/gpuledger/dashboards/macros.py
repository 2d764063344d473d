"""Expands the time macros of Grafana's ClickHouse plugin by the plugin's own rules, so that one SQL text serves
Grafana, our page and the tests.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from gpuledger.dashboards.exceptions import PanelError
from gpuledger.dashboards.panels import RANGES

__all__ = ["TimeRange", "expand", "range_until"]


@dataclass(frozen=True, slots=True)
class TimeRange:
    """[since, until] of aware datetimes, both ends included as in the plugin. `interval_s` is $__interval_s."""

    since: datetime
    until: datetime
    interval_s: int = 60


def range_until(name: str, until: datetime) -> TimeRange:
    """The range called `name` (see panels.RANGES) that ends at `until`."""
    seconds = RANGES[name]
    until = until.astimezone(UTC)
    if seconds is None:
        return TimeRange(until.replace(hour=0, minute=0, second=0, microsecond=0), until)
    return TimeRange(until - timedelta(seconds=seconds), until)


def _seconds(at: datetime) -> str:
    return f"toDateTime({int(at.timestamp())})"


def _millis(at: datetime) -> str:
    return f"fromUnixTimestamp64Milli({int(at.timestamp() * 1000)})"


def _date(at: datetime) -> str:
    return f"toDate('{at.astimezone(UTC):%Y-%m-%d}')"


def _interval_s(given: TimeRange) -> int:
    return max(1, given.interval_s)


def _interval_ms(column: str, given: TimeRange) -> str:
    return f"toStartOfInterval(toDateTime64({column}, 3), INTERVAL {_interval_s(given) * 1000} millisecond)"


_MACROS: dict[str, tuple[int, Callable[[list[str], TimeRange], str]]] = {
    "timeFilter": (1, lambda a, r: f"{a[0]} >= {_seconds(r.since)} AND {a[0]} <= {_seconds(r.until)}"),
    "timeFilter_ms": (1, lambda a, r: f"{a[0]} >= {_millis(r.since)} AND {a[0]} <= {_millis(r.until)}"),
    "dateFilter": (1, lambda a, r: f"{a[0]} >= {_date(r.since)} AND {a[0]} <= {_date(r.until)}"),
    "fromTime": (0, lambda _, r: _seconds(r.since)),
    "toTime": (0, lambda _, r: _seconds(r.until)),
    "fromTime_ms": (0, lambda _, r: _millis(r.since)),
    "toTime_ms": (0, lambda _, r: _millis(r.until)),
    "timeInterval": (
        1,
        lambda a, r: f"toStartOfInterval(toDateTime({a[0]}), INTERVAL {_interval_s(r)} second)",
    ),
    "timeInterval_ms": (1, lambda a, r: _interval_ms(a[0], r)),
    "interval_s": (0, lambda _, r: str(_interval_s(r))),
}
_NAME = re.compile(r"\$__(\w+)")


def expand(sql: str, given: TimeRange) -> str:
    """The SQL with every `$__macro` replaced.

    Raises:
        PanelError: a macro that is unknown or has the wrong number of arguments. `$__conditionalAll` and
            `$__adHocFilters` are unknown on purpose: Grafana expands them in the browser only, never in alert rules.
    """
    return "".join(_pieces(sql, given))


def _pieces(sql: str, given: TimeRange) -> Iterator[str]:
    position = 0
    while match := _NAME.search(sql, position):
        yield sql[position : match.start()]
        name = match[1]
        if name not in _MACROS:
            raise PanelError(f"$__{name}: not a macro; expected one of {', '.join(sorted(_MACROS))}")
        wanted, build = _MACROS[name]
        arguments, position = _arguments(sql, match.end(), name) if wanted else ([], match.end())
        if len(arguments) != wanted:
            raise PanelError(f"$__{name}: expected {wanted} argument(s), got {len(arguments)}: {arguments}")
        yield build(arguments, given)
    yield sql[position:]


def _arguments(sql: str, start: int, name: str) -> tuple[list[str], int]:
    """The arguments in the parentheses at `start`, split at commas outside inner ones, and where they end."""
    if sql[start : start + 1] != "(":
        return [], start
    depth, begin, found = 0, start + 1, list[str]()
    for n in range(start, len(sql)):
        if sql[n] == "(":
            depth += 1
        elif sql[n] == ")":
            depth -= 1
        if depth == 0 or (depth == 1 and sql[n] == ","):
            found.append(sql[begin:n].strip())
            begin = n + 1
        if depth == 0:
            return [argument for argument in found if argument], n + 1
    raise PanelError(f"$__{name}: its parenthesis is never closed")
