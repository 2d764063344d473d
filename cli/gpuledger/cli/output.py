"""Rows for people and for scripts: a table on a terminal, aligned text in a pipe, CSV, or JSON with stable keys.

A column decides once how its values are written, so a script never meets a number today and a text tomorrow.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import IO, Any, Literal, TypeVar

import click

from gpuledger.schemas.texts import escaped

__all__ = ["Column", "Format", "format_option", "write_rows"]

Format = Literal["table", "json", "csv"]
F = TypeVar("F", bound=Callable[..., Any])

#: Above it a JSON number is not exact in every reader.
_MAX_JSON_INTEGER = 2**53


@dataclass(frozen=True, slots=True)
class Column:
    """One column: `key` in JSON and CSV, `title` in tables ("" means the key).

    `exact` columns are integers that may pass 2^53: JSON has them as text, always. Decimals are text always. `show`
    makes the text of a table cell where the plain value is hard to read; JSON and CSV never use it.
    """

    key: str
    title: str = ""
    exact: bool = False
    show: Callable[[Any], str] | None = None

    @property
    def heading(self) -> str:
        return self.title or self.key


def format_option(command: F) -> F:
    """``--format table|json|csv``, passed on as `layout`."""
    return click.option(
        "--format",
        "layout",
        type=click.Choice(["table", "json", "csv"]),
        default="table",
        show_default=True,
        help="json and csv are for scripts: stable keys, exact numbers.",
    )(command)


def write_rows(
    columns: Sequence[Column],
    rows: Iterable[Mapping[str, Any]],
    layout: Format,
    *,
    out: IO[str] | None = None,
    title: str = "",
) -> None:
    """Write the rows to `out` (standard output). A missing key is None: null, empty or a dash.

    Raises:
        ValueError: an integer beyond 2^53 in a column that is not `exact`, or a float that is not finite.
        KeyError: a row has a key that no column names (it would be dropped in silence).
    """
    stream = out if out is not None else sys.stdout
    known = {column.key for column in columns}
    checked = (_check_keys(row, known) for row in rows)
    if layout == "json":
        _write_json(columns, checked, stream)
    elif layout == "csv":
        _write_csv(columns, checked, stream)
    else:
        listed = list(checked)
        if not (stream.isatty() and _write_rich(columns, listed, stream, title)):
            _write_plain(columns, listed, stream)


def _check_keys(row: Mapping[str, Any], known: set[str]) -> Mapping[str, Any]:
    unknown = [key for key in row if key not in known]
    if unknown:
        raise KeyError(f"{unknown[0]}: no column has this key; known: {', '.join(sorted(known))}")
    return row


def _plain(value: Any) -> Any:
    """The value as JSON and CSV have it, integers apart: moments as ISO 8601 in UTC, decimals as text."""
    if isinstance(value, datetime):
        moment = value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
        return moment.isoformat(timespec="milliseconds" if moment.microsecond else "seconds").replace("+00:00", "Z")
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, Decimal):
        return format(value, "f")
    return value


def _json_value(column: Column, value: Any) -> Any:
    plain = _plain(value)
    if isinstance(plain, int) and not isinstance(plain, bool):
        if column.exact:
            return str(plain)
        if abs(plain) > _MAX_JSON_INTEGER:
            raise ValueError(f"{column.key}: {plain} is beyond 2^53; the column must be exact")
    return plain


def _write_json(columns: Sequence[Column], rows: Iterable[Mapping[str, Any]], stream: IO[str]) -> None:
    stream.write("[")
    for n, row in enumerate(rows):
        line = {column.key: _json_value(column, row.get(column.key)) for column in columns}
        stream.write(",\n " if n else "\n ")
        stream.write(json.dumps(line, ensure_ascii=False, allow_nan=False))
    stream.write("\n]\n")


def _write_csv(columns: Sequence[Column], rows: Iterable[Mapping[str, Any]], stream: IO[str]) -> None:
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([column.key for column in columns])
    for row in rows:
        writer.writerow([_plain(row.get(column.key)) for column in columns])


def _cell(column: Column, value: Any) -> str:
    if value is None:
        return "–"
    # Names come from anybody who may write to a topic; a terminal must not obey them.
    return escaped(column.show(value) if column.show is not None else str(_plain(value)))


def _right(rows: Sequence[Mapping[str, Any]], column: Column) -> bool:
    """Numbers stand to the right."""
    values = [row.get(column.key) for row in rows]
    return any(isinstance(value, int | float | Decimal) and not isinstance(value, bool) for value in values)


def _write_plain(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]], stream: IO[str]) -> None:
    cells = [[column.heading for column in columns]]
    cells += [[_cell(column, row.get(column.key)) for column in columns] for row in rows]
    widths = [max(len(line[n]) for line in cells) for n in range(len(columns))]
    right = [_right(rows, column) for column in columns]
    for line in cells:
        parts = [text.rjust(w) if r else text.ljust(w) for text, w, r in zip(line, widths, right, strict=True)]
        stream.write("  ".join(parts).rstrip() + "\n")


def _write_rich(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]], stream: IO[str], title: str) -> bool:
    """False where rich is not installed (a node agent): the plain table does."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ModuleNotFoundError:
        return False
    table = Table(title=title or None, header_style="bold", title_justify="left")
    for column in columns:
        table.add_column(Text(column.heading), justify="right" if _right(rows, column) else "left")
    for row in rows:
        # Text, not str: a job may be named "[red]".
        table.add_row(*(Text(_cell(column, row.get(column.key))) for column in columns))
    Console(file=stream).print(table)
    return True
