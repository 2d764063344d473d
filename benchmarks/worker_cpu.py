"""CPU and memory of each process while a fleet sends: `python benchmarks/worker_cpu.py --gpus 1000`.

The embedded product with one sample per GPU and second. Up to 1,000 GPUs the simulator makes the load as it goes; above
that one core could not, so batches are made beforehand, for a time a little ahead, and only sent while measuring. CPU
is that of the operating system's own accounts, per second of wall time; the load's own process is no part of it.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from pathlib import Path
from typing import Any

from installation import Installation, Usage, Watch, installation, print_result, site_yaml

from gpuledger.agents.broker_topics import create_topics
from gpuledger.agents.messages import Message
from gpuledger.agents.publisher import Publisher
from gpuledger.agents.simulator.scenario import load_scenario
from gpuledger.agents.simulator.world import pregenerate
from gpuledger.schemas.config import Kafka

_SERVICES = ("worker", "clickhouse", "kafka", "page")
_LIVE_MOST_GPUS = 1_000
#: Ticks made to see how long the rest will take.
_PROBE_TICKS = 3

_NEWEST = """
    SELECT count() FROM fragments
    WHERE appended_at >= fromUnixTimestamp64Milli({since:Int64}, 'UTC')
        AND appended_at < fromUnixTimestamp64Milli({until:Int64}, 'UTC')"""
_BEHIND = "SELECT dateDiff('millisecond', min(appended_at), now64(3, 'UTC')) FROM v_progress WHERE topic = 'telemetry'"


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def made_load(scenario_path: Path, ticks: int) -> tuple[int, list[list[Message]]]:
    """(start in UTC milliseconds, the messages of each second from there on); the start is a little ahead of now."""
    scenario = load_scenario(scenario_path)
    began = time.monotonic()
    pregenerate(scenario, _now_ms(), _PROBE_TICKS)
    tick_s = (time.monotonic() - began) / _PROBE_TICKS
    ahead_s = 2.0 * tick_s * ticks + 5
    print(f"making {ticks} s of load, about {tick_s * ticks:.0f} s", flush=True)
    start_ms = (_now_ms() // 1000 + int(ahead_s)) * 1000
    load = pregenerate(scenario, start_ms, ticks)
    if _now_ms() > start_ms:
        raise SystemExit("making the load took longer than expected: the machine is busy; try again")
    return start_ms, load


async def send(up: Installation, start_ms: int, load: list[list[Message]]) -> float:
    """Sends each second's messages when it is over; the seconds by which the last one was late."""
    kafka = Kafka(bootstrap=up.running.kafka_bootstrap)
    await create_topics(kafka)
    late_s = 0.0
    async with Publisher(kafka, "gpuledger-benchmark") as publisher:
        for n, messages in enumerate(load):
            due_ms = start_ms + (n + 1) * 1000
            await asyncio.sleep(max(0, due_ms - _now_ms()) / 1000)
            await publisher.publish_many(messages)
            late_s = (_now_ms() - due_ms) / 1000
            load[n] = []
            up.check()
    return late_s


def watched(up: Installation, warm_s: int, seconds: int) -> dict[str, Usage]:
    """Usage of the services from `warm_s` from now on."""
    time.sleep(warm_s)
    up.check()
    watch = Watch({name: process for name, process in up.processes().items() if name in _SERVICES})
    watch.start()
    time.sleep(seconds)
    up.check()
    return watch.stop()


async def watched_while_sending(
    up: Installation, start_ms: int, load: list[list[Message]], warm_s: int, seconds: int
) -> tuple[dict[str, Usage], float]:
    """Both, side by side; usage, and the seconds by which the sender was late."""
    sending = asyncio.create_task(send(up, start_ms, load))
    await asyncio.sleep(max(0, start_ms - _now_ms()) / 1000)
    usage = await asyncio.to_thread(watched, up, warm_s, seconds)
    return usage, await sending


def measure(arguments: argparse.Namespace, directory: Path) -> tuple[dict[str, Usage], dict[str, Any]]:
    """Usage by service, and what says whether the worker kept up."""
    scenario = directory / "site.yaml"
    pools = max(1, arguments.gpus // 2500)
    scenario.write_text(site_yaml("cpu", arguments.gpus, arguments.flush * 1000, pools), encoding="utf-8")
    if arguments.gpus <= _LIVE_MOST_GPUS and not arguments.made:
        with installation(directory, ["--scenario", str(scenario)]) as up:
            usage = watched(up, arguments.warm, arguments.seconds)
            return usage, {"load": "simulator", **_told(up, arguments.seconds)}
    with installation(directory, ["--no-simulation"]) as up:
        start_ms, load = made_load(scenario, arguments.warm + arguments.seconds + 2)
        usage, late_s = asyncio.run(watched_while_sending(up, start_ms, load, arguments.warm, arguments.seconds))
        return usage, {"load": "made before", "sender_late_s": round(late_s, 2), **_told(up, arguments.seconds)}


def _told(up: Installation, seconds: int) -> dict[str, Any]:
    until_ms = _now_ms() - 2_000
    ((fragments,),) = up.rows(_NEWEST, since=until_ms - seconds * 1000, until=until_ms)
    ((behind_ms,),) = up.rows(_BEHIND)
    return {"fragments_per_s": round(fragments / seconds, 1), "telemetry_behind_s": round(behind_ms / 1000, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=1000)
    parser.add_argument("--made", action="store_true", help="make the batches beforehand for a small fleet too")
    parser.add_argument("--flush", type=int, default=5, metavar="SECONDS")
    parser.add_argument("--warm", type=int, default=30, metavar="SECONDS", help="before the measurement")
    parser.add_argument("--seconds", type=int, default=90, help="of the measurement")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        usage, told = measure(arguments, Path(temporary))
    rows: list[tuple[str, str, str, str]] = []
    result: dict[str, Any] = {}
    for name in _SERVICES:
        if name not in usage:
            continue
        used = usage[name]
        mib, most_mib = used.rss_bytes / 2**20, used.most_rss_bytes / 2**20
        rows.append((name, f"{used.cpu_s / used.wall_s:.3f}", f"{mib:.0f}", f"{most_mib:.0f}"))
        result[name] = {
            "cpu_per_s": round(used.cpu_s / used.wall_s, 4),
            "rss_mib": round(mib, 1),
            "most_rss_mib": round(most_mib, 1),
        }
    settings = {"gpus": arguments.gpus, "flush_s": arguments.flush, "seconds": arguments.seconds}
    print_result("worker_cpu", ("process", "CPU s per s", "RSS MiB", "most MiB"), rows, {**settings, **result, **told})


if __name__ == "__main__":
    main()
