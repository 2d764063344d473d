"""Texts of messages: bounded, and without characters that a log, a terminal or a page would obey.

A name of 16 MB or one with a line break in it is a mistake or an attack; both would live in every table for good.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import msgspec

from gpuledger.schemas.exceptions import MessageError

__all__ = ["CONTROLS", "MAX_NAME", "MAX_TEXT", "check_texts", "escaped"]

#: Far above what is needed (a year of prices by the quarter of an hour has 2 MB).
_MAX_EVENT_BYTES = 8 << 20

#: Characters of a name, and of what people write in their own words.
MAX_NAME, MAX_TEXT = 256, 10_000
#: Control characters, and those that turn the direction of a line.
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
_CONTROLS_OF_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
#: Fields that hold sentences; all others are names.
_TEXTS = frozenset({"why", "summary", "action", "name", "contact", "evidence", "tags", "contract", "by", "health"})


def escaped(text: str) -> str:
    """The text in one line, its control characters as escapes: fit for a log or a terminal, whoever wrote it."""
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def check_texts(event: msgspec.Struct, data: bytes) -> None:
    """Raises MessageError for a text that is too long or holds control characters, with its path. `data` is the event's
    JSON. For what comes in: what an older version has stored stays readable."""
    if len(data) > _MAX_EVENT_BYTES:
        raise MessageError(f"value: {len(data)} bytes; expected at most {_MAX_EVENT_BYTES}: split it")
    # In JSON a control character is an escape, and a long text needs a long message: few events are looked through.
    if len(data) <= MAX_NAME and data.isascii() and b"\\" not in data and b"\x7f" not in data:
        return
    for path, is_text, value in _walk(event, ""):
        most = MAX_TEXT if is_text else MAX_NAME
        if len(value) > most:
            raise MessageError(f"{path}: expected at most {most} characters, got {len(value)}")
        found = (_CONTROLS_OF_TEXT if is_text else CONTROLS).search(value)
        if found is not None:
            raise MessageError(f"{path}: holds the control character U+{ord(found[0]):04X}; send plain text")


def _walk(struct: msgspec.Struct, prefix: str) -> Iterator[tuple[str, bool, str]]:
    """(path, whether it holds sentences, text) of every text in the struct."""
    for field in struct.__struct_fields__:
        value: Any = getattr(struct, field)
        path, is_text = f"{prefix}{field}", field in _TEXTS
        if isinstance(value, str):
            yield path, is_text, value
        elif isinstance(value, Mapping):
            for key, text in cast(Mapping[str, str], value).items():
                yield f"{path} (a key)", False, key
                yield f"{path}.{key}", is_text, text
        elif isinstance(value, Sequence) and not isinstance(value, bytes):
            for n, item in enumerate(cast(Sequence[Any], value)):
                if isinstance(item, msgspec.Struct):
                    yield from _walk(item, f"{path}[{n}].")
