"""One stretch of time of an audit: reads every table once, then says of each pool what does not fit."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpuledger.finance.rates import Rates, rates_from
from gpuledger.streams.audit_checks import Finding
from gpuledger.streams.audit_fragments import differing_minutes, pool_fragments, print_findings, written_until
from gpuledger.streams.audit_relations import PoolSums, Suspect, in_service, relations
from gpuledger.streams.audit_sums import Grid, Places, Scope, fragment_sums, gpu_numbers, no_sums, read_sums
from gpuledger.streams.marks import HOUR_MS, MINUTE_MS
from gpuledger.streams.pool_facts import PoolFacts
from gpuledger.streams.recomputer import LedgerRules
from gpuledger.streams.store import Store

__all__ = ["AuditedRange", "PoolRange", "PoolReads"]

Mask = NDArray[np.bool_]
#: Times one step; its time goes into the report.
Seconds = Callable[[str], AbstractContextManager[None]]

_TABLES = ("ledger_minute", "ledger_gpu_minute", "ledger_gpu_hour", "ledger_job_hour", "charges")


@dataclass(frozen=True, slots=True)
class PoolReads:
    """What was read of one pool over the whole range."""

    pool: str
    facts: PoolFacts
    rates: Rates
    tables: dict[str, Places]


@dataclass(frozen=True, slots=True)
class PoolRange:
    """What was found of one pool in [from_ms, end_ms), its minutes that are complete and written."""

    reads: PoolReads
    from_ms: int
    end_ms: int
    findings: list[Finding]
    suspects: list[Suspect]
    hours: int
    intervals: int
    unhashed: int


class _Reading:
    """The sums of all fragments, read by a thread of its own. A thread that is left behind ends with its query."""

    def __init__(self, store: Store, scope: Scope) -> None:
        self._store = store.another()
        self._scope = scope
        self._found: Places | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._read, name="audit-fragments", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            self._found = fragment_sums(self._store, self._scope)
        except BaseException as error:
            self._error = error
        finally:
            self._store.close()

    def result(self) -> Places:
        """Waits for it; raises what the read raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._found is not None
        return self._found


class AuditedRange:
    """[from_ms, to_ms) of `pools` (None: all), read from the store when made. Belongs to one thread."""

    def __init__(
        self,
        store: Store,
        rules: LedgerRules,
        pools: tuple[str, ...] | None,
        bounds: tuple[int, int],
        salt: int,
        kept_ms: int,
        seconds: Seconds,
    ) -> None:
        self._store = store
        self._rules = rules
        self._bounds = bounds
        self._kept_ms = kept_ms
        self._seconds = seconds
        scope = Scope(*bounds, pools, salt)
        # The largest read by far, beside everything else. None where only some pools are read: each one's then.
        self._reading = _Reading(store, scope) if pools is None else None
        self._sums: dict[str, dict[str, Places]] = {}
        self._numbers = gpu_numbers(store, salt)
        for table in _TABLES:
            with seconds(table):
                self._sums[table] = read_sums(store, table, scope)
        self._facts: dict[str, PoolFacts] = {}

    def read(self, pool: str) -> PoolReads:
        """What was read of a pool, without its fragments."""
        tables = {table: self._sums[table].get(pool, no_sums(table)) for table in _TABLES}
        return PoolReads(pool, self._facts_of(pool), rates_from(self._store.rates(pool)), tables)

    def wait(self) -> None:
        """Until the fragments are read; to be called before `pool`."""
        with self._seconds("fragments"):
            self._fragments = self._reading.result() if self._reading else None
        self._differ = self._differing()
        self._seen_differ = self._strangers()

    def pool(self, reads: PoolReads, from_ms: int, to_ms: int, settled_ms: int) -> PoolRange:
        """What does not fit of a pool in [from_ms, to_ms), inside the range; see `written_until` for `settled_ms`."""
        pool, tables, facts = reads.pool, reads.tables, reads.facts
        part = slice((from_ms - self._bounds[0]) // MINUTE_MS, (to_ms - self._bounds[0]) // MINUTE_MS)
        with self._seconds("fragments"):
            minutes = pool_fragments(self._store, pool, tables["ledger_minute"], from_ms, to_ms, self._differ[part])
        end_ms = written_until(minutes, settled_ms)
        with self._seconds("compare"):
            findings = print_findings(minutes, facts, self._rules.confirm_ms, end_ms, self._kept_ms)
            sums = PoolSums(
                pool=pool,
                from_ms=from_ms,
                to_ms=end_ms,
                kept_ms=self._kept_ms,
                unit_ms=self._rules.unit_ms,
                interval_minutes=self._rules.price_interval_minutes,
                tables=tables,
                facts=facts,
                rates=reads.rates,
                numbers=self._numbers,
                seen_differ=self._seen_differ[part][: (end_ms - from_ms) // MINUTE_MS],
            )
            found, suspects = relations(sums)
        grid = Grid(tables["ledger_minute"], from_ms, end_ms, MINUTE_MS)
        unit = self._rules.unit_ms
        first, last = -(-from_ms // unit) * unit, end_ms // unit * unit
        charges = tables["charges"]
        lasting = charges["end_ms"].astype(np.int64) > charges.at_ms
        return PoolRange(
            reads=reads,
            from_ms=from_ms,
            end_ms=end_ms,
            findings=findings + found,
            suspects=suspects,
            hours=max(0, end_ms // HOUR_MS - -(-from_ms // HOUR_MS)),
            intervals=int(((charges.at_ms >= first) & (charges.at_ms < last) & lasting).sum()),
            unhashed=int((grid.there & (grid["rows_hash"] == 0)).sum()),
        )

    def _facts_of(self, pool: str) -> PoolFacts:
        if pool not in self._facts:
            with self._seconds("facts"):
                self._facts[pool] = self._store.pool_facts(pool, *self._bounds)
        return self._facts[pool]

    def _differing(self) -> Mask:
        """Minutes in which each pool's fragments must be read by themselves."""
        start, end = self._bounds
        if self._fragments is None:
            return np.ones((end - start) // MINUTE_MS, dtype=bool)
        return differing_minutes(self._fragments, self._sums["ledger_minute"], start, end, self._kept_ms)

    def _strangers(self) -> Mask:
        """Minutes in which the GPUs that were seen may not be those in service."""
        start, end = self._bounds
        if self._fragments is None:
            return np.ones((end - start) // MINUTE_MS, dtype=bool)
        seen = Grid(self._fragments, start, end, MINUTE_MS)
        serving = np.zeros((end - start) // MINUTE_MS, dtype=np.uint64)
        for pool in self._pools():
            serving += in_service(self._facts_of(pool), self._numbers, start, end, MINUTE_MS)[1]
        return seen.there & (seen["gpus"].astype(np.uint64) != serving)

    def _pools(self) -> Sequence[str]:
        return sorted({pool for sums in self._sums.values() for pool in sums})
