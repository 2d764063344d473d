"""The proof that every GPU-second is accounted once: sums, fingerprints, money, and a sample computed again.

Every table is read once and compared by sums that no difference leaves alone (`audit_sums`, `audit_relations`); only
where they differ is it read again, row by row. What a live ledger is still working on is looked at again before it is
called wrong.
"""

from __future__ import annotations

import random
import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from gpuledger.streams.audit_checks import MOST_ROWS, Finding
from gpuledger.streams.audit_details import Details
from gpuledger.streams.audit_range import AuditedRange, PoolRange
from gpuledger.streams.audit_rows import hour_differences, minute_differences
from gpuledger.streams.audit_sample import Sampler
from gpuledger.streams.marks import HOUR_MS, MINUTE_MS, Ranges
from gpuledger.streams.recomputer import LedgerRules, Recomputer
from gpuledger.streams.store import KEPT_MS, Store

__all__ = ["MOST_FINDINGS", "PAUSES_S", "AuditReport", "Finding", "Waiting", "audit"]

#: Ranges of each pool that have been marked and are not worked off yet.
Waiting = Callable[[], Mapping[str, Ranges]]

#: Findings that a report lists.
MOST_FINDINGS = 20
_DAY_MS = 86_400_000
#: The newest complete minutes are still being written: not complete yet is no finding there.
_SETTLE_MS = 120_000
#: Before the second, third and fourth look. Marks of older hours wait for company for up to 15 s (`Pace.patience_ms`).
PAUSES_S = (2.0, 5.0, 9.0)
#: GPU-hours read at once; decides how many days are one range.
_RANGE_GPU_HOURS = 4_000_000
_MOST_DAYS = 31


@dataclass(slots=True)
class AuditReport:
    """What was checked and what was found. Counts are of (pool, minute), (pool, hour) and (pool, price interval).

    `pending_minutes` were not complete, `open_hours` not all of theirs was: nothing is said of them. `unhashed` minutes
    were written before rows had hashes: of those only sums are compared. `waiting`: places whose marks are on their way
    through Kafka. `found` counts confirmed findings, of which `findings` has the first. `seconds`: where the time went.
    """

    from_ms: int
    to_ms: int
    complete_until_ms: int
    pools: list[str]
    minutes: int = 0
    pending_minutes: int = 0
    unhashed: int = 0
    hours: int = 0
    open_hours: int = 0
    intervals: int = 0
    sampled: int = 0
    waiting: int = 0
    looks: int = 1
    found: int = 0
    findings: list[Finding] = field(default_factory=list[Finding])
    seconds: dict[str, float] = field(default_factory=dict[str, float])

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
    extents = store.extents()
    names = sorted(extents) if pools is None else sorted(set(pools))
    complete_ms = Recomputer(store, rules).complete_until_ms()
    report = AuditReport(from_ms, to_ms, complete_ms, names)
    _Audit(store, rules, report, extents, now_ms - KEPT_MS).run(sample, seed, pools is None, waiting, pauses_s)
    return report


class _Audit:
    def __init__(
        self,
        store: Store,
        rules: LedgerRules,
        report: AuditReport,
        extents: Mapping[str, tuple[int, int]],
        kept_ms: int,
    ) -> None:
        self._store = store
        self._rules = rules
        self._report = report
        self._extents = extents
        self._kept_ms = kept_ms
        self._recomputer = Recomputer(store, rules)
        self._salt = secrets.randbits(64)
        self._sampler = Sampler(store, rules, self._recomputer, report.complete_until_ms - _SETTLE_MS)

    def run(self, sample: int, seed: int, every: bool, waiting: Waiting | None, pauses_s: Sequence[float]) -> None:
        """Looks, and looks again where anything was found; the report then has it all."""
        report = self._report
        names = None if every else tuple(report.pools)
        findings: list[Finding] = []
        drawn = _draw(self._bounds(), sample, seed)
        report.sampled = len(drawn)
        for start, end in self._stretches():
            findings += self._look(names, start, end, first=True, drawn=drawn)
        findings = self._excuse(findings, waiting)
        for pause_s in pauses_s:
            if not findings:
                break
            time.sleep(pause_s)
            report.looks += 1
            findings = self._excuse(_persistent(findings, self._again(findings, drawn)), waiting)
        listed = sorted({finding.place: finding for finding in findings}.values(), key=lambda finding: finding.place)
        report.found = len(listed)
        report.findings = listed[:MOST_FINDINGS]
        if listed:
            report.findings[0] = self._name_gpu(listed)

    # -- what is looked at

    def _bounds(self) -> dict[str, tuple[int, int]]:
        """The complete minutes of each pool that can have anything to account, with the whole hours and price intervals
        in which it begins and ends; what is not complete is counted."""
        report, unit = self._report, self._rules.unit_ms
        out: dict[str, tuple[int, int]] = {}
        report.pending_minutes = 0
        for pool in report.pools:
            first, last = self._extents.get(pool, (report.to_ms, report.to_ms))
            start = max(report.from_ms, first // unit * unit)
            until = min(report.to_ms, -(-last // unit) * unit)
            end = max(start, min(until, report.complete_until_ms))
            report.pending_minutes += max(0, until - max(start, end)) // MINUTE_MS
            if start < end:
                out[pool] = (start, end)
        return out

    def _stretches(self) -> list[tuple[int, int]]:
        """The whole range in stretches of whole days and units, as many as fit into memory."""
        bounds = self._bounds().values()
        if not bounds:
            return []
        start, end = min(a for a, _ in bounds), max(b for _, b in bounds)
        gpus = int(self._store.rows("SELECT uniqExact(gpu) FROM placements")[0][0])
        days = max(1, min(_MOST_DAYS, _RANGE_GPU_HOURS // (24 * max(1, gpus))))
        unit = self._rules.unit_ms * max(1, days * _DAY_MS // self._rules.unit_ms)
        edges = [start, *range((start // unit + 1) * unit, end, unit), end]
        return [(a, b) for a, b in pairwise(edges) if a < b]

    def _look(
        self, names: tuple[str, ...] | None, from_ms: int, to_ms: int, *, first: bool, drawn: Sequence[tuple[str, int]]
    ) -> list[Finding]:
        clips = {
            pool: (max(start, from_ms), min(end, to_ms))
            for pool, (start, end) in self._bounds().items()
            if start < to_ms and end > from_ms and (names is None or pool in names)
        }
        if not clips:
            return []
        audited = AuditedRange(
            self._store, self._rules, names, (from_ms, to_ms), self._salt, self._kept_ms, self._seconds
        )
        # The sample is computed while the fragments are being read.
        reads = {pool: audited.read(pool) for pool in clips}
        sampled: dict[str, list[Finding]] = {}
        for pool, (start, end) in clips.items():
            minutes = [at for name, at in drawn if name == pool and start <= at < end]
            with self._seconds("sample"):
                sampled[pool] = self._sampler.differences(reads[pool], minutes, self._kept_ms)
        audited.wait()
        findings: list[Finding] = []
        for pool, (start, end) in clips.items():
            found = audited.pool(reads[pool], start, end, self._report.complete_until_ms - _SETTLE_MS)
            findings += found.findings
            findings += [finding for finding in sampled[pool] if finding.at_ms < found.end_ms]
            with self._seconds("details"):
                findings += Details(self._store, self._rules, self._recomputer, found, self._salt).of(found.suspects)
            if first:
                self._count(found, end)
        return findings

    def _count(self, found: PoolRange, end_ms: int) -> None:
        report = self._report
        report.minutes += (found.end_ms - found.from_ms) // MINUTE_MS
        report.pending_minutes += (end_ms - found.end_ms) // MINUTE_MS
        report.unhashed += found.unhashed
        report.hours += found.hours
        report.open_hours += int(found.end_ms % HOUR_MS != 0)
        report.intervals += found.intervals

    def _again(self, findings: Sequence[Finding], drawn: Sequence[tuple[str, int]]) -> list[Finding]:
        """Another look at the units that findings are in."""
        unit = self._rules.unit_ms
        places: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
        for finding in findings:
            start = finding.at_ms // unit * unit
            places[finding.pool].append((start, start + unit))
        return [
            finding
            for pool, units in places.items()
            for start, end in Ranges(units).clip(self._report.from_ms, self._report.to_ms)
            for finding in self._look((pool,), start, end, first=False, drawn=drawn)
        ]

    def _excuse(self, findings: list[Finding], waiting: Waiting | None) -> list[Finding]:
        """Leaves out what is marked and only waits for its turn."""
        if waiting is None or not findings:
            return findings
        marked = waiting()
        widened = {pool: ranges.widen(self._rules.unit_ms) for pool, ranges in marked.items()}

        def waits(finding: Finding) -> bool:
            # Hours and money are made for whole units, minutes one by one: the mark of the open minute, of which there
            # always is one, must not excuse its hour's other minutes.
            ranges = (marked if finding.unit == "minute" else widened).get(finding.pool, ())
            return any(start <= finding.at_ms < end for start, end in ranges)

        self._report.waiting = len({finding.place for finding in findings if waits(finding)})
        return [finding for finding in findings if not waits(finding)]

    # -- what is told

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
        if not any(each.gpu for each in found) and start + unit <= self._report.complete_until_ms:
            found = hour_differences(self._store, self._recomputer, first.pool, start, start + unit)
        return replace(first, gpu=next((each.gpu for each in found if each.gpu), ""))

    @contextmanager
    def _seconds(self, step: str) -> Generator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            taken = time.perf_counter() - began
            self._report.seconds[step] = self._report.seconds.get(step, 0) + taken


def _draw(bounds: Mapping[str, tuple[int, int]], sample: int, seed: int) -> list[tuple[str, int]]:
    """`sample` minutes of all pools, each once, the same for the same seed."""
    sizes = [(end - start) // MINUTE_MS for start, end in bounds.values()]
    pools, ends, total = list(bounds), np.cumsum(sizes) if sizes else np.zeros(0, np.int64), sum(sizes)
    drawn: list[tuple[str, int]] = []
    for n in sorted(random.Random(seed).sample(range(total), min(sample, total))):
        at = int(np.searchsorted(ends, n, side="right"))
        start = bounds[pools[at]][0]
        drawn.append((pools[at], start + (n - int(ends[at] - sizes[at])) * MINUTE_MS))
    return drawn


def _persistent(before: Sequence[Finding], now: Iterable[Finding]) -> list[Finding]:
    """What was there in both looks. A look that was cut short cannot say what it did not see."""
    counts: defaultdict[tuple[str, str], int] = defaultdict(int)
    for finding in before:
        counts[finding.pool, finding.check] += 1
    known = {finding.place for finding in before}
    return [f for f in now if f.place in known or counts[f.pool, f.check] >= MOST_ROWS]
