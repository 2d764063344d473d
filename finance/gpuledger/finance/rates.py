"""All prices that hold for a fleet, as one value that is looked up by pool, tenant and time.

Built from events by a pure function; the same events in any order give the same answers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import pairwise

from gpuledger.finance.asset_cost import AssetCosts
from gpuledger.finance.rate_cards import CardBook, CardsInForce
from gpuledger.finance.tariffs import Tariff
from gpuledger.schemas.events import AssetCost, EnergyTariff, RateCard, encode_event

__all__ = ["Rate", "Rates", "newest", "price_intervals", "rates_from"]

Rate = AssetCost | EnergyTariff | RateCard

_MINUTE_MS = 60_000
_NO_CARDS = CardsInForce(None, None)


@dataclass(frozen=True)
class Rates:
    """Asset costs and rate cards by pool, energy tariffs by id."""

    asset_costs: dict[str, AssetCosts] = field(default_factory=dict)
    cards: dict[str, CardBook] = field(default_factory=dict)
    tariffs: dict[str, Tariff] = field(default_factory=dict)

    def asset_cost(self, pool: str, at_ms: int) -> AssetCost | None:
        """What the operator pays for the pool at an instant; None: not known."""
        costs = self.asset_costs.get(pool)
        return costs.at(at_ms) if costs else None

    def energy_price(self, cost: AssetCost, at_ms: int) -> Decimal | None:
        """The price per kWh that `cost` names, at an instant.

        None: the tariff is unknown, has no price then, or is in another currency, in which no sum could be formed.
        """
        tariff = self.tariffs.get(cost.tariff)
        if tariff is None or tariff.tariff.currency != cost.currency:
            return None
        return tariff.price(at_ms)

    def cards_at(self, pool: str, at_ms: int) -> CardsInForce:
        """The rate cards of the pool in force at an instant."""
        book = self.cards.get(pool)
        return book.at(at_ms) if book else _NO_CARDS

    def rate_card(self, pool: str, tenant: str, at_ms: int) -> RateCard | None:
        """The card that prices a tenant's use of a pool at an instant; its own beats the one for everybody."""
        return self.cards_at(pool, at_ms).of(tenant)


def newest(events: Iterable[Rate]) -> list[Rate]:
    """The greatest revision of each (kind, id); equal revisions are decided by content, never by order."""
    known: dict[tuple[str, str], Rate] = {}
    for event in events:
        key = (event.kind, event.id)
        other = known.get(key)
        if other is None or (event.revision, encode_event(event)) > (other.revision, encode_event(other)):
            known[key] = event
    return [known[key] for key in sorted(known)]


def rates_from(events: Iterable[Rate]) -> Rates:
    """The rates that the events state. Several revisions of one id may be among them: the greatest holds."""
    costs: defaultdict[str, list[AssetCost]] = defaultdict(list)
    cards: defaultdict[str, list[RateCard]] = defaultdict(list)
    tariffs: dict[str, Tariff] = {}
    for event in newest(events):
        match event:
            case AssetCost():
                costs[event.pool].append(event)
            case RateCard():
                cards[event.pool].append(event)
            case EnergyTariff():
                tariffs[event.id] = Tariff(event)
    return Rates(
        asset_costs={pool: AssetCosts(each) for pool, each in costs.items()},
        cards={pool: CardBook(each) for pool, each in cards.items()},
        tariffs=tariffs,
    )


def price_intervals(
    pool: str, from_ms: int, to_ms: int, rates: Rates, interval_minutes: int = 15
) -> list[tuple[int, int]]:
    """Every price interval [start, end) of the pool that meets [from_ms, to_ms), whole (not clipped), ascending.

    The grid is multiples of `interval_minutes` since 1970 UTC, cut at each change of the pool's asset cost, of the
    price in the tariff it names, and of the pool's rate cards: inside an interval nothing changes.
    """
    if interval_minutes < 1:
        raise ValueError(f"interval_minutes: expected 1 or more, got {interval_minutes}")
    if to_ms <= from_ms:
        return []
    step = interval_minutes * _MINUTE_MS
    low, high = from_ms // step * step, -(-to_ms // step) * step
    edges = set(range(low, high + 1, step))
    costs = rates.asset_costs.get(pool)
    if costs:
        edges |= costs.cuts()
        for cost in costs.costs:
            tariff = rates.tariffs.get(cost.tariff)
            start, end = max(low, cost.start_ms), min(high, cost.end_ms)
            if tariff and start < end:
                edges.update(tariff.cuts(start, end))
    book = rates.cards.get(pool)
    if book:
        edges |= book.cuts()
    ordered = sorted(edge for edge in edges if low <= edge <= high)
    return [(a, b) for a, b in pairwise(ordered) if b > from_ms and a < to_ms]
