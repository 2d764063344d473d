"""Real traces through the real path: what the ledger holds equals integrals taken straight from the CSV files.

The integrals are computed here, with the csv module alone; nothing of the product takes part in them.
"""

from __future__ import annotations

import csv
import gzip
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.e2e.pipeline import REPOSITORY, Installation

DATA = REPOSITORY.parent / "shared" / "data"
OPENB = DATA / "alibaba-openb-v2023"
HELIOS = DATA / "helios-earth-vc-capacity" / "vc_5min.csv.gz"

pytestmark = [pytest.mark.realdata, pytest.mark.services]


def rows(path: Path) -> Iterator[dict[str, str]]:
    with gzip.open(path, "rt") as file:
        yield from csv.DictReader(file)


def replay(pipeline: Installation, *arguments: str) -> None:
    """`gpuledger replay … --wait` with a worker running; returns when the ledger holds everything."""
    pipeline.start_worker()
    done = subprocess.run(
        [sys.executable, "-m", "gpuledger.cli", "replay", *arguments, "--clip", "--wait", "--wait-timeout", "120"],
        env=pipeline.env,
        cwd=pipeline.directory,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not OPENB.exists(), reason=f"the trace is not beside the project ({OPENB.name})")
def test_openb_agrees_to_the_microsecond_per_job_and_tenant(pipeline: Installation) -> None:
    # Two of the busiest days of the 149. Second 0 of the trace is 2023-01-01T00:00:00Z.
    first, last = 145 * 86_400, 147 * 86_400
    origin = datetime(2023, 1, 1, tzinfo=UTC).timestamp()
    window = [datetime.fromtimestamp(origin + second, UTC).isoformat() for second in (first, last)]
    by_job: dict[str, int] = defaultdict(int)
    by_tenant: dict[str, int] = defaultdict(int)
    for pod in rows(OPENB / "openb_pod_list_default.csv.gz"):
        if pod["num_gpu"] == "0" or not pod["scheduled_time"]:
            continue
        start, end = max(int(pod["scheduled_time"]), first), min(int(pod["deletion_time"]), last)
        if start < end:
            amount = (end - start) * 1000 * int(pod["gpu_milli"]) * int(pod["num_gpu"])
            by_job[pod["name"]] += amount
            by_tenant[pod["qos"]] += amount
    assert len(by_job) > 20

    replay(pipeline, "openb", str(OPENB), "--from", window[0], "--to", window[1])

    jobs = pipeline.rows(
        "SELECT splitByChar('/', job_id)[-1] AS pod, toInt128(sum(gpu_us)) FROM v_job_hour GROUP BY pod"
    )
    assert dict(jobs) == dict(by_job)
    minutes = "SELECT tenant, toInt128(sum(gpu_us)) FROM v_ledger_minute WHERE kind = 'held' GROUP BY tenant"
    assert dict(pipeline.rows(minutes)) == dict(by_tenant)
    fleet = sum(int(node["gpu"]) for node in rows(OPENB / "openb_node_list_gpu_node.csv.gz"))
    everything = "SELECT toInt128(sum(gpu_us)) FROM v_ledger_minute WHERE kind IN ('held', 'free')"
    assert pipeline.number(everything) == fleet * (last - first) * 1_000_000
    assert pipeline.number("SELECT count() FROM v_recomputes WHERE complete = 0 AND service_us > 0") == 0


@pytest.mark.skipif(not HELIOS.exists(), reason=f"the trace is not beside the project ({HELIOS.name})")
def test_helios_commits_what_each_virtual_cluster_had(pipeline: Installation) -> None:
    day = "2020-05-12"
    committed: dict[str, int] = defaultdict(int)
    held: dict[str, int] = defaultdict(int)
    for reading in rows(HELIOS):
        if reading["time"].startswith(day):
            running = int(reading["running_gpu_num"])
            held[reading["vc"]] += running * 300_000_000
            committed[reading["vc"]] += (running + int(reading["idle_gpu_num"])) * 300_000_000

    replay(pipeline, "helios", str(HELIOS), "--from", f"{day}T00:00:00Z", "--to", "2020-05-13T00:00:00Z")

    sql = (
        "SELECT tenant, toInt128(sum(gpu_us)), toInt128(sumIf(gpu_us, kind = 'held')) FROM v_ledger_minute "
        "WHERE kind IN ('held', 'reserved_unused') GROUP BY tenant"
    )
    found = {tenant: (int(both), int(used)) for tenant, both, used in pipeline.rows(sql)}
    assert found == {vc: (committed[vc], held[vc]) for vc in committed}
    assert pipeline.number("SELECT count() FROM v_ledger_minute WHERE kind = 'overcommitted'") == 0
