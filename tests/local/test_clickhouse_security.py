"""Who may do what, and what nobody may do."""

import base64
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import clickhouse_connect
import pytest
from clickhouse_connect.driver.exceptions import DatabaseError

from gpuledger.local.clickhouse import EmbeddedClickHouse, Users, UsersError
from gpuledger.local.clickhouse.errors import EngineError
from tests.fixtures.clickhouse import ClickHouse, ClickHouseDatabase
from tests.local.test_clickhouse_protocol import curl

pytestmark = pytest.mark.services

_SECRET = "Pa$$ wörd'\""
_USERS: dict[str, Any] = {
    "writer": {"password": _SECRET},
    "reader": {"password_sha256": hashlib.sha256(b"look").hexdigest(), "readonly": True},
    "tenant_a": {"password": "a", "readonly": True, "row_policies": {"gpuledger.rows_of": "tenant = 'a'"}},
}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedClickHouse]:
    directory = tmp_path_factory.mktemp("guarded")
    with EmbeddedClickHouse(directory, users=_USERS, memory_bytes=2**30) as server:
        yield server


def _client(server: EmbeddedClickHouse, user: str, password: str, **options: Any) -> Any:
    return clickhouse_connect.get_client(
        host="127.0.0.1", port=server.port, username=user, password=password, **options
    )


def test_every_way_to_log_in(guarded: EmbeddedClickHouse) -> None:
    sql = b"SELECT 1"
    with _client(guarded, "writer", _SECRET) as client:
        assert client.command("SELECT 1") == 1
    token = base64.b64encode(b"reader:look").decode()
    assert curl("-H", f"Authorization: Basic {token}", guarded.url, data=sql)[0] == 200
    assert curl("-H", "X-ClickHouse-User: reader", "-H", "X-ClickHouse-Key: look", guarded.url, data=sql)[0] == 200
    assert curl(guarded.url + "/?user=reader&password=look", data=sql)[0] == 200
    # Two at once are refused, as by a server.
    both = curl("-u", "reader:look", "-H", "X-ClickHouse-User: reader", guarded.url, data=sql)
    assert (both[0], both[1]["x-clickhouse-exception-code"]) == (403, "516")


@pytest.mark.parametrize(
    "credentials",
    ["reader:wrong", "reader:", "nobody:look", "default:", "reader:Look", "tenant_a:a", "writer:look"],
)
def test_wrong_credentials_are_refused_alike(guarded: EmbeddedClickHouse, credentials: str) -> None:
    status, headers, body = curl("-u", credentials, guarded.url, data=b"SELECT 1")
    assert (status, headers["x-clickhouse-exception-code"]) == (403, "516")
    user = credentials.split(":")[0]
    assert body.startswith(f"Code: 516. DB::Exception: {user}: Authentication failed".encode())


def test_a_reader_reads_and_nothing_else(guarded: EmbeddedClickHouse) -> None:
    with _client(guarded, "writer", _SECRET) as client:
        client.command("CREATE TABLE IF NOT EXISTS t (a Int64) ENGINE = MergeTree ORDER BY a")
        client.command("INSERT INTO t VALUES (1)")
    with _client(guarded, "reader", "look") as client:
        assert client.query("SELECT a FROM t").result_rows == [(1,)]
        assert client.query_arrow("SELECT a FROM t").num_rows == 1
        for sql in (
            "INSERT INTO t VALUES (2)",
            "CREATE TABLE t2 (a Int8) ENGINE = Memory",
            "CREATE TEMPORARY TABLE t2 (a Int8)",
            "ALTER TABLE t DELETE WHERE 1",
            "TRUNCATE TABLE t",
            "DROP TABLE t",
            "OPTIMIZE TABLE t FINAL",
            "SYSTEM FLUSH LOGS",
            "KILL QUERY WHERE 1",
            "SYSTEM STOP MERGES",
            "UNDROP TABLE t",
            "RENAME TABLE t TO t2",
            "SET readonly = 0",
            "SET max_threads = 1",
            "SELECT 1 SETTINGS readonly = 0",
            "SELECT 1 SETTINGS max_memory_usage = 0",
        ):
            with pytest.raises(DatabaseError) as caught:
                client.command(sql)
            assert caught.value.code in (164, 497), sql
        with pytest.raises(DatabaseError):
            client.insert("t", [[2]], column_names=["a"])
        for sql in ("EXISTS t", "EXPLAIN SELECT 1", "SHOW CREATE TABLE t", "DESCRIBE TABLE t"):
            assert client.command(sql)
        # In its session, too: what it could not set stays unset.
        with pytest.raises(DatabaseError):
            client.command("INSERT INTO t VALUES (2)")
        assert client.command("SELECT count() FROM t") == 1
    # Grafana's driver sends this one for every user.
    query = "/?max_execution_time=30&query=SELECT+getSetting('max_execution_time')"
    assert curl("-u", "reader:look", guarded.url + query)[2] == b"30\n"
    for setting in ("readonly=0", "max_memory_usage=0", "allow_ddl=1"):
        status, headers, _ = curl("-u", "reader:look", f"{guarded.url}/?{setting}", data=b"SELECT 1")
        assert (status, headers["x-clickhouse-exception-code"]) == (500, "164"), setting


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT 1 INTO OUTFILE '{path}'",
        "SELECT 1 into/* */outfile '{path}' FORMAT CSV",
        "(SELECT 1) INTO OUTFILE '{path}' TRUNCATE",
        "WITH 1 AS x SELECT x INTO OUTFILE '{path}'",
        "SHOW TABLES INTO OUTFILE '{path}'",
        "EXPLAIN SELECT 1 INTO OUTFILE '{path}'",
        "INSERT INTO FUNCTION file('{path}', 'CSV', 'a Int8') VALUES (1)",
        "INSERT INTO FUNCTION file('{path}', 'CSV', 'a Int8') SELECT 1",
        "CREATE TABLE out_of_here ENGINE = File(CSV, '{path}') AS SELECT 1 AS a",
        "BACKUP TABLE t TO File('{path}')",
    ],
)
def test_nobody_writes_files(clickhouse_database: ClickHouseDatabase, tmp_path: Path, sql: str) -> None:
    target = tmp_path / "written"
    with clickhouse_database.client() as client:
        client.command("CREATE TABLE t (a Int8) ENGINE = MergeTree ORDER BY a")
        with pytest.raises(DatabaseError) as caught:
            client.command(sql.format(path=target))
        assert caught.value.code in (48, 62, 358, 497), caught.value
    assert not target.exists()


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM file('{path}', LineAsString)",
        "SELECT file('{path}')",
        "SELECT * FROM `{path}`",
        "SELECT * FROM default.`{path}`",
        "INSERT INTO t FROM INFILE '{path}' FORMAT LineAsString",
        "CREATE TABLE in_here (line String) ENGINE = File(LineAsString, '{path}')",
        "SELECT * FROM url('file://{path}', LineAsString)",
        "SELECT * FROM url('http://127.0.0.1:9/', LineAsString, 'a String')",
        "SELECT * FROM s3('http://127.0.0.1:9/bucket/key', 'LineAsString', 'a String')",
        "SELECT * FROM remote('127.0.0.1:9', system.one)",
        "SELECT * FROM mysql('127.0.0.1:9', 'a', 'b', 'c', 'd')",
        "SELECT * FROM executable('cat', LineAsString, 'a String')",
        "SELECT * FROM Python(app)",
        "SELECT * FROM `python`(app)",
        "SELECT * FROM fileCluster('default', '{path}', LineAsString)",
        "CREATE DICTIONARY d (a UInt64, b String) PRIMARY KEY a SOURCE(FILE(path '{path}' format 'CSV'))"
        " LAYOUT(FLAT()) LIFETIME(0)",
        "CREATE DICTIONARY d (a UInt64, b String) PRIMARY KEY a SOURCE(HTTP(url 'http://127.0.0.1:9' format 'CSV'))"
        " LAYOUT(FLAT()) LIFETIME(0)",
        "CREATE TABLE on_disk (a Int8) ENGINE = MergeTree ORDER BY a"
        " SETTINGS disk = disk(type = local, path = '/tmp/elsewhere/')",
    ],
)
def test_nobody_reads_files_or_other_servers(clickhouse_database: ClickHouseDatabase, tmp_path: Path, sql: str) -> None:
    secret = tmp_path / "secret.csv"
    secret.write_text("1,top secret\n")
    with clickhouse_database.client() as client:
        client.command("CREATE TABLE t (line String) ENGINE = MergeTree ORDER BY line")
        with pytest.raises(DatabaseError) as caught:
            client.command(sql.format(path=secret))
        assert "top secret" not in str(caught.value)
        assert caught.value.code in (46, 60, 81, 497, 701), caught.value
        assert client.command("SELECT count() FROM t") == 0


@pytest.mark.parametrize(
    "sql",
    [
        "CREATE TABLE k (a Int8) ENGINE = Kafka('127.0.0.1:9', 't', 'g', 'CSV')",
        "CREATE TABLE k (a Int8) ENGINE = Kafka SETTINGS kafka_broker_list = '127.0.0.1:9', kafka_topic_list = 't',"
        " kafka_group_name = 'g', kafka_format = 'CSV'",
        "ATTACH TABLE k (a Int8) ENGINE = Kafka('127.0.0.1:9', 't', 'g', 'CSV')",
        "CREATE TABLE k (a Int8) ENGINE = URL('http://127.0.0.1:9', CSV)",
        "CREATE DATABASE k ENGINE = PostgreSQL('127.0.0.1:9', 'a', 'b', 'c')",
        "CREATE DATABASE k ENGINE = Filesystem('/')",
        "CREATE USER k",
        "GRANT ALL ON *.* TO default",
        "EXECUTE AS default SELECT 1",
        "SYSTEM SHUTDOWN",
        "SYSTEM KILL",
    ],
)
def test_nobody_makes_what_would_harm_the_directory_or_the_process(
    clickhouse_database: ClickHouseDatabase, sql: str
) -> None:
    with clickhouse_database.client() as client:
        with pytest.raises(DatabaseError) as caught:
            client.command(sql)
        assert caught.value.code in (48, 344, 497), caught.value
        assert client.command("SELECT count() FROM system.tables WHERE name = 'k'") == 0


def test_definers_see_their_rows_only(guarded: EmbeddedClickHouse) -> None:
    with _client(guarded, "writer", _SECRET) as client:
        client.command("CREATE TABLE IF NOT EXISTS rows_of (tenant String, v Int64) ENGINE = MergeTree ORDER BY tenant")
        client.command("INSERT INTO rows_of VALUES ('a', 1), ('b', 2)")
        client.command(
            "CREATE OR REPLACE VIEW seen_by_a DEFINER = tenant_a SQL SECURITY DEFINER AS SELECT * FROM rows_of"
        )
        assert client.query("SELECT * FROM seen_by_a").result_rows == [("a", 1)]
        assert client.command("SELECT count() FROM rows_of") == 2


def test_memory_of_a_query_is_limited(guarded: EmbeddedClickHouse) -> None:
    with _client(guarded, "writer", _SECRET) as client:
        with pytest.raises(DatabaseError) as caught:
            client.command("SELECT length(groupArray(repeat('x', 1000))) FROM numbers(3000000)")
        assert caught.value.code == 241
        assert client.command("SELECT 1") == 1


def test_passwords_are_in_no_log(guarded: EmbeddedClickHouse) -> None:
    curl("-u", "reader:super-secret-1", guarded.url, data=b"SELECT 1")
    curl(guarded.url + "/?user=reader&password=super-secret-2", data=b"SELECT 1")
    log = guarded.log_file.read_text()
    assert "super-secret" not in log
    assert "wörd" not in log


def test_fsync_is_on(clickhouse: ClickHouse) -> None:
    with clickhouse.client() as client:
        rows = client.query("SELECT name, value FROM system.merge_tree_settings WHERE name LIKE 'fsync_%'").result_rows
    assert sorted(map(tuple, rows)) == [("fsync_after_insert", "1"), ("fsync_part_directory", "1")]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "at least one user"),
        ({"a": {"password": ""}}, r"users\.a\.password"),
        ({"a": {"password": 5}}, r"users\.a\.password"),
        ({"a": {"password_sha256": "abc"}}, r"users\.a\.password_sha256.*64 hexadecimal"),
        ({"a": {"password": "x", "password_sha256": "0" * 64}}, "not both"),
        ({"a": {"readonly": "yes"}}, r"users\.a\.readonly.*'yes'"),
        ({"a": {"pasword": "x"}}, r"users\.a\.pasword: unknown field"),
        ({"a": []}, r"users\.a: expected a mapping"),
        ({"a b": {"row_policies": {"d.t": "1"}}}, "letters, digits"),
        ({"a": {"row_policies": {"t": "1"}}}, r"users\.a\.row_policies"),
    ],
)
def test_a_wrong_users_file_names_the_field(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UsersError, match=message):
        Users.parse(config)


def test_users_without_password_stay_on_loopback() -> None:
    Users.parse(None).check_host("127.0.0.1")
    Users.parse(None).check_host("::1")
    with pytest.raises(UsersError, match=r"users\.default.*loopback only.*0\.0\.0\.0"):
        Users.parse(None).check_host("0.0.0.0")
    Users.parse({"a": {"password": "x"}}).check_host("0.0.0.0")


def test_nested_engine_errors_are_unwrapped() -> None:
    raised = RuntimeError(
        "Streaming query failed: Code: 164. DB::Exception: Code: 164. DB::Exception: Cannot modify 'a'. (READONLY)"
        " (version 26.9.2.1). (READONLY)"
    )
    error = EngineError.from_engine(raised)
    assert (error.code, error.text) == (164, "Code: 164. DB::Exception: Cannot modify 'a'. (READONLY)")
