"""The HTTP protocol itself, as curl sees it."""

import gzip
import json
import socket
import subprocess
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from clickhouse_connect.driver.exceptions import DatabaseError

from gpuledger.local.clickhouse.errors import CODES
from tests.fixtures.clickhouse import ClickHouse, ClickHouseDatabase

pytestmark = pytest.mark.services


def curl(*arguments: str, data: bytes | None = None) -> tuple[int, dict[str, str], bytes]:
    """(status, headers in lower case, body)."""
    command = ["curl", "-sS", "-i", "--max-time", "30", *arguments]
    if data is not None:
        command += ["--data-binary", "@-"]
    output = subprocess.run(command, input=data, capture_output=True, check=True).stdout
    head, _, body = output.partition(b"\r\n\r\n")
    while head.startswith(b"HTTP/1.1 100"):
        head, _, body = body.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    return int(lines[0].split()[1]), headers, body


def test_ping_and_root_need_no_query(clickhouse: ClickHouse) -> None:
    for path in ("/ping", "/", "/replicas_status"):
        assert curl(clickhouse.url + path)[::2] == (200, b"Ok.\n")
    assert curl(clickhouse.url + "/nowhere")[0] == 404
    assert curl("-X", "DELETE", clickhouse.url + "/")[0] == 405


def test_get_and_post_with_headers(clickhouse: ClickHouse) -> None:
    status, headers, body = curl(clickhouse.url + "/?query=SELECT+1+AS+a+FORMAT+JSONEachRow&query_id=mine-1")
    assert (status, json.loads(body)) == (200, {"a": 1})
    assert headers["x-clickhouse-query-id"] == "mine-1"
    assert headers["x-clickhouse-format"] == "JSONEachRow"
    assert headers["x-clickhouse-timezone"] == "UTC"
    assert headers["x-clickhouse-server-display-name"] == "gpuledger"
    assert headers["content-type"].startswith("application/x-ndjson")
    assert json.loads(headers["x-clickhouse-summary"])["result_rows"] == "1"
    assert curl(clickhouse.url, data=b"SELECT 1, 'a\\tb' -- why\n;")[2] == b"1\ta\\tb\n"
    # A query in the URL and more of it in the body belong together.
    assert curl(clickhouse.url + "/?query=SELECT", data=b"7")[2] == b"7\n"
    assert curl("-H", "X-ClickHouse-Format: CSV", clickhouse.url, data=b"SELECT 'a'")[2] == b'"a"\n'
    assert curl(clickhouse.url + "/?default_format=JSONCompactEachRow", data=b"SELECT 1")[2] == b"[1]\n"


def test_parameters_come_in_the_url_and_in_forms(clickhouse: ClickHouse) -> None:
    assert curl(clickhouse.url + "/?param_v=a%5Ctb", data=b"SELECT {v:String}")[2] == b"a\\tb\n"
    found = curl("-F", "query=SELECT {a:Int64} + {b:Int64}", "-F", "param_a=1", clickhouse.url + "/?param_b=2")
    assert found[::2] == (200, b"3\n")
    status, headers, body = curl(clickhouse.url + "/?param_v=x", data=b"SELECT {v:Int64}")
    assert (status, headers["x-clickhouse-exception-code"]) == (500, "457")
    assert b"BAD_QUERY_PARAMETER" in body


@pytest.mark.parametrize(
    ("sql", "status", "code"),
    [
        (b"SELEC 1", 400, 62),
        (b"", 400, 62),
        (b"SELECT no_such_column", 404, 47),
        (b"SELECT * FROM no_such_table", 404, 60),
        (b"SELECT * FROM no_such_database.t", 404, 81),
        (b"SELECT no_such_function(1)", 404, 46),
        (b"SELECT 1 FORMAT NoSuchFormat", 404, 73),
        (b"SELECT throwIf(1)", 500, 395),
        (b"SELECT 1; SELECT 2", 400, 62),
        (b"SELECT sleepEachRow(0.1) FROM numbers(100) SETTINGS max_execution_time = 0.5, max_block_size = 2", 408, 159),
    ],
)
def test_errors_have_the_servers_status_and_code(clickhouse: ClickHouse, sql: bytes, status: int, code: int) -> None:
    got, headers, body = curl(clickhouse.url + "/?wait_end_of_query=1", data=sql)
    assert (got, headers["x-clickhouse-exception-code"]) == (status, str(code))
    assert body.startswith(f"Code: {code}. DB::Exception: ".encode())
    assert body.rstrip().endswith(b"(official build))")


def test_the_numbers_of_errors_are_the_engines(clickhouse: ClickHouse) -> None:
    with clickhouse.client() as client:
        rows = client.query("SELECT errorCodeToName(number), number FROM numbers(1, 2000)").result_rows
    known = {str(row[0]): row[1] for row in rows}
    assert {name: known.get(name) for name in CODES} == CODES


@pytest.mark.parametrize(
    "body",
    [
        b'INSERT INTO t FORMAT JSONEachRow\n{"a": 1, "s": "x"}\n{"a": 2, "s": "y; SELECT 1"}',
        b"INSERT INTO t (a, s) VALUES (1, 'x'), (2, 'y; SELECT 1')",
        b"INSERT INTO t\nFORMAT CSV\n1,x\n2,y; SELECT 1\n",
        b"INSERT INTO t SELECT 1, 'x' UNION ALL SELECT 2, 'y; SELECT 1'",
        b"INSERT INTO t SETTINGS max_insert_block_size = 10 FORMAT TSV\n1\tx\n2\ty; SELECT 1\n",
        b"WITH 'y; SELECT 1' AS y INSERT INTO t SELECT 1 + number, if(number = 0, 'x', y) FROM numbers(2)",
    ],
)
def test_every_kind_of_insert(clickhouse_database: ClickHouseDatabase, body: bytes) -> None:
    url = f"{clickhouse_database.url}/?database={clickhouse_database.name}"
    assert curl(url, data=b"CREATE TABLE t (a Int64, s String) ENGINE = MergeTree ORDER BY a")[0] == 200
    status, headers, answer = curl(url, data=body)
    assert (status, answer) == (200, b"")
    assert json.loads(headers["x-clickhouse-summary"])["written_rows"] == "2"
    assert "x-clickhouse-format" not in headers
    assert curl(url, data=b"SELECT * FROM t ORDER BY a")[2] == b"1\tx\n2\ty; SELECT 1\n"


def test_an_insert_that_its_table_refuses_is_an_error(clickhouse_database: ClickHouseDatabase) -> None:
    url = f"{clickhouse_database.url}/?database={clickhouse_database.name}"
    curl(url, data=b"CREATE TABLE t (a Int64, CONSTRAINT positive CHECK a > 0) ENGINE = MergeTree ORDER BY a")
    status, headers, body = curl(url, data=b"INSERT INTO t FORMAT TSV\n1\n-1\n")
    assert (status, headers["x-clickhouse-exception-code"]) == (500, "469"), body
    assert curl(url, data=b"INSERT INTO t FORMAT TSV\n1\n")[0] == 200
    status, headers, body = curl(f"{url}&parts_to_throw_insert=1", data=b"INSERT INTO t FORMAT TSV\n2\n")
    assert (status, headers["x-clickhouse-exception-code"]) == (500, "252"), body
    assert curl(url, data=b"SELECT a FROM t")[2] == b"1\n"


def test_compressed_bodies_and_answers(clickhouse_database: ClickHouseDatabase) -> None:
    url = f"{clickhouse_database.url}/?database={clickhouse_database.name}"
    curl(url, data=b"CREATE TABLE t (a Int64) ENGINE = MergeTree ORDER BY a")
    rows = b"".join(b"%d\n" % number for number in range(300_000))
    status, _, answer = curl(
        "-H", "Content-Encoding: gzip", url + "&query=INSERT+INTO+t+FORMAT+TSV", data=gzip.compress(rows)
    )
    assert (status, answer) == (200, b"")
    query = url + "&query=SELECT+a+FROM+t+ORDER+BY+a"
    _, headers, answer = curl("-H", "Accept-Encoding: gzip", query + "&enable_http_compression=1")
    assert headers["content-encoding"] == "gzip"
    assert gzip.decompress(answer) == rows
    assert curl("-H", "Accept-Encoding: gzip", query)[1]["content-encoding"] == "gzip"
    assert "content-encoding" not in curl(query)[1]
    assert "content-encoding" not in curl("-H", "Accept-Encoding: gzip", query + "&enable_http_compression=0")[1]
    status, _, answer = curl("-H", "Content-Encoding: gzip", url + "&query=INSERT+INTO+t+FORMAT+TSV", data=b"1\n")
    assert (status, b"CANNOT_DECOMPRESS" in answer) == (400, True)
    cut = gzip.compress(rows)[:-20]
    assert curl("-H", "Content-Encoding: gzip", url + "&query=INSERT+INTO+t+FORMAT+TSV", data=cut)[0] == 400
    assert curl("-H", "Content-Encoding: brotli2", url, data=b"x")[0] == 415
    assert curl(url + "&compress=1", data=b"SELECT 1")[0] == 501
    assert curl(url, data=b"SELECT count() FROM t")[2] == b"300000\n"


def test_get_changes_nothing(clickhouse_database: ClickHouseDatabase) -> None:
    url = f"{clickhouse_database.url}/?database={clickhouse_database.name}"
    status, headers, _ = curl(url + "&query=CREATE+TABLE+t+(a+Int8)+ENGINE=Memory")
    assert (status, headers["x-clickhouse-exception-code"]) == (500, "164")
    assert curl(url, data=b"EXISTS t")[2] == b"0\n"


def test_an_error_within_the_body_ends_it_with_the_exception_block(clickhouse: ClickHouse) -> None:
    status, headers, body = curl(
        clickhouse.url, data=b"SELECT throwIf(number = 20000000, 'late') FROM numbers(40000000)"
    )
    assert status == 200
    tag = headers["x-clickhouse-exception-tag"].encode()
    block = body[body.index(b"\r\n__exception__\r\n" + tag) :]
    assert block.endswith(tag + b"\r\n__exception__\r\n")
    message = block.split(b"\r\n", 3)[3].rsplit(b"\n", 3)[0]
    assert message.startswith(b"Code: 395. DB::Exception: late")
    length = int(block.rstrip().split(b"\r\n")[-2].split(b"\n")[-1].split()[0])
    assert block.split(tag + b"\r\n", 1)[1][:length].startswith(b"Code: 395.")


def test_totals_and_extremes_are_complete(clickhouse: ClickHouse) -> None:
    sql = b"SELECT number % 2 AS k, count() FROM numbers(10) GROUP BY k WITH TOTALS ORDER BY k"
    assert curl(clickhouse.url, data=sql)[2] == b"0\t5\n1\t5\n\n0\t10\n"
    assert curl(clickhouse.url + "/?extremes=1", data=b"SELECT number FROM numbers(3)")[2] == b"0\n1\n2\n\n0\n2\n"


@pytest.mark.parametrize("output_format", ["TabSeparatedWithNames", "CSVWithNames", "RowBinaryWithNamesAndTypes"])
def test_formats_with_headers_have_one(clickhouse: ClickHouse, output_format: str) -> None:
    body = curl(clickhouse.url, data=f"SELECT number AS header FROM numbers(200000) FORMAT {output_format}".encode())[2]
    assert body.count(b"header") == 1
    assert len(body) > 200_000


def test_the_hello_of_clickhouse_go(clickhouse: ClickHouse) -> None:
    sql = b"SELECT displayName(), version(), revision(), timezone()"
    body = curl(clickhouse.url, data=sql)[2].split(b"\t")
    assert body[0] == b"gpuledger"
    assert body[2:] == [b"0", b"UTC\n"]
    # As clickhouse-go sends it: the block has its info and each column its kind of serialisation.
    url = (
        clickhouse.url + "/?client_protocol_version=54460&default_format=Native&database=default&max_execution_time=60"
    )
    block = curl(url, data=sql)[2]
    assert block.startswith(b"\x01\x00\x02\xff\xff\xff\xff\x00\x04\x01\x0ddisplayName()\x06String\x00\x09gpuledger")
    assert block.endswith(b"\x0arevision()\x06UInt32\x00\x00\x00\x00\x00\x0atimezone()\x06String\x00\x03UTC")
    # Told revision 0, it reads everything else in the plain encoding.
    assert curl(url, data=b"SELECT toInt8(7) AS a")[2] == b"\x01\x01\x01a\x04Int8\x07"


def test_a_query_is_killed_by_its_id(clickhouse: ClickHouse) -> None:
    caught: list[DatabaseError] = []

    def run() -> None:
        with clickhouse.client() as client:
            try:
                client.query(
                    "SELECT sleepEachRow(0.01), number FROM numbers(100000) SETTINGS max_block_size = 10",
                    settings={"query_id": "to-be-killed"},
                )
            except DatabaseError as error:
                caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    with clickhouse.client() as client:
        for _ in range(100):
            if client.command("SELECT count() FROM system.processes WHERE Settings['log_comment'] = 'to-be-killed'"):
                break
            time.sleep(0.05)
        killed = str(client.command("KILL QUERY WHERE query_id = 'to-be-killed' SYNC"))
    assert "sleepEachRow" in killed or "finished" in killed
    thread.join(20)
    assert not thread.is_alive()
    assert caught
    assert caught[0].code == 394


def test_a_client_that_leaves_ends_its_query(clickhouse: ClickHouse) -> None:
    sql = "SELECT sleepEachRow(0.01), number FROM numbers(100000) SETTINGS max_block_size = 10 FORMAT JSON"
    with socket.create_connection(("127.0.0.1", clickhouse.port)) as connection:
        request = f"POST /?query_id=leaver HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(sql)}\r\n\r\n{sql}"
        connection.sendall(request.encode())
        assert _eventually(clickhouse, "leaver", running=True)
    assert _eventually(clickhouse, "leaver", running=False)


def _eventually(clickhouse: ClickHouse, tag: str, *, running: bool) -> bool:
    with clickhouse.client() as client:
        for _ in range(200):
            sql = "SELECT count() FROM system.processes WHERE Settings['log_comment'] = {tag:String}"
            if bool(client.command(sql, parameters={"tag": tag})) == running:
                return True
            time.sleep(0.05)
    return False


def test_stalled_downloads_hold_no_reader(clickhouse: ClickHouse) -> None:
    sql = b"SELECT number, repeat('x', 1000) FROM numbers(100000000)"
    stalled: list[socket.socket] = []
    try:
        for _ in range(8):
            connection = socket.create_connection(("127.0.0.1", clickhouse.port))
            stalled.append(connection)
            connection.sendall(b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n%s" % (len(sql), sql))
        # More than there are reader threads; each has begun to answer.
        for connection in stalled:
            connection.settimeout(20)
            assert connection.recv(15) == b"HTTP/1.1 200 OK"
        for _ in range(10):
            with urllib.request.urlopen(clickhouse.url + "/?query=SELECT+1", timeout=20) as answer:
                assert answer.read() == b"1\n"
    finally:
        for connection in stalled:
            connection.close()


def test_a_web_page_of_another_origin_is_refused(clickhouse: ClickHouse) -> None:
    assert curl("-H", "Origin: http://evil.example", clickhouse.url, data=b"SELECT 1")[0] == 403
    assert curl("-H", "Host: evil.example", clickhouse.url, data=b"SELECT 1")[0] == 403
    assert curl("-H", f"Origin: {clickhouse.url}", clickhouse.url, data=b"SELECT 1")[0] == 200
    assert curl(clickhouse.url.replace("127.0.0.1", "localhost"), data=b"SELECT 1")[0] == 200


def test_a_header_cannot_be_smuggled_through_the_query_id(clickhouse: ClickHouse) -> None:
    status, headers, _ = curl(clickhouse.url + "/?query=SELECT+1&query_id=a%0D%0AX-Evil:%201")
    assert status == 200
    assert "x-evil" not in headers
    assert headers["x-clickhouse-query-id"] == "aX-Evil: 1"


def test_a_large_upload_waits_in_a_file_and_arrives(clickhouse_database: ClickHouseDatabase, tmp_path: Path) -> None:
    url = f"{clickhouse_database.url}/?database={clickhouse_database.name}"
    curl(url, data=b"CREATE TABLE t (a Int64, s String) ENGINE = MergeTree ORDER BY a")
    upload = tmp_path / "rows.tsv"
    with upload.open("wb") as file:
        for number in range(400_000):
            file.write(b"%d\t%s\n" % (number, b"x" * 60))
    found = curl("--data-binary", f"@{upload}", url + "&query=INSERT+INTO+t+FORMAT+TSV")
    assert found[0] == 200
    assert curl(url, data=b"SELECT count(), sum(a) FROM t")[2] == b"400000\t79999800000\n"
