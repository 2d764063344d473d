"""What the benchmarks share: the whole product as `gpuledger up` runs it, watched by process, and made sites."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from gpuledger.cli.database import Running, connect, read_running
from gpuledger.local.guard import spawn
from gpuledger.schemas.config import ClickHouse

__all__ = ["Installation", "Usage", "Watch", "installation", "machine", "print_result", "quantile", "site_yaml"]

#: Part of the command line -> what the process is called in tables.
_NAMES = {
    "kafka.Kafka": "kafka",
    "gpuledger.local.clickhouse": "clickhouse",
    " worker run": "worker",
    " serve ": "page",
    " simulate ": "simulator",
}
#: A machine that does other work takes long; it is told how much that was.
_START_S = 300.0
_STOP_S = 20.0


def site_yaml(name: str, gpus: int, flush_ms: int, pools: int = 1) -> str:
    """A scenario of about `gpus` GPUs in nodes of 8: two tenants that hold nine tenths, costs and rates for all."""
    nodes = max(1, gpus // 8 // pools)
    names = [f"{name}-{n}" for n in range(pools)]
    demand = [{"pool": pool, "share_pct": 90, "swing_pct": 5, "ramp_gpus_per_s": nodes * 8} for pool in names]
    jobs = {
        "sizes": [{"gpus": 8, "weight": 2}, {"gpus": 2, "weight": 2}, {"gpus": 1, "weight": 1}],
        "duties": [{"name": "training", "active_s": 40, "idle_s": 5}],
    }
    cost = {"currency": "EUR", "period_cost": nodes * 8 * 700, "period_days": 30, "tariff": f"{name}-spot"}
    scenario = {
        "name": name,
        "seed": 1,
        "period_ms": 1000,
        "flush_ms": flush_ms,
        "sites": [{"name": name}],
        "pools": [{"name": pool, "site": name, "model": "H100", "nodes": nodes} for pool in names],
        "tenants": [{"id": f"{name}-{t}", "accounts": [f"{name}-{t}"], "demand": demand, "jobs": jobs} for t in "ab"],
        "commitments": [{"pool": pool, "tenant": f"{name}-{t}", "gpus": nodes * 4} for pool in names for t in "ab"],
        "tariffs": [{"name": f"{name}-spot", "currency": "EUR", "per_kwh": 0.05}],
        "asset_costs": [{"pool": pool, "node_energy_factor": 1.3, **cost} for pool in names],
        "rate_cards": [{"pool": pool, "currency": "EUR", "per_gpu_hour": 2} for pool in names],
    }
    return json.dumps(scenario)  # JSON is YAML


class Installation:
    """A running `gpuledger up`; `started_s` is when it was started, on the monotonic clock."""

    def __init__(self, data: Path, process: subprocess.Popen[bytes], started_s: float, running: Running) -> None:
        self.data = data
        self.running = running
        self.started_s = started_s
        self._process = process
        settings = ClickHouse(url=running.clickhouse_url)
        self.client: Any = connect(settings)

    def rows(self, sql: str, **parameters: Any) -> list[tuple[Any, ...]]:
        return [tuple(row) for row in self.client.query(sql, parameters=parameters).result_rows]

    def processes(self) -> dict[str, psutil.Process]:
        """The services by name, found among the children of `gpuledger up` alone."""
        found: dict[str, psutil.Process] = {}
        for child in psutil.Process(self._process.pid).children(recursive=True):
            try:
                line = " ".join(child.cmdline()) + " "
            except psutil.Error:
                continue
            for part, name in _NAMES.items():
                if part in line and name not in found:
                    found[name] = child
        return found

    def check(self) -> None:
        """Raises SystemExit where it has ended."""
        if self._process.poll() is not None:
            raise SystemExit(f"gpuledger up ended: {(self.data.parent / 'up.log').read_text(errors='replace')[-2000:]}")


@contextmanager
def installation(
    directory: Path, options: Sequence[str] = (), variables: Mapping[str, str] | None = None
) -> Generator[Installation]:
    """`gpuledger up` on a directory of its own and free ports; ended, by its pid, when the block is left."""
    data = directory / "data"
    kept = {n: v for n, v in os.environ.items() if not n.startswith("GPULEDGER_") or n == "GPULEDGER_CACHE_DIR"}
    command = [sys.executable, "-m", "gpuledger.cli", "up", "--data", str(data), "--port", "0", *options]
    with (directory / "up.log").open("ab") as log:
        started_s = time.monotonic()
        process = spawn(command, output=log, env={**kept, **(variables or {})})
    try:
        while (running := read_running(data)) is None:
            if process.poll() is not None or time.monotonic() - started_s > _START_S:
                tail = (directory / "up.log").read_text(errors="replace")[-2000:]
                raise SystemExit(f"gpuledger up did not start:\n{tail}")
            time.sleep(0.02)
        installed = Installation(data, process, started_s, running)
        try:
            yield installed
        finally:
            installed.client.close()
    finally:
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@dataclass(slots=True)
class Usage:
    """Of one process: CPU seconds and wall seconds of the window, resident bytes at its end and at most."""

    cpu_s: float = 0.0
    wall_s: float = 0.0
    rss_bytes: int = 0
    most_rss_bytes: int = 0


@dataclass
class Watch:
    """Measures processes from `start` to `stop`; memory once a second."""

    processes: Mapping[str, psutil.Process]
    usage: dict[str, Usage] = field(default_factory=dict[str, Usage])

    def start(self) -> None:
        self._end = threading.Event()
        self._before = {name: self._cpu_s(process) for name, process in self.processes.items()}
        self._since_s = time.monotonic()
        self.usage = {name: Usage() for name in self.processes}
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> dict[str, Usage]:
        wall_s = time.monotonic() - self._since_s
        for name, process in self.processes.items():
            self.usage[name].cpu_s = self._cpu_s(process) - self._before[name]
            self.usage[name].wall_s = wall_s
        self._end.set()
        self._thread.join()
        return self.usage

    def _sample(self) -> None:
        while True:
            for name, process in self.processes.items():
                rss = process.memory_info().rss
                self.usage[name].rss_bytes = rss
                self.usage[name].most_rss_bytes = max(rss, self.usage[name].most_rss_bytes)
            if self._end.wait(1.0):
                return

    @staticmethod
    def _cpu_s(process: psutil.Process) -> float:
        times = process.cpu_times()
        return times.user + times.system


def quantile(values: Sequence[float], q: float) -> float:
    """The nearest-rank quantile of at least one value."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-int(q * 1000) * len(ordered) // 1000) - 1))]


def machine() -> dict[str, Any]:
    """What the figures were measured on: a busy machine makes them worthless, so its load is told too."""
    return {
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": ".".join(map(str, sys.version_info[:3])),
        "load_1m": round(os.getloadavg()[0], 2),
    }


def print_result(name: str, headings: Sequence[str], rows: Sequence[Sequence[Any]], result: Mapping[str, Any]) -> None:
    """The table for people, then one line of JSON for files."""
    cells = [list(headings), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[n]) for line in cells) for n in range(len(headings))]
    for first, *others in cells:
        padded = [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *padded]))
    print(json.dumps({"benchmark": name, "machine": machine(), **result}), flush=True)
