"""`explain` against the real engine: what a minute of a GPU rests on, before and after every kind of correction.

The explanation says in words what the ledger decides in arrays; each test compares it with the rows that are stored.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction

import msgspec
import pyarrow as pa
import pytest
from click.testing import CliRunner, Result

from gpuledger.cli.explain_text import as_json, as_text
from gpuledger.cli.main import cli
from gpuledger.cli.moments import iso
from gpuledger.schemas.events import AccountRule, Commitment, Geometry, Instance, Job, Tenant
from gpuledger.streams.explain import UnknownGPU, explain
from gpuledger.streams.explanation import Explanation, Mark, PoolMinute, Segment
from gpuledger.streams.recomputer import LedgerRules
from tests.fixtures.clickhouse import ClickHouse as Server
from tests.streams.corrections import NOW_MS, Subject, revised
from tests.streams.small_ledger import (
    B200,
    END_MS,
    H100,
    RULES,
    START_MS,
    SmallLedger,
    allocation,
    built_ledger,
    minute,
)

pytestmark = pytest.mark.services

MINUTE_US = 60_000_000
DAY_MS = 86_400_000
HELD = ("held", "unconfirmed")


@pytest.fixture(scope="module")
def ledger(clickhouse: Server) -> Iterator[SmallLedger]:
    """One for the module: each test explains, and corrects, a GPU of its own."""
    with built_ledger(clickhouse.url) as made:
        yield made


def explained(ledger: SmallLedger, gpu: str, n: int, rules: LedgerRules = RULES, now_ms: int = NOW_MS) -> Explanation:
    return explain(ledger.store, rules, gpu, minute(n), now_ms=now_ms)


def only(found: Explanation) -> PoolMinute:
    """The one pool, whose segments must sum, be those that are stored, and be traced to facts."""
    (pool,) = found.pools
    assert pool.segments_us == pool.service_us
    assert pool.agrees is not False
    assert all(each.facts for each in pool.segments if each.kind in HELD)
    return pool


def amounts(segments: list[Segment]) -> dict[tuple[str, str, str], int]:
    return {(each.kind, each.tenant, each.activity): each.gpu_us for each in segments}


# -- what it rests on -----------------------------------------------------------------------------------------------


def test_segments_are_the_stored_rows_with_the_facts_and_fragments_they_come_from(ledger: SmallLedger) -> None:
    found = explained(ledger, "g1", 12)
    pool = only(found)
    rows = ledger.store.rows(
        "SELECT kind, tenant, job_id, instance, activity, gpu_us, energy_mj FROM v_gpu_minute "
        "WHERE gpu = 'g1' AND minute = fromUnixTimestamp64Milli({at:Int64}, 'UTC') ORDER BY ALL",
        {"at": minute(12)},
    )
    mine = [(s.kind, s.tenant, s.job_id, s.instance, s.activity, s.gpu_us, s.energy_mj) for s in pool.segments]
    assert sorted(mine) == rows and len(rows) == 6
    assert (pool.pool, pool.stored, pool.agrees, pool.service_us) == (H100, True, True, MINUTE_US)
    by_key = {(each.tenant, each.activity): each for each in pool.segments}
    # Active in its first half minute (batch 4), idle in its second (batch 5).
    assert by_key["acme", "active"].facts == ["a1"] and by_key["acme", "active"].fragments == [("run-g1", 4)]
    assert by_key["nord", "idle"].facts == ["a2"] and by_key["nord", "idle"].fragments == [("run-g1", 5)]
    assert by_key["", "active"].facts == [] and by_key["", "active"].fragments == [("run-g1", 4)]
    assert [(claim.id, claim.weight, claim.ended_by) for claim in found.claims] == [
        ("a1", "1/3", "its source"),
        ("a2", "1/3", "its source"),
    ]
    assert found.claims[1].counts == [(minute(12) + 1234, minute(13))]
    assert {(each.kind, each.id) for each in found.facts} >= {
        *(("allocation", "a1"), ("allocation", "a2"), ("commitment", "c0"), ("placement", "p-g1")),
        *(("asset_cost", "cost-h100"), ("energy_tariff", "power"), ("rate_card", "card")),
    }
    assert found.notes == []


def test_every_minute_of_every_gpu_is_explained(ledger: SmallLedger) -> None:
    """Also those that change hands, join, leave, and were seen in part: a sample that holds all of these."""
    for gpu, minutes in {
        "g0": (4, 5, 10, 74, 75, 76),
        "g1": (0, 9, 10, 12, 19, 20, 130, 170),
        "g2": (8, 10, 40, 41),
        "g3": (12,),
        "g4": (15, 16),
        "b1": (29, 30, 90),
    }.items():
        for n in minutes:
            found = explained(ledger, gpu, n)
            pool = only(found)
            held = sum(each.gpu_us for each in pool.segments if each.kind in HELD)
            # Claims with weights below one: what they hold is their time, in the GPU's time in service.
            holds = [(claim, part) for claim in found.claims for part in claim.counts]
            shares = [(end - start) * 1000 * Fraction(claim.weight) for claim, (start, end) in holds]
            assert abs(held - sum(shares)) <= len(shares), (gpu, n)
            seen_ms = sum(
                end - start for each in found.fragments for part in each.parts for start, end in part.believed
            )
            known = sum(each.gpu_us for each in pool.segments if each.activity in ("active", "idle"))
            # Each holder's part is rounded to the microsecond.
            assert abs(known - seen_ms * 1000) <= 2, (gpu, n)


def test_a_gpu_that_changes_its_pool_has_both(ledger: SmallLedger) -> None:
    found = explained(ledger, "b0", 70)
    assert [(pool.pool, pool.service_us, pool.segments_us) for pool in found.pools] == [
        (B200, MINUTE_US // 2, MINUTE_US // 2),
        (H100, MINUTE_US // 2, MINUTE_US // 2),
    ]
    assert {each.id: each.serves for each in found.placements} == {
        "p-b0": [(minute(70), minute(70) + 30_000)],
        "q-b0": [(minute(70) + 30_000, minute(71))],
    }


def test_money_is_the_intervals_and_the_minutes_are_shares_of_it(ledger: SmallLedger) -> None:
    """g0 alone runs job-a0: its shares over the interval's minutes sum to the booked row."""
    rows = [each for n in range(0, 15) for pool in [explained(ledger, "g0", n).pools[0]] for each in pool.money]
    mine = [each for each in rows if each.job_id == "job-a0" and each.activity == "active"]
    booked = mine[0]
    assert (booked.interval_start_ms, booked.interval_end_ms) == (minute(0), minute(15))
    assert booked.row_us == sum(each.share_us for each in mine)
    assert booked.row_charge is not None and booked.row_asset_cost is not None
    for name, whole in (("share_charge", booked.row_charge), ("share_asset_cost", booked.row_asset_cost)):
        parts = [getattr(each, name) for each in mine]
        assert abs(sum(parts) - whole) <= Decimal("0.000000001") * len(parts)
    assert {each.rate_card for each in mine} == {"card"}
    # What nobody holds is divided over the pool's rows, exactly.
    free = explained(ledger, "g3", 12).pools[0]
    assert {each.kind for each in free.money} == {"free", "reserved_unused"}
    assert sum(each.share_us for each in free.money) == MINUTE_US


# -- corrections: what superseded what ------------------------------------------------------------------------------


def test_late_telemetry_says_which_run_is_believed(ledger: SmallLedger) -> None:
    subject = Subject(ledger)
    subject.facts("allocations", subject.job(5, 40))
    subject.seen(12, seconds=30)
    ledger.compute()
    assert amounts(only(explained(ledger, subject.gpu, 12)).segments) == {
        ("held", "nord", "active"): 30_000_000,
        ("held", "nord", "unobserved"): 30_000_000,
    }
    # A run whose name comes later sees the whole minute: it is believed where the first one saw nothing.
    subject.now_ms = NOW_MS + 1
    subject.seen(12, seconds=60, boot=("late", -100))
    found = explained(ledger, subject.gpu, 12)
    assert found.pools[0].agrees is False
    assert "computed again from what is stored now" in " ".join(found.notes)
    first, second = found.fragments
    assert (first.run_id, second.run_id) == ("run-boot", "run-late")
    assert second.appended_ms == NOW_MS + 1
    half = minute(12) + 30_000
    believed = [span for part in first.parts for span in part.believed]
    assert (believed[0][0], believed[-1][1]) == (half, minute(13))
    assert sum(end - start for start, end in believed) == 30_000
    believed = [span for part in second.parts for span in part.believed]
    assert (believed[0][0], believed[-1][1]) == (minute(12), half)
    assert sum(end - start for start, end in believed) == 30_000
    assert second.parts[-1].instead == f"run-boot/{first.seq}"

    ledger.compute()
    pool = only(explained(ledger, subject.gpu, 12))
    assert amounts(pool.segments) == {("held", "nord", "active"): MINUTE_US}
    assert {run for run, _ in pool.segments[0].fragments} == {"run-boot", "run-late"}


def test_a_corrected_allocation_shows_its_revisions_and_what_the_ledger_had_said(ledger: SmallLedger) -> None:
    subject = Subject(ledger)
    first = subject.job(5, 40)
    subject.facts("allocations", first)
    subject.seen(12, seconds=60)
    ledger.compute()
    subject.now_ms = NOW_MS + 60_000
    second = revised(first, end_ms=minute(12) + 15_000, user="eve")
    subject.facts("allocations", second)
    # An older revision that comes after both never counts.
    subject.now_ms = NOW_MS + 120_000
    subject.facts("allocations", msgspec.structs.replace(first, revision=0))
    ledger.compute()

    found = explained(ledger, subject.gpu, 12)
    pool = only(found)
    assert amounts(pool.segments) == {("held", "nord", "active"): 15_000_000, ("unallocated", "", "active"): 45_000_000}
    (history,) = [each for each in found.facts if each.id == first.id]
    assert [(each.revision, each.state, each.learnt_ms - NOW_MS) for each in history.revisions] == [
        (0, "late", 120_000),
        (1, "superseded", 0),
        (2, "counts", 60_000),
    ]
    assert {(each.field, each.before, each.after) for each in history.current.changes} == {
        ("end_ms", iso(minute(40) + 567), iso(minute(12) + 15_000)),
        ("user", "ann", "eve"),
    }
    assert [each.topic for each in history.revisions] == ["allocations"] * 3
    text = "\n".join(as_text(found, full=False))
    assert f"end_ms: {iso(minute(40) + 567)} → {iso(minute(12) + 15_000)}" in text
    assert "came after a newer one, never counted" in text
    assert [each.counts for each in pool.versions] == [*[False] * (len(pool.versions) - 1), True]


def test_rows_that_no_later_computation_replaced_are_shown(ledger: SmallLedger) -> None:
    """A holder that is gone leaves its row, of a version that counts no longer."""
    subject = Subject(ledger)
    subject.facts("allocations", subject.job(5, 40))
    subject.seen(12, seconds=60)
    ledger.compute()
    subject.facts("allocations", revised(subject.job(5, 40), tenant="acme"))
    ledger.compute()
    found = explained(ledger, subject.gpu, 12)
    *old, newest = only(found).versions
    assert [(row.tenant, row.gpu_us) for row in newest.gpu_rows] == [("acme", MINUTE_US)]
    assert ("nord", MINUTE_US) in {(row.tenant, row.gpu_us) for each in old for row in each.gpu_rows}
    assert f"it said: held nord job-{subject.gpu} active 60,000,000 GPU-us" in "\n".join(as_text(found, full=False))


def test_a_moved_and_a_voided_allocation_are_still_told_of(ledger: SmallLedger) -> None:
    subject, other = Subject(ledger), Subject(ledger)
    subject.facts("allocations", subject.job(5, 40))
    subject.facts("allocations", revised(subject.job(5, 40), gpu=other.gpu))
    ledger.compute()
    found = explained(ledger, subject.gpu, 12)
    assert amounts(only(found).segments) == {("unallocated", "", "unobserved"): MINUTE_US}
    assert found.claims == []
    assert f"said to be here by an earlier revision only: a-{subject.gpu}" in found.notes
    (history,) = [each for each in found.facts if each.kind == "allocation"]
    assert [(c.field, c.before, c.after) for c in history.current.changes] == [("gpu", subject.gpu, other.gpu)]

    subject.facts("allocations", msgspec.structs.replace(subject.job(5, 40), revision=3, void=True))
    ledger.compute()
    found = explained(ledger, subject.gpu, 12)
    assert [(claim.counts, claim.not_counted) for claim in found.claims] == [([], "it is void: it never happened")]


def test_a_retroactive_commitment_is_among_the_facts_and_in_the_pools_rows(ledger: SmallLedger) -> None:
    subject = Subject(ledger)
    before = only(explained(ledger, subject.gpu, 140))
    commitment = Commitment(
        id=f"c-{subject.gpu}",
        revision=1,
        claimed_at_ms=NOW_MS,
        pool=H100,
        tenant="retro",
        gpus=1,
        start_ms=minute(140),
        end_ms=minute(141),
    )
    subject.facts("capacity", commitment)
    ledger.compute()
    found = explained(ledger, subject.gpu, 140)
    pool = only(found)
    assert ("reserved_unused", "retro") not in {(row.kind, row.tenant) for row in before.unheld}
    assert {(row.kind, row.tenant): row.gpu_us for row in pool.unheld}["reserved_unused", "retro"] == MINUTE_US
    (history,) = [each for each in found.facts if each.id == commitment.id]
    assert (history.kind, history.current.topic, history.current.learnt_ms) == ("commitment", "capacity", NOW_MS)
    assert len(pool.versions) >= 2


# -- what ends an open allocation, who pays, which claim counts ------------------------------------------------------


def test_an_open_allocation_says_what_ended_it(ledger: SmallLedger) -> None:
    subject = Subject(ledger)
    subject.facts("allocations", subject.job(20, None, boot_id="b1"))
    subject.seen(24, seconds=30, boot=("b1", -60), running=[f"a-{subject.gpu}"])
    ledger.compute()
    (claim,) = explained(ledger, subject.gpu, 30).claims
    assert (claim.ends_ms, claim.ended_by, claim.named_ms) == (None, "", minute(25))
    assert claim.confirmed_until_ms == minute(35)
    assert amounts(only(explained(ledger, subject.gpu, 34)).segments) == {("held", "nord", "unobserved"): MINUTE_US}
    later = only(explained(ledger, subject.gpu, 35)).segments
    assert amounts(later) == {("unconfirmed", "nord", "unobserved"): MINUTE_US}

    subject.seen(60, seconds=10, boot=("b2", 50))
    ledger.compute()
    (claim,) = explained(ledger, subject.gpu, 50).claims
    assert (claim.ends_ms, claim.ended_by) == (minute(50) + 15_000, f"boot b2 of node {subject.node}")
    assert claim.counts == [(minute(50), minute(50) + 15_000)]

    ended = Job(id=f"job-{subject.gpu}", revision=1, claimed_at_ms=NOW_MS, source="slurm", ended_ms=minute(30) + 5_000)
    subject.facts("jobs", ended)
    ledger.compute()
    found = explained(ledger, subject.gpu, 30)
    (claim,) = found.claims
    assert (claim.end_ms, claim.ends_ms, claim.ended_by) == (None, minute(30) + 5_000, f"job job-{subject.gpu}")
    assert amounts(only(found).segments) == {
        ("held", "nord", "unobserved"): 5_000_000,
        ("unallocated", "", "unobserved"): 55_000_000,
    }
    assert ("job", ended.id) in {(each.kind, each.id) for each in found.facts}
    (claim,) = explained(ledger, subject.gpu, 40).claims
    assert claim.counts == [] and "had ended" in claim.not_counted


def test_the_rule_that_gave_the_tenant_is_named(ledger: SmallLedger) -> None:
    subject = Subject(ledger)
    account = f"acc-{subject.gpu}"
    subject.facts("allocations", subject.job(5, 40, tenant="", account=account))
    rules = [
        AccountRule(match="user", value="ann"),
        AccountRule(match="account", value=account, source="slurm", start_ms=minute(12) + 20_000),
    ]
    subject.facts("rates", Tenant(id="nord", revision=1, claimed_at_ms=NOW_MS, rules=rules[:1]))
    subject.facts("rates", Tenant(id="fjord", revision=1, claimed_at_ms=NOW_MS, rules=rules[1:]))
    ledger.compute()
    found = explained(ledger, subject.gpu, 12)
    border = minute(12) + 20_000
    (claim,) = found.claims
    assert [(part.tenant, part.start_ms, part.end_ms) for part in claim.tenants] == [
        ("nord", minute(12), border),
        ("fjord", border, minute(13)),
    ]
    assert claim.tenants[0].because == "account map: user = ann, source any"
    assert claim.tenants[1].because == f"account map: account = {account}, source slurm from {iso(border)}"
    assert amounts(only(found).segments) == {
        ("held", "nord", "unobserved"): 20_000_000,
        ("held", "fjord", "unobserved"): 40_000_000,
    }
    assert {each.id for each in found.facts if each.kind == "tenant"} == {"nord", "fjord"}
    subject.facts("rates", Tenant(id="nord", revision=2, claimed_at_ms=NOW_MS, rules=[]))
    ledger.compute()
    (claim,) = explained(ledger, subject.gpu, 8).claims
    assert (claim.tenants[0].tenant, "not in force" in claim.tenants[0].because) == ("unattributed", True)


def test_of_two_sources_for_one_job_the_first_counts(ledger: SmallLedger) -> None:
    subject = Subject(ledger)
    subject.facts("allocations", subject.job(5, 40))
    twin = subject.job(0, 60, id=f"proc-{subject.gpu}", source="process")
    subject.facts("allocations", twin)
    ledger.compute()
    found = explained(ledger, subject.gpu, 12)
    by_id = {claim.id: claim for claim in found.claims}
    assert by_id[f"a-{subject.gpu}"].counts == [(minute(12), minute(13))]
    assert by_id[twin.id].counts == [] and "slurm claims the same job" in by_id[twin.id].not_counted
    assert only(found).segments[0].facts == [f"a-{subject.gpu}"]
    # Before the other's start it is all there is.
    assert only(explained(ledger, subject.gpu, 2)).segments[0].facts == [twin.id]


def test_instances_are_told_apart_by_epoch_and_their_geometry_is_named(ledger: SmallLedger) -> None:
    subject = Subject(ledger)
    cut = Geometry(
        id=f"geo-{subject.gpu}",
        revision=1,
        claimed_at_ms=NOW_MS,
        gpu=subject.gpu,
        node=subject.node,
        instances=[Instance(1, minute(1), 3, "3g.40gb"), Instance(2, minute(1), 3, "3g.40gb")],
        start_ms=minute(1),
    )
    subject.inventory(cut)
    weight = {"weight_num": 3, "weight_den": 7, "instance": 1}
    subject.facts("allocations", subject.job(5, 40, epoch_ms=minute(1), **weight))
    ledger.compute()
    found = explained(ledger, subject.gpu, 12)
    pool = only(found)
    assert {(each.kind, each.instance): each.gpu_us for each in pool.segments} == {
        ("held", 1): 25_714_286,
        ("unallocated", 0): 25_714_286,
        ("unsliced", 0): 8_571_428,
    }
    assert (found.claims[0].instance, found.claims[0].epoch_ms) == (1, minute(1))
    assert [each.about for each in found.facts if each.kind == "geometry"] == ["2 instances, 6 of 7 slices"]


# -- conflicts, gaps, and what is not known ---------------------------------------------------------------------------


def test_conflicts_and_gaps_that_touch_the_minute_are_shown(ledger: SmallLedger) -> None:
    subject = Subject(ledger)
    subject.facts("allocations", subject.job(5, 40))
    subject.facts("allocations", subject.job(12, 14, id=f"b-{subject.gpu}", job_id=f"other-{subject.gpu}"))
    gap = {"first_seq": 3, "last_seq": 9, "from_ms": minute(12) - 500, "to_ms": minute(12) + 500}
    rows: dict[str, object] = {"node": subject.node, "run_id": "run", "batches": 7, "reason": "spool full", **gap}
    types = {"first_seq": pa.uint32(), "last_seq": pa.uint32(), "batches": pa.uint32()}
    ledger.store.insert("gaps", pa.table({name: pa.array([value], types.get(name)) for name, value in rows.items()}))
    ledger.compute()
    found = explained(ledger, subject.gpu, 12)
    assert [(odd.kind, odd.subject, odd.detail) for odd in found.conflicts] == [
        ("overweight", subject.gpu, "weights sum to 2/1; shared in proportion")
    ]
    assert [(each.batches, each.reason) for each in found.gaps] == [(7, "spool full")]
    assert any("7 batches" in note for note in found.notes)
    assert explained(ledger, subject.gpu, 10).conflicts == explained(ledger, subject.gpu, 10).gaps == []


def test_a_beaten_placement_says_by_which(ledger: SmallLedger) -> None:
    subject = Subject(ledger)
    subject.inventory(subject.placement("q", B200, 10, claimed_at_ms=NOW_MS + 1))
    ledger.compute()
    found = explained(ledger, subject.gpu, 12)
    assert [pool.pool for pool in found.pools] == [B200]
    beaten = {each.id: (each.serves, each.beaten_by) for each in found.placements}
    assert beaten[f"p-{subject.gpu}"] == ([], f"q-{subject.gpu}")
    assert [odd.kind for odd in found.conflicts if odd.pool == H100] == ["placement"]


def test_what_is_not_known_is_said_plainly(ledger: SmallLedger) -> None:
    subject = Subject(ledger)
    unseen = explained(ledger, subject.gpu, 12)
    assert "no telemetry of the GPU is stored" in unseen.notes[0]
    assert unseen.pools[0].stored is False and "facts alone decide it" in unseen.pools[0].why_not

    early = explained(ledger, "g4", 3)
    assert early.pools == []
    assert any(note.startswith("the GPU was in no pool in this minute") for note in early.notes)

    open_ = explain(ledger.store, RULES, "g0", NOW_MS // 60_000 * 60_000, now_ms=NOW_MS)
    assert any(note.startswith("the minute is not complete: allocations/0") for note in open_.notes)
    assert open_.pools[0].segments[0].activity == "pending"
    assert "not complete" in open_.pools[0].why_not

    future = explain(ledger.store, RULES, "g0", NOW_MS // 60_000 * 60_000 + 600_000, now_ms=NOW_MS)
    assert any(note.startswith("the minute has not begun") for note in future.notes)

    expired = explained(ledger, "g0", 12, now_ms=START_MS + 100 * DAY_MS)
    assert any("has expired" in note for note in expired.notes)

    with pytest.raises(UnknownGPU) as error:
        explained(ledger, "g00", 12)
    assert "g0" in error.value.close

    ledger.add(allocation("lost", "nowhere", "acme", 0, 20))
    nowhere = explained(ledger, "nowhere", 12)
    assert "no placement puts the GPU into a pool" in " ".join(nowhere.notes)
    assert nowhere.claims[0].not_counted == "the GPU is in no pool then"


# -- text and json ----------------------------------------------------------------------------------------------------


def run(ledger: SmallLedger, *arguments: str) -> Result:
    environment = {
        "GPULEDGER_CLICKHOUSE__URL": ledger.settings.url,
        "GPULEDGER_CLICKHOUSE__DATABASE": ledger.settings.database,
    }
    return CliRunner().invoke(cli, ["ledger", "explain", *arguments], env=environment)


def test_the_command_prints_what_a_terminal_can_show(ledger: SmallLedger) -> None:
    result = run(ledger, "g1", iso(minute(12)))
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == f"GPU g1, minute {iso(minute(12))}, pool h100"
    assert max(map(len, lines)) <= 110
    assert any(
        line.split() == ["sum", "60,000,000", "18,000,084", "=", "its", "time", "in", "service"] for line in lines
    )
    for part in ("Who held it", "Where it was", "What was seen", "What superseded what", "Money of pool h100"):
        assert any(line.startswith(part) for line in lines), part


def test_json_has_moments_as_iso_and_amounts_as_text(ledger: SmallLedger) -> None:
    result = run(ledger, "g1", iso(minute(12)), "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    (pool,) = answer["pools"]
    assert answer["minute"] == iso(minute(12))
    assert sum(int(each["gpu_us"]) for each in pool["segments"]) == int(pool["segments_us"]) == MINUTE_US
    assert pool["service_us"] == str(MINUTE_US)
    assert answer["claims"][1]["counts"] == [[iso(minute(12) + 1234), iso(minute(13))]]
    assert {each["row_charge"] for each in pool["money"] if each["job_id"] == "job-a2"} == {
        "0.025842602",
        "0.013055556",
    }
    assert answer == json.loads(json.dumps(as_json(explained(ledger, "g1", 12)))) | {"notes": answer["notes"]}


def test_the_command_helps_with_names_and_moments(ledger: SmallLedger) -> None:
    result = run(ledger, "g11", iso(minute(12)))
    assert result.exit_code == 2
    assert "GPU: nothing that is stored names 'g11'; similar names: " in result.stderr and "g1" in result.stderr
    result = run(ledger, "g1", iso(minute(12) + 5_000))
    assert result.exit_code == 2 and "expected a whole minute" in result.stderr


def test_long_lists_are_cut_and_say_so(ledger: SmallLedger) -> None:
    subject = Subject(ledger)
    for seconds in range(10, 61, 10):
        for boot in ("a", "b", "c"):
            subject.seen(12, seconds=seconds, boot=(boot, -100))
    ledger.compute()
    found = explained(ledger, subject.gpu, 12)
    short, whole = as_text(found, full=False), as_text(found, full=True)
    assert len(found.fragments) == 18
    assert len(short) <= len(whole)
    only(found)


def test_marks_say_when_and_why_each_computation_was_made(ledger: SmallLedger) -> None:
    subject = Subject(ledger)
    subject.seen(12, seconds=60)
    ledger.compute()
    ledger.sql("INSERT INTO epochs VALUES (1, now64(3), 'test')")
    asked: list[tuple[str, int, list[int]]] = []

    def marks(pool: str, minute_ms: int, versions: object) -> dict[int, list[Mark]]:
        offsets = [each.offset for each in versions]  # type: ignore[attr-defined]
        asked.append((pool, minute_ms, offsets))
        return {offsets[-1]: [Mark(7, END_MS + 1_000, "telemetry")]}

    found = explain(ledger.store, RULES, subject.gpu, minute(12), now_ms=NOW_MS, marks=marks)
    assert asked == [(H100, minute(12), [each.offset for each in found.pools[0].versions])]
    assert found.pools[0].versions[-1].marks == [Mark(7, END_MS + 1_000, "telemetry")]
    assert f"because of telemetry, marked {iso(END_MS + 1_000)[11:-1]} (dirty offset 7)" in "\n".join(
        as_text(found, full=False)
    )
