"""How fast a replay is read, placed, told and sent: a synthetic 60-day trace of 2,500 GPUs and 80,000 jobs.

`python benchmarks/replay.py` prints one line per step; `--write DIR` also leaves TRACE.csv and FLEET.csv there, for
`gpuledger replay jobs`; `--bootstrap` sends to a Kafka whose topics exist. The same seed gives the same files.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import random
import resource
import tempfile
import time
from pathlib import Path

from gpuledger.agents.messages import event_message
from gpuledger.agents.publisher import Publisher
from gpuledger.agents.replay.facts import JobReplay, Scope
from gpuledger.agents.replay.place import place
from gpuledger.agents.replay.replayer import Totals, send
from gpuledger.agents.replay.trace import TraceJob, read_fleet, read_jobs
from gpuledger.schemas.config import Kafka

#: 2025-01-01T00:00:00Z
START_S = 1_735_689_600
_DAY_S = 86_400
_SIZES = (1, 2, 4, 8, 16, 32, 64)
_SIZE_WEIGHTS = (58, 14, 10, 13, 3, 1.5, 0.5)
_LOAD = 0.75


def write_fleet(path: Path, gpus: int) -> None:
    """Nodes of 8 GPUs in two pools, the last one smaller where need be."""
    with path.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(("node", "gpus", "model", "pool", "site"))
        for n, first in enumerate(range(0, gpus, 8)):
            model = "H100" if first < gpus * 3 // 5 else "A100"
            writer.writerow((f"node-{n:04d}", min(8, gpus - first), model, f"bench-{model.lower()}", "bench"))


def write_trace(path: Path, seed: int, gpus: int, jobs: int, days: int, tenants: int) -> None:
    """Jobs whose sum is about 75 % of the fleet's time: few large tenants and many small ones, skewed run times."""
    chance = random.Random(seed)
    names = [f"tenant-{n:03d}" for n in range(tenants)]
    shares = [1 / (n + 1) for n in range(tenants)]
    mean_gpus = sum(s * w for s, w in zip(_SIZES, _SIZE_WEIGHTS, strict=True)) / sum(_SIZE_WEIGHTS)
    mean_s = _LOAD * gpus * days * _DAY_S / (jobs * mean_gpus)
    rows: list[tuple[str, str, str, int, int, int, int, str, str]] = []
    for n in range(jobs):
        account = chance.choices(names, shares)[0]
        submitted = START_S + chance.randrange(days * _DAY_S)
        start = submitted + int(chance.expovariate(1 / 300))
        # A lognormal of sigma 1.5 has the mean exp(1.125) times its median.
        length = max(1, int(chance.lognormvariate(0, 1.5) * mean_s / 3.0802))
        end = min(start + length, START_S + days * _DAY_S)
        state = "COMPLETED" if chance.random() < 0.8 else "FAILED"
        size = chance.choices(_SIZES, _SIZE_WEIGHTS)[0]
        model = chance.choices(("", "H100", "A100"), (70, 20, 10))[0]
        user = f"user-{chance.randrange(8)}"
        if start < end:
            rows.append((f"job-{n}", account, user, size, start, end, submitted, model, state))
    with path.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(("job_id", "account", "user", "gpus", "start", "end", "submitted", "model", "state"))
        writer.writerows(rows)


class _Clock:
    def __init__(self) -> None:
        self._since = time.perf_counter()

    def line(self, step: str, count: int, what: str) -> None:
        """One line: seconds and rate since the previous one."""
        now = time.perf_counter()
        seconds = now - self._since
        print(f"{step:<8} {seconds:8.2f} s  {count:>10,} {what:<12} {count / max(seconds, 1e-9):>12,.0f}/s", flush=True)
        self._since = time.perf_counter()


def run(directory: Path, bootstrap: str | None) -> None:
    clock = _Clock()
    fleet = read_fleet(directory / "FLEET.csv")
    jobs: list[TraceJob] = list(read_jobs(directory / "TRACE.csv", int(time.time() * 1000)))
    clock.line("read", len(jobs), "jobs")
    placement = place(jobs, fleet)
    clock.line("place", sum(len(placed.claims) for placed in placement.held), "GPU claims")
    replay = JobReplay(placement, fleet, Scope("bench"))
    totals = Totals()
    for event in replay.events():
        totals.add(event)
        event_message(event)
    clock.line("tell", totals.events.total(), "events")
    if bootstrap is not None:

        async def publish() -> int:
            async with Publisher(Kafka(bootstrap=bootstrap), client_id="gpuledger-benchmark") as publisher:
                return (await send(replay, publisher)).events

        clock.line("send", asyncio.run(publish()), "events")
    gpu_hours = totals.held_gpu_us.total() // 3_600_000_000
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(
        f"{len(totals.held_gpu_us)} tenants, {gpu_hours:,} GPU-hours, {len(placement.unplaced):,} jobs not placed, "
        f"peak memory {peak_mib} MiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=2_500)
    parser.add_argument("--jobs", type=int, default=80_000)
    parser.add_argument("--days", type=int, default=60)
    parser.add_argument("--tenants", type=int, default=100)
    parser.add_argument("--write", type=Path, metavar="DIR", help="leave TRACE.csv and FLEET.csv there")
    parser.add_argument("--bootstrap", metavar="HOST:PORT", help="send to this Kafka; its topics must exist")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = arguments.write or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        write_fleet(directory / "FLEET.csv", arguments.gpus)
        write_trace(
            directory / "TRACE.csv",
            arguments.seed,
            arguments.gpus,
            arguments.jobs,
            arguments.days,
            arguments.tenants,
        )
        run(directory, arguments.bootstrap)


if __name__ == "__main__":
    main()
