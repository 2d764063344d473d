"""One installation for an end-to-end test, as a production one has it: topics, a database, workers as processes.

Installations share the session's broker and engine and have names of their own. `settle` waits until all that was
sent is stored, complete and worked off; `digest` then is everything that people and audits read, without versions.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import clickhouse_connect
import pytest

from gpuledger.agents.broker_topics import create_topics
from gpuledger.agents.messages import Message
from gpuledger.cli.database import migrate_database
from gpuledger.local.children import read_tail
from gpuledger.local.guard import spawn
from gpuledger.schemas.config import load_config
from gpuledger.streams.brokers import end_offsets
from tests.e2e.load import Load, Offsets, publish
from tests.e2e.orders import Order, Orders

__all__ = ["Digest", "Installation", "WorkerProcess"]
__all__ += ["answers", "differences", "digest_of", "installation", "plain_environment", "same"]

REPOSITORY = Path(__file__).parents[2]

#: View -> its rows, in the order of their text.
Digest = dict[str, list[tuple[Any, ...]]]

_DIGEST = {
    "v_ledger_minute": ("*", "minute"),
    "v_recomputes": ("* EXCEPT version", "minute"),
    "v_gpu_minute": ("*", "minute"),
    "v_gpu_hour": ("*", "hour"),
    "v_job_hour": ("*", "hour"),
    "v_charges": ("*", "interval_start"),
    "v_asset_cost": ("*", "interval_start"),
    "v_conflicts": ("*", "hour"),
}
_POLL_S = 0.3


def plain_environment(**settings: str) -> dict[str, str]:
    """This process's environment with these GPULEDGER_ settings only; where jars are kept stays."""
    kept = {n: v for n, v in os.environ.items() if not n.startswith("GPULEDGER_") or n == "GPULEDGER_CACHE_DIR"}
    return kept | {f"GPULEDGER_{name}": value for name, value in settings.items()}


def differences(found: Digest, expected: Digest) -> list[str]:
    """Nothing where they are equal bit for bit; else the numbers of each view, and the first rows of one side only."""
    told: list[str] = []
    for view, rows in expected.items():
        if found[view] != rows:
            extra, missing = (
                sorted(set(found[view]) - set(rows), key=repr),
                sorted(set(rows) - set(found[view]), key=repr),
            )
            told.append(f"{view}: {len(found[view])} rows, expected {len(rows)}")
            told += [f"  extra   {row}" for row in extra[:3]] + [f"  missing {row}" for row in missing[:3]]
    return told


def same(found: Digest, expected: Digest) -> None:
    """Fails unless they are equal bit for bit."""
    told = differences(found, expected)
    if told:
        pytest.fail("\n".join(["the ledgers differ", *told]), pytrace=False)


def answers(url: str) -> bool:
    """Whether a GET of it gives status 200."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


class WorkerProcess:
    """One worker; an order makes it kill or stop itself at a point. `options` go to killable_worker."""

    def __init__(
        self, directory: Path, number: int, env: Mapping[str, str], order: Order | None, options: Sequence[str] = ()
    ) -> None:
        self.log_file = directory / f"worker-{number}.log"
        self._orders = Orders(directory / f"faust-{number}.orders")
        if order is not None:
            self._orders.give(order)
        argv = [sys.executable, "-m", "tests.e2e.killable_worker", str(directory / f"faust-{number}"), *options]
        with self.log_file.open("wb") as log:
            # Tied to this process: a test run that is killed leaves no worker behind.
            self.process = spawn(argv, output=log, env=env, cwd=REPOSITORY)

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def ready(self) -> bool:
        """Whether it holds partitions, by its own word."""
        found = re.search(r"health on (127\.0\.0\.1:\d+)", self.log())
        return found is not None and answers(f"http://{found[1]}/readyz")

    def order(self, order: Order) -> None:
        """To be obeyed the next time it comes to that point."""
        self._orders.give(order)

    def killed(self, timeout_s: float = 60) -> None:
        """Waits until it has killed itself."""
        try:
            status = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the worker never came to the point:\n{read_tail(self.log_file)}") from None
        assert status == -signal.SIGKILL, f"the worker ended with {status}:\n{read_tail(self.log_file)}"

    def stop(self) -> int:
        """SIGTERM; its exit status."""
        self.process.terminate()
        return self.process.wait(20)

    def end(self) -> None:
        if self.running:
            self.process.kill()
            self.process.wait(10)


class Installation:
    """Topics with a prefix, a consumer group and a database of its own."""

    def __init__(self, bootstrap: str, clickhouse_url: str, directory: Path, **settings: str) -> None:
        self.directory = directory
        name = f"e2e_{uuid.uuid4().hex[:8]}"
        self.env = plain_environment(
            KAFKA__BOOTSTRAP=bootstrap,
            KAFKA__TOPIC_PREFIX=f"{name}.",
            CLICKHOUSE__URL=clickhouse_url,
            CLICKHOUSE__DATABASE=name,
            WORKER__GROUP=name,
            WORKER__LISTEN="127.0.0.1:0",
            LEDGER__GRACE_S="2",
            **settings,
        )
        self.config = load_config(None, self.env)
        asyncio.run(create_topics(self.config.kafka))
        migrate_database(self.config.clickhouse)
        self.client = clickhouse_connect.get_client(
            **self.config.clickhouse.client_arguments(), autogenerate_session_id=False
        )
        self.workers: list[WorkerProcess] = []
        self._threads = ThreadPoolExecutor(1)

    def start_worker(self, order: Order | None = None, *options: str) -> WorkerProcess:
        """Starts one more worker."""
        self.workers.append(WorkerProcess(self.directory, len(self.workers), self.env, order, options))
        return self.workers[-1]

    def publish(self, ticks: Sequence[Sequence[Message]], over_s: float) -> Future[Offsets]:
        """Begins to send, in a thread; the result is where the messages lie."""
        return self._threads.submit(lambda: asyncio.run(publish(self.config.kafka, ticks, over_s)))

    def rows(self, sql: str, **parameters: Any) -> list[tuple[Any, ...]]:
        return [tuple(row) for row in self.client.query(sql, parameters=parameters).result_rows]

    def number(self, sql: str) -> int:
        """The first value of the first row; NULL is 0."""
        return int(self.rows(sql)[0][0] or 0)

    def progress(self) -> Offsets:
        found = self.rows("SELECT topic, partition, offset FROM v_progress")
        return {(str(topic), int(partition)): int(offset) for topic, partition, offset in found}

    def wait_until(self, condition: Callable[[], object], what: str, timeout_s: float = 150) -> None:
        """Looks every moment; fails when no worker runs any more, or at the end of the time."""
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            logs = "\n".join(f"--- {w.log_file.name}\n{read_tail(w.log_file)}" for w in self.workers[-2:])
            assert any(worker.running for worker in self.workers), f"no worker runs, waiting until {what}\n{logs}"
            assert time.monotonic() < deadline_s, f"gave up waiting until {what}\n{logs}"
            time.sleep(_POLL_S)

    def reached(self, target: Offsets) -> Callable[[], bool]:
        """Whether all these offsets are stored (or, of the dirty topic, worked off)."""

        def check() -> bool:
            now = self.progress()
            return all(now.get(key, -1) >= offset for key, offset in target.items())

        return check

    def settle(self, load: Load, *parts: Offsets, timeout_s: float = 150) -> None:
        """Returns when the ledger holds all that was sent of the load, complete; each step within the time."""
        sent: Offsets = {}
        for part in parts:
            sent |= part
        sent = {key: offset for key, offset in sent.items() if key[0] not in ("dirty", "deadletter")}
        self.wait_until(self.reached(sent), "everything is stored", timeout_s)
        marked = "SELECT max(marked_until_ms) FROM frontier"
        self.wait_until(lambda: self.number(marked) >= load.hours[1], "its hours are complete", timeout_s)
        ends = asyncio.run(end_offsets(self.config.kafka, "dirty", self.config.kafka.partitions["dirty"]))
        target = {("dirty", partition): end - 1 for partition, end in ends.items()}
        self.wait_until(self.reached(target), "all marks are worked off", timeout_s)

    def digest(self, load: Load) -> Digest:
        """All rows of the hours of the load, of every view of the ledger, in an order of their own."""
        return digest_of(self, *load.hours)

    def close(self) -> None:
        for worker in self.workers:
            worker.end()
        self._threads.shutdown()
        self.client.command(f"DROP DATABASE IF EXISTS {self.config.clickhouse.database} SYNC")
        self.client.close()


def digest_of(made: Installation, from_ms: int, to_ms: int) -> Digest:
    """All rows of [from_ms, to_ms), whole hours, of every view of the ledger, in an order of their own."""
    out: Digest = {}
    for view, (columns, time_column) in _DIGEST.items():
        sql = (
            f"SELECT {columns} FROM {view} WHERE {time_column} >= fromUnixTimestamp64Milli({{from:Int64}}, 'UTC') "
            f"AND {time_column} < fromUnixTimestamp64Milli({{to:Int64}}, 'UTC')"
        )
        out[view] = sorted(made.rows(sql, **{"from": from_ms, "to": to_ms}), key=repr)
    return out


@contextmanager
def installation(bootstrap: str, clickhouse_url: str, directory: Path, **settings: str) -> Generator[Installation]:
    """An installation without workers; all are ended and the database is gone afterwards. `settings` as GPULEDGER_…"""
    made = Installation(bootstrap, clickhouse_url, directory, **settings)
    try:
        yield made
    finally:
        made.close()
