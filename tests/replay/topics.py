"""Topics of a test's own on the shared broker, and all that is on them."""

import asyncio
import uuid
from typing import Any

from aiokafka import AIOKafkaConsumer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.structs import TopicPartition

from gpuledger.schemas.topics import TOPICS, topic_configs, topic_name

PARTITIONS = {"allocations": 3, "inventory": 2}


def make_topics(bootstrap: str) -> str:
    """The prefix of a new set of topics."""
    prefix = f"replay-{uuid.uuid4().hex[:8]}."

    async def make() -> None:
        admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
        await admin.start()
        try:
            await admin.create_topics(
                [
                    NewTopic(topic_name(prefix, name), PARTITIONS.get(name, 1), 1, topic_configs=topic_configs(name))
                    for name in TOPICS
                ]
            )
        finally:
            await admin.close()

    asyncio.run(make())
    return prefix


def read_topic(bootstrap: str, prefix: str, name: str) -> list[tuple[str, bytes]]:
    """Every (key, value) of a topic, partition by partition."""

    async def read() -> list[tuple[str, bytes]]:
        consumer: Any = AIOKafkaConsumer(bootstrap_servers=bootstrap, auto_offset_reset="earliest")
        await consumer.start()
        try:
            partitions = [TopicPartition(topic_name(prefix, name), n) for n in range(PARTITIONS.get(name, 1))]
            consumer.assign(partitions)
            ends = await consumer.end_offsets(partitions)
            records: dict[TopicPartition, list[Any]] = {partition: [] for partition in partitions}
            while [p for p in partitions if await consumer.position(p) < ends[p]]:
                for partition, batch in (await consumer.getmany(timeout_ms=500)).items():
                    records[partition].extend(batch)
            return [(r.key.decode(), r.value) for partition in partitions for r in records[partition]]
        finally:
            await consumer.stop()

    return asyncio.run(read())
