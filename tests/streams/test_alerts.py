"""Reserved GPUs that stand unused: when the rule fires, when it does not, and exactly where the line is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from decimal import Decimal

import pytest

from gpuledger.schemas.config import ReservedUnused
from gpuledger.schemas.events import Alert, decode_event, encode_event
from gpuledger.streams.alerts import (
    RESOLVE_AFTER_MINUTES,
    Price,
    UnusedMinute,
    alert_id,
    reserved_unused_alerts,
    window_minutes,
)

MINUTE = 60_000
T0 = 1_767_225_600_000  # 2026-01-01T00:00Z
GPU = 60_000_000  # one GPU for one minute, in microseconds
FIVE = ReservedUnused(for_minutes=5, min_gpus=2)
NOK = {"acme": Price(Decimal("18.50"), "NOK")}


def at_end_of(
    amounts: Sequence[float],
    *,
    known: Iterable[Alert] = (),
    settings: ReservedUnused = FIVE,
    prices: dict[str, Price] | None = None,
    start: int = T0,
) -> list[Alert]:
    """The rule's answer after minutes in which so many GPUs of acme stood unused."""
    rows = [UnusedMinute("acme", start + n * MINUTE, int(gpus * GPU)) for n, gpus in enumerate(amounts) if gpus]
    window = (start, start + len(amounts) * MINUTE)
    return reserved_unused_alerts("h100", window, rows, NOK if prices is None else prices, known, settings)


def test_twelve_gpus_unused_for_five_minutes_fire() -> None:
    (alert,) = at_end_of([0, 14, 12, 12, 13, 12])
    assert (alert.status, alert.tenant, alert.pool) == ("firing", "acme", "h100")
    # 12 stood unused all the time: 12 x 18.50 an hour.
    assert (alert.money_per_hour, alert.currency) == (Decimal("222.0"), "NOK")
    assert alert.started_at_ms == T0 + MINUTE
    assert alert.revision == alert.claimed_at_ms == T0 + 6 * MINUTE
    assert alert.summary == "acme: 12 reserved GPUs of h100 unused for 5 minutes, 222.00 NOK per hour"
    assert alert.evidence == {
        "unused_gpus": "12",
        "minutes": "5",
        "from": "2026-01-01T00:01:00Z",
        "to": "2026-01-01T00:06:00Z",
    }
    assert decode_event(encode_event(alert)) == alert


def test_one_busy_minute_starts_the_count_again() -> None:
    assert at_end_of([12, 12, 12, 0, 12, 12, 12, 12]) == []


def test_exactly_at_the_edge() -> None:
    assert at_end_of([0, 2, 2, 2, 2]) == [], "four minutes are not five"
    assert len(at_end_of([0, 2, 2, 2, 2, 2])) == 1
    assert at_end_of([2, 2, 2, 2, 2 - 1 / GPU]) == [], "one microsecond less than two GPUs"
    assert at_end_of([2, 2, 2, 2]) == [], "a window of four minutes cannot show five"


def test_the_least_money() -> None:
    # 100 an hour at 18.50 are 5.405405... GPUs.
    settings = ReservedUnused(for_minutes=1, min_money_per_hour=Decimal(100))
    assert at_end_of([5.4], settings=settings) == []
    assert [alert.money_per_hour for alert in at_end_of([5.5], settings=settings)] == [Decimal("101.75")]
    free = {"acme": Price(Decimal(0), "NOK")}
    assert at_end_of([1000], settings=settings, prices=free) == [], "what costs nothing is never worth 100"
    (unknown,) = at_end_of([1], settings=settings, prices={})
    assert unknown.money_per_hour is None and "per hour" not in unknown.summary, "an unknown price hides nothing"


def test_it_fires_once_and_resolves_after_minutes_without_trouble() -> None:
    (firing,) = at_end_of([12] * 5)
    assert at_end_of([12] * 6, known=[firing]) == []
    assert at_end_of([12, 12, 12, 0, 0], known=[firing]) == []
    assert at_end_of([12, 0, 12, 0, 0], known=[firing]) == [], "one busy minute between jobs is no end"
    (resolved,) = at_end_of([12, 12, 0, 1, 0], known=[firing], start=T0 + 5 * MINUTE)
    assert RESOLVE_AFTER_MINUTES == 3
    assert (resolved.id, resolved.status, resolved.started_at_ms) == (firing.id, "resolved", firing.started_at_ms)
    assert resolved.ended_at_ms == T0 + 7 * MINUTE
    assert resolved.revision > firing.revision
    assert at_end_of([0] * 5, known=[resolved]) == []


def test_it_fires_again_under_the_same_id() -> None:
    (firing,) = at_end_of([12] * 5)
    (resolved,) = at_end_of([0] * 5, known=[firing], start=T0 + 5 * MINUTE)
    (again,) = at_end_of([3] * 5, known=[resolved], start=T0 + 10 * MINUTE)
    assert (again.id, again.status, again.started_at_ms) == (firing.id, "firing", T0 + 10 * MINUTE)
    assert again.revision > resolved.revision


def test_a_reservation_that_ended_resolves_too() -> None:
    (firing,) = at_end_of([12] * 5)
    window = (T0 + 5 * MINUTE, T0 + 10 * MINUTE)
    (resolved,) = reserved_unused_alerts("h100", window, [], {}, [firing], FIVE)
    assert (resolved.status, resolved.money_per_hour) == ("resolved", Decimal("222.0"))


def test_alerts_of_other_pools_and_rules_are_left_alone() -> None:
    (firing,) = at_end_of([12] * 5)
    window = (T0 + 5 * MINUTE, T0 + 10 * MINUTE)
    assert reserved_unused_alerts("a100", window, [], {}, [firing], FIVE) == []


def test_switched_off_it_never_fires_and_what_fires_resolves() -> None:
    off = ReservedUnused(enabled=False)
    assert at_end_of([12] * 10, settings=off) == []
    (firing,) = at_end_of([12] * 5)
    assert [alert.status for alert in at_end_of([12] * 5, known=[firing], settings=off)] == ["resolved"]


def test_tenants_are_judged_by_themselves() -> None:
    rows = [UnusedMinute(tenant, T0 + n * MINUTE, 2 * GPU) for tenant in ("b", "a") for n in range(5 - (tenant == "b"))]
    alerts = reserved_unused_alerts("h100", (T0, T0 + 5 * MINUTE), rows, {}, [], FIVE)
    assert [alert.tenant for alert in alerts] == ["a"]


def test_ids_are_stable_and_distinct() -> None:
    # Written down: were it to change, every alert that fires would fire again under another id.
    assert alert_id("reserved_unused", "h100", "acme") == "reserved_unused-061928a8dfb827e0"
    assert len({alert_id("r", "ab", "c"), alert_id("r", "a", "bc"), alert_id("ra", "b", "c")}) == 3


def test_the_window() -> None:
    assert window_minutes(FIVE) == 5
    assert window_minutes(ReservedUnused(for_minutes=1)) == RESOLVE_AFTER_MINUTES
    with pytest.raises(ValueError, match="whole minutes"):
        reserved_unused_alerts("p", (T0 + 1, T0 + MINUTE), [], {}, [], FIVE)
    with pytest.raises(ValueError, match="outside of the window"):
        reserved_unused_alerts("p", (T0, T0 + MINUTE), [UnusedMinute("a", T0 + MINUTE, 1)], {}, [], FIVE)
