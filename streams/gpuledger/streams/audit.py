"""The proof that every GPU-second is accounted once: sums, fingerprints, money, and a sample computed again.

Sums alone are blind to a lost mark, after which every minute still adds up; so each minute's fingerprint of what it was
computed from is compared with what is stored now. What a live ledger is still working on is looked at again before it
is called wrong.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gpuledger.streams.audit_checks import CHECKS, MOST_ROWS, Finding, run_check
from gpuledger.streams.audit_rows import (
    gpu_counts,
    gpu_time,
    hour_differences,
    minute_differences,
    money_differences,
    service_of,
)
from gpuledger.streams.fingerprints import fingerprints
from gpuledger.streams.holders import PoolFacts
from gpuledger.streams.marks import HOUR_MS, MINUTE_MS, Ranges
from gpuledger.streams.recomputer import LedgerRules, Recomputer
from gpuledger.streams.store import Store

__all__ = ["MOST_FINDINGS", "PAUSES_S", "AuditReport", "Finding", "Waiting", "audit"]

Ints = NDArray[np.int64]
#: Ranges of each pool that have been marked and are not worked off yet.
Waiting = Callable[[], Mapping[str, Ranges]]

#: Findings that a report lists.
MOST_FINDINGS = 20
_DAY_MS = 86_400_000
#: Fragments and GPU minutes are deleted after 90 days, some hours before or after.
_KEPT_MS = 89 * _DAY_MS
#: The newest complete minutes are still being written: not complete yet is no finding there.
_SETTLE_MS = 120_000
#: Before the second, third and fourth look. Marks of older hours wait for company for up to 15 s (`Pace.patience_ms`).
PAUSES_S = (2.0, 5.0, 9.0)
#: GPU-hours read at once; decides how many days are one range.
_RANGE_GPU_HOURS = 4_000_000
_MOST_DAYS = 31
#: Rows of GPU minutes that are grouped at once.
_SLICE_ROWS = 4_000_000

_MARKERS = """
    SELECT toUnixTimestamp64Milli(minute) AS at_ms, complete, fragments, fragments_hash, facts_hash
    FROM v_recomputes
    WHERE pool = {pool:String} AND minute >= fromUnixTimestamp64Milli({from_ms:Int64}, 'UTC')
        AND minute < fromUnixTimestamp64Milli({to_ms:Int64}, 'UTC')
"""
_GPU_ROWS = """
    SELECT intDiv(toUnixTimestamp64Milli(minute), 3600000) * 3600000 AS at_ms, count() FROM ledger_gpu_minute
    WHERE pool = {pool:String} AND minute >= fromUnixTimestamp64Milli({from_ms:Int64}, 'UTC')
        AND minute < fromUnixTimestamp64Milli({to_ms:Int64}, 'UTC')
    GROUP BY at_ms ORDER BY at_ms
"""
_INTERVALS = """
    SELECT toUnixTimestamp64Milli(interval_start) FROM v_asset_cost
    WHERE pool = {pool:String} AND interval_start >= fromUnixTimestamp64Milli({from_ms:Int64}, 'UTC')
        AND interval_start < fromUnixTimestamp64Milli({to_ms:Int64}, 'UTC') AND interval_end > interval_start
    ORDER BY interval_start
"""


@dataclass(slots=True)
class AuditReport:
    """What was checked and what was found. Counts are of (pool, minute), (pool, hour) and (pool, price interval).

    `pending_minutes` were not complete, `open_hours` not all of theirs was: nothing is said of them. `waiting`: places
    whose marks are on their way through Kafka. `found` counts confirmed findings, of which `findings` has the first.
    """

    from_ms: int
    to_ms: int
    complete_until_ms: int
    pools: list[str]
    minutes: int = 0
    pending_minutes: int = 0
    hours: int = 0
    open_hours: int = 0
    intervals: int = 0
    sampled: int = 0
    waiting: int = 0
    looks: int = 1
    found: int = 0
    findings: list[Finding] = field(default_factory=list[Finding])

    @property
    def balanced(self) -> bool:
        return self.found == 0


def audit(
    store: Store,
    rules: LedgerRules,
    from_ms: int,
    to_ms: int,
    sample: int = 20,
    seed: int = 0,
    *,
    pools: Sequence[str] | None = None,
    waiting: Waiting | None = None,
    now_ms: int | None = None,
    pauses_s: Sequence[float] = PAUSES_S,
) -> AuditReport:
    """Checks every pool (or those named) and complete minute of [from_ms, to_ms).

    `sample` minutes, drawn with `seed`, are computed again in full and compared row by row, and their price intervals
    are charged again. A finding is reported once it has been there in every look (one more after each pause). It is
    excused while `waiting` names its minute.

    Raises ValueError where the range is empty or not in whole minutes.
    """
    if from_ms % MINUTE_MS or to_ms % MINUTE_MS or from_ms >= to_ms:
        raise ValueError(f"range: expected whole minutes in order, got [{from_ms}, {to_ms})")
    now_ms = time.time_ns() // 1_000_000 if now_ms is None else now_ms
    return _Audit(store, rules, now_ms - _KEPT_MS).run((from_ms, to_ms), sample, seed, pools, waiting, pauses_s)


@dataclass(frozen=True, slots=True)
class _Task:
    """One thing that can be looked at again: a range of a pool, or (sample) one minute of it."""

    pool: str
    from_ms: int
    to_ms: int
    sample: bool = False


class _Audit:
    def __init__(self, store: Store, rules: LedgerRules, kept_from_ms: int) -> None:
        self._store = store
        self._rules = rules
        self._kept_from_ms = kept_from_ms
        self._recomputer = Recomputer(store, rules)
        self._complete_ms = self._recomputer.complete_until_ms()
        self._charged: set[tuple[str, int]] = set()

    def run(
        self,
        bounds: tuple[int, int],
        sample: int,
        seed: int,
        pools: Sequence[str] | None,
        waiting: Waiting | None,
        pauses_s: Sequence[float],
    ) -> AuditReport:
        extents = self._store.extents()
        names = sorted(extents) if pools is None else sorted(set(pools))
        report = AuditReport(*bounds, self._complete_ms, names)
        tasks: list[_Task] = []
        for pool in names:
            tasks += self._ranges(pool, extents.get(pool, (bounds[1], bounds[1])), bounds, report)
        tasks += _draw(tasks, sample, seed)
        report.sampled = sum(task.sample for task in tasks)
        findings = self._excuse(self._look(tasks, report), waiting, report)
        for pause_s in pauses_s:
            if not any(findings.values()):
                break
            time.sleep(pause_s)
            report.looks += 1
            again = self._look([task for task, found in findings.items() if found], None)
            still = {task: _persistent(findings[task], found) for task, found in again.items()}
            findings = self._excuse(still, waiting, report)
        listed = sorted({f.place: f for found in findings.values() for f in found}.values(), key=lambda f: f.place)
        report.found = len(listed)
        report.findings = listed[:MOST_FINDINGS]
        if listed:
            report.findings[0] = self._name_gpu(listed)
        return report

    def _ranges(self, pool: str, extent: tuple[int, int], bounds: tuple[int, int], report: AuditReport) -> list[_Task]:
        """`extent`: from when to when the pool has anything to account."""
        start = max(bounds[0], extent[0] // MINUTE_MS * MINUTE_MS)
        until = min(bounds[1], -(-extent[1] // MINUTE_MS) * MINUTE_MS)
        end = max(start, min(until, self._complete_ms))
        report.pending_minutes += max(0, until - max(start, end)) // MINUTE_MS
        gpus = self._store.rows("SELECT uniqExact(gpu) FROM placements WHERE pool = {pool:String}", {"pool": pool})[0][
            0
        ]
        days = max(1, min(_MOST_DAYS, _RANGE_GPU_HOURS // (24 * max(1, int(gpus)))))
        unit = self._rules.unit_ms * max(1, days * _DAY_MS // self._rules.unit_ms)
        edges = [start, *range((start // unit + 1) * unit, end, unit), end]
        return [_Task(pool, a, b) for a, b in pairwise(edges) if a < b]

    def _look(self, tasks: Iterable[_Task], report: AuditReport | None) -> dict[_Task, list[Finding]]:
        self._charged.clear()
        return {task: self._sample(task) if task.sample else self._range(task, report) for task in tasks}

    def _excuse(
        self, findings: dict[_Task, list[Finding]], waiting: Waiting | None, report: AuditReport
    ) -> dict[_Task, list[Finding]]:
        """Leaves out what is marked and only waits for its turn."""
        if waiting is None or not any(findings.values()):
            return findings
        marked = waiting()
        widened = {pool: ranges.widen(self._rules.unit_ms) for pool, ranges in marked.items()}

        def waits(finding: Finding) -> bool:
            # Hours and money are made for whole units, minutes one by one: the mark of the open minute, of which there
            # always is one, must not excuse its hour's other minutes.
            ranges = (marked if finding.unit == "minute" else widened).get(finding.pool, ())
            return any(start <= finding.at_ms < end for start, end in ranges)

        report.waiting = len({f.place for found in findings.values() for f in found if waits(f)})
        return {task: [f for f in found if not waits(f)] for task, found in findings.items()}

    # -- one range

    def _range(self, task: _Task, report: AuditReport | None) -> list[Finding]:
        facts = self._store.pool_facts(task.pool, task.from_ms, task.to_ms)
        findings, end = self._prints(facts, task)
        hours = _whole(task.from_ms, end, HOUR_MS)
        money = _whole(task.from_ms, end, self._rules.unit_ms)
        minutes = (task.from_ms, end)
        kept = max(task.from_ms, self._kept_from_ms // MINUTE_MS * MINUTE_MS), end
        for check in CHECKS:
            bounds = {"minute": minutes, "hour": hours, "money": money}[check.unit]
            bounds = kept if check.name == "gpu rows of the minute" else bounds
            if bounds[0] < bounds[1]:
                findings += run_check(self._store, check, task.pool, *bounds, self._rules.unit_ms)
        if hours[0] < hours[1]:
            findings += gpu_time(self._store, task.pool, service_of(facts, *hours, HOUR_MS), "hour")
        for a, b in self._slices(task.pool, *kept):
            service = service_of(facts, a, b, MINUTE_MS)
            findings += gpu_time(self._store, task.pool, service, "minute")
            findings += gpu_counts(self._store, task.pool, service)
        if report is not None:
            report.minutes += (end - task.from_ms) // MINUTE_MS
            report.pending_minutes += (task.to_ms - end) // MINUTE_MS
            report.hours += max(0, hours[1] - hours[0]) // HOUR_MS
            report.open_hours += int(end % HOUR_MS != 0)
            report.intervals += len(self._intervals(task.pool, *money))
        return findings

    def _intervals(self, pool: str, from_ms: int, to_ms: int) -> list[int]:
        rows = self._store.rows(_INTERVALS, {"pool": pool, "from_ms": from_ms, "to_ms": to_ms})
        return [int(at) for (at,) in rows]

    def _slices(self, pool: str, from_ms: int, to_ms: int) -> list[tuple[int, int]]:
        """Stretches of hours with GPU minutes, of a bounded number of rows, within [from, to)."""
        slices: list[tuple[int, int]] = []
        rows = _SLICE_ROWS
        if from_ms < to_ms:
            for hour, count in self._store.rows(_GPU_ROWS, {"pool": pool, "from_ms": from_ms, "to_ms": to_ms}):
                start, end = max(from_ms, int(hour)), min(to_ms, int(hour) + HOUR_MS)
                if slices and slices[-1][1] == start and rows + int(count) <= _SLICE_ROWS:
                    slices[-1] = (slices[-1][0], end)
                    rows += int(count)
                else:
                    slices.append((start, end))
                    rows = int(count)
        return slices

    def _prints(self, facts: PoolFacts, task: _Task) -> tuple[list[Finding], int]:
        """Minutes whose stored fingerprint is not that of what is stored now, and where the complete minutes end: the
        newest ones of the range may not be written yet."""
        minutes = (task.to_ms - task.from_ms) // MINUTE_MS
        must = fingerprints(facts, _NO_FRAGMENTS, task.from_ms, task.to_ms, self._rules.confirm_ms).facts_hash
        seen = self._store.fragment_prints(task.pool, task.from_ms, task.to_ms)
        parameters = {"pool": task.pool, "from_ms": task.from_ms, "to_ms": task.to_ms}
        markers = self._store.table(_MARKERS, parameters)
        at = (seen.column("at_ms").to_numpy() - task.from_ms) // MINUTE_MS
        fragments, hashes = np.zeros(minutes, np.int64), np.zeros(minutes, np.uint64)
        fragments[at], hashes[at] = seen.column("fragments").to_numpy(), seen.column("hash").to_numpy()
        at = (markers.column("at_ms").to_numpy() - task.from_ms) // MINUTE_MS
        there, complete = np.zeros(minutes, bool), np.zeros(minutes, bool)
        there[at], complete[at] = True, markers.column("complete").to_numpy() == 1
        had = {name: np.zeros(minutes, np.uint64) for name in ("fragments", "fragments_hash", "facts_hash")}
        for name, values in had.items():
            values[at] = markers.column(name).to_numpy().astype(np.uint64)

        settling = task.from_ms + np.arange(minutes) * MINUTE_MS >= self._complete_ms - _SETTLE_MS
        open_ = np.flatnonzero(~(settling & ~complete))
        end = int(open_[-1]) + 1 if len(open_) else 0
        kept = task.from_ms + np.arange(minutes) * MINUTE_MS >= self._kept_from_ms
        absent = ~there & ((must != 0) | (fragments > 0))
        problems = {
            "marker": (absent, np.ones(minutes, np.int64), there.astype(np.int64)),
            "complete": (there & ~complete, np.ones(minutes, np.int64), complete.astype(np.int64)),
            "facts": (there & (had["facts_hash"] != must), must, had["facts_hash"]),
            "fragments": (there & kept & (had["fragments"] != fragments), fragments, had["fragments"]),
            "fragments' hash": (there & kept & (had["fragments_hash"] != hashes), hashes, had["fragments_hash"]),
        }
        findings = [
            Finding(
                *("minute", task.from_ms + n * MINUTE_MS, task.pool, ""),
                *(f"fingerprint: {name}", "", str(expected[n]), str(found[n])),
            )
            for name, (wrong, expected, found) in problems.items()
            for n in np.flatnonzero(wrong[:end])[:MOST_ROWS].tolist()
        ]
        return findings, task.from_ms + end * MINUTE_MS

    # -- single minutes

    def _sample(self, task: _Task) -> list[Finding]:
        findings = minute_differences(self._store, self._recomputer, task.pool, task.from_ms)
        if task.from_ms < self._kept_from_ms:
            findings = []
        unit = self._rules.unit_ms
        start = task.from_ms // unit * unit
        if start + unit > self._complete_ms - _SETTLE_MS:
            return findings
        at = max((t for t in self._intervals(task.pool, start, start + unit) if t <= task.from_ms), default=None)
        if at is not None and (task.pool, at) not in self._charged:
            self._charged.add((task.pool, at))
            findings += money_differences(self._store, self._rules, task.pool, at)
        return findings

    def _name_gpu(self, findings: Sequence[Finding]) -> Finding:
        """The first finding with a GPU: its own, that of another finding there, or what a recompute differs in."""
        first = findings[0]
        if first.gpu or first.unit == "money":
            return first
        span = MINUTE_MS if first.unit == "minute" else HOUR_MS
        for other in findings:
            if other.gpu and other.pool == first.pool and first.at_ms <= other.at_ms < first.at_ms + span:
                return replace(first, gpu=other.gpu)
        unit = self._rules.unit_ms
        start = first.at_ms // unit * unit
        found = minute_differences(self._store, self._recomputer, first.pool, first.at_ms) if span == MINUTE_MS else []
        if not any(each.gpu for each in found) and start + unit <= self._complete_ms:
            found = hour_differences(self._store, self._recomputer, first.pool, start, start + unit)
        return replace(first, gpu=next((each.gpu for each in found if each.gpu), ""))


_NO_FRAGMENTS = pa.table(
    {"minute": pa.array([], type=pa.timestamp("ms", tz="UTC")), "hash": pa.array([], type=pa.uint64())}
)


def _whole(from_ms: int, to_ms: int, unit_ms: int) -> tuple[int, int]:
    """The whole units inside [from, to)."""
    return -(-from_ms // unit_ms) * unit_ms, to_ms // unit_ms * unit_ms


def _draw(tasks: Sequence[_Task], sample: int, seed: int) -> list[_Task]:
    """`sample` minutes of all tasks, each once, the same for the same seed."""
    sizes = [(task.to_ms - task.from_ms) // MINUTE_MS for task in tasks]
    total = sum(sizes)
    drawn: list[_Task] = []
    ends = np.cumsum(sizes) if sizes else np.zeros(0, np.int64)
    for n in sorted(random.Random(seed).sample(range(total), min(sample, total))):
        at = int(np.searchsorted(ends, n, side="right"))
        minute = tasks[at].from_ms + (n - int(ends[at] - sizes[at])) * MINUTE_MS
        drawn.append(_Task(tasks[at].pool, minute, minute + MINUTE_MS, sample=True))
    return drawn


def _persistent(before: Sequence[Finding], now: Sequence[Finding]) -> list[Finding]:
    """What was there in both looks. A look that was cut short cannot say what it did not see."""
    if len(before) >= MOST_ROWS:
        return list(now)
    known = {finding.place for finding in before}
    return [finding for finding in now if finding.place in known]
