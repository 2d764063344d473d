"""What must hold between the sums of one pool: which minutes, hours and price intervals do not fit. Pure.

A suspect names where to look and by which check; a finding is certain as it is. What each relation proves is written
beside it, because a relation that is dropped takes its proof along.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gpuledger.finance.rates import Rates, price_intervals
from gpuledger.streams.audit_checks import MOST_ROWS, Finding, Unit
from gpuledger.streams.audit_sums import Grid, Places
from gpuledger.streams.fingerprints import RatePrints
from gpuledger.streams.holders import spans
from gpuledger.streams.marks import HOUR_MS, MINUTE_MS
from gpuledger.streams.pool_facts import PoolFacts

__all__ = ["STORED", "PoolSums", "Suspect", "in_service", "relations"]

Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]
Mask = NDArray[np.bool_]

#: By table what its rows are called in findings.
STORED: Mapping[str, str] = {
    "ledger_minute": "stored minute rows",
    "ledger_gpu_minute": "stored gpu minute rows",
    "ledger_gpu_hour": "stored gpu hour rows",
    "ledger_job_hour": "stored job hour rows",
    "charges": "stored charges",
}


@dataclass(frozen=True, slots=True)
class Suspect:
    """Units (beginning at `at_ms`) that the check named must look at; `certain`: something is wrong there, whether or
    not the check can say what."""

    check: str
    unit: Unit
    at_ms: tuple[int, ...]
    certain: bool


@dataclass(frozen=True, slots=True)
class PoolSums:
    """What is compared: the sums of each table, and what they must be by the facts.

    [from_ms, to_ms) are complete minutes. GPU minutes before `kept_ms` have been deleted. `seen_differ`: minutes whose
    fragments are of other GPUs than those in service.
    """

    pool: str
    from_ms: int
    to_ms: int
    kept_ms: int
    unit_ms: int
    interval_minutes: int
    tables: Mapping[str, Places]
    facts: PoolFacts
    rates: Rates
    numbers: Mapping[str, int]
    seen_differ: Mask


def in_service(
    facts: PoolFacts, numbers: Mapping[str, int], from_ms: int, to_ms: int, unit_ms: int
) -> tuple[Hashes, Hashes]:
    """By unit of [from_ms, to_ms), from placements alone and modulo 2^64: the sum of the GPUs' time in service in
    microseconds times their numbers, and the sum of the numbers of the GPUs in service for any time."""
    units = (to_ms - from_ms) // unit_ms
    found = spans(
        replace(facts, allocations=facts.allocations.slice(0, 0), geometries=facts.geometries.slice(0, 0)),
        *(from_ms, from_ms + units * unit_ms, 1),
    )
    number = np.array([numbers.get(gpu, 0) for gpu in found.gpus], dtype=np.uint64)[found.gpu]
    first, last = (found.start - from_ms) // unit_ms, -((from_ms - found.end) // unit_ms)
    us, steps, there = (np.zeros(units + 1, dtype=np.uint64) for _ in range(3))
    # The first and the last unit of a span in part, those between them whole.
    edge = np.minimum(found.end, from_ms + (first + 1) * unit_ms) - found.start
    np.add.at(us, first, number * (edge * 1000).astype(np.uint64))
    several = np.flatnonzero(last - first > 1)
    edge = found.end[several] - (from_ms + (last[several] - 1) * unit_ms)
    np.add.at(us, last[several] - 1, number[several] * (edge * 1000).astype(np.uint64))
    whole = number[several] * np.uint64(unit_ms * 1000)
    np.add.at(steps, first[several] + 1, whole)
    np.subtract.at(steps, last[several] - 1, whole)
    # Spans are sorted by GPU and disjoint: a unit that the GPU's span before has touched already counts once.
    before = np.where(np.diff(found.gpu, prepend=-1) == 0, np.roll(last, 1), 0)
    begin = np.minimum(np.maximum(first, before), last)
    np.add.at(there, begin, number)
    np.subtract.at(there, last, number)
    return (us + np.cumsum(steps, dtype=np.uint64))[:-1], np.cumsum(there, dtype=np.uint64)[:-1]


def relations(sums: PoolSums) -> tuple[list[Finding], list[Suspect]]:
    """What is certainly wrong, and what must be looked at. Each kind of finding is listed MOST_ROWS times at most."""
    findings: list[Finding] = []
    suspects: list[Suspect] = []
    for each in (*_minutes(sums), *_hours(sums), *_money(sums)):
        if isinstance(each, Finding):
            findings.append(each)
        elif each.at_ms:
            suspects.append(each)
    return findings, suspects


# ------------------------------------------------------------------------------------------------- pieces


def _signed(values: NDArray[np.generic]) -> Ints:
    return values.astype(np.int64)


def _same(a: NDArray[np.generic], b: NDArray[np.generic]) -> Mask:
    """Of amounts modulo 2^64, signed or not."""
    return a.astype(np.uint64) == b.astype(np.uint64)


def _times(mask: Mask, from_ms: int, unit_ms: int) -> tuple[int, ...]:
    return tuple((from_ms + np.flatnonzero(mask) * unit_ms).tolist())


def _stored(
    table: str, unit: Unit, grid: Grid, must: Mask, pool: str, from_ms: int, unit_ms: int
) -> Iterator[Finding | Suspect]:
    """The rows are those that were written, each once, in every column: their hashes sum to what the marker has kept.
    `must`: where there has to be a marker."""
    name, there = STORED[table], grid.there
    markers = _signed(grid["markers"])
    lost = (there | must) & (markers != 1)
    for at in np.flatnonzero(lost)[:MOST_ROWS].tolist():
        about = (unit, from_ms + at * unit_ms, pool, "", name, "markers")
        yield Finding(*about, "1", str(markers[at]))
    kept, now = grid["rows_hash"], grid["rows_sum"]
    changed = there & ~lost & (kept != 0) & (kept != now)
    for at in np.flatnonzero(changed)[:MOST_ROWS].tolist():
        about = (unit, from_ms + at * unit_ms, pool, "", name, "hash")
        yield Finding(*about, str(kept[at]), str(now[at]))
    yield Suspect(name, unit, _times(changed, from_ms, unit_ms), certain=False)


# ------------------------------------------------------------------------------------------------- minutes


def _minutes(sums: PoolSums) -> Iterator[Finding | Suspect]:
    start, end, pool = sums.from_ms, sums.to_ms, sums.pool
    minutes = Grid(sums.tables["ledger_minute"], start, end, MINUTE_MS)
    there = minutes.there
    # Every GPU-second in service is in exactly one segment of the minute, and none is negative.
    unbalanced = ~_same(minutes["segments"], minutes["service"]) | (_signed(minutes["least"]) < 0)
    one = _signed(minutes["markers"]) == 1
    yield Suspect("minute", "minute", _times(there & (unbalanced | ~one), start, MINUTE_MS), certain=True)
    yield from (
        each
        for each in _stored("ledger_minute", "minute", minutes, np.zeros_like(there), pool, start, MINUTE_MS)
        if not (isinstance(each, Finding) and each.subject == "markers")  # the check "minute" says that
    )

    start = max(start, -(-sums.kept_ms // MINUTE_MS) * MINUTE_MS)
    if start >= end:
        return
    minutes = Grid(sums.tables["ledger_minute"], start, end, MINUTE_MS)
    gpus = Grid(sums.tables["ledger_gpu_minute"], start, end, MINUTE_MS)
    seen = minutes.there & (_signed(minutes["fragments"]) > 0) & (_signed(minutes["complete"]) == 1)
    yield from _stored("ledger_gpu_minute", "minute", gpus, seen, pool, start, MINUTE_MS)
    # Each tenant's observed time is the sum of its GPUs', row by row; all its time is, where every GPU has rows.
    observed = gpus.there & ~_same(gpus["seen"], minutes["seen"])
    yield Suspect("gpu rows of the minute", "minute", _times(observed, start, MINUTE_MS), certain=True)
    held = gpus.there & ~observed & ~_same(gpus["held"], minutes["held"])
    yield Suspect("gpu rows of the minute", "minute", _times(held, start, MINUTE_MS), certain=False)
    # The rows of each GPU in service sum to its time in service, and no other GPU has rows. GPUs that nobody saw have
    # none; then the GPUs are compared one by one.
    service, _ = in_service(sums.facts, sums.numbers, start, end, MINUTE_MS)
    every = _same(gpus["gpus"], service)
    odd = gpus.there & (~every | (_signed(gpus["least"]) < 0))
    yield Suspect("gpu minute against placements", "minute", _times(odd, start, MINUTE_MS), certain=False)
    # The GPUs with rows are those that were seen.
    strange = sums.seen_differ[(start - sums.from_ms) // MINUTE_MS :] | (gpus.there != seen)
    yield Suspect("gpus of the minute", "minute", _times(strange, start, MINUTE_MS), certain=False)
    # What no job holds is the same time for the GPUs as for the pool that divides it.
    unheld, divided = _signed(gpus["nobody"]), _signed(minutes["nobody"])
    wrong = gpus.there & np.where(every, unheld != divided, unheld > divided)
    for at in np.flatnonzero(wrong)[:MOST_ROWS].tolist():
        about = ("minute", start + at * MINUTE_MS, pool, "", "gpu rows of the minute", "held by nobody")
        yield Finding(*about, str(divided[at]), str(unheld[at]))


# ------------------------------------------------------------------------------------------------- hours


def _whole(from_ms: int, to_ms: int, unit_ms: int) -> tuple[int, int]:
    """The whole units inside [from, to); empty ones end where they begin."""
    start = -(-from_ms // unit_ms) * unit_ms
    return start, max(start, to_ms // unit_ms * unit_ms)


def _per(values: NDArray[np.generic], each: int) -> Hashes:
    """Sums modulo 2^64 of every `each` values."""
    return values.astype(np.uint64).reshape(-1, each).sum(axis=1, dtype=np.uint64)


def _hours(sums: PoolSums) -> Iterator[Finding | Suspect]:
    start, end = _whole(sums.from_ms, sums.to_ms, HOUR_MS)
    if start == end:
        return
    minutes = Grid(sums.tables["ledger_minute"], start, end, MINUTE_MS)
    gpus = Grid(sums.tables["ledger_gpu_hour"], start, end, HOUR_MS)
    jobs = Grid(sums.tables["ledger_job_hour"], start, end, HOUR_MS)
    must: Mask = np.logical_or.reduce(minutes.there.reshape(-1, 60), axis=1)
    yield from _stored("ledger_gpu_hour", "hour", gpus, must, sums.pool, start, HOUR_MS)
    yield from _stored("ledger_job_hour", "hour", jobs, must, sums.pool, start, HOUR_MS)

    def suspect(check: str, wrong: Mask) -> Suspect:
        return Suspect(check, "hour", _times(wrong, start, HOUR_MS), certain=True)

    # Each GPU's hour is its time in service; each tenant's is the sum of its minutes, by what it did; what nobody holds
    # is what the pool divides. Each job's hour is the sum of its GPUs', each tenant's that of its jobs'.
    service, _ = in_service(sums.facts, sums.numbers, start, end, HOUR_MS)
    yield suspect("gpu hour against placements", ~_same(gpus["gpus"], service) | (_signed(gpus["least"]) < 0))
    held, unheld = _per(minutes["held"], 60), _per(minutes["nobody"], 60)
    yield suspect("gpu hour", ~_same(gpus["held"], held) | ~_same(gpus["nobody"], unheld))
    yield suspect("job hour", ~_same(jobs["held"], held) | (_signed(jobs["least"]) < 0))
    yield suspect("job hour of a job", ~_same(jobs["jobs"], gpus["jobs"]))
    # A pool has no more unsliced time than its GPUs.
    have, shown = _signed(gpus["unsliced"]), _signed(_per(minutes["unsliced"], 60))
    for at in np.flatnonzero(shown > have)[:MOST_ROWS].tolist():
        about = ("hour", start + at * HOUR_MS, sums.pool, "", "gpu hour", "kind unsliced, at most")
        yield Finding(*about, str(have[at]), str(shown[at]))


# ------------------------------------------------------------------------------------------------- money


def _money(sums: PoolSums) -> Iterator[Finding | Suspect]:
    start, end = _whole(sums.from_ms, sums.to_ms, sums.unit_ms)
    if start == end:
        return
    pool, charges = sums.pool, sums.tables["charges"]
    rows = np.flatnonzero((charges.at_ms >= start) & (charges.at_ms < end))
    at_ms, ends = charges.at_ms[rows], _signed(charges["end_ms"][rows])
    # A marker without length replaces an interval that a later change of rates has moved.
    lasting = ends > at_ms
    prints = RatePrints(pool, sums.rates)
    yield from _intervals(sums, prints, start, end, dict(zip(at_ms.tolist(), ends.tolist(), strict=True)))
    kept, now = charges["rows_hash"][rows], charges["rows_sum"][rows]
    markers, least = _signed(charges["markers"][rows]), _signed(charges["least"][rows])
    # The costs of the rows sum to the interval's, to the nano-unit, and there is one of it.
    wrong = lasting & (charges["money_differs"][rows].astype(bool) | (markers != 1) | (least < 0))
    yield Suspect("asset cost", "money", tuple(at_ms[wrong].tolist()), certain=True)
    changed = (markers == 1) & (kept != 0) & (kept != now)
    for n in np.flatnonzero(changed)[:MOST_ROWS].tolist():
        about = ("money", int(at_ms[n]), pool, "", STORED["charges"], "hash")
        yield Finding(*about, str(kept[n]), str(now[n]))
    yield Suspect(STORED["charges"], "money", tuple(at_ms[changed].tolist()), certain=False)
    # They were charged by the rates that are stored now. Where no sum of the rows was kept, neither were the rates'.
    rates = charges["rates_hash"][rows]
    for n in np.flatnonzero(lasting & (kept != 0)).tolist():
        must = prints.of(int(at_ms[n]), int(ends[n]))
        if must != int(rates[n]):
            about = ("money", int(at_ms[n]), pool, "", "fingerprint: rates", "")
            yield Finding(*about, str(must), str(rates[n]))
    yield _charged_time(sums, start, end, at_ms[lasting], charges["jobs"][rows][lasting])


def _charged_time(sums: PoolSums, start: int, end: int, at_ms: Ints, jobs: NDArray[np.generic]) -> Suspect:
    """Each job's charged time is that of its hours, and what nobody held that of the minutes."""
    unit_ms = sums.unit_ms
    units = (end - start) // unit_ms
    charged = np.zeros(units, dtype=np.uint64)
    unit = (at_ms - start) // unit_ms
    np.add.at(charged, unit, jobs.astype(np.uint64))
    priced = np.zeros(units, dtype=bool)
    priced[unit] = True
    hours = Grid(sums.tables["ledger_job_hour"], start, end, HOUR_MS)
    minutes = Grid(sums.tables["ledger_minute"], start, end, MINUTE_MS)
    must = _per(hours["jobs"], unit_ms // HOUR_MS) + _per(minutes["rest"], unit_ms // MINUTE_MS)
    return Suspect("charged time", "money", _times(priced & (charged != must), start, unit_ms), certain=True)


def _intervals(sums: PoolSums, prints: RatePrints, start: int, end: int, found: Mapping[int, int]) -> Iterable[Finding]:
    """The intervals are those that the rates cut: none is missing where anything has a price, none ends elsewhere."""
    cut = dict(price_intervals(sums.pool, start, end, sums.rates, sums.interval_minutes))
    for at in sorted({*cut, *found}):
        until, is_there = cut.get(at, at), found.get(at)
        priced = until > at and prints.of(at, until) != 0
        if (
            (is_there is None and priced)
            or (is_there is not None and is_there not in (at, until))
            or (is_there == at and priced)
        ):
            about = ("money", at, sums.pool, "", "price interval", "end")
            yield Finding(*about, str(until), "no interval" if is_there in (None, at) else str(is_there))
