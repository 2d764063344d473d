"""The capacity of Helios' virtual clusters (HeliosArtifact, `vc_5min.csv`) as commitments, transfers and held GPUs.

A virtual cluster owns running + idle GPUs; what moves between two of them in one reading is a transfer. The readings
name no zone and are taken as UTC; each holds until the cluster's next one, the last for one step.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

from gpuledger.agents.replay.capacity import CapacityFacts, capacity_facts
from gpuledger.agents.replay.exceptions import TraceError
from gpuledger.agents.replay.facts import Scope, inventory_events, tenant_events
from gpuledger.agents.replay.rows import MAX_TIME_MS, MIN_TIME_MS, OnReject, Row, open_table, reject, show
from gpuledger.agents.replay.trace import Node
from gpuledger.schemas.events import Allocation, Commitment, Event, Job, Transfer

__all__ = ["POOL", "HeliosReplay", "HeliosTrace", "Reading", "read_helios"]

POOL = "helios-earth"
_SITE = "helios"
_GPUS_PER_NODE = 8
_COLUMNS = ("time", "vc", "running_gpu_num", "idle_gpu_num")
_IGNORED = ("running_gpujob_num", "pending_gpujob_num", "pending_gpu_num", "gpu_utilization")
_HOUR_MS = 3_600_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Reading:
    """What a virtual cluster owned (`capacity`) and ran on (`running`) from `at_ms` on."""

    at_ms: int
    capacity: int
    running: int


@dataclass(frozen=True, slots=True)
class HeliosTrace:
    """Readings per virtual cluster, ascending; each holds to the next, the last for `step_ms`.

    `gaps` counts readings that hold for longer than a step, as the next one is missing.
    """

    readings: Mapping[str, Sequence[Reading]]
    step_ms: int
    gaps: int

    @property
    def start_ms(self) -> int:
        return min(series[0].at_ms for series in self.readings.values())

    @property
    def end_ms(self) -> int:
        return max(series[-1].at_ms for series in self.readings.values()) + self.step_ms

    def between(self, from_ms: int | None, to_ms: int | None) -> HeliosTrace:
        """The readings taken in [from, to)."""
        kept = {
            vc: [r for r in series if (from_ms is None or r.at_ms >= from_ms) and (to_ms is None or r.at_ms < to_ms)]
            for vc, series in self.readings.items()
        }
        kept = {vc: series for vc, series in kept.items() if series}
        if not kept:
            raise TraceError("helios", 0, "time", "", "no reading was taken between --from and --to")
        return HeliosTrace(kept, self.step_ms, _gaps(kept, self.step_ms))


def read_helios(path: Path, on_reject: OnReject = reject) -> HeliosTrace:
    """The readings of a file (``.csv`` or ``.csv.gz``), or of the one ``vc_5min.csv[.gz]`` in a folder.

    Raises:
        TraceError: the file or its header, a row unless `on_reject` takes it, or fewer than two readings.
    """
    if path.is_dir():
        found = [p for p in (path / "vc_5min.csv", path / "vc_5min.csv.gz") if p.is_file()]
        if not found:
            raise TraceError(str(path), 0, "", "", "holds neither vc_5min.csv nor vc_5min.csv.gz; give the file")
        path = found[0]
    _, rows = open_table(path, _COLUMNS, _IGNORED, on_reject)
    series: defaultdict[str, dict[int, Reading]] = defaultdict(dict)
    for row in rows:
        try:
            vc, reading = row.text("vc", 128), _reading(row)
            if reading.at_ms in series[vc]:
                raise row.error("time", f"{show(row.get('time'))} is there twice for {vc}; keep one reading")
        except TraceError as error:
            on_reject(error)
            continue
        series[vc][reading.at_ms] = reading
    times = sorted({at_ms for readings in series.values() for at_ms in readings})
    if len(times) < 2:
        raise TraceError(path.name, 0, "time", "", "has fewer than two instants; how long one holds cannot be known")
    step_ms = min(later - earlier for earlier, later in pairwise(times))
    ordered = {vc: [by_time[t] for t in sorted(by_time)] for vc, by_time in sorted(series.items()) if by_time}
    return HeliosTrace(ordered, step_ms, _gaps(ordered, step_ms))


def _reading(row: Row) -> Reading:
    value = row.get("time")
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        raise row.error("time", f"expected a time such as 2020-05-01 00:05:00, got {show(value)}") from None
    moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
    at_ms = (moment - _EPOCH) // timedelta(milliseconds=1)
    if not MIN_TIME_MS <= at_ms <= MAX_TIME_MS:
        raise row.error("time", f"{show(value)} is not between 2000 and 2200")
    running = row.integer("running_gpu_num", 0, 1_000_000)
    return Reading(at_ms, running + row.integer("idle_gpu_num", 0, 1_000_000), running)


def _gaps(readings: Mapping[str, Sequence[Reading]], step_ms: int) -> int:
    return sum(
        later.at_ms - earlier.at_ms > step_ms for series in readings.values() for earlier, later in pairwise(series)
    )


def _changes(trace: HeliosTrace, column: str) -> list[tuple[int, dict[str, int]]]:
    """(time, tenant -> new number) wherever a number changes; each cluster ends at 0."""
    changes: defaultdict[int, dict[str, int]] = defaultdict(dict)
    for vc, series in trace.readings.items():
        before = 0
        for reading in series:
            number: int = getattr(reading, column)
            if number != before:
                changes[reading.at_ms][vc] = before = number
        if before:
            changes[series[-1].at_ms + trace.step_ms][vc] = 0
    return sorted(changes.items())


@dataclass(frozen=True, slots=True)
class _Held:
    vc: str
    gpu: int
    start_ms: int
    end_ms: int


def _held(trace: HeliosTrace) -> Iterator[_Held]:
    """Which GPUs ran for whom: each cluster takes the lowest free numbers and gives back what it took last."""
    free: list[int] = []
    known = 0
    stacks: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
    for at_ms, numbers in _changes(trace, "running"):
        for vc, number in sorted(numbers.items()):
            while len(stacks[vc]) > number:
                gpu, start_ms = stacks[vc].pop()
                heapq.heappush(free, gpu)
                yield _Held(vc, gpu, start_ms, at_ms)
        for vc, number in sorted(numbers.items()):
            while len(stacks[vc]) < number:
                if not free:
                    heapq.heappush(free, known)
                    known += 1
                stacks[vc].append((heapq.heappop(free), at_ms))


class HeliosReplay:
    """The trace as events: tenants, a fleet as large as the greatest capacity, commitments, transfers, held GPUs.

    The GPUs that ran are one job per virtual cluster (the readings name no jobs); without `usage` none are told, and
    all that was committed shows as reserved and unused.
    """

    def __init__(self, trace: HeliosTrace, scope: Scope, usage: bool = True) -> None:
        window = scope.window
        if window.clip:
            trace = trace.between(window.from_ms, window.to_ms)
        self.trace = trace
        self.scope = scope
        self.usage = usage
        self.start_ms = trace.start_ms - trace.start_ms % _HOUR_MS
        self.end_ms = -(-trace.end_ms // _HOUR_MS) * _HOUR_MS
        if not window.overlaps(self.start_ms, self.end_ms):
            raise TraceError(scope.name, 0, "time", "", "no part of the trace lies between --from and --to")
        changes = _changes(trace, "capacity")
        facts = capacity_facts(changes)
        self.facts = CapacityFacts(
            tuple(span for span in facts.commitments if window.overlaps(span.start_ms, span.end_ms)),
            tuple(span for span in facts.transfers if window.overlaps(span.start_ms, span.end_ms)),
        )
        self.nodes = _nodes(_greatest_total(changes))
        self.held = [h for h in _held(trace) if window.overlaps(h.start_ms, h.end_ms)] if usage else []

    @property
    def expected(self) -> int:
        vcs = len(self.trace.readings)
        facts = len(self.facts.commitments) + len(self.facts.transfers) + len(self.held)
        return vcs * (self.scope.tenants + self.usage) + len(self.nodes) + facts

    def events(self) -> Iterator[Event]:
        scope = self.scope
        if scope.tenants:
            yield from tenant_events(self.trace.readings, scope, self.start_ms)
        # Clipped, the readings themselves were cut; the whole hours around them are in service.
        yield from inventory_events(self.nodes, scope, self.start_ms, self.end_ms, cut=False)
        yield from self._capacity()
        if self.usage:
            yield from self._usage()

    def _capacity(self) -> Iterator[Event]:
        scope = self.scope
        for span in self.facts.commitments:
            yield Commitment(
                id=f"{scope.prefix}/{span.tenant}/{span.start_ms}-{span.end_ms}",
                revision=scope.whole,
                claimed_at_ms=span.start_ms,
                pool=POOL,
                tenant=span.tenant,
                gpus=span.gpus,
                start_ms=span.start_ms,
                end_ms=span.end_ms,
                by="replay",
                why="running and idle GPUs of the virtual cluster",
            )
        for span in self.facts.transfers:
            yield Transfer(
                id=f"{scope.prefix}/{span.from_tenant}>{span.to_tenant}/{span.start_ms}-{span.end_ms}",
                revision=scope.whole,
                claimed_at_ms=span.start_ms,
                pool=POOL,
                gpus=span.gpus,
                from_tenant=span.from_tenant,
                to_tenant=span.to_tenant,
                start_ms=span.start_ms,
                end_ms=span.end_ms,
                by="replay",
                why="one virtual cluster lost what the other gained in the same reading",
            )

    def _usage(self) -> Iterator[Event]:
        scope = self.scope
        for vc, series in self.trace.readings.items():
            yield Job(
                id=f"{scope.name}/{vc}",
                revision=scope.whole,
                claimed_at_ms=series[0].at_ms,
                source=scope.source,
                cluster=scope.name,
                name=f"all running jobs of {vc}",
                account=vc,
                started_ms=series[0].at_ms,
                ended_ms=series[-1].at_ms + self.trace.step_ms,
            )
        for held in self.held:
            node = self.nodes[held.gpu // _GPUS_PER_NODE]
            yield Allocation(
                id=f"{scope.prefix}/{held.vc}/{held.gpu}/{held.start_ms}",
                revision=scope.whole,
                claimed_at_ms=held.end_ms,
                node=node.name,
                gpu=node.gpu(held.gpu % _GPUS_PER_NODE),
                job_id=f"{scope.name}/{held.vc}",
                source=scope.source,
                account=held.vc,
                start_ms=held.start_ms,
                end_ms=held.end_ms,
            )


def _greatest_total(changes: Sequence[tuple[int, Mapping[str, int]]]) -> int:
    owned: dict[str, int] = {}
    greatest = 0
    for _, numbers in changes:
        owned.update(numbers)
        greatest = max(greatest, sum(owned.values()))
    return greatest


def _nodes(gpus: int) -> list[Node]:
    """Nodes of 8 GPUs, the last one smaller where need be."""
    sizes = [min(_GPUS_PER_NODE, gpus - first) for first in range(0, gpus, _GPUS_PER_NODE)]
    return [Node(f"{POOL}-{n:03d}", size, "", POOL, _SITE) for n, size in enumerate(sizes)]
