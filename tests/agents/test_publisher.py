"""What was given to the publisher is in Kafka, in order, through outages of the broker."""

from __future__ import annotations

import asyncio
import socket
import time
import uuid
from pathlib import Path

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition

from gpuledger.agents.broker_topics import create_topics
from gpuledger.agents.exceptions import BrokerUnavailable, MessageRejected
from gpuledger.agents.messages import Message, event_message
from gpuledger.agents.publisher import Publisher
from gpuledger.agents.spool import Spool
from gpuledger.local.kafka import EmbeddedKafka
from gpuledger.schemas.config import Kafka, KafkaSecurity
from gpuledger.schemas.events import Dirty
from gpuledger.schemas.topics import TOPICS

NOW = 1_790_000_000_000
pytestmark = pytest.mark.services


def _settings(bootstrap: str) -> Kafka:
    """An installation of its own on the shared broker."""
    return Kafka(bootstrap=bootstrap, topic_prefix=f"t{uuid.uuid4().hex[:8]}.")


async def _read(settings: Kafka, topic: str, count: int) -> list[tuple[str, bytes, tuple[tuple[str, bytes], ...], int]]:
    """(key, value, headers, timestamp type) of the first `count` records, each partition in its order."""
    name = settings.topic_prefix + topic
    consumer = AIOKafkaConsumer(bootstrap_servers=settings.bootstrap, auto_offset_reset="earliest")
    await consumer.start()
    try:
        consumer.assign([TopicPartition(name, n) for n in range(settings.partitions[topic])])
        found: list[tuple[str, bytes, tuple[tuple[str, bytes], ...], int]] = []
        async with asyncio.timeout(20):
            while len(found) < count:
                record = await consumer.getone()
                assert record.key is not None and record.value is not None
                found.append((record.key.decode(), record.value, tuple(record.headers), record.timestamp_type))
        return found
    finally:
        await consumer.stop()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_topics_are_made_once_with_the_settings_of_the_contract(kafka: str) -> None:
    async def scenario() -> None:
        settings = _settings(kafka)
        made = await create_topics(settings)
        assert made == sorted(settings.topic_prefix + name for name in TOPICS)
        assert await create_topics(settings) == []
        async with Publisher(settings) as publisher:
            place = await publisher.publish("dirty", "p", b"{}")
        assert (place.topic, place.offset) == (settings.topic_prefix + "dirty", 0)
        assert place.timestamp_ms > NOW
        ((_, _, _, timestamp_type),) = await _read(settings, "dirty", 1)
        assert timestamp_type == 1  # broker append time

    asyncio.run(scenario())


def test_a_direct_message_is_there_when_the_call_returns(kafka: str) -> None:
    async def scenario() -> None:
        settings = _settings(kafka)
        await create_topics(settings, ["dirty", "telemetry"])
        event = event_message(Dirty(pool="p", from_ms=NOW, to_ms=NOW + 60_000, why="test"))
        async with Publisher(settings) as publisher:
            await publisher.publish(event.topic, event.key, event.value, [("h", b"\x00\xff")])
            assert await _read(settings, "dirty", 1) == [("p", event.value, (("h", b"\x00\xff"),), 1)]

    asyncio.run(scenario())


def test_many_messages_keep_the_order_of_each_key(kafka: str) -> None:
    async def scenario() -> None:
        settings = _settings(kafka)
        await create_topics(settings, ["telemetry"])
        messages = [Message("telemetry", f"node-{n % 7}", f"{n}".encode().rjust(5000)) for n in range(3000)]
        async with Publisher(settings) as publisher:
            places = await publisher.publish_many(messages)
        assert len(places) == len(messages)
        by_key: dict[str, list[int]] = {}
        for key, value, _, _ in await _read(settings, "telemetry", len(messages)):
            by_key.setdefault(key, []).append(int(value))
        assert by_key == {f"node-{k}": list(range(k, 3000, 7)) for k in range(7)}

    asyncio.run(scenario())


def test_what_the_broker_will_never_take_is_named_and_the_rest_is_delivered(kafka: str) -> None:
    async def scenario() -> None:
        settings = _settings(kafka)
        await create_topics(settings, ["telemetry"])
        big = Message("telemetry", "too-big", bytes(17 << 20))
        async with Publisher(settings) as publisher:
            with pytest.raises(MessageRejected, match="key too-big, 17825792 bytes"):
                await publisher.publish_many([Message("telemetry", "a", b"1"), big, Message("telemetry", "b", b"2")])
        assert sorted(key for key, *_ in await _read(settings, "telemetry", 2)) == ["a", "b"]

    asyncio.run(scenario())


def test_a_rejected_message_of_a_spool_does_not_hold_up_the_others(kafka: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        settings = _settings(kafka)
        await create_topics(settings, ["telemetry"])
        spool = Spool(tmp_path, 10**9, 10**12, NOW)
        for value in (b"1", bytes(17 << 20), b"2"):
            spool.seal_batch("run", 0, 1, NOW, lambda seq, gaps, value=value: Message("telemetry", "n", value))
        publisher = Publisher(settings)
        assert await publisher.drain_all(spool, 20)
        await publisher.close()
        assert [value for _, value, *_ in await _read(settings, "telemetry", 2)] == [b"1", b"2"]
        stats = spool.stats()
        assert (stats.messages, stats.rejected, stats.gaps) == (0, 1, 1)

    asyncio.run(scenario())


def test_no_broker_is_an_error_that_names_the_setting() -> None:
    async def scenario() -> None:
        bootstrap = f"127.0.0.1:{_free_port()}"
        publisher = Publisher(Kafka(bootstrap=bootstrap), patience_s=0.5)
        with pytest.raises(BrokerUnavailable, match=rf"kafka.bootstrap: no broker answered at {bootstrap}"):
            await publisher.publish("dirty", "p", b"{}")
        with pytest.raises(BrokerUnavailable, match=r"kafka.bootstrap"):
            await create_topics(Kafka(bootstrap=bootstrap))
        await publisher.close()

    asyncio.run(scenario())


def test_a_broker_without_tls_is_refused_where_tls_is_configured(kafka: str) -> None:
    async def scenario() -> None:
        settings = Kafka(bootstrap=kafka, security=KafkaSecurity(protocol="SSL"))
        with pytest.raises(BrokerUnavailable):
            await Publisher(settings, patience_s=0.5).start()

    asyncio.run(scenario())


def test_a_spool_drains_in_order_through_an_outage(tmp_path: Path) -> None:
    """Before, during and after an outage of the broker: everything arrives, in order, and leaves the spool."""

    def look_until_empty(spool: Spool) -> None:
        deadline = time.monotonic() + 40
        while spool.stats().messages:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    async def wait_until_empty(spool: Spool) -> None:
        await asyncio.to_thread(look_until_empty, spool)

    async def scenario() -> None:
        port = _free_port()
        settings = Kafka(bootstrap=f"127.0.0.1:{port}")
        spool = Spool(tmp_path / "spool", 10**9, 10**12, NOW)
        wake, stop = asyncio.Event(), asyncio.Event()

        def seal(count: int) -> None:
            for _ in range(count):
                spool.seal_batch("run", 0, 1, NOW, lambda seq, gaps: Message("telemetry", "node", b"%d" % seq))
            wake.set()

        publisher = Publisher(settings)
        drain = asyncio.create_task(publisher.drain(spool, wake, stop))
        seal(5)  # there is no broker yet
        await asyncio.sleep(0.3)
        broker = await asyncio.to_thread(EmbeddedKafka(tmp_path / "kafka", port=port).__enter__)
        try:
            await create_topics(settings, ["telemetry"])
            await wait_until_empty(spool)
            seal(5)
            await wait_until_empty(spool)
            await asyncio.to_thread(broker.__exit__, None, None, None)
            seal(5)
            await asyncio.sleep(1.0)
            assert spool.stats().messages == 5
            seal(5)
            broker = await asyncio.to_thread(EmbeddedKafka(tmp_path / "kafka", port=port).__enter__)
            await wait_until_empty(spool)
            values = [int(value) for _, value, *_ in await _read(settings, "telemetry", 20)]
            # A batch whose acknowledgement got lost may come twice; none is missing and none overtakes.
            assert list(dict.fromkeys(values)) == list(range(20))
            stop.set()
            async with asyncio.timeout(10):
                await drain
            await publisher.close()
        finally:
            drain.cancel()
            await asyncio.to_thread(broker.__exit__, None, None, None)

    asyncio.run(scenario())


def test_the_end_is_bounded_while_the_broker_is_away(tmp_path: Path) -> None:
    async def scenario() -> None:
        spool = Spool(tmp_path, 10**9, 10**12, NOW)
        spool.seal_batch("run", 0, 1, NOW, lambda seq, gaps: Message("telemetry", "n", b"x"))
        publisher = Publisher(Kafka(bootstrap=f"127.0.0.1:{_free_port()}"))
        wake, stop = asyncio.Event(), asyncio.Event()
        drain = asyncio.create_task(publisher.drain(spool, wake, stop))
        await asyncio.sleep(0.5)
        stop.set()
        async with asyncio.timeout(10):
            await drain
            assert not await publisher.drain_all(spool, 1)
            await publisher.close(1)
        assert spool.stats().messages == 1

    asyncio.run(scenario())
