"""How old a sample is when it is stored, and when a ledger row contains it: `python benchmarks/freshness.py`.

A simulated site on the embedded product, once per flush interval. One node in eight is followed: the database is
asked every `--poll` milliseconds for its newest fragments (a sample is stored when its fragment is seen), and for how
many fragments the last recompute of the open minutes had read (a sample is in the ledger when that count has passed
the fragment). Ages are from the sample's own time to the answer, so they are never too good. The target is DESIGN
section 10: the flush interval + 2 s to the fragment, + 4 s to the ledger row, both at the 99th percentile.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from installation import Installation, installation, print_result, quantile, site_yaml

from gpuledger.local.guard import spawn

_MINUTE_MS = 60_000
#: Minutes that are looked at; older ones have been left alone by everybody.
_LOOK_BACK = 2
#: The first seconds have inventories, jobs and a worker that reads its first blocks.
_SETTLE_S = 15
#: At the end, samples that are stored and in no row yet are waited for so long; what is left counts with its age then.
_PATIENCE_S = 15

_FRAGMENTS = """
    SELECT toUnixTimestamp64Milli(minute), run_id, seq,
        toUnixTimestamp64Milli(minute) + min(arrayMin(segment_start_ms)),
        toUnixTimestamp64Milli(minute) + max(segment_start_ms[-1] + segment_duration_ms[-1])
    FROM fragments
    WHERE minute >= fromUnixTimestamp64Milli({since:Int64}, 'UTC')
        AND gpu IN (SELECT gpu FROM placements WHERE pool = {pool:String} AND node IN {nodes:Array(String)})
        AND length(segment_start_ms) > 0
    GROUP BY minute, run_id, seq"""
_COUNTS = """
    SELECT toUnixTimestamp64Milli(minute), count() FROM fragments
    WHERE minute >= fromUnixTimestamp64Milli({since:Int64}, 'UTC')
        AND gpu IN (SELECT gpu FROM placements WHERE pool = {pool:String})
    GROUP BY minute"""
_READ = """
    SELECT toUnixTimestamp64Milli(minute), fragments FROM v_recomputes
    WHERE pool = {pool:String} AND minute >= fromUnixTimestamp64Milli({since:Int64}, 'UTC')"""


@dataclass(slots=True)
class Ages:
    """Milliseconds from sample to stored fragment and to ledger row; `waiting` are stored and in no row yet."""

    period_ms: int
    stored_ms: list[int] = field(default_factory=list[int])
    ledger_ms: list[int] = field(default_factory=list[int])
    #: minute -> (fragments there were when it was first seen, its sample times)
    waiting: dict[int, list[tuple[int, list[int]]]] = field(
        default_factory=lambda: defaultdict[int, list[tuple[int, list[int]]]](list)
    )

    def stored(self, minute: int, fragments: int, start_ms: int, end_ms: int, now_ms: int) -> None:
        # A sample covers the period that ends with it.
        samples = list(range(end_ms, start_ms, -self.period_ms))
        self.stored_ms += [now_ms - at for at in samples]
        self.waiting[minute].append((fragments, samples))

    def computed(self, minute: int, fragments: int, now_ms: int) -> None:
        left = self.waiting.pop(minute, [])
        self.waiting[minute] = [(needed, samples) for needed, samples in left if needed > fragments]
        done = [samples for needed, samples in left if needed <= fragments]
        self.ledger_ms += [now_ms - at for samples in done for at in samples]

    def give_up(self, now_ms: int) -> int:
        """Counts what still waits with its age now; how many samples that are."""
        left = [at for entries in self.waiting.values() for _, samples in entries for at in samples]
        self.ledger_ms += [now_ms - at for at in left]
        self.waiting.clear()
        return len(left)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def follow(up: Installation, pool: str, nodes: list[str], seconds: int, poll_s: float) -> Ages:
    """Watches the samples of so many seconds, after `_SETTLE_S`."""
    ages = Ages(1000)
    seen: set[tuple[int, str, int]] = set()
    begin = time.monotonic() + _SETTLE_S
    end = begin + seconds
    while time.monotonic() < end or (any(ages.waiting.values()) and time.monotonic() < end + _PATIENCE_S):
        round_began = time.monotonic()
        asked_ms = _now_ms()
        arguments = {"pool": pool, "since": (asked_ms // _MINUTE_MS - _LOOK_BACK) * _MINUTE_MS}
        fresh = [row for row in up.rows(_FRAGMENTS, nodes=nodes, **arguments) if tuple(row[:3]) not in seen]
        stored_at_ms = _now_ms()
        counts = dict(up.rows(_COUNTS, **arguments)) if fresh else {}
        for minute, run_id, seq, start_ms, end_ms in fresh:
            seen.add((minute, run_id, seq))
            if begin <= time.monotonic() < end:
                ages.stored(minute, counts[minute], start_ms, end_ms, stored_at_ms)
        for minute, fragments in up.rows(_READ, **arguments):
            ages.computed(minute, fragments, _now_ms())
        up.check()
        time.sleep(max(0.0, poll_s - (time.monotonic() - round_began)))
    if left := ages.give_up(_now_ms()):
        print(f"{left} samples came into no ledger row in {_PATIENCE_S} s: they count with the age they had then")
    return ages


def measure(up: Installation, directory: Path, gpus: int, flush_s: int, seconds: int, poll_s: float) -> Ages:
    """A site of its own for this flush interval, ended afterwards."""
    name = f"flush{flush_s}"
    scenario = directory / f"{name}.yaml"
    scenario.write_text(site_yaml(name, gpus, flush_s * 1000), encoding="utf-8")
    pool = f"{name}-0"
    nodes = [f"{pool}-{n:04d}" for n in range(1, max(1, gpus // 8) + 1, 8)]
    duration_s = _SETTLE_S + seconds + _PATIENCE_S
    command = [sys.executable, "-m", "gpuledger.cli", "simulate", str(scenario), "--for", f"{duration_s}s"]
    with (directory / f"{name}.log").open("wb") as log:
        env = {**os.environ, "GPULEDGER_KAFKA__BOOTSTRAP": up.running.kafka_bootstrap}
        process = spawn(command, output=log, env=env)
    try:
        return follow(up, pool, nodes, seconds, poll_s)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _rows(flush_s: int, ages: Ages) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for what, values, allowance_s in (("fragment", ages.stored_ms, 2), ("ledger row", ages.ledger_ms, 4)):
        if not values:
            raise SystemExit(f"flush {flush_s} s: no sample reached a {what}; measure for longer")
        target_ms = (flush_s + allowance_s) * 1000
        rows.append(
            {
                "flush_s": flush_s,
                "to": what,
                "samples": len(values),
                "p50_ms": round(quantile(values, 0.5)),
                "p99_ms": round(quantile(values, 0.99)),
                "most_ms": max(values),
                "target_p99_ms": target_ms,
                "p99_of_target": round(quantile(values, 0.99) / target_ms, 2),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=1000)
    parser.add_argument("--flush", type=int, action="append", metavar="SECONDS", help="repeat; default: 1 and 10")
    parser.add_argument("--seconds", type=int, default=90, help="of each flush interval, after the first moments")
    parser.add_argument("--poll", type=int, default=100, metavar="MS", help="how often the database is asked")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary, installation(Path(temporary), ["--no-simulation"]) as up:
        for flush_s in arguments.flush or [1, 10]:
            ages = measure(up, Path(temporary), arguments.gpus, flush_s, arguments.seconds, arguments.poll / 1000)
            rows += _rows(flush_s, ages)
    headings = list(rows[0])
    result = {"gpus": arguments.gpus, "seconds": arguments.seconds, "poll_ms": arguments.poll, "ages": rows}
    print_result("freshness", headings, [list(row.values()) for row in rows], result)


if __name__ == "__main__":
    main()
