"""A sample of minutes and price intervals, computed again: the proof that today's rules give what is stored.

What comes out is hashed as when it was written and compared with the hash of what is stored; only where they differ are
rows read and named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa

from gpuledger.streams import ledger_rows
from gpuledger.streams.audit_checks import Finding
from gpuledger.streams.audit_range import PoolReads
from gpuledger.streams.audit_rows import minute_differences, money_differences, same_money
from gpuledger.streams.audit_sums import Places
from gpuledger.streams.ledger_digest import row_hashes
from gpuledger.streams.marks import MINUTE_MS
from gpuledger.streams.pool_facts import OPEN_END_MS, PoolFacts
from gpuledger.streams.recomputer import LedgerRules, Recomputer
from gpuledger.streams.store import Store

__all__ = ["Sampler"]


class Sampler:
    """Computes minutes again. Price intervals that end after `settled_ms` may not be charged as complete yet."""

    def __init__(self, store: Store, rules: LedgerRules, recomputer: Recomputer, settled_ms: int) -> None:
        self._store = store
        self._rules = rules
        self._recomputer = recomputer
        self._settled_ms = settled_ms

    def differences(self, reads: PoolReads, minutes: Sequence[int], kept_ms: int) -> list[Finding]:
        """Rows of these minutes, and of the price intervals they are in, that are not what comes out now."""
        out: list[Finding] = []
        intervals: set[int] = set()
        charges = reads.tables["charges"]
        lasting = charges["end_ms"].astype(np.int64) > charges.at_ms
        starts = charges.at_ms[lasting]
        for at in minutes:
            if at >= kept_ms and not self._same(reads, at):
                out += minute_differences(self._store, self._recomputer, reads.pool, at)
            unit = at // self._rules.unit_ms * self._rules.unit_ms
            before = starts[(starts >= unit) & (starts <= at)]
            if unit + self._rules.unit_ms <= self._settled_ms and len(before):
                intervals.add(int(before[-1]))
        for at in sorted(intervals):
            if not same_money(self._store, reads.pool, at, reads.rates, _sum_at(charges, at)):
                out += money_differences(self._store, self._rules, reads.pool, at)
        return out

    def _same(self, reads: PoolReads, at_ms: int) -> bool:
        facts = _narrowed(reads.facts, at_ms, at_ms + MINUTE_MS)
        ledger, prints, _ = self._recomputer.compute(reads.pool, at_ms, at_ms + MINUTE_MS, facts)
        pairs = (
            ("ledger_minute", ledger_rows.minute_rows(ledger, prints)),
            ("ledger_gpu_minute", ledger_rows.gpu_minute_rows(ledger, prints)),
        )
        return all(
            int(row_hashes(table, rows).sum(dtype=np.uint64)) == _sum_at(reads.tables[table], at_ms)
            for table, rows in pairs
        )


def _sum_at(places: Places, at_ms: int) -> int:
    at = np.searchsorted(places.at_ms, at_ms)
    there = at < len(places.at_ms) and places.at_ms[at] == at_ms
    return int(places["rows_sum"][at]) if there else 0


def _narrowed(facts: PoolFacts, from_ms: int, to_ms: int) -> PoolFacts:
    """Without the facts of a longer range that say nothing of [from_ms, to_ms)."""

    def inside(table: pa.Table) -> pa.Table:
        start = table.column("start_ms").to_numpy()
        end = table.column("end_ms").fill_null(OPEN_END_MS).to_numpy()
        return table.filter(pa.array((start < to_ms) & (end > from_ms)))

    return replace(
        facts,
        geometries=inside(facts.geometries),
        allocations=inside(facts.allocations),
        commitments=inside(facts.commitments),
        transfers=inside(facts.transfers),
    )
