"""What the collectors read, what they leave unknown, and that no driver holds them up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from gpuledger.agents.collectors.absent import AbsentDriver
from gpuledger.agents.collectors.host import HostCollector, read_pressure
from gpuledger.agents.collectors.interface import DeviceInfo
from gpuledger.agents.collectors.processes import ProcessAllocations, ProcessFacts, look_up
from gpuledger.agents.collectors.watched import CallHung, Watched
from gpuledger.agents.placements import ENDED_KEPT_MS, place_devices, pool_of_model
from gpuledger.schemas.events import Placement
from gpuledger.schemas.telemetry import DownCause
from tests.agents.driver import build_driver

NOW = 1_790_000_000_000

# -- calls that hang ---------------------------------------------------------------------------------------------------


def test_a_call_that_hangs_is_given_up_and_none_pile_up() -> None:
    release = threading.Event()
    before = threading.active_count()
    watched = Watched("driver")
    assert watched.call(lambda: 7, 5.0) == 7
    with pytest.raises(CallHung):
        watched.call(release.wait, 0.05)
    for _ in range(5):
        with pytest.raises(CallHung, match="still hangs"):
            watched.call(lambda: 1, 5.0)
    assert threading.active_count() == before + 1
    release.set()
    while watched.hung:
        time.sleep(0.01)
    assert watched.call(lambda: 8, 5.0) == 8
    watched.close()


def test_what_a_call_raises_comes_to_the_caller() -> None:
    watched = Watched("driver")
    with pytest.raises(ZeroDivisionError):
        watched.call(lambda: 1 // 0, 5.0)
    watched.close()


# -- NVML at the ABI ---------------------------------------------------------------------------------------------------

_READ = """
import json, os, sys, time
from pathlib import Path
from gpuledger.agents.collectors.nvml import NvmlCollector
behaviour = Path(os.environ["FAKE_NVML"])
behaviour.write_text("ok")
collector = NvmlCollector(deadline_s=0.4)
out = {"devices": [[d.gpu, d.index, d.model, d.memory_total_bytes] for d in collector.devices()]}
out["versions"] = dict(collector.versions())
out["ok"] = [dict(row) for row in collector.sample()]
out["again"] = [dict(row) for row in collector.sample()]
out["readers"] = [sorted(r.__name__ for r in gpu.readers) for gpu in collector._gpus]
for word in ("lost", "hang"):
    behaviour.write_text(word)
    out[word] = [dict(row) for row in collector.sample()]
begun = time.monotonic()
out["hangs on"] = [dict(row) for row in collector.sample()]
out["refused in"] = time.monotonic() - begun
out["hung processes"] = dict(collector.processes())
behaviour.write_text("ok")
for _ in range(100):
    time.sleep(0.05)
    out["back"] = [dict(row) for row in collector.sample()]
    if "down_cause" not in out["back"][1]:
        break
out["processes"] = dict(collector.processes())
out["pid"] = os.getpid()
out["changed"] = collector.refresh()
print(json.dumps(out))
sys.stdout.flush()
os._exit(0)
"""


@pytest.fixture(scope="module")
def nvml(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = build_driver(tmp_path_factory.mktemp("driver"))
    environ = {**os.environ, "LD_LIBRARY_PATH": str(folder), "FAKE_NVML": str(folder / "behaviour")}
    done = subprocess.run(
        [sys.executable, "-c", _READ], env=environ, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_devices_are_known_by_uuid(nvml: dict[str, Any]) -> None:
    assert nvml["devices"] == [
        [f"GPU-00000000-0000-0000-0000-00000000000{n}", n, "NVIDIA Fake 80GB", 80 << 30] for n in (0, 1)
    ]
    assert nvml["versions"] == {"driver": "580.65.06", "cuda": "13.0"}


def test_values_are_the_drivers_and_the_rest_is_unknown(nvml: dict[str, Any]) -> None:
    for n, row in enumerate(nvml["ok"]):
        assert row == {
            "gpu_util_pct": 40.0 + n,
            "mem_util_pct": 7.0,
            "memory_used_bytes": 3 << 30,
            "memory_reserved_bytes": 512 << 20,
            "memory_total_bytes": 80 << 30,
            "energy_mj": [1_250_000, 5_250_000][n],
            "power_mw": 250_000 + n,
            "processes": 1 - n,
        }
    assert [row["energy_mj"] for row in nvml["again"]] == [1_500_000, 5_500_000]


def test_what_is_not_supported_is_asked_once(nvml: dict[str, Any]) -> None:
    assert nvml["readers"] == [["_energy", "_memory", "_power", "_process_count", "_utilisation"]] * 2


def test_a_gpu_off_the_bus_and_one_that_hangs_are_down_and_the_other_goes_on(nvml: dict[str, Any]) -> None:
    for word, cause in (("lost", DownCause.LOST), ("hang", DownCause.HUNG), ("hangs on", DownCause.HUNG)):
        assert nvml[word][1] == {"down_cause": int(cause)}
        assert nvml[word][0]["power_mw"] == 250_000
    assert nvml["refused in"] < 0.4, "a GPU that still hangs must not cost its deadline each time"
    assert nvml["back"][1]["power_mw"] == 250_001
    assert nvml["changed"] is False


def test_processes_of_a_gpu_that_hangs_are_unknown_which_is_not_none(nvml: dict[str, Any]) -> None:
    first, second = (f"GPU-00000000-0000-0000-0000-00000000000{n}" for n in (0, 1))
    assert nvml["hung processes"] == {first: [nvml["pid"]]}
    assert nvml["processes"] == {first: [nvml["pid"]], second: []}


def test_known_gpus_are_down_while_their_driver_is_away() -> None:
    known = [
        Placement(id=g, revision=1, claimed_at_ms=NOW, gpu=g, node="n", pool="p", start_ms=NOW, end_ms=end)
        for g, end in (("GPU-a", None), ("GPU-b", NOW + 1))
    ]
    absent = AbsentDriver(known)
    assert [info.gpu for info in absent.devices()] == ["GPU-a"]
    assert list(absent.sample()) == [{"down_cause": int(DownCause.DRIVER)}]


# -- processes ---------------------------------------------------------------------------------------------------------


def test_a_process_is_an_allocation_from_its_own_start_to_its_end() -> None:
    found = {10: ProcessFacts(5_000, "ann"), 11: ProcessFacts(6_000, "bob")}
    processes = ProcessAllocations("n", "boot-1", found.get)

    def utc(boottime_ms: int) -> int:
        return NOW + boottime_ms

    begun = processes.update({"GPU-a": [10, 11], "GPU-b": [11]}, utc, NOW + 9_000)
    assert [(one.gpu, one.user, one.start_ms, one.end_ms) for one in begun] == [
        ("GPU-a", "ann", NOW + 5_000, None),
        ("GPU-a", "bob", NOW + 6_000, None),
        ("GPU-b", "bob", NOW + 6_000, None),
    ]
    assert begun[1].job_id == begun[2].job_id != begun[0].job_id
    assert processes.update({"GPU-a": [10, 11], "GPU-b": [11]}, utc, NOW + 10_000) == []
    # GPU-b does not answer: what ran there goes on.
    ended = processes.update({"GPU-a": [11]}, utc, NOW + 11_000)
    assert [(one.id, one.end_ms) for one in ended] == [(begun[0].id, NOW + 11_000)]
    assert ended[0].revision > begun[0].revision
    assert [one.id for one in processes.running()] == sorted([begun[1].id, begun[2].id])


def test_a_pid_that_comes_back_is_another_process() -> None:
    found = {10: ProcessFacts(5_000)}
    processes = ProcessAllocations("n", "boot-1", found.get)
    (first,) = processes.update({"GPU-a": [10]}, lambda ms: NOW + ms, NOW + 9_000)
    found[10] = ProcessFacts(8_000)
    second, ended = processes.update({"GPU-a": [10]}, lambda ms: NOW + ms, NOW + 10_000)
    assert ended.id == first.id != second.id
    assert (ended.end_ms, second.end_ms) == (NOW + 10_000, None)


def test_an_agent_that_starts_again_claims_the_very_same_allocation() -> None:
    found = {10: ProcessFacts(5_000, "ann")}
    claims = [
        ProcessAllocations("n", "boot-1", found.get).update({"GPU-a": [10]}, lambda ms: NOW + ms, seen_ms)
        for seen_ms in (NOW + 6_000, NOW + 60_000)
    ]
    assert claims[0] == claims[1]


def test_a_process_of_another_namespace_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    processes = ProcessAllocations("n", "boot-1", lambda pid: None)
    for _ in range(3):
        assert processes.update({"GPU-a": [99]}, lambda ms: NOW + ms, NOW) == []
    assert caplog.text.count("process 99 is on a GPU but not visible here") == 1


def test_this_process_is_found_with_its_start_and_user() -> None:
    facts = look_up(os.getpid())
    assert facts is not None
    assert facts.user == psutil.Process().username()
    age_ms = time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000 - facts.start_boottime_ms
    assert 0 <= age_ms - (time.time() - psutil.Process().create_time()) * 1000 + 1100 <= 2200
    assert look_up(2**22 + 1) is None


# -- the host ----------------------------------------------------------------------------------------------------------


def test_the_host_tells_what_the_machine_tells() -> None:
    host = HostCollector()
    time.sleep(0.05)
    reading = host.read(NOW)
    assert reading.ts_ms == NOW
    assert reading.cpu_count == os.cpu_count()
    assert reading.memory_total_bytes == psutil.virtual_memory().total
    assert reading.cpu_util_pct is None or 0.0 <= reading.cpu_util_pct <= 100.0
    assert (reading.node_power_mw, reading.node_energy_mj) == (None, None)


def test_pressure_is_read_or_unknown(tmp_path: Path) -> None:
    (tmp_path / "cpu").write_text("some avg10=12.34 avg60=1.00 avg300=0.10 total=1\nfull avg10=0.00 avg60=0.00\n")
    assert read_pressure("cpu", tmp_path) == 12.34
    assert read_pressure("io", tmp_path) is None
    (tmp_path / "memory").write_text("")
    assert HostCollector(tmp_path).read(NOW).psi_memory_pct is None


# -- placements --------------------------------------------------------------------------------------------------------


def _place(known: list[Placement], *gpus: str, pool: str = "", now_ms: int = NOW) -> list[Placement]:
    devices = [DeviceInfo(gpu, n, model="NVIDIA H100 80GB HBM3") for n, gpu in enumerate(gpus)]
    return place_devices(devices, known, "node", pool, "site", now_ms)


def test_a_gpu_that_stays_keeps_its_placement_over_restarts() -> None:
    first = _place([], "a", "b")
    assert [(one.gpu, one.pool, one.start_ms) for one in first] == [
        ("a", "nvidia-h100-80gb-hbm3", NOW),
        ("b", "nvidia-h100-80gb-hbm3", NOW),
    ]
    assert _place(first, "a", "b", now_ms=NOW + 5_000) == first


def test_a_gpu_that_is_not_seen_stays_placed() -> None:
    first = _place([], "a", "b")
    assert _place(first, "a", now_ms=NOW + 5_000) == first


def test_another_pool_ends_the_placement_and_begins_one_at_the_same_instant() -> None:
    first = _place([], "a")
    ended, begun = _place(first, "a", pool="other", now_ms=NOW + 5_000)
    assert (ended.id, ended.end_ms) == (first[0].id, NOW + 5_000)
    assert ended.revision > first[0].revision
    assert (begun.pool, begun.start_ms, begun.end_ms) == ("other", NOW + 5_000, None)
    assert begun.id != ended.id
    later = _place([ended, begun], "a", pool="other", now_ms=NOW + 5_000 + ENDED_KEPT_MS)
    assert later == [begun]


def test_a_slot_change_is_a_newer_revision_of_the_same_placement() -> None:
    first = _place([], "a", "b")
    moved = _place(first, "b", "a", now_ms=NOW + 5_000)
    assert [(one.gpu, one.index, one.start_ms) for one in moved] == [("a", 1, NOW), ("b", 0, NOW)]
    assert all(after.revision > before.revision for before, after in zip(first, moved, strict=True))


def test_a_pool_is_named_after_the_model() -> None:
    assert pool_of_model("NVIDIA A100-SXM4-80GB") == "nvidia-a100-sxm4-80gb"
    assert pool_of_model("") == "gpus"
