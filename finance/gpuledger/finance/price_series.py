"""Imports a price series from CSV: UTC or local time, hourly or finer, through both changes of the clocks.

A series says one price for each step; a step that is missing or there twice is an error that names it, because a guess
would be money.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Context
from typing import Literal
from zoneinfo import ZoneInfo

from gpuledger.finance.document_fields import local_to_ms, parse_decimal
from gpuledger.schemas.events import PricePoint

__all__ = ["SeriesFormat", "Unit", "parse_series"]

Unit = Literal["per_kwh", "per_mwh", "cents_per_kwh"]
#: Powers of ten between a column's unit and the price per kWh.
_SHIFT: dict[str, int] = {"per_kwh": 0, "per_mwh": -3, "cents_per_kwh": -2}
_MINUTE_MS = 60_000
#: The default context would round prices of more than 28 digits.
_CONTEXT = Context(prec=80)


@dataclass(frozen=True, slots=True)
class SeriesFormat:
    """How the CSV is written. `zone` is where times without an offset are."""

    time_column: str = "time"
    price_column: str = "price"
    unit: Unit = "per_kwh"
    resolution_minutes: int = 60
    zone: ZoneInfo | None = None


def parse_series(text: str, form: SeriesFormat) -> tuple[list[PricePoint], int]:
    """The prices in ascending order, and the end of the last one in UTC milliseconds.

    Rows must ascend in local time; an hour that comes twice when clocks are set back is taken in the order of its rows.

    Raises:
        ValueError: a column is missing, a value is wrong, or a step is missing or there twice. The text starts with
            the line.
    """
    reader = csv.DictReader(text.splitlines())
    for column in (form.time_column, form.price_column):
        if column not in (reader.fieldnames or ()):
            raise ValueError(
                f"line 1: there is no column {column}; found {', '.join(reader.fieldnames or ['nothing'])}"
            )
    step = form.resolution_minutes * _MINUTE_MS
    points: list[PricePoint] = []
    expected: int | None = None
    for row in reader:
        where = f"line {reader.line_num}"
        try:
            moment = datetime.fromisoformat(row[form.time_column] or "")
            start = _start_ms(moment, form.zone, expected)
            price = parse_decimal(row[form.price_column]).scaleb(_SHIFT[form.unit], context=_CONTEXT)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if expected is not None and start != expected:
            raise ValueError(f"{where}: {_misstep(start, expected, form.resolution_minutes)}")
        expected = start + step
        points.append(PricePoint(start, price))
    if expected is None:
        raise ValueError("line 1: there are no prices")
    return points, expected


def _start_ms(moment: datetime, zone: ZoneInfo | None, expected: int | None) -> int:
    """Of the two meanings of a repeated hour the one that continues the series; the first one at its beginning."""
    first = local_to_ms(moment, zone, second_time=False)
    if first == expected or moment.tzinfo is not None:
        return first
    second = local_to_ms(moment, zone, second_time=True)
    return second if second == expected else first


def _misstep(start: int, expected: int, minutes: int) -> str:
    got, wanted = (datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%dT%H:%MZ") for ms in (start, expected))
    if start > expected:
        return f"no price from {wanted} to {got}; add the missing rows ({minutes} minutes each)"
    return f"{got} is there twice or out of order (expected {wanted}); keep one row for each {minutes} minutes"
