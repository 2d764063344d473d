"""The embedded broker, for real: its data, its lock, its ports, its end."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from gpuledger.local.children import Supervisor
from gpuledger.local.exceptions import DirectoryInUse, PortTaken, ServiceFailed
from gpuledger.local.kafka import MESSAGE_MAX_BYTES, EmbeddedKafka
from gpuledger.local.ports import free_port
from tests.local.processes import ProcessHandle

pytestmark = pytest.mark.services

LOG_APPEND_TIME = 1
PARENT = """
import json, sys
from pathlib import Path
from gpuledger.local.kafka import EmbeddedKafka
broker = EmbeddedKafka(Path(sys.argv[1]))
broker.start()
print(json.dumps([broker.pid, broker.bootstrap]), flush=True)
sys.stdin.read()
"""


async def create_topic(bootstrap: str, name: str, partitions: int = 1) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(name, num_partitions=partitions, replication_factor=1)])
    finally:
        await admin.close()


async def produce(bootstrap: str, topic: str, values: list[bytes], **options: Any) -> None:
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap, **options)
    await producer.start()
    try:
        for value in values:
            await producer.send_and_wait(topic, value)
    finally:
        await producer.stop()


async def read_all(bootstrap: str, topic: str) -> list[Any]:
    """Every record of partition 0, up to its end at the time of asking."""
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap, auto_offset_reset="earliest")
    await consumer.start()
    try:
        partition = TopicPartition(topic, 0)
        consumer.assign([partition])
        end = (await consumer.end_offsets([partition]))[partition]
        records: list[Any] = []
        while len(records) < end:
            batches = await consumer.getmany(timeout_ms=10_000)
            assert batches, f"only {len(records)} of {end} records came"
            records += [record for batch in batches.values() for record in batch]
        return records
    finally:
        await consumer.stop()


def test_records_carry_the_broker_s_time_and_compress_with_zstd(kafka: str) -> None:
    async def scenario() -> list[Any]:
        await create_topic(kafka, "local-append-time")
        producer = AIOKafkaProducer(
            bootstrap_servers=kafka,
            compression_type="zstd",
            enable_idempotence=True,
            max_request_size=MESSAGE_MAX_BYTES,
        )
        await producer.start()
        try:
            # The producer's own clock stands in 1970.
            await producer.send_and_wait("local-append-time", b"a" * 8_000_000, timestamp_ms=1)
            await producer.send_and_wait("local-append-time", b"b", timestamp_ms=1)
        finally:
            await producer.stop()
        return await read_all(kafka, "local-append-time")

    before_ms = int(time.time() * 1000)
    records = asyncio.run(scenario())
    assert [(len(record.value), record.timestamp_type) for record in records] == [
        (8_000_000, LOG_APPEND_TIME),
        (1, LOG_APPEND_TIME),
    ]
    assert all(before_ms - 1000 <= record.timestamp <= time.time() * 1000 + 1000 for record in records)


def test_a_message_near_the_limit_passes_uncompressed(kafka: str) -> None:
    value = bytes(range(256)) * ((MESSAGE_MAX_BYTES - 4096) // 256)

    async def scenario() -> list[Any]:
        await create_topic(kafka, "local-large")
        await produce(kafka, "local-large", [value], max_request_size=MESSAGE_MAX_BYTES)
        return await read_all(kafka, "local-large")

    (record,) = asyncio.run(scenario())
    assert record.value == value


def test_a_group_and_a_transaction_work_on_one_node(kafka: str) -> None:
    async def scenario() -> list[bytes]:
        await create_topic(kafka, "local-transaction")
        producer = AIOKafkaProducer(bootstrap_servers=kafka, transactional_id="local-test")
        await producer.start()
        try:
            async with producer.transaction():
                await producer.send("local-transaction", b"in one go")
        finally:
            await producer.stop()
        consumer = AIOKafkaConsumer(
            "local-transaction",
            bootstrap_servers=kafka,
            group_id="local-test",
            auto_offset_reset="earliest",
            isolation_level="read_committed",
        )
        await consumer.start()
        try:
            record = await asyncio.wait_for(consumer.getone(), 30)
            await consumer.commit()
            assert record.value is not None
            return [record.value]
        finally:
            await consumer.stop()

    assert asyncio.run(scenario()) == [b"in one go"]


def test_a_misspelt_topic_does_not_appear(kafka: str) -> None:
    async def scenario() -> list[str]:
        admin = AIOKafkaAdminClient(bootstrap_servers=kafka)
        await admin.start()
        try:
            await admin.describe_topics(["local-mispelt"])
            return await admin.list_topics()
        finally:
            await admin.close()

    assert "local-mispelt" not in asyncio.run(scenario())


def test_restart_on_other_ports_keeps_the_messages(tmp_path: Path) -> None:
    with EmbeddedKafka(tmp_path) as broker:
        asyncio.run(create_topic(broker.bootstrap, "kept"))
        asyncio.run(produce(broker.bootstrap, "kept", [b"1", b"2"]))
        first_port = broker.port
        process = ProcessHandle(broker.pid)
    with process:
        assert process.ended(within_s=0)
    # Java's status after SIGTERM; a broker that needed more than the ten seconds would have been killed: -9.
    assert broker.poll() == 143
    assert (tmp_path / "data" / ".kafka_cleanshutdown").exists()
    # Its log works, and holds the end as well.
    log = broker.log_file.read_text()
    assert "Kafka Server started (kafka.server.KafkaRaftServer)" in log
    assert "App info kafka.server for 1 unregistered" in log

    with socket.socket() as blocker:
        blocker.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        blocker.bind(("127.0.0.1", first_port))
        blocker.listen()
        with EmbeddedKafka(tmp_path) as again:
            assert again.port != first_port
            assert [record.value for record in asyncio.run(read_all(again.bootstrap, "kept"))] == [b"1", b"2"]


def test_kill_9_of_the_parent_leaves_no_broker_and_loses_nothing(tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pid, bootstrap = json.loads(parent.stdout.readline())
    with ProcessHandle(pid) as java:
        assert Path(f"/proc/{pid}/exe").resolve().name == "java"
        asyncio.run(create_topic(bootstrap, "kept"))
        asyncio.run(produce(bootstrap, "kept", [b"1", b"2", b"3"]))

        error = refusal(EmbeddedKafka(tmp_path))
        assert error.pid == parent.pid
        assert f"{tmp_path} is in use by process {parent.pid}" in str(error)

        parent.kill()
        # At once on the same directory: the start waits until the orphan is gone.
        with EmbeddedKafka(tmp_path) as broker:
            assert java.ended(within_s=0)
            records = asyncio.run(read_all(broker.bootstrap, "kept"))
            assert [record.value for record in records] == [b"1", b"2", b"3"]
    parent.communicate()


def refusal(broker: EmbeddedKafka) -> DirectoryInUse:
    with pytest.raises(DirectoryInUse) as caught:
        broker.start()
    return caught.value


def test_a_wrong_setting_fails_with_the_broker_s_words_and_frees_the_directory(tmp_path: Path) -> None:
    for wrong in ("many", "none"):
        with pytest.raises(ServiceFailed) as caught:
            EmbeddedKafka(tmp_path, settings={"log.segment.bytes": wrong}).start()
        assert f"Invalid value {wrong} for configuration log.segment.bytes" in str(caught.value)


def test_a_broker_that_is_killed_is_noticed_and_can_be_started_again(tmp_path: Path) -> None:
    broker = EmbeddedKafka(tmp_path)
    with Supervisor() as supervisor:
        supervisor.start(broker)
        asyncio.run(create_topic(broker.bootstrap, "kept"))
        asyncio.run(produce(broker.bootstrap, "kept", [b"1"]))
        os.kill(broker.pid, signal.SIGKILL)
        with pytest.raises(ServiceFailed, match=r"kafka: was ended by signal SIGKILL; its log is .*server\.log"):
            supervisor.wait(20)
    with Supervisor() as supervisor:
        supervisor.start(broker)
        assert [record.value for record in asyncio.run(read_all(broker.bootstrap, "kept"))] == [b"1"]
    assert broker.poll() == 143


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_a_taken_port_is_named_and_the_directory_is_free_again(tmp_path: Path, taken_port: int) -> None:
    with pytest.raises(PortTaken):
        EmbeddedKafka(tmp_path, taken_port).start()
    with pytest.raises(PortTaken) as caught:
        EmbeddedKafka(tmp_path, taken_port).start()
    assert caught.value.port == taken_port
    assert f"kafka: cannot listen on 127.0.0.1:{taken_port}: address already in use" in str(caught.value)
    # Told before the broker was made ready for nothing.
    assert not (tmp_path / "data").exists()


def test_a_port_out_of_range_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PortTaken, match="ports are 1 to 65535"):
        EmbeddedKafka(tmp_path, 70_000).start()


def test_a_chosen_port_that_is_lost_before_the_bind_is_chosen_again(
    tmp_path: Path, taken_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = iter([0, 0, taken_port])  # two for the format, whose ports are not used
    monkeypatch.setattr("gpuledger.local.kafka.free_port", lambda: next(free, None) or free_port())
    with EmbeddedKafka(tmp_path) as broker:
        assert broker.port != taken_port
        assert "Address already in use" in broker.log_file.read_text()


def test_a_cluster_id_never_looks_like_an_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [uuid.UUID(bytes=b"\xf8" + bytes(15)), uuid.UUID(bytes=b"\x00\xf8" + bytes(14))]
    monkeypatch.setattr(uuid, "uuid4", lambda: ids.pop(0))
    with EmbeddedKafka(tmp_path):
        assert not ids


def test_a_stop_before_any_start_is_harmless(tmp_path: Path) -> None:
    broker = EmbeddedKafka(tmp_path)
    broker.stop()
    with pytest.raises(ServiceFailed, match="was not started"):
        _ = broker.bootstrap
