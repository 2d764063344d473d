"""Brings messages to Kafka: idempotent, acknowledged by all replicas, compressed, in the order they were given.

One publisher serves the agent (which drains its spool through it), the simulator, the replayer and the CLI. aiokafka
is imported at the first connection, and a producer that failed is replaced: its state after an error is not trusted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import ssl
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gpuledger.agents.exceptions import BrokerUnavailable, MessageRejected, PublishError
from gpuledger.agents.messages import Headers, Message
from gpuledger.schemas.config import Kafka, KafkaSecurity
from gpuledger.schemas.topics import topic_name

__all__ = [
    "MAX_IN_FLIGHT",
    "MAX_IN_FLIGHT_BYTES",
    "Delivered",
    "Outbox",
    "Publisher",
    "SpooledMessage",
    "client_options",
]

log = logging.getLogger(__name__)

#: Bounds of what is handed to aiokafka and not acknowledged yet.
MAX_IN_FLIGHT = 1_000
MAX_IN_FLIGHT_BYTES = 8 << 20
_MAX_BATCH_BYTES = 1 << 20
_MAX_MESSAGE_BYTES = 16 << 20
_FIRST_BACKOFF_S = 0.2
_LONGEST_BACKOFF_S = 15.0


@dataclass(frozen=True, slots=True)
class Delivered:
    """Where the broker put a message, and the time at which it appended it."""

    topic: str
    partition: int
    offset: int
    timestamp_ms: int


@dataclass(frozen=True, slots=True)
class SpooledMessage:
    """A message of a spool, with the number by which the spool knows it."""

    number: int
    message: Message


class Outbox(Protocol):
    """What `Publisher.drain` needs of a spool. Calls may block on a disk, so they are made in a thread."""

    def take(self, max_messages: int, max_bytes: int) -> list[SpooledMessage]:
        """The oldest messages, in order; the spool must not drop them until they are acknowledged or given back."""
        ...

    def acknowledge(self, numbers: Sequence[int]) -> None:
        """The broker has them: they may be deleted."""
        ...

    def give_back(self, numbers: Sequence[int]) -> None:
        """The broker did not say that it has them; `take` will give them again."""
        ...

    def reject(self, number: int, reason: str) -> None:
        """The broker will never take this one: set it aside, with the reason."""
        ...


def _tls_context(security: KafkaSecurity) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=security.ca_file)
    if security.cert_file is not None:
        context.load_cert_chain(security.cert_file, security.key_file)
    return context


def client_options(settings: Kafka) -> dict[str, Any]:
    """Arguments that every aiokafka client of this installation shares."""
    security = settings.security
    options: dict[str, Any] = {
        "bootstrap_servers": [part.strip() for part in settings.bootstrap.split(",")],
        "security_protocol": security.protocol,
    }
    if security.protocol in ("SSL", "SASL_SSL"):
        options["ssl_context"] = _tls_context(security)
    if security.protocol.startswith("SASL"):
        options["sasl_mechanism"] = security.sasl_mechanism
        options["sasl_plain_username"] = security.username
        options["sasl_plain_password"] = security.password.reveal() if security.password is not None else ""
    return options


def _is_final(error: BaseException) -> bool:
    """Whether sending the same message again can never succeed."""
    from aiokafka import errors

    return isinstance(
        error,
        errors.MessageSizeTooLargeError
        | errors.RecordListTooLargeError
        | errors.InvalidTopicError
        | errors.InvalidMessageError
        | errors.UnsupportedVersionError
        | AssertionError
        | TypeError,
    )


class Publisher:
    """A producer for one Kafka. Use as an async context manager, or call `start` and `close`.

    Direct calls (`publish`, `publish_many`) return when the broker has acknowledged; they retry for `patience_s` and
    then raise. `drain` never gives up.
    """

    def __init__(self, settings: Kafka, client_id: str = "gpuledger", patience_s: float = 30.0) -> None:
        self._settings = settings
        self._client_id = client_id
        self._patience_s = patience_s
        self._producer: Any = None
        self._lock = asyncio.Lock()
        self._in_flight: set[asyncio.Future[Any]] = set()
        self.connected = False
        self.sent_messages = 0
        self.sent_bytes = 0
        self.failures = 0

    async def __aenter__(self) -> Publisher:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Connects, trying again for `patience_s`.

        Raises:
            BrokerUnavailable: no broker answered in that time, or it refuses us.
        """
        await self._patiently(self._connect)

    async def _connect(self) -> Any:
        """The producer, started if there is none."""
        async with self._lock:
            if self._producer is not None:
                return self._producer
            from aiokafka import AIOKafkaProducer
            from aiokafka.errors import KafkaError

            producer = AIOKafkaProducer(
                client_id=self._client_id,
                acks="all",
                enable_idempotence=True,
                compression_type="zstd",
                linger_ms=5,
                max_batch_size=_MAX_BATCH_BYTES,
                max_request_size=_MAX_MESSAGE_BYTES,
                request_timeout_ms=15_000,
                metadata_max_age_ms=60_000,
                **client_options(self._settings),
            )
            try:
                async with asyncio.timeout(15):
                    await producer.start()
            except (KafkaError, OSError, TimeoutError) as error:
                with contextlib.suppress(Exception):
                    await producer.stop()
                raise BrokerUnavailable(
                    f"kafka.bootstrap: no broker answered at {self._settings.bootstrap} "
                    f"({type(error).__name__}: {error}); check that Kafka runs there"
                ) from error
            except BaseException:
                with contextlib.suppress(Exception):
                    await producer.stop()
                raise
            self._producer = producer
            self.connected = True
            return producer

    async def _discard(self) -> None:
        """Drops the producer after an error; the next send makes a new one."""
        async with self._lock:
            producer, self._producer = self._producer, None
            self.connected = False
            if producer is not None:
                with contextlib.suppress(Exception):
                    async with asyncio.timeout(2):
                        await producer.stop()

    async def _patiently(self, attempt: Callable[[], Awaitable[Any]]) -> Any:
        deadline = time.monotonic() + self._patience_s
        backoff = _FIRST_BACKOFF_S
        while True:
            try:
                return await attempt()
            except BrokerUnavailable:
                if time.monotonic() + backoff > deadline:
                    raise
                await asyncio.sleep(backoff)
                backoff = min(backoff * 2, 5.0)

    # -- direct -----------------------------------------------------------------------------------------------------

    async def publish(self, topic: str, key: str, value: bytes, headers: Headers = ()) -> Delivered:
        """Sends one message and returns where it is.

        Raises:
            BrokerUnavailable: not acknowledged within `patience_s`; it may or may not have been stored.
            MessageRejected: the broker will never take it.
        """
        return (await self.publish_many([Message(topic, key, value, headers)]))[0]

    async def publish_many(self, messages: Iterable[Message]) -> list[Delivered]:
        """Sends messages, those of one key in order, and returns when all are acknowledged.

        What failed is sent again, so a message may be stored twice; every reader of ours replaces by key.

        Raises:
            BrokerUnavailable: some were not acknowledged within `patience_s`.
            MessageRejected: the broker will never take one of them; the others are delivered.
        """
        given = list(messages)
        done: dict[int, Delivered] = {}
        rejected: list[str] = []
        waiting = list(range(len(given)))

        async def attempt() -> None:
            nonlocal waiting
            again: list[int] = []
            errors: list[BaseException] = []
            for window in _windows(waiting, given):
                results = await self._send([given[n] for n in window]) if not errors else None
                for position, n in enumerate(window):
                    result = results[position] if results is not None else errors[0]
                    if isinstance(result, Delivered):
                        done[n] = result
                    elif isinstance(result, MessageRejected):
                        rejected.append(str(result))
                    else:
                        again.append(n)
                        errors.append(result)
            waiting = again
            if errors:
                raise BrokerUnavailable(f"kafka: {len(again)} messages not acknowledged: {errors[0]}") from errors[0]

        await self._patiently(attempt)
        if rejected:
            raise MessageRejected("; ".join(rejected[:5]))
        return [done[n] for n in sorted(done)]

    async def _send(self, messages: Sequence[Message]) -> list[Delivered | BaseException]:
        """One attempt at messages within the bounds in flight; the result of each, in their order."""
        try:
            producer = await self._connect()
        except BrokerUnavailable as error:
            self.failures += 1
            return [error] * len(messages)
        futures: list[asyncio.Future[Any] | BaseException] = []
        for message in messages:
            if futures and isinstance(futures[-1], BaseException) and not _is_final(futures[-1]):
                futures.append(futures[-1])  # nothing may overtake a message that could not be sent
                continue
            try:
                future = await producer.send(
                    topic_name(self._settings.topic_prefix, message.topic),
                    key=message.key.encode(),
                    value=message.value,
                    headers=list(message.headers) or None,
                )
            except Exception as error:
                futures.append(error)
            else:
                futures.append(future)
                self._in_flight.add(future)
                future.add_done_callback(self._in_flight.discard)
        return await self._results(messages, futures)

    async def _results(
        self, messages: Sequence[Message], futures: Sequence[asyncio.Future[Any] | BaseException]
    ) -> list[Delivered | BaseException]:
        results: list[Delivered | BaseException] = []
        broken = False
        for message, future in zip(messages, futures, strict=True):
            try:
                if isinstance(future, BaseException):
                    raise future
                place = await future
            except asyncio.CancelledError:
                raise
            except Exception as error:
                if _is_final(error):
                    text = f"topic {message.topic}, key {message.key}, {len(message.value)} bytes: {error!r}"
                    results.append(MessageRejected(text))
                else:
                    broken = True
                    results.append(error)
            else:
                self.sent_messages += 1
                self.sent_bytes += len(message.value)
                results.append(Delivered(place.topic, place.partition, place.offset, place.timestamp))
        if broken:
            self.failures += 1
            await self._discard()
        return results

    # -- from a spool -----------------------------------------------------------------------------------------------

    async def drain(self, outbox: Outbox, wake: asyncio.Event, stop: asyncio.Event) -> None:
        """Sends what the spool holds, in order, deleting what the broker acknowledged, until `stop` is set.

        `wake` says that something was sealed. Outages are waited out with growing pauses; `stop` ends a pause.
        """
        backoff = _FIRST_BACKOFF_S
        while not stop.is_set():
            wake.clear()
            try:
                sent = await self._drain_once(outbox)
            except PublishError as error:
                # Jitter: the agents of a site must not all come back in the same moment.
                pause_s = backoff * (0.5 + random.random())
                log.warning("not sent: %s; trying again in %.1f s", error, pause_s)
                await _first(stop, None, pause_s)
                backoff = min(backoff * 2, _LONGEST_BACKOFF_S)
                continue
            backoff = _FIRST_BACKOFF_S
            if not sent:
                await _first(stop, wake, 5.0)

    async def drain_all(self, outbox: Outbox, timeout_s: float) -> bool:
        """For shutdown: sends what is there until the spool is empty (True), an error, or the time is over."""
        with contextlib.suppress(TimeoutError, PublishError):
            async with asyncio.timeout(timeout_s):
                while await self._drain_once(outbox):
                    pass
                return True
        return False

    async def _drain_once(self, outbox: Outbox) -> int:
        """Sends one window; the number acknowledged or set aside.

        Raises:
            PublishError: something of it was not acknowledged (given back).
        """
        taken = await asyncio.to_thread(outbox.take, MAX_IN_FLIGHT, MAX_IN_FLIGHT_BYTES)
        if not taken:
            return 0
        settled: set[int] = set()
        failure: BaseException | None = None
        acknowledged: list[int] = []
        try:
            results = await self._send([spooled.message for spooled in taken])
            for spooled, result in zip(taken, results, strict=True):
                if isinstance(result, Delivered):
                    acknowledged.append(spooled.number)
                elif isinstance(result, MessageRejected):
                    log.error("set aside, the broker will never take it: %s", result)
                    await asyncio.to_thread(outbox.reject, spooled.number, str(result))
                    settled.add(spooled.number)
                else:
                    failure = failure or result
            await asyncio.to_thread(outbox.acknowledge, acknowledged)
            settled.update(acknowledged)
        finally:
            left = [spooled.number for spooled in taken if spooled.number not in settled]
            if left:
                outbox.give_back(left)
        if failure is not None:
            raise BrokerUnavailable(f"kafka: {failure}") from failure
        return len(settled)

    # -- the end ----------------------------------------------------------------------------------------------------

    async def flush(self, timeout_s: float = 10.0) -> bool:
        """Waits for what is in flight; False where the time was over first."""
        if not self._in_flight:
            return True
        _, pending = await asyncio.wait(set(self._in_flight), timeout=timeout_s)
        return not pending

    async def close(self, timeout_s: float = 5.0) -> None:
        """Flushes and disconnects, within `timeout_s` and a little."""
        await self.flush(timeout_s)
        await self._discard()


def _windows(numbers: Sequence[int], messages: Sequence[Message]) -> Iterable[list[int]]:
    """The numbers in order, in groups within the bounds in flight."""
    window: deque[int] = deque()
    size = 0
    for n in numbers:
        if window and (len(window) >= MAX_IN_FLIGHT or size + len(messages[n].value) > MAX_IN_FLIGHT_BYTES):
            yield list(window)
            window.clear()
            size = 0
        window.append(n)
        size += len(messages[n].value)
    if window:
        yield list(window)


async def _first(stop: asyncio.Event, other: asyncio.Event | None, timeout_s: float) -> None:
    """Returns when one of the events is set or the time is over."""
    waits = [asyncio.ensure_future(event.wait()) for event in (stop, other) if event is not None]
    try:
        await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waits:
            task.cancel()
