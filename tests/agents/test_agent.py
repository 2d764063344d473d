"""The agent as an operator runs it: a process on this machine, a real broker, a driver at the ABI."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition

from gpuledger.agents.broker_topics import create_topics
from gpuledger.agents.run import read_boot_id
from gpuledger.schemas.config import Kafka
from gpuledger.schemas.events import Allocation, Inventory, decode_event
from gpuledger.schemas.telemetry import BatchHeader, DownCause, decode_header
from tests.agents.driver import build_driver

pytestmark = pytest.mark.services

Batch = tuple[BatchHeader, list[dict[str, Any]]]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.05)


class Node:
    """One node of an installation of its own on a broker; `run` starts its agent."""

    def __init__(self, bootstrap: str, folder: Path) -> None:
        self.settings = Kafka(bootstrap=bootstrap, topic_prefix=f"t{uuid.uuid4().hex[:8]}.")
        self.folder = folder
        self.health = f"127.0.0.1:{_free_port()}"
        self.environ = {
            **os.environ,
            "GPULEDGER_KAFKA__BOOTSTRAP": bootstrap,
            "GPULEDGER_KAFKA__TOPIC_PREFIX": self.settings.topic_prefix,
            "GPULEDGER_AGENT__NODE": "node-1",
            "GPULEDGER_AGENT__SITE": "oslo",
            "GPULEDGER_AGENT__PERIOD_MS": "200",
            "GPULEDGER_AGENT__FLUSH_MS": "400",
            "GPULEDGER_AGENT__SPOOL_DIR": str(folder / "spool"),
            "GPULEDGER_AGENT__LISTEN": self.health,
        }

    def make_topics(self) -> None:
        asyncio.run(create_topics(self.settings, ["telemetry", "inventory", "allocations"]))

    @contextlib.contextmanager
    def run(self) -> Generator[subprocess.Popen[bytes]]:
        command = [sys.executable, "-m", "gpuledger.cli", "agent", "run"]
        with (self.folder / "agent.log").open("ab") as log:
            process = subprocess.Popen(command, env=self.environ, stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def ask(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://{self.health}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def metric(self, name: str) -> float:
        for line in self.ask("/metrics")[1].splitlines():
            if line.startswith(f"gpuledger_agent_{name} "):
                return float(line.split(" ")[1])
        return -1.0

    def log(self) -> str:
        return (self.folder / "agent.log").read_text()

    async def _read(self, topic: str) -> list[Any]:
        name = self.settings.topic_prefix + topic
        partitions = [TopicPartition(name, n) for n in range(self.settings.partitions[topic])]
        consumer = AIOKafkaConsumer(bootstrap_servers=self.settings.bootstrap, auto_offset_reset="earliest")
        await consumer.start()
        try:
            consumer.assign(partitions)
            left = sum((await consumer.end_offsets(partitions)).values())
            records: list[Any] = []
            async with asyncio.timeout(20):
                while left:
                    records.append(await consumer.getone())
                    left -= 1
            return records
        finally:
            await consumer.stop()

    def batches(self) -> list[Batch]:
        return [
            (
                decode_header(dict(record.headers)["gpuledger-batch"]),
                pa.ipc.open_stream(record.value).read_all().to_pylist(),
            )
            for record in asyncio.run(self._read("telemetry"))
        ]

    def inventories(self) -> list[Inventory]:
        events = [decode_event(record.value) for record in asyncio.run(self._read("inventory"))]
        return [event for event in events if isinstance(event, Inventory)]

    def allocations(self) -> list[Allocation]:
        events = [decode_event(record.value) for record in asyncio.run(self._read("allocations"))]
        return [event for event in events if isinstance(event, Allocation)]


def _stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM ends it within ten seconds, with success."""
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 0


def _with_driver(node: Node, behaviour: str = "ok") -> Path:
    driver = node.folder / "driver"
    driver.mkdir()
    file = build_driver(driver) / "behaviour"
    file.write_text(behaviour)
    node.environ |= {"LD_LIBRARY_PATH": str(driver), "FAKE_NVML": str(file)}
    return file


def test_a_node_without_gpus_sends_its_host_readings(kafka: str, tmp_path: Path) -> None:
    node = Node(kafka, tmp_path)
    node.make_topics()
    with node.run() as process:
        _wait(lambda: node.metric("messages_sent_total") >= 4)
        assert node.ask("/healthz") == (200, "ok\n")
        assert node.ask("/readyz") == (200, "ok\n")
        assert node.ask("/nothing")[0] == 404
        _stop(process)
    batches = node.batches()
    assert [header.seq for header, _ in batches] == list(range(len(batches)))
    for header, rows in batches:
        assert (header.node, header.boot_id, header.devices, rows) == ("node-1", read_boot_id(), [], [])
        assert header.host is not None
        assert header.host.cpu_count == os.cpu_count()
        assert abs(header.host.ts_ms - time.time_ns() // 1_000_000) < 120_000
    (inventory,) = node.inventories()
    assert (inventory.node, inventory.placements, inventory.health) == ("node-1", [], "ok")


def test_gpus_processes_and_placements_over_a_restart(kafka: str, tmp_path: Path) -> None:
    node = Node(kafka, tmp_path)
    node.make_topics()
    _with_driver(node)
    for _ in range(2):
        with node.run() as process:
            _wait(lambda: node.metric("batches_sealed_total") >= 4)
            _stop(process)
    runs: dict[str, list[Batch]] = {}
    for batch in node.batches():
        runs.setdefault(batch[0].run_id, []).append(batch)
    assert len(runs) == 2
    for batches in runs.values():
        assert [header.seq for header, _ in batches] == list(range(len(batches)))
        before: list[tuple[int | None, int | None]] = [(None, None)] * 2
        for header, rows in batches:
            assert [(one.previous_ts_ms, one.previous_energy_mj) for one in header.devices] == before
            before = [(row["ts_ms"], row["energy_mj"]) for row in rows[-2:]]
            assert [row["power_mw"] for row in rows[-2:]] == [250_000, 250_001]
            assert all(row["sm_active"] is None for row in rows)
    # The same GPUs, placed once, since the first start.
    first, *others = node.inventories()
    assert [(one.pool, one.site, one.node) for one in first.placements] == [("nvidia-fake-80gb", "oslo", "node-1")] * 2
    assert all(other.placements == first.placements for other in others)
    # The driver names the agent itself as a process on GPU 0.
    allocations = node.allocations()
    assert {one.source for one in allocations} == {"process"}
    assert {one.gpu for one in allocations} == {"GPU-00000000-0000-0000-0000-000000000000"}
    assert len({one.job_id for one in allocations}) == 2
    named = {name for header, _ in node.batches() for name in header.running}
    assert named == {one.id for one in allocations}


def test_a_driver_that_hangs_is_reported_and_does_not_keep_the_agent_alive(kafka: str, tmp_path: Path) -> None:
    node = Node(kafka, tmp_path)
    node.make_topics()
    behaviour = _with_driver(node)
    with node.run() as process:
        _wait(lambda: node.metric("batches_sealed_total") >= 2)
        behaviour.write_text("hang-all")
        _wait(lambda: node.metric("devices_down") == 2)
        assert node.ask("/healthz")[0] == 200
        _wait(lambda: any(rows and rows[-1]["down_cause"] == DownCause.HUNG for _, rows in node.batches()))
        _stop(process)
    assert node.inventories()[-1].health == "2 of 2 devices down"


def test_a_node_whose_driver_is_gone_reports_its_known_gpus_down(kafka: str, tmp_path: Path) -> None:
    node = Node(kafka, tmp_path)
    node.make_topics()
    _with_driver(node)
    with node.run() as process:
        _wait(lambda: node.metric("batches_sealed_total") >= 2)
        _stop(process)
    del node.environ["LD_LIBRARY_PATH"]
    with node.run() as process:
        _wait(lambda: node.metric("devices_down") == 2 and node.metric("batches_sealed_total") >= 2)
        _stop(process)
    header, rows = node.batches()[-1]
    assert len(header.devices) == 2
    assert {row["down_cause"] for row in rows} == {DownCause.DRIVER}
    assert "no driver answers" in node.log()


def test_what_was_measured_without_a_broker_arrives_after_a_kill_and_a_restart(kafka: str, tmp_path: Path) -> None:
    node = Node(kafka, tmp_path)
    away = node.environ | {"GPULEDGER_KAFKA__BOOTSTRAP": f"127.0.0.1:{_free_port()}"}
    there, node.environ = node.environ, away
    with node.run() as process:
        _wait(lambda: node.metric("spool_messages") >= 5)
        sealed = int(node.metric("batches_sealed_total"))
        process.kill()
        process.wait()
    node.environ = there
    node.make_topics()
    with node.run() as process:
        _wait(lambda: node.metric("messages_sent_total") > sealed and node.metric("spool_messages") == 0)
        _stop(process)
    runs: dict[str, list[int]] = {}
    for header, _ in node.batches():
        runs.setdefault(header.run_id, []).append(header.seq)
    killed, *later = runs.values()
    assert killed[:sealed] == list(range(sealed))
    assert all(seqs == list(range(len(seqs))) for seqs in later)


def test_a_stop_without_a_broker_is_bounded_too(tmp_path: Path) -> None:
    node = Node(f"127.0.0.1:{_free_port()}", tmp_path)
    with node.run() as process:
        _wait(lambda: node.metric("batches_sealed_total") >= 1)
        _stop(process)
    assert "stay in the spool for the next start" in node.log()


def test_once_shows_what_would_be_sent(tmp_path: Path) -> None:
    node = Node("127.0.0.1:1", tmp_path)
    _with_driver(node)
    command = [sys.executable, "-m", "gpuledger.cli", "agent", "once", "--json"]
    done = subprocess.run(command, env=node.environ, capture_output=True, timeout=30, check=True)
    seen = json.loads(done.stdout)
    assert [device["sample"]["power_mw"] for device in seen["devices"]] == [250_000, 250_001]
    assert seen["host"]["cpu_count"] == os.cpu_count()
    assert seen["versions"]["driver"] == "580.65.06"


def test_a_taken_address_is_named(tmp_path: Path) -> None:
    node = Node("127.0.0.1:1", tmp_path)
    host, port = node.health.split(":")
    with socket.socket() as listener:
        listener.bind((host, int(port)))
        listener.listen()
        with node.run() as process:
            assert process.wait(timeout=20) == 2
    assert f"agent.listen: cannot listen on {node.health}" in node.log()
