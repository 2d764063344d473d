"""The page over HTTP: its routes, what it refuses, what it streams, and how it lives through an outage."""

from __future__ import annotations

import gzip
import http.client
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpuledger.dashboards.exceptions import AssetMissing, DashboardError
from gpuledger.dashboards.page.app import PageSettings, create_app
from gpuledger.dashboards.page.server import PageServer
from tests.dashboards.conftest import RunningPage, SeededLedger, StartPage

pytestmark = pytest.mark.services


def get(page: RunningPage, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", page.server.port, timeout=20)
    connection.request(method, path, headers={name.replace("_", "-"): text for name, text in headers.items()})
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, {name.lower(): text for name, text in answer.getheaders()}, body


class Stream:
    """An event stream, read event by event."""

    def __init__(self, page: RunningPage) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", page.server.port, timeout=20)
        self.connection.request("GET", "/events", headers={"Accept-Encoding": "gzip"})
        self.answer = self.connection.getresponse()

    def events(self) -> Iterator[tuple[str, dict[str, Any]]]:
        name = ""
        while line := self.answer.readline().decode():
            if line.startswith("event: "):
                name = line.removeprefix("event: ").strip()
            elif line.startswith("data: "):
                yield name, json.loads(line.removeprefix("data: "))

    def wait(self, name: str, **fields: Any) -> dict[str, Any]:
        """The next event called `name` that has these fields."""
        for found, data in self.events():
            if found == name and all(data.get(field) == wanted for field, wanted in fields.items()):
                return data
        raise AssertionError(f"the stream ended without {name}")

    def close(self) -> None:
        self.connection.close()


def test_the_screen_and_its_scripts_come_from_here_alone(ledger: SeededLedger, start_page: StartPage) -> None:
    page = start_page(ledger)
    status, headers, body = get(page, "/")
    assert status == 200
    assert headers["content-type"].startswith("text/html")
    assert b"//" not in body.replace(b"<!doctype", b""), "no address of another origin"
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "script-src 'self';" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    for name in ("main.js", "app.css", "echarts.esm.min.js"):
        status, headers, body = get(page, f"/static/{name}", Accept_Encoding="gzip")
        assert status == 200
        assert headers["content-encoding"] == "gzip"
        assert len(gzip.decompress(body)) > len(body)
        again, _, nothing = get(page, f"/static/{name}", If_None_Match=headers["etag"])
        assert (again, nothing) == (304, b"")
    assert get(page, "/static/../app.py")[0] == 404
    assert get(page, "/static/%2e%2e%2fapp.py")[0] == 404


def test_the_whole_page_weighs_less_than_600_kb(ledger: SeededLedger, start_page: StartPage) -> None:
    page = start_page(ledger)
    _, _, index = get(page, "/")
    names = ["main.js", "app.css", "cards.js", "tables.js", "charts.js", "colours.js", "dom.js", "format.js"]
    names += ["stream.js", "theme.js", "echarts.esm.min.js", "icon.svg"]
    sizes = [len(get(page, f"/static/{name}", Accept_Encoding="gzip")[2]) for name in names]
    assert len(index) + sum(sizes) < 600_000


def test_a_foreign_host_name_and_other_methods_are_refused(ledger: SeededLedger, start_page: StartPage) -> None:
    page = start_page(ledger, hosts=("gpu.example",))
    status, headers, body = get(page, "/api/board/live", Host="evil.example")
    assert status == 421
    assert b"evil.example: not a name of this page" in body
    assert b"--allow-host" in body
    assert "content-security-policy" in headers
    port = page.server.port
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}", "GPU.example:80"):
        assert get(page, "/healthz", Host=host)[0] == 200, host
    assert get(page, "/healthz", Host="gpu.example.evil.example")[0] == 421
    assert get(page, "/", method="POST")[0] == 405
    assert get(page, "/", method="HEAD")[0] == 200


def test_the_board_as_json_has_exact_money_and_no_sql(ledger: SeededLedger, start_page: StartPage) -> None:
    page = start_page(ledger)
    status, headers, body = get(page, "/api/board/live")
    assert (status, headers["cache-control"]) == (200, "no-store")
    assert b"SELECT" not in body
    found = json.loads(body, parse_float=lambda text: pytest.fail(f"a float in the JSON: {text}"))
    assert found["board"]["site"] == "Narvik"
    assert found["status"]["database"] == "ok"
    ((currency, spent, _),) = found["panels"]["spent-today"]["rows"]
    assert currency == "EUR"
    assert isinstance(spent, str)
    assert "." in spent
    assert {panel["id"] for panel in found["board"]["panels"]} <= set(found["panels"])
    assert not any(panel["error"] for panel in found["panels"].values())


def test_the_stream_sends_all_then_only_what_changed(ledger: SeededLedger, start_page: StartPage) -> None:
    page = start_page(ledger)
    stream = Stream(page)
    assert stream.answer.getheader("content-type", "").startswith("text/event-stream")
    assert stream.answer.getheader("content-encoding") is None, "a compressed stream arrives when it ends"
    assert stream.wait("board")["id"] == "live"
    first = stream.wait("panel", id="held-by-tenant")
    assert len(first["rows"]) > 300
    row = {"pool": "narvik-h100", "tenant": "newcomer", "kind": "held", "activity": "active", "gpu_us": 60_000_000}
    with ledger.client() as client:
        minute = ledger.seed.minute
        client.insert(
            "ledger_minute", [[*row.values(), minute, 100, 0]], column_names=[*row, "minute", "version", "complete"]
        )
        try:
            change = stream.wait("panel", id="held-by-tenant", base=first["version"])
        finally:
            client.command("DELETE FROM ledger_minute WHERE tenant = 'newcomer'")
    assert [(tenant, gpus) for _, tenant, gpus in change["set"] if tenant == "newcomer"] == [("newcomer", "1.000000")]
    assert len(change["set"]) + len(change["remove"]) < 30, "not the whole hour again"
    stream.close()


def test_each_query_is_asked_once_for_all_who_watch(ledger: SeededLedger, start_page: StartPage) -> None:
    page = start_page(ledger)
    streams = [Stream(page) for _ in range(5)]
    for stream in streams:
        stream.wait("panel", id="transfer-marks")
    for _ in range(2):
        for stream in streams:
            stream.wait("status")
    # Four panels share one query; five readers share all of them.
    text = get(page, "/metrics")[2].decode()
    figures = {name: float(number) for name, number in (line.split() for line in text.splitlines() if line[0] != "#")}
    assert figures["gpuledger_page_streams"] == 5
    first_round = len(set(page.source.asked[:14]))
    assert first_round == 14 == len(page.source.asked[:14])
    assert figures["gpuledger_page_queries_total"] <= 14 * max(1, figures["gpuledger_page_refreshes_total"])
    for stream in streams:
        stream.close()


def test_nobody_looks_nothing_is_asked(ledger: SeededLedger, start_page: StartPage) -> None:
    page = start_page(ledger)
    assert get(page, "/healthz")[0] == 200
    assert get(page, "/static/main.js")[0] == 200
    assert page.source.asked == []


def test_an_outage_is_told_without_the_drivers_words_and_ends_by_itself(
    ledger: SeededLedger, start_page: StartPage, caplog: pytest.LogCaptureFixture
) -> None:
    page = start_page(ledger)
    stream = Stream(page)
    stream.wait("status", database="ok")
    page.source.away = True
    told = stream.wait("status", database="down")
    assert told["message"] == "The database does not answer."
    assert told["refreshed_at"] < told["now"]
    assert "secret-user" not in json.dumps(told)
    assert get(page, "/readyz")[0] == 503
    assert get(page, "/healthz")[0] == 200
    status, _, body = get(page, "/api/board/live")
    assert status == 200
    assert json.loads(body)["panels"]["spent-today"]["rows"], "the last figures stay"
    page.source.away = False
    assert stream.wait("status", database="ok")["message"] == ""
    assert get(page, "/readyz")[0] == 200
    stream.close()


def test_a_database_without_our_views_says_what_to_run(
    clickhouse_database: Any, empty_ledger: SeededLedger, start_page: StartPage
) -> None:
    bare = SeededLedger(empty_ledger.server, clickhouse_database.name, empty_ledger.seed)
    page = start_page(bare)
    panels = json.loads(get(page, "/api/board/live")[2])["panels"]
    assert "gpuledger db migrate" in panels["cost-rate"]["error"]


def test_a_missing_chart_library_and_a_taken_port_are_named(
    ledger: SeededLedger, start_page: StartPage, tmp_path: Path
) -> None:
    with pytest.raises(AssetMissing, match=r"nowhere\.js.*--echarts"):
        create_app(PageSettings(echarts=tmp_path / "nowhere.js"), ledger.source())
    page = start_page(ledger)
    with pytest.raises(DashboardError, match=rf"127\.0\.0\.1:{page.server.port}: cannot listen there"):
        PageServer(create_app(PageSettings(echarts=Path(__file__)), ledger.source()), "127.0.0.1", page.server.port)


def test_the_command_serves_and_ends_on_sigterm_with_a_stream_open(ledger: SeededLedger, echarts: Path) -> None:
    command = [
        str(Path(sys.executable).with_name("gpuledger")), "serve", "--port", "0", "--title", "By command",
        "--clickhouse-url", ledger.server.url.rstrip("/"), "--database", ledger.name, "--echarts", str(echarts),
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("page: http://127.0.0.1:"), line + (process.stderr.read() if process.stderr else "")
        port = int(line.rstrip().rstrip("/").rpartition(":")[2])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("GET", "/events")
        answer = connection.getresponse()
        assert answer.readline() == b"retry: 2000\n"
        assert b"By command" in b"".join(answer.readline() for _ in range(2))
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.wait(10)
        assert time.monotonic() - started < 10
        connection.close()
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
