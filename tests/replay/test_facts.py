"""From placed jobs to events: whole facts, deterministic, valid under the contract, windowed as documented."""

from collections import Counter
from collections.abc import Iterable

import pytest

from gpuledger.agents.messages import event_message
from gpuledger.agents.replay.exceptions import TraceError
from gpuledger.agents.replay.facts import JobReplay, Scope, Window
from gpuledger.agents.replay.place import place
from gpuledger.agents.replay.replayer import Totals
from gpuledger.agents.replay.trace import Fleet, Node, TraceJob
from gpuledger.schemas.events import AccountRule, Allocation, Event, Inventory, Job, Tenant, decode_event

T0 = 1_600_000_000_000
HOUR_MS = 3_600_000
FLEET = Fleet((Node("n0", 2, "H100", "p", "no1"),))
TRACE = [
    TraceJob("half", "ana", "u1", 1, 500, T0, T0 + 1001),
    TraceJob("pair", "bob", "u2", 2, 1000, T0 + 2000, T0 + 5000, submitted_ms=T0 - 7, state="COMPLETED"),
    TraceJob("runs", "bob", "u2", 1, 1000, T0 + 6000, None),
    TraceJob("big", "", "u3", 3, 1000, T0 + 9000, T0 + 9010),
    TraceJob("never", "ana", "u1", 1, 1000, None, T0 + 4000, state="CANCELLED"),
    TraceJob("cpu", "ana", "u1", 0, 1000, T0, T0 + 5),
]


def told(scope: Scope, trace: Iterable[TraceJob] = TRACE) -> list[Event]:
    replay = JobReplay(place(trace, FLEET), FLEET, scope)
    events = list(replay.events())
    assert len(events) == replay.expected
    # As a worker reads them: bounds and lengths are checked only there.
    return [decode_event(event_message(event).value) for event in events]


def kinds(events: Iterable[Event]) -> Counter[str]:
    return Counter(event.kind for event in events)


def totals(events: Iterable[Event]) -> Totals:
    result = Totals()
    for event in events:
        result.add(event)
    return result


def latest(events: Iterable[Event]) -> dict[str, Allocation]:
    """What the ledger keeps: the greatest revision of each id."""
    facts: dict[str, Allocation] = {}
    for event in events:
        if isinstance(event, Allocation) and (event.id not in facts or facts[event.id].revision < event.revision):
            facts[event.id] = event
    return facts


def test_a_trace_becomes_tenants_inventory_jobs_and_allocations() -> None:
    events = told(Scope("t", "slurm"))
    assert kinds(events) == {"tenant": 2, "inventory": 1, "job": 6, "allocation": 7}
    tenant = next(event for event in events if isinstance(event, Tenant))
    assert (tenant.id, tenant.rules) == ("ana", [AccountRule(match="account", value="ana", source="slurm")])
    inventory = next(event for event in events if isinstance(event, Inventory))
    placements = [(p.id, p.gpu, p.node, p.pool, p.site, p.model, p.index, p.end_ms) for p in inventory.placements]
    assert placements == [
        ("t/n0/0", "n0/0", "n0", "p", "no1", "H100", 0, None),
        ("t/n0/1", "n0/1", "n0", "p", "no1", "H100", 1, None),
    ]
    assert {p.start_ms for p in inventory.placements} == {T0 - T0 % HOUR_MS}
    facts = latest(events)
    half = facts["t/half/0"]
    assert (half.gpu, half.weight_num, half.weight_den, half.start_ms, half.end_ms) == (
        "n0/0",
        500,
        1000,
        T0,
        T0 + 1001,
    )
    assert (half.account, half.user, half.job_id, half.node) == ("ana", "u1", "half", "n0")
    assert [facts[f"t/pair/{n}"].gpu for n in (0, 1)] == ["n0/0", "n0/1"]
    assert facts["t/runs/0"].end_ms is None
    assert [facts[f"t/big/{n}"].gpu for n in range(3)] == [f"unplaced/big/{n}" for n in range(3)]
    pair = next(event for event in events if isinstance(event, Job) and event.id == "pair")
    assert (pair.submitted_ms, pair.started_ms, pair.ended_ms) == (T0 - 7, T0 + 2000, T0 + 5000)
    assert (pair.state, pair.gpus, pair.cluster, pair.account) == ("COMPLETED", 2, "t", "bob")


def test_totals_are_exact_and_say_what_is_open_or_unplaced() -> None:
    result = totals(told(Scope("t")))
    assert result.held_gpu_us == {"ana": 500_500, "bob": 6_000_000, "unattributed": 30_000}
    assert result.unplaced_gpu_us == {"big": 30_000}
    assert (result.open_ended, len(result.job_ids), result.gpus) == (1, 6, 2)


def test_the_same_trace_makes_the_same_events_in_any_order_of_rows() -> None:
    assert told(Scope("t")) == told(Scope("t"), reversed(TRACE))


def test_as_it_happened_ends_in_the_same_facts() -> None:
    whole, happened = told(Scope("t")), told(Scope("t", as_it_happened=True))
    assert latest(happened) == latest(whole)
    assert totals(happened).held_gpu_us == totals(whole).held_gpu_us
    assert totals(happened).open_ended == 1
    moments = [e.claimed_at_ms for e in happened if isinstance(e, Allocation)]
    assert moments == sorted(moments)


def test_a_window_sends_whole_facts_of_what_overlaps_it() -> None:
    window = Window(T0 + 1000, T0 + 2001)
    events = told(Scope("t", window=window))
    assert latest(events) == {k: v for k, v in latest(told(Scope("t"))).items() if v.job_id in ("half", "pair")}
    assert kinds(events) == {"tenant": 2, "inventory": 1, "job": 2, "allocation": 3}
    # Half open at both ends.
    assert not any(e.kind == "allocation" for e in told(Scope("t", window=Window(T0 + 1001, T0 + 2000))))


def test_a_clipping_window_cuts_facts_and_gives_them_ids_of_their_own() -> None:
    window = Window(T0 + 1000, T0 + 2001, clip=True)
    events = told(Scope("t", window=window))
    facts = latest(events)
    prefix = f"t@{T0 + 1000}-{T0 + 2001}"
    assert {key: (a.start_ms - T0, (a.end_ms or 0) - T0) for key, a in facts.items()} == {
        f"{prefix}/half/0": (1000, 1001),
        f"{prefix}/pair/0": (2000, 2001),
        f"{prefix}/pair/1": (2000, 2001),
    }
    (inventory,) = (event for event in events if isinstance(event, Inventory))
    assert {(p.start_ms, p.end_ms) for p in inventory.placements} == {(T0 + 1000, T0 + 2001)}


def test_a_window_or_trace_without_a_run_is_an_error() -> None:
    with pytest.raises(TraceError, match="no part of the trace lies between --from and --to"):
        told(Scope("t", window=Window(to_ms=T0 - HOUR_MS)))
    with pytest.raises(TraceError, match="no job ever ran"):
        told(Scope("t"), [TRACE[4]])
