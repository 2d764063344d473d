"""The cases that stand outside the formula of v_cost_minute, each on a few rows."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from clickhouse_connect.driver.client import Client

from gpuledger.schemas.migrate import migrate
from tests.fixtures.clickhouse import ClickHouseDatabase

pytestmark = pytest.mark.services

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
US = 60_000_000
BASE = {"pool": "p", "asset_currency": "EUR", "version": 1}


@pytest.fixture
def client(clickhouse_database: ClickHouseDatabase) -> Client:
    client = clickhouse_database.client()

    def execute(sql: str, parameters: dict[str, object] | None = None, /) -> object:
        return client.command(sql, parameters=parameters)

    migrate(lambda sql: client.query(sql).result_rows, execute)
    return client


def put(client: Client, table: str, *rows: dict[str, Any]) -> None:
    for row in rows:
        client.insert(table, [list(row.values())], column_names=list(row))


def minute(n: int, tenant: str, kind: str, gpus: int, activity: str = "") -> dict[str, Any]:
    return {
        "pool": "p", "minute": NOON + timedelta(minutes=n), "tenant": tenant, "kind": kind, "activity": activity,
        "gpu_us": gpus * US, "version": 1, "complete": 1,
    }  # fmt: skip


def charge(tenant: str, kind: str, gpu_us: int, cost: str | None, payer: str, **more: Any) -> dict[str, Any]:
    amount = None if cost is None else Decimal(cost)
    end = NOON + timedelta(minutes=15)
    return {
        **BASE, "interval_start": NOON, "interval_end": end, "tenant": tenant, "kind": kind, "gpu_us": gpu_us,
        "asset_cost": amount, "payer": payer, **more,
    }  # fmt: skip


def costs(client: Client, until: int = 60) -> list[tuple[int, str, Decimal | None, int, int]]:
    """(minute, payer, cost, gpu_us, estimate)"""
    rows = client.query(
        "SELECT minute, payer, asset_cost, gpu_us, estimate "
        "FROM v_cost_minute(since = {a:DateTime}, until = {b:DateTime}) ORDER BY minute, payer",
        {"a": NOON, "b": NOON + timedelta(minutes=until)},
    ).result_rows
    return [(int((m.replace(tzinfo=UTC) - NOON) / timedelta(minutes=1)), p, c, us, e) for m, p, c, us, e in rows]


def test_a_minute_costs_its_part_of_the_interval(client: Client) -> None:
    put(client, "charges", charge("a", "held", 30 * US, "3", "a"), charge("", "marker", 30 * US, "3", ""))
    put(client, "ledger_minute", minute(0, "a", "held", 10, "active"), minute(1, "a", "held", 20, "pending"))
    assert costs(client) == [(0, "a", Decimal(1), 10 * US, 0), (1, "a", Decimal(2), 20 * US, 0)]


def test_two_payers_share_the_cost_and_the_time_is_told_once(client: Client) -> None:
    put(
        client,
        "charges",
        charge("a", "reserved_unused", 10 * US, "3", "a"),
        charge("a", "reserved_unused", 20 * US, "6", ""),
    )
    put(client, "charges", charge("", "marker", 30 * US, "9", ""))
    put(client, "ledger_minute", minute(0, "a", "reserved_unused", 30))
    assert costs(client) == [(0, "(operator)", Decimal(6), 30 * US, 0), (0, "a", Decimal(3), 0, 0)]


def test_a_minute_beyond_the_money_takes_the_last_rates_as_an_estimate(client: Client) -> None:
    put(client, "charges", charge("a", "held", 30 * US, "3", "a"), charge("", "marker", 30 * US, "3", ""))
    put(client, "ledger_minute", minute(16, "a", "held", 10, "active"))
    assert costs(client) == [(16, "a", Decimal(1), 10 * US, 1)]


def test_money_older_than_an_hour_is_no_rate(client: Client) -> None:
    put(client, "charges", charge("a", "held", 30 * US, "3", "a"), charge("", "marker", 30 * US, "3", ""))
    put(client, "ledger_minute", minute(200, "a", "held", 10, "active"))
    rows = client.query(
        "SELECT asset_cost FROM v_cost_minute(since = {a:DateTime}, until = {b:DateTime})",
        {"a": NOON + timedelta(minutes=199), "b": NOON + timedelta(minutes=201)},
    ).result_rows
    assert rows == [(None,)]


def test_a_new_tenant_takes_the_pools_average(client: Client) -> None:
    put(client, "charges", charge("a", "held", 30 * US, "3", "a"), charge("", "marker", 30 * US, "3", ""))
    put(client, "ledger_minute", minute(1, "b", "held", 5, "active"), minute(1, "b", "unconfirmed", 5))
    assert costs(client) == [(1, "b", Decimal("0.5"), 5 * US, 1), (1, "unattributed", Decimal("0.5"), 5 * US, 1)]


def test_a_pool_without_gpus_costs_the_operator_evenly(client: Client) -> None:
    put(client, "charges", charge("", "free", 0, "15", ""), charge("", "marker", 0, "15", ""))
    put(client, "ledger_minute", minute(3, "", "marker", 0), minute(4, "", "marker", 0))
    assert costs(client) == [(3, "(operator)", Decimal(1), 0, 0), (4, "(operator)", Decimal(1), 0, 0)]


def test_an_unknown_cost_stays_unknown(client: Client) -> None:
    put(client, "charges", charge("a", "held", 30 * US, None, "a"), charge("", "marker", 30 * US, None, ""))
    put(client, "ledger_minute", minute(0, "a", "held", 10, "active"))
    assert costs(client) == [(0, "a", None, 10 * US, 0)]


def test_an_interval_that_a_change_of_rates_moved_does_not_count(client: Client) -> None:
    put(client, "charges", charge("a", "held", 30 * US, "3", "a"), charge("", "marker", 30 * US, "3", ""))
    gone = NOON + timedelta(minutes=5)
    put(client, "charges", {**charge("", "marker", 0, None, ""), "interval_start": gone, "interval_end": gone})
    put(client, "ledger_minute", minute(6, "a", "held", 10, "active"))
    assert costs(client) == [(6, "a", Decimal(1), 10 * US, 0)]


def test_overcommitted_time_has_no_cost(client: Client) -> None:
    put(client, "charges", charge("a", "held", 30 * US, "3", "a"), charge("", "marker", 30 * US, "3", ""))
    put(client, "ledger_minute", minute(0, "a", "overcommitted", 10))
    assert costs(client) == []
