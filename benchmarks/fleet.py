"""The largest fleet that one worker and the embedded engine hold: `python benchmarks/fleet.py --gpus 100000`.

Every GPU is sampled once a second and every node flushes every ten; placements, allocations, commitments, costs and
rates are there, and the ledger is computed as always. The load is made beforehand: templates of batches, of which only
times and counters are written anew. Lag, memory and CPU are printed over time, and whether they stay flat.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from installation import Installation, installation, print_result, site_yaml

from gpuledger.agents.batch import encode_batch
from gpuledger.agents.broker_topics import create_topics
from gpuledger.agents.messages import Message, event_message
from gpuledger.agents.publisher import Publisher
from gpuledger.agents.simulator.facts import capacity_facts, rate_facts
from gpuledger.agents.simulator.scenario import Scenario, load_scenario
from gpuledger.schemas.config import Kafka
from gpuledger.schemas.events import Allocation, Inventory, Placement
from gpuledger.schemas.telemetry import HEADER_KEY, BatchHeader, Device, HostReading, encode_header

_GPUS_PER_NODE = 8
_FLUSH_S = 10
#: GPUs that jobs hold, in twentieths.
_HELD_TWENTIETHS = 18
_VARIANTS = 60
_POWER_MW = 600_000
#: Written over in every message: they must be found in the bytes of a header once and nowhere else.
_SEQ, _PREVIOUS_MS, _PREVIOUS_MJ, _HOST_MS = 444_444_444, 1_111_111_111_111, 2_222_222_222_222_222, 1_333_333_333_333
_EVERY_S = 10
#: A minute is complete after its end and the grace of 60 s. Live slices have a third of the time, so that each of many
#: pools has its turn about every two minutes.
_COMPLETE_WITHIN_S = 300
_SERVICES = ("worker", "clickhouse", "kafka")
_BEHIND = "SELECT dateDiff('millisecond', min(appended_at), now64(3, 'UTC')) FROM v_progress WHERE topic = 'telemetry'"
#: Age of the newest minute whose rows are complete, in the pool that is behind.
_COMPLETE = """
    SELECT dateDiff('second', min(newest), now()) - 60
    FROM (SELECT pool, maxIf(minute, complete) AS newest FROM v_recomputes
        WHERE minute >= now() - INTERVAL 1 HOUR GROUP BY pool)"""
_FACTS = "SELECT (SELECT uniqExact(gpu) FROM placements), (SELECT uniqExact(gpu) FROM allocations)"
_LEDGER = """
    SELECT minute, sum(gpu_us), sumIf(gpu_us, kind = 'held'),
        sumIf(gpu_us, kind = 'held' AND activity IN ('active', 'idle')), min(complete)
    FROM v_ledger_minute
    WHERE minute >= fromUnixTimestamp64Milli({since:Int64}, 'UTC')
        AND minute < fromUnixTimestamp64Milli({until:Int64}, 'UTC')
        AND kind IN ('held', 'unconfirmed', 'reserved_unused', 'free', 'unsliced')
    GROUP BY minute ORDER BY minute"""


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _gpu(node: int, gpu: int) -> str:
    return f"GPU-{node:08x}-0000-4000-8000-{gpu:012x}"


@dataclass(frozen=True)
class _Template:
    """One batch's bytes, and where its times and counters lie."""

    value: bytes
    ts_at: int
    energy_at: int

    def at(self, last_ms: int) -> bytes:
        """The batch whose last samples are at `last_ms`."""
        times = np.repeat(last_ms - 1000 * np.arange(_FLUSH_S - 1, -1, -1), _GPUS_PER_NODE)
        value = bytearray(self.value)
        value[self.ts_at : self.ts_at + times.nbytes] = times.tobytes()
        energy = _energy_mj(times)
        value[self.energy_at : self.energy_at + energy.nbytes] = energy.tobytes()
        return bytes(value)


def _energy_mj(times_ms: Any) -> Any:
    """Every GPU's counter: the same slope for all, so that it needs no memory of the node."""
    return (times_ms - 1_500_000_000_000) * (_POWER_MW // 1000) // 1000


def _template(variant: int) -> _Template:
    rows = _FLUSH_S * _GPUS_PER_NODE
    noise = np.random.default_rng(variant)
    first_ms = 1_600_000_000_000
    times = np.repeat(first_ms + 1000 * np.arange(_FLUSH_S), _GPUS_PER_NODE)
    active = np.repeat(np.arange(_FLUSH_S) != variant % (3 * _FLUSH_S), _GPUS_PER_NODE)
    columns: dict[str, list[Any]] = {
        "ts_ms": times.tolist(),
        "device": np.tile(np.arange(_GPUS_PER_NODE), _FLUSH_S).tolist(),
        "energy_mj": _energy_mj(times).tolist(),
        "memory_used_bytes": noise.integers(60 << 30, 61 << 30, rows).tolist(),
        "memory_total_bytes": [80 << 30] * rows,
        "power_mw": noise.integers(590_000, 610_000, rows).tolist(),
        "power_limit_mw": [700_000] * rows,
        "sm_clock_mhz": noise.integers(1_900, 1_950, rows).tolist(),
        "processes": [1] * rows,
    }
    for name, scale in {"gpu_util_pct": 100, "mem_util_pct": 90, "sm_active": 1, "tensor_active": 1}.items():
        columns[name] = (scale * np.where(active, 0.8 + 0.1 * noise.random(rows), 0)).tolist()
    for name in ("dram_active", "sm_occupancy"):
        columns[name] = np.where(active, 0.4 + 0.1 * noise.random(rows), 0).tolist()
    columns["temperature_gpu_c"] = noise.integers(58, 66, rows).astype(float).tolist()
    header = BatchHeader("n", "b", 1, "r", 1, 0, 1000, 1, 0, [Device("g")] * _GPUS_PER_NODE)
    value = encode_batch(header, columns).value
    places = [value.find(column.astype(np.int64).tobytes()) for column in (times, _energy_mj(times))]
    if min(places) < 0:
        raise SystemExit("the encoder writes batches that this benchmark does not know")
    return _Template(value, places[0], places[1])


def _header(node: int, start_ms: int, running: list[str]) -> bytes:
    """A node's header with the numbers that are written over; without its seq it is the same all the time."""
    return encode_header(
        BatchHeader(
            node=f"node-{node:06d}",
            boot_id=f"b0070000-0000-4000-8000-{node:012x}",
            boot_start_ms=start_ms - 86_400_000,
            run_id=f"a9e00000-0000-4000-8000-{node:012x}",
            run_start_ms=start_ms,
            seq=_SEQ,
            period_ms=1000,
            anchor_wall_ms=start_ms,
            anchor_boottime_ms=86_400_000,
            devices=[Device(_gpu(node, gpu), 0, _PREVIOUS_MS, _PREVIOUS_MJ) for gpu in range(_GPUS_PER_NODE)],
            running=running,
            host=HostReading(ts_ms=_HOST_MS, cpu_count=192, node_power_mw=6_000_000),
            agent_version="benchmark",
        )
    )


class Load:
    """What the fleet sends; `second` makes the messages of the nodes that flush then."""

    def __init__(self, gpus: int, pools: Sequence[str], start_ms: int) -> None:
        self.nodes = gpus // _GPUS_PER_NODE
        self.start_ms = start_ms
        self._pools = pools
        self._templates = [_template(variant) for variant in range(_VARIANTS)]
        self._headers = [_header(node, start_ms, self._running(node)) for node in range(self.nodes)]

    def _running(self, node: int) -> list[str]:
        if node % 20 >= _HELD_TWENTIETHS:
            return []
        return [f"slurm:{node}:{_gpu(node, gpu)}" for gpu in range(_GPUS_PER_NODE)]

    def _pool(self, node: int) -> str:
        return self._pools[node % len(self._pools)]

    def inventories(self) -> Iterator[Message]:
        for node in range(self.nodes):
            placements = [
                Placement(
                    id=f"placement:{_gpu(node, gpu)}",
                    revision=self.start_ms,
                    claimed_at_ms=self.start_ms,
                    gpu=_gpu(node, gpu),
                    node=f"node-{node:06d}",
                    pool=self._pool(node),
                    site="fleet",
                    start_ms=self.start_ms,
                )
                for gpu in range(_GPUS_PER_NODE)
            ]
            name = f"node-{node:06d}"
            yield event_message(Inventory(node=name, claimed_at_ms=self.start_ms, placements=placements))

    def allocations(self) -> Iterator[Message]:
        """A job per node that is held, of either tenant of the pool by turns."""
        for node in range(self.nodes):
            for gpu, name in enumerate(self._running(node)):
                account = f"fleet-{'ab'[node // len(self._pools) % 2]}"
                yield event_message(
                    Allocation(
                        id=name,
                        revision=self.start_ms,
                        claimed_at_ms=self.start_ms,
                        node=f"node-{node:06d}",
                        gpu=_gpu(node, gpu),
                        job_id=f"slurm:{node}",
                        source="slurm",
                        account=account,
                        user=f"user-{node % 50}",
                        start_ms=self.start_ms,
                    )
                )

    def second(self, number: int) -> list[Message]:
        """The batches flushed when `number` seconds have passed since the start."""
        last_ms = self.start_ms + number * 1000
        previous_ms = last_ms - _FLUSH_S * 1000
        values = [template.at(last_ms) for template in self._templates]
        changes = (
            (str(_PREVIOUS_MS).encode(), str(previous_ms).encode()),
            (str(_PREVIOUS_MJ).encode(), str(_energy_mj(previous_ms)).encode()),
            (str(_HOST_MS).encode(), str(last_ms).encode()),
            (str(_SEQ).encode(), str(number // _FLUSH_S).encode()),
        )
        messages: list[Message] = []
        for node in range(number % _FLUSH_S, self.nodes, _FLUSH_S):
            header = self._headers[node]
            for old, new in changes:
                header = header.replace(old, new)
            messages.append(Message("telemetry", f"node-{node:06d}", values[node % _VARIANTS], ((HEADER_KEY, header),)))
        return messages


@dataclass
class Sender:
    """Sends each second's batches when it is over; `late_s` is by how much the last ones were late."""

    load: Load
    kafka: Kafka
    late_s: float = 0.0
    done: bool = False

    async def facts(self, scenario: Scenario) -> None:
        await create_topics(self.kafka)
        start_ms = self.load.start_ms
        async with Publisher(self.kafka, "gpuledger-fleet") as publisher:
            few = [*rate_facts(scenario, start_ms, start_ms), *capacity_facts(scenario, start_ms, start_ms)]
            await publisher.publish_many([event_message(event) for event in few])
            for source in (self.load.inventories(), self.load.allocations()):
                chunk: list[Message] = []
                for message in source:
                    chunk.append(message)
                    if len(chunk) == 2_000:
                        await publisher.publish_many(chunk)
                        chunk = []
                await publisher.publish_many(chunk)

    async def run(self, first: int, seconds: int) -> None:
        async with Publisher(self.kafka, "gpuledger-fleet") as publisher:
            for number in range(first, first + seconds):
                messages = self.load.second(number)
                due_ms = self.load.start_ms + number * 1000
                await asyncio.sleep(max(0, due_ms - _now_ms()) / 1000)
                await publisher.publish_many(messages)
                self.late_s = max(0.0, (_now_ms() - due_ms) / 1000)
        self.done = True


@dataclass(frozen=True)
class Sample:
    """One look at everything. Times in seconds, memory in MiB, CPU in cores since the look before."""

    at_s: float
    behind_s: float
    complete_lag_s: float
    live_s: float
    backlog_minutes: float
    sender_late_s: float
    cpu: dict[str, float]
    rss_mib: dict[str, float]

    def cells(self) -> list[str]:
        numbers = [self.behind_s, self.complete_lag_s, self.live_s, self.backlog_minutes, self.sender_late_s]
        cells = [f"{self.at_s:.0f}", *(f"{number:.1f}" for number in numbers)]
        return [*cells, *(f"{self.cpu[n]:.2f}/{self.rss_mib[n]:.0f}" for n in (*_SERVICES, "sender") if n in self.cpu)]


_NUMBERS = ("at s", "behind s", "rows complete s", "live slice s", "backlog min", "sender late s")
_HEADINGS = (*_NUMBERS, *(f"{name} cores/MiB" for name in (*_SERVICES, "sender")))


class Looks:
    """Looks at a running installation every few seconds."""

    def __init__(self, up: Installation, sender: Sender) -> None:
        self._up = up
        self._sender = sender
        found = up.processes()
        self._processes = {name: found[name] for name in _SERVICES} | {"sender": psutil.Process(os.getpid())}
        log = (up.data / "logs" / "worker.log").read_text(errors="replace")
        address = re.search(r"health on (127\.0\.0\.1:\d+)", log)
        if address is None:
            raise SystemExit("the worker has not said where its metrics are")
        self._metrics = f"http://{address[1]}/metrics"
        self._began_s = self._last_s = time.monotonic()
        self._cpu_s = {name: self._used(process) for name, process in self._processes.items()}
        self.samples: list[Sample] = []

    @staticmethod
    def _used(process: psutil.Process) -> float:
        times = process.cpu_times()
        return times.user + times.system

    def _metric(self, text: str, name: str) -> float:
        found = re.search(rf"^gpuledger_worker_{name} (\S+)$", text, flags=re.MULTILINE)
        return float(found[1]) if found is not None else float("nan")

    def look(self) -> Sample:
        self._up.check()
        with urllib.request.urlopen(self._metrics, timeout=30) as answer:
            metrics = answer.read().decode()
        ((behind_ms,),) = self._up.rows(_BEHIND)
        ((complete_s,),) = self._up.rows(_COMPLETE)
        now_s = time.monotonic()
        used = {name: self._used(process) for name, process in self._processes.items()}
        wall_s = max(now_s - self._last_s, 1e-6)
        sample = Sample(
            at_s=now_s - self._began_s,
            behind_s=behind_ms / 1000,
            complete_lag_s=float(complete_s),
            live_s=self._metric(metrics, "last_live_seconds"),
            backlog_minutes=self._metric(metrics, "backlog_minutes"),
            sender_late_s=self._sender.late_s,
            cpu={name: (used[name] - self._cpu_s[name]) / wall_s for name in used},
            rss_mib={name: process.memory_info().rss / 2**20 for name, process in self._processes.items()},
        )
        self._last_s, self._cpu_s = now_s, used
        self.samples.append(sample)
        return sample


def _third(samples: Sequence[Sample], number: int) -> Sequence[Sample]:
    size = max(1, len(samples) // 3)
    return samples[number * size : (number + 1) * size] or samples[-1:]


def verdict(samples: Sequence[Sample], ledger_wrong: Sequence[str]) -> dict[str, str]:
    """Question -> "yes", or what is not so. Flat: the last third against the middle one."""
    middle, last = _third(samples, 1), _third(samples, 2)
    told: dict[str, str] = {}
    behind = [statistics.median(sample.behind_s for sample in part) for part in (middle, last)]
    flat = behind[1] <= max(10.0, 1.5 * behind[0])
    told["lag flat"] = "yes" if flat else f"telemetry is stored {behind[1]:.0f} s late, before that {behind[0]:.0f} s"
    complete = max(sample.complete_lag_s for sample in last)
    in_time = complete <= _COMPLETE_WITHIN_S
    told["minutes complete in time"] = "yes" if in_time else f"the newest complete minute ended {complete:.0f} s ago"
    grown = {
        name: statistics.median(s.rss_mib[name] for s in last) / statistics.median(s.rss_mib[name] for s in middle)
        for name in ("worker", "clickhouse")
    }
    more = {name: factor for name, factor in grown.items() if factor > 1.1}
    told["memory flat"] = "no: " + ", ".join(f"{n} x {f:.2f}" for n, f in more.items()) if more else "yes"
    late = max(sample.sender_late_s for sample in last)
    told["sender in time"] = "yes" if late < 5 else f"no: {late:.0f} s late, so the load was less than asked for"
    told["ledger right"] = "yes" if not ledger_wrong else "; ".join(ledger_wrong[:3])
    return told


def _ledger_wrong(up: Installation, gpus: int, held: int, since_ms: int, until_ms: int) -> list[str]:
    """Minutes whose rows do not have every GPU for 60 s, and every allocated one held, 99 % of it observed."""
    wrong: list[str] = []
    rows = up.rows(_LEDGER, since=since_ms, until=until_ms)
    for minute, total_us, held_us, observed_us, complete in rows:
        exact = (int(total_us), int(held_us)) == (gpus * 60_000_000, held * 60_000_000)
        if not exact or int(observed_us) < 0.99 * int(held_us) or not complete:
            wrong.append(
                f"{minute:%H:%M}: {total_us} us of {gpus * 60_000_000}, {held_us} held of {held * 60_000_000}, "
                f"{observed_us} observed ({complete=})"
            )
    if len(rows) != (until_ms - since_ms) // 60_000:
        wrong.append(f"{len(rows)} minutes of {(until_ms - since_ms) // 60_000} have rows")
    return wrong


async def _wait_for_facts(up: Installation, gpus: int, held: int) -> None:
    placed = allocated = 0
    for _ in range(600):
        ((placed, allocated),) = await asyncio.to_thread(up.rows, _FACTS)
        if (placed, allocated) == (gpus, held):
            return
        up.check()
        await asyncio.sleep(0.5)
    raise SystemExit(f"facts: {placed} GPUs placed of {gpus}, {allocated} allocated of {held}")


async def measure(up: Installation, arguments: argparse.Namespace, scenario: Scenario) -> dict[str, Any]:
    pools = [pool.name for pool in scenario.pools]
    # Allocations and placements begin on a minute, a little back: the first one is whole.
    start_ms = _now_ms() // 60_000 * 60_000
    load = Load(arguments.gpus, pools, start_ms)
    sender = Sender(load, Kafka(bootstrap=up.running.kafka_bootstrap))
    began_s = time.monotonic()
    await sender.facts(scenario)
    held = sum(8 for node in range(load.nodes) if node % 20 < _HELD_TWENTIETHS)
    await _wait_for_facts(up, arguments.gpus, held)
    print(
        f"{arguments.gpus} GPUs in {len(pools)} pools, facts stored in {time.monotonic() - began_s:.0f} s", flush=True
    )
    first = (_now_ms() - start_ms) // 1000 + 2
    sending = asyncio.create_task(sender.run(first, arguments.warm + arguments.seconds))
    await asyncio.sleep(arguments.warm)
    looks = Looks(up, sender)
    print("  ".join(_HEADINGS), flush=True)
    while not sending.done():
        await asyncio.sleep(min(_EVERY_S, arguments.seconds / 6))
        sample = await asyncio.to_thread(looks.look)
        print(
            "  ".join(cell.rjust(len(name)) for cell, name in zip(sample.cells(), _HEADINGS, strict=True)), flush=True
        )
    await sending
    # From the first whole minute of batches to the last that had its time.
    since_ms = (start_ms + first * 1000 + 2 * _FLUSH_S * 1000) // 60_000 * 60_000 + 60_000
    until_ms = (_now_ms() - _COMPLETE_WITHIN_S * 1000) // 60_000 * 60_000
    wrong = ["no minute is old enough to be looked at: measure for longer"]
    if until_ms > since_ms:
        wrong = _ledger_wrong(up, arguments.gpus, held, since_ms, until_ms)
    told = verdict(looks.samples, wrong)
    last = _third(looks.samples, 2)
    names = (*_SERVICES, "sender")
    return {
        "gpus": arguments.gpus,
        "pools": len(pools),
        "seconds": arguments.seconds,
        "held": all(answer == "yes" for answer in told.values()),
        "verdict": told,
        "minutes_checked": max(0, (until_ms - since_ms) // 60_000),
        "behind_s": round(statistics.median(sample.behind_s for sample in last), 1),
        "complete_lag_s": round(statistics.median(sample.complete_lag_s for sample in last), 1),
        "cpu_cores": {name: round(statistics.mean(s.cpu[name] for s in last), 2) for name in names},
        "rss_mib": {name: round(statistics.median(s.rss_mib[name] for s in last)) for name in names},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=10_000, help="a multiple of 8")
    parser.add_argument("--pools", type=int, help="default: one per 5,000 GPUs")
    parser.add_argument("--warm", type=int, default=60, metavar="SECONDS", help="before the first look")
    parser.add_argument("--seconds", type=int, default=600, help="of the measurement")
    arguments = parser.parse_args()
    pools = arguments.pools or max(1, arguments.gpus // 5_000)
    if arguments.gpus < 8 * pools or arguments.gpus % 8:
        parser.error("--gpus: expected a multiple of 8, and a node for every pool")
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "fleet.yaml"
        path.write_text(site_yaml("fleet", arguments.gpus, _FLUSH_S * 1000, pools), encoding="utf-8")
        with installation(Path(temporary), ["--no-simulation"]) as up:
            result = asyncio.run(measure(up, arguments, load_scenario(path)))
    rows = [(question, answer) for question, answer in result["verdict"].items()]
    print_result("fleet", ("question", "answer"), rows, result)


if __name__ == "__main__":
    main()
