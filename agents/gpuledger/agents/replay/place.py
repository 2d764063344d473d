"""Which GPU each job held: first-fit in the fleet's order, the same whatever the order of the rows.

Jobs are taken by (start, job id); GPUs are given back at a job's end, before the jobs that start at that instant.
What the trace itself says (node, GPU index) is kept as told; what fits nowhere is reported, never dropped.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from gpuledger.agents.replay.trace import UNPLACED_NODE, Fleet, TraceJob

__all__ = ["Claim", "Placed", "Placement", "place"]

_WHOLE = 1000


@dataclass(frozen=True, slots=True)
class Claim:
    """`milli` thousandths of one GPU. A GPU that is in no placement is one the ledger shows as a conflict."""

    node: str
    gpu: str
    milli: int


@dataclass(frozen=True, slots=True)
class Placed:
    """A job with one claim per GPU; `problem` says why they are on no GPU of the fleet, "" where they are."""

    job: TraceJob
    claims: tuple[Claim, ...]
    problem: str = ""


@dataclass(slots=True)
class Placement:
    """Every job of a trace, by (start, job id), those that held no GPU last.

    `held` were placed or could not be (`problem`); `without_gpu` asked for none, never ran or ran for no time;
    `oversubscribed` are ids of jobs whose own GPU index names a GPU that was already full.
    """

    held: list[Placed] = field(default_factory=list[Placed])
    without_gpu: list[TraceJob] = field(default_factory=list[TraceJob])
    oversubscribed: list[str] = field(default_factory=list[str])

    @property
    def unplaced(self) -> list[Placed]:
        return [placed for placed in self.held if placed.problem]


def place(jobs: Iterable[TraceJob], fleet: Fleet) -> Placement:
    """Places every job that held a GPU.

    A job with GPU indexes is where it says. One with nodes only takes the lowest free GPUs of those nodes, in their
    order. Any other takes, of the nodes of its model (``A|B`` is either; all where it names none): the first
    one with room for all its GPUs, else the first free GPUs over several nodes, in order, else nothing. A part of a
    GPU goes to the first GPU with room. A job that says less never takes a GPU that one that says more holds at any
    time of its run.
    """
    result = Placement()
    runs: list[TraceJob] = []
    for job in jobs:
        if job.gpus and job.start_ms is not None and job.end_ms != job.start_ms:
            runs.append(job)
        else:
            result.without_gpu.append(job)
    runs.sort(key=lambda job: (job.start_ms, job.job_id))
    result.without_gpu.sort(key=lambda job: (job.start_ms is None, job.start_ms or 0, job.job_id))
    inventory = _Inventory(fleet)
    taken: list[tuple[int, ...] | None] = [None] * len(runs)
    problems: list[str] = [""] * len(runs)
    tiers = [_tier(job) for job in runs]
    for tier in sorted(set(tiers)):
        _Pass(inventory, runs, tiers, taken, problems).run(tier, result.oversubscribed)
    for job, gpus, problem in zip(runs, taken, problems, strict=True):
        claims = tuple(inventory.claim(gpu, job.milli) for gpu in gpus or ())
        result.held.append(Placed(job, claims or _claims_nowhere(job), problem))
    return result


def _tier(job: TraceJob) -> int:
    return 0 if job.indexes else 1 if job.nodes else 2


def _claims_nowhere(job: TraceJob) -> tuple[Claim, ...]:
    """One claim per GPU, each on a name of its own that no placement has, so that the time stays visible."""
    return tuple(Claim(UNPLACED_NODE, f"{UNPLACED_NODE}/{job.job_id}/{n}", job.milli) for n in range(job.gpus))


class _Inventory:
    """The fleet's GPUs under running numbers, node after node."""

    def __init__(self, fleet: Fleet) -> None:
        self.nodes = fleet.nodes
        self.by_name = {node.name: n for n, node in enumerate(fleet.nodes)}
        self.first: list[int] = []
        self.node_of: list[int] = []
        for n, node in enumerate(fleet.nodes):
            self.first.append(len(self.node_of))
            self.node_of.extend([n] * node.gpus)
        self._claims: dict[tuple[int, int], Claim] = {}

    def gpus(self, n: int) -> range:
        return range(self.first[n], self.first[n] + self.nodes[n].gpus)

    def claim(self, gpu: int, milli: int) -> Claim:
        """The claim on a GPU; equal ones are one object, for a trace has hundreds of thousands."""
        found = self._claims.get((gpu, milli))
        if found is None:
            n = self.node_of[gpu]
            node = self.nodes[n]
            found = self._claims[(gpu, milli)] = Claim(node.name, node.gpu(gpu - self.first[n]), milli)
        return found


class _FirstAtLeast:
    """Over a row of integers: the first position whose value is at least x, in O(log n) (a tree of maxima)."""

    def __init__(self, values: Sequence[int]) -> None:
        self._size = 1
        while self._size < len(values):
            self._size *= 2
        self._tree = [-(2**62)] * (2 * self._size)
        self._tree[self._size : self._size + len(values)] = values
        for at in range(self._size - 1, 0, -1):
            self._tree[at] = max(self._tree[2 * at], self._tree[2 * at + 1])

    def set(self, position: int, value: int) -> None:
        tree = self._tree
        at = position + self._size
        tree[at] = value
        at //= 2
        while at:
            left, right = tree[2 * at], tree[2 * at + 1]
            best = left if left >= right else right
            if tree[at] == best:
                return
            tree[at] = best
            at //= 2

    def find(self, value: int, start: int = 0) -> int | None:
        """The first position >= `start` whose value is >= `value`, None if there is none."""
        tree, size = self._tree, self._size
        if start >= size:
            return None
        at = start + size
        while tree[at] < value:
            # Climb to the next subtree on the right; at the right edge there is none.
            while at & 1:
                at //= 2
            if at == 0:
                return None
            at += 1
        while at < size:
            at *= 2
            if tree[at] < value:
                at += 1
        return at - size


class _Class:
    """The nodes of one model (or all), in order, with their whole free GPUs and their roomiest GPU."""

    def __init__(self, inventory: _Inventory, members: Sequence[int]) -> None:
        self.members = members
        self.free = sum(inventory.nodes[n].gpus for n in members)
        self.whole = _FirstAtLeast([inventory.nodes[n].gpus for n in members])
        self.room = _FirstAtLeast([_WHOLE if inventory.nodes[n].gpus else 0 for n in members])


class _Pass:
    """One walk over time that places the jobs of one tier; the jobs of earlier tiers come and go as placed."""

    def __init__(
        self,
        inventory: _Inventory,
        runs: Sequence[TraceJob],
        tiers: Sequence[int],
        taken: list[tuple[int, ...] | None],
        problems: list[str],
    ) -> None:
        self._inventory = inventory
        self._runs = runs
        self._tiers = tiers
        self._taken = taken
        self._problems = problems
        nodes = inventory.nodes
        self._milli = [_WHOLE] * len(inventory.node_of)
        self._whole = [node.gpus for node in nodes]
        self._all = _Class(inventory, range(len(nodes)))
        self._by_model = {"": self._all}
        self._groups = [[(self._all, n)] for n in range(len(nodes))]
        for model in {job.model for job in runs} - {""}:
            wanted = set(model.split("|"))
            members = [n for n, node in enumerate(nodes) if node.model in wanted]
            if len(members) == len(nodes):
                self._by_model[model] = self._all
            elif members:
                group = self._by_model[model] = _Class(inventory, members)
                for at, n in enumerate(members):
                    self._groups[n].append((group, at))
        self._reserved: dict[int, list[int]] = {}
        self._reserved_nodes: set[int] = set()

    def run(self, tier: int, oversubscribed: list[str]) -> None:
        self._reserve(tier)
        ends: list[tuple[int, int]] = []
        for number, job in enumerate(self._runs):
            if self._tiers[number] > tier:
                continue
            start_ms = job.start_ms or 0
            while ends and ends[0][0] <= start_ms:
                self._change(heapq.heappop(ends)[1], +1)
            if self._tiers[number] == tier:
                gpus, problem = self._choose(job, tier)
                self._taken[number], self._problems[number] = gpus, problem
                if tier == 0 and gpus and any(self._milli[gpu] < job.milli for gpu in gpus):
                    oversubscribed.append(job.job_id)
            if self._taken[number]:
                self._change(number, -1)
                if job.end_ms is not None:
                    heapq.heappush(ends, (job.end_ms, number))

    def _reserve(self, tier: int) -> None:
        """Remembers when GPUs will be taken by jobs of earlier tiers, which are sorted by start."""
        for number, job in enumerate(self._runs):
            if self._tiers[number] < tier:
                for gpu in self._taken[number] or ():
                    self._reserved.setdefault(gpu, []).append(job.start_ms or 0)
                    self._reserved_nodes.add(self._inventory.node_of[gpu])

    def _change(self, number: int, sign: int) -> None:
        """Takes (-1) or gives back (+1) the GPUs of a job."""
        change = sign * self._runs[number].milli
        milli, node_of = self._milli, self._inventory.node_of
        touched: dict[int, int] = {}
        for gpu in self._taken[number] or ():
            before = milli[gpu]
            after = milli[gpu] = before + change
            n = node_of[gpu]
            touched[n] = touched.get(n, 0) + (after == _WHOLE) - (before == _WHOLE)
        for n, step in touched.items():
            gpus = self._inventory.gpus(n)
            room = max(milli[gpus.start : gpus.stop])
            self._whole[n] += step
            for group, at in self._groups[n]:
                if step:
                    group.free += step
                    group.whole.set(at, self._whole[n])
                group.room.set(at, room)

    def _choose(self, job: TraceJob, tier: int) -> tuple[tuple[int, ...] | None, str]:
        if tier == 0:
            return self._as_told(job)
        if tier == 1:
            return self._on_nodes(job)
        group = self._by_model.get(job.model)
        if group is None:
            return None, f"the fleet has no GPU of model {job.model}"
        gpus = self._first_fit(job, group)
        return gpus, "" if gpus else "no GPU of the fleet is free for it"

    def _as_told(self, job: TraceJob) -> tuple[tuple[int, ...] | None, str]:
        gpus: list[int] = []
        for name, indexes in zip(job.nodes, job.indexes, strict=True):
            n = self._inventory.by_name.get(name)
            if n is None:
                return None, f"the fleet has no node {name}"
            for index in indexes:
                if index >= self._inventory.nodes[n].gpus:
                    return None, f"node {name} has no GPU {index}"
                gpus.append(self._inventory.first[n] + index)
        return tuple(gpus), ""

    def _on_nodes(self, job: TraceJob) -> tuple[tuple[int, ...] | None, str]:
        gpus: list[int] = []
        for name in job.nodes:
            n = self._inventory.by_name.get(name)
            if n is None:
                return None, f"the fleet has no node {name}"
            gpus.extend(self._fitting(job, n, job.gpus - len(gpus)))
        if len(gpus) < job.gpus:
            return None, f"{', '.join(job.nodes)}: {len(gpus)} of {job.gpus} GPUs are free"
        return tuple(gpus), ""

    def _first_fit(self, job: TraceJob, group: _Class) -> tuple[int, ...] | None:
        if job.milli < _WHOLE:
            search, least = group.room, job.milli
        else:
            search, least = group.whole, job.gpus
        at = search.find(least)
        while at is not None:
            gpus = self._fitting(job, group.members[at], job.gpus)
            if len(gpus) == job.gpus:
                return tuple(gpus)
            at = search.find(least, at + 1)
        return self._spread(job, group) if job.gpus > 1 else None

    def _spread(self, job: TraceJob, group: _Class) -> tuple[int, ...] | None:
        search, least = (group.whole, 1) if job.milli == _WHOLE else (group.room, job.milli)
        if job.milli == _WHOLE and group.free < job.gpus:
            return None
        gpus: list[int] = []
        at = search.find(least)
        while at is not None and len(gpus) < job.gpus:
            gpus.extend(self._fitting(job, group.members[at], job.gpus - len(gpus)))
            at = search.find(least, at + 1)
        return tuple(gpus) if len(gpus) == job.gpus else None

    def _fitting(self, job: TraceJob, n: int, most: int) -> list[int]:
        """The first GPUs of node `n`, at most `most`, with room for the job now and during all of its run."""
        gpus = self._inventory.gpus(n)
        milli, need = self._milli, job.milli
        room = [gpu for gpu in gpus if milli[gpu] >= need]
        if n in self._reserved_nodes:
            room = [gpu for gpu in room if self._stays_free(gpu, job)]
        return room[:most]

    def _stays_free(self, gpu: int, job: TraceJob) -> bool:
        """No job of an earlier tier takes the GPU between the start and the end of `job`."""
        starts = self._reserved.get(gpu)
        if starts is None:
            return True
        at = bisect_left(starts, job.start_ms or 0)
        return at == len(starts) or (job.end_ms is not None and starts[at] >= job.end_ms)
