"""Ranges of time on the command line: ISO 8601 with a zone, or a date, which is its midnight in UTC."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import click

from gpuledger.agents.replay.rows import parse_time_ms
from gpuledger.cli.exceptions import CommandError

__all__ = ["MOMENT_MS", "iso", "range_options", "time_range"]

MINUTE_MS = 60_000
_DAY_MS = 86_400_000
F = TypeVar("F", bound=Callable[..., Any])


class _Moment(click.ParamType):
    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        text = str(value).strip()
        try:
            at_ms = parse_time_ms(f"{text}T00:00:00Z" if re.fullmatch(r"\d{4}-\d{2}-\d{2}", text) else text)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if at_ms % MINUTE_MS:
            whole = iso(at_ms // MINUTE_MS * MINUTE_MS)
            self.fail(f'expected a whole minute, got "{text}"; write for instance {whole}', param, ctx)
        return at_ms


#: A click type whose value is UTC milliseconds of a whole minute.
MOMENT_MS = _Moment()


def range_options(command: F) -> F:
    """``--from`` and ``--to``, passed on as `from_ms` and `to_ms` (None where left out): see `time_range`."""
    command = click.option(
        "--to", "to_ms", type=MOMENT_MS, metavar="TIME", help="End, not included.  [default: the end of this minute]"
    )(command)
    return click.option(
        "--from",
        "from_ms",
        type=MOMENT_MS,
        metavar="TIME",
        help="Start: ISO 8601 with a zone, or a date (UTC).  [default: the midnight in UTC before the end]",
    )(command)


def time_range(from_ms: int | None, to_ms: int | None, now_ms: int | None = None) -> tuple[int, int]:
    """The range asked for; what was left out is today in UTC so far. Raises CommandError where it is empty."""
    now_ms = time.time_ns() // 1_000_000 if now_ms is None else now_ms
    end = now_ms // MINUTE_MS * MINUTE_MS + MINUTE_MS if to_ms is None else to_ms
    start = (end - 1) // _DAY_MS * _DAY_MS if from_ms is None else from_ms
    if start >= end:
        raise CommandError(f"--from: {iso(start)} is not before --to {iso(end)}; the end is not included")
    return start, end


def iso(at_ms: int) -> str:
    """UTC, as short as it is exact."""
    moment = datetime.fromtimestamp(0, UTC) + timedelta(milliseconds=at_ms)
    return moment.isoformat(timespec="milliseconds" if at_ms % 1000 else "seconds").replace("+00:00", "Z")
