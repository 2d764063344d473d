"""Reads the fields of a file that a person wrote: each value checked, each problem named with its path and its fix.

Problems are collected, so that one run shows all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from decimal import Decimal, InvalidOperation
from difflib import get_close_matches
from typing import Any, Literal, TypeVar, cast
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from gpuledger.schemas.events import Fact, decode_event, encode_event
from gpuledger.schemas.exceptions import MessageError

__all__ = ["Field", "Reader", "local_to_ms", "parse_decimal"]

F = TypeVar("F", bound=Fact)
_EPOCH = datetime.fromisoformat("1970-01-01T00:00:00+00:00")
_MILLISECOND = timedelta(milliseconds=1)
#: The names of fields of events in files, where they differ.
_IN_FILES = {"start_ms": "start", "end_ms": "end", "from_tenant": "from", "to_tenant": "to"}


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a file: how its value is read, and whether it may be missing."""

    kind: Literal["text", "decimal", "time", "count"]
    required: bool = False


class Reader:
    """Reads one file called `name`. `zone` is where times without an offset are; None: they are an error."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.zone: ZoneInfo | None = None
        self.problems: list[str] = []

    def problem(self, path: str, text: str) -> None:
        self.problems.append(f"{self.name}: {path}: {text}" if path else f"{self.name}: {text}")

    def mapping(self, value: Any, path: str, known: Mapping[str, Any]) -> dict[str, Any]:
        """The value as a dict of known keys; others are a problem. Empty where it is no mapping."""
        if not isinstance(value, dict):
            self.problem(path, f"expected fields, got {value!r}; known are {', '.join(known)}")
            return {}
        given = cast(dict[Any, Any], value)
        for key in given:
            if key not in known:
                guess = get_close_matches(str(key), known, n=1)
                fix = f"write {guess[0]}" if guess else f"known are {', '.join(known)}"
                self.problem(f"{path}.{key}" if path else str(key), f"there is no such field; {fix}")
        return {str(key): entry for key, entry in given.items() if key in known}

    def items(self, tree: Mapping[str, Any], key: str, path: str = "") -> list[tuple[str, Any]]:
        """(path, value) of each item of the list `key`; a missing or empty one has none."""
        here = f"{path}.{key}" if path else key
        value = tree.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            self.problem(here, f"expected a list, got {value!r}; begin each entry with a dash")
            return []
        return [(f"{here}[{n}]", entry) for n, entry in enumerate(cast(list[Any], value))]

    def fields(self, value: Any, path: str, known: Mapping[str, Field], also: tuple[str, ...] = ()) -> dict[str, Any]:
        """The fields given, read by their kinds; absent and null ones are left out. `also`: read by the caller."""
        given = self.mapping(value, path, {**known, **dict.fromkeys(also)})
        result: dict[str, Any] = {}
        for key, field in known.items():
            here = f"{path}.{key}" if path else key
            if given.get(key) is None:
                if field.required:
                    self.problem(here, "is missing")
                continue
            read = getattr(self, f"_{field.kind}")(given[key], here)
            if read is not None:
                result[key] = read
        return result

    def build(self, kind: type[F], path: str, terms: Mapping[str, Any]) -> F | None:
        """The event, held to its schema; None and a problem where it does not follow it."""
        try:
            # Decoding checks what constructing does not: lengths, ranges, patterns.
            return cast(F, decode_event(encode_event(kind(**terms))))
        except (ValueError, MessageError) as error:
            text = str(error)
            for field, name in _IN_FILES.items():
                text = text.replace(field, name)
            self.problem(path, text)
            return None

    def set_zone(self, value: Any, path: str) -> ZoneInfo | None:
        """The time zone by its name; None where there is no such zone."""
        try:
            return ZoneInfo(value)
        except (ZoneInfoNotFoundError, ValueError, TypeError, OSError):
            self.problem(path, f'expected the name of a time zone, got {value!r}; write for instance "Europe/Oslo"')
            return None

    def _text(self, value: Any, path: str) -> str | None:
        if isinstance(value, str):
            return value
        self.problem(path, f'expected text, got {value!s}; write "{value!s}"')
        return None

    def _count(self, value: Any, path: str) -> int | None:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        self.problem(path, f"expected a whole number, got {value!s}")
        return None

    def _decimal(self, value: Any, path: str) -> Decimal | None:
        if isinstance(value, Decimal):
            # Any other reader of this YAML would make a float of it.
            self.problem(path, f'expected a decimal string, got {value!s}; write "{value!s}"')
            return None
        if isinstance(value, int) and not isinstance(value, bool):
            return Decimal(value)
        try:
            return parse_decimal(value)
        except ValueError as error:
            self.problem(path, str(error))
            return None

    def _time(self, value: Any, path: str) -> int | None:
        try:
            return local_to_ms(_moment(value), self.zone)
        except ValueError as error:
            self.problem(path, str(error))
            return None


def parse_decimal(value: Any) -> Decimal:
    """A finite decimal with a point from text.

    Raises:
        ValueError: it is something else; the text says what to write.
    """
    if not isinstance(value, str):
        raise ValueError(f'expected a decimal string, got {value!s}; write for instance "2.50"')
    if "," in value:
        return _comma(value)
    try:
        number = Decimal(value.strip())
    except InvalidOperation:
        raise ValueError(f'expected a decimal string, got "{value}"; write for instance "2.50"') from None
    if not number.is_finite() or "_" in value:
        raise ValueError(f'expected a decimal string, got "{value}"; write for instance "2.50"')
    return number


def _comma(value: str) -> Decimal:
    pointed = value.replace(".", "").replace(",", ".") if value.count(",") == 1 else value.replace(",", "")
    raise ValueError(f'expected a decimal with a point, got "{value}"; write "{pointed}"')


def _moment(value: Any) -> datetime:
    """A date, a time or its ISO 8601 text as a datetime, aware or naive. A date is its midnight."""
    if isinstance(value, datetime):
        return value
    if isinstance(value, date):
        return datetime(value.year, value.month, value.day)
    if isinstance(value, str):
        try:
            return datetime.fromisoformat(value)
        except ValueError:
            pass
    raise ValueError(f"expected a time, got {value!s}; write for instance 2026-01-31T00:00:00Z")


def local_to_ms(moment: datetime, zone: ZoneInfo | None, second_time: bool | None = None) -> int:
    """UTC milliseconds of a moment; one without an offset is in `zone`.

    `second_time` says which of the two is meant where clocks were set back; None: that is an error.

    Raises:
        ValueError: no offset and no zone, an hour that clocks skip, one that comes twice, or parts of a millisecond.
    """
    text = moment.isoformat()
    if moment.tzinfo is None:
        if zone is None:
            raise ValueError(f"{text} has no time zone; write {text}Z, or `timezone:` at the top of the file")
        first, second = (moment.replace(tzinfo=zone, fold=fold) for fold in (0, 1))
        if first.utcoffset() != second.utcoffset():
            # Before a skipped hour the offset is smaller than after it; before a repeated one it is greater.
            if cast(timedelta, first.utcoffset()) < cast(timedelta, second.utcoffset()):
                raise ValueError(f"{text} does not exist in {zone.key}: clocks were set forward; write it in UTC")
            if second_time is None:
                raise ValueError(f"{text} comes twice in {zone.key}: clocks were set back; write it with its offset")
        moment = second if second_time else first
    milliseconds, rest = divmod(moment - _EPOCH, _MILLISECOND)
    if rest:
        raise ValueError(f"{text} is not a whole millisecond")
    return milliseconds
