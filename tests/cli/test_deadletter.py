"""`gpuledger deadletter` on a real broker and the real engine: what it shows, and that it sends the very same bytes."""

from __future__ import annotations

import asyncio
import base64
import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from click.testing import CliRunner, Result

from gpuledger.agents.broker_topics import create_topics
from gpuledger.cli.database import migrate_database
from gpuledger.cli.main import cli
from gpuledger.schemas.config import ClickHouse, Kafka
from gpuledger.schemas.events import decode_event, encode_event
from gpuledger.streams.blocks import Record
from gpuledger.streams.letters import MAX_LETTER_BYTES, letter_of
from gpuledger.streams.record_batches import Unreadable
from gpuledger.streams.sinks import DeadLetterSink
from gpuledger.streams.store import Store
from tests.fixtures.clickhouse import ClickHouse as Server
from tests.hostile.wire import RawRecord, WireClient, record_batch, records

pytestmark = pytest.mark.services

Headers = tuple[tuple[str, bytes | None], ...]


@dataclass
class Office:
    """An installation without workers: its topics, its database, and the sink that a worker stores letters with."""

    kafka: Kafka
    settings: ClickHouse
    sink: DeadLetterSink

    @property
    def environment(self) -> dict[str, str]:
        return {
            "GPULEDGER_KAFKA__BOOTSTRAP": self.kafka.bootstrap,
            "GPULEDGER_KAFKA__TOPIC_PREFIX": self.kafka.topic_prefix,
            "GPULEDGER_CLICKHOUSE__URL": self.settings.url,
            "GPULEDGER_CLICKHOUSE__DATABASE": self.settings.database,
        }

    def run(self, *arguments: str) -> Result:
        return CliRunner().invoke(cli, ["deadletter", *arguments], env=self.environment)

    def rows(self, *arguments: str, status: int = 0) -> list[dict[str, Any]]:
        result = self.run(*arguments, "--format", "json")
        assert result.exit_code == status, result.output
        return json.loads(result.stdout)

    def send(self, topic: str, key: bytes | None, value: bytes | None, headers: Headers = ()) -> Record:
        """To partition 0; the record that a worker would be given."""
        raw = RawRecord(key, value, [(name.encode(), content) for name, content in headers])

        async def produce() -> int:
            async with WireClient(self.kafka.bootstrap) as wire:
                place = await wire.produce(self.kafka.topic_prefix + topic, 0, record_batch(records([raw]), 1))
                assert place is not None and place.error == 0
                return place.offset

        offset = asyncio.run(produce())
        return Record(self.kafka.topic_prefix + topic, 0, offset, 1_790_000_000_000 + offset, key, value, headers)

    def bury(self, record: Record, reason: str) -> str:
        """As a worker does, by way of the dead-letter topic; the place on the command line."""
        value = encode_event(letter_of(record, reason))
        self.sink.store([Record(self.kafka.topic_prefix + "deadletter", 0, record.offset, 0, b"", value)])
        return f"{record.topic.removeprefix(self.kafka.topic_prefix)}/{record.partition}/{record.first_offset}"

    def read(self, topic: str, offset: int) -> tuple[bytes | None, bytes | None, Headers]:
        """The message that lies there, by a client of its own."""
        where = TopicPartition(self.kafka.topic_prefix + topic, 0)

        async def fetch() -> Any:
            async with AIOKafkaConsumer(bootstrap_servers=self.kafka.bootstrap) as consumer:
                consumer.assign([where])
                consumer.seek(where, offset)
                return await asyncio.wait_for(consumer.getone(where), 20)

        found = asyncio.run(fetch())
        return found.key, found.value, tuple(found.headers)

    def end(self, topic: str) -> int:
        where = TopicPartition(self.kafka.topic_prefix + topic, 0)

        async def ask() -> int:
            async with AIOKafkaConsumer(bootstrap_servers=self.kafka.bootstrap) as consumer:
                return (await consumer.end_offsets([where]))[where]

        return asyncio.run(ask())


@pytest.fixture(scope="module")
def office(kafka: str, clickhouse: Server) -> Iterator[Office]:
    name = f"dead_{uuid.uuid4().hex[:8]}"
    settings = ClickHouse(url=clickhouse.url, database=name)
    broker = Kafka(bootstrap=kafka, topic_prefix=f"{name}.")
    asyncio.run(create_topics(broker))
    migrate_database(settings)
    store = Store(settings)
    yield Office(broker, settings, DeadLetterSink(store))
    store.client.command(f"DROP DATABASE {name} SYNC")
    store.close()


def test_a_letter_is_the_message_byte_for_byte_and_is_sent_again_as_such(office: Office) -> None:
    headers: Headers = (("gpuledger-batch", b'{"node":"n\xff"}'), ("none", None), ("gpuledger-batch", b""))
    value = bytes(range(256)) * 20
    sent = office.send("telemetry", b"key\x00\xff", value, headers)
    place = office.bury(sent, "header gpuledger-batch: version: this worker reads 1, got 2")
    (row,) = office.rows("replay", place)
    assert (row["action"], row["offset"]) == ("sent", str(sent.offset))
    assert office.read("telemetry", int(row["to_offset"])) == (b"key\x00\xff", value, headers)
    (shown,) = office.rows("show", place)
    assert base64.b64decode(shown["value_base64"]) == value and shown["complete"] is True
    assert [each["offset"] for each in shown["replays"]] == [row["to_offset"]]
    (listed,) = [each for each in office.rows("list", "--topic", "telemetry") if each["offset"] == str(sent.offset)]
    assert listed["replayed"] is not None and listed["bytes"] == str(len(value))


def test_what_was_sent_again_is_not_sent_twice_unasked(office: Office) -> None:
    place = office.bury(office.send("jobs", b"j", b'{"type":"job"'), "Input data was truncated")
    before = office.end("jobs")
    assert [row["action"] for row in office.rows("replay", place, "--dry-run")] == ["would send"]
    assert office.end("jobs") == before, "a dry run sends nothing"
    assert [row["action"] for row in office.rows("replay", place)] == ["sent"]
    assert [row["action"] for row in office.rows("replay", place)] == ["skipped"]
    assert office.end("jobs") == before + 1
    assert [row["action"] for row in office.rows("replay", place, "--again")] == ["sent"]
    assert office.end("jobs") == before + 2
    assert len(office.rows("show", place)[0]["replays"]) == 2


def test_times_of_a_wrong_clock_do_not_come_in_by_the_back_door(office: Office) -> None:
    place = office.bury(office.send("telemetry", b"n", b"x"), "quarantine: ts_ms 9 is 8 ms after the broker's time 1")
    (row,) = office.rows("replay", place)
    assert row["action"] == "skipped" and "the clock was ahead" in row["note"]
    assert [row["action"] for row in office.rows("replay", place, "--quarantined")] == ["sent"]


def test_a_message_without_key_is_sent_without_key(office: Office) -> None:
    place = office.bury(office.send("alerts", None, b"{}"), "no key")
    (row,) = office.rows("replay", place)
    assert office.read("alerts", int(row["to_offset"])) == (None, b"{}", ())
    empty = office.bury(office.send("alerts", b"", b""), "empty key")
    (row,) = office.rows("replay", empty)
    assert office.read("alerts", int(row["to_offset"])) == (b"", b"", ())


def test_what_the_letter_lacks_comes_from_the_broker(office: Office) -> None:
    value = b"x" * (3 * MAX_LETTER_BYTES)
    headers: Headers = (("large", b"h" * (2 * MAX_LETTER_BYTES)),)
    place = office.bury(office.send("rates", b"k" * 5_000, value, headers), "too much")
    (shown,) = office.rows("show", place)
    assert (shown["complete"], shown["value_kept"], shown["headers"]) == (False, MAX_LETTER_BYTES, [])
    assert "the letter has the first 65,536" in office.run("show", place).output
    (row,) = office.rows("replay", place)
    assert office.read("rates", int(row["to_offset"])) == (b"k" * 5_000, value, headers)


def test_what_is_gone_is_said_to_be_gone(office: Office) -> None:
    sent = office.send("capacity", b"p", b"y" * (2 * MAX_LETTER_BYTES))
    place = office.bury(sent._replace(offset=sent.offset + 1_000), "too much")
    (row,) = office.rows("replay", place, status=1)
    assert row["action"] == "failed" and "the message is gone" in row["note"]
    batch = Unreadable("batch of offsets 7 to 9: it does not unpack", 7, 4_000)
    place = office.bury(sent._replace(offset=9, key=None, value=None, unreadable=batch), batch.reason)
    (row,) = office.rows("replay", place, status=1)
    assert row["action"] == "failed" and "3 messages of a batch" in row["note"]
    assert "stands for 3 messages, to offset 9" in office.run("show", place).output


def test_letters_are_chosen_and_counted_by_their_reasons(office: Office) -> None:
    for n in range(3):
        office.bury(office.send("inventory", b"n", b"{"), f"placements: {n}: index: expected 0, got {n}77")
    found = office.rows("list", "--by-reason", "--topic", "inventory")
    assert [(row["letters"], row["reason"]) for row in found] == [(3, "placements: #: index: expected #, got #")]
    assert found[0]["topics"] == office.kafka.topic_prefix + "inventory"
    assert len(office.rows("list", "--reason", "INDEX: expected", "--limit", "2")) == 2
    assert office.rows("list", "--reason", "index: expected", "--since", "1s") == []
    assert len(office.rows("list", "--reason", "index: expected", "--since", "2026-01-01")) == 3
    assert [row["action"] for row in office.rows("replay", "--reason", "index: expected")] == ["sent"] * 3


def test_a_terminal_is_not_obeyed(office: Office) -> None:
    hostile = b"\x1b[2J\x1b]0;owned\x07\xc2\x9b31m\xe2\x80\xaegpj\r\n"
    sent = office.send("allocations", hostile, b'{"type":"' + hostile + b'"}', (("h\x1b[2J", hostile),))
    place = office.bury(sent, "type: " + hostile.decode())
    for arguments in (("list", "--topic", "allocations"), ("show", place), ("replay", place)):
        for layout in ("table", "json", "csv"):
            output = office.run(*arguments, "--format", layout).output
            assert not set("\x1b\x07\r\x9b\u202e") & set(output), (arguments, layout)
    assert "\\x1b[2J" in office.run("show", place).output


def test_bytes_are_shown_beside_their_characters(office: Office) -> None:
    place = office.bury(office.send("dirty", b"p", b"\x00\x01ABC" + bytes(500)), "no JSON")
    output = office.run("show", place).output
    assert "0000  00 01 41 42 43 00" in output and "..ABC" in output and "(249 more bytes)" in output


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("show", "jobs/0"), "expected a place such as telemetry/0/1234"),
        (("show", "nothing/0/1"), "nothing: not a topic of GPULedger"),
        (("show", "jobs/0/99999"), "no such dead letter"),
        (("replay",), "name places, or choose letters"),
        (("list", "--since", "yesterday"), "expected a duration such as 90s"),
    ],
)
def test_a_mistake_is_told_with_what_to_write(office: Office, arguments: tuple[str, ...], text: str) -> None:
    result = office.run(*arguments)
    assert result.exit_code == 2 and text in result.output


def test_a_letter_has_a_bounded_size_whatever_came() -> None:
    headers = tuple((f"name-{n}" * 50, b"v" * 3_000) for n in range(5_000))
    record = Record("t", 0, 5, 0, b"k" * 9_000_000, b"v" * 9_000_000, headers)
    encoded = encode_event(letter_of(record, "why: " + "x" * 9_000_000 + "\x1b[2J"))
    assert len(encoded) < 300_000
    letter = decode_event(encoded)
    assert letter == letter_of(record, "why: " + "x" * 9_000_000 + "\x1b[2J")
    assert "characters left out" in str(letter) and "\x1b" not in str(letter)
