"""Which dirty marks led to the computations of a minute: read back from the broker, as long as it keeps them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from gpuledger.cli.broker_offsets import partitions_of, with_consumer
from gpuledger.schemas.config import Kafka
from gpuledger.schemas.events import Dirty, decode_event
from gpuledger.schemas.exceptions import MessageError
from gpuledger.streams.explanation import Mark

__all__ = ["marks_of_versions"]

#: How many marks before the oldest version are looked through, and how many at most in all.
_BEFORE = 2_000
_MOST = 100_000
_MINUTE_MS = 60_000


def marks_of_versions(kafka: Kafka, pool: str, minute_ms: int, offsets: Sequence[int]) -> dict[int, list[Mark]]:
    """By version offset the marks of the pool that cover the minute, taken since the version before it.

    A version carries the offset of the last mark it took. Raises BrokerAway.
    """
    wanted = sorted(set(offsets))
    return with_consumer(kafka, lambda consumer, kafka: _read(consumer, kafka, pool, minute_ms, wanted))


async def _read(consumer: Any, kafka: Kafka, pool: str, minute_ms: int, wanted: list[int]) -> dict[int, list[Mark]]:
    from aiokafka.partitioner import DefaultPartitioner

    partitions = (await partitions_of(kafka)).get("dirty", [])
    if not partitions or not wanted:
        return {}
    numbers = [tp.partition for tp in partitions]
    number = DefaultPartitioner()(pool.encode(), numbers, numbers)
    tp = next(each for each in partitions if each.partition == number)
    consumer.assign([tp])
    first = int((await consumer.beginning_offsets([tp]))[tp])
    end = min(wanted[-1] + 1, int((await consumer.end_offsets([tp]))[tp]))
    consumer.seek(tp, max(first, wanted[0] - _BEFORE, wanted[-1] - _MOST))
    found: dict[int, list[Mark]] = {offset: [] for offset in wanted}
    while await consumer.position(tp) < end:
        for record in (await consumer.getmany(tp, timeout_ms=500)).get(tp, []):
            at = bisect_left(wanted, record.offset)
            if at < len(wanted) and (why := _why(record.value, pool, minute_ms)) is not None:
                found[wanted[at]].append(Mark(record.offset, record.timestamp, why))
    return found


def _why(value: bytes | None, pool: str, minute_ms: int) -> str | None:
    """Why the minute was marked; None where the record does not mark it."""
    try:
        event = decode_event(value or b"")
    except MessageError:
        return None
    if not isinstance(event, Dirty) or event.pool != pool:
        return None
    return event.why if event.from_ms < minute_ms + _MINUTE_MS and event.to_ms > minute_ms else None
