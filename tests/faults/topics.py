"""What lies in the topics after a run: which messages of the load, how often, and what else."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition

from gpuledger.agents.publisher import client_options
from gpuledger.schemas.config import Kafka
from gpuledger.schemas.topics import TOPICS, topic_name
from gpuledger.streams.sinks import TICK_HEADER
from tests.faults.load import FaultLoad

__all__ = ["TopicCounts", "count_topics"]


@dataclass(frozen=True, slots=True)
class TopicCounts:
    """`planned` copies of messages that the load itself has twice; `resent` on top of these; `missing` are lost."""

    messages: int
    planned: int
    resent: int
    missing: int


def count_topics(kafka: Kafka, load: FaultLoad) -> TopicCounts:
    """Compares every record of the topics with the load, byte for byte."""
    wanted = load.counts()
    topics = sorted({topic for topic, _, _ in wanted})
    found = asyncio.run(_read(kafka, topics))
    # A compacted topic may have forgotten older messages of a key.
    lasting = {message for message in wanted if not TOPICS[message[0]].compacted}
    return TopicCounts(
        messages=len(wanted),
        planned=wanted.total() - len(wanted),
        resent=sum(max(0, found[message] - wanted[message]) for message in wanted),
        missing=sum(message not in found for message in lasting),
    )


async def _read(kafka: Kafka, topics: list[str]) -> Counter[tuple[str, str, bytes]]:
    consumer: Any = AIOKafkaConsumer(**client_options(kafka), auto_offset_reset="earliest")
    found: Counter[tuple[str, str, bytes]] = Counter()
    await consumer.start()
    try:
        names = {topic_name(kafka.topic_prefix, topic): topic for topic in topics}
        places = [TopicPartition(name, n) for name, topic in names.items() for n in range(kafka.partitions[topic])]
        consumer.assign(places)
        ends = {place: end for place, end in (await consumer.end_offsets(places)).items() if end}
        async with asyncio.timeout(300):
            while ends:
                for place, records in (await consumer.getmany(timeout_ms=1000, max_records=5000)).items():
                    for record in records:
                        if not any(key == TICK_HEADER for key, _ in record.headers):
                            found[names[place.topic], (record.key or b"").decode(), record.value or b""] += 1
                    if records[-1].offset + 1 >= ends.get(place, 0):
                        ends.pop(place, None)
    finally:
        await consumer.stop()
    return found
