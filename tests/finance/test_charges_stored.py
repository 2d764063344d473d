"""Charges in the real table: the columns fit, decimals arrive exactly, and the views show what was computed."""

from __future__ import annotations

from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest

from gpuledger.finance.charges import Quantities, charge_interval, no_charges
from gpuledger.finance.charges_table import charges_table, decimal_array
from gpuledger.finance.rates import price_intervals, rates_from
from gpuledger.schemas.migrate import migrate
from tests.finance.builders import asset_cost, ms, rate_card, tariff
from tests.fixtures.clickhouse import ClickHouseDatabase


def with_version(table: pa.Table, version: int) -> pa.Table:
    """UInt128 as 16 bytes, lowest first."""
    column = pa.array([version.to_bytes(16, "little")] * len(table), type=pa.binary(16))
    return table.append_column("version", column)


@pytest.mark.services
def test_the_views_show_each_interval_once(clickhouse_database: ClickHouseDatabase) -> None:
    rates = rates_from(
        [
            asset_cost(period_cost=Decimal("1000.000000001"), tariff="power"),
            tariff({"2026-01-01": "0.333333333", "2026-01-01T00:20": "-0.1"}, "2026-01-02"),
            rate_card(per_gpu_hour=Decimal("2.123456789")),
        ]
    )
    held = Quantities(
        tenant=np.array(["", "a", "b"]),
        job_id=np.array(["", "j", "k"]),
        kind=np.array(["free", "held", "held"]),
        activity=np.array(["", "active", "idle"]),
        gpu_us=np.array([7, 11, 13]) * 10**9,
        energy_mj=np.array([10**9, 10**10, 0]),
        energy_known=np.array([True, True, False]),
    )
    intervals = price_intervals("p", ms("2026-01-01"), ms("2026-01-01T00:30"), rates)
    computed = [charge_interval("p", start, end, held, rates) for start, end in intervals]
    assert len(computed) == 3
    with clickhouse_database.client() as client:
        migrate(lambda sql: client.query(sql).result_rows, lambda sql, p=None: client.command(sql, parameters=p))
        # An older computation did not know of the cut at 00:20 nor of the second tenant's job.
        stale = [charge_interval("p", *intervals[0], held, rates_from([asset_cost()])), no_charges("p", 0, 60_000)]
        client.insert_arrow("charges", with_version(charges_table(stale, [True, True]), 1))
        client.insert_arrow("charges", with_version(charges_table(computed, [False] * 3), 2**100))
        rows = client.query(
            "SELECT interval_start, tenant, asset_cost, charge, incomplete, estimate FROM v_charges "
            "WHERE interval_start >= '2026-01-01' ORDER BY interval_start, tenant"
        ).result_rows
        expected_cost = [Decimal(int(n)).scaleb(-9) for each in computed for n in each.asset_cost[:-1]]
        assert [row[2] for row in rows] == expected_cost
        assert [row[3] is None for row in rows] == [True, False, False] * 3
        assert [row[4] for row in rows] == [0, 0, 1] * 3
        totals = client.query("SELECT sum(asset_cost), sum(energy_cost), max(incomplete) FROM v_asset_cost").result_rows
        sums = client.query("SELECT sum(asset_cost), sum(energy_cost), max(incomplete) FROM v_charges").result_rows
        assert totals == sums
        assert totals[0][0] == sum(expected_cost)


def test_decimals_of_every_size() -> None:
    values = [0, 1, -1, 10**18, -(10**18), 2**63 - 1, -(2**63), 2**64, -(2**64) - 1, 10**37]
    known = np.array([True] * len(values))
    expected = [Decimal(value).scaleb(-9) for value in values]
    assert decimal_array(np.array(values, dtype=object), known).to_pylist() == expected
    small = values[:7]
    assert decimal_array(np.array(small, dtype=np.int64), known[:7]).to_pylist() == expected[:7]
    assert decimal_array(np.array([5, 6]), np.array([True, False])).to_pylist() == [Decimal("5E-9"), None]
