"""Which rate card prices a tenant's use of a pool at an instant: the tenant's own, else the one for everybody.

Cards change rarely and are asked for on every price interval, so the cards in force are worked out once per stretch of
time in which none begins or ends.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from gpuledger.schemas.events import RateCard

__all__ = ["CardBook", "CardsInForce"]


@dataclass(frozen=True, slots=True)
class CardsInForce:
    """The rate cards of a pool over [start_ms, end_ms) (None: without bound): own cards by tenant, and the default."""

    start_ms: int | None
    end_ms: int | None
    own: Mapping[str, RateCard] = field(default_factory=dict)
    default: RateCard | None = None

    def of(self, tenant: str) -> RateCard | None:
        """The card that prices `tenant`; None: nothing says what it pays. The operator ("") pays nobody."""
        return self.own.get(tenant, self.default) if tenant else None


class CardBook:
    """The rate cards of a pool by time. Of two that overlap (an error at apply time) the later start wins."""

    def __init__(self, cards: Iterable[RateCard]) -> None:
        in_force = (card for card in cards if card.end_ms is None or card.end_ms > card.start_ms)
        self.cards = sorted(in_force, key=lambda card: (card.start_ms, card.revision, card.id))
        self._edges = sorted(self.cuts())
        self._known: dict[int, CardsInForce] = {}

    def at(self, at_ms: int) -> CardsInForce:
        """The cards in force at an instant, and the stretch of time over which they stay the same."""
        n = bisect_right(self._edges, at_ms)
        if n not in self._known:
            self._known[n] = self._in_force(n)
        return self._known[n]

    def cuts(self) -> set[int]:
        """Every instant at which a card begins or ends."""
        return {edge for card in self.cards for edge in (card.start_ms, card.end_ms) if edge is not None}

    def _in_force(self, n: int) -> CardsInForce:
        start = self._edges[n - 1] if n else None
        end = self._edges[n] if n < len(self._edges) else None
        if start is None:
            return CardsInForce(None, end)
        # Sorted by start: a later card replaces an earlier one of the same tenant.
        cards = {
            card.tenant: card
            for card in self.cards
            if card.start_ms <= start and (card.end_ms is None or start < card.end_ms)
        }
        default = cards.pop("", None)
        return CardsInForce(start, end, cards, default)
