"""Dead letters as the database has them: found by topic, age and reason, counted by reason, noted when sent again."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from gpuledger.cli.exceptions import CommandError

if TYPE_CHECKING:
    from clickhouse_connect.driver.client import Client

__all__ = [
    "Content",
    "Filters",
    "Letter",
    "Place",
    "Replayed",
    "by_reason",
    "find",
    "full_letter",
    "full_topic",
    "note_replays",
    "parse_place",
]

Place = tuple[str, int, int]

_FIND = """
    SELECT topic, partition, offset, last_offset, appended_at, reason, toValidUTF8(key), no_key, value_bytes, complete,
        if(is_replayed, replayed_at, NULL)
    FROM (
        SELECT * FROM dead_letters FINAL
        WHERE (topic IN {topics:Array(String)} OR empty({topics:Array(String)}))
            AND appended_at >= fromUnixTimestamp64Milli({since:Int64}, 'UTC')
            AND positionCaseInsensitiveUTF8(reason, {reason:String}) > 0
    ) AS l
    LEFT JOIN (
        SELECT topic, partition, offset, max(replayed_at) AS replayed_at, toUInt8(1) AS is_replayed
        FROM dead_letter_replays GROUP BY topic, partition, offset
    ) AS r USING (topic, partition, offset)
    ORDER BY appended_at DESC, topic, partition, offset DESC LIMIT {limit:UInt64}
"""
#: Reasons that differ in numbers only are one reason.
_BY_REASON = """
    SELECT count() AS letters, substring(replaceRegexpAll(reason, '[0-9]+', '#'), 1, 160) AS shape,
        arraySort(groupUniqArray(10)(topic)), min(appended_at), max(appended_at),
        argMax(concat(topic, '/', toString(partition), '/', toString(offset)), appended_at)
    FROM dead_letters FINAL
    WHERE (topic IN {topics:Array(String)} OR empty({topics:Array(String)}))
        AND appended_at >= fromUnixTimestamp64Milli({since:Int64}, 'UTC')
        AND positionCaseInsensitiveUTF8(reason, {reason:String}) > 0
    GROUP BY shape ORDER BY letters DESC, shape LIMIT {limit:UInt64}
"""
_CONTENT = """
    SELECT topic, partition, offset, last_offset, appended_at, reason, toValidUTF8(key), no_key, value_bytes, complete,
        NULL, base64Encode(key), base64Encode(value), no_value, headers
    FROM dead_letters FINAL
    WHERE topic = {topic:String} AND partition = {partition:UInt32} AND offset = {offset:UInt64}
"""
_REPLAYS = """
    SELECT replayed_at, to_partition, to_offset FROM dead_letter_replays FINAL
    WHERE topic = {topic:String} AND partition = {partition:UInt32} AND offset = {offset:UInt64}
    ORDER BY replayed_at
"""


@dataclass(frozen=True, slots=True)
class Filters:
    """Which letters; `topics` are names as the broker has them, none is all. `since_ms` is UTC, 0 is ever."""

    topics: Sequence[str] = ()
    since_ms: int = 0
    reason: str = ""

    def parameters(self) -> dict[str, Any]:
        return {"topics": list(self.topics), "since": self.since_ms, "reason": self.reason}


@dataclass(frozen=True, slots=True)
class Letter:
    """A letter without its bytes. `key` is None where the message had none."""

    topic: str
    partition: int
    offset: int
    last_offset: int
    appended_at: datetime
    reason: str
    key: str | None
    value_bytes: int
    complete: bool
    replayed_at: datetime | None

    @property
    def place(self) -> Place:
        return self.topic, self.partition, self.offset

    @property
    def records(self) -> int:
        """Messages it stands for."""
        return self.last_offset - self.offset + 1


@dataclass(frozen=True, slots=True)
class Content:
    """The bytes of a letter; where it is not `complete`, their beginning."""

    letter: Letter
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes | None]]
    replays: list[tuple[datetime, int, int]] = field(default_factory=list[tuple[datetime, int, int]])


@dataclass(frozen=True, slots=True)
class Replayed:
    """A letter that was sent again, and where its message lies now."""

    place: Place
    to_partition: int
    to_offset: int


def parse_place(text: str, prefix: str) -> Place:
    """``TOPIC/PARTITION/OFFSET``; the topic with the installation's prefix or without. Raises CommandError."""
    topic, _, rest = text.partition("/")
    partition, _, offset = rest.partition("/")
    if not (topic and partition.isdecimal() and offset.isdecimal()):
        raise CommandError(f'expected a place such as telemetry/0/1234 (topic/partition/offset), got "{text}"')
    return full_topic(topic, prefix), int(partition), int(offset)


def full_topic(name: str, prefix: str) -> str:
    """The topic as the broker names it. Raises CommandError for a topic of nobody."""
    from gpuledger.schemas.topics import TOPICS

    own = name.removeprefix(prefix)
    if own not in TOPICS:
        raise CommandError(f"{name}: not a topic of GPULedger; expected one of {', '.join(TOPICS)}")
    return prefix + own


def find(client: Client, filters: Filters, limit: int) -> list[Letter]:
    """The newest letters first."""
    rows = client.query(_FIND, parameters=filters.parameters() | {"limit": limit}).result_rows
    return [_letter(row) for row in rows]


def _letter(row: Sequence[Any]) -> Letter:
    topic, partition, offset, last, appended, reason, key, no_key, size, complete, replayed = row
    return Letter(
        topic=str(topic),
        partition=int(partition),
        offset=int(offset),
        last_offset=int(last),
        appended_at=appended,
        reason=str(reason),
        key=None if no_key else str(key),
        value_bytes=int(size),
        complete=bool(complete),
        replayed_at=replayed,
    )


def by_reason(client: Client, filters: Filters, limit: int) -> list[dict[str, Any]]:
    """How many letters there are for each reason, the most first; numbers in a reason are #."""
    rows = client.query(_BY_REASON, parameters=filters.parameters() | {"limit": limit}).result_rows
    return [
        {
            "letters": int(count),
            "reason": str(shape),
            "topics": ", ".join(topics),
            "first": first,
            "last": last,
            "newest": newest,
        }
        for count, shape, topics, first, last, newest in rows
    ]


def full_letter(client: Client, place: Place) -> Content:
    """Everything that is kept of a letter. Raises CommandError where there is none."""
    topic, partition, offset = place
    at = {"topic": topic, "partition": partition, "offset": offset}
    rows = client.query(_CONTENT, parameters=at).result_rows
    if not rows:
        raise CommandError(f"{topic}/{partition}/{offset}: no such dead letter; `gpuledger deadletter list` has them")
    replays = [(moment, int(p), int(o)) for moment, p, o in client.query(_REPLAYS, parameters=at).result_rows]
    *first, key, value, no_value, headers = rows[0]
    letter = replace(_letter(first), replayed_at=replays[-1][0] if replays else None)
    pairs: list[tuple[str, str | None]] = json.loads(headers)
    return Content(
        letter=letter,
        key=None if letter.key is None else base64.b64decode(key),
        value=None if no_value else base64.b64decode(value),
        headers=[(name, None if content is None else base64.b64decode(content)) for name, content in pairs],
        replays=replays,
    )


def note_replays(client: Client, replayed: Iterable[Replayed], now: datetime) -> None:
    """Writes down which letters were sent again; writing the same again changes nothing."""
    rows = [[*each.place, now, each.to_partition, each.to_offset] for each in replayed]
    if rows:
        names = ["topic", "partition", "offset", "replayed_at", "to_partition", "to_offset"]
        client.insert("dead_letter_replays", rows, column_names=names)
