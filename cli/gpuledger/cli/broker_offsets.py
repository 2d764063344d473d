"""What the broker has that the database has not: how far each topic reaches, and the dirty marks on their way."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gpuledger.cli.exceptions import CommandError
from gpuledger.schemas.config import Kafka
from gpuledger.schemas.topics import TOPICS, topic_name

if TYPE_CHECKING:
    from gpuledger.streams.marks import Ranges

__all__ = ["BrokerAway", "ends", "partitions_of", "waiting_marks", "with_consumer"]

_TIMEOUT_S = 5.0
#: A backlog is read for at most so long: an audit must not wait for ever behind a producer.
_READ_S = 60.0


class BrokerAway(CommandError):
    """No broker answered in time."""


def ends(kafka: Kafka) -> dict[tuple[str, int], tuple[int, int]]:
    """(oldest kept, next) offset of every partition of our topics that the broker has. Raises BrokerAway."""
    return with_consumer(kafka, _ends)


def waiting_marks(kafka: Kafka, done: Mapping[int, int]) -> dict[str, Ranges]:
    """The ranges, by pool, of the dirty marks after the offsets worked off (`done`: partition → last). BrokerAway."""
    return with_consumer(kafka, lambda consumer, kafka: _waiting(consumer, kafka, done))


def with_consumer(kafka: Kafka, read: Any) -> Any:
    """What the coroutine `read(consumer, kafka)` gives, with a consumer that has joined no group. Raises BrokerAway."""

    async def session() -> Any:
        from aiokafka import AIOKafkaConsumer
        from aiokafka.errors import KafkaError

        from gpuledger.agents.publisher import client_options

        # Untyped: aiokafka has no type information.
        consumer: Any = AIOKafkaConsumer(**client_options(kafka), auto_offset_reset="earliest")
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                await consumer.start()
            async with asyncio.timeout(_READ_S):
                return await read(consumer, kafka)
        except (KafkaError, OSError, TimeoutError) as error:
            reason = str(error) or "no answer in time"
            raise BrokerAway(f"kafka.bootstrap: no broker answered at {kafka.bootstrap} ({reason})") from error
        finally:
            await consumer.stop()

    return asyncio.run(session())


async def partitions_of(kafka: Kafka) -> dict[str, list[Any]]:
    """The partitions of those of our topics that the broker has."""
    from aiokafka import TopicPartition
    from aiokafka.admin import AIOKafkaAdminClient

    from gpuledger.agents.publisher import client_options

    admin: Any = AIOKafkaAdminClient(**client_options(kafka))
    try:
        await admin.start()
        there = set(await admin.list_topics())
        names = {topic_name(kafka.topic_prefix, name): name for name in TOPICS}
        known = sorted(there & set(names))
        answer = await admin.describe_topics(known) if known else []
    finally:
        await admin.close()
    found: dict[str, list[Any]] = {}
    for each in answer:
        numbers = sorted(partition["partition"] for partition in each["partitions"])
        found[names[each["topic"]]] = [TopicPartition(each["topic"], n) for n in numbers]
    return found


async def _ends(consumer: Any, kafka: Kafka) -> dict[tuple[str, int], tuple[int, int]]:
    found: dict[tuple[str, int], tuple[int, int]] = {}
    for name, partitions in (await partitions_of(kafka)).items():
        first = await consumer.beginning_offsets(partitions)
        last = await consumer.end_offsets(partitions)
        found |= {(name, tp.partition): (int(first[tp]), int(last[tp])) for tp in partitions}
    return found


async def _waiting(consumer: Any, kafka: Kafka, done: Mapping[int, int]) -> dict[str, Ranges]:
    from gpuledger.schemas.events import Dirty, decode_event
    from gpuledger.schemas.exceptions import MessageError
    from gpuledger.streams import record_batches
    from gpuledger.streams.marks import Marks

    record_batches.install()  # whoever may write there may send a batch that unpacks to gigabytes
    marks = Marks()
    partitions = (await partitions_of(kafka)).get("dirty", [])
    if not partitions:
        return {}
    consumer.assign(partitions)
    first, last = await consumer.beginning_offsets(partitions), await consumer.end_offsets(partitions)
    for tp in partitions:
        consumer.seek(tp, max(int(first[tp]), done.get(tp.partition, -1) + 1))
    left = [tp for tp in partitions if await consumer.position(tp) < last[tp]]
    while left:
        for records in (await consumer.getmany(*left, timeout_ms=500)).values():
            for record in records:
                try:
                    event = decode_event(record.value or b"")
                except MessageError:  # the worker sends it to the dead letters
                    continue
                if isinstance(event, Dirty):
                    marks.add(event.pool, event.from_ms, event.to_ms, event.why)
        left = [tp for tp in left if await consumer.position(tp) < last[tp]]
    return marks.merged()
