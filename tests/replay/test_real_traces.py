"""openb and Helios as published: what we tell equals integrals taken straight from the CSV, to the GPU-microsecond.

The integrals below read the files with csv and gzip alone and share no code with the replay.
"""

import csv
import gzip
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpuledger.agents.messages import event_message
from gpuledger.agents.replay.facts import JobReplay, Replay, Scope, Window
from gpuledger.agents.replay.helios import HeliosReplay, read_helios
from gpuledger.agents.replay.openb import ORIGIN_MS, read_openb_fleet, read_openb_jobs
from gpuledger.agents.replay.place import place

DATA = Path(__file__).parents[3] / "shared" / "data"
OPENB = DATA / "alibaba-openb-v2023"
HELIOS = DATA / "helios-earth-vc-capacity" / "vc_5min.csv.gz"

pytestmark = [
    pytest.mark.realdata,
    pytest.mark.skipif(not DATA.is_dir(), reason="the real traces are not beside the project (../shared/data)"),
]


def lines(path: Path) -> Iterator[dict[str, str]]:
    with gzip.open(path, "rt") as text:
        yield from csv.DictReader(text)


def documents(replay: Replay) -> list[dict[str, Any]]:
    """The events as JSON, as any reader of the topics gets them."""
    return [json.loads(event_message(event).value) for event in replay.events()]


def test_openb_per_job_and_per_tenant() -> None:
    by_job: defaultdict[str, int] = defaultdict(int)
    by_tenant: defaultdict[str, int] = defaultdict(int)
    pods = 0
    for pod in lines(OPENB / "openb_pod_list_default.csv.gz"):
        pods += 1
        if pod["scheduled_time"]:
            seconds = int(pod["deletion_time"]) - int(pod["scheduled_time"])
            amount_us = seconds * int(pod["num_gpu"]) * int(pod["gpu_milli"]) * 1000
            by_job[pod["name"]] += amount_us
            by_tenant[pod["qos"]] += amount_us
    gpus = {(node["sn"], node["model"]): int(node["gpu"]) for node in lines(OPENB / "openb_node_list_gpu_node.csv.gz")}

    fleet = read_openb_fleet(OPENB)
    placement = place(read_openb_jobs(OPENB), fleet)
    told = documents(JobReplay(placement, fleet, Scope("openb", "kubernetes")))

    told_by_job: defaultdict[str, int] = defaultdict(int)
    told_by_tenant: defaultdict[str, int] = defaultdict(int)
    spans: defaultdict[str, list[tuple[int, int, int]]] = defaultdict(list)
    for event in told:
        if event["type"] == "allocation":
            start, end = event["start_ms"], event["end_ms"]
            milli = 1000 * event.get("weight_num", 1) // event.get("weight_den", 1)
            told_by_job[event["job_id"]] += (end - start) * milli
            told_by_tenant[event["account"]] += (end - start) * milli
            spans[event["gpu"]].append((start, end, milli))
    assert told_by_job == {name: us for name, us in by_job.items() if us}
    assert told_by_tenant == by_tenant
    assert len(by_tenant) == 4 and pods == 8152 == sum(event["type"] == "job" for event in told)

    placements = [p for event in told if event["type"] == "inventory" for p in event["placements"]]
    assert len(placements) == 6212 and len(gpus) == 1213
    assert gpus_per_node(placements) == gpus
    names = {p["gpu"] for p in placements}
    assert set(spans) <= names and not placement.unplaced
    for held in spans.values():
        edges = sorted([(start, 1, milli) for start, _, milli in held] + [(end, 0, -milli) for _, end, milli in held])
        load = 0
        for _, _, change in edges:
            load += change
            assert 0 <= load <= 1000
    assert {p["start_ms"] for p in placements} == {ORIGIN_MS}


def gpus_per_node(placements: list[dict[str, str]]) -> dict[tuple[str, str], int]:
    counts: defaultdict[tuple[str, str], int] = defaultdict(int)
    for placement in placements:
        counts[placement["node"], placement["model"]] += 1
    return dict(counts)


def committed_gpu_s(told: list[dict[str, Any]]) -> dict[str, int]:
    totals: defaultdict[str, int] = defaultdict(int)
    for event in told:
        if event["type"] in ("commitment", "transfer"):
            gpu_ms = event["gpus"] * (event["end_ms"] - event["start_ms"])
            assert gpu_ms % 1000 == 0
            if event["type"] == "commitment":
                totals[event["tenant"]] += gpu_ms // 1000
            else:
                totals[event["from_tenant"]] -= gpu_ms // 1000
                totals[event["to_tenant"]] += gpu_ms // 1000
    return dict(totals)


def held_gpu_s(told: list[dict[str, Any]]) -> dict[str, int]:
    totals: defaultdict[str, int] = defaultdict(int)
    for event in told:
        if event["type"] == "allocation":
            totals[event["account"]] += (event["end_ms"] - event["start_ms"]) // 1000
    return dict(totals)


def test_helios_committed_and_held_per_virtual_cluster() -> None:
    capacity: defaultdict[str, int] = defaultdict(int)
    running: defaultdict[str, int] = defaultdict(int)
    for reading in lines(HELIOS):
        capacity[reading["vc"]] += 300 * (int(reading["running_gpu_num"]) + int(reading["idle_gpu_num"]))
        running[reading["vc"]] += 300 * int(reading["running_gpu_num"])
    told = documents(HeliosReplay(read_helios(HELIOS), Scope("helios", "slurm")))
    assert committed_gpu_s(told) == capacity
    assert held_gpu_s(told) == running
    assert len(capacity) == 16
    # In this file no virtual cluster's capacity ever changes: 856 GPUs, each reading the same.
    assert sum(event["type"] == "transfer" for event in told) == 0


def test_helios_with_capacity_that_moves(tmp_path: Path) -> None:
    """The same readings as if each cluster owned only what it ran on: real dynamics, thousands of moves."""
    moving = tmp_path / "vc_5min.csv"
    capacity: defaultdict[str, int] = defaultdict(int)
    at: defaultdict[str, dict[str, int]] = defaultdict(dict)
    with moving.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["time", "vc", "running_gpu_num", "idle_gpu_num"])
        for reading in lines(HELIOS):
            if reading["time"] < "2020-05-08":
                number = int(reading["running_gpu_num"])
                writer.writerow([reading["time"], reading["vc"], number, 0])
                capacity[reading["vc"]] += 300 * number
                at[reading["time"]][reading["vc"]] = number
    told = documents(HeliosReplay(read_helios(tmp_path), Scope("helios", "slurm")))
    assert committed_gpu_s(told) == {vc: gpu_s for vc, gpu_s in capacity.items() if gpu_s}
    assert held_gpu_s(told) == {vc: gpu_s for vc, gpu_s in capacity.items() if gpu_s}
    moved = sum(event["gpus"] for event in told if event["type"] == "transfer")
    expected = 0
    before: dict[str, int] = {}
    for time in sorted(at):
        changes = [number - before.get(vc, 0) for vc, number in at[time].items()]
        expected += min(sum(n for n in changes if n > 0), -sum(n for n in changes if n < 0))
        before = at[time]
    assert moved == expected > 100


def test_a_clipped_window_of_helios_holds_the_readings_in_it() -> None:
    first, last = "2020-05-02 00:00:00", "2020-05-03 00:00:00"
    capacity: defaultdict[str, int] = defaultdict(int)
    for reading in lines(HELIOS):
        if first <= reading["time"] < last:
            capacity[reading["vc"]] += 300 * (int(reading["running_gpu_num"]) + int(reading["idle_gpu_num"]))
    window = Window(1_588_377_600_000, 1_588_464_000_000, clip=True)
    told = documents(HeliosReplay(read_helios(HELIOS), Scope("helios", "slurm", window=window)))
    assert committed_gpu_s(told) == capacity
