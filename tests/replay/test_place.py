"""Placement: never above capacity, first-fit as a naive oracle computes it, the same for any order of rows."""

import random
from collections import defaultdict
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from gpuledger.agents.replay.place import Placed, Placement, place
from gpuledger.agents.replay.trace import Fleet, Node, TraceJob

T0 = 1_600_000_000_000
MODELS = ("A", "B")

nodes = st.lists(st.tuples(st.integers(0, 4), st.sampled_from(MODELS)), min_size=1, max_size=5)


def fleet_of(sizes: Sequence[tuple[int, str]]) -> Fleet:
    return Fleet(tuple(Node(f"n{n}", gpus, model, "pool") for n, (gpus, model) in enumerate(sizes)))


@st.composite
def jobs(draw: st.DrawFn, pinned: bool) -> list[TraceJob]:
    result: list[TraceJob] = []
    for n in range(draw(st.integers(0, 25))):
        start = draw(st.integers(0, 12))
        gpus, milli = draw(
            st.one_of(st.tuples(st.integers(0, 7), st.just(1000)), st.tuples(st.just(1), st.integers(1, 999)))
        )
        job = TraceJob(
            job_id=f"j{draw(st.integers(0, 9))}-{n}",
            account="a",
            user="u",
            gpus=gpus,
            milli=milli,
            start_ms=draw(st.one_of(st.just(T0 + start), st.none())) if n % 7 == 0 else T0 + start,
            end_ms=draw(st.one_of(st.none(), st.integers(start, 15).map(lambda end: T0 + end))),
            model=draw(st.sampled_from(("", "A", "B", "A|B", "C"))),
        )
        if pinned and draw(st.booleans()):
            node = draw(st.sampled_from(("n0", "n1", "n9")))
            indexes = tuple(range(gpus)) if draw(st.booleans()) else ()
            job = job._replace(nodes=(node,), indexes=(indexes,) if indexes else ())
        result.append(job)
    return result


def lasts(job: TraceJob, at_ms: int) -> bool:
    return job.start_ms is not None and job.start_ms <= at_ms and (job.end_ms is None or at_ms < job.end_ms)


def naive_first_fit(given_jobs: Sequence[TraceJob], fleet: Fleet) -> dict[str, list[str]]:
    """The rule in the docstring, by looking at every GPU for every job."""
    order = [(node, f"{node.name}/{i}") for node in fleet.nodes for i in range(node.gpus)]
    where: dict[str, list[str]] = {}
    done: list[TraceJob] = []
    held = [j for j in given_jobs if j.gpus and j.start_ms is not None and j.end_ms != j.start_ms]
    for job in sorted(held, key=lambda j: (j.start_ms, j.job_id)):
        assert job.start_ms is not None
        load: defaultdict[str, int] = defaultdict(int)
        for other in done:
            if lasts(other, job.start_ms):
                for gpu in where[other.job_id]:
                    load[gpu] += other.milli
        free = [
            (node.name, gpu)
            for node, gpu in order
            if load[gpu] + job.milli <= 1000 and (not job.model or node.model in job.model.split("|"))
        ]
        by_node: dict[str, list[str]] = {}
        for name, gpu in free:
            by_node.setdefault(name, []).append(gpu)
        chosen = next((gpus[: job.gpus] for gpus in by_node.values() if len(gpus) >= job.gpus), None)
        if chosen is None:
            chosen = [gpu for _, gpu in free][: job.gpus] if len(free) >= job.gpus else []
        where[job.job_id] = chosen
        done.append(job)
    return where


def located(placement: Placement) -> dict[str, list[str]]:
    return {p.job.job_id: [] if p.problem else [claim.gpu for claim in p.claims] for p in placement.held}


@given(sizes=nodes, trace=jobs(pinned=False))
@settings(max_examples=300, deadline=None)
def test_jobs_without_a_node_go_where_the_naive_first_fit_puts_them(
    sizes: list[tuple[int, str]], trace: list[TraceJob]
) -> None:
    fleet = fleet_of(sizes)
    assert located(place(trace, fleet)) == naive_first_fit(trace, fleet)


@given(sizes=nodes, trace=jobs(pinned=True), seed=st.integers(0, 2**32))
@settings(max_examples=300, deadline=None)
def test_every_job_is_told_none_above_capacity_whatever_the_order(
    sizes: list[tuple[int, str]], trace: list[TraceJob], seed: int
) -> None:
    fleet = fleet_of(sizes)
    placement = place(trace, fleet)

    shuffled = list(trace)
    random.Random(seed).shuffle(shuffled)
    assert place(shuffled, fleet) == placement

    told = [p.job for p in placement.held] + placement.without_gpu
    assert sorted(job.job_id for job in told) == sorted(job.job_id for job in trace)
    known = {node.gpu(i) for node in fleet.nodes for i in range(node.gpus)}
    for placed in placement.held:
        assert len(placed.claims) == placed.job.gpus == len({claim.gpu for claim in placed.claims})
        assert all(claim.milli == placed.job.milli for claim in placed.claims)
        assert all((claim.gpu in known) != bool(placed.problem) for claim in placed.claims)

    loads: defaultdict[str, list[Placed]] = defaultdict(list)
    for placed in placement.held:
        for claim in placed.claims:
            loads[claim.gpu].append(placed)
    for gpu, holders in loads.items():
        for at_ms in range(T0, T0 + 20):
            here = [p.job for p in holders if lasts(p.job, at_ms)]
            # Only what the trace itself puts on one GPU may exceed it, and then no guess is added to it.
            if sum(job.milli for job in here) > 1000:
                assert gpu in known
                assert all(job.indexes for job in here)


def test_whole_jobs_prefer_one_node_then_spread_in_order_then_are_reported() -> None:
    fleet = fleet_of([(2, "A"), (4, "A"), (2, "A")])

    def job(name: str, gpus: int) -> TraceJob:
        return TraceJob(name, "a", "u", gpus, 1000, T0, T0 + 10)

    placement = place([job("a", 1), job("b", 4), job("c", 3), job("d", 1)], fleet)
    assert located(placement) == {
        "a": ["n0/0"],
        "b": ["n1/0", "n1/1", "n1/2", "n1/3"],
        "c": ["n0/1", "n2/0", "n2/1"],
        "d": [],
    }
    (unplaced,) = placement.unplaced
    assert [claim.gpu for claim in unplaced.claims] == ["unplaced/d/0"]
    assert unplaced.claims[0].node == "unplaced"
    assert unplaced.problem == "no GPU of the fleet is free for it"


def test_a_gpu_is_free_again_in_the_instant_its_job_ends() -> None:
    fleet = fleet_of([(1, "A")])
    first = TraceJob("z", "a", "u", 1, 1000, T0, T0 + 5)
    then = TraceJob("a", "a", "u", 1, 1000, T0 + 5, T0 + 9)
    early = TraceJob("b", "a", "u", 1, 1000, T0 + 4, T0 + 9)
    assert located(place([then, first], fleet)) == {"z": ["n0/0"], "a": ["n0/0"]}
    assert located(place([early, first], fleet)) == {"z": ["n0/0"], "b": []}


def test_what_the_trace_says_is_kept_and_others_stay_clear_of_it() -> None:
    fleet = fleet_of([(2, "A"), (1, "A")])
    told = TraceJob("told", "a", "u", 1, 1000, T0 + 5, T0 + 9, nodes=("n0",), indexes=((0,),))
    node = TraceJob("node", "a", "u", 1, 1000, T0, T0 + 20, nodes=("n0",))
    free = TraceJob("free", "a", "u", 1, 1000, T0, T0 + 20)
    late = TraceJob("late", "a", "u", 1, 1000, T0 + 9, T0 + 20)
    twice = TraceJob("twice", "a", "u", 1, 1000, T0 + 6, T0 + 7, nodes=("n0",), indexes=((0,),))
    wrong = TraceJob("wrong", "a", "u", 1, 1000, T0 + 6, T0 + 7, nodes=("n0",), indexes=((7,),))
    placement = place([free, node, told, late, twice, wrong], fleet)
    assert located(placement) == {
        "told": ["n0/0"],
        "node": ["n0/1"],
        "free": ["n1/0"],
        "late": ["n0/0"],
        "twice": ["n0/0"],
        "wrong": [],
    }
    assert placement.oversubscribed == ["twice"]
    assert [p.problem for p in placement.unplaced] == ["node n0 has no GPU 7"]
