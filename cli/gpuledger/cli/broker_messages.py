"""Single messages on the broker: one read at its place, one sent again just as it was."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from gpuledger.cli.broker_offsets import BrokerAway
from gpuledger.cli.exceptions import CommandError
from gpuledger.schemas.config import Kafka

__all__ = ["BrokerMessages", "MessageGone", "RawMessage"]

_TIMEOUT_S = 10.0
_MAX_MESSAGE_BYTES = 16 << 20


class MessageGone(CommandError):
    """The broker does not keep that message any more, or it cannot be read from it."""


@dataclass(frozen=True, slots=True)
class RawMessage:
    """A message byte for byte; None where it has no key or no value."""

    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes | None]]


class BrokerMessages:
    """A connection that reads and sends; made by `connected`."""

    def __init__(self, consumer: Any, producer: Any) -> None:
        self._consumer = consumer
        self._producer = producer

    @classmethod
    @asynccontextmanager
    async def connected(cls, kafka: Kafka) -> AsyncGenerator[BrokerMessages]:
        """Connected inside the ``async with`` block. Raises BrokerAway."""
        from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
        from aiokafka.errors import KafkaError

        from gpuledger.agents.publisher import client_options
        from gpuledger.streams import record_batches

        record_batches.install()  # what is looked for may be a batch that unpacks to gigabytes
        options = client_options(kafka)
        # Untyped: aiokafka has no type information.
        consumer: Any = AIOKafkaConsumer(**options, auto_offset_reset="none", enable_auto_commit=False)
        producer: Any = AIOKafkaProducer(
            **options, acks="all", enable_idempotence=True, compression_type="zstd", max_request_size=_MAX_MESSAGE_BYTES
        )
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                await consumer.start()
                await producer.start()
            yield cls(consumer, producer)
        except (KafkaError, OSError, TimeoutError) as error:
            reason = str(error) or "no answer in time"
            raise BrokerAway(f"kafka.bootstrap: no broker answered at {kafka.bootstrap} ({reason})") from error
        finally:
            await asyncio.gather(consumer.stop(), producer.stop(), return_exceptions=True)

    async def read(self, topic: str, partition: int, offset: int) -> RawMessage:
        """The message at that place. Raises MessageGone."""
        from aiokafka import TopicPartition

        from gpuledger.streams.record_batches import Unreadable

        where = TopicPartition(topic, partition)
        self._consumer.assign([where])
        first = (await self._consumer.beginning_offsets([where]))[where]
        end = (await self._consumer.end_offsets([where]))[where]
        if not first <= offset < end:
            raise MessageGone(
                f"{topic}/{partition}/{offset}: the broker keeps offsets {first} to {end - 1}; the message is gone, "
                "and the letter has a part of it only: its producer must send it again"
            )
        self._consumer.seek(where, offset)
        while await self._consumer.position(where) <= offset:
            found = await self._consumer.getmany(where, timeout_ms=1_000, max_records=1)
            for record in found.get(where, []):
                if record.headers and type(record.headers[0]) is Unreadable:
                    raise MessageGone(f"{topic}/{partition}/{offset}: {record.headers[0].reason}")
                if record.offset == offset:
                    return RawMessage(record.key, record.value, list(record.headers))
        raise MessageGone(f"{topic}/{partition}/{offset}: a newer message of its key has replaced it (compacted topic)")

    async def send(self, topic: str, partition: int, message: RawMessage) -> tuple[int, int]:
        """Sends it to that partition; (partition, offset) once the broker has it. Raises CommandError."""
        from aiokafka.errors import KafkaError

        if message.key is None and message.value is None:
            raise CommandError(f"{topic}/{partition}: a message without key and value; there is nothing to send")
        try:
            place = await self._producer.send_and_wait(
                topic, message.value, key=message.key, partition=partition, headers=message.headers or None
            )
        except (AssertionError, KafkaError) as error:
            raise CommandError(f"{topic}/{partition}: the broker did not take it: {error!r}") from error
        return int(place.partition), int(place.offset)
