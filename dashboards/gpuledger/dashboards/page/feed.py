"""Keeps a board's figures fresh: each query once per refresh, whoever watches, and only while somebody does.

Readers hold no queue: each remembers the version it has of every panel and takes the difference to the newest, or the
whole, so a slow browser skips ahead and costs no memory.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from gpuledger.dashboards.exceptions import PanelError, QueryFailed, SourceUnavailable
from gpuledger.dashboards.macros import expand, range_until
from gpuledger.dashboards.page.rows import Row, difference, key_columns, project
from gpuledger.dashboards.page.source import SourceThread
from gpuledger.dashboards.panels import Annotation, Board, Column, Panel

__all__ = ["Feed", "FeedStats", "PanelState"]

log = logging.getLogger(__name__)

#: Nobody has asked for so long: stop asking the database.
_WATCHED_S = 10.0
#: Rest at least so many times as long as a refresh took, so that a page never takes more of a database than this.
_REST = 2.0
#: Kinds drawn in the order of time; in others the order of the rows is part of the answer, and they are short.
_BY_DIFFERENCE = ("timeseries", "statetimeline")
_BACKOFF_S = (0.5, 1, 2, 4, 5)


def annotation_panel(annotation: Annotation) -> Panel:
    """An annotation as a panel of rows (time, text), so that it is fed and drawn like one."""
    return Panel(
        id=annotation.id,
        title=annotation.title,
        description=annotation.title,
        kind="table",
        sql=annotation.sql,
        columns=(Column("time", "When", "time", "time"), Column("text", "What", "value")),
        empty="none",
        refresh_s=5,
    )


@dataclass
class PanelState:
    """What is known of a panel. `version` 0: never asked. `delta` leads from version - 1 to `version`, if shorter."""

    panel: Panel
    version: int = 0
    rows: list[Row] = field(default_factory=list)
    error: str = ""
    full: str = ""
    delta: str = ""
    due: float = 0.0


@dataclass
class FeedStats:
    """Counters since the start."""

    refreshes: int = 0
    queries: int = 0
    failed: int = 0
    unavailable: int = 0
    query_seconds: float = 0.0


class Feed:
    """The live state of one board. All methods belong to the event loop's thread; `clock` is monotonic seconds."""

    def __init__(
        self,
        board: Board,
        source: SourceThread,
        *,
        refresh_ms: int = 1000,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.board = board
        self.stats = FeedStats()
        panels = [*board.panels, *(annotation_panel(annotation) for annotation in board.annotations)]
        self.panels = {panel.id: PanelState(panel) for panel in panels}
        self.watchers = 0
        self.database_error = ""
        self.down_since: datetime | None = None
        self.refreshed_at: datetime | None = None
        self._source = source
        self._refresh_s = refresh_ms / 1000
        self._now, self._clock = now, clock
        self._asked_at = float("-inf")
        self._wake = asyncio.Event()
        self._changed = asyncio.Event()
        self._failures = 0

    # For readers

    def touch(self) -> None:
        """Somebody looks: refresh for a while."""
        self._asked_at = self._clock()
        self._wake.set()

    def next_change(self) -> asyncio.Event:
        """Set at the next change. Take it before `updates`, or a change in between is missed."""
        return self._changed

    def wake_readers(self) -> None:
        """Readers look again although nothing has changed."""
        self._tell()

    async def fresh(self, timeout_s: float) -> None:
        """Waits until every panel was asked once, or the database is known to be away."""
        deadline = self._clock() + timeout_s
        self.touch()
        while not self.database_error and any(state.version == 0 for state in self.panels.values()):
            if (left := deadline - self._clock()) <= 0:
                return
            self.touch()
            with suppress(TimeoutError):
                await asyncio.wait_for(self.next_change().wait(), min(left, 1.0))

    def updates(self, sent: dict[str, int]) -> Iterator[str]:
        """JSON messages that bring a reader from the versions in `sent` to the newest; changes `sent`."""
        for name, state in self.panels.items():
            have = sent.get(name, 0)
            if have == state.version:
                continue
            sent[name] = state.version
            yield state.delta if state.delta and have == state.version - 1 else state.full

    def status(self) -> dict[str, Any]:
        """Whether the database answers, since when not, and how old the figures are."""
        return {
            "database": "down" if self.database_error else "ok" if self.refreshed_at else "starting",
            "message": self.database_error,
            "since": _iso(self.down_since),
            "refreshed_at": _iso(self.refreshed_at),
        }

    # The loop

    async def run(self) -> None:
        """Refreshes until cancelled."""
        while True:
            if not self._watched():
                self._wake.clear()
                await self._wake.wait()
                continue
            started = self._clock()
            await self._refresh()
            took = self._clock() - started
            pause = _BACKOFF_S[min(self._failures, len(_BACKOFF_S)) - 1] if self._failures else self._refresh_s
            await asyncio.sleep(max(pause - took, took * _REST, 0.05))

    def _watched(self) -> bool:
        return self.watchers > 0 or self._clock() - self._asked_at < _WATCHED_S

    async def _refresh(self) -> None:
        """Asks what is due, each SQL text once, and tells readers as soon as a panel has changed."""
        now, clock = self._now(), self._clock()
        due: dict[str, list[PanelState]] = {}
        for state in self.panels.values():
            if state.due <= clock:
                panel = state.panel
                sql = expand(panel.sql, range_until(panel.range or self.board.range, now))
                due.setdefault(sql, []).append(state)
        for sql, states in due.items():
            if not await self._ask(sql, states):
                return
            for state in states:
                state.due = clock + state.panel.refresh_s - self._refresh_s / 2
        if due:
            self.stats.refreshes += 1
            self.refreshed_at = self._now()
            self._failures = 0
            if self.database_error:
                log.info("the database answers again")
                self.database_error, self.down_since = "", None
            self._tell()

    async def _ask(self, sql: str, states: list[PanelState]) -> bool:
        """Asks one query for its panels. False: the database is away, the rest need not be asked."""
        started = self._clock()
        try:
            result = await self._source.query(sql)
        except SourceUnavailable as error:
            self._away(str(error))
            return False
        except QueryFailed as error:
            self.stats.failed += 1
            if not states[0].error:
                log.error("panel %s: %s", states[0].panel.id, error)
            for state in states:
                self._publish(state, [], _query_advice(error))
            return True
        finally:
            self.stats.queries += 1
            self.stats.query_seconds += self._clock() - started
        for state in states:
            try:
                self._publish(state, project(state.panel, result.columns, result.rows), "")
            except PanelError as error:
                if not state.error:
                    log.error("%s", error)
                self._publish(state, [], str(error))
        return True

    def _away(self, reason: str) -> None:
        self._failures += 1
        self.stats.unavailable += 1
        if not self.database_error:
            log.warning("the database does not answer: %s", reason)
            self.down_since = self._now()
            # The driver's text names hosts and users: it goes to the log, not to every browser.
            self.database_error = "The database does not answer."
            self._tell()

    def _publish(self, state: PanelState, rows: list[Row], error: str) -> None:
        if state.version and rows == state.rows and error == state.error:
            return
        before, had_error = state.rows, state.error
        state.rows, state.error = rows, error
        state.version += 1
        message: dict[str, Any] = {"id": state.panel.id, "version": state.version, "error": error}
        state.full = _dump({**message, "rows": rows})
        state.delta = ""
        if state.version > 1 and state.panel.kind in _BY_DIFFERENCE and not error and not had_error:
            changed, removed = difference(before, rows, key_columns(state.panel))
            delta = _dump({**message, "base": state.version - 1, "set": changed, "remove": removed})
            if len(delta) < len(state.full):
                state.delta = delta
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _query_advice(error: QueryFailed) -> str:
    if error.code in (36, 46, 47, 60, 81):  # a view, column or database that is not there
        return "The database lacks a view or column of this version: run gpuledger db migrate."
    code = "" if error.code is None else f" (ClickHouse error {error.code})"
    return f"The query of this panel failed{code}; the page's log has the whole text."


def _iso(at: datetime | None) -> str | None:
    return None if at is None else at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _dump(message: dict[str, Any]) -> str:
    return json.dumps(message, separators=(",", ":"), ensure_ascii=False)
