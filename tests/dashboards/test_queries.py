"""Every panel's SQL on the real engine, for several ranges: it runs, and its sums are those of the seeded rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest

from gpuledger.dashboards.boards import BOARDS
from gpuledger.dashboards.boards.live import (
    ALERTS,
    CHARGED_TODAY,
    COST_BY_TENANT,
    COST_RATE,
    FLEET_NOW,
    GAPS,
    HEALTH,
    HELD_BY_TENANT,
    LAST_SHIFT,
    MINUTES,
    MONEY_BY_POOL,
    MONEY_BY_TENANT,
    RUNNING_JOBS,
    SPENT_TODAY,
    TRANSFERS,
)
from gpuledger.dashboards.macros import TimeRange, expand, range_until
from gpuledger.dashboards.panels import RANGES, Annotation, Panel
from tests.dashboards.conftest import SeededLedger
from tests.dashboards.seed import EMPTY_PAYER, GPUS, H100, MINUTE_US, SHIFT_GPUS, Row

pytestmark = pytest.mark.services

NANO = Decimal("1e-9")
EVERY: list[Panel | Annotation] = [
    item for board in BOARDS.values() for item in (*board.panels, *board.annotations)
]  # fmt: skip


def ask(ledger: SeededLedger, panel: Panel | Annotation, given: TimeRange) -> list[dict[str, Any]]:
    with ledger.client() as client:
        result = client.query(expand(panel.sql, given))
    return [dict(zip(result.column_names, row, strict=True)) for row in result.result_rows]


def total(rows: list[dict[str, Any]], column: str) -> Decimal:
    return sum((Decimal(row[column]) for row in rows if row[column] is not None), Decimal(0))


def whole(ledger: SeededLedger) -> TimeRange:
    """A range that holds all that was seeded."""
    return TimeRange(ledger.seed.now - timedelta(hours=12), ledger.seed.now)


def seeded(ledger: SeededLedger, table: str, keep: Callable[[Row], bool] = lambda row: True) -> list[Row]:
    return [row for row in ledger.seed.newest(table) if keep(row)]


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("panel", EVERY, ids=lambda panel: panel.id)
def test_every_query_runs_for_every_range(ledger: SeededLedger, panel: Panel | Annotation, name: str) -> None:
    rows = ask(ledger, panel, range_until(name, datetime.now(UTC)))
    if isinstance(panel, Panel) and rows:
        assert {column.name for column in panel.columns} <= set(rows[0])


@pytest.mark.parametrize("panel", EVERY, ids=lambda panel: panel.id)
def test_a_range_of_long_ago_and_an_empty_database_are_no_errors(
    ledger: SeededLedger, empty_ledger: SeededLedger, panel: Panel | Annotation
) -> None:
    long_ago = TimeRange(datetime(2020, 1, 1, tzinfo=UTC), datetime(2020, 1, 2, tzinfo=UTC))
    ask(ledger, panel, long_ago)
    rows = ask(empty_ledger, panel, range_until("24h", datetime.now(UTC)))
    assert len(rows) == (9 if panel.id == "ledger-health" else 0)


def test_money_by_tenant_and_pool_sums_to_what_was_seeded(ledger: SeededLedger) -> None:
    charges = seeded(ledger, "charges")
    cost = sum((row["asset_cost"] for row in charges), Decimal(0))
    owed = sum((row["charge"] or Decimal(0) for row in charges), Decimal(0))
    by_tenant = ask(ledger, MONEY_BY_TENANT, whole(ledger))
    assert total(by_tenant, "asset_cost") == cost == total(ask(ledger, MONEY_BY_POOL, whole(ledger)), "cost")
    assert total(by_tenant, "charge") == owed
    assert total(ask(ledger, SPENT_TODAY, whole(ledger)), "spent") == cost
    assert total(ask(ledger, CHARGED_TODAY, whole(ledger)), "charged") == owed
    expected: dict[str, Decimal] = defaultdict(Decimal)
    for row in charges:
        expected[row["payer"] or EMPTY_PAYER] += row["asset_cost"]
    assert {row["tenant"]: row["asset_cost"] for row in by_tenant} == expected
    # The markers of the pools say the same: nothing is lost between pool and tenants.
    markers = [row for row in ledger.seed.tables["charges"] if row.get("kind") == "marker"]
    assert cost == sum((row["asset_cost"] for row in markers), Decimal(0))


def test_the_minutes_of_closed_intervals_sum_to_their_money(ledger: SeededLedger) -> None:
    closed = [row for row in seeded(ledger, "charges") if row["estimate"] == 0]
    given = TimeRange(
        min(row["interval_start"] for row in closed), max(row["interval_end"] for row in closed) - timedelta(minutes=1)
    )
    expected: dict[str, Decimal] = defaultdict(Decimal)
    for row in closed:
        expected[row["payer"] or EMPTY_PAYER] += row["asset_cost"]
    rows = ask(ledger, COST_BY_TENANT, given)
    for payer, cost in expected.items():
        mine = [row["cost_per_second"] * 60 for row in rows if row["payer"] == payer]
        # A rate is rounded to the nano-unit per pool, kind, activity and minute.
        assert abs(sum(mine, Decimal(0)) - cost) <= 60 * NANO * len(mine) * 8
    assert set(expected) == {row["payer"] for row in rows}


def test_cost_per_second_now_is_the_sum_over_tenants_of_the_open_minute(ledger: SeededLedger) -> None:
    now = ask(ledger, COST_RATE, range_until("1h", datetime.now(UTC)))
    rows = ask(ledger, COST_BY_TENANT, whole(ledger))
    open_minute = [row for row in rows if row["minute"].replace(tzinfo=UTC) == ledger.seed.minute]
    assert {row["currency"] for row in now} == {"EUR"}
    assert len({row["cost_per_second"] for row in now}) == 1
    assert abs(now[0]["cost_per_second"] - total(open_minute, "cost_per_second")) <= 40 * NANO
    assert now[0]["cost_per_second"] > Decimal("0.4")


def test_the_fleet_now_is_every_gpu_in_service(ledger: SeededLedger) -> None:
    rows = ask(ledger, FLEET_NOW, range_until("1h", datetime.now(UTC)))
    gpus = {row["state"]: row["state_gpus"] for row in rows}
    assert sum(gpus.values()) == sum(GPUS.values()) == rows[0]["in_service"]
    of_minute = seeded(ledger, "ledger_minute", lambda row: row["minute"] == ledger.seed.minute)
    for kind in ("reserved_unused", "free"):
        us = sum(row["gpu_us"] for row in of_minute if row["kind"] == kind)
        assert gpus[kind] == Decimal(us) / MINUTE_US
    held = sum(row["gpu_us"] for row in of_minute if row["kind"] == "held")
    assert rows[0]["held"] == Decimal(held) / MINUTE_US
    assert "pending" not in gpus, "what was seen in the last minutes says what held GPUs do"
    assert gpus["active"] > gpus["idle"] > 0


def test_held_gpus_are_those_of_the_minute_pending_included(ledger: SeededLedger) -> None:
    rows = ask(ledger, HELD_BY_TENANT, whole(ledger))
    expected: dict[tuple[datetime, str], int] = defaultdict(int)
    for row in seeded(ledger, "ledger_minute", lambda row: row["kind"] == "held"):
        expected[row["minute"], row["tenant"]] += row["gpu_us"]
    found = {(row["minute"].replace(tzinfo=UTC), row["tenant"]): row["gpus"] for row in rows}
    assert found == {key: Decimal(us) / MINUTE_US for key, us in expected.items()}


def test_no_panel_shows_a_superseded_version(ledger: SeededLedger) -> None:
    assert any(row.get("stale") for row in ledger.seed.tables["ledger_minute"])
    for panel in EVERY:
        for row in ask(ledger, panel, range_until("24h", datetime.now(UTC))):
            assert "ghost" not in row.values(), panel.id


def test_the_last_shift_tells_before_and_after(ledger: SeededLedger) -> None:
    rows = ask(ledger, LAST_SHIFT, whole(ledger))
    flows = {(row["from_tenant"], row["to_tenant"], row["moved"]): row["gpus"] for row in rows}
    assert flows == {
        ("openhorizon", "nordic-lm", 1): SHIFT_GPUS,
        ("openhorizon", "openhorizon", 0): 512 - SHIFT_GPUS,
        ("nordic-lm", "nordic-lm", 0): 96,
    }


def test_transfers_are_those_in_effect_and_to_come_not_the_withdrawn(ledger: SeededLedger) -> None:
    rows = ask(ledger, TRANSFERS, range_until("24h", datetime.now(UTC)))
    assert [(row["status"], row["gpus"]) for row in rows] == [("planned", 64), ("done", SHIFT_GPUS)]


def test_running_jobs_have_their_money_so_far(ledger: SeededLedger) -> None:
    rows = {row["job_id"]: row for row in ask(ledger, RUNNING_JOBS, whole(ledger))}
    assert set(rows) == {row["id"] for row in ledger.seed.tables["jobs"]}
    assert "ended-job" not in rows
    for job, row in rows.items():
        # The job's start, and the whole interval it falls into.
        start = ledger.seed.now - timedelta(minutes=20 + len(job) * 3) - timedelta(hours=12)
        mine = seeded(
            ledger, "charges", lambda c, job=job, start=start: c["job_id"] == job and c["interval_start"] >= start
        )
        assert row["gpus"] == sum(a["job_id"] == job for a in ledger.seed.tables["allocations"])
        assert row["tenant"] == mine[0]["tenant"]
        assert Decimal(0) < row["asset_cost"] <= sum((c["asset_cost"] for c in mine), Decimal(0))
        assert Decimal(0) < row["active_share"] < 1
    assert rows["gb200-jupyter-4471"]["tenant"] == "unattributed"
    assert rows["gb200-jupyter-4471"]["charge"] is None


def test_only_firing_alerts_are_shown(ledger: SeededLedger) -> None:
    (row,) = ask(ledger, ALERTS, whole(ledger))
    assert row["money_per_hour"] == 164
    assert row["tenant"] == "openhorizon"


def test_gaps_are_those_of_the_last_day_each_told_once(ledger: SeededLedger) -> None:
    rows = ask(ledger, GAPS, range_until("24h", datetime.now(UTC)))
    assert [(row["node"], row["batches"], row["reason"]) for row in rows] == [
        ("narvik-h100-0007", 1, "spool full, perhaps sent"),
        ("narvik-h100-0007", 720, "spool full"),
        ("narvik-gb200-0002", 50, "spool: too old"),
    ]
    assert rows[1]["to_at"] - rows[1]["from_at"] == timedelta(hours=2)
    (check,) = [row for row in ask(ledger, HEALTH, whole(ledger)) if row["name"] == "Batches dropped"]
    assert (check["status"], check["value"]) == ("warn", "771 on 2 nodes")


def test_a_sound_ledger_is_sound_but_for_what_was_seeded(ledger: SeededLedger) -> None:
    checks = {row["name"]: row["status"] for row in ask(ledger, HEALTH, whole(ledger))}
    late = {"Telemetry stored", "Complete until"}  # they age while the tests run
    assert {name for name, status in checks.items() if status != "ok"} - late == {"Dead letters", "Batches dropped"}


def test_a_minute_and_an_interval_that_do_not_add_up_are_seen(ledger: SeededLedger) -> None:
    minute = ledger.seed.minute - timedelta(minutes=7)
    interval = max(
        row["interval_start"] for row in seeded(ledger, "charges") if row["interval_start"] < ledger.seed.minute
    )
    more: Row = {"tenant": "x", "kind": "held", "activity": "active", "pool": H100}
    with ledger.client() as client:
        for table, row in (
            ("ledger_minute", {**more, "minute": minute, "gpu_us": 1, "version": 100, "complete": 1}),
            ("charges", {**more, "interval_start": interval, "gpu_us": 1, "version": 50, "asset_cost": NANO}),
        ):
            client.insert(table, [list(row.values())], column_names=list(row))
        try:
            checks = {row["name"]: row["status"] for row in ask(ledger, HEALTH, whole(ledger))}
            states = {row["state"] for row in ask(ledger, MINUTES, whole(ledger)) if row["pool"] == H100}
        finally:
            for table in ("ledger_minute", "charges"):
                client.command(f"DELETE FROM {table} WHERE tenant = 'x'")
    assert checks["GPU time balances"] == checks["Money balances"] == "bad"
    assert states == {"complete", "open", "unbalanced"}
