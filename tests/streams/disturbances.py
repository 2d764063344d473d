"""Everything that goes wrong in a fleet, one function each: it changes a plan and takes its choices from it.

Each says in a few words what happened, so that a world that breaks a law reads as a story.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.streams.fleet import ACTIVITIES, DAY_MS, WATTS, Instance, Plan, Run

__all__ = ["DISTURBANCES", "POOLS", "add_run", "allocate"]

Fact = dict[str, Any]

POOLS = ("a", "b")
TENANTS = ("X", "Y", "Z")
MINUTE_MS = 60_000
#: Ways to cut a GPU of seven slices.
PROFILES = ((1, 1, 1, 1, 1, 1, 1), (3, 3), (1, 2, 3), (2, 2, 1), (4, 2), (7,), ())


def add_run(plan: Plan, node: str, start: int, stop: int, boot_id: str = "boot", **more: Any) -> Run:
    """An agent starts on a node."""
    chance, tick = plan.chance, plan.tick_ms
    run = Run(
        node=node,
        run_id=f"{node}-{len(plan.runs)}",
        boot_id=boot_id,
        boot_start_ms=more.pop("boot_start_ms", plan.before_ms - DAY_MS),
        start_ms=start,
        stop_ms=stop,
        period_ms=tick * chance.one_of([5, 2, 1]),
        flush_ms=tick * chance.one_of([30, 10, 70]),
        **more,
    )
    plan.runs.append(run)
    return run


def allocate(plan: Plan, gpu: str, start: int, stop: int, **given: Any) -> Fact:
    """A job takes a part of a GPU over [start, stop); by default all of it. Whether its end is told is chosen."""
    chance = plan.chance
    id_ = plan.number("al", "allocations")
    owner: Fact = chance.one_of(
        [
            {"tenant": "X"},
            {"tenant": "Y"},
            {"account": "acc"},
            {"account": "acc", "namespace": "ns"},
            {"user": "ann"},
            {"namespace": "ns"},
            {"account": "nobody"},
        ]
    )
    fact: Fact = {
        "id": id_,
        "revision": 1,
        "node": plan.node_of(gpu, start) if gpu in plan.serves else "n9",
        "boot_id": chance.one_of(["boot", ""]),
        "gpu": gpu,
        "instance": 0,
        "epoch_ms": 0,
        "job_id": f"j{id_[2:]}",
        "source": "slurm",
        "account": "",
        "user": "",
        "namespace": "",
        "tenant": "",
        "weight_num": 1,
        "weight_den": 1,
        "start_ms": start,
        "end_ms": None,
        "void": False,
    }
    fact |= owner | given
    plan.truth[id_] = (start, stop)
    plan.facts["allocations"].append(fact)
    if chance.happens(60):
        plan.facts["allocations"].append({**fact, "revision": 2, "end_ms": stop})
    return fact


def _gpu(plan: Plan) -> str:
    return plan.chance.one_of(plan.gpus)


def _run(plan: Plan) -> Run | None:
    return plan.chance.one_of(plan.runs) if plan.runs else None


def _last(plan: Plan, table: str, id_: str) -> Fact:
    """The greatest revision of a fact."""
    return max((fact for fact in plan.facts[table] if fact["id"] == id_), key=lambda fact: fact["revision"])


def _revise(plan: Plan, table: str, id_: str, **changes: Any) -> Fact:
    last = _last(plan, table, id_)
    fact = {**last, **changes, "revision": last["revision"] + 1}
    if fact.get("end_ms") is not None and fact["end_ms"] < fact["start_ms"]:
        fact["end_ms"] = fact["start_ms"]
    plan.facts[table].append(fact)
    return fact


def _placement(plan: Plan, gpu: str, **fields: Any) -> Fact:
    fact: Fact = {
        "id": plan.number(f"p-{gpu}-", "placements"),
        "revision": 1,
        "gpu": gpu,
        "end_ms": None,
        "void": False,
    }
    plan.facts["placements"].append(fact | fields)
    return fact | fields


def _ids(plan: Plan, table: str) -> list[str]:
    return sorted({fact["id"] for fact in plan.facts[table]})


# ------------------------------------------------------------------------------------------------- places


def gpu_moves(plan: Plan) -> str:
    """A GPU is taken out of a node and put into another one, of any pool."""
    gpu, t = _gpu(plan), plan.moment()
    old = plan.node_of(gpu, t)
    new = plan.chance.one_of([node for node in (*plan.nodes, "n8") if node != old])
    placed = next(f for f in plan.facts["placements"] if f["gpu"] == gpu)
    if plan.chance.happens(60):
        _revise(plan, "placements", placed["id"], end_ms=t)
    pool = plan.chance.one_of(POOLS)
    _placement(plan, gpu, node=new, pool=pool, claimed_at_ms=t, start_ms=t)
    plan.serves[gpu] = [(n, start, min(stop, t)) for n, start, stop in plan.serves[gpu]]
    plan.serves[gpu].append((new, t, 1 << 60))
    if not plan.runs_of(new):
        add_run(plan, new, t, plan.after_ms)
    return f"{gpu} moved from {old} to {new} in pool {pool}"


def pool_changes(plan: Plan) -> str:
    """A GPU changes its pool, from now on or as if it had always been there."""
    gpu, t = _gpu(plan), plan.moment()
    placed = next(f for f in plan.facts["placements"] if f["gpu"] == gpu)
    pool = plan.chance.one_of(POOLS[::-1])
    if plan.chance.happens(40):
        _revise(plan, "placements", placed["id"], pool=pool)
        return f"{gpu} has been in pool {pool} all along"
    _placement(plan, gpu, node=placed["node"], pool=pool, claimed_at_ms=t, start_ms=t)
    return f"{gpu} is in pool {pool} from now on"


def two_claim(plan: Plan) -> str:
    """The agents of two nodes claim one GPU and both report it."""
    gpu = _gpu(plan)
    start, end = plan.while_()
    node = plan.chance.one_of(["n7", *plan.nodes])
    claimed = plan.chance.one_of([start, plan.before_ms])
    pool = plan.chance.one_of(POOLS)
    end_ms = plan.chance.one_of([end, None])
    _placement(plan, gpu, node=node, pool=pool, claimed_at_ms=claimed, start_ms=start, end_ms=end_ms)
    plan.serves[gpu].insert(0, (node, start, end))
    add_run(plan, node, start, end, liar=plan.chance.happens(50))
    return f"{node} claims {gpu} in pool {pool} too"


def placement_ends(plan: Plan) -> str:
    """A GPU leaves service, or a placement never was."""
    id_ = plan.chance.one_of(_ids(plan, "placements"))
    if plan.chance.happens(25):
        _revise(plan, "placements", id_, void=True)
        return f"placement {id_} never was"
    _revise(plan, "placements", id_, end_ms=plan.moment())
    return f"placement {id_} ends"


def node_renamed(plan: Plan) -> str:
    """A node gets another name; its GPUs stay where they are."""
    old, t = plan.chance.one_of(plan.nodes), plan.moment()
    new = f"{old}x"
    for gpu in [gpu for gpu in plan.gpus if plan.node_of(gpu, t) == old]:
        placed = next(f for f in plan.facts["placements"] if f["gpu"] == gpu)
        if plan.chance.happens(70):
            _revise(plan, "placements", placed["id"], end_ms=t)
        _placement(plan, gpu, node=new, pool=placed["pool"], claimed_at_ms=t, start_ms=t)
        plan.serves[gpu] = [(n, start, min(stop, t)) for n, start, stop in plan.serves[gpu]] + [(new, t, 1 << 60)]
    for run in plan.runs_of(old):
        run.stop_ms = min(run.stop_ms, t)
    add_run(plan, new, t, plan.after_ms)
    return f"{old} is called {new}"


# ------------------------------------------------------------------------------------------------- holders


def corrected(plan: Plan) -> str:
    """An allocation is corrected: its times, its tenant, or that it never was."""
    ids = _ids(plan, "allocations")
    if not ids:
        return no_change(plan)
    id_ = plan.chance.one_of(ids)
    start = plan.moment()
    change: Fact = plan.chance.one_of(
        [
            {"end_ms": plan.moment()},
            {"start_ms": start, "end_ms": max(start, plan.moment())},
            {"start_ms": start, "end_ms": None},
            {"tenant": "Z"},
            {"void": True},
        ]
    )
    _revise(plan, "allocations", id_, **change)
    return f"allocation {id_} corrected"


def unknown_gpu(plan: Plan) -> str:
    """A scheduler names a GPU that no node has."""
    allocate(plan, "unknown", *plan.while_())
    return "an allocation on an unknown GPU"


def too_much(plan: Plan) -> str:
    """A GPU that is held already is given away once more."""
    gpu = _gpu(plan)
    for _ in range(plan.chance.integer(1, 2)):
        num, den = plan.chance.one_of([(1, 1), (1, 2), (2, 3), (333, 1000)])
        allocate(plan, gpu, *plan.while_(), weight_num=num, weight_den=den)
    return f"{gpu} promised more than once"


def thirds(plan: Plan) -> str:
    """Time-sliced or MPS shares of one GPU."""
    gpu, den = _gpu(plan), plan.chance.one_of([3, 7, 2, 4])
    for _ in range(den - plan.chance.integer(0, 1)):
        start, stop = plan.while_(plan.from_ms - 60_000)
        allocate(plan, gpu, start, stop, weight_den=den, job_id=f"t{plan.chance.integer(0, 9)}")
    return f"{gpu} shared by {den}"


def two_sources(plan: Plan) -> str:
    """Another source tells of the same job on the same GPU, with times of its own."""
    ids = _ids(plan, "allocations")
    if not ids:
        return no_change(plan)
    known = _last(plan, "allocations", plan.chance.one_of(ids))
    source = plan.chance.one_of(["process", "kubernetes", "manual"])
    names = {name: known[name] for name in ("account", "user", "namespace", "tenant", "instance", "epoch_ms")}
    allocate(plan, known["gpu"], *plan.while_(), job_id=known["job_id"], source=source, **names)
    return f"{source} tells of {known['job_id']} too"


def no_epilog(plan: Plan) -> str:
    """A job ended and its allocations were never told; its scheduler knows."""
    gpu = _gpu(plan)
    start, stop = plan.while_()
    fact = allocate(plan, gpu, start, stop)
    plan.facts["allocations"] = [f for f in plan.facts["allocations"] if f["id"] != fact["id"] or f["revision"] == 1]
    job: Fact = {"id": fact["job_id"], "revision": 1, "source": "slurm", "ended_ms": None}
    plan.facts["jobs"].append(job)
    ended = plan.chance.one_of([stop, start, start - 600_000, plan.to_ms + 600_000])
    plan.facts["jobs"].append({**job, "revision": 2, "ended_ms": ended})
    if plan.chance.happens(30):
        plan.facts["jobs"].append({**job, "revision": 3, "ended_ms": plan.chance.one_of([None, plan.moment()])})
    return f"{fact['job_id']} ended without an epilog"


def reboot(plan: Plan) -> str:
    """A node crashes and comes back; nobody says what ended."""
    node, t = plan.chance.one_of(plan.nodes), plan.moment()
    for run in plan.runs_of(node):
        run.stop_ms = min(run.stop_ms, t)
    for gpu in plan.gpus:
        for id_, (start, stop) in plan.truth.items():
            fact = _last(plan, "allocations", id_)
            if fact["gpu"] == gpu and fact["node"] == node and start < t < stop:
                plan.truth[id_] = (start, t)
    back = t + plan.tick_ms * plan.chance.integer(0, 40)
    boot = f"boot{len(plan.runs)}"
    add_run(plan, node, back + 2 * plan.tick_ms, plan.after_ms, boot, boot_start_ms=back)
    if plan.chance.happens(30):
        add_run(plan, node, back + 30 * plan.tick_ms, plan.after_ms, boot, boot_start_ms=back - 5 * plan.tick_ms)
    return f"{node} rebooted"


# ------------------------------------------------------------------------------------------------- MIG


def _cut(plan: Plan, gpu: str, start: int, kept: list[Instance]) -> str:
    """Partitions a GPU at `start`; instances in `kept` are not touched. New ones reuse the smallest free ids."""
    used = {each.instance for each in kept}
    slices = {each.instance: each.slices for each in kept}
    profile = plan.chance.one_of(PROFILES)
    made: list[Instance] = []
    for size in profile:
        number = next(n for n in range(1, 20) if n not in used)
        if sum(slices.values()) + size > 7:
            continue
        used.add(number)
        slices[number] = size
        made.append(Instance(gpu, number, start, start, 1 << 60, _states(plan, start), size))
    plan.instances += made
    live = sorted([*kept, *made], key=lambda each: each.instance)
    plan.facts["geometries"].append(
        {
            "id": plan.number(f"m-{gpu}-", "geometries"),
            "revision": 1,
            "gpu": gpu,
            "node": plan.node_of(gpu, start),
            "start_ms": start,
            "end_ms": None,
            "slices": 7,
            "instances": [
                {"instance": e.instance, "epoch_ms": e.epoch_ms, "slices": slices[e.instance], "profile": "m"}
                for e in live
            ],
            "void": False,
        }
    )
    for each in live:
        if plan.chance.happens(70):
            begin = plan.moment(start)
            allocate(
                plan,
                gpu,
                begin,
                plan.moment(begin, max(begin, plan.to_ms)),
                instance=each.instance,
                epoch_ms=plan.chance.one_of([each.epoch_ms, each.epoch_ms, 0]),
                weight_num=slices[each.instance],
                weight_den=7,
            )
    return "+".join(str(slices[n]) for n in sorted(slices)) or "nothing"


def _states(plan: Plan, start: int) -> list[tuple[int, str]]:
    states = [(start, plan.chance.one_of(["active", "idle", "unobserved"]))]
    for _ in range(plan.chance.integer(0, 2)):
        states.append((plan.moment(), plan.chance.one_of(ACTIVITIES)))
    return sorted(states)


def mig(plan: Plan) -> str:
    """A GPU is cut into instances, and perhaps cut anew while they run: ids come again, some instances stay."""
    gpu = _gpu(plan)
    start = plan.chance.one_of([plan.before_ms, plan.moment()])
    for each in plan.instances:
        if each.gpu == gpu and each.instance == 0 and plan.chance.happens(50):
            each.states = [(plan.before_ms, "unobserved")]  # no utilisation of a GPU in MIG mode
    said = [_cut(plan, gpu, start, [])]
    for _ in range(plan.chance.integer(0, 2)):
        at = plan.moment(max(start, plan.from_ms) + plan.tick_ms)
        live = [e for e in plan.instances if e.gpu == gpu and e.instance and e.start_ms < at < e.stop_ms]
        kept = [each for each in live if each.instance < 3 and plan.chance.happens(40)]
        for each in live:
            each.stop_ms = each.stop_ms if each in kept else at
        if plan.chance.happens(70):
            _revise(plan, "geometries", plan.facts["geometries"][-1]["id"], end_ms=at)
        said.append(_cut(plan, gpu, at, kept))
        start = at
    if plan.chance.happens(15):
        id_ = plan.chance.one_of(_ids(plan, "geometries"))
        _revise(plan, "geometries", id_, **plan.chance.one_of([{"void": True}, {"end_ms": plan.moment()}]))
    return f"{gpu} cut into {' then '.join(said)} of 7"


# ------------------------------------------------------------------------------------------------- capacity


def commitments(plan: Plan) -> str:
    """Capacity is promised: some of it, all of it, more than there is; told in time or afterwards."""
    pool, tenant = plan.chance.one_of(POOLS), plan.chance.one_of(TENANTS)
    start, end = plan.while_(plan.from_ms - 60_000)
    fact: Fact = {
        "id": plan.number("c", "commitments"),
        "revision": 1,
        "pool": pool,
        "tenant": tenant,
        "gpus": plan.chance.one_of([1, 2, 3, 50]),
        "start_ms": start,
        "end_ms": plan.chance.one_of([None, end]),
        "state": plan.chance.one_of(["active", "active", "ended", "proposed", "cancelled"]),
    }
    plan.facts["commitments"].append(fact)
    if plan.chance.happens(40):
        change: Fact = plan.chance.one_of([{"start_ms": plan.before_ms}, {"end_ms": plan.moment()}, {"gpus": 4}])
        change |= {"pool": plan.chance.one_of(POOLS)} if plan.chance.happens(30) else {}
        _revise(plan, "commitments", fact["id"], **change)
    return f"{fact['gpus']} GPUs of {pool} promised to {tenant}"


def transfer(plan: Plan) -> str:
    """Capacity is moved from one tenant to another inside a minute."""
    start, end = plan.while_()
    giver = plan.chance.one_of(TENANTS)
    taker = plan.chance.one_of([tenant for tenant in TENANTS if tenant != giver])
    fact: Fact = {
        "id": plan.number("x", "transfers"),
        "revision": 1,
        "pool": plan.chance.one_of(POOLS),
        "gpus": plan.chance.one_of([1, 2]),
        "from_tenant": giver,
        "to_tenant": taker,
        "start_ms": start,
        "end_ms": plan.chance.one_of([None, end]),
        "state": plan.chance.one_of(["active", "active", "planned"]),
    }
    plan.facts["transfers"].append(fact)
    if plan.chance.happens(30):
        _revise(plan, "transfers", fact["id"], state=plan.chance.one_of(["active", "cancelled"]))
    return f"{fact['gpus']} GPUs of {fact['pool']} from {giver} to {taker}"


def accounts(plan: Plan) -> str:
    """The account map changes, from an instant on or from the beginning."""
    tenant = plan.chance.one_of(TENANTS)
    at = plan.chance.one_of([plan.moment(), plan.from_ms + 60_000])
    match, value = plan.chance.one_of([("account", "acc"), ("user", "ann"), ("namespace", "ns")])
    rule: Fact = {
        "match": match,
        "value": value,
        "source": plan.chance.one_of([None, "slurm", "process"]),
        "start_ms": plan.chance.one_of([at, None]),
        "end_ms": plan.chance.one_of([None, at + 45 * plan.tick_ms]),
    }
    old = [fact for fact in plan.facts["tenants"] if fact["id"] == tenant]
    plan.facts["tenants"].append({"id": tenant, "revision": len(old) + 1, "rules": [rule]})
    return f"{match} {value} belongs to {tenant}"


# ------------------------------------------------------------------------------------------------- telemetry


def no_change(plan: Plan) -> str:
    """What a disturbance does where there is nothing to disturb."""
    return "nothing"


def runs_overlap(plan: Plan) -> str:
    """A second agent runs on a node beside the first, and sees other things if it lies."""
    node = plan.chance.one_of(plan.nodes)
    start, stop = plan.while_()
    add_run(plan, node, start, stop, liar=plan.chance.happens(50))
    return f"two agents on {node}"


def clock_steps(plan: Plan) -> str:
    """A node's clock is set ten minutes forth or back; its agent goes on as another run."""
    node = plan.chance.one_of(plan.nodes)
    step = plan.chance.one_of([-600_000, 600_000])
    start, stop = plan.while_()
    # What it writes lies in the window, so it happens ten minutes away from it.
    add_run(plan, node, start - step, stop - step, skew_ms=step)
    return f"the clock of {node} steps by {step // 60_000} minutes"


def clock_skewed(plan: Plan) -> str:
    """The clock of a run is wrong all the time; far ahead of the broker's it is quarantined."""
    run = _run(plan)
    if run is None:
        return no_change(plan)
    run.skew_ms = plan.tick_ms * plan.chance.one_of([-90, -7, 13, 100, 125, 300])
    return f"the clock of {run.run_id} is off by {run.skew_ms} ms"


def in_2036(plan: Plan) -> str:
    """A node whose clock is ten years ahead: all of it is quarantined."""
    run = _run(plan)
    if run is None:
        return no_change(plan)
    run.skew_ms = 3_652 * DAY_MS
    return f"{run.run_id} runs ten years ahead"


def lost(plan: Plan) -> str:
    """Batches are lost on the way."""
    run = _run(plan)
    if run is None:
        return no_change(plan)
    run.lost |= {plan.chance.integer(0, 9) for _ in range(plan.chance.integer(1, 4))}
    return f"{run.run_id} lost batches {sorted(run.lost)}"


def late(plan: Plan) -> str:
    """Batches come after everything else, when their minutes have long been complete."""
    run = _run(plan)
    if run is None:
        return no_change(plan)
    run.late |= {plan.chance.integer(0, 9) for _ in range(plan.chance.integer(1, 5))}
    return f"{run.run_id} late batches {sorted(run.late)}"


def silence(plan: Plan) -> str:
    """An agent takes no samples for a while, shorter or longer than three periods."""
    run = _run(plan)
    if run is None:
        return no_change(plan)
    start = plan.moment()
    run.silent.append((start, start + run.period_ms * plan.chance.one_of([2, 5, 40])))
    return f"{run.run_id} silent for a while"


def run_stops(plan: Plan) -> str:
    """An agent stops, and another may start somewhat later."""
    run = _run(plan)
    if run is None:
        return no_change(plan)
    t = plan.moment(run.start_ms)
    again = plan.chance.happens(60)
    if again:
        start = t + plan.tick_ms * plan.chance.integer(0, 30)
        add_run(plan, run.node, start, plan.after_ms, run.boot_id, boot_start_ms=run.boot_start_ms)
    run.stop_ms = min(run.stop_ms, t)
    return f"the agent of {run.node} {'restarts' if again else 'stops'}"


def busy(plan: Plan) -> str:
    """A GPU changes what it does, and its power."""
    gpu = _gpu(plan)
    for each in plan.instances:
        if each.gpu == gpu and each.instance == 0:
            for _ in range(plan.chance.integer(1, 4)):
                each.states = sorted([*each.states, (plan.moment(), plan.chance.one_of(ACTIVITIES))])
    plan.powers[gpu] = sorted([*plan.powers[gpu], (plan.moment(), plan.chance.one_of(WATTS))])
    return f"{gpu} is now busy, now idle"


def counter_trouble(plan: Plan) -> str:
    """The energy counter of a GPU starts again at nothing, or cannot be read for a while."""
    gpu = _gpu(plan)
    if plan.chance.happens(50):
        plan.resets.setdefault(gpu, []).append(plan.moment())
        return f"the counter of {gpu} starts again"
    plan.blind.setdefault(gpu, []).append(plan.while_())
    return f"the counter of {gpu} cannot be read for a while"


#: In the order in which hypothesis prefers them when it shrinks.
DISTURBANCES: tuple[Callable[[Plan], str], ...] = (
    no_change,
    busy,
    lost,
    late,
    thirds,
    mig,
    reboot,
    no_epilog,
    commitments,
    transfer,
    accounts,
    corrected,
    runs_overlap,
    two_claim,
    gpu_moves,
    pool_changes,
    node_renamed,
    placement_ends,
    two_sources,
    too_much,
    unknown_gpu,
    clock_steps,
    clock_skewed,
    in_2036,
    silence,
    run_stops,
    counter_trouble,
)
