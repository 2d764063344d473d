"""Asks the under-use rule about every pool as its minutes become complete, and publishes what changed.

Runs on the worker that leads (see frontier). What fires already is read from the database each time, so a restart
neither forgets an alert nor raises it twice.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from decimal import Decimal

from gpuledger.finance.asset_cost import fixed_cost_nano
from gpuledger.finance.exact import from_nano
from gpuledger.finance.rates import Rates, rates_from
from gpuledger.schemas.config import ReservedUnused
from gpuledger.schemas.events import Alert
from gpuledger.streams.alerts import Price, UnusedMinute, reserved_unused_alerts, window_minutes
from gpuledger.streams.blocking import BlockingThread
from gpuledger.streams.facts import documents
from gpuledger.streams.marks import MINUTE_MS
from gpuledger.streams.recomputer import LedgerRules
from gpuledger.streams.store import Store

__all__ = ["AlertWatch", "reserved_prices"]

log = logging.getLogger(__name__)

_HOUR_US = 3_600_000_000

_COMPUTED = """
    SELECT count(), max(service_us) FROM v_recomputes WHERE pool = {pool:String} AND complete = 1
        AND minute >= fromUnixTimestamp64Milli({from_ms:Int64}, 'UTC')
        AND minute < fromUnixTimestamp64Milli({to_ms:Int64}, 'UTC')
"""
_UNUSED = """
    SELECT tenant, toUnixTimestamp64Milli(minute), gpu_us FROM v_ledger_minute
    WHERE pool = {pool:String} AND kind = 'reserved_unused'
        AND minute >= fromUnixTimestamp64Milli({from_ms:Int64}, 'UTC')
        AND minute < fromUnixTimestamp64Milli({to_ms:Int64}, 'UTC')
"""
_FIRING = """
    SELECT document FROM facts WHERE kind = 'alert' AND (id, rank) IN (
        SELECT id, rank FROM alerts FINAL WHERE status = 'firing')
    ORDER BY id LIMIT 1 BY id
"""


def reserved_prices(pool: str, at_ms: int, service_us: int, rates: Rates) -> Callable[[str], Price | None]:
    """What an unused reserved GPU costs per hour: the tenant's rate for it, else its rate for a held one, else the
    pool's fixed asset cost per GPU in service (`service_us` GPU-microseconds per minute)."""
    cards = rates.cards_at(pool, at_ms)
    cost = rates.asset_cost(pool, at_ms)
    own: Price | None = None
    if cost is not None and service_us > 0:
        minute = at_ms // MINUTE_MS * MINUTE_MS
        per_minute = from_nano(fixed_cost_nano(cost, minute, minute + MINUTE_MS))
        own = Price((per_minute * _HOUR_US / service_us).quantize(Decimal("0.000000001")), cost.currency)

    def price(tenant: str) -> Price | None:
        card = cards.of(tenant)
        if card is None:
            return own
        rate = card.per_gpu_hour if card.reserved_unused_per_gpu_hour is None else card.reserved_unused_per_gpu_hour
        return Price(rate, card.currency)

    return price


class AlertWatch:
    """One look per call; errors are counted and logged, never raised."""

    def __init__(
        self, store: Store, rules: LedgerRules, settings: ReservedUnused, publish: Callable[[Alert], Awaitable[object]]
    ) -> None:
        self._store = store
        self._rules = rules
        self._settings = settings
        self._publish = publish
        self._thread = BlockingThread("alerts")
        self._looked: dict[str, int] = {}
        self.published = 0
        self.failures = 0

    async def look(self) -> None:
        """Publishes alerts that begin or end, for every pool whose complete minutes have moved on."""
        if not self._settings.enabled:
            return
        try:
            for alert in await self._thread.call(self._changes):
                await self._publish(alert)
                self.published += 1
        except Exception as error:
            self.failures += 1
            log.warning("under-use was not looked at: %s", error)

    def _changes(self) -> list[Alert]:
        until_ms = max(0, self._store.stored_until_ms(self._rules.gates) - self._rules.grace_ms)
        until_ms = until_ms // MINUTE_MS * MINUTE_MS
        found: list[Alert] = []
        if until_ms == 0:
            return found
        known = [fact for fact in documents(text for (text,) in self._store.rows(_FIRING)) if isinstance(fact, Alert)]
        for pool in self._store.pools():
            if self._looked.get(pool) != until_ms:
                changes = self._pool(pool, until_ms, known)
                if changes is not None:
                    self._looked[pool] = until_ms
                    found += changes
        return found

    def _pool(self, pool: str, until_ms: int, known: list[Alert]) -> list[Alert] | None:
        """None while minutes of the window are still to be computed as complete."""
        from_ms = until_ms - window_minutes(self._settings) * MINUTE_MS
        range_: Mapping[str, object] = {"pool": pool, "from_ms": from_ms, "to_ms": until_ms}
        (computed, service_us), *_ = self._store.rows(_COMPUTED, range_)
        if int(computed) < (until_ms - from_ms) // MINUTE_MS:
            return None
        rows = [UnusedMinute(tenant, int(ms), int(us)) for tenant, ms, us in self._store.rows(_UNUSED, range_)]
        price = reserved_prices(pool, until_ms, int(service_us), rates_from(self._store.rates(pool)))
        tenants = {row.tenant for row in rows}
        prices = {tenant: found for tenant in tenants if (found := price(tenant)) is not None}
        return reserved_unused_alerts(pool, (from_ms, until_ms), rows, prices, known, self._settings)
