"""Each correction marks exactly the minutes it affects: the real sinks on the real engine, against a whole recompute.

A minute is affected when any of its rows differs after everything is computed again: its amounts, or the marker's count
and hash of what it was computed from, which `gpuledger audit` compares. Where marks may be wider by the rule of the
design (the union of every revision's range, all pools of a GPU), the test names that rule.
"""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import msgspec
import pytest

from gpuledger.schemas.events import (
    AccountRule,
    Commitment,
    Geometry,
    Instance,
    Job,
    RateCard,
    Tenant,
    Transfer,
)
from gpuledger.streams.holders import UNPLACED_POOL
from tests.fixtures.clickhouse import ClickHouse as Server
from tests.streams.corrections import NOW_MS, Minutes, Subject, revised
from tests.streams.small_ledger import B200, H100, START_MS, SmallLedger, built_ledger, minute

pytestmark = pytest.mark.services

LAST = 180


@pytest.fixture(scope="module")
def ledger(clickhouse: Server) -> Iterator[SmallLedger]:
    """One for the module: building one takes longer than a test. Each test corrects a GPU of its own, see `Subject`."""
    with built_ledger(clickhouse.url) as made:
        yield made


_ROWS = {
    "minute": "tenant, kind, activity, gpu_us, energy_mj, complete FROM v_ledger_minute",
    "gpu": "gpu, instance, tenant, job_id, kind, activity, gpu_us, energy_mj FROM v_gpu_minute",
    "marker": "service_us, complete, fragments, fragments_hash, facts_hash FROM v_recomputes",
}


class Computed:
    """Computes everything, and keeps the rows by (pool, minute): with their markers (`all`), and without."""

    def __init__(self, ledger: SmallLedger) -> None:
        ledger.compute()
        self.all: dict[tuple[str, int], set[Any]] = {}
        self.amounts: dict[tuple[str, int], set[Any]] = {}
        for name, select in _ROWS.items():
            sql = f"SELECT pool, intDiv(toUnixTimestamp64Milli(minute) - {{start:Int64}}, 60000), {select}"
            for pool, n, *row in ledger.store.rows(sql, {"start": START_MS}):
                self.all.setdefault((pool, int(n)), set()).add((name, *row))
                if name != "marker":
                    self.amounts.setdefault((pool, int(n)), set()).add((name, *row))

    def differs(self, after: Computed) -> tuple[Minutes, Minutes]:
        """Minutes of which any row differs, and those of which any amount does."""
        return _differ(self.all, after.all), _differ(self.amounts, after.amounts)


def _differ(before: dict[tuple[str, int], set[Any]], after: dict[tuple[str, int], set[Any]]) -> Minutes:
    return {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}


def of(pool: str, *ranges: tuple[int, int]) -> Minutes:
    """The minutes [first, last) of a pool."""
    return {(pool, n) for first, last in ranges for n in range(first, last)}


# -- telemetry ------------------------------------------------------------------------------------------------------


def test_late_telemetry_marks_the_minutes_it_saw(ledger: SmallLedger) -> None:
    subject = Subject(ledger)
    subject.seen(12)
    before = Computed(ledger)
    # Of minute 12 a run that comes later by its name sees no more than what is believed already.
    marked = subject.seen(31, seconds=90) | subject.seen(12, seconds=20, boot=("later", -100))
    every, amounts = before.differs(Computed(ledger))
    assert marked == every == of(H100, (12, 13), (30, 32))
    assert amounts == of(H100, (30, 32))


def test_telemetry_of_a_gpu_that_changed_its_pool_marks_both(ledger: SmallLedger) -> None:
    subject = Subject(ledger)
    subject.inventory(
        revised(subject.placement("p", H100, 0), end_ms=minute(70) + 30_000),
        subject.placement("q", B200, 70, start_ms=minute(70) + 30_000),
    )
    before = Computed(ledger)
    marked = subject.seen(71, seconds=110)
    every, amounts = before.differs(Computed(ledger))
    # Whoever has had a GPU reads all its telemetry.
    assert marked == every == of(H100, (70, 72)) | of(B200, (70, 72))
    assert amounts == of(H100, (70, 71)) | of(B200, (70, 72))


# -- allocations ----------------------------------------------------------------------------------------------------


def test_a_late_allocation_marks_its_minutes(ledger: SmallLedger) -> None:
    subject = Subject(ledger)
    before = Computed(ledger)
    marked = subject.facts("allocations", subject.job(20, 50))
    every, amounts = before.differs(Computed(ledger))
    assert marked == every == amounts == of(H100, (20, 51))


def test_an_allocation_that_ended_when_it_began_affects_nothing(ledger: SmallLedger) -> None:
    subject = Subject(ledger)
    before = Computed(ledger)
    marked = subject.facts("allocations", subject.job(20, 30, end_ms=minute(20) + 1234))
    every, _ = before.differs(Computed(ledger))
    assert marked == every == set()


def test_a_corrected_end_marks_what_either_revision_says(ledger: SmallLedger) -> None:
    subject = Subject(ledger)
    subject.facts("allocations", subject.job(8, 40))
    before = Computed(ledger)
    marked = subject.facts("allocations", revised(subject.job(8, 30)))
    every, amounts = before.differs(Computed(ledger))
    # By rule: every minute of every revision. The amounts of 8 to 29 stay, what they come from does not.
    assert marked == every == of(H100, (8, 41))
    assert amounts == of(H100, (30, 41))


def test_a_corrected_time_marks_both_times_and_nothing_between(ledger: SmallLedger) -> None:
    subject = Subject(ledger)
    subject.facts("allocations", subject.job(8, 40))
    before = Computed(ledger)
    marked = subject.facts("allocations", revised(subject.job(60, 70)))
    every, amounts = before.differs(Computed(ledger))
    assert marked == every == amounts == of(H100, (8, 41), (60, 71))


def test_an_allocation_corrected_to_a_gpu_of_another_pool_marks_both_pools(ledger: SmallLedger) -> None:
    subject, other = Subject(ledger), Subject(ledger)
    other.inventory(revised(other.placement("p", B200, 0)))
    subject.facts("allocations", subject.job(8, 40))
    before = Computed(ledger)
    marked = subject.facts("allocations", revised(subject.job(100, 110, gpu=other.gpu, node=other.node)))
    every, amounts = before.differs(Computed(ledger))
    assert every == amounts == of(H100, (8, 41)) | of(B200, (100, 111))
    # By rule: the union of the pools, and of the ranges.
    assert marked == of(H100, (8, 41), (100, 111)) | of(B200, (8, 41), (100, 111))


def test_a_voided_allocation_marks_its_minutes(ledger: SmallLedger) -> None:
    subject = Subject(ledger)
    subject.facts("allocations", subject.job(8, 40))
    before = Computed(ledger)
    marked = subject.facts("allocations", revised(subject.job(8, 40), void=True))
    every, amounts = before.differs(Computed(ledger))
    assert marked == every == amounts == of(H100, (8, 41))


def test_an_older_revision_that_comes_late_changes_nothing(ledger: SmallLedger) -> None:
    subject = Subject(ledger)
    subject.facts("allocations", subject.job(8, 40))
    before = Computed(ledger)
    marked = subject.facts("allocations", msgspec.structs.replace(subject.job(8, 20), revision=0))
    assert before.differs(Computed(ledger)) == (set(), set())
    # By rule: what another worker stores meanwhile is not known, so it is marked.
    assert marked == of(H100, (8, 41))
    assert subject.facts("allocations", msgspec.structs.replace(subject.job(8, 20), revision=0)) == set()


# -- jobs, boots, namings: what ends an allocation that its source left open ------------------------------------------


def running(ledger: SmallLedger, **fields: Any) -> tuple[Subject, Computed]:
    """A subject with an allocation since minute 20 without an end, which the last minute names as running."""
    subject = Subject(ledger)
    subject.facts("allocations", subject.job(20, None, **fields))
    subject.seen(LAST - 1, seconds=10, boot=("b1", -60), running=[f"a-{subject.gpu}"])
    return subject, Computed(ledger)


def test_a_jobs_end_marks_what_it_takes_from_its_open_allocations(ledger: SmallLedger) -> None:
    subject, before = running(ledger)

    def told(revision: int, ended: int | None) -> Minutes:
        ended_ms = None if ended is None else minute(ended) + 30_000
        job = Job(id=f"job-{subject.gpu}", revision=revision, claimed_at_ms=NOW_MS, source="slurm", ended_ms=ended_ms)
        return subject.facts("jobs", job)

    marked = told(1, 60)
    after = Computed(ledger)
    assert before.differs(after) == (marked, marked)
    assert marked == of(H100, (60, LAST))

    # By rule: a correction marks from the earliest end that any revision tells.
    assert told(2, 90) == marked
    later = Computed(ledger)
    assert after.differs(later)[1] == of(H100, (60, 91))
    assert told(3, None) == marked
    assert later.differs(Computed(ledger))[1] == of(H100, (90, LAST))


def test_a_jobs_end_leaves_allocations_with_an_end_alone(ledger: SmallLedger) -> None:
    subject = Subject(ledger)
    subject.facts("allocations", subject.job(8, 40))
    before = Computed(ledger)
    job = Job(id=f"job-{subject.gpu}", revision=1, claimed_at_ms=NOW_MS, source="slurm", ended_ms=minute(20))
    assert subject.facts("jobs", job) == set()
    assert before.differs(Computed(ledger)) == (set(), set())


def test_a_new_boot_marks_what_it_ends(ledger: SmallLedger) -> None:
    subject, before = running(ledger, boot_id="b1")
    marked = subject.seen(130, boot=("b2", 100))
    every, amounts = before.differs(Computed(ledger))
    # The boot takes the GPU from 100:15 on, and its batch saw minute 130. Boots are in no hash of a minute.
    assert marked == amounts == of(H100, (100, LAST))
    assert every == marked


def test_a_naming_marks_what_it_confirms(ledger: SmallLedger) -> None:
    subject = Subject(ledger)
    subject.facts("allocations", subject.job(20, None))
    subject.seen(39, seconds=10, running=[f"a-{subject.gpu}"])
    before = Computed(ledger)
    marked = subject.seen(79, seconds=10, running=[f"a-{subject.gpu}"])
    every, amounts = before.differs(Computed(ledger))
    # Named at the end of 39 it was confirmed until 50, named at the end of 79 until 90.
    assert marked == amounts == every == of(H100, (50, 90))


# -- capacity -------------------------------------------------------------------------------------------------------


def test_a_retroactive_commitment_marks_its_minutes(ledger: SmallLedger) -> None:
    subject = Subject(ledger)
    before = Computed(ledger)
    commitment = Commitment(
        id=f"c-{subject.gpu}",
        revision=1,
        claimed_at_ms=NOW_MS,
        pool=H100,
        tenant="fjord",
        gpus=1,
        start_ms=minute(40),
        end_ms=minute(130) + 1,
    )
    marked = subject.facts("capacity", commitment)
    after = Computed(ledger)
    assert before.differs(after) == (marked, marked)
    assert marked == of(H100, (40, 131))
    # As a proposal it does not count.
    assert subject.facts("capacity", revised(commitment, state="proposed")) == marked
    assert after.differs(Computed(ledger)) == (marked, marked)


def test_a_transfer_marks_from_its_start(ledger: SmallLedger) -> None:
    subject = Subject(ledger)
    holding = Commitment(
        id=f"c-{subject.gpu}", revision=1, claimed_at_ms=NOW_MS, pool=H100, tenant="east", gpus=1, start_ms=START_MS
    )
    subject.facts("capacity", holding)
    before = Computed(ledger)
    transfer = Transfer(
        id=f"t-{subject.gpu}",
        revision=1,
        claimed_at_ms=NOW_MS,
        pool=H100,
        gpus=1,
        from_tenant="east",
        to_tenant="west",
        start_ms=minute(50) + 7_000,
    )
    marked = subject.facts("capacity", transfer)
    after = Computed(ledger)
    assert before.differs(after) == (marked, marked)
    assert marked == of(H100, (50, LAST))
    assert subject.facts("capacity", revised(transfer, state="cancelled")) == marked
    assert after.differs(Computed(ledger)) == (marked, marked)
    subject.facts("capacity", revised(holding, state="cancelled"))


# -- where GPUs are, how they are cut, who pays -----------------------------------------------------------------------


def test_a_placement_marks_every_pool_that_has_had_the_gpu(ledger: SmallLedger) -> None:
    subject = Subject(ledger)
    subject.seen(30)
    before = Computed(ledger)
    marked = subject.inventory(subject.placement("q", B200, 90, claimed_at_ms=NOW_MS + 1))
    every, amounts = before.differs(Computed(ledger))
    assert amounts == of(H100, (90, LAST)) | of(B200, (90, LAST))
    # By rule: with every placement of that GPU; b200 now reads what was seen of it before.
    assert ("b200", 30) in every
    assert every <= marked == of(H100, (0, LAST)) | of(B200, (0, LAST))


def test_a_first_placement_marks_the_allocations_that_were_there_before_it(ledger: SmallLedger) -> None:
    """They are conflicts of the pool now: outside the GPU's time in service."""
    subject = Subject(ledger)
    fields = {"gpu": f"new-{subject.gpu}"}
    subject.facts("allocations", subject.job(20, 100, **fields))
    before = Computed(ledger)
    marked = subject.inventory(subject.placement("new", H100, 90, **fields))
    every, amounts = before.differs(Computed(ledger))
    assert amounts == of(H100, (90, LAST))
    assert every == of(H100, (20, LAST))
    # The unplaced pool has no minutes, but lists the allocation as a conflict no longer.
    assert marked == every | of(UNPLACED_POOL, (20, 101))


def test_a_geometry_marks_while_it_is_in_force(ledger: SmallLedger) -> None:
    subject = Subject(ledger)
    before = Computed(ledger)
    cut = Geometry(
        id=f"geo-{subject.gpu}",
        revision=1,
        claimed_at_ms=NOW_MS,
        gpu=subject.gpu,
        node=subject.node,
        instances=[Instance(1, minute(30), 3)],
        start_ms=minute(30),
        end_ms=minute(45) + 1,
    )
    marked = subject.inventory(cut)
    assert before.differs(Computed(ledger)) == (marked, marked)
    assert marked == of(H100, (30, 46))


def test_the_account_map_marks_every_pool_from_its_rules_on(ledger: SmallLedger) -> None:
    subject = Subject(ledger)
    subject.facts("allocations", subject.job(20, 60, tenant="", account=subject.gpu))
    before = Computed(ledger)
    rule = AccountRule(match="account", value=subject.gpu, start_ms=minute(40))
    marked = subject.facts("rates", Tenant(id="nord", revision=1, claimed_at_ms=NOW_MS, rules=[rule]))
    assert before.differs(Computed(ledger))[1] == of(H100, (40, 61))
    # By rule: in every pool, because whose names they are is not looked up.
    assert marked == of(H100, (40, LAST)) | of(B200, (40, LAST))


def test_a_retroactive_price_marks_what_it_prices(ledger: SmallLedger) -> None:
    subject = Subject(ledger)
    money = (
        "SELECT pool, toUnixTimestamp64Milli(interval_start), toUnixTimestamp64Milli(interval_end), tenant, job_id, "
        "kind, activity, charge, asset_cost FROM v_charges"
    )
    ledger.compute()
    before = set(ledger.store.rows(money))
    card = RateCard(
        id=f"card-{subject.gpu}",
        revision=1,
        claimed_at_ms=NOW_MS,
        pool=H100,
        tenant="acme",
        currency="EUR",
        per_gpu_hour=Decimal("1.10"),
        start_ms=minute(25),
        end_ms=minute(55),
    )
    marked = subject.facts("rates", card)
    ledger.compute()
    changed = before ^ set(ledger.store.rows(money))
    assert marked == of(H100, (25, 55))
    # It cuts the interval of 20 to 30 in two: money is made by whole hours that hold a marked minute.
    assert {pool for pool, *_ in changed} == {H100}
    assert min(start for _, start, *_ in changed) == minute(20)
    assert max(end for _, _, end, *_ in changed) == minute(60)
