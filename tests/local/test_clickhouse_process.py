"""The process: starting, stopping, dying, and what is on disk afterwards."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import clickhouse_connect
import pyarrow as pa
import pytest
from clickhouse_connect.driver import Client
from clickhouse_connect.driver.exceptions import Error

from gpuledger.local.clickhouse import EmbeddedClickHouse
from gpuledger.local.clickhouse.parts import Parts
from gpuledger.local.clickhouse.users import KEEP_MERGED_S
from gpuledger.local.exceptions import DirectoryInUse, PortTaken, ServiceFailed
from gpuledger.streams.store import is_io_error
from tests.faults.disks import LimitedDisk
from tests.local.processes import ProcessHandle

pytestmark = pytest.mark.services

_MEMORY_BYTES = 2**30


def _server(directory: Path, port: int = 0) -> EmbeddedClickHouse:
    return EmbeddedClickHouse(directory, port, memory_bytes=_MEMORY_BYTES)


def _client(server: EmbeddedClickHouse) -> Client:
    return clickhouse_connect.get_client(host="127.0.0.1", port=server.port, autogenerate_session_id=False)


def _count(server: EmbeddedClickHouse, sql: str) -> int:
    with _client(server) as client:
        return int(str(client.command(sql)))


def test_data_survives_a_restart(tmp_path: Path) -> None:
    server = _server(tmp_path)
    with server:
        _count(server, "SELECT 1")
        with _client(server) as client:
            client.command("CREATE TABLE t (a Int64) ENGINE = MergeTree ORDER BY a")
            client.insert("t", [[1], [2]], column_names=["a"])
    assert server.poll() == 0
    with server:
        assert _count(server, "SELECT sum(a) FROM t") == 3


def test_a_directory_in_use_names_the_holder(tmp_path: Path) -> None:
    with _server(tmp_path) as server, pytest.raises(DirectoryInUse) as caught:
        _server(tmp_path).start()
    assert caught.value.pid == server.pid


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortTaken, match=str(port)):
            _server(tmp_path / "a", port=port).start()
        command = [
            sys.executable,
            "-m",
            "gpuledger.local.clickhouse",
            "--data",
            str(tmp_path / "b"),
            "--port",
            str(port),
        ]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert f"127.0.0.1:{port}" in ended.stderr


def test_the_command_line_refuses_an_open_port_without_passwords(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gpuledger.local.clickhouse", "--data", str(tmp_path), "--host", "0.0.0.0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert "users.default" in ended.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_even_while_queries_run(tmp_path: Path, number: signal.Signals) -> None:
    server = _server(tmp_path)
    server.start()
    try:
        # One that answers nothing yet and one whose client takes nothing.
        for sql in (
            b"SELECT count() FROM numbers(100000000000) WHERE NOT ignore(sipHash64(number)) FORMAT JSON",
            b"SELECT number FROM numbers(100000000000)",
        ):
            connection = socket.create_connection(("127.0.0.1", server.port))
            connection.sendall(b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n%s" % (len(sql), sql))
        with ProcessHandle(server.pid) as process:
            time.sleep(0.5)
            os.kill(server.pid, number)
            assert process.ended(10)
    finally:
        server.stop(0)
    with server:
        assert _count(server, "SELECT 1") == 1


def test_it_dies_with_its_parent(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib\n"
        "from gpuledger.local.clickhouse import EmbeddedClickHouse\n"
        f"server = EmbeddedClickHouse(pathlib.Path({str(tmp_path)!r}), memory_bytes={_MEMORY_BYTES})\n"
        "server.start()\n"
        "print(server.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        with ProcessHandle(int(parent.stdout.readline())) as child:
            parent.kill()
            assert child.ended(10)
    finally:
        parent.kill()
        parent.wait()
        assert parent.stdout is not None
        parent.stdout.close()


def test_kill_9_during_inserts_loses_nothing_acknowledged(tmp_path: Path) -> None:
    rows = 2_000
    acknowledged: list[int] = []
    attempted = 0
    server = _server(tmp_path)
    for round_number in range(4):
        server.start()
        with _client(server) as client:
            client.command(
                "CREATE TABLE IF NOT EXISTS blocks (block Int64, row Int64, s String) ENGINE = MergeTree ORDER BY block"
            )
            killer = threading.Timer(0.4 + 0.2 * round_number, server.kill)
            killer.start()
            try:
                while True:
                    block = attempted
                    attempted += 1
                    client.insert_arrow(
                        "blocks",
                        pa.table(
                            {
                                "block": pa.array([block] * rows, pa.int64()),
                                "row": pa.array(range(rows), pa.int64()),
                                "s": pa.array([f"row-{row}" for row in range(rows)]),
                            }
                        ),
                    )
                    acknowledged.append(block)
            except Error:
                # The kill.
                killer.join()
        server.stop()
    with server, _client(server) as client:
        found = client.query(
            "SELECT block, count(), uniqExact(row) FROM blocks GROUP BY block ORDER BY block"
        ).result_rows
    assert len(acknowledged) > 20
    assert set(acknowledged) <= {block for block, _, _ in found}
    # Whole or not at all; never twice: clickhouse-connect does not repeat an insert whose answer it did not get.
    assert {(count, distinct) for _, count, distinct in found} == {(rows, rows)}


def test_a_failed_start_shows_the_log(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("not a directory")
    with pytest.raises(ServiceFailed):
        _server(tmp_path).start()


def test_what_a_full_disk_takes_is_refused_and_the_rest_is_there(tmp_path: Path) -> None:
    """No insert is acknowledged that is not stored: here our process itself has no room for the data."""
    disk = LimitedDisk(tmp_path)
    with _server(tmp_path) as server, _client(server) as client:
        client.command("CREATE TABLE t (a Int64, s String) ENGINE = MergeTree ORDER BY a")
        stored, refused = 0, 0
        for full in (False, True, False):
            disk.fill(server.pid) if full else disk.free(server.pid)
            for rows in (10, 5_000, 50_000):
                table = pa.table({"a": range(rows), "s": [os.urandom(16).hex() for _ in range(rows)]})
                try:
                    client.insert_arrow("t", table)
                    stored += rows
                except Error as error:
                    assert is_io_error(error), error
                    refused += 1
        assert refused == 2
        assert client.query("SELECT count(), sum(length(s)) FROM t").result_rows == [(stored, stored * 32)]


def test_an_insert_that_the_engine_takes_for_written_is_refused_where_the_disk_did_not_take_it(tmp_path: Path) -> None:
    """The limit of file size fails the engine's writes as a full disk does; it does not notice."""
    disk = LimitedDisk(tmp_path)
    server = _server(tmp_path)
    with server, _client(server) as client:
        client.command("CREATE TABLE t (a Int64, s String) ENGINE = MergeTree ORDER BY a")
        client.command("INSERT INTO t SELECT number, toString(rand64()) FROM numbers(100000)")
        disk.fill(server.pid)
        with pytest.raises(Error, match=r"part \S+ of gpuledger.t has \d+ of \d+ bytes on the disk") as caught:
            client.command("INSERT INTO t SELECT number, toString(rand64()) FROM numbers(100000)")
        assert is_io_error(caught.value), caught.value
        _wait_for_end(server)
    assert server.poll() == 1
    assert "make room and start again" in str(server.failure())
    with server:
        assert _count(server, "SELECT count() FROM t WHERE NOT ignore(*)") == 100_000


@pytest.mark.parametrize("asked", [True, False], ids=["optimize", "by itself"])
def test_a_merge_that_the_disk_did_not_take_is_undone_by_the_next_start(tmp_path: Path, asked: bool) -> None:
    disk = LimitedDisk(tmp_path)
    server = _server(tmp_path)
    with server, _client(server) as client:
        client.command("CREATE TABLE t (a Int64, s String) ENGINE = MergeTree ORDER BY a")
        client.command("SYSTEM STOP MERGES t")
        for _ in range(20):
            client.command("INSERT INTO t SELECT number, toString(rand64()) FROM numbers(1000)")
        disk.fill(server.pid)
        client.command("SYSTEM START MERGES t")
        if asked:
            with pytest.raises(Error, match=r"part \S+ of gpuledger.t "):
                client.command("OPTIMIZE TABLE t FINAL")
        _wait_for_end(server)
    assert server.poll() == 1
    with server:
        assert _count(server, "SELECT count() FROM t WHERE NOT ignore(*)") == 20_000


def test_what_was_merged_stays_long_enough_to_look_at_the_merge(tmp_path: Path) -> None:
    """chDB's default of 0 deletes it with the next cleaning: half a minute later in an idle engine."""
    with _server(tmp_path) as server:
        kept_s = _count(server, "SELECT value FROM system.merge_tree_settings WHERE name = 'old_parts_lifetime'")
    assert kept_s == KEEP_MERGED_S > 60


def test_whole_parts_of_every_kind_are_not_taken_for_short(tmp_path: Path) -> None:
    wide = "min_bytes_for_wide_part = 1, min_rows_for_wide_part = 1"
    columns = "k UInt64, n Nullable(Int64), l LowCardinality(String), a Array(String), d DateTime64(3), s String"
    row = "number, if(number % 2, NULL, 7), 'x', if(number % 3, [], ['a']), now(), ''"
    with _server(tmp_path) as server, _client(server) as client:
        for table, settings in (("compact", ""), ("wide", f"SETTINGS {wide}")):
            client.command(
                f"CREATE TABLE {table} ({columns}, INDEX i n TYPE minmax, PROJECTION p (SELECT l, count() GROUP BY l)) "
                "ENGINE = MergeTree PARTITION BY k % 3 ORDER BY k " + settings
            )
            for rows in (0, 1, 10, 20_000):
                client.command(f"INSERT INTO {table} SELECT {row} FROM numbers({rows})")
            for statement in (
                "OPTIMIZE TABLE {} FINAL",
                "ALTER TABLE {} ADD COLUMN more Int64 DEFAULT 3",
                "ALTER TABLE {} UPDATE s = 'long' WHERE k < 5 SETTINGS mutations_sync = 2",
                "ALTER TABLE {} DELETE WHERE k % 3 = 1 SETTINGS mutations_sync = 2",
                "ALTER TABLE {} DROP PROJECTION p SETTINGS mutations_sync = 2",
                "DELETE FROM {} WHERE k = 3",
                "ALTER TABLE {} DETACH PARTITION 0",
                "ALTER TABLE {} ATTACH PARTITION 0",
                "ALTER TABLE {} DROP PARTITION 2",
                "OPTIMIZE TABLE {} FINAL",
            ):
                client.command(statement.format(table))
            assert _count(server, f"SELECT count() FROM {table}") > 6_000
            client.command(f"TRUNCATE TABLE {table}")
            client.command(f"INSERT INTO {table} (k) VALUES (1)")
            assert _count(server, f"SELECT count() FROM {table}") == 1
        time.sleep(5)  # merges of its own, and looks at them
        assert server.poll() is None


def test_every_file_of_a_part_is_missed_when_it_is_cut(tmp_path: Path) -> None:
    with _server(tmp_path) as server, _client(server) as client:
        client.command(
            "CREATE TABLE t (a Int64, s Nullable(String)) ENGINE = MergeTree ORDER BY a "
            "SETTINGS min_bytes_for_wide_part = 1, min_rows_for_wide_part = 1"
        )
        client.command("INSERT INTO t SELECT number, toString(rand64()) FROM numbers(1000)")
        row = client.query("SELECT path, bytes_on_disk FROM system.parts WHERE active AND table = 't'").result_rows[0]
    part, counted = Path(str(row[0])), str(row[1])
    made = False

    def parts(_sql: str) -> bytes:
        return json.dumps({"name": "t", "path": str(part), "bytes": counted}).encode() if made else b""

    looked = 0
    for file in sorted(part.iterdir()):
        whole = file.read_bytes()
        for size in {0, len(whole) // 2, len(whole) - 1} if len(whole) > 20 else {0}:
            made = False
            finder = Parts(parts)
            made = True
            file.write_bytes(whole[:size])
            assert file.name in str(finder.find_short()) or "bytes on the disk" in str(finder.find_short()), file.name
            file.write_bytes(whole)
            assert finder.find_short() is None
            looked += 1
    assert looked > 20


def _wait_for_end(server: EmbeddedClickHouse) -> None:
    until_s = time.monotonic() + 60
    while server.poll() is None and time.monotonic() < until_s:
        time.sleep(0.1)
