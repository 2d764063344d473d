"""`gpuledger up`: the whole product on one machine, from wheels and jars alone.

Kafka, ClickHouse, one worker, the page and, unless told otherwise, the simulated site run as child processes that end
with this one; everything they keep lies in one data directory.
"""

from __future__ import annotations

import os
import sys
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from signal import Signals

import msgspec

from gpuledger.local.children import Child, ChildSpec, Supervisor
from gpuledger.local.clickhouse import EmbeddedClickHouse
from gpuledger.local.jars import Progress, echarts_file, kafka_jars
from gpuledger.local.kafka import EmbeddedKafka
from gpuledger.local.lock import DirectoryLock
from gpuledger.local.ports import check_port, free_port

__all__ = ["UpOptions", "up"]

RUN_FILE = "run.json"


@dataclass(frozen=True, slots=True)
class UpOptions:
    """`scenario`: the file of the simulated site; None: no simulation. Ports 0: free ones, new at each start."""

    data: Path
    scenario: Path | None
    node: bool
    page_port: int
    kafka_port: int = 0
    clickhouse_port: int = 0
    for_s: int | None = None
    config_path: Path | None = None


def up(
    options: UpOptions,
    migrate: Callable[[str], object],
    say: Callable[[str], None],
    progress: Progress | None = None,
) -> Signals | None:
    """Runs until SIGTERM, SIGINT, `for_s`, or until a service dies; returns the signal.

    `migrate(url)` brings the database of that server up to date; `say` tells the person at the terminal.

    Raises:
        LocalError: a port or the directory is taken, an asset is wrong, or a service died (with the end of its log).
    """
    data = options.data.absolute()
    data.mkdir(parents=True, exist_ok=True, mode=0o700)
    if options.page_port:
        check_port(options.page_port, "the page")
    kafka_jars(progress=progress)
    script = echarts_file(progress=progress)
    with DirectoryLock(data, "GPULedger's data directory"), Supervisor() as supervisor:
        try:
            return _run(options, data, script, supervisor, migrate, say)
        finally:
            with suppress(FileNotFoundError):
                (data / RUN_FILE).unlink()


def _run(
    options: UpOptions,
    data: Path,
    script: Path,
    supervisor: Supervisor,
    migrate: Callable[[str], object],
    say: Callable[[str], None],
) -> Signals | None:
    kafka = EmbeddedKafka(data / "kafka", options.kafka_port or None)
    supervisor.start(kafka)
    say(f"Apache Kafka    {kafka.bootstrap}")
    clickhouse = EmbeddedClickHouse(data / "clickhouse", options.clickhouse_port or None)
    supervisor.start(clickhouse)
    migrate(clickhouse.url)
    say(f"ClickHouse      {clickhouse.url}")

    health, page = free_port(), options.page_port or free_port()
    env = _environment(os.environ, kafka.bootstrap, clickhouse.url)
    env["GPULEDGER_WORKER__LISTEN"] = f"127.0.0.1:{health}"
    base = [sys.executable, "-m", "gpuledger.cli"]
    if options.config_path is not None:
        base += ["--config", str(options.config_path)]
    page_url = f"http://127.0.0.1:{page}/"

    def child(name: str, argv: Sequence[str], ready: str | None = None) -> None:
        check = None if ready is None else lambda: _answers(ready)
        spec = ChildSpec(name, [*base, *argv], data / "logs" / f"{name}.log", env, ready=check, ready_timeout_s=60)
        supervisor.start(Child(spec))

    child("worker", ["worker", "run", "--datadir", str(data / "worker")], f"http://127.0.0.1:{health}/readyz")
    say("Faust worker    ready")
    serve = ["serve", "--host", "127.0.0.1", "--port", str(page), "--echarts", str(script)]
    child("page", serve, f"{page_url}healthz")
    if options.scenario is not None:
        child("simulator", ["simulate", str(options.scenario), "--data", str(data / "simulator")])
        say(f"Simulated site  {options.scenario.stem}")
    if options.node:
        env["GPULEDGER_AGENT__SPOOL_DIR"] = str(data / "spool")
        child("agent", ["agent", "run", "--listen", f"127.0.0.1:{free_port()}"])
        say("This machine    its agent sends too")
    _write_run_file(data, kafka.bootstrap, clickhouse.url, page_url)
    say(f"\nThe page is at  {page_url}\n")
    return supervisor.wait(options.for_s)


def _environment(environ: Mapping[str, str], bootstrap: str, url: str) -> dict[str, str]:
    """The children's variables: where the embedded services are wins over what a configuration says."""
    return {
        **environ,
        "GPULEDGER_KAFKA__BOOTSTRAP": bootstrap,
        "GPULEDGER_CLICKHOUSE__URL": url,
        "PYTHONUNBUFFERED": "1",
    }


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:  # an address of our own making, on loopback
            return answer.status == 200
    except OSError:
        return False


def _write_run_file(data: Path, bootstrap: str, clickhouse_url: str, page_url: str) -> None:
    running = {
        "pid": os.getpid(),
        "clickhouse_url": clickhouse_url,
        "kafka_bootstrap": bootstrap,
        "page_url": page_url,
    }
    part = data / f"{RUN_FILE}.part"
    part.write_bytes(msgspec.json.encode(running))
    part.replace(data / RUN_FILE)
