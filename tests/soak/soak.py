"""Watches the memory of one worker while a fleet sends, against a real broker and a real engine.

The worker and the simulator are processes of their own, as an operator starts them; what is read of the worker are the
kernel's own figures (/proc) and what the worker says at /metrics.
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
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import clickhouse_connect

from gpuledger.agents.broker_topics import create_topics
from gpuledger.cli.database import migrate_database
from gpuledger.local.children import read_tail
from gpuledger.local.guard import spawn
from gpuledger.schemas.config import Config, load_config
from tests.soak.site import site_yaml
from tests.soak.trend import Reading

__all__ = ["Plan", "Soak", "memory_of", "soak"]

_BEHIND = """
    SELECT count(), toInt64({now_ms:Int64}) - min(newest)
    FROM (SELECT max(appended_ms) AS newest FROM progress WHERE topic = 'telemetry' GROUP BY partition)"""
_START_S = 60


@dataclass(frozen=True, slots=True)
class Plan:
    """How many GPUs send for how long, and how often is looked."""

    gpus: int
    seconds: int
    flush_ms: int = 10_000
    every_s: float = 5.0
    #: How often the worker computes the open minute: less often is lighter for whatever else runs on the machine.
    live_every_ms: int = 1_000


def memory_of(pid: int) -> tuple[int, int]:
    """(all, anonymous) resident bytes of a process."""
    text = Path(f"/proc/{pid}/status").read_text()
    found = dict(re.findall(r"^(VmRSS|RssAnon):\s+(\d+) kB", text, re.MULTILINE))
    return int(found["VmRSS"]) * 1024, int(found["RssAnon"]) * 1024


class Soak:
    """A worker and a simulator on a database and topics of their own; `watch` reads them until the time is over."""

    def __init__(self, bootstrap: str, clickhouse_url: str, directory: Path, plan: Plan) -> None:
        name = f"soak_{uuid.uuid4().hex[:8]}"
        self.plan = plan
        self.readings: list[Reading] = []
        self._directory = directory
        kept = {n: v for n, v in os.environ.items() if not n.startswith("GPULEDGER_") or n == "GPULEDGER_CACHE_DIR"}
        self._env = kept | {
            "GPULEDGER_KAFKA__BOOTSTRAP": bootstrap,
            "GPULEDGER_KAFKA__TOPIC_PREFIX": f"{name}.",
            "GPULEDGER_CLICKHOUSE__URL": clickhouse_url,
            "GPULEDGER_CLICKHOUSE__DATABASE": name,
            "GPULEDGER_WORKER__GROUP": name,
            "GPULEDGER_WORKER__LISTEN": "127.0.0.1:0",
            "GPULEDGER_WORKER__LIVE_EVERY_MS": str(plan.live_every_ms),
        }
        self.config: Config = load_config(None, self._env)
        asyncio.run(create_topics(self.config.kafka))
        migrate_database(self.config.clickhouse)
        self.client: Any = clickhouse_connect.get_client(
            **self.config.clickhouse.client_arguments(), autogenerate_session_id=False
        )
        self._processes: list[subprocess.Popen[bytes]] = []
        self.worker = self._run("worker", "worker", "run", "--datadir", str(directory / "faust"))
        site = directory / "site.yaml"
        site.write_text(site_yaml(plan.gpus, plan.flush_ms), encoding="utf-8")
        self.simulator = self._run("simulator", "simulate", str(site))

    def _run(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "gpuledger.cli", *arguments]
        with (self._directory / f"{name}.log").open("wb") as log:
            # Tied to this process: it does not outlive a soak that is killed.
            process = spawn(command, output=log, env=self._env)
        self._processes.append(process)
        return process

    def rows(self, sql: str, **parameters: Any) -> list[tuple[Any, ...]]:
        return [tuple(row) for row in self.client.query(sql, parameters=parameters).result_rows]

    # -- watching ---------------------------------------------------------------------------------------------------

    def watch(self, told: Callable[[Reading], None] = lambda _: None) -> None:
        """Reads every `plan.every_s` until the time is over; the readings are in `readings`, and each goes to `told`.

        Raises:
            RuntimeError: a process ended, with the tail of its log.
        """
        began_s = time.monotonic()
        address = self._address()
        due_s = began_s
        while (at_s := time.monotonic() - began_s) < self.plan.seconds:
            for process, name in ((self.worker, "worker"), (self.simulator, "simulator")):
                if process.poll() is not None:
                    raise RuntimeError(f"the {name} ended:\n{read_tail(self._directory / f'{name}.log')}")
            reading = self._read(at_s, address)
            self.readings.append(reading)
            told(reading)
            due_s = max(due_s + self.plan.every_s, time.monotonic())
            time.sleep(max(0.0, due_s - time.monotonic()))

    def _address(self) -> str:
        deadline_s = time.monotonic() + _START_S
        log = self._directory / "worker.log"
        while True:
            found = re.search(r"health on (127\.0\.0\.1:\d+)", log.read_text(errors="replace"))
            if found is not None:
                return found[1]
            if time.monotonic() > deadline_s or self.worker.poll() is not None:
                raise RuntimeError(f"the worker did not start:\n{read_tail(log)}")
            time.sleep(0.2)

    def _read(self, at_s: float, address: str) -> Reading:
        metrics = self.metrics(address)
        ((partitions, behind_ms),) = self.rows(_BEHIND, now_ms=time.time_ns() // 1_000_000)
        incomplete_s = metrics.get("completeness_lag_seconds")
        rss, anonymous = memory_of(self.worker.pid)
        return Reading(
            at_s,
            rss,
            anonymous,
            int(behind_ms) if partitions == self.config.kafka.partitions["telemetry"] else None,
            None if incomplete_s is None else int(incomplete_s * 1000),
            int(metrics["backlog_minutes"]),
        )

    def metrics(self, address: str) -> dict[str, float]:
        """What the worker says of itself, without the prefix of the names."""
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        return {name: float(value) for name, value in re.findall(r"^gpuledger_worker_(\w+) (\S+)$", text, re.MULTILINE)}

    # -- the end ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        for process in reversed(self._processes):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait(10)
        self.client.command(f"DROP DATABASE IF EXISTS {self.config.clickhouse.database} SYNC")
        self.client.close()


@contextmanager
def soak(bootstrap: str, clickhouse_url: str, directory: Path, plan: Plan) -> Generator[Soak]:
    """The processes run inside the block; afterwards they are ended and the database is gone."""
    made = Soak(bootstrap, clickhouse_url, directory, plan)
    try:
        yield made
    finally:
        made.close()
