"""What the worker asks of Kafka besides consuming: ticks, topic sizes, the epoch, and credentials for Faust."""

from __future__ import annotations

import asyncio
import ssl
from typing import Any

import faust
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient

from gpuledger.agents.exceptions import BrokerUnavailable
from gpuledger.agents.publisher import client_options
from gpuledger.schemas.config import Kafka
from gpuledger.schemas.topics import TOPICS, topic_name
from gpuledger.streams.sinks import TICK_HEADER
from gpuledger.streams.store import Store

__all__ = ["Ticker", "current_epoch", "end_offsets", "faust_credentials", "partition_counts"]


async def partition_counts(settings: Kafka) -> dict[str, int]:
    """Partitions of each of our topics as the broker has them.

    Raises:
        BrokerUnavailable: a topic is not there (yet).
    """
    names = {topic_name(settings.topic_prefix, name): name for name in TOPICS}
    admin: Any = AIOKafkaAdminClient(**client_options(settings))
    try:
        await admin.start()
        found = {each["topic"]: len(each["partitions"]) for each in await admin.describe_topics(list(names))}
    finally:
        await admin.close()
    missing = sorted(topic for topic in names if not found.get(topic))
    if missing:
        raise BrokerUnavailable(f"kafka: topics without partitions: {', '.join(missing)}; check the broker's log")
    return {name: found[topic] for topic, name in names.items()}


async def end_offsets(settings: Kafka, name: str, partitions: int) -> dict[int, int]:
    """The next offset of every partition of a topic."""
    topic = topic_name(settings.topic_prefix, name)
    consumer: Any = AIOKafkaConsumer(**client_options(settings))
    await consumer.start()
    try:
        ends = await consumer.end_offsets([TopicPartition(topic, n) for n in range(partitions)])
        return {tp.partition: offset for tp, offset in ends.items()}
    finally:
        await consumer.stop()


def current_epoch(store: Store, ends: dict[int, int]) -> int:
    """The epoch of the dirty topic. It grows where an offset worked off before lies beyond the topic's end: then the
    topic has been made anew. Two workers that find that at once both make one more, which is harmless."""
    epoch = max((int(row[0]) for row in store.rows("SELECT max(epoch) FROM epochs") if row[0]), default=0)
    rows = store.rows("SELECT partition, max(offset) FROM progress WHERE topic = 'dirty' GROUP BY partition")
    beyond = [int(partition) for partition, offset in rows if int(offset) >= ends.get(int(partition), 0)]
    if epoch and not beyond:
        return epoch
    why = f"partition {beyond[0]} ends before what was worked off" if beyond else "first start"
    store.client.command("ALTER TABLE progress DELETE WHERE topic = 'dirty' SETTINGS mutations_sync = 1")
    store.client.command(
        "INSERT INTO epochs (epoch, started_at, why) SELECT {epoch:UInt32}, now64(3), {why:String}",
        {"epoch": epoch + 1, "why": why},
    )
    return epoch + 1


class Ticker:
    """Sends a record that says only "nothing older will come" to every partition of the gating topics."""

    def __init__(self, settings: Kafka, partitions: dict[str, int]) -> None:
        self._settings = settings
        self._partitions = [
            (topic_name(settings.topic_prefix, name), n) for name, count in partitions.items() for n in range(count)
        ]
        self._producer: Any = None

    async def tick(self) -> None:
        """One tick to each partition; raises what the producer raises, and connects anew next time."""
        if self._producer is None:
            producer = AIOKafkaProducer(acks="all", request_timeout_ms=5_000, **client_options(self._settings))
            await producer.start()
            self._producer = producer
        try:
            sent = [
                await self._producer.send(topic, b"", key=b"tick", partition=n, headers=[(TICK_HEADER, b"1")])
                for topic, n in self._partitions
            ]
            await asyncio.gather(*sent)
        except Exception:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Closes the connection."""
        producer, self._producer = self._producer, None
        if producer is not None:
            await producer.stop()


def faust_credentials(settings: Kafka) -> dict[str, Any]:
    """Faust's `broker_credentials` for the configured security; nothing for plain loopback."""
    security = settings.security
    if security.protocol == "PLAINTEXT":
        return {}
    context: ssl.SSLContext | None = client_options(settings).get("ssl_context")
    if not security.protocol.startswith("SASL"):
        return {"broker_credentials": faust.SSLCredentials(context=context)}
    credentials = faust.SASLCredentials(
        username=security.username,
        password=security.password.reveal() if security.password is not None else "",
        mechanism=security.sasl_mechanism,
        ssl_context=context,
    )
    return {"broker_credentials": credentials}
