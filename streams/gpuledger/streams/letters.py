"""A message that could not be read as a dead letter: where it was, why, and as much of it as a letter may hold. Pure.

Nothing in a letter has a length of the sender's choice: a key or a reason of 16 MB would make a letter that the broker
refuses, and the partition would wait behind it for ever.
"""

from __future__ import annotations

from gpuledger.schemas.events import DeadLetter, decode_event
from gpuledger.schemas.exceptions import MessageError
from gpuledger.schemas.texts import escaped
from gpuledger.streams.blocks import Record

__all__ = ["MAX_LETTER_BYTES", "MAX_REASON", "decode_letter", "letter_of", "printable"]

#: A letter keeps this much of its message's value, and as much of all headers together.
MAX_LETTER_BYTES = 65_536
_MAX_KEY_BYTES = 1_024
_MAX_HEADERS = 100
#: Characters of a reason.
MAX_REASON = 1_000
_MAX_UINT32, _MAX_INT64 = (1 << 32) - 1, (1 << 63) - 1
#: Dates that the tables can hold: 1970 to 2200.
_MAX_TIME_MS = 7_258_118_400_000


def printable(text: str, limit: int = MAX_REASON) -> str:
    """The text in one line without control characters (they become escapes), cut in its middle above `limit`.

    Reasons quote what came in, and go to logs, terminals and alerts.
    """
    if len(text) > limit:
        half = limit // 2
        text = f"{text[:half]} … ({len(text) - 2 * half} characters left out) … {text[-half:]}"
    return escaped(text)


def letter_of(record: Record, reason: str) -> DeadLetter:
    """The letter of a record; `complete` says whether it holds the whole message."""
    value, key = record.value or b"", record.key
    headers: list[tuple[str, bytes | None]] = []
    left = MAX_LETTER_BYTES
    for name, content in record.headers[:_MAX_HEADERS]:
        left -= len(name.encode(errors="replace")) + len(content or b"")
        if left < 0:
            break
        headers.append((name, content))
    unreadable = record.unreadable
    complete = (
        unreadable is None
        and len(value) <= MAX_LETTER_BYTES
        and len(key or b"") <= _MAX_KEY_BYTES
        and len(headers) == len(record.headers)
    )
    return DeadLetter(
        topic=record.topic,
        partition=record.partition,
        offset=record.first_offset,
        last_offset=record.offset if unreadable is not None else None,
        appended_at_ms=record.timestamp_ms,
        reason=printable(reason),
        key=None if key is None else key[:_MAX_KEY_BYTES],
        value=value[:MAX_LETTER_BYTES],
        value_bytes=len(value) if unreadable is None else unreadable.packed_bytes,
        no_value=record.value is None,
        headers=headers,
        complete=complete,
    )


def decode_letter(record: Record) -> DeadLetter:
    """The letter that a record of the dead-letter topic holds; one about the record itself where it holds none."""
    if record.unreadable is not None:
        return letter_of(record, record.unreadable.reason)
    try:
        letter = decode_event(record.value or b"")
        if not isinstance(letter, DeadLetter):
            raise MessageError(f"type: {letter.kind} does not belong on topic deadletter; expected dead_letter")
        _check(letter)
    except MessageError as error:
        return letter_of(record, str(error))
    return letter


def _check(letter: DeadLetter) -> None:
    """Raises MessageError for what the table cannot hold."""
    last = letter.offset if letter.last_offset is None else letter.last_offset
    for field, value, most in (
        ("partition", letter.partition, _MAX_UINT32),
        ("offset", letter.offset, _MAX_INT64),
        ("last_offset", last, _MAX_INT64),
        ("appended_at_ms", letter.appended_at_ms, _MAX_TIME_MS),
        ("value_bytes", letter.value_bytes, _MAX_INT64),
    ):
        if not 0 <= value <= most:
            raise MessageError(f"{field}: expected 0 to {most}, got {value}")
    if last < letter.offset:
        raise MessageError(f"last_offset: {last} is before offset {letter.offset}")
