"""Attacks on a whole installation, with valid messages between them, and the account of every one.

Everything goes to real topics in batches made by hand, so that what no producer would send is sent as well: batches
that unpack to gigabytes, values above the broker's limit, batches with a wrong checksum.
"""

from __future__ import annotations

import random
import struct
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from gpuledger.agents.messages import Message
from gpuledger.agents.publisher import Publisher
from gpuledger.schemas.config import Kafka
from gpuledger.schemas.topics import topic_name
from tests.e2e.load import Load, Offsets
from tests.hostile.attack import Attack, attacks
from tests.hostile.base import all_kinds, of_every_topic
from tests.hostile.odd import odd
from tests.hostile.on_events import EVENT_TOPICS
from tests.hostile.wire import Placed, RawRecord, WireClient, bomb, packed, record_batch, records

__all__ = ["Account", "Buried", "besiege", "unaccounted"]

#: How many times as often as on any topic of events an attack is on telemetry.
_ON_TELEMETRY = 5
_MOST_PER_BATCH = 40
_MOST_BYTES = 6 << 20
_MIB = 1 << 20
#: What a broker answers: the message is above its limit; the batch is torn.
_TOO_LARGE, _TORN = (10, 18), (2, 87, -1)
#: (codec, unpacked size, records). Each is made once; gzip and snappy pack less and take the broker longer.
_BOMBS = (
    *(("zstd", 1024 * _MIB, 1), ("zstd", 64 * _MIB, 5), ("zstd", 300 * _MIB, 3), ("lz4", 128 * _MIB, 1)),
    *(("lz4", 48 * _MIB, 2), ("snappy", 48 * _MIB, 1), ("gzip", 40 * _MIB, 1)),
)
#: Records of a batch that is small and still too many.
_CROWD = 300_000


@dataclass(frozen=True, slots=True)
class Buried:
    """An attack and where it lies; `count` records of one batch, at these offsets."""

    topic: str
    partition: int
    offset: int
    kind: str
    reason: str
    count: int = 1
    value: bytes | None = None
    headers: Sequence[tuple[bytes, bytes | None]] = ()


@dataclass(slots=True)
class Account:
    """What was sent: attacks by place, those that the broker refused by kind, valid messages by place."""

    buried: list[Buried] = field(default_factory=list[Buried])
    refused: Counter[str] = field(default_factory=Counter[str])
    valid: set[tuple[str, int, int]] = field(default_factory=set[tuple[str, int, int]])
    last: Offsets = field(default_factory=dict[tuple[str, int], int])

    #: Messages that were malformed. A crowd counts as one.
    attacks: int = 0

    def note(self, topic: str, partition: int, offset: int) -> None:
        """Something lies there."""
        self.last[topic, partition] = max(offset, self.last.get((topic, partition), -1))


class _Siege:
    def __init__(self, kafka: Kafka, load: Load, seed: int, count: int) -> None:
        self._kafka = kafka
        self._load = load
        self._rng = random.Random(seed)
        self._count = count
        self.account = Account()
        valid = of_every_topic(message for tick in load.ticks for message in tick)
        topics = ["telemetry"] * _ON_TELEMETRY + list(EVENT_TOPICS)
        self._attacks = attacks(self._rng, all_kinds(), valid, topics, time.time_ns() // 1_000_000)
        self._bombs: dict[tuple[str, int, int], bytes] = {}
        self._crowd = packed(records([RawRecord(b"", None)] * _CROWD), "zstd") if count > 10_000 else b""
        self._sent: list[Message] = []

    async def run(self) -> None:
        """Sends the whole load in order, and the attacks spread over it."""
        ticks = self._load.ticks
        async with Publisher(self._kafka, "besieged") as publisher, WireClient(self._kafka.bootstrap) as wire:
            for n, tick in enumerate(ticks):
                places = await publisher.publish_many(tick)
                for message, place in zip(tick, places, strict=True):
                    self.account.valid.add((message.topic, place.partition, place.offset))
                    self.account.note(message.topic, place.partition, place.offset)
                self._sent = [*self._sent[-500:], *tick]
                due = self._count * (n + 1) // len(ticks)
                while self.account.attacks < due:
                    await self._some(wire, min(400, due - self.account.attacks))

    async def _some(self, wire: WireClient, count: int) -> None:
        for rate, least, send in ((0.0006, 8, self._bomb), (0.0002, 3, self._too_large), (0.0005, 5, self._torn)):
            if self._rng.random() < count * max(rate, least / self._count):
                await send(wire)
        for topic, partition, group in self._groups(count):
            await self._send(wire, topic, partition, group)
        await self._odd(wire)

    def _groups(self, count: int) -> Iterator[tuple[str, int, list[Attack]]]:
        """So many attacks, in batches for one partition each."""
        waiting: dict[tuple[str, int], list[Attack]] = {}
        for _ in range(count):
            attack = next(self._attacks)
            place = attack.topic, self._rng.randrange(self._kafka.partitions[attack.topic])
            group = waiting.setdefault(place, [])
            group.append(attack)
            size = sum(len(each.value or b"") + sum(len(v or b"") for _, v in each.headers) for each in group)
            if len(group) >= self._rng.randrange(1, _MOST_PER_BATCH) or size > _MOST_BYTES:
                yield *place, waiting.pop(place)
        yield from ((*place, group) for place, group in waiting.items())

    async def _produce(self, wire: WireClient, topic: str, partition: int, batch: bytes) -> Placed | None:
        return await wire.produce(topic_name(self._kafka.topic_prefix, topic), partition, batch)

    async def _send(self, wire: WireClient, topic: str, partition: int, group: Sequence[Attack]) -> None:
        codec = self._rng.choice(["none", "none", "gzip", "snappy", "lz4", "zstd", "zstd", "zstd"])
        made = [RawRecord(each.key, each.value, each.headers) for each in group]
        batch = record_batch(packed(records(made), codec), len(made), codec)
        place = await self._produce(wire, topic, partition, batch)
        assert place is not None and place.error == 0, f"{topic}: a proper batch was refused: {place}"
        for n, each in enumerate(group):
            at = place.offset + n
            self.account.buried.append(
                Buried(topic, partition, at, each.kind, each.reason, 1, (each.value or b"")[:64], each.headers)
            )
        self.account.attacks += len(group)
        self.account.note(topic, partition, place.offset + len(group) - 1)

    async def _bomb(self, wire: WireClient) -> None:
        large = self._count > 10_000
        shape = self._rng.choice(_BOMBS if large else [each for each in _BOMBS if each[1] < 100 * _MIB])
        if shape not in self._bombs:
            self._bombs[shape] = bomb(*shape)[0]
        codec, _, count = shape
        payload = self._bombs[shape]
        if large and self._rng.random() < 0.05:  # no gigabytes, but hundreds of thousands of records without anything
            codec, count, payload = "zstd", _CROWD, self._crowd
        topic = self._rng.choice(["telemetry", *EVENT_TOPICS])
        partition = self._rng.randrange(self._kafka.partitions[topic])
        place = await self._produce(wire, topic, partition, record_batch(payload, count, codec))
        assert place is not None and place.error == 0, f"a bomb was refused: {shape} {place}"
        kind = f"bomb {codec}" if count < _CROWD else "crowd of empty records"
        reason = "does not unpack into" if count < _CROWD else "records, and at most"
        self.account.buried.append(Buried(topic, partition, place.offset, kind, reason, count))
        self.account.attacks += 1 if count == _CROWD else count
        self.account.note(topic, partition, place.offset + count - 1)

    async def _too_large(self, wire: WireClient) -> None:
        topic = self._rng.choice(["telemetry", *EVENT_TOPICS])
        size = self._rng.choice([17_000_000, 17_000_000, 100_000_000, 110_000_000])
        batch = record_batch(records([RawRecord(b"large", bytes(size))]), 1)
        place = await self._produce(wire, topic, 0, batch)
        assert place is None or place.error in _TOO_LARGE, f"{size} bytes were taken: {place}"
        self.account.refused["above the broker's limit"] += 1
        self.account.attacks += 1

    async def _torn(self, wire: WireClient) -> None:
        topic = self._rng.choice(["telemetry", *EVENT_TOPICS])
        good = records([RawRecord(b"torn", b"value")])
        batch = self._rng.choice(
            [
                record_batch(good + b"junk", 1),
                record_batch(good, 3),
                record_batch(good, 1, last_delta=7),
                record_batch(b"not packed", 1, "zstd"),
                record_batch(good, 1)[:-1] + b"?",
                record_batch(good, 1)[:8] + struct.pack(">i", 10) + record_batch(good, 1)[12:],
            ]
        )
        place = await self._produce(wire, topic, 0, batch)
        assert place is None or place.error in _TORN, f"a torn batch was taken: {place}"
        self.account.refused["torn batch"] += 1
        self.account.attacks += 1

    async def _odd(self, wire: WireClient) -> None:
        """Valid messages once more, in clothes that no agent of ours wears."""
        # A fact heard again in another partition marks its minutes again: many of them would be a load of its own.
        some = 2 if self._rng.random() < 0.25 else 0
        for message in self._rng.sample(self._sent, min(some, len(self._sent))):
            record = odd(self._rng, message)
            topic = message.topic
            partition = self._rng.randrange(self._kafka.partitions[topic])
            place = await self._produce(wire, topic, partition, record_batch(records([record]), 1))
            assert place is not None and place.error == 0, f"{topic}: an odd message was refused: {place}"
            self.account.valid.add((topic, partition, place.offset))
            self.account.note(topic, partition, place.offset)


async def besiege(kafka: Kafka, load: Load, count: int, seed: int) -> Account:
    """Sends the load with `count` attacks spread over it; returns where everything lies."""
    siege = _Siege(kafka, load, seed, count)
    await siege.run()
    return siege.account


def unaccounted(account: Account, letters: Sequence[tuple[Any, ...]], prefix: str) -> list[str]:
    """What is wrong with the dead letters (topic, partition, offset, last_offset, reason) of a siege; best empty."""
    wrong: list[str] = []
    found: dict[tuple[str, int, int], tuple[int, str]] = {}
    for topic, partition, offset, last, reason in letters:
        found[str(topic).removeprefix(prefix), int(partition), int(offset)] = int(last), str(reason)
    if len(found) != len(letters):
        wrong.append(f"{len(letters) - len(found)} letters are there twice")
    for each in account.buried:
        letter = found.pop((each.topic, each.partition, each.offset), None)
        where = f"{each.topic}/{each.partition} offset {each.offset} ({each.kind})"
        if letter is None:
            wrong.append(f"{where}: no letter")
        elif not letter[1].strip() or each.reason not in letter[1]:
            wrong.append(f"{where}: expected {each.reason!r} in the reason, got {letter[1]!r}")
        elif letter[0] != each.offset + each.count - 1:
            wrong.append(f"{where}: the letter ends at {letter[0]}, not after {each.count} records")
    for (topic, partition, offset), (_, reason) in found.items():
        of_valid = "of a valid message" if (topic, partition, offset) in account.valid else "of nothing that was sent"
        wrong.append(f"{topic}/{partition} offset {offset}: a letter {of_valid}: {reason}")
    return wrong
