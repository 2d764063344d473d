"""What the server does when it is asked for too much, and how it treats slow clients."""

import gzip
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from gpuledger.local.children import Child, ChildSpec
from tests.local.test_clickhouse_protocol import curl

pytestmark = pytest.mark.services

_SCRIPT = """
import pathlib, sys
from gpuledger.local.clickhouse.engine import Limits
from gpuledger.local.clickhouse.server import configure_logs, serve

configure_logs()
serve(
    pathlib.Path(sys.argv[1]),
    memory_bytes=2**30,
    port_file=pathlib.Path(sys.argv[2]),
    limits=Limits(
        reader_threads=2,
        open_reads=2,
        waiting_writes=2,
        max_sql_bytes=100_000,
        max_body_bytes=1_000_000,
        body_memory_bytes=1_000,
        held_back_bytes=100_000,
        unstreamed_bytes=1_000_000,
        receive_timeout_s=1,
        send_timeout_s=1,
    ),
)
"""


@dataclass(frozen=True)
class Small:
    port: int
    directory: Path
    child: Child

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Small]:
    """A server with limits that a test can reach."""
    directory = tmp_path_factory.mktemp("small")
    port_file = directory / "port"
    argv = [sys.executable, "-c", _SCRIPT, str(directory), str(port_file)]
    child = Child(ChildSpec("clickhouse", argv, directory / "log", ready=port_file.exists))
    child.start()
    try:
        yield Small(int(port_file.read_text()), directory, child)
    finally:
        child.stop()


def _post(port: int, sql: bytes, query: str = "") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    head = f"POST /?{query} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(sql)}\r\n\r\n"
    connection.sendall(head.encode() + sql)
    return connection


def test_too_many_reads_are_refused_and_then_served(small: Small) -> None:
    slow = b"SELECT sleepEachRow(0.1) FROM numbers(15) SETTINGS max_block_size = 1 FORMAT JSON"
    connections = [_post(small.port, slow, f"query_id=busy-{number}") for number in range(2)]
    time.sleep(0.4)
    status, headers, body = curl(small.url, data=b"SELECT 1")
    assert (status, headers["x-clickhouse-exception-code"]) == (503, "202")
    assert headers["retry-after"] == "1"
    assert b"Too many simultaneous reads, maximum: 2" in body
    assert curl(small.url + "ping")[0] == 200
    for connection in connections:
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
        connection.close()
    for _ in range(100):
        if curl(small.url, data=b"SELECT 1")[0] == 200:
            break
        time.sleep(0.05)
    assert curl(small.url, data=b"SELECT 1")[::2] == (200, b"1\n")


def test_too_many_waiting_writes_are_refused_and_those_taken_are_kept(small: Small) -> None:
    curl(small.url, data=b"CREATE TABLE IF NOT EXISTS w (a Int64) ENGINE = MergeTree ORDER BY a")
    slow = b"INSERT INTO w SELECT number + sleepEachRow(0.05) FROM numbers(20) SETTINGS max_block_size = 1"
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: curl(small.url, data=slow), range(6)))
    statuses = sorted(status for status, _, _ in answers)
    assert statuses == [200, 200, 503, 503, 503, 503]
    assert curl(small.url, data=b"SELECT count() FROM w")[2] == b"40\n"


def test_a_write_whose_client_left_before_it_began_is_dropped(small: Small) -> None:
    curl(small.url, data=b"CREATE TABLE IF NOT EXISTS d (a Int64) ENGINE = MergeTree ORDER BY a")
    slow = b"INSERT INTO d SELECT 1 + sleepEachRow(0.1) FROM numbers(12) SETTINGS max_block_size = 1"
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(curl, small.url, data=slow)
        time.sleep(0.4)
        _post(small.port, b"INSERT INTO d VALUES (1000)").close()
        assert first.result()[0] == 200
    assert curl(small.url, data=b"INSERT INTO d VALUES (5)")[0] == 200
    assert curl(small.url, data=b"SELECT count(), max(a) FROM d")[2] == b"13\t5\n"


def test_bodies_and_statements_have_a_limit(small: Small) -> None:
    curl(small.url, data=b"CREATE TABLE IF NOT EXISTS b (a Int64) ENGINE = MergeTree ORDER BY a")
    insert = small.url + "?query=INSERT+INTO+b+FORMAT+TSV"
    too_large = b"1\n" * 600_000
    status, headers, _ = curl(insert, data=too_large)
    assert (status, headers["x-clickhouse-exception-code"]) == (413, "229")
    # A small body that would become a large one.
    bomb = gzip.compress(too_large)
    assert len(bomb) < 10_000
    assert curl("-H", "Content-Encoding: gzip", insert, data=bomb)[0] == 413
    assert curl(small.url, data=b"SELECT '" + b"x" * 200_000 + b"'")[0] == 413
    assert curl(small.url, data=b"SELECT count() FROM b")[2] == b"0\n"
    # Larger than what is kept in memory, smaller than the limit: through a file, of which nothing stays.
    assert curl(insert, data=b"1\n" * 100_000)[0] == 200
    assert curl(small.url, data=b"SELECT count() FROM b")[2] == b"100000\n"
    assert list((small.directory / "spool").iterdir()) == []


def test_results_that_cannot_be_streamed_have_a_limit(small: Small) -> None:
    sql = b"SELECT number FROM numbers(1000000)"
    status, headers, body = curl(small.url, data=sql + b" FORMAT JSON")
    assert (status, headers["x-clickhouse-exception-code"]) == (500, "396")
    assert b"Limit for result exceeded" in body
    # The same rows in a format that can be.
    assert len(curl(small.url, data=sql)[2]) == 6_888_890
    assert len(curl(small.url + "?wait_end_of_query=1", data=sql)[2]) == 6_888_890
    assert curl(small.url + "?max_result_bytes=100000000", data=sql + b" FORMAT JSON")[0] == 200


def test_an_upload_that_stops_ends_with_408(small: Small) -> None:
    with socket.create_connection(("127.0.0.1", small.port), timeout=20) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\nSELECT")
        assert connection.recv(12) == b"HTTP/1.1 408"


def test_a_download_that_stops_is_dropped(small: Small) -> None:
    connection = _post(small.port, b"SELECT number, repeat('x', 1000) FROM numbers(100000000)", "query_id=stalled")
    try:
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
        for _ in range(200):
            if (
                curl(small.url, data=b"SELECT count() FROM system.processes WHERE Settings['log_comment'] = 'stalled'")[
                    2
                ]
                == b"0\n"
            ):
                break
            time.sleep(0.05)
        else:
            pytest.fail("the query of a stalled client goes on")
    finally:
        connection.close()


def test_an_endless_head_is_cut_off(small: Small) -> None:
    with socket.create_connection(("127.0.0.1", small.port), timeout=20) as connection:
        connection.sendall(b"GET /?query=")
        with pytest.raises(OSError):
            for _ in range(1000):
                connection.sendall(b"x" * 65536)


def test_it_stays_well_under_load_and_bad_input(small: Small) -> None:
    garbage = [
        b"\x00" * 100,
        b"'" * 999,
        b"(" * 5000,
        b"/*",
        b"SELECT '",
        b"INSERT INTO",
        b"\xff\xfe",
        b";;;",
        b"SELECT {p:",
    ]
    for text in garbage:
        status, headers, _ = curl(small.url, data=text)
        assert status in (400, 404), (text, status)
        assert headers["x-clickhouse-exception-code"]

    def many(number: int) -> int:
        return curl(small.url, data=f"SELECT {number}".encode())[0]

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(many, range(40))) <= {200, 503}
    assert small.child.poll() is None
    threads = Path(f"/proc/{small.child.pid}/task")
    assert len(list(threads.iterdir())) < 500
    # The engine itself may write a line of its own, for instance where there are no control groups.
    lines = (small.directory / "log").read_text().splitlines()
    log = [json.loads(line) for line in lines if line.startswith("{")]
    assert log
    assert [entry for entry in log if entry["level"] == "error"] == []
    assert subprocess.run(["kill", "-0", str(small.child.pid)], check=False).returncode == 0
