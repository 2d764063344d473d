"""From the number of GPUs each tenant owns over time to commitments and transfers.

What one tenant loses in the instant another gains moved between them: a transfer. The rest was delivered or withdrawn:
a commitment begins or ends. Committed GPUs at any instant (commitments + transfers in - transfers out) are exactly the
input.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["CapacityFacts", "CommitmentSpan", "TransferSpan", "capacity_facts"]


@dataclass(frozen=True, slots=True, order=True)
class CommitmentSpan:
    """`gpus` GPUs of `tenant` over [start_ms, end_ms), before any transfer."""

    start_ms: int
    end_ms: int
    tenant: str
    gpus: int


@dataclass(frozen=True, slots=True, order=True)
class TransferSpan:
    """`gpus` GPUs that belong to `to_tenant` instead of `from_tenant` over [start_ms, end_ms)."""

    start_ms: int
    end_ms: int
    from_tenant: str
    to_tenant: str
    gpus: int


@dataclass(frozen=True, slots=True)
class CapacityFacts:
    """Sorted by start; no two have the same parties and interval."""

    commitments: tuple[CommitmentSpan, ...]
    transfers: tuple[TransferSpan, ...]


@dataclass(frozen=True, slots=True)
class _Lot:
    """GPUs that came to their present owner by the same path: delivered to `tenant`, then moved by `moves`."""

    gpus: int
    tenant: str
    start_ms: int
    moves: tuple[tuple[int, str, str], ...] = ()


@dataclass(slots=True)
class _Book:
    lots: dict[str, list[_Lot]] = field(default_factory=dict[str, list[_Lot]])
    commitments: Counter[tuple[int, int, str]] = field(default_factory=Counter[tuple[int, int, str]])
    transfers: Counter[tuple[int, int, str, str]] = field(default_factory=Counter[tuple[int, int, str, str]])

    def take(self, owner: str, gpus: int) -> Iterator[_Lot]:
        """Removes `gpus` of the owner, what came last first, cutting the last lot touched."""
        lots = self.lots[owner]
        while gpus:
            lot = lots.pop()
            if lot.gpus > gpus:
                lots.append(_Lot(lot.gpus - gpus, lot.tenant, lot.start_ms, lot.moves))
                lot = _Lot(gpus, lot.tenant, lot.start_ms, lot.moves)
            gpus -= lot.gpus
            yield lot

    def deliver(self, owner: str, gpus: int, at_ms: int) -> None:
        self.lots.setdefault(owner, []).append(_Lot(gpus, owner, at_ms))

    def move(self, loser: str, gainer: str, gpus: int, at_ms: int) -> None:
        for lot in self.take(loser, gpus):
            moves = (*lot.moves, (at_ms, loser, gainer))
            self.lots.setdefault(gainer, []).append(_Lot(lot.gpus, lot.tenant, lot.start_ms, moves))

    def withdraw(self, owner: str, gpus: int, at_ms: int) -> None:
        """Ends the commitments below the owner's GPUs, and the transfers that brought them here."""
        for lot in self.take(owner, gpus):
            self.commitments[(lot.start_ms, at_ms, lot.tenant)] += lot.gpus
            for moved_ms, loser, gainer in lot.moves:
                self.transfers[(moved_ms, at_ms, loser, gainer)] += lot.gpus


def capacity_facts(changes: Sequence[tuple[int, Mapping[str, int]]]) -> CapacityFacts:
    """Facts whose committed GPUs equal the input at every instant.

    Args:
        changes: (UTC ms, tenant -> GPUs from then on); tenants not named keep theirs, and begin with 0. The last
            entry must bring every tenant to 0: there all facts end.

    In one instant losers and gainers are matched in the order of their names. Of a tenant's GPUs, those that came last
    go first.

    Raises:
        ValueError: times are not ascending, a number is negative, or a tenant has GPUs after the last entry.
    """
    book = _Book()
    owned: dict[str, int] = {}
    last_ms: int | None = None
    for at_ms, numbers in changes:
        if last_ms is not None and at_ms <= last_ms:
            raise ValueError(f"changes: {at_ms} is not after {last_ms}")
        last_ms = at_ms
        differences = {tenant: gpus - owned.get(tenant, 0) for tenant, gpus in numbers.items()}
        if any(gpus < 0 for gpus in numbers.values()):
            raise ValueError(f"changes: a number of GPUs at {at_ms} is negative")
        _step(book, at_ms, differences)
        owned.update(numbers)
    left = [tenant for tenant, gpus in owned.items() if gpus]
    if left:
        raise ValueError(f"changes: {left[0]} still has {owned[left[0]]} GPUs after the last entry")
    return CapacityFacts(
        tuple(sorted(CommitmentSpan(start, end, tenant, n) for (start, end, tenant), n in book.commitments.items())),
        tuple(sorted(TransferSpan(start, end, a, b, n) for (start, end, a, b), n in book.transfers.items())),
    )


def _step(book: _Book, at_ms: int, differences: Mapping[str, int]) -> None:
    """One instant: moves between losers and gainers, then what is delivered or withdrawn."""
    losers = [(tenant, -n) for tenant, n in sorted(differences.items(), reverse=True) if n < 0]
    gainers = [(tenant, n) for tenant, n in sorted(differences.items(), reverse=True) if n > 0]
    while losers and gainers:
        (loser, lost), (gainer, gained) = losers.pop(), gainers.pop()
        gpus = min(lost, gained)
        book.move(loser, gainer, gpus, at_ms)
        if lost > gpus:
            losers.append((loser, lost - gpus))
        if gained > gpus:
            gainers.append((gainer, gained - gpus))
    for loser, lost in reversed(losers):
        book.withdraw(loser, lost, at_ms)
    for gainer, gained in reversed(gainers):
        book.deliver(gainer, gained, at_ms)
