"""Kafka records reach their Faust agent in blocks: one event per partition and fetch instead of one per message.

Faust spends about 90 µs on every event, more than decoding and folding a telemetry batch costs, so the event has to
be larger than the message. The second reason is safety: stock Faust commits past unacknowledged messages when
acknowledgements arrive out of order, and this consumer commits strict prefixes only.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, cast

from aiokafka.errors import IllegalStateError, KafkaError
from aiokafka.structs import TopicPartition
from faust import App, Schema
from faust.transport.consumer import RecordMap, ensure_TP
from faust.transport.drivers.aiokafka import Consumer as AIOKafkaConsumer
from faust.transport.drivers.aiokafka import Transport as AIOKafkaTransport
from faust.types import TP, ConsumerMessage, Message, TopicT
from mode import CrashingSupervisor

from gpuledger.streams import record_batches
from gpuledger.streams.exceptions import IntakeSetupError, UnsupportedFaustError
from gpuledger.streams.record_batches import Unreadable

__all__ = [
    "FAUST_VERSION",
    "BlockConsumer",
    "BlockTransport",
    "OutstandingBlocks",
    "Record",
    "RecordBlock",
    "block_topic",
    "faust_settings",
]

#: This module overrides private parts of Faust's consumer; any other version needs a fresh reading of its sources.
FAUST_VERSION = "0.15.3"

_installed = version("faust-streaming")
if _installed != FAUST_VERSION:
    raise UnsupportedFaustError(
        f"faust-streaming {_installed} is installed, but gpuledger.streams.blocks overrides private parts of"
        f" {FAUST_VERSION}; install faust-streaming=={FAUST_VERSION}"
    )

record_batches.install()

_log = logging.getLogger(__name__)

#: What a Python object per record costs beside its bytes; without it a flood of tiny records would look free.
_RECORD_OVERHEAD_BYTES = 300

#: Polled while every partition is held back, so that the group coordinator sees a live member: no partition has this
#: name, so nothing can be taken by it.
_NO_PARTITION = TP("", -1)


class Record(NamedTuple):
    """One Kafka record as it came off the wire; `timestamp_ms` is the broker's append time in our topics.

    Where `unreadable` is set, it stands for a whole batch that was not read: it has nothing to store, and its `offset`
    is the batch's last.
    """

    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...] = ()
    unreadable: Unreadable | None = None

    @property
    def first_offset(self) -> int:
        """Its own offset, or that of the first record of the batch it stands for."""
        return self.offset if self.unreadable is None else self.unreadable.first_offset

    @property
    def size_bytes(self) -> int:
        """What this record occupies in memory, roughly."""
        size = len(self.key or b"") + len(self.value or b"") + _RECORD_OVERHEAD_BYTES
        for name, value in self.headers:
            size += len(name) + len(value or b"")
        return size


class RecordBlock(list[Record]):
    """The records of one partition and fetch; `size_bytes` is what they occupy together, `value_bytes` their values."""

    __slots__ = ("size_bytes", "value_bytes")

    def __init__(self, records: Iterable[Record]) -> None:
        super().__init__(records)
        self.size_bytes = sum([record.size_bytes for record in self])
        self.value_bytes = sum([len(record.value or b"") for record in self])


def _unreadable(fetched: Any) -> Unreadable | None:
    headers = fetched.headers
    return headers[0] if headers and type(headers[0]) is Unreadable else None


def _first_offset(fetched: Any) -> int:
    found = _unreadable(fetched)
    return fetched.offset if found is None else found.first_offset


def _record(fetched: Any) -> Record:
    """aiokafka's record as ours."""
    where = (fetched.topic, fetched.partition, fetched.offset, fetched.timestamp)
    found = _unreadable(fetched)
    if found is not None:
        return Record(*where, None, None, (), found)
    return Record(*where, fetched.key, fetched.value, tuple(fetched.headers))


class _Acknowledged(Protocol):
    """The part of a Faust message that the bookkeeping below reads."""

    offset: int
    acked: bool


class OutstandingBlocks:
    """The blocks of one partition that were delivered and not yet acknowledged, in offset order.

    `expected` is the offset the next block should start with, None when unknown. `held_bytes` is what those records
    occupy that were not let go. Membership is by identity, so a block of an earlier assignment can never be taken for
    its redelivered twin.
    """

    __slots__ = ("_blocks", "_committable", "_held", "_sizes", "expected", "held_bytes", "probed")

    def __init__(self, expected: int | None = None) -> None:
        self._blocks: deque[_Acknowledged] = deque()
        #: By identity of the block; None once its records have been let go.
        self._sizes: dict[int, int | None] = {}
        self._committable: int | None = None
        self.expected = expected
        self.probed: int | None = None
        self._held = 0
        self.held_bytes = 0

    def deliver(self, block: _Acknowledged, size_bytes: int) -> None:
        """Note a block on its way to an agent; `block.offset` is the offset of its last record."""
        self._blocks.append(block)
        self._sizes[id(block)] = size_bytes
        self._held += 1
        self.held_bytes += size_bytes
        self.expected = block.offset + 1

    def let_go(self, block: _Acknowledged) -> None:
        """Its records are not needed any more, only its place in the order. May be repeated."""
        size_bytes = self._sizes.get(id(block))
        if size_bytes is not None:
            self._sizes[id(block)] = None
            self._held -= 1
            self.held_bytes -= size_bytes

    def holds(self, block: _Acknowledged) -> bool:
        """Whether this very block is among them (also when only an earlier one keeps it from being settled)."""
        return id(block) in self._sizes

    def count_held(self) -> int:
        """How many blocks have their records still."""
        self._settle()
        return self._held

    def committable(self) -> int | None:
        """The offset after the last record of the longest acknowledged prefix; None if there is none yet."""
        self._settle()
        return self._committable

    def _settle(self) -> None:
        while self._blocks and self._blocks[0].acked:
            block = self._blocks.popleft()
            self.let_go(block)
            del self._sizes[id(block)]
            self._committable = block.offset + 1


class BlockConsumer(AIOKafkaConsumer):
    """Faust's consumer with blocks: the value of an event is the list of `Record` of one partition and fetch.

    Topics that were not declared with `block_topic` behave as in stock Faust.
    """

    #: Beyond these a partition is not fetched until its agent has caught up, or let records go. The agent needs room
    #: for one merged block in flight, one prepared and one begun; every partition may always have one block
    #: outstanding. Bytes are the bound that counts: at 16 blocks, fetches of some tens of records each stood still two
    #: thirds of the time.
    topic_held_bytes: ClassVar[int] = 80 * 1024 * 1024
    partition_held_blocks: ClassVar[int] = 128

    #: How long a fetch for the other partitions may last while one is held back and may be let go meanwhile.
    held_poll_s: ClassVar[float] = 0.1

    #: A rebalance waits no longer than this for the last commit of the partitions that leave.
    revoke_commit_s: ClassVar[float] = 2.0

    _outstanding: dict[TP, OutstandingBlocks]
    _room: asyncio.Event

    def _reset_state(self) -> None:
        super()._reset_state()
        self._outstanding = {}
        self._room = asyncio.Event()

    def is_block_topic(self, topic: str) -> bool:
        return topic in cast(BlockTransport, self.transport).block_topics

    def holds(self, message: Message) -> bool:
        """Whether the block is still ours to acknowledge: False once its partition was revoked or sought."""
        blocks = self._outstanding.get(message.tp)
        return blocks is not None and blocks.holds(message)

    def held_bytes(self, topic: str) -> int:
        """What was delivered of a block topic and is neither acknowledged yet nor let go, in bytes of memory."""
        return sum(blocks.held_bytes for tp, blocks in self._outstanding.items() if tp.topic == topic)

    # -- fetching

    async def getmany(self, timeout: float) -> AsyncIterator[tuple[TP, Message]]:  # noqa: ASYNC109 (Faust's name)
        """Yield one message per partition for block topics, and every message for the others.

        Whatever is fetched and not yielded is fetched again: after a rebalance because positions restart at the
        committed offset, otherwise because the position is set back here.
        """
        records, _ = await self._wait_next_records(timeout)
        generation_id = self.app.consumer_generation_id
        if not records or self.should_stop or self.app.should_stop:
            # Seeking back while the app stops would disown the block in flight, whose acknowledgement still counts.
            return
        if not self.flow_active:
            try:
                await self.perform_seek()
            except Exception as exc:
                _log.warning("could not seek back after a fetch during a rebalance: %r", exc)
            return

        def interrupted() -> bool:
            return not self.flow_active or self.app.consumer_generation_id != generation_id

        singles: dict[TP, list[Any]] = {}
        for aiokafka_tp, batch in records.items():
            tp = ensure_TP(aiokafka_tp)
            if not self.is_block_topic(tp.topic):
                singles[tp] = batch
                continue
            if interrupted():
                return
            message = await self._next_block(tp, batch)
            if message is not None:
                yield tp, message
        for tp, record in self.scheduler.iterate(singles):
            if interrupted():
                return
            if self._wanted(tp):
                self.app.monitor.track_tp_end_offset(tp, self.highwater(tp))
                yield tp, self._to_message(tp, record)

    async def _wait_next_records(
        self,
        timeout: float,  # noqa: ASYNC109 (Faust's name)
    ) -> tuple[RecordMap | None, set[TP] | None]:
        if not self.flow_active:
            await self.wait(cast(Any, self.can_resume_flow))
        active = self._get_active_partitions()
        held = self._held_back(active)
        if not held or self.app.client_only:
            return await super()._wait_next_records(timeout)
        free = active - held
        if free:
            return await self._getmany(active_partitions=free, timeout=self.held_poll_s), active
        self._room.clear()
        await self.wait_first(self._room.wait(), self.suspend_flow.wait(), timeout=timeout)
        # Without any poll for `max.poll.interval` the member would leave its group while the store is down.
        return await self._getmany(active_partitions={_NO_PARTITION}, timeout=0.0), active

    def _held_back(self, active: set[TP]) -> set[TP]:
        held = {tp: count for tp, blocks in self._outstanding.items() if (count := blocks.count_held())}
        full_topics = {topic for topic in {tp.topic for tp in held} if self.held_bytes(topic) >= self.topic_held_bytes}
        return {
            tp for tp in active if tp in held and (held[tp] >= self.partition_held_blocks or tp.topic in full_topics)
        }

    def _wanted(self, tp: TP) -> bool:
        return tp in self._get_active_partitions() or tp in self._buffered_partitions

    async def _next_block(self, tp: TP, batch: Sequence[Any]) -> ConsumerMessage | None:
        first, last = _first_offset(batch[0]), batch[-1].offset
        read = self._read_offset[tp]
        if read is not None and last < read:
            return None  # left over from before a seek; Faust would drop it, and a dropped block is never acknowledged
        blocks = self._outstanding.setdefault(tp, OutstandingBlocks())
        if not self._wanted(tp):
            await self._rewind(tp, first)
            return None
        if blocks.expected is not None and first > blocks.expected and blocks.probed != blocks.expected:
            # Compaction and transaction markers leave such holes, but so would a fetch that was dropped on the way.
            # One second look tells them apart; committing past a dropped one would lose it.
            if await self._rewind(tp, blocks.expected):
                blocks.probed = blocks.expected
            return None
        self.app.monitor.track_tp_end_offset(tp, self.highwater(tp))
        message = self._to_block(tp, batch)
        blocks.deliver(message, cast(RecordBlock, message.value).size_bytes)
        return message

    def _to_block(self, tp: TP, batch: Sequence[Any]) -> ConsumerMessage:
        message = self._to_message(tp, batch[-1])
        message.key = None
        message.headers = None
        message.value = cast(Any, RecordBlock(_record(r) for r in batch))
        return message

    async def _rewind(self, tp: TP, offset: int) -> bool:
        """Fetch again from `offset`; False when the partition is on its way to another worker or the broker is away."""
        try:
            await super().seek_wait({tp: offset})
        except (TimeoutError, IllegalStateError, KafkaError) as exc:
            _log.warning("could not fetch %s/%d again from offset %d: %r", tp.topic, tp.partition, offset, exc)
            return False
        return True

    # -- letting go, acknowledging and committing

    def let_go(self, message: Message) -> None:
        """Drops the records of a block whose agent has read them and acknowledges it much later."""
        cast(RecordBlock, message.value).clear()
        blocks = self._outstanding.get(message.tp)
        if blocks is not None:
            blocks.let_go(message)
        self._room.set()

    def ack(self, message: Message) -> bool:
        acknowledged = super().ack(message)
        self._room.set()
        return acknowledged

    def _new_offset(self, tp: TP) -> int | None:
        """The offset to commit: after the acknowledged prefix of blocks, never across an unacknowledged one."""
        if not self.is_block_topic(tp.topic):
            return super()._new_offset(tp)
        self._acked[tp].clear()
        self._acked_index[tp].clear()
        blocks = self._outstanding.get(tp)
        return None if blocks is None else blocks.committable()

    async def _add_gap(self, tp: TP, offset_from: int, offset_to: int) -> None:
        # A block's offset is its last record's, so to stock Faust every block follows a gap.
        if not self.is_block_topic(tp.topic):
            await super()._add_gap(tp, offset_from, offset_to)

    # -- positions that move

    async def perform_seek(self) -> None:
        """Go back to the committed offsets; what was delivered and not committed comes again as new blocks."""
        await super().perform_seek()
        uncommitted: list[TopicPartition] = []
        for tp in self.assignment():
            if self.is_block_topic(tp.topic):
                committed = self._committed_offset[tp]
                self._outstanding[tp] = OutstandingBlocks(expected=committed)
                if committed is None:
                    uncommitted.append(TopicPartition(tp.topic, tp.partition))
        if uncommitted and self.app.conf.consumer_auto_offset_reset == "earliest":
            # Faust leaves the position of a partition without a commit where the last fetch put it, even when that
            # fetch was thrown away: a rebalance before the first commit would skip records.
            await self._thread.seek_to_beginning(*uncommitted)

    async def seek(self, partition: TP, offset: int) -> None:
        self._forget(partition, offset)
        await super().seek(partition, offset)

    async def seek_wait(self, partitions: Mapping[TP, int]) -> None:
        for tp, offset in partitions.items():
            self._forget(tp, offset)
        await super().seek_wait(partitions)

    def _forget(self, tp: TP, expected: int) -> None:
        tp = ensure_TP(tp)
        if self.is_block_topic(tp.topic):
            self._outstanding[tp] = OutstandingBlocks(expected=expected)

    async def on_partitions_revoked(self, revoked: set[TP]) -> None:
        """Commit what is acknowledged, then disown every outstanding block of the partitions that leave."""
        if not self.app.should_stop:
            try:
                await asyncio.wait_for(self.commit(), timeout=self.revoke_commit_s)
            except TimeoutError:
                _log.warning("no commit within %s s of a rebalance; records will be redelivered", self.revoke_commit_s)
        self._disown(revoked)
        await super().on_partitions_revoked(revoked)

    async def on_partitions_assigned(self, assigned: set[TP], generation_id: int = 0) -> None:
        self._disown(list(self._outstanding))
        await super().on_partitions_assigned(assigned, generation_id)

    def _disown(self, tps: Iterable[TP]) -> None:
        for tp in tps:
            self._outstanding.pop(ensure_TP(tp), None)
        self._room.set()


class BlockTransport(AIOKafkaTransport):
    """Faust's Kafka transport with the block consumer, and the names of the topics that come in blocks."""

    Consumer: ClassVar[Any] = BlockConsumer

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.block_topics: set[str] = set()


class _BlockSchema(Schema[Any, Any]):
    """Hands the list of records through; stock decoding would acknowledge and drop a value it cannot read."""

    def compile(self, app: Any, **_: Any) -> Any:
        create_event = app.create_event

        async def decode(message: Message, *, propagate: bool = False) -> Any:
            return create_event(None, message.value, None, message)

        return decode


def block_topic(app: App, name: str) -> TopicT:
    """Declare that `name` reaches its agents in blocks, and return the Faust topic (keys and values are bytes).

    Raises IntakeSetupError when the app's consumer exists already, for then it would be the stock one.
    """
    transport = app.transport
    if not isinstance(transport, BlockTransport):
        if app._consumer is not None:  # pyright: ignore[reportPrivateUsage]
            raise IntakeSetupError(f"topic {name!r}: the app's consumer exists already; declare block topics before it")
        transport = BlockTransport(transport.url, app)
        app.transport = transport
    transport.block_topics.add(name)
    schema = _BlockSchema(key_type=bytes, value_type=bytes, key_serializer="raw", value_serializer="raw")
    return app.topic(name, schema=schema)


def faust_settings(
    app_id: str,
    bootstrap_servers: Sequence[str],
    datadir: Path,
    *,
    session_timeout_s: int = 10,
    **overrides: Any,
) -> dict[str, Any]:
    """Keyword arguments for `faust.App` under which `intake` is safe; `overrides` add the rest (TLS, SASL, …).

    `app_id` is the consumer group, `bootstrap_servers` are `host:port`; Faust creates `datadir`, where we keep nothing.
    Six seconds suit a demo: the first join of a group waits half the session timeout.
    """
    settings: dict[str, Any] = {
        "id": app_id,
        "broker": ";".join(f"kafka://{server}" for server in bootstrap_servers),
        "datadir": datadir,
        "store": "memory://",
        "processing_guarantee": "at_least_once",  # "exactly_once" is broken upstream
        "consumer_auto_offset_reset": "earliest",  # "latest" skips what was sent before the first commit
        "agent_supervisor": CrashingSupervisor,  # a restarted agent would leave its acknowledgements behind
        "stream_wait_empty": False,  # with held acknowledgements, waiting never ends
        "stream_publish_on_commit": False,  # dirty marks are sent and awaited before the acknowledgement
        "broker_session_timeout": session_timeout_s,
        "broker_heartbeat_interval": max(1, session_timeout_s // 3),
        "broker_commit_interval": 1,
        # Marks of the open hour are acknowledged with it; Faust would complain every two seconds.
        "broker_commit_livelock_soft_timeout": 2 * 3600,
        # A broker that has just come back may say that our topics have no partitions, and a group that formed on that
        # word stands idle until it asks again: by default five minutes.
        "consumer_metadata_max_age_ms": 10_000,
        "topic_allow_declare": False,  # topics are made once, with their settings, by whoever owns them
        "topic_disable_leader": True,
        "reply_create_topic": False,
        "web_enabled": False,
        "autodiscover": False,
        "worker_redirect_stdouts": False,
    }
    return settings | overrides
