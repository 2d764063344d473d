"""How a replay shows where it is, on standard error: a bar on a terminal, one line a second elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

import click

__all__ = ["Bar", "Lines"]


class Lines:
    """At most one line a second; the same text is not repeated."""

    def __init__(self, every_s: float = 1.0) -> None:
        self._every_s = every_s
        self._next_s = 0.0
        self._last = ""

    def show(self, text: str) -> None:
        now_s = time.monotonic()
        if now_s >= self._next_s and text != self._last:
            click.echo(text, err=True)
            self._next_s = now_s + self._every_s
            self._last = text


class Bar:
    """Events sent of those expected. rich draws it where it is installed and standard error is a terminal."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._started_s = time.monotonic()
        self._lines = Lines()
        self._rich: Any = None
        self._task: Any = None

    def __enter__(self) -> Bar:
        if sys.stderr.isatty():
            self._rich = _rich_progress()
        if self._rich is not None:
            self._rich.start()
            self._task = self._rich.add_task(self._title, total=None, rate="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._rich is not None:
            self._rich.stop()

    def show(self, sent: int, expected: int) -> None:
        rate = f"{round(sent / max(time.monotonic() - self._started_s, 0.001)):,}/s"
        if self._rich is not None:
            self._rich.update(self._task, completed=sent, total=expected, rate=rate)
        else:
            share = 100 * sent // expected if expected else 100
            self._lines.show(f"{self._title}: {sent:,} of {expected:,} events ({share} %), {rate}")


def _rich_progress() -> Any:
    """None where rich is not installed (a node agent): lines do."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ModuleNotFoundError:
        return None
    return Progress(
        # markup off: the name of a trace may hold brackets
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
