"""The words and tables of `gpuledger ledger explain`: moments, amounts, aligned columns, lists that are cut."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from typing import Any

from gpuledger.streams.explain_facts import moment

__all__ = ["WIDTH", "At", "changed", "clock", "cost", "cut", "number", "ranges", "table", "wrapped"]

_DAY_MS = 86_400_000
_MOST_VALUE = 60
#: Columns of a line of words; a table is as wide as the names in it.
WIDTH = 110

#: A moment in UTC milliseconds as text.
At = Callable[[int | None], str]


def clock(minute_ms: int) -> At:
    """Moments of the minute's day as times, others whole; all UTC."""
    day = minute_ms // _DAY_MS

    def at(ms: int | None) -> str:
        if ms is None:
            return "–"
        text = moment(ms)
        return text[11:].removesuffix("Z") if ms // _DAY_MS == day else text

    return at


def number(value: int | None) -> str:
    """An integer with every digit, in groups of three."""
    return "–" if value is None else f"{value:,}"


def cost(value: Decimal | None) -> str:
    """Money with every decimal."""
    return "–" if value is None else f"{value:f}"


def ranges(spans: Iterable[tuple[int, int]], at: At) -> str:
    """Half-open ranges of time."""
    return ", ".join(f"{at(start)} to {at(end)}" for start, end in spans)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int]) -> list[str]:
    """Aligned columns, indented by two; the columns `right` are flush right."""
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[n]) for line in lines) for n in range(len(head))]
    return [
        "  "
        + "  ".join(
            text.rjust(width) if n in right else text.ljust(width)
            for n, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def wrapped(lines: Iterable[str]) -> list[str]:
    """Lines of words, broken where they are longer than WIDTH; what follows is indented by two more."""
    out: list[str] = []
    for line in lines:
        indent = " " * (len(line) - len(line.lstrip()))
        # Names are not broken: somebody copies them.
        out += textwrap.wrap(
            line.strip(),
            WIDTH,
            initial_indent=indent,
            subsequent_indent=f"{indent}  ",
            break_on_hyphens=False,
            break_long_words=False,
        ) or [""]
    return out


def cut(lines: list[str], most: int, what: str) -> list[str]:
    """At most `most` lines, and how many more there are."""
    if len(lines) <= most + 1:
        return lines
    indent = " " * (len(lines[0]) - len(lines[0].lstrip()))
    return [*lines[:most], f"{indent}… and {len(lines) - most} more {what}: --full"]


def changed(before: str | None, after: str | None) -> str:
    """A value before and after; of two lists, where they begin to differ."""
    old, new = _entries(before), _entries(after)
    if old is None or new is None:
        return f"{_short(before)} → {_short(after)}"
    at = next((n for n, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    first, second = (json.dumps(each[at]) if at < len(each) else None for each in (old, new))
    return f"{len(old)} → {len(new)} entries, from entry {at} on: {_short(first)} → {_short(second)}"


def _entries(value: str | None) -> list[Any] | None:
    """A list that was written as JSON; None for anything else, which may begin as one."""
    if value is None or not value.startswith("["):
        return None
    try:
        return json.loads(value)
    except ValueError:
        return None


def _short(value: str | None) -> str:
    if value is None:
        return "none"
    return value if len(value) <= _MOST_VALUE else f"{value[:_MOST_VALUE]}…"
