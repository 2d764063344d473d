"""The audit passes on a ledger that is right, and names what is wrong in one that is not: on the real engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from gpuledger.schemas.config import ClickHouse
from gpuledger.streams.audit import AuditReport, audit
from gpuledger.streams.marks import Ranges
from tests.fixtures.clickhouse import ClickHouseDatabase
from tests.streams.small_ledger import (
    B200,
    END_MS,
    H100,
    HOUR_MS,
    HOURS,
    MINUTE_MS,
    RULES,
    START_MS,
    SmallLedger,
    allocation,
    batches,
    minute,
)

pytestmark = pytest.mark.services


@pytest.fixture
def ledger(clickhouse_database: ClickHouseDatabase) -> Iterator[SmallLedger]:
    made = SmallLedger(ClickHouse(url=clickhouse_database.url, database=clickhouse_database.name))
    made.build()
    yield made
    made.store.close()


def audited(ledger: SmallLedger, sample: int = 0, **options: Any) -> AuditReport:
    """All of it, without waiting for a worker that is not there."""
    bounds = options.pop("bounds", (START_MS, END_MS))
    return audit(ledger.store, RULES, *bounds, sample=sample, **{"pauses_s": (), **options})


def first(report: AuditReport) -> tuple[str, str, int]:
    """(pool, GPU, minute or hour of the ledger) of the first finding."""
    finding = report.findings[0]
    return finding.pool, finding.gpu, (finding.at_ms - START_MS) // MINUTE_MS


def checks(report: AuditReport) -> set[str]:
    return {finding.check for finding in report.findings}


#: What is told where rows are not those that were written, and what computing them again names.
STORED = {
    *(f"stored {name}" for name in ("minute rows", "gpu minute rows", "gpu hour rows", "job hour rows", "charges")),
    *(f"recomputed {name}" for name in ("minute", "gpu minute", "gpu hour", "job hour", "money")),
}


def at(n: int, column: str = "minute") -> str:
    return f"{column} = fromUnixTimestamp64Milli({minute(n)}, 'UTC')"


def test_a_ledger_that_is_right_balances_to_the_last_row(ledger: SmallLedger) -> None:
    report = audited(ledger, sample=20, seed=3)
    assert report.findings == []
    assert report.balanced and report.sampled == 20
    # Intervals: four an hour in the pool with prices, and one more where the price of energy changes in one.
    expected = (2 * HOURS * 60, 2 * HOURS, 4 * HOURS + 1)
    assert (report.minutes, report.hours, report.intervals) == expected
    assert (report.pending_minutes, report.open_hours) == (0, 0)
    assert ledger.store.rows("SELECT count() FROM v_gpu_minute")[0][0] > 50, "the ledger has no telemetry to audit"
    report = audited(ledger, sample=1000, bounds=(minute(8), minute(22)))
    assert (report.findings, report.sampled) == ([], 28)


def test_open_minutes_and_hours_are_left_out_and_counted(ledger: SmallLedger) -> None:
    ledger.store.client.command("TRUNCATE TABLE progress")
    ledger.stored_until(END_MS - 20 * MINUTE_MS + RULES.grace_ms)
    ledger.compute()
    report = audited(ledger, sample=9)
    assert (report.findings, report.minutes) == ([], 2 * (HOURS * 60 - 20))
    assert (report.pending_minutes, report.hours, report.open_hours) == (40, 2 * (HOURS - 1), 2)


def test_parts_of_hours_are_audited_by_the_minute(ledger: SmallLedger) -> None:
    report = audited(ledger, bounds=(minute(7), minute(65)))
    assert (report.findings, report.minutes, report.hours) == ([], 2 * 58, 0)


def test_a_deleted_row_of_a_minute(ledger: SmallLedger) -> None:
    ledger.sql(
        f"ALTER TABLE ledger_minute DELETE WHERE pool = 'h100' AND {at(33)} AND kind = 'held' AND tenant = 'acme'"
    )
    report = audited(ledger)
    assert first(report)[::2] == (H100, 33)
    assert "minute" in checks(report)


def test_a_deleted_marker_and_a_deleted_minute(ledger: SmallLedger) -> None:
    ledger.sql(f"ALTER TABLE ledger_minute DELETE WHERE pool = 'h100' AND {at(33)} AND kind = 'marker'")
    ledger.sql(f"ALTER TABLE ledger_minute DELETE WHERE pool = 'b200' AND {at(31)}")
    report = audited(ledger)
    assert first(report)[::2] == (B200, 31)
    found = {(finding.pool, finding.check, finding.expected, finding.found) for finding in report.findings}
    assert {(B200, "fingerprint: marker", "1", "0"), (H100, "minute", "1", "0")} <= found


def test_a_deleted_gpu_row(ledger: SmallLedger) -> None:
    ledger.sql(f"ALTER TABLE ledger_gpu_minute DELETE WHERE {at(15)} AND gpu = 'g2' AND activity = 'active'")
    report = audited(ledger)
    assert first(report) == (H100, "g2", 15)
    assert {"gpu minute against placements", "gpu rows of the minute"} <= checks(report)


def test_all_rows_of_a_gpu_deleted(ledger: SmallLedger) -> None:
    ledger.sql(f"ALTER TABLE ledger_gpu_minute DELETE WHERE {at(14)} AND gpu = 'g2'")
    report = audited(ledger)
    assert first(report) == (H100, "g2", 14)
    assert checks(report) - STORED == {"gpu rows of the minute", "gpus of the minute"}


def test_a_gpu_row_doubled_with_another_holder(ledger: SmallLedger) -> None:
    ledger.copy_row(
        "ledger_gpu_minute", f"{at(13)} AND gpu = 'g0' AND activity = 'active'", tenant="'nord'", job_id="'other'"
    )
    report = audited(ledger)
    assert first(report) == (H100, "g0", 13)
    finding = report.findings[0]
    assert (finding.check, finding.expected) == ("gpu minute against placements", "60000000")
    assert int(finding.found) > 60_000_000


def test_a_minute_row_doubled_with_another_holder(ledger: SmallLedger) -> None:
    ledger.copy_row("ledger_minute", f"pool = 'b200' AND {at(45)} AND tenant = 'nord'", tenant="'acme'")
    report = audited(ledger)
    assert first(report)[::2] == (B200, 45)
    assert report.findings[0].expected == "120000000"


def test_one_microsecond_moved_between_two_tenants(ledger: SmallLedger) -> None:
    """Every sum of the minute is right; hours and jobs say otherwise, and the rows are not those that were written."""
    where = f"pool = 'h100' AND {at(90)} AND kind = 'held' AND activity = 'unobserved'"
    ledger.sql(f"ALTER TABLE ledger_minute UPDATE gpu_us = gpu_us + 1 WHERE {where} AND tenant = 'acme'")
    ledger.sql(f"ALTER TABLE ledger_minute UPDATE gpu_us = gpu_us - 1 WHERE {where} AND tenant = 'nord'")
    report = audited(ledger)
    assert {"gpu hour", "job hour"} <= checks(report) and "minute" not in checks(report)
    assert first(report)[::2] == (H100, 90)
    difference = {int(f.found) - int(f.expected) for f in report.findings if f.check == "job hour"}
    assert difference == {1, -1}
    report = audited(ledger, sample=1000, bounds=(minute(85), minute(95)))
    assert first(report)[::2] == (H100, 90), "the sample names the minute"


def test_one_microsecond_moved_between_two_gpus_of_one_tenant(ledger: SmallLedger) -> None:
    where = f"{at(14)} AND activity = 'active'"
    ledger.sql(f"ALTER TABLE ledger_gpu_minute UPDATE gpu_us = gpu_us + 1 WHERE {where} AND job_id = 'job-a0'")
    ledger.sql(f"ALTER TABLE ledger_gpu_minute UPDATE gpu_us = gpu_us - 1 WHERE {where} AND job_id = 'job-a1'")
    report = audited(ledger)
    assert first(report) == (H100, "g0", 14)
    assert checks(report) - STORED == {"gpu minute against placements"}
    found = [f for f in report.findings if f.check == "gpu minute against placements"]
    assert {(f.gpu, f.found) for f in found} == {("g0", "60000001"), ("g1", "59999999")}


def test_an_hour_of_a_gpu_that_is_gone(ledger: SmallLedger) -> None:
    ledger.sql(f"ALTER TABLE ledger_gpu_hour DELETE WHERE {at(60, 'hour')} AND gpu = 'b0' AND pool = 'h100'")
    report = audited(ledger)
    assert first(report) == (H100, "b0", 60)


def test_time_moved_between_two_jobs_of_one_tenant(ledger: SmallLedger) -> None:
    where = f"{at(0, 'hour')} AND activity = 'unobserved' AND pool = 'h100'"
    ledger.sql(f"ALTER TABLE ledger_job_hour UPDATE gpu_us = gpu_us + 9 WHERE {where} AND job_id = 'job-a0'")
    ledger.sql(f"ALTER TABLE ledger_job_hour UPDATE gpu_us = gpu_us - 9 WHERE {where} AND job_id = 'job-a1'")
    report = audited(ledger)
    assert {"job hour of a job", "charged time"} == checks(report) - STORED
    assert {f.subject for f in report.findings if f.check == "job hour of a job"} == {
        "tenant acme, job job-a0, kind held, activity unobserved",
        "tenant acme, job job-a1, kind held, activity unobserved",
    }


def test_a_fragment_that_was_dropped(ledger: SmallLedger) -> None:
    ledger.sql(f"ALTER TABLE fragments DELETE WHERE {at(16)} AND gpu = 'g1' AND seq = 13")
    report = audited(ledger)
    assert first(report) == (H100, "g1", 16)
    assert report.findings[0].check.startswith("fingerprint: fragments")


def test_a_lost_mark_of_telemetry(ledger: SmallLedger) -> None:
    """A late batch is stored and its minutes are not computed again: every sum is right."""
    late: dict[str, Any] = {**batches()[0], "run_id": "late", "seq": 0}
    device = {**late["devices"][0], "gpu": "g3", "previous_ts_ms": minute(10), "previous_energy_mj": None}
    ledger.add_batches([{**late, "devices": [device]}])
    report = audited(ledger)
    assert first(report) == (H100, "g3", 10)
    assert checks(report) >= {"fingerprint: fragments", "fingerprint: fragments' hash"}
    ledger.compute()
    assert audited(ledger).balanced


def test_a_lost_mark_of_an_allocation(ledger: SmallLedger) -> None:
    ledger.add(allocation("late", "b1", "acme", 95, 97, node="n2"))
    report = audited(ledger)
    assert first(report) == (B200, "b1", 95)
    assert checks(report) == {"fingerprint: facts"}
    assert {f.at_ms for f in report.findings} == {minute(95), minute(96), minute(97)}
    ledger.compute()
    assert audited(ledger).balanced


def test_a_mark_that_waits_in_kafka_is_no_finding(ledger: SmallLedger) -> None:
    ledger.add(allocation("late", "b1", "acme", 95, 97, node="n2"), allocation("lost", "g3", "acme", 30, 31))
    report = audited(ledger, waiting=lambda: {B200: Ranges([(minute(95), minute(98))])})
    assert first(report) == (H100, "g3", 30)
    assert {f.pool for f in report.findings} == {H100} and report.waiting > 0
    report = audited(ledger, waiting=lambda: {B200: Ranges([(0, END_MS)]), H100: Ranges([(START_MS, END_MS)])})
    assert report.balanced


def test_what_is_computed_while_the_audit_waits_is_no_finding(
    ledger: SmallLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger.add(allocation("late", "b1", "acme", 95, 97, node="n2"))
    paused: list[float] = []

    def compute(pause_s: float) -> None:
        paused.append(pause_s)
        if len(paused) == 2:
            ledger.compute()

    monkeypatch.setattr("gpuledger.streams.audit.time.sleep", compute)
    report = audited(ledger, pauses_s=(1.0, 2.0, 3.0))
    assert report.balanced and report.looks == 3 and paused == [1.0, 2.0]


def test_a_minute_that_was_never_completed(ledger: SmallLedger) -> None:
    ledger.sql(f"ALTER TABLE ledger_minute UPDATE complete = 0 WHERE pool = 'h100' AND {at(77)}")
    report = audited(ledger)
    assert first(report)[::2] == (H100, 77)
    assert checks(report) - STORED == {"fingerprint: complete"}


@pytest.mark.parametrize(
    ("column", "check"), [("asset_cost", "asset cost"), ("gpu_us", "charged time"), ("energy_cost", "asset cost")]
)
def test_a_changed_charge_row(ledger: SmallLedger, column: str, check: str) -> None:
    plus = "1" if column == "gpu_us" else "toDecimal128('0.000000001', 9)"
    where = f"{at(15, 'interval_start')} AND job_id = 'job-a0' AND activity = 'active'"
    ledger.sql(f"ALTER TABLE charges UPDATE {column} = {column} + {plus} WHERE {where}")
    report = audited(ledger)
    assert first(report)[::2] in ((H100, 15), (H100, 0))
    assert check in checks(report)


def test_a_changed_charge_is_found_where_it_is_charged_again(ledger: SmallLedger) -> None:
    where = f"{at(15, 'interval_start')} AND job_id = 'job-a0' AND activity = 'active'"
    ledger.sql(f"ALTER TABLE charges UPDATE charge = charge + toDecimal128('0.000000001', 9) WHERE {where}")
    assert "stored charges" in checks(audited(ledger))
    report = audited(ledger, sample=1000, bounds=(minute(14), minute(17)))
    assert first(report)[::2] == (H100, 15)
    assert report.findings[0].subject == "tenant acme, job_id job-a0, kind held, activity active"


def test_energy_that_was_changed_is_found_in_the_sample(ledger: SmallLedger) -> None:
    ledger.sql(f"ALTER TABLE ledger_gpu_minute UPDATE energy_mj = energy_mj + 1 WHERE {at(15)} AND gpu = 'g2'")
    report = audited(ledger, sample=1000, bounds=(minute(14), minute(17)))
    assert first(report) == (H100, "g2", 15)
    assert checks(report) == {"recomputed gpu minute", "stored gpu minute rows"}


def test_the_sample_is_the_same_for_the_same_seed(ledger: SmallLedger) -> None:
    where = f"pool = 'b200' AND minute < fromUnixTimestamp64Milli({START_MS + HOUR_MS}, 'UTC')"
    ledger.sql(f"ALTER TABLE ledger_minute UPDATE energy_mj = 5, rows_hash = 0 WHERE {where} AND kind != 'held'")

    def sampled(seed: int) -> set[int]:
        return {finding.at_ms for finding in audited(ledger, sample=9, seed=seed).findings}

    assert sampled(1) == sampled(1) != sampled(2)


def test_only_the_pools_asked_for(ledger: SmallLedger) -> None:
    ledger.sql(f"ALTER TABLE ledger_minute DELETE WHERE pool = 'b200' AND {at(31)}")
    assert audited(ledger, pools=[H100]).balanced
    assert not audited(ledger, pools=[B200]).balanced


def test_a_range_must_be_whole_minutes(ledger: SmallLedger) -> None:
    with pytest.raises(ValueError, match="expected whole minutes in order"):
        audited(ledger, bounds=(START_MS + 1, END_MS))
