"""The hash that is kept with the rows is the one that the database computes of them: on the real engine."""

from __future__ import annotations

import random
from collections.abc import Iterator
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest

from gpuledger.schemas.config import ClickHouse
from gpuledger.streams.ledger_digest import DIGESTED, digested, row_hash_sql, row_hashes, string_hashes
from tests.fixtures.clickhouse import ClickHouse as Server
from tests.fixtures.clickhouse import ClickHouseDatabase
from tests.streams.small_ledger import SmallLedger

pytestmark = pytest.mark.services

TIMES = {
    **{"ledger_minute": "minute", "ledger_gpu_minute": "minute", "ledger_gpu_hour": "hour"},
    **{"ledger_job_hour": "hour", "charges": "interval_start"},
}


@pytest.fixture
def ledger(clickhouse_database: ClickHouseDatabase) -> Iterator[SmallLedger]:
    made = SmallLedger(ClickHouse(url=clickhouse_database.url, database=clickhouse_database.name))
    made.build()
    yield made
    made.store.close()


def test_text_is_hashed_as_the_database_does(clickhouse: Server) -> None:
    chance = random.Random(7)
    alphabet = "abcZ0-ø漢 /\x00"
    names = ["", "a", "12345678", "GPU-12345678-1234-1234-1234-123456789abc"]
    names += ["".join(chance.choices(alphabet, k=n % 41)) for n in range(300)]
    with clickhouse.client() as client:
        sql = "SELECT arrayMap(x -> murmurHash2_64(x), {names:Array(String)})"
        told = client.query(sql, parameters={"names": names[:4]}).result_rows[0][0]
        assert string_hashes(names[:4]).tolist() == list(told)
        table = pa.table({"n": list(range(len(names))), "name": names})
        client.command("CREATE TABLE IF NOT EXISTS texts (n Int64, name String) ENGINE = Memory")
        client.insert_arrow("texts", table)
        told = [row[0] for row in client.query("SELECT murmurHash2_64(name) FROM texts ORDER BY n").result_rows]
        client.command("DROP TABLE texts SYNC")
    assert string_hashes(names).tolist() == told


@pytest.mark.parametrize("table", sorted(DIGESTED))
def test_what_was_written_is_what_the_database_finds(ledger: SmallLedger, table: str) -> None:
    time = TIMES[table]
    rows = ledger.store.rows(
        f"SELECT pool, {time}, version, sum({row_hash_sql(table)}), maxIf(rows_hash, kind = 'marker'), count() "
        f"FROM {table} GROUP BY pool, {time}, version"
    )
    assert len(rows) > 3 and sum(row[-1] for row in rows) > len(rows)
    assert all(found == kept != 0 for *_, found, kept, _ in rows)
    names = {row[0] for row in ledger.store.rows(f"DESCRIBE TABLE {table}")}
    assert names - set(DIGESTED[table]) == {"pool", time, "version", "rows_hash"}, "a column is not hashed"


def test_every_column_counts() -> None:
    row = {"tenant": "acme", "job_id": "1", "user": "ann", "kind": "held", "activity": "idle"}
    values = {**row, "gpu_us": 5, "energy_mj": 7}
    types = {"gpu_us": pa.int64(), "energy_mj": pa.int64()}

    def hashed(**changed: object) -> int:
        columns = {n: pa.array([v], type=types.get(n)) for n, v in {**values, **changed}.items()}
        return int(row_hashes("ledger_job_hour", pa.table(columns))[0])

    changes = [{name: "x"} for name in row] + [{"gpu_us": 6}, {"gpu_us": -5}, {"energy_mj": 8}, {"energy_mj": None}]
    changes += [{"gpu_us": 6, "energy_mj": 6}, {"gpu_us": 7, "energy_mj": 5}, {"tenant": "1", "job_id": "acme"}]
    assert len({hashed(), *(hashed(**change) for change in changes)}) == len(changes) + 1


def test_a_nano_unit_counts_however_large_the_amount() -> None:
    amount = Decimal("98765432109876.123456789")

    def table(value: Decimal | None) -> pa.Table:
        plain = {"text": pa.array([""]), "integer": pa.array([0]), "time": pa.array([0])}
        plain["decimal"] = pa.array([value], type=pa.decimal128(38, 9))
        columns = {name: plain[kind] for name, kind in DIGESTED["charges"].items()}
        return pa.table(columns | {"interval_end": pa.array([0]).cast(pa.timestamp("ms", tz="UTC"))})

    hashes = [row_hashes("charges", table(value))[0] for value in (amount, amount + Decimal("1e-9"), -amount, None)]
    assert len(set(map(int, hashes))) == 4
    sliced = pa.concat_tables([table(amount), table(-amount)]).combine_chunks().slice(1)
    assert row_hashes("charges", sliced)[0] == hashes[2], "a slice is read from its own beginning"


def test_rows_are_summed_by_time_into_their_marker() -> None:
    times = pa.array([0, 0, 60_000, 60_000, 60_000]).cast(pa.timestamp("ms", tz="UTC"))
    kinds = ["held", "marker", "marker", "held", "free"]
    columns = {name: pa.array([str(n) for n in range(5)]) for name in ("tenant", "job_id", "user", "activity")}
    rows = pa.table({"hour": times, **columns, "kind": kinds, "gpu_us": [1, 2, 3, 4, 5], "energy_mj": [1, 2, 3, 4, 5]})
    hashes = row_hashes("ledger_job_hour", rows)
    found = digested("ledger_job_hour", rows, "hour").column("rows_hash").to_pylist()
    assert found == [0, int(hashes[:2].sum(dtype=np.uint64)), int(hashes[2:].sum(dtype=np.uint64)), 0, 0]
    assert digested("ledger_job_hour", rows.slice(0, 0), "hour").num_rows == 0
