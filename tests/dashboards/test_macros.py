"""The plugin's macros, by the rules of its source."""

from datetime import UTC, datetime, timedelta

import pytest

from gpuledger.dashboards.exceptions import PanelError
from gpuledger.dashboards.macros import TimeRange, expand, range_until

RANGE = TimeRange(datetime(2026, 3, 1, 12, 0, 0, 500_000, UTC), datetime(2026, 3, 2, 1, 2, 3, 999_000, UTC), 30)


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("$__timeFilter(minute)", "minute >= toDateTime(1772366400) AND minute <= toDateTime(1772413323)"),
        (
            "$__timeFilter_ms(t)",
            "t >= fromUnixTimestamp64Milli(1772366400500) AND t <= fromUnixTimestamp64Milli(1772413323999)",
        ),
        ("$__dateFilter(d)", "d >= toDate('2026-03-01') AND d <= toDate('2026-03-02')"),
        ("f($__fromTime, $__toTime)", "f(toDateTime(1772366400), toDateTime(1772413323))"),
        ("$__fromTime_ms", "fromUnixTimestamp64Milli(1772366400500)"),
        ("$__toTime_ms", "fromUnixTimestamp64Milli(1772413323999)"),
        ("$__timeInterval(t)", "toStartOfInterval(toDateTime(t), INTERVAL 30 second)"),
        ("$__timeInterval_ms(t)", "toStartOfInterval(toDateTime64(t, 3), INTERVAL 30000 millisecond)"),
        ("x / $__interval_s", "x / 30"),
        # A comma inside inner parentheses is no new argument.
        ("$__timeFilter(f(a, b))", "f(a, b) >= toDateTime(1772366400) AND f(a, b) <= toDateTime(1772413323)"),
        ("no macro, $1 and $name", "no macro, $1 and $name"),
    ],
)
def test_each_macro_expands_by_the_plugins_rule(sql: str, expected: str) -> None:
    assert expand(f"SELECT {sql} FROM v", RANGE) == f"SELECT {expected} FROM v"


def test_an_interval_is_at_least_a_second() -> None:
    assert expand("$__interval_s", TimeRange(RANGE.since, RANGE.until, 0)) == "1"


@pytest.mark.parametrize(
    ("sql", "text"),
    [
        ("$__timeFiter(minute)", "timeFiter: not a macro"),
        ("$__conditionalAll(a, $b)", "conditionalAll: not a macro"),
        ("$__timeFilter(a, b)", "expected 1 argument"),
        ("$__timeFilter", "expected 1 argument"),
        ("$__timeFilter(a", "never closed"),
    ],
)
def test_a_wrong_macro_is_named(sql: str, text: str) -> None:
    with pytest.raises(PanelError, match=text):
        expand(sql, RANGE)


def test_today_begins_at_midnight_utc() -> None:
    until = datetime(2026, 3, 1, 0, 30, tzinfo=UTC).astimezone(tz=None)
    assert range_until("today", until).since == datetime(2026, 3, 1, tzinfo=UTC)
    assert range_until("1h", until).since == until - timedelta(hours=1)
