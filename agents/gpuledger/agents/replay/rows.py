"""Rows of CSV files whose every fault names file, line, field, value and fix.

Readers of traces ask a `Row` for typed cells; integers and times are exact, no float is ever involved.
Files ending in ``.gz`` are read through gzip, and no file is held in memory.
"""

from __future__ import annotations

import csv
import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import IO

from gpuledger.agents.replay.exceptions import TraceError

__all__ = ["MAX_TIME_MS", "MIN_TIME_MS", "OnReject", "Row", "Table", "open_table", "parse_time_ms", "reject", "show"]

#: What the contract accepts as a time (schemas.events.TimeMs): 2000-01-01 to 2200-01-01.
MIN_TIME_MS = 946_684_800_000
MAX_TIME_MS = 7_258_118_400_000

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)
_SECONDS = re.compile(r"[+-]?\d{1,20}(\.\d{1,40})?", re.ASCII)
_INTEGER = re.compile(r"[+-]?\d{1,18}", re.ASCII)
# datetime.fromisoformat drops what is finer than a microsecond without a word.
_TOO_FINE = re.compile(r"[.,]\d{3}\d*[1-9]")

#: Called with the error of each row that is skipped; raising from it stops the reading.
OnReject = Callable[[TraceError], None]


def reject(error: TraceError) -> None:
    """The policy `stop`: the first malformed row ends the reading."""
    raise error


def show(value: str, limit: int = 80) -> str:
    """The value as an error shows it: quoted, control characters escaped, cut at `limit` characters."""
    text = value if len(value) <= limit else value[:limit] + "…"
    return ascii(text) if not text.isprintable() else f'"{text}"'


def parse_time_ms(text: str) -> int:
    """UTC milliseconds of Unix seconds (whole or decimal, exact to the millisecond) or of ISO 8601 with a zone.

    Raises:
        ValueError: what is wrong with the text and how to write it.
    """
    if _SECONDS.fullmatch(text):
        whole, _, fraction = text.partition(".")
        if len(fraction.rstrip("0")) > 3:
            raise ValueError(f"{show(text)} is finer than a millisecond; give seconds with at most 3 decimals")
        time_ms = int(Decimal(f"{whole}.{fraction[:3] or '0'}") * 1000)
        if time_ms > MAX_TIME_MS and MIN_TIME_MS <= time_ms // 1000 <= MAX_TIME_MS:
            raise ValueError(f"{show(text)} looks like milliseconds; give Unix seconds ({time_ms // 1_000_000})")
    else:
        time_ms = _iso_ms(text)
    if not MIN_TIME_MS <= time_ms <= MAX_TIME_MS:
        raise ValueError(f"{show(text)} is not between 2000 and 2200; give Unix seconds or ISO 8601 with a zone")
    return time_ms


def _iso_ms(text: str) -> int:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(
            f"expected Unix seconds or ISO 8601 with a zone, got {show(text)}; write 1588291200 or 2020-05-01T00:00:00Z"
        ) from None
    if moment.tzinfo is None:
        utc = f"{text}Z" if len(text) > 10 else f"{text}T00:00:00Z"
        raise ValueError(f"{show(text)} has no zone; write {utc} for UTC or add an offset such as +01:00")
    if _TOO_FINE.search(text):
        raise ValueError(f"{show(text)} is finer than a millisecond; give at most 3 decimals")
    return (moment - _EPOCH) // _MILLISECOND


class Row:
    """One line of a table. Cells are stripped; a column that the file does not have reads as ""."""

    __slots__ = ("_cells", "_table", "line")

    def __init__(self, table: Table, line: int, cells: Sequence[str]) -> None:
        self._table = table
        self._cells = cells
        self.line = line

    def error(self, field: str, problem: str, value: str | None = None) -> TraceError:
        """The error to raise for `field` of this row."""
        return TraceError(self._table.file, self.line, field, self.get(field) if value is None else value, problem)

    def get(self, field: str) -> str:
        at = self._table.columns.get(field)
        return "" if at is None else self._cells[at].strip()

    def text(self, field: str, limit: int, required: bool = True) -> str:
        """A name of at most `limit` characters; control characters are refused."""
        value = self.get(field)
        if not value:
            if required:
                raise self.error(field, "is empty; every row needs it")
            return ""
        if len(value) > limit:
            raise self.error(field, f"{show(value)} has {len(value)} characters; at most {limit} are allowed")
        if not value.isprintable():
            raise self.error(field, f"{show(value)} has characters that cannot be printed; remove them (UTF-8 text)")
        return value

    def integer(self, field: str, low: int, high: int) -> int:
        value = self.get(field)
        if not _INTEGER.fullmatch(value):
            raise self.error(field, f"expected a whole number from {low} to {high}, got {show(value)}")
        number = int(value)
        if not low <= number <= high:
            raise self.error(field, f"expected a whole number from {low} to {high}, got {number}")
        return number

    def time_ms(self, field: str) -> int | None:
        """UTC milliseconds, None where the cell is empty."""
        value = self.get(field)
        if not value:
            return None
        try:
            return parse_time_ms(value)
        except ValueError as error:
            raise self.error(field, str(error)) from None


class Table:
    """A CSV file's header: `columns` maps a name to its position, `ignored` are those that no reader knows."""

    def __init__(self, file: str, header: Sequence[str], required: Iterable[str], optional: Iterable[str]) -> None:
        self.file = file
        names = [name.strip() for name in header]
        known = {*required, *optional}
        self.columns = {name: at for at, name in enumerate(names) if name in known}
        self.ignored = tuple(name for name in names if name not in known)
        for name in names:
            if name in known and names.count(name) > 1:
                raise TraceError(file, 1, name, name, "the header names this column twice; keep one")
        missing = [name for name in required if name not in self.columns]
        if missing:
            raise TraceError(
                file,
                1,
                missing[0],
                ",".join(names)[:200],
                f"the header lacks the column{'s' if len(missing) > 1 else ''} {', '.join(missing)}; "
                f"it has {show(','.join(names))}",
            )


class _Reader:
    """csv.reader with a line number for each record and errors that do not end the iteration."""

    def __init__(self, file: str, text: IO[str]) -> None:
        self._file = file
        self._rows = csv.reader(text, strict=True)

    def next(self) -> tuple[int, list[str]] | None:
        line = self._rows.line_num + 1
        try:
            return line, next(self._rows)
        except StopIteration:
            return None
        except csv.Error as error:
            raise TraceError(
                self._file, line, "", "", f"is not CSV: {error}; quote cells that hold commas, quotes or line breaks"
            ) from None
        except (OSError, EOFError, zlib.error) as error:
            raise _Unreadable(self._file, line, "", "", f"cannot be read further: {error}") from None


class _Unreadable(TraceError):
    """The file itself ends here; no policy can go on."""


def open_table(
    path: Path, required: Iterable[str], optional: Iterable[str] = (), on_reject: OnReject = reject
) -> tuple[Table, Iterator[Row]]:
    """The header of `path`, and its rows one by one; the file closes when the rows end.

    Rows with too few or too many cells, or that are not CSV or not UTF-8, go to `on_reject`. Empty lines are no rows.

    Raises:
        TraceError: the file cannot be opened or read, or its header lacks a column of `required`.
    """
    text = _open(path)
    try:
        reader = _Reader(path.name, text)
        first = reader.next()
        if first is None:
            raise TraceError(path.name, 0, "", "", "is empty; the first line must name the columns")
        table = Table(path.name, first[1], tuple(required), tuple(optional))
    except BaseException:
        text.close()
        raise
    return table, _rows(table, len(first[1]), reader, text, on_reject)


def _open(path: Path) -> IO[str]:
    # Bytes that are not UTF-8 become surrogates, so that one bad row does not end the file; `text` refuses them.
    try:
        stream = gzip.GzipFile(path) if path.suffix == ".gz" else path.open("rb")
        return io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    except OSError as error:
        raise TraceError(path.name, 0, "", "", f"cannot be opened: {error.strerror or error} ({path})") from None


def _rows(table: Table, width: int, reader: _Reader, text: IO[str], on_reject: OnReject) -> Iterator[Row]:
    with text:
        while True:
            try:
                record = reader.next()
                if record is None:
                    return
                line, cells = record
                if not cells:
                    continue
                if len(cells) != width:
                    raise TraceError(
                        table.file,
                        line,
                        "",
                        ",".join(cells)[:200],
                        f"has {len(cells)} cells where the header has {width}; quote cells that hold commas",
                    )
            except _Unreadable:
                raise
            except TraceError as error:
                on_reject(error)
                continue
            yield Row(table, line, cells)
