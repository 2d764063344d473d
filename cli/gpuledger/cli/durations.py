"""How long, as people write it: ``90s``, ``15m``, ``2h``, ``1d``, or a bare number of seconds."""

from __future__ import annotations

import re

import click

__all__ = ["DURATION_MS", "parse_duration_ms"]

_UNIT_MS = {"": 1000, "ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}


def parse_duration_ms(text: str) -> int:
    """Milliseconds.

    Raises:
        ValueError: not a positive whole number with a known unit.
    """
    match = re.fullmatch(r"(\d+)\s*(ms|s|m|h|d)?", text.strip())
    if match is None or int(match[1]) == 0:
        raise ValueError(f'expected a duration such as 90s, 15m or 2h, got "{text}"')
    return int(match[1]) * _UNIT_MS[match[2] or ""]


class _Duration(click.ParamType):
    name = "duration"

    def convert(self, value: str | int, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return parse_duration_ms(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


#: A click type whose value is milliseconds.
DURATION_MS = _Duration()
