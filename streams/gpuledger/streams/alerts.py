"""The under-use rule: a tenant's reserved GPUs that stand unused for long, with the money per hour they cost. Pure.

It is asked once per pool for a window of complete minutes and keeps no state: what fires now is read from the `alerts`
table, so a worker that starts again goes on where another one stopped, and the same window gives the same events.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction
from math import ceil

from gpuledger.finance.exact import from_nano, half_even, to_nano
from gpuledger.schemas.config import ReservedUnused
from gpuledger.schemas.events import Alert

__all__ = [
    "RESERVED_UNUSED",
    "RESOLVE_AFTER_MINUTES",
    "Price",
    "UnusedMinute",
    "alert_id",
    "reserved_unused_alerts",
    "window_minutes",
]

RESERVED_UNUSED = "reserved_unused"
#: An alert ends after so many minutes in a row without the trouble: one busy minute between jobs is no end.
RESOLVE_AFTER_MINUTES = 3

_MINUTE_MS = 60_000
_MINUTE_US = 60_000_000
_ACTION = "Run work on them, offer them to another tenant (gpuledger capacity apply), or end the reservation."


@dataclass(frozen=True, slots=True)
class UnusedMinute:
    """A row of kind reserved_unused of `v_ledger_minute`: GPU-microseconds of one tenant in one complete minute."""

    tenant: str
    minute_ms: int
    gpu_us: int


@dataclass(frozen=True, slots=True)
class Price:
    """What a reserved GPU costs per hour."""

    per_gpu_hour: Decimal
    currency: str


def window_minutes(settings: ReservedUnused) -> int:
    """How many complete minutes the rule has to see to fire and to resolve."""
    return max(settings.for_minutes, RESOLVE_AFTER_MINUTES)


def alert_id(rule: str, pool: str, tenant: str) -> str:
    """The fingerprint: the same rule, pool and tenant have the same id, whenever and wherever it is computed."""
    text = "\0".join((rule, pool, tenant))
    return f"{rule}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def reserved_unused_alerts(
    pool: str,
    window: tuple[int, int],
    unused: Iterable[UnusedMinute],
    prices: Mapping[str, Price],
    known: Iterable[Alert],
    settings: ReservedUnused,
) -> list[Alert]:
    """What changes at the end of the window: alerts that begin to fire and alerts that resolve.

    A minute is in trouble when at least `min_gpus` GPUs were reserved and unused in it, on average, and they cost at
    least `min_money_per_hour`. `for_minutes` of them in a row up to the window's end fire; `RESOLVE_AFTER_MINUTES`
    without trouble in a row resolve. A price that is not known hides nothing: the alert fires without its money.

    Args:
        window: [from_ms, to_ms) on minutes, all complete; a minute without a row had nothing unused. It should have
            `window_minutes` minutes or more: what it does not show is not assumed.
        unused: rows of `pool` in the window.
        prices: by tenant.
        known: the newest state of alerts, of any rule and pool.

    Returns:
        Alerts in the order of tenants; claim time and revision are the window's end.

    Raises:
        ValueError: the window is not on minutes, or a row is outside of it.
    """
    from_ms, to_ms = window
    if from_ms % _MINUTE_MS or to_ms % _MINUTE_MS or to_ms < from_ms:
        raise ValueError(f"window: expected whole minutes, got [{from_ms}, {to_ms})")
    minutes = (to_ms - from_ms) // _MINUTE_MS
    series: dict[str, list[int]] = {}
    for row in unused:
        if not from_ms <= row.minute_ms < to_ms:
            raise ValueError(f"unused: {row.minute_ms} of {row.tenant} is outside of the window [{from_ms}, {to_ms})")
        series.setdefault(row.tenant, [0] * minutes)[(row.minute_ms - from_ms) // _MINUTE_MS] += row.gpu_us
    firing = {
        alert.tenant: alert
        for alert in known
        if alert.rule == RESERVED_UNUSED and alert.pool == pool and alert.status == "firing"
    }
    changes: list[Alert] = []
    for tenant in sorted(series.keys() | firing.keys()):
        amounts = series.get(tenant, [0] * minutes)
        price = prices.get(tenant)
        least_us = _least_us(settings, price)
        before = firing.get(tenant)
        if before is None:
            run = _trailing(amounts, least_us, trouble=True)
            if run >= settings.for_minutes:
                changes.append(_fire(pool, tenant, to_ms, run, min(amounts[-settings.for_minutes :]), price))
        else:
            run = _trailing(amounts, least_us, trouble=False)
            if run >= RESOLVE_AFTER_MINUTES:
                changes.append(_resolve(before, to_ms, run))
    return changes


def _least_us(settings: ReservedUnused, price: Price | None) -> int | None:
    """GPU-microseconds per minute from which a minute is in trouble; None: it never is."""
    if not settings.enabled:
        return None
    least = settings.min_gpus * _MINUTE_US
    if settings.min_money_per_hour is None or price is None:
        return least
    if price.per_gpu_hour <= 0:
        return None if settings.min_money_per_hour > 0 else least
    return max(least, ceil(Fraction(settings.min_money_per_hour) / Fraction(price.per_gpu_hour) * _MINUTE_US))


def _trailing(amounts: list[int], least_us: int | None, trouble: bool) -> int:
    """How many minutes at the end are in trouble (or are not)."""
    run = 0
    for amount in reversed(amounts):
        if (least_us is not None and amount >= least_us) != trouble:
            break
        run += 1
    return run


def _fire(pool: str, tenant: str, to_ms: int, run: int, gpu_us: int, price: Price | None) -> Alert:
    """`gpu_us`: the least of the minutes that made it fire, which is what stood unused all the time."""
    gpus = format(round(Decimal(gpu_us) / _MINUTE_US, 2).normalize(), "f")
    money = None if price is None else from_nano(half_even(to_nano(price.per_gpu_hour) * gpu_us, _MINUTE_US))
    cost = "" if money is None or price is None else f", {money:.2f} {price.currency} per hour"
    started_ms = to_ms - run * _MINUTE_MS
    return Alert(
        id=alert_id(RESERVED_UNUSED, pool, tenant),
        revision=to_ms,
        claimed_at_ms=to_ms,
        rule=RESERVED_UNUSED,
        status="firing",
        pool=pool,
        tenant=tenant,
        started_at_ms=started_ms,
        money_per_hour=money,
        currency="" if price is None else price.currency,
        summary=f"{tenant}: {gpus} reserved GPUs of {pool} unused for {run} minutes{cost}",
        action=_ACTION,
        evidence={"unused_gpus": gpus, "minutes": str(run), "from": _iso(started_ms), "to": _iso(to_ms)},
    )


def _resolve(before: Alert, to_ms: int, run: int) -> Alert:
    ended_ms = max(before.started_at_ms, to_ms - run * _MINUTE_MS)
    return Alert(
        id=before.id,
        revision=max(to_ms, before.revision + 1),
        claimed_at_ms=to_ms,
        rule=before.rule,
        status="resolved",
        severity=before.severity,
        pool=before.pool,
        tenant=before.tenant,
        started_at_ms=before.started_at_ms,
        ended_at_ms=ended_ms,
        money_per_hour=before.money_per_hour,
        currency=before.currency,
        summary=f"{before.tenant}: the reserved GPUs of {before.pool} are used again since {_iso(ended_ms)}",
        evidence={**before.evidence, "ended": _iso(ended_ms)},
    )


def _iso(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
