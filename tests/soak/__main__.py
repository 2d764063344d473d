"""`scripts/soak`: hours of load by hand, with a table of what the worker's memory and lag did, and a verdict."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from gpuledger.cli.durations import parse_duration_ms
from gpuledger.local.clickhouse import EmbeddedClickHouse
from gpuledger.local.kafka import EmbeddedKafka
from tests.soak.soak import Plan, Soak, memory_of, soak
from tests.soak.trend import Reading, flatness, medians

TOLERANCE = 0.10
_MIB = 1 << 20


def _duration_s(text: str) -> int:
    return parse_duration_ms(text) // 1000


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/soak", description=__doc__)
    parser.add_argument(
        "--for", dest="seconds", type=_duration_s, default=3600, metavar="1h", help="length of the load"
    )
    parser.add_argument("--gpus", type=int, default=1000, help="a multiple of 8, at 1 Hz (default: %(default)s)")
    parser.add_argument("--flush", type=_duration_s, default=5, metavar="5s", help="of the simulated agents")
    parser.add_argument("--warm", type=_duration_s, default=None, metavar="5m", help="left out at the beginning")
    parser.add_argument("--window", type=_duration_s, default=None, metavar="5m", help="of one median")
    parser.add_argument(
        "--keep", type=Path, help="directory for data, logs and readings.jsonl; without: a temporary one"
    )
    return parser.parse_args()


def _told(reading: Reading) -> dict[str, object]:
    return {name: getattr(reading, name) for name in Reading.__slots__}


def _report(run: Soak, warm_s: int, window_s: int, others: dict[str, int]) -> bool:
    """Prints the medians and the verdict; whether all is flat."""
    readings = [reading for reading in run.readings if reading.at_s >= warm_s]
    columns = {
        "RSS, MiB": medians(readings, window_s, lambda r: r.rss_bytes),
        "anonymous, MiB": medians(readings, window_s, lambda r: r.anonymous_bytes),
        "behind, s": medians(readings, window_s, lambda r: r.behind_ms),
        "not complete, s": medians(readings, window_s, lambda r: r.incomplete_ms),
    }
    print("from, s".rjust(8), *(name.rjust(16) for name in columns))
    for n, (start_s, _) in enumerate(columns["RSS, MiB"]):
        cells = [
            column[n][1] / (_MIB if "MiB" in name else 1000) for name, column in columns.items() if n < len(column)
        ]
        print(f"{start_s:8.0f}", *(f"{cell:16.1f}" for cell in cells))
    memory = flatness(readings, window_s, lambda r: r.rss_bytes)
    lag = medians(readings, window_s, lambda r: r.behind_ms)
    third = max(1, len(lag) // 3)
    later_ms = max(level for _, level in lag[-third:]) - max(level for _, level in lag[:third])
    flat = memory.within(TOLERANCE) and later_ms <= 2_000
    (silent,) = run.rows("SELECT uniqExact(gpu) FROM placements FINAL WHERE gpu NOT IN (SELECT gpu FROM fragments)")
    (stored,) = run.rows("SELECT count() FROM fragments")
    result = {
        "gpus": run.plan.gpus,
        "seconds": run.plan.seconds,
        "flush_ms": run.plan.flush_ms,
        "warm_s": warm_s,
        "window_s": window_s,
        "rss_mib": round(memory.middle / _MIB, 1),
        "strays_pct": round(memory.strays * 100, 2),
        "rises_pct": round(memory.rises * 100, 2),
        "behind_later_ms": round(later_ms),
        "silent_gpus": silent[0],
        "fragments": stored[0],
        "other_rss_mib": {name: round(memory_of(pid)[0] / _MIB) for name, pid in others.items()},
        "load_1m": round(os.getloadavg()[0], 2),
        "flat": flat,
    }
    print(json.dumps({"soak": result}), flush=True)
    return flat


def main() -> int:
    given = _arguments()
    warm_s = given.warm if given.warm is not None else min(600, given.seconds // 4)
    window_s = given.window if given.window is not None else max(10, (given.seconds - warm_s) // 11)
    plan = Plan(given.gpus, given.seconds, given.flush * 1000)
    with tempfile.TemporaryDirectory(prefix="gpuledger-soak-") as temporary:
        directory = (given.keep or Path(temporary)).absolute()
        directory.mkdir(parents=True, exist_ok=True)
        with (
            EmbeddedKafka(directory / "kafka") as kafka,
            EmbeddedClickHouse(directory / "clickhouse") as clickhouse,
            soak(kafka.bootstrap, clickhouse.url, directory, plan) as run,
            (directory / "readings.jsonl").open("w", encoding="utf-8") as out,
        ):
            print(f"worker {run.worker.pid}, {plan.gpus} GPUs, {plan.seconds} s, logs in {directory}", flush=True)

            def told(reading: Reading) -> None:
                out.write(json.dumps(_told(reading)) + "\n")
                out.flush()

            run.watch(told)
            return 0 if _report(run, warm_s, window_s, {"kafka": kafka.pid, "clickhouse": clickhouse.pid}) else 1


if __name__ == "__main__":
    sys.exit(main())
