"""Reads a pool's facts and fragments, computes, and writes: one call per slice of dirty minutes.

What is read depends on the slice alone and what is written carries the version the caller fixed before the first
read, so that a slice may be repeated, interrupted or computed by two workers at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import lcm

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gpuledger.finance.charges import Charges, charge_interval, no_charges
from gpuledger.finance.charges_table import charges_table
from gpuledger.finance.rates import Rates, price_intervals, rates_from
from gpuledger.schemas.telemetry import MAX_CLOCK_AHEAD_MS
from gpuledger.streams import ledger_rows
from gpuledger.streams.fingerprints import RatePrints, fingerprints
from gpuledger.streams.holders import UNPLACED_POOL, unplaced
from gpuledger.streams.ledger_digest import DIGESTED, digested
from gpuledger.streams.ledger_rows import Fingerprints, Version, stamp
from gpuledger.streams.marks import HOUR_MS, MINUTE_MS
from gpuledger.streams.pool_facts import PoolFacts
from gpuledger.streams.recompute import Ledger, Window, recompute
from gpuledger.streams.store import MAX_BLOCK_ROWS, Store

__all__ = ["LedgerRules", "Recomputer"]

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class LedgerRules:
    """What every process of one ledger must agree on. `gates`: partitions of the topics that hold back completeness;
    `ahead_ms`: how far event time may be ahead of the broker's."""

    grace_ms: int
    confirm_ms: int
    price_interval_minutes: int
    gates: dict[str, int] = field(default_factory=dict[str, int])
    ahead_ms: int = MAX_CLOCK_AHEAD_MS

    def complete_until_ms(self, stored_until_ms: int) -> int:
        """Minutes that end before this are complete, where every gating partition has stored until then."""
        return max(0, stored_until_ms - self.grace_ms) // MINUTE_MS * MINUTE_MS

    @property
    def unit_ms(self) -> int:
        """Slices that make hours and money are multiples of this: whole hours and whole price intervals."""
        return lcm(60, self.price_interval_minutes) * MINUTE_MS


class Recomputer:
    """Computes and writes slices of the ledger. Belongs to one thread."""

    def __init__(self, store: Store, rules: LedgerRules) -> None:
        self._store = store
        self._rules = rules

    def compute(
        self, pool: str, from_ms: int, to_ms: int, facts: PoolFacts | None = None
    ) -> tuple[Ledger, Fingerprints, Rates]:
        """The ledger of whole minutes, from what is stored now (and `facts`, where they have been read already);
        nothing is written."""
        complete_until_ms = self.complete_until_ms()
        facts = self._store.pool_facts(pool, from_ms, to_ms) if facts is None else facts
        rates = rates_from(self._store.rates(pool))
        buckets = self._buckets(pool, from_ms, to_ms, rates)
        window = Window(from_ms, to_ms, complete_until_ms, self._rules.confirm_ms, buckets)
        hashes = [_copied_hashes(_NO_FRAGMENTS)]

        def parts() -> Iterator[pa.Table]:
            for part in self._store.fragment_parts(pool, from_ms, to_ms):
                hashes.append(_copied_hashes(part))
                yield part

        ledger = recompute(facts, parts(), window)
        prints = fingerprints(facts, pa.concat_tables(hashes), from_ms, to_ms, self._rules.confirm_ms)
        return ledger, prints, rates

    def complete_until_ms(self) -> int:
        """Minutes that end before this are complete."""
        return self._rules.complete_until_ms(self._store.stored_until_ms(self._rules.gates))

    def minutes(self, pool: str, from_ms: int, to_ms: int, version: Version) -> int:
        """Writes minute rows (and GPU rows of complete minutes) of [from_ms, to_ms); returns how many rows."""
        if pool == UNPLACED_POOL:
            return 0
        ledger, prints, _ = self.compute(pool, from_ms, to_ms)
        return self._write_minutes(ledger, prints, version)

    def hours(self, pool: str, from_ms: int, to_ms: int, version: Version) -> int:
        """Writes everything of [from_ms, to_ms): minutes, hours, jobs, conflicts and money. `from_ms` is a multiple of
        the rules' unit, `to_ms` too, or the end of the open minute. Returns how many rows."""
        if pool == UNPLACED_POOL:
            found = unplaced(self._store.unplaced_allocations(from_ms, to_ms), from_ms, to_ms)
            rows = ledger_rows.conflict_rows(pool, found, from_ms, to_ms)
            return self._insert("conflicts", "hour", rows, version)
        ledger, prints, rates = self.compute(pool, from_ms, to_ms)
        written = self._write_minutes(ledger, prints, version)
        written += self._insert("ledger_gpu_hour", "hour", ledger_rows.gpu_hour_rows(ledger), version)
        written += self._insert("ledger_job_hour", "hour", ledger_rows.job_hour_rows(ledger), version)
        conflicts = ledger_rows.conflict_rows(pool, ledger.conflicts, from_ms, to_ms)
        written += self._insert("conflicts", "hour", conflicts, version)
        return written + self._write_charges(ledger, rates, version)

    # -- writing

    def _write_minutes(self, ledger: Ledger, prints: Fingerprints, version: Version) -> int:
        written = self._insert("ledger_minute", "minute", ledger_rows.minute_rows(ledger, prints), version)
        for gpu in ledger_rows.gpu_minute_parts(ledger, prints):
            written += self._insert("ledger_gpu_minute", "minute", gpu, version, by_day=True)
        return written

    def _insert(self, table: str, column: str, rows: pa.Table, version: Version, *, by_day: bool = False) -> int:
        """Inserts rows sorted by `column` in blocks that hold all rows of each value and lie in one partition."""
        stamped = stamp(digested(table, rows, column) if table in DIGESTED else rows, version)
        for start, end in _blocks(rows.column(column).cast(pa.int64()).to_numpy(), by_day):
            self._store.insert(table, stamped.slice(start, end - start))
        return rows.num_rows

    # -- money

    def _buckets(self, pool: str, from_ms: int, to_ms: int, rates: Rates) -> Ints:
        """Bounds of hours and, where the pool has rates, of price intervals."""
        edges = {from_ms, to_ms, *range((from_ms // HOUR_MS + 1) * HOUR_MS, to_ms, HOUR_MS)}
        if _priced(pool, rates):
            for start, end in price_intervals(pool, from_ms, to_ms, rates, self._rules.price_interval_minutes):
                edges |= {t for t in (start, end) if from_ms < t < to_ms}
        return np.array(sorted(edges), dtype=np.int64)

    def _write_charges(self, ledger: Ledger, rates: Rates, version: Version) -> int:
        pool, window = ledger.pool, ledger.window
        if not _priced(pool, rates):
            return 0
        by_bucket = ledger_rows.quantities(ledger)
        starts = window.buckets_ms[:-1].tolist()
        prints = RatePrints(pool, rates)
        charges: list[Charges] = []
        estimate: list[bool] = []
        rates_hashes: list[int] = []
        for start, end in price_intervals(
            pool, window.from_ms, window.to_ms, rates, self._rules.price_interval_minutes
        ):
            inside = [n for n, at in enumerate(starts) if start <= at < end]
            until = min(end, window.to_ms)
            merged = ledger_rows.merge([by_bucket[n] for n in inside])
            charges.append(charge_interval(pool, start, until, merged, rates))
            estimate.append(until > window.complete_until_ms)
            rates_hashes.append(prints.of(start, end))
        charges += self._gone(pool, window, {each.start_ms for each in charges})
        estimate += [False] * (len(charges) - len(estimate))
        rates_hashes += [0] * (len(charges) - len(rates_hashes))
        order = sorted(range(len(charges)), key=lambda n: charges[n].start_ms)
        rows = charges_table(
            [charges[n] for n in order], [estimate[n] for n in order], [rates_hashes[n] for n in order]
        )
        return self._insert("charges", "interval_start", rows, version)

    def _gone(self, pool: str, window: Window, kept: set[int]) -> list[Charges]:
        """Markers for intervals written before a change of rates moved their cuts."""
        rows = self._store.rows(
            "SELECT DISTINCT toUnixTimestamp64Milli(interval_start) FROM charges WHERE pool = {pool:String} "
            "AND interval_start >= fromUnixTimestamp64Milli({from_ms:Int64}, 'UTC') "
            "AND interval_start < fromUnixTimestamp64Milli({to_ms:Int64}, 'UTC')",
            {"pool": pool, "from_ms": window.from_ms, "to_ms": window.to_ms},
        )
        return [no_charges(pool, int(start), int(start)) for (start,) in rows if int(start) not in kept]


_NO_FRAGMENTS = pa.table(
    {"minute": pa.array([], type=pa.timestamp("ms", tz="UTC")), "hash": pa.array([], type=pa.uint64())}
)


def _copied_hashes(fragments: pa.Table) -> pa.Table:
    """Minutes and hashes alone, in memory of their own: columns of an answer keep the whole answer alive."""
    minutes = np.array(fragments.column("minute").cast(pa.int64()).to_numpy())
    return pa.table(
        {
            "minute": pa.array(minutes).cast(_NO_FRAGMENTS.schema.field("minute").type),
            "hash": pa.array(np.array(fragments.column("hash").to_numpy())),
        }
    )


def _priced(pool: str, rates: Rates) -> bool:
    return pool in rates.asset_costs or pool in rates.cards


def _blocks(times: Ints, by_day: bool) -> Sequence[tuple[int, int]]:
    """[start, end) of blocks of at most about MAX_BLOCK_ROWS rows that cut neither a time nor a partition."""
    if len(times) == 0:
        return []
    days = times // 86_400_000
    partition = days if by_day else times.astype("datetime64[ms]").astype("datetime64[M]").astype(np.int64)
    first = np.flatnonzero(np.append(True, np.diff(times) != 0))
    out: list[tuple[int, int]] = []
    begin = 0
    for at, following in zip(first.tolist(), [*first[1:].tolist(), len(times)], strict=True):
        if at > begin and (following - begin > MAX_BLOCK_ROWS or partition[at] != partition[begin]):
            out.append((begin, at))
            begin = at
    out.append((begin, len(times)))
    return out
