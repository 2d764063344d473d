"""Events that would harm whoever reads them: refused by name, and what was stored before stays readable."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gpuledger.schemas.events import decode_event
from gpuledger.schemas.exceptions import MessageError
from gpuledger.schemas.texts import escaped
from gpuledger.streams.blocks import Record
from gpuledger.streams.dirty import Pace
from gpuledger.streams.dirty_agent import DirtyStats, dirty_marks, take_dirty
from gpuledger.streams.facts import decode_facts
from gpuledger.streams.letters import decode_letter, printable

T0 = 1_760_000_000_000
JOB = {"type": "job", "id": "j", "revision": 1, "claimed_at_ms": T0, "source": "slurm"}
ALERT = {"type": "alert", "id": "a", "revision": 1, "claimed_at_ms": T0, "rule": "r", "status": "firing"}
RULE = {"match": "user", "value": "u"}
TENANT = {"type": "tenant", "id": "t", "revision": 1, "claimed_at_ms": T0}


def refusal(topic: str, event: dict[str, Any]) -> str:
    with pytest.raises(MessageError) as caught:
        decode_facts(topic, json.dumps(event).encode())
    return str(caught.value)


@pytest.mark.parametrize(
    ("topic", "event", "text"),
    [
        ("jobs", JOB | {"user": "a\x1b[31m"}, "user: holds the control character U+001B"),
        ("jobs", JOB | {"user": "a\u202eb"}, "user: holds the control character U+202E"),
        ("jobs", JOB | {"user": "\x7f"}, "user: holds the control character U+007F"),
        ("jobs", JOB | {"account": "x" * 257}, "account: expected at most 256 characters, got 257"),
        ("jobs", JOB | {"tags": {"k\n": "v"}}, "tags (a key): holds the control character U+000A"),
        ("jobs", JOB | {"tags": {"k": "x" * 10_001}}, "tags.k: expected at most 10000 characters"),
        ("jobs", JOB | {"name": "x" * (8 << 20)}, "value: 83887"),
        ("jobs", JOB | {"started_ms": T0, "ended_ms": T0 - 1}, f"end: {T0 - 1} is before its start {T0}"),
        (
            "rates",
            TENANT | {"rules": [{"match": "user", "value": "u", "start_ms": T0, "end_ms": T0 - 1}]},
            "rules[0].end",
        ),
        ("alerts", ALERT | {"started_at_ms": T0, "ended_at_ms": T0 - 1}, "is before started_at_ms"),
        ("alerts", ALERT | {"started_at_ms": T0, "money_per_hour": "NaN"}, "money_per_hour: NaN is not a number"),
        (
            "alerts",
            ALERT | {"started_at_ms": T0, "money_per_hour": "1e999999"},
            "money_per_hour: 1E+999999 is too large",
        ),
        ("alerts", ALERT | {"started_at_ms": T0, "money_per_hour": "0.1234567891"}, "more than 9 decimals"),
    ],
)
def test_an_event_is_refused_by_name(topic: str, event: dict[str, Any], text: str) -> None:
    assert text in refusal(topic, event)


def test_words_of_people_may_have_lines_and_any_script() -> None:
    event = JOB | {"name": 'training\n"großer Lauf" 漢字 \\', "user": "jürgen-漢"}
    (fact,) = decode_facts("jobs", json.dumps(event, ensure_ascii=False).encode())[0]
    assert fact.name == event["name"] and fact.user == event["user"]


def test_nesting_has_an_end() -> None:
    deep = json.dumps(JOB)[:-1].encode() + b',"beyond":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    with pytest.raises(MessageError, match="nested too deeply"):
        decode_event(deep)


def test_what_an_older_version_has_stored_is_still_read() -> None:
    for event in (JOB | {"user": "a\x1b"}, JOB | {"started_ms": T0, "ended_ms": T0 - 1}):
        assert decode_event(json.dumps(event).encode()).id == "j"


def test_a_mark_belongs_in_the_partition_of_its_pool() -> None:
    value = b'{"type":"dirty","pool":"large","from_ms":%d,"to_ms":%d}' % (T0, T0 + 1)
    records = [Record("dirty", n, 7, T0, b"large", value) for n in range(8)]
    taken = [n for n, record in enumerate(records) if _is_taken(record, 8)]
    assert len(taken) == 1
    assert _is_taken(records[3], None), "where the number of partitions is not known, nothing is refused"
    with pytest.raises(MessageError, match=f"a mark of pool large belongs in partition {taken[0]}, not in"):
        dirty_marks(records[(taken[0] + 1) % 8], 8)


class _Faust:
    """What the agent of marks asks of its stream and consumer; `partitions` is what the broker's metadata say."""

    def __init__(self, records: list[Record], partitions: int | None) -> None:
        self.app = SimpleNamespace(consumer=self)
        self._records = records
        self._partitions = partitions

    def topic_partitions(self, _topic: str) -> int | None:
        return self._partitions

    def holds(self, _message: object) -> bool:
        return True

    def let_go(self, _message: object) -> None:
        pass

    def noack(self) -> _Faust:
        return self

    async def events(self) -> AsyncIterator[SimpleNamespace]:
        yield SimpleNamespace(value=self._records, message=None)


@pytest.mark.parametrize("known", [None, 0, 8], ids=["nothing", "no partitions", "eight"])
def test_marks_are_read_while_the_broker_does_not_know_its_partitions(known: int | None) -> None:
    """As for a moment after its restart: no mark is refused for that, and none from elsewhere is taken."""
    value = b'{"type":"dirty","pool":"large","from_ms":%d,"to_ms":%d}' % (T0, T0 + 1)
    own = next(n for n in range(8) if _is_taken(Record("dirty", n, 7, T0, b"large", value), 8))
    stats, letters = DirtyStats(), list[Record]()

    async def dead_letter(record: Record, _reason: str) -> None:
        letters.append(record)

    async def read() -> None:
        await take_dirty(
            _Faust([Record("dirty", n, 7, T0, b"large", value) for n in (own, (own + 1) % 8)], known),
            store=cast("Any", None),
            recomputer=cast("Any", None),
            pace=Pace(3_600_000),
            epoch=lambda: 1,
            partitions=8,
            dead_letter=dead_letter,
            stats=stats,
        )

    asyncio.run(read())
    assert [record.partition for record in letters] == [(own + 1) % 8]
    assert (stats.marks, stats.dead_letters) == (2, 1)


def _is_taken(record: Record, partitions: int | None) -> bool:
    try:
        return dirty_marks(record, partitions).pool == "large"
    except MessageError:
        return False


@pytest.mark.parametrize(
    "change",
    [{"partition": -1}, {"partition": 1 << 32}, {"offset": 1 << 63}, {"appended_at_ms": 1 << 60}, {"last_offset": 1}],
)
def test_a_letter_that_no_table_holds_is_a_letter_about_itself(change: dict[str, int]) -> None:
    letter = {"type": "dead_letter", "topic": "jobs", "partition": 0, "offset": 5, "appended_at_ms": T0, "reason": "r"}
    record = Record("deadletter", 2, 9, T0, b"k", json.dumps(letter | change).encode())
    found = decode_letter(record)
    assert (found.topic, found.partition, found.offset) == ("deadletter", 2, 9)
    assert next(iter(change)) in found.reason and found.value == record.value and found.complete


def test_reasons_are_one_line_and_bounded() -> None:
    text = printable("a\x1b[2J\nb\u202e" + "x" * 10_000 + "the end")
    assert text.startswith("a\\x1b[2J\\nb\\u202e") and text.endswith("the end") and len(text) < 1_100
    assert escaped("plain äöü 漢字") == "plain äöü 漢字"
