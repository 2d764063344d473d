"""What a minute of the ledger was computed from, as numbers that fit into its marker: the proof against lost marks.

A fact or fragment that is stored, and whose dirty mark is lost, leaves every sum right. Only a comparison of what a
recompute read with what is stored now can show it.
"""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gpuledger.finance.rates import Rates
from gpuledger.schemas.events import Fact, encode_event
from gpuledger.streams.claims import boot_ends
from gpuledger.streams.ledger_rows import Fingerprints
from gpuledger.streams.marks import MINUTE_MS
from gpuledger.streams.pool_facts import OPEN_END_MS, PoolFacts

__all__ = ["FACTS_FORMULA", "RatePrints", "facts_hashes", "fingerprints"]

Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]

#: How `facts_hash` is made today. Every marker says by which formula its own was made, so that a new term does not make
#: minutes of older versions look wrong: 0 has neither boots nor the account map.
FACTS_FORMULA = 1


def fingerprints(facts: PoolFacts, fragments: pa.Table, from_ms: int, to_ms: int, confirm_ms: int) -> Fingerprints:
    """Per minute: how many fragments, the sum of their hashes, and the sum of the hashes of the facts in force (both
    modulo 2^64, so that order does not matter)."""
    minutes = (to_ms - from_ms) // MINUTE_MS
    at = (fragments.column("minute").cast(pa.int64()).to_numpy() - from_ms) // MINUTE_MS
    fragments_hash = np.zeros(minutes, dtype=np.uint64)
    np.add.at(fragments_hash, at, fragments.column("hash").to_numpy())
    facts_hash = facts_hashes(facts, from_ms, to_ms, confirm_ms)
    return Fingerprints(np.bincount(at, minlength=minutes), fragments_hash, facts_hash, FACTS_FORMULA)


class _Steps:
    """Hashes that count in the minutes that an interval touches."""

    def __init__(self, from_ms: int, to_ms: int) -> None:
        self._from_ms = from_ms
        self._minutes = (to_ms - from_ms) // MINUTE_MS
        self._steps = np.zeros(self._minutes + 1, dtype=np.uint64)

    def count(self, start: Ints, end: Ints, hashes: Hashes) -> None:
        first = np.clip((start - self._from_ms) // MINUTE_MS, 0, self._minutes)
        last = np.clip(-((self._from_ms - end) // MINUTE_MS), first, self._minutes)
        # What ended when it began decides nothing, and marks nothing.
        last = np.where(start < end, last, first)
        np.add.at(self._steps, first, hashes)
        np.subtract.at(self._steps, last, hashes)

    def sums(self) -> Hashes:
        return np.cumsum(self._steps, dtype=np.uint64)[:-1]


def facts_hashes(facts: PoolFacts, from_ms: int, to_ms: int, confirm_ms: int, formula: int = FACTS_FORMULA) -> Hashes:
    """Per minute the sum of the hashes of the facts in force.

    An allocation without an end also counts from when it is no longer confirmed, from the end of its job and (formula
    1) from the boot that ends it: what moved such an instant changed the minutes after it. Of the account map (formula
    1) every rule counts while it holds.
    """
    steps = _Steps(from_ms, to_ms)
    for table in (facts.placements, facts.geometries, facts.allocations, facts.commitments, facts.transfers):
        start = table.column("start_ms").to_numpy().astype(np.int64)
        end = table.column("end_ms").fill_null(OPEN_END_MS).to_numpy().astype(np.int64)
        steps.count(start, end, table.column("hash").to_numpy())
    allocations = facts.allocations
    without_end = ~allocations.column("end_ms").is_valid().to_numpy()
    open_ = np.flatnonzero(without_end)
    named = allocations.column("named_ms").fill_null(0).to_numpy().astype(np.int64)[open_]
    start = allocations.column("start_ms").to_numpy().astype(np.int64)[open_]
    hashes = allocations.column("hash").to_numpy()[open_]
    never = np.full(len(open_), OPEN_END_MS)
    steps.count(np.maximum(start, named) + confirm_ms, never, hashes * np.uint64(3) + np.uint64(1))
    ended = allocations.column("job_ended_ms").fill_null(0).to_numpy().astype(np.int64)[open_]
    ends = ended > start
    steps.count(ended[ends], never[ends], hashes[ends] * np.uint64(5) + ended[ends].astype(np.uint64) * np.uint64(7))
    if formula >= 1:
        booted = boot_ends(facts, without_end)[open_]
        ends = booted < OPEN_END_MS
        told = booted[ends].astype(np.uint64) * np.uint64(13)
        # An allocation younger than the boot that ends it never held anything: what moved that boot marks nothing.
        steps.count(np.maximum(booted, start)[ends], never[ends], hashes[ends] * np.uint64(11) + told)
        for tenant in facts.tenants:
            for rule in tenant.rules:
                end = OPEN_END_MS if rule.end_ms is None else rule.end_ms
                steps.count(np.array([rule.start_ms or 0]), np.array([end]), np.array([_hash(tenant)], dtype=np.uint64))
    return steps.sums()


class RatePrints:
    """The hashes of a pool's rates, each made once."""

    def __init__(self, pool: str, rates: Rates) -> None:
        costs = rates.asset_costs.get(pool)
        cards = rates.cards.get(pool)
        self._costs = [(cost, _hash(cost)) for cost in (costs.costs if costs else ())]
        self._cards = [(card, _hash(card)) for card in (cards.cards if cards else ())]
        named = {cost.tariff for cost, _ in self._costs} & set(rates.tariffs)
        self._tariffs = {name: (rates.tariffs[name].tariff, _hash(rates.tariffs[name].tariff)) for name in named}

    def of(self, start_ms: int, end_ms: int) -> int:
        """The sum modulo 2^64 of the hashes of what decides the money of a price interval [start, end): asset costs
        and rate cards in force in it, and the tariffs that those costs name. 0 where nothing is in force."""
        costs = [each for each in self._costs if each[0].start_ms < end_ms and each[0].end_ms > start_ms]
        total = sum(number for _, number in costs)
        for name in {cost.tariff for cost, _ in costs} & set(self._tariffs):
            tariff, number = self._tariffs[name]
            if tariff.prices[0].start_ms < end_ms and tariff.end_ms > start_ms:
                total += number
        for card, number in self._cards:
            if card.start_ms < end_ms and (card.end_ms is None or card.end_ms > start_ms):
                total += number
        return total & (1 << 64) - 1


def _hash(fact: Fact) -> int:
    return int.from_bytes(hashlib.blake2b(encode_event(fact), digest_size=8).digest(), "big")
