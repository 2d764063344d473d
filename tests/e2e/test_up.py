"""`gpuledger up` as its users run it: it starts, answers, refuses, ends, and goes on from where it stopped."""

import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import clickhouse_connect
import psutil
import pytest

from gpuledger.cli.database import Running, read_running
from gpuledger.local.clickhouse import EmbeddedClickHouse
from tests.e2e.load import SITE
from tests.e2e.pipeline import answers, plain_environment
from tests.local.processes import ProcessHandle

pytestmark = pytest.mark.services

Rows = list[tuple[Any, ...]]

#: Batches of a run that are not there. The first one may hold a single sample, which covers nothing.
_MISSING = """
    SELECT run_id, max(seq), uniqExact(seq) FROM fragments WHERE run_id IN {runs:Array(String)} AND seq > 0
    GROUP BY run_id HAVING max(seq) != uniqExact(seq)
"""
#: Complete minutes of the first run: no later one may touch them.
_KEPT = {
    "ledger": "SELECT * EXCEPT complete FROM v_ledger_minute WHERE minute IN {minutes:Array(DateTime64(3, 'UTC'))}",
    "gpus": "SELECT * FROM v_gpu_minute WHERE minute IN {minutes:Array(DateTime64(3, 'UTC'))}",
}
_COMPLETE = """
    SELECT minute FROM v_recomputes GROUP BY minute HAVING min(complete) = 1 AND min(fragments) > 0 ORDER BY minute
"""


class Up:
    """One `gpuledger up` on a data directory."""

    def __init__(self, data: Path, scenario: Path, *arguments: str) -> None:
        self.data = data
        self.log_file = data.with_name(f"up-{time.monotonic_ns()}.log")
        argv = ["up", "--data", str(data), "--port", "0", "--scenario", str(scenario), *arguments]
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gpuledger.cli", *argv],
                env=plain_environment(LEDGER__GRACE_S="2"),
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait_until(self, condition: Callable[[], object], what: str, timeout_s: float = 60) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            text = self.log_file.read_text(errors="replace")
            assert self.process.poll() is None, f"it ended, waiting until {what}\n{text}"
            assert time.monotonic() < deadline_s, f"gave up waiting until {what}\n{text}"
            time.sleep(0.2)

    def running(self) -> Running:
        """What it says in run.json, once it is there."""
        self.wait_until(lambda: read_running(self.data), "run.json is there")
        found = read_running(self.data)
        assert found is not None and found.pid == self.process.pid
        return found

    def family(self) -> list[int]:
        """Every process below it."""
        return [child.pid for child in psutil.Process(self.process.pid).children(recursive=True)]

    def end(self, number: signal.Signals, within_s: float) -> int:
        """Sends a signal to it alone; its status, after all that it had started has ended too."""
        with ExitStack() as handles:
            family = [handles.enter_context(ProcessHandle(pid)) for pid in self.family()]
            assert len(family) >= 5, "Kafka, ClickHouse, worker, page, simulator"
            deadline_s = time.monotonic() + within_s
            self.process.send_signal(number)
            status = self.process.wait(within_s)
            alive = [each.pid for each in family if not each.ended(max(0.0, deadline_s - time.monotonic()))]
            assert not alive, f"still there: {alive}"
            return status

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()  # what it started ends with it
            self.process.wait(10)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Up]]:
    """Starts `gpuledger up` on one data directory, on a small site that begins two minutes ago."""
    scenario = tmp_path / "site.yaml"
    text = SITE.read_text().replace("flush_ms: 4000", "flush_ms: 2000\nstart_back_s: 130\nspeed: 60")
    scenario.write_text(text.replace("late_permille: 40", "late_permille: 0"))
    started: list[Up] = []

    def start(*arguments: str) -> Up:
        started.append(Up(tmp_path / "data", scenario, *arguments))
        return started[-1]

    yield start
    for each in started:
        each.close()


def gpuledger(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gpuledger.cli", *arguments],
        env=plain_environment(LEDGER__GRACE_S="2"),
        capture_output=True,
        text=True,
        timeout=60,
    )


def query(url: str, sql: str, **parameters: Any) -> Rows:
    with clickhouse_connect.get_client(dsn=f"{url}/gpuledger") as client:
        return sorted((tuple(row) for row in client.query(sql, parameters=parameters).result_rows), key=repr)


def page(running: Running) -> str:
    with urllib.request.urlopen(running.page_url, timeout=10) as answer:
        return answer.read().decode()


def refuses_a_second_start(first: Up, start: Callable[..., Up]) -> None:
    second = start()
    assert second.process.wait(30) not in (0, None)
    said = second.log_file.read_text()
    assert f"is in use by process {first.process.pid}" in said and "Traceback" not in said


def commands_answer(data: Path) -> None:
    """audit, cost and status against what runs."""
    audit = gpuledger("audit", "--data", str(data))
    assert audit.returncode == 0, audit.stdout + audit.stderr
    cost = gpuledger("cost", "--by", "tenant", "--data", str(data), "--format", "json")
    assert cost.returncode == 0, cost.stderr
    assert {row["tenant"] for row in json.loads(cost.stdout)} >= {"north", "south", "campus"}
    status = gpuledger("status", "--data", str(data))
    assert status.returncode == 0, status.stdout + status.stderr


@pytest.mark.timeout(240)
def test_up_answers_ends_and_goes_on(start: Callable[..., Up]) -> None:
    first = start("--for", "120s")
    running = first.running()
    assert "GPULedger" in page(running) and answers(f"{running.page_url}healthz")
    assert running.page_url in first.log_file.read_text()
    refuses_a_second_start(first, start)
    url = running.clickhouse_url
    first.wait_until(lambda: len(query(url, _COMPLETE)) >= 2, "two minutes with telemetry are complete")
    commands_answer(first.data)
    assert first.end(signal.SIGTERM, within_s=10) == 0
    assert not (first.data / "run.json").exists()
    with EmbeddedClickHouse(first.data / "clickhouse") as engine:
        runs = [run for (run,) in query(engine.url, "SELECT DISTINCT run_id FROM fragments")]
        minutes = [minute for (minute,) in query(engine.url, _COMPLETE)][:-1]
        kept = {name: query(engine.url, sql, minutes=minutes) for name, sql in _KEPT.items()}
    assert all(kept.values())

    again = start("--for", "15s")
    url = again.running().clickhouse_url
    later = "SELECT count() FROM fragments WHERE run_id NOT IN {runs:Array(String)}"
    again.wait_until(lambda: query(url, later, runs=runs)[0][0] > 200, "the site goes on")
    assert {name: query(url, sql, minutes=minutes) for name, sql in _KEPT.items()} == kept
    # Also what was on its way when the first one was stopped.
    assert not query(url, _MISSING, runs=runs)
    assert again.process.wait(40) == 0, again.log_file.read_text()
    assert re.search(r"^stopped$", again.log_file.read_text(), re.MULTILINE)
    assert not (again.data / "run.json").exists()


def test_a_kill_leaves_no_process_and_no_lock(start: Callable[..., Up]) -> None:
    killed = start()
    killed.running()
    assert killed.end(signal.SIGKILL, within_s=5) == -signal.SIGKILL
    # Its run.json is still there; nobody is misled by it, and nothing is locked.
    assert (killed.data / "run.json").exists() and read_running(killed.data) is None
    listed = gpuledger("db", "status", "--data", str(killed.data))
    assert listed.returncode == 0, listed.stderr
