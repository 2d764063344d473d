"""clickhouse-connect, with its default settings, cannot tell the embedded engine from a server."""

import asyncio
import datetime as dt
import time
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal

import clickhouse_connect
import pyarrow as pa
import pytest
from clickhouse_connect.driver.exceptions import DatabaseError
from clickhouse_connect.driver.external import ExternalData

from tests.fixtures.clickhouse import ClickHouse, ClickHouseDatabase

pytestmark = pytest.mark.services


def test_query_command_and_summary(clickhouse_database: ClickHouseDatabase) -> None:
    with clickhouse_database.client() as client:
        client.command("CREATE TABLE t (a Int64, s String) ENGINE = MergeTree ORDER BY a")
        written = client.insert("t", [[1, "x"], [2, "y"]], column_names=["a", "s"])
        assert written.written_rows == 2
        result = client.query("SELECT * FROM t ORDER BY a")
        assert result.result_rows == [(1, "x"), (2, "y")]
        assert result.summary["read_rows"] == "2"
        assert result.summary["result_rows"] == "2"
        assert client.command("SELECT count() FROM t") == 2
        assert client.command("SELECT 1 WHERE 0") == ""
        assert client.query("SELECT a FROM t WHERE a > 5").result_rows == []
        assert client.query("SELECT * FROM t LIMIT 0").column_names == ("a", "s")


@pytest.mark.parametrize("compress", [True, "lz4", "zstd", "gzip", False])
def test_compression_in_both_directions(clickhouse_database: ClickHouseDatabase, compress: bool | str) -> None:
    with clickhouse_database.client(compress=compress) as client:
        client.command("CREATE TABLE t (a Int64, s String) ENGINE = MergeTree ORDER BY a")
        rows = [[number, f"gpu-{number}" * 10] for number in range(20_000)]
        client.insert("t", rows, column_names=["a", "s"])
        assert client.query("SELECT * FROM t ORDER BY a").result_rows == [tuple(row) for row in rows]


def test_arrow_both_ways_keeps_128_bit_integers_and_decimals(clickhouse_database: ClickHouseDatabase) -> None:
    version = (3 << 96) + 5
    table = pa.table(
        {
            "k": pa.array([1, 2], pa.int64()),
            "version": pa.array([version.to_bytes(16, "little"), (7).to_bytes(16, "little")], pa.binary(16)),
            "money": pa.array(
                [Decimal("12345678901234567890.123456789"), Decimal("-0.000000001")], pa.decimal128(38, 9)
            ),
            "at": pa.array([1_700_000_000_123, 0], pa.timestamp("ms", "UTC")),
            "held": pa.array([[1, 2], []], pa.list_(pa.int64())),
            "pool": pa.array(["a", "b"]).dictionary_encode(),
            "power": pa.array([None, 1.5], pa.float32()),
        }
    )
    with clickhouse_database.client() as client:
        client.command(
            "CREATE TABLE t (k Int64, version UInt128, money Decimal(38, 9), at DateTime64(3, 'UTC'),"
            " held Array(Int64), pool LowCardinality(String), power Nullable(Float32))"
            " ENGINE = ReplacingMergeTree(version) ORDER BY k"
        )
        assert client.insert_arrow("t", table).written_rows == 2
        assert client.query("SELECT version, money, at FROM t ORDER BY k").result_rows[0] == (
            version,
            Decimal("12345678901234567890.123456789"),
            dt.datetime(2023, 11, 14, 22, 13, 20, 123_000),
        )
        back = client.query_arrow("SELECT * FROM t ORDER BY k")
        assert back["money"].to_pylist() == table["money"].to_pylist()
        assert back["version"].to_pylist() == table["version"].to_pylist()
        assert back["held"].to_pylist() == [[1, 2], []]
        assert back["power"].to_pylist() == [None, 1.5]


def test_arrow_streams_of_many_blocks_and_of_none_are_one_stream(clickhouse: ClickHouse) -> None:
    with clickhouse.client() as client:
        with client.query_arrow_stream("SELECT number, toString(number) AS s FROM numbers(500000)") as stream:
            assert sum(sum(batch["number"].to_pylist()) for batch in stream) == 124_999_750_000
        with client.query_arrow_stream("SELECT number FROM numbers(10) WHERE number > 10") as stream:
            assert sum(batch.num_rows for batch in stream) == 0
        assert client.query_arrow("SELECT number FROM numbers(10) WHERE number > 10").column_names == ["number"]


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("String", "it's a \\ tab\t and\nline 'x' {y} %s"),
        ("String", "Ørsted 🜁"),
        ("Int64", -(2**63)),
        ("Array(String)", ["a'b", "c\\d", "e\tf"]),
        ("Array(Int64)", [1, 2, 3]),
        ("Nullable(String)", None),
        ("Decimal(38, 9)", Decimal("1234567890.123456789")),
    ],
)
def test_bound_parameters_arrive_as_they_are(clickhouse: ClickHouse, kind: str, value: object) -> None:
    with clickhouse.client() as client:
        assert client.query(f"SELECT {{v:{kind}}}", parameters={"v": value}).result_rows == [(value,)]
    with clickhouse.client(form_encode_query_params=True) as client:
        assert client.query(f"SELECT {{v:{kind}}}", parameters={"v": value}).result_rows == [(value,)]


def test_parameterised_views_and_bound_times(clickhouse_database: ClickHouseDatabase) -> None:
    with clickhouse_database.client() as client:
        client.command("CREATE TABLE t (pool String, at DateTime64(3, 'UTC')) ENGINE = MergeTree ORDER BY pool")
        client.command("INSERT INTO t VALUES ('a', '2026-01-01 00:00:00.001'), ('b', '2026-01-01 00:00:00.002')")
        client.command("CREATE VIEW v AS SELECT * FROM t WHERE pool = {pool:String}")
        assert client.query("SELECT pool FROM v(pool = {p:String})", parameters={"p": "b"}).result_rows == [("b",)]
        at = dt.datetime(2026, 1, 1, 0, 0, 0, 2_000, tzinfo=dt.UTC)
        found = client.query("SELECT pool FROM t WHERE at = {at:DateTime64(3, 'UTC')}", parameters={"at_64": at})
        assert found.result_rows == [("b",)]
        assert client.query(
            "SELECT pool FROM t WHERE at >= fromUnixTimestamp64Milli({ms:Int64}, 'UTC')",
            parameters={"ms": int(at.timestamp() * 1000)},
        ).result_rows == [("b",)]


def test_inserts_take_bound_parameters(clickhouse_database: ClickHouseDatabase) -> None:
    with clickhouse_database.client() as client:
        client.command("CREATE TABLE t (a Int64, s String) ENGINE = MergeTree ORDER BY a")
        client.command("INSERT INTO t VALUES ({a:Int64}, {s:String})", parameters={"a": 5, "s": "o'clock\t\\"})
        client.command("INSERT INTO t SELECT {a:Int64}, {s:String}", parameters={"a": 6, "s": "'"})
        assert client.query("SELECT * FROM t ORDER BY a").result_rows == [(5, "o'clock\t\\"), (6, "'")]


def test_a_session_keeps_settings_database_and_temporary_tables(clickhouse_database: ClickHouseDatabase) -> None:
    with clickhouse_database.server.client() as client:
        client.command("SET max_block_size = 1234")
        client.command(f"USE {clickhouse_database.name}")
        assert client.query("SELECT getSetting('max_block_size'), currentDatabase()").first_row == (
            1234,
            clickhouse_database.name,
        )
        assert client.query("SELECT getSetting('max_block_size')", settings={"max_block_size": 99}).first_row == (99,)
        assert client.query("SELECT getSetting('max_block_size')").first_row == (1234,)
        client.command("CREATE TEMPORARY TABLE mine (a Int64)")
        client.insert("mine", [[1], [2]], column_names=["a"], database="")
        assert client.query("SELECT sum(a) FROM mine").first_row == (3,)
        assert client.query("SELECT getSetting('max_block_size')", settings={"max_block_size": 98}).first_row == (98,)
        assert client.query("SELECT getSetting('max_block_size'), currentDatabase()").first_row == (
            1234,
            clickhouse_database.name,
        )
    with clickhouse_database.server.client() as other:
        assert other.query("SELECT getSetting('max_block_size')").first_row != (1234,)
        with pytest.raises(DatabaseError, match="mine"):
            other.query("SELECT * FROM mine")


def test_a_session_serves_one_request_at_a_time(clickhouse: ClickHouse) -> None:
    clients = [clickhouse.client(session_id="shared") for _ in range(2)]
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(
            clients[0].query, "SELECT sleepEachRow(1), number FROM numbers(2) SETTINGS max_block_size = 1"
        )
        time.sleep(0.5)
        with pytest.raises(DatabaseError, match="SESSION_IS_LOCKED"):
            clients[1].query("SELECT 1")
        assert slow.result().row_count == 2
    assert clients[1].query("SELECT 1").first_row == (1,)


def test_external_data_joins_a_query(clickhouse: ClickHouse) -> None:
    with clickhouse.client() as client:
        data = ExternalData(file_name="ids.csv", fmt="CSV", types=["Int64", "String"], data=b"1,a\n2,b\n")
        assert client.query("SELECT sum(_1), max(_2) FROM ids", external_data=data).first_row == (3, "b")
        data = ExternalData(file_name="ids.csv", fmt="CSV", structure=["k Int64"], data=b"1\n2\n")
        found = client.query("SELECT sum(k) FROM ids WHERE k > {k:Int64}", parameters={"k": 1}, external_data=data)
        assert found.first_row == (2,)


def test_an_error_carries_the_servers_code_and_name(clickhouse: ClickHouse) -> None:
    with clickhouse.client() as client, pytest.raises(DatabaseError, match="no_such_table") as caught:
        client.query("SELECT * FROM no_such_table")
    assert (caught.value.code, caught.value.name) == (60, "UNKNOWN_TABLE")


def test_an_error_after_the_first_rows_reaches_the_client(clickhouse: ClickHouse) -> None:
    sql = "SELECT throwIf(number = 30000000, 'too far') FROM numbers(60000000)"
    with (
        clickhouse.client() as client,
        pytest.raises(Exception, match="too far"),
        client.query_row_block_stream(sql) as stream,
    ):
        for _ in stream:
            pass


def test_settings_in_the_url_hold_for_one_query(clickhouse: ClickHouse) -> None:
    with clickhouse.client(settings={"max_threads": 3}) as client:
        assert client.query("SELECT getSetting('max_threads')").first_row == (3,)
        with pytest.raises(DatabaseError, match="UNKNOWN_SETTING"):
            client.raw_query("SELECT 1", settings={"no_such_setting_x": "1"})


def test_the_async_client(clickhouse_database: ClickHouseDatabase) -> None:
    async def run() -> None:
        server = clickhouse_database.server
        client = await clickhouse_connect.get_async_client(
            host=server.host, port=server.port, database=clickhouse_database.name
        )
        async with client:
            await client.command("CREATE TABLE t (a Int64) ENGINE = MergeTree ORDER BY a")
            await client.insert_arrow("t", pa.table({"a": pa.array(range(1000), pa.int64())}))
            await client.insert("t", [[5000]], column_names=["a"])
            assert (await client.query("SELECT count(), max(a) FROM t")).first_row == (1001, 5000)
            assert (await client.query_arrow("SELECT a FROM t")).num_rows == 1001
            counts = await asyncio.gather(*(client.command("SELECT count() FROM t") for _ in range(8)))
            assert counts == [1001] * 8
            with pytest.raises(DatabaseError, match="UNKNOWN_TABLE"):
                await client.query("SELECT * FROM missing")

    asyncio.run(run())


def test_large_results_stream_completely(clickhouse: ClickHouse) -> None:
    with clickhouse.client() as client:
        total = 0
        with client.query_column_block_stream("SELECT number FROM numbers(5000000)") as stream:
            for block in stream:
                total += len(block[0])
        assert total == 5_000_000
        assert len(client.raw_query("SELECT number FROM numbers(1000000)", fmt="JSON")) > 10_000_000


def test_readers_go_on_while_a_writer_writes(clickhouse_database: ClickHouseDatabase) -> None:
    with clickhouse_database.client() as client:
        client.command("CREATE TABLE t (a Int64, b Int64) ENGINE = MergeTree ORDER BY a")
    blocks, rows = 12, 20_000
    table = pa.table({"a": pa.array(range(rows), pa.int64()), "b": pa.array([1] * rows, pa.int64())})

    def write() -> None:
        with clickhouse_database.client() as client:
            for _ in range(blocks):
                client.insert_arrow("t", table)

    def read() -> list[int]:
        with clickhouse_database.client() as client:
            return [int(client.command("SELECT sum(b) FROM t")) for _ in range(20)]  # type: ignore[arg-type]

    with ThreadPoolExecutor(6) as pool:
        writers = [pool.submit(write) for _ in range(2)]
        readers = [pool.submit(read) for _ in range(4)]
        for reader in readers:
            seen = reader.result()
            # Whole blocks only, and never fewer than before.
            assert seen == sorted(seen)
            assert all(count % rows == 0 for count in seen)
        for writer in writers:
            writer.result()
    with clickhouse_database.client() as client:
        assert client.command("SELECT count() FROM t") == 2 * blocks * rows


def test_wrong_data_inserts_nothing(clickhouse_database: ClickHouseDatabase) -> None:
    with clickhouse_database.client() as client:
        client.command("CREATE TABLE t (a Int64) ENGINE = MergeTree ORDER BY a")
        with pytest.raises(DatabaseError) as caught:
            client.raw_insert("t", ["a"], b"1\n2\nthree\n", fmt="CSV")
        assert caught.value.code == 117
        with pytest.raises(DatabaseError, match="CANNOT_DECOMPRESS"):
            client.raw_insert("t", ["a"], b"not lz4 at all", fmt="CSV", compression="lz4")
        assert client.command("SELECT count() FROM t") == 0
