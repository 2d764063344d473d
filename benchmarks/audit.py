"""How long an audit of a day takes: `python benchmarks/audit.py --gpus 10000 --hours 24`.

Fills a database with a believable day first (minutes; `--data DIR` keeps it for the next run), then audits it `--runs`
times on the embedded engine and prints each time, where it went, and the ratio to a plain scan of the two tables that
every audit must read: what no audit could be faster than.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import psutil
from audit_day import Day, fill, rules
from installation import machine, print_result

from gpuledger.cli.database import migrate_database
from gpuledger.cli.moments import iso
from gpuledger.local.clickhouse import EmbeddedClickHouse
from gpuledger.schemas.config import ClickHouse
from gpuledger.streams.audit import AuditReport, audit
from gpuledger.streams.store import Store

_DAY_FILE = "day.json"
#: The columns that an audit cannot do without, and nothing done with them.
_CEILING = {
    "fragments": """
        SELECT count(), sum(length(gpu)), sum(instance), sum(run_start_ms), sum(length(run_id)), sum(seq),
            sum(epoch_ms), sum(length(segment_start_ms)), sum(arraySum(segment_duration_ms)),
            sum(arraySum(segment_activity)), sum(length(segment_energy_from_mj)), sum(length(segment_energy_to_mj))
        FROM fragments WHERE $range""",
    "ledger_gpu_minute": """
        SELECT count(), sum(length(gpu)), sum(instance), sum(length(tenant)), sum(length(job_id)), sum(length(kind)),
            sum(length(activity)), sum(gpu_us), sum(energy_mj), max(version), max(rows_hash)
        FROM ledger_gpu_minute WHERE $range""",
}
_RANGE = """minute >= fromUnixTimestamp64Milli({from_ms:Int64}, 'UTC')
            AND minute < fromUnixTimestamp64Milli({to_ms:Int64}, 'UTC')"""


def _filled(data: Path, wanted: Day, jobs: int) -> Day:
    """The day in the directory, made where it is not there yet."""
    path = data / _DAY_FILE
    if path.exists():
        day = msgspec.json.decode(path.read_bytes(), type=Day)
        print(
            f"using the day in {data}: {day.gpus:,} GPUs, {day.hours} hours, {day.pools} pools, flush {day.flush_s} s"
        )
        return day
    data.mkdir(parents=True, exist_ok=True)
    with EmbeddedClickHouse(data / "clickhouse") as engine:
        settings = ClickHouse(url=engine.url)
        migrate_database(settings)
        fill(settings, wanted, jobs)
        _wait_for_merges(settings)
    path.write_bytes(msgspec.json.encode(wanted))
    return wanted


def _wait_for_merges(settings: ClickHouse, quiet_s: float = 3, most_s: float = 120) -> None:
    """A day that is over has been merged long ago."""
    store = Store(settings)
    deadline = time.monotonic() + most_s
    idle_since = time.monotonic()
    while time.monotonic() < deadline and time.monotonic() - idle_since < quiet_s:
        if store.rows("SELECT count() FROM system.merges")[0][0]:
            idle_since = time.monotonic()
        time.sleep(0.5)
    store.close()


def _scan_s(store: Store, day: Day) -> dict[str, float]:
    found: dict[str, float] = {}
    for table, sql in _CEILING.items():
        began = time.perf_counter()
        store.rows(sql.replace("$range", _RANGE), {"from_ms": day.start_ms, "to_ms": day.end_ms})
        found[table] = time.perf_counter() - began
    return found


def _cpu_s(process: psutil.Process) -> float:
    times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def _runs(day: Day, data: Path, runs: int, sample: int) -> dict[str, Any]:
    """Scans and audits by turns, so that what else the machine does falls on both."""
    scans: list[dict[str, float]] = []
    audits: list[tuple[float, float, AuditReport]] = []
    me = psutil.Process()
    with EmbeddedClickHouse(data / "clickhouse") as engine:
        store = Store(ClickHouse(url=engine.url))
        count = store.rows("SELECT count() FROM fragments")[0][0]
        rows = store.rows("SELECT count() FROM ledger_gpu_minute")[0][0]
        for seed in range(runs):
            scans.append(_scan_s(store, day))
            began, cpu_s = time.perf_counter(), _cpu_s(me)
            report = audit(store, rules(), day.start_ms, day.end_ms, sample=sample, seed=seed, pauses_s=())
            audits.append((time.perf_counter() - began, _cpu_s(me) - cpu_s, report))
            if not report.balanced:
                raise SystemExit(f"the made day does not balance: {report.findings[0]}")
        store.close()
    seconds = [taken for taken, _, _ in audits]
    scan = [sum(each.values()) for each in scans]
    steps = audits[seconds.index(statistics.median_low(seconds))][2].seconds
    return {
        **{"gpus": day.gpus, "hours": day.hours, "pools": day.pools, "flush_s": day.flush_s, "sample": sample},
        **{"fragments": count, "gpu_minute_rows": rows, "minutes": audits[0][2].minutes},
        "audit_s": [round(each, 2) for each in seconds],
        "audit_cpu_s": [round(cpu, 2) for _, cpu, _ in audits],
        "scan_s": [round(each, 2) for each in scan],
        "audit_per_scan": round(statistics.median(seconds) / statistics.median(scan), 2),
        "steps_s": {name: round(each, 2) for name, each in steps.items()},
    }


def _command_s(day: Day, data: Path) -> float:
    """The command itself, from its start: with Python, its imports and an engine of its own."""
    span = ("--from", iso(day.start_ms), "--to", iso(day.end_ms))
    began = time.perf_counter()
    command = [sys.executable, "-m", "gpuledger.cli", "audit", *span, "--data", str(data)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def _report(found: Mapping[str, Any]) -> None:
    rows: list[tuple[Any, ...]] = [
        ("audit, s (median)", statistics.median(found["audit_s"]), found["audit_s"]),
        ("its CPU, s (median)", statistics.median(found["audit_cpu_s"]), found["audit_cpu_s"]),
        ("plain scan, s (median)", statistics.median(found["scan_s"]), found["scan_s"]),
        ("audit / scan", found["audit_per_scan"], ""),
        *((f"  {name}", seconds, "") for name, seconds in found["steps_s"].items()),
        ("the command, s", found["command_s"], ""),
    ]
    print_result("audit", ("", "median", "each run"), rows, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=10_000)
    parser.add_argument("--hours", type=int, default=24)
    parser.add_argument("--pools", type=int, default=4)
    parser.add_argument("--flush-s", type=int, default=10, help="seconds between an agent's batches; divides 600")
    parser.add_argument("--sample", type=int, default=20, help="minutes to compute again, as the command's default")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="processes that compute the ledger of the made day")
    parser.add_argument("--data", type=Path, metavar="DIR", help="keep the day here, or use the one that is here")
    arguments = parser.parse_args()
    midnight_ms = (time.time_ns() // 86_400_000_000_000 - 1) * 86_400_000
    wanted = Day(arguments.gpus, arguments.hours, arguments.pools, arguments.flush_s, midnight_ms)
    with tempfile.TemporaryDirectory() as temporary:
        data = arguments.data or Path(temporary)
        day = _filled(data, wanted, arguments.jobs)
        print(f"load of the machine before: {machine()['load_1m']}", flush=True)
        found = _runs(day, data, arguments.runs, arguments.sample)
        _report({**found, "command_s": round(_command_s(day, data), 2)})


if __name__ == "__main__":
    main()
