"""What is wrong with a set of rates as a whole: prices that overlap, are missing, or cannot be added up.

Each finding names where, the value and the fix; none is found later by a wrong number.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from datetime import UTC, datetime
from decimal import Decimal
from itertools import pairwise

from gpuledger.finance.rates import Rate, Rates
from gpuledger.finance.tariffs import Tariff
from gpuledger.schemas.events import AssetCost, RateCard

__all__ = ["prices_end", "validate"]

#: A price per kWh or GPU-hour beyond it is a slip of the decimal point.
_GREATEST_PRICE = Decimal(10**9)
_SECTION = {"asset_cost": "asset_costs", "rate_card": "rate_cards", "energy_tariff": "energy_tariffs"}


def validate(
    rates: Rates,
    pools: Collection[str] | None = None,
    positions: Mapping[tuple[str, str], str] | None = None,
    now_ms: int | None = None,
) -> list[str]:
    """Every problem of the rates; empty: they may be applied.

    Args:
        pools: the pools that exist; None: not checked.
        positions: where (kind, id) was written, for instance ``rates.yaml: asset_costs[0]``.
        now_ms: prices of electricity after this instant need not be known yet (see `prices_end`); None: all are needed.
    """
    at = _Positions(positions or {})
    return [
        *_costs(rates, at, now_ms),
        *_cards(rates, at),
        *_tariffs(rates, at),
        *(() if pools is None else _pools(rates, pools, at)),
    ]


def prices_end(rates: Rates, now_ms: int) -> dict[str, int]:
    """Tariffs in use whose prices end before the asset costs that name them do, with that end, if it is not past."""
    ends: dict[str, int] = {}
    for costs in rates.asset_costs.values():
        for cost in costs.costs:
            tariff = rates.tariffs.get(cost.tariff)
            if tariff and now_ms <= tariff.end_ms < cost.end_ms:
                ends[cost.tariff] = tariff.end_ms
    return ends


class _Positions:
    def __init__(self, positions: Mapping[tuple[str, str], str]) -> None:
        self._positions = positions

    def of(self, fact: Rate, field: str = "") -> str:
        place = self._positions.get((fact.kind, fact.id), f"{_SECTION[fact.kind]}[{fact.id!r}]")
        return f"{place}.{field}" if field else place


def _time(at_ms: int | None) -> str:
    if at_ms is None:
        return "further notice"
    return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%dT%H:%MZ")


def _number(place: str, value: Decimal | None, limit: Decimal) -> Iterator[str]:
    """That decimals are finite and short enough is the events' own matter; here is what cannot be meant."""
    if value is not None and abs(value) >= limit:
        yield f"{place}: {value} is beyond {limit:.0f}; check the decimal point and the unit"


def _overlap(at: _Positions, first: AssetCost | RateCard, second: AssetCost | RateCard, of: str) -> str:
    return (
        f"{at.of(second, 'start')}: {_time(second.start_ms)} is before the end ({_time(first.end_ms)}) of "
        f"{at.of(first)} for {of}; end that one at {_time(second.start_ms)}, or begin this one later"
    )


def _costs(rates: Rates, at: _Positions, now_ms: int | None) -> Iterator[str]:
    for pool, costs in sorted(rates.asset_costs.items()):
        for first, second in pairwise(costs.costs):
            if second.start_ms < first.end_ms:
                yield _overlap(at, first, second, f"pool {pool}")
        for cost in costs.costs:
            yield from _number(at.of(cost, "pue"), cost.pue, Decimal(100))
            yield from _number(at.of(cost, "node_energy_factor"), cost.node_energy_factor, Decimal(100))
            if cost.tariff:
                yield from _tariff_of(cost, rates.tariffs.get(cost.tariff), rates, at, now_ms)


def _tariff_of(
    cost: AssetCost, tariff: Tariff | None, rates: Rates, at: _Positions, now_ms: int | None
) -> Iterator[str]:
    place = at.of(cost, "tariff")
    if tariff is None:
        known = ", ".join(sorted(rates.tariffs)) or "there is none"
        yield f"{place}: there is no energy tariff {cost.tariff!r}; known: {known}"
        return
    if tariff.tariff.currency != cost.currency:
        yield (
            f"{place}: {cost.tariff} is in {tariff.tariff.currency} and the asset cost in {cost.currency}; "
            f"give both in one currency"
        )
    if cost.start_ms < tariff.start_ms:
        yield (
            f"{place}: {cost.tariff} has no price from {_time(cost.start_ms)} to "
            f"{_time(min(tariff.start_ms, cost.end_ms))}; add prices from {_time(cost.start_ms)} on"
        )
    needed_until = cost.end_ms if now_ms is None else min(cost.end_ms, now_ms)
    if tariff.end_ms < needed_until:
        yield (
            f"{place}: {cost.tariff} has no price from {_time(max(tariff.end_ms, cost.start_ms))} to "
            f"{_time(needed_until)}; add prices up to {_time(needed_until)}"
        )


def _cards(rates: Rates, at: _Positions) -> Iterator[str]:
    for pool, book in sorted(rates.cards.items()):
        by_tenant: dict[str, list[RateCard]] = {}
        for card in book.cards:
            by_tenant.setdefault(card.tenant, []).append(card)
            yield from _number(at.of(card, "per_gpu_hour"), card.per_gpu_hour, _GREATEST_PRICE)
            unused = card.reserved_unused_per_gpu_hour
            yield from _number(at.of(card, "reserved_unused_per_gpu_hour"), unused, _GREATEST_PRICE)
        for tenant, cards in sorted(by_tenant.items()):
            for first, second in pairwise(cards):
                if first.end_ms is None or second.start_ms < first.end_ms:
                    yield _overlap(
                        at, first, second, f"pool {pool}, " + (f"tenant {tenant}" if tenant else "everybody")
                    )


def _tariffs(rates: Rates, at: _Positions) -> Iterator[str]:
    for _, tariff in sorted(rates.tariffs.items()):
        for n, point in enumerate(tariff.tariff.prices):
            place = f"{at.of(tariff.tariff)}.prices[{n}].per_kwh"
            yield from _number(place, point.per_kwh, _GREATEST_PRICE)


def _pools(rates: Rates, pools: Collection[str], at: _Positions) -> Iterator[str]:
    facts = [fact for costs in rates.asset_costs.values() for fact in costs.costs]
    cards = [fact for book in rates.cards.values() for fact in book.cards]
    for fact in (*facts, *cards):
        if fact.pool not in pools:
            known = ", ".join(sorted(pools)) or "none yet"
            yield f"{at.of(fact, 'pool')}: there is no pool {fact.pool!r}; known: {known}"
