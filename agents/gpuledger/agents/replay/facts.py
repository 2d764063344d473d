"""From placed jobs to the events that tell them: inventory, tenants, jobs and allocations.

Every id, revision and claim time is a function of the trace alone, so a replay sent twice changes nothing.
An event carries the whole fact, its end included; told as it happened, a start comes first and its end corrects it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from gpuledger.agents.replay.exceptions import TraceError
from gpuledger.agents.replay.place import Placed, Placement
from gpuledger.agents.replay.trace import Fleet, Node, TraceJob
from gpuledger.schemas.events import AccountRule, Allocation, Event, Inventory, Job, Source, Tenant
from gpuledger.schemas.events import Placement as PlacementFact

__all__ = [
    "JobReplay",
    "Replay",
    "Scope",
    "Window",
    "inventory_events",
    "service_interval",
    "tenant_events",
]

_HOUR_MS = 3_600_000


class Replay(Protocol):
    """What can be sent: `expected` events (for a progress bar), in the order in which they should arrive."""

    @property
    def expected(self) -> int: ...

    def events(self) -> Iterator[Event]: ...


@dataclass(frozen=True, slots=True)
class Window:
    """[from_ms, to_ms); None is open. Whole facts that overlap it are sent; `clip` cuts them to it."""

    from_ms: int | None = None
    to_ms: int | None = None
    clip: bool = False

    def overlaps(self, start_ms: int, end_ms: int | None) -> bool:
        starts_before = self.to_ms is None or start_ms < self.to_ms
        return starts_before and (self.from_ms is None or end_ms is None or end_ms > self.from_ms)

    def cut(self, start_ms: int, end_ms: int | None) -> tuple[int, int | None]:
        """The interval as it is sent."""
        if not self.clip:
            return start_ms, end_ms
        if self.from_ms is not None:
            start_ms = max(start_ms, self.from_ms)
        if self.to_ms is not None:
            end_ms = self.to_ms if end_ms is None else min(end_ms, self.to_ms)
        return start_ms, end_ms


@dataclass(frozen=True, slots=True)
class Scope:
    """How a trace is told. `name` begins every id; a higher `revision` corrects an earlier replay of the same name.

    `tenants`: each account becomes a tenant of its own. Off, the account map that is there decides.
    """

    name: str
    source: Source = "manual"
    revision: int = 1
    window: Window = Window()
    tenants: bool = True
    as_it_happened: bool = False

    @property
    def prefix(self) -> str:
        """The beginning of ids. What is clipped is another fact than the whole one, so its ids say so."""
        window = self.window
        return f"{self.name}@{window.from_ms or ''}-{window.to_ms or ''}" if window.clip else self.name

    @property
    def first(self) -> int:
        """The revision of a fact whose end is not told yet; an even number, below that of the whole fact."""
        return 2 * self.revision

    @property
    def whole(self) -> int:
        return 2 * self.revision + 1


def service_interval(jobs: Iterable[TraceJob], name: str) -> tuple[int, int | None]:
    """The whole UTC hours that hold every run: how long the fleet is in service. No end while a job still runs.

    Raises:
        TraceError: no job ran.
    """
    first: int | None = None
    last: int | None = 0
    for job in jobs:
        if job.start_ms is not None:
            first = job.start_ms if first is None else min(first, job.start_ms)
            last = None if last is None or job.end_ms is None else max(last, job.end_ms)
    if first is None:
        raise TraceError(name, 0, "start", "", "no job ever ran; there is nothing to replay")
    return first - first % _HOUR_MS, None if last is None else -(-last // _HOUR_MS) * _HOUR_MS


def tenant_events(accounts: Iterable[str], scope: Scope, claimed_at_ms: int) -> Iterator[Event]:
    """Each account as a tenant of the same name. Low revisions: what an operator applies later wins."""
    for account in sorted(set(accounts) - {""}):
        rule = AccountRule(match="account", value=account, source=scope.source)
        yield Tenant(id=account, revision=scope.whole, claimed_at_ms=claimed_at_ms, name=account, rules=[rule])


def inventory_events(
    nodes: Iterable[Node], scope: Scope, start_ms: int, end_ms: int | None, *, cut: bool = True
) -> Iterator[Event]:
    """One event per node with the placement of each of its GPUs over [start, end), cut to a window that clips."""
    if cut:
        start_ms, end_ms = scope.window.cut(start_ms, end_ms)
    for node in nodes:
        placements = [
            PlacementFact(
                id=f"{scope.prefix}/{node.gpu(index)}",
                revision=scope.whole,
                claimed_at_ms=start_ms,
                gpu=node.gpu(index),
                node=node.name,
                pool=node.pool,
                site=node.site,
                model=node.model,
                index=index,
                start_ms=start_ms,
                end_ms=end_ms,
            )
            for index in range(node.gpus)
        ]
        yield Inventory(node=node.name, claimed_at_ms=start_ms, agent_version="replay", placements=placements)


class JobReplay:
    """A placed trace as events: tenants and inventory first, then each job with its allocations, by start.

    Placement is always that of the whole trace, so that a window shows the same GPUs as the whole.
    """

    def __init__(self, placement: Placement, fleet: Fleet, scope: Scope) -> None:
        window = scope.window
        self.start_ms, self.end_ms = service_interval((placed.job for placed in placement.held), scope.name)
        if not window.overlaps(self.start_ms, self.end_ms):
            raise TraceError(scope.name, 0, "", "", "no part of the trace lies between --from and --to")
        self.fleet = fleet
        self.scope = scope
        self.oversubscribed = placement.oversubscribed
        self.held = [p for p in placement.held if window.overlaps(p.job.start_ms or 0, p.job.end_ms)]
        self.without_gpu = [job for job in placement.without_gpu if self._in_window(job)]

    def _in_window(self, job: TraceJob) -> bool:
        times = [t for t in (job.submitted_ms, job.start_ms, job.end_ms) if t is not None]
        # A job without any time belongs to the trace, not to a part of it.
        window = self.scope.window
        if not times:
            return window.from_ms is None and window.to_ms is None
        return window.overlaps(min(times), max(times) + 1)

    @property
    def unplaced(self) -> list[Placed]:
        return [placed for placed in self.held if placed.problem]

    @property
    def expected(self) -> int:
        accounts = {job.account for job in self._jobs()} - {""} if self.scope.tenants else set[str]()
        runs = 0
        for placed in self.held:
            twice = self.scope.as_it_happened and placed.job.end_ms is not None
            runs += (1 + len(placed.claims)) * (2 if twice else 1)
        return len(accounts) + len(self.fleet.nodes) + len(self.without_gpu) + runs

    def _jobs(self) -> Iterator[TraceJob]:
        yield from (placed.job for placed in self.held)
        yield from self.without_gpu

    def events(self) -> Iterator[Event]:
        if self.scope.tenants:
            yield from tenant_events((job.account for job in self._jobs()), self.scope, self.start_ms)
        yield from inventory_events(self.fleet.nodes, self.scope, self.start_ms, self.end_ms)
        for job in self.without_gpu:
            yield self._job(job, ended=True)
        if self.scope.as_it_happened:
            yield from self._as_it_happened()
        else:
            for placed in self.held:
                yield from self._run(placed, ended=True)

    def _as_it_happened(self) -> Iterator[Event]:
        """Starts and ends in the order of time; at one instant ends come first, as GPUs change hands."""
        moments = [(placed.job.start_ms or 0, 1, n) for n, placed in enumerate(self.held)]
        moments += [(p.job.end_ms, 0, n) for n, p in enumerate(self.held) if p.job.end_ms is not None]
        for _, starts, n in sorted(moments):
            yield from self._run(self.held[n], ended=not starts)

    def _run(self, placed: Placed, ended: bool) -> Iterator[Event]:
        job, scope = placed.job, self.scope
        yield self._job(job, ended)
        start_ms, end_ms = scope.window.cut(job.start_ms or 0, job.end_ms)
        ended = ended and end_ms is not None
        for n, claim in enumerate(placed.claims):
            whole = claim.milli == 1000
            yield Allocation(
                id=f"{scope.prefix}/{job.job_id}/{n}",
                revision=scope.whole if ended else scope.first,
                claimed_at_ms=end_ms if ended and end_ms is not None else start_ms,
                node=claim.node,
                gpu=claim.gpu,
                job_id=job.job_id,
                source=scope.source,
                account=job.account,
                user=job.user,
                weight_num=1 if whole else claim.milli,
                weight_den=1 if whole else 1000,
                start_ms=start_ms,
                end_ms=end_ms if ended else None,
            )

    def _job(self, job: TraceJob, ended: bool) -> Job:
        """The job as its scheduler knew it: never clipped, for it decides nothing in the ledger."""
        known = (job.end_ms if ended else None, job.start_ms, job.submitted_ms, self.start_ms)
        tags = {"gpu_milli": str(job.milli)} if job.milli != 1000 else {}
        if job.model:
            tags["model"] = job.model
        return Job(
            id=job.job_id,
            revision=self.scope.whole if ended else self.scope.first,
            claimed_at_ms=next(t for t in known if t is not None),
            source=self.scope.source,
            cluster=self.scope.name,
            account=job.account,
            user=job.user,
            gpus=job.gpus,
            submitted_ms=job.submitted_ms,
            started_ms=job.start_ms,
            ended_ms=job.end_ms if ended else None,
            state=job.state if ended else "RUNNING",
            tags=tags,
        )
