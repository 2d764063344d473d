"""Where sums do not fit, row by row: which tenant, job or GPU it is.

Only what is suspect is read again, so this may be slow; a ledger that is right comes here for the minutes in which some
GPU was not seen, and for nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gpuledger.streams.audit_checks import CHECKS, Finding, Unit, run_check
from gpuledger.streams.audit_range import PoolRange
from gpuledger.streams.audit_relations import STORED, Suspect
from gpuledger.streams.audit_rows import (
    doubtful_minutes,
    gpu_counts,
    gpu_time,
    hour_differences,
    minute_differences,
    money_differences,
    service_of,
)
from gpuledger.streams.marks import HOUR_MS, MINUTE_MS
from gpuledger.streams.recomputer import LedgerRules, Recomputer
from gpuledger.streams.store import Store

__all__ = ["Details"]

_CHECKS = {check.name: check for check in CHECKS}
#: Places whose rows are no longer those that were written, of which so many are computed again to name what changed.
_MOST_RECOMPUTED = 3
#: Suspect places nearer than this are read together.
_GAP_UNITS = 10
#: GPU minutes that are grouped at once, in GPUs x minutes.
_SLICE_ROWS = 4_000_000


class Details:
    """The checks of one pool's range."""

    def __init__(self, store: Store, rules: LedgerRules, recomputer: Recomputer, found: PoolRange, salt: int) -> None:
        self._store = store
        self._rules = rules
        self._recomputer = recomputer
        self._found = found
        self._pool = found.reads.pool
        self._salt = salt

    def of(self, suspects: Sequence[Suspect]) -> list[Finding]:
        """Every finding of the checks that were named. A place where something is certainly wrong and whose check sees
        nothing is a finding all the same."""
        out: list[Finding] = []
        for suspect in suspects:
            found = list(self._look(suspect))
            out += found
            told = {finding.at_ms for finding in found}
            if suspect.certain:
                lost = [
                    at for at in suspect.at_ms if at not in told and not _inside(at, self._span(suspect.unit), told)
                ]
                out += [
                    Finding(suspect.unit, at, self._pool, "", suspect.check, "sum of all rows", "equal", "not equal")
                    for at in lost
                ]
        return out

    def _span(self, unit: Unit) -> int:
        return {"minute": MINUTE_MS, "hour": HOUR_MS, "money": self._rules.unit_ms}[unit]

    def _look(self, suspect: Suspect) -> Iterable[Finding]:
        name = suspect.check
        if name in STORED.values():
            for at in suspect.at_ms[:_MOST_RECOMPUTED]:
                yield from self._recomputed(suspect.unit, at)
            return
        for start, end in self._ranges(suspect):
            if name in _CHECKS:
                yield from run_check(self._store, _CHECKS[name], self._pool, start, end, self._rules.unit_ms)
            elif name == "gpu hour against placements":
                service = service_of(self._found.reads.facts, start, end, HOUR_MS)
                yield from gpu_time(self._store, self._pool, service, "hour")
            else:
                yield from self._gpu_minutes(name, start, end)

    def _gpu_minutes(self, name: str, start: int, end: int) -> Iterable[Finding]:
        gpus = max(1, self._found.reads.facts.placements.num_rows)
        step = max(1, _SLICE_ROWS // gpus) * MINUTE_MS
        for a in range(start, end, step):
            b = min(a + step, end)
            service = service_of(self._found.reads.facts, a, b, MINUTE_MS)
            if name == "gpus of the minute":
                yield from gpu_counts(self._store, self._pool, service)
                continue
            yield from gpu_time(self._store, self._pool, service, "minute", only_odd=True)
            for first, last in doubtful_minutes(self._store, self._pool, service, self._salt):
                narrow = service_of(self._found.reads.facts, first, last, MINUTE_MS)
                yield from gpu_time(self._store, self._pool, narrow, "minute")

    def _ranges(self, suspect: Suspect) -> list[tuple[int, int]]:
        """Stretches that hold all suspect places, in units whole."""
        span = self._span(suspect.unit)
        out: list[tuple[int, int]] = []
        for at in sorted({at // span * span for at in suspect.at_ms}):
            if out and at - out[-1][1] <= _GAP_UNITS * span:
                out[-1] = (out[-1][0], at + span)
            else:
                out.append((at, at + span))
        return out

    def _recomputed(self, unit: Unit, at: int) -> list[Finding]:
        if unit == "minute":
            return minute_differences(self._store, self._recomputer, self._pool, at)
        if unit == "money":
            return money_differences(self._store, self._rules, self._pool, at)
        start = at // self._rules.unit_ms * self._rules.unit_ms
        found = hour_differences(self._store, self._recomputer, self._pool, start, start + self._rules.unit_ms)
        return [finding for finding in found if finding.at_ms == at]


def _inside(at: int, span: int, told: Iterable[int]) -> bool:
    return any(at <= other < at + span for other in told)
