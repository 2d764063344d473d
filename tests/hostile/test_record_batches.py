"""Batches that no producer sends, on a real broker: what unpacks to too much is one record, and reading goes on."""

from __future__ import annotations

import asyncio
import resource
import uuid
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from gpuledger.streams.record_batches import MAX_BATCH_RECORDS, MAX_FETCH_BYTES, Unreadable, install
from tests.hostile.wire import CODECS, RawRecord, WireClient, bomb, packed, record_batch, records

pytestmark = pytest.mark.services

MIB = 1 << 20


#: A topic that was made just now may not be known yet, or not have its leader.
_NOT_READY = (3, 6)


def send(bootstrap: str, *batches: bytes) -> tuple[TopicPartition, list[int]]:
    """To a topic of their own; where each begins."""
    topic = f"batches-{uuid.uuid4().hex[:8]}"

    async def produce() -> list[int]:
        admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
        await admin.start()
        configs = {"max.message.bytes": str(16 * MIB), "compression.type": "producer"}
        await admin.create_topics([NewTopic(topic, 1, 1, topic_configs=configs)])
        await admin.close()
        offsets: list[int] = []
        async with WireClient(bootstrap) as wire:
            for batch in batches:
                place = await wire.produce(topic, 0, batch)
                for _ in range(100):
                    if place is None or place.error not in _NOT_READY:
                        break
                    await asyncio.sleep(0.1)
                    place = await wire.produce(topic, 0, batch)
                assert place is not None and place.error == 0, place
                offsets.append(place.offset)
        return offsets

    return TopicPartition(topic, 0), asyncio.run(produce())


def fetch(bootstrap: str, where: TopicPartition, start: int = 0) -> list[list[Any]]:
    """All records from `start`, as each call gave them."""
    install()

    async def read() -> list[list[Any]]:
        out: list[list[Any]] = []
        async with AIOKafkaConsumer(bootstrap_servers=bootstrap) as consumer:
            consumer.assign([where])
            end = (await consumer.end_offsets([where]))[where]
            consumer.seek(where, start)
            while await consumer.position(where) < end:
                out += list((await consumer.getmany(where, timeout_ms=500)).values())
        return out

    return asyncio.run(read())


def flat(blocks: list[list[Any]]) -> list[Any]:
    return [record for block in blocks for record in block]


def one(value: bytes, codec: str = "none") -> bytes:
    return record_batch(packed(records([RawRecord(b"k", value, [(b"h", b"1")])]), codec), 1, codec)


@pytest.mark.parametrize("codec", CODECS)
def test_what_is_proper_is_read_as_ever(kafka: str, codec: str) -> None:
    given = [RawRecord(b"k%d" % n, bytes(range(256)) * n, [(b"h", None), (b"", b"x")]) for n in range(200)]
    where, _ = send(kafka, record_batch(packed(records([*given, RawRecord(None, None)]), codec), 201, codec))
    found = flat(fetch(kafka, where))
    assert [(record.key, record.value) for record in found] == [(each.key, each.value) for each in given] + [
        (None, None)
    ]
    assert found[0].headers == (("h", None), ("", b"x")) and [record.offset for record in found] == list(range(201))


@pytest.mark.parametrize("codec", [codec for codec in CODECS if codec != "none"])
def test_a_bomb_is_one_record_and_what_comes_after_it_is_read(kafka: str, codec: str) -> None:
    size = {"zstd": 1024, "lz4": 256}.get(codec, 48)
    where, (before, at, after) = send(
        kafka, one(b"a", codec), record_batch(bomb(codec, size * MIB, 3)[0], 3, codec), one(b"b")
    )
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    first, stand, last = flat(fetch(kafka, where))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_kib < 200 * 1024
    assert (first.offset, first.value, last.offset, last.value) == (before, b"a", after, b"b")
    assert (stand.offset, stand.key, stand.value) == (at + 2, None, None)
    (why,) = stand.headers
    assert type(why) is Unreadable and why.first_offset == at
    assert f"batch of offsets {at} to {at + 2}" in why.reason and "does not unpack into 33554432 bytes" in why.reason


def test_a_bomb_is_not_hidden_by_a_start_in_its_middle(kafka: str) -> None:
    where, (at, _) = send(kafka, record_batch(bomb("zstd", 64 * MIB, 3)[0], 3, "zstd"), one(b"b"))
    stand, last = flat(fetch(kafka, where, at + 1))
    assert (stand.offset, stand.headers[0].first_offset, last.value) == (at + 2, at, b"b")


def test_a_crowd_of_empty_records_is_one_record(kafka: str) -> None:
    count = MAX_BATCH_RECORDS + 1
    crowd = record_batch(packed(records([RawRecord(None, None)] * count), "zstd"), count, "zstd")
    where, (at, after) = send(kafka, crowd, one(b"b"))
    stand, last = flat(fetch(kafka, where))
    assert (stand.offset, last.offset) == (at + count - 1, after)
    assert f"it claims {count} records" in stand.headers[0].reason


def test_a_header_name_that_is_no_utf8_costs_nobody_the_batch(kafka: str) -> None:
    odd = [RawRecord(b"a", b"1"), RawRecord(b"b", b"2", [(b"\xff\xfe", b"v"), (b"ok", None)]), RawRecord(b"c", None)]
    where, _ = send(kafka, *(record_batch(packed(records(odd), codec), 3, codec) for codec in ("none", "zstd")))
    found = flat(fetch(kafka, where))
    assert [(record.key, record.value) for record in found] == [(b"a", b"1"), (b"b", b"2"), (b"c", None)] * 2
    assert found[1].headers == (("\\xff\\xfe", b"v"), ("ok", None)) == found[4].headers


def test_one_fetch_hands_out_bounded_blocks(kafka: str) -> None:
    value = bytes(4 * MIB)
    batch = record_batch(packed(records([RawRecord(b"k", value)] * 6), "zstd"), 6, "zstd")
    where, _ = send(kafka, *[batch] * 5)
    blocks = fetch(kafka, where)
    assert sum(map(len, blocks)) == 30 and [record.offset for record in flat(blocks)] == list(range(30))
    assert max(sum(len(record.value) for record in block) for block in blocks) <= MAX_FETCH_BYTES + len(value)
