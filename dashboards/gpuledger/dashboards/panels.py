"""What a dashboard is: panels with SQL on the `v_…` views, a unit, thresholds and a description. Grafana and our own
page both draw these definitions, so the two can never disagree.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from gpuledger.dashboards.exceptions import PanelError

__all__ = ["RANGES", "Annotation", "Board", "Column", "Kind", "Panel", "Threshold", "Unit", "problems"]

Kind = Literal["timeseries", "stat", "bargauge", "barchart", "donut", "table", "sankey", "statetimeline"]
#: money… amounts carry their currency in a column of role "currency"; `share` is 0 to 1; `gpus` may be a fraction.
Unit = Literal["", "money", "money_per_second", "money_per_hour", "gpus", "share", "count", "time", "status"]
#: time: x axis · series: one line or state row each · category: one bar or slice each · value: what is drawn ·
#: second: drawn beside it, paler · source, target: ends of a flow · mark: 1 = stands out · currency: of the amounts ·
#: under: shown below the first column · detail: shown in tables and texts only.
Role = Literal[
    "time", "series", "category", "value", "second", "source", "target", "mark", "currency", "under", "detail"
]

#: Time ranges by name: seconds before now, or None for "since midnight UTC".
RANGES: dict[str, int | None] = {"1h": 3_600, "6h": 21_600, "24h": 86_400, "today": None}


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a panel's result, in the order of its SELECT."""

    name: str
    title: str
    role: Role = "detail"
    unit: Unit = ""


@dataclass(frozen=True, slots=True)
class Threshold:
    """From `value` upwards the panel is `status`."""

    value: float
    status: Literal["ok", "warn", "bad"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One panel. `description` says what it shows, what a bad value means and what to do; `empty` what to do when the
    query returns no rows. `key` names the columns that identify a row. `width` counts 24ths, `height` Grafana's rows.
    `range` "" is the board's; `refresh_s` is how often the page asks, `step_s` the distance of points in time,
    `look` how the page draws a table.
    """

    id: str
    title: str
    description: str
    kind: Kind
    sql: str
    columns: tuple[Column, ...]
    empty: str
    key: tuple[str, ...] = ()
    unit: Unit = ""
    thresholds: tuple[Threshold, ...] = ()
    width: int = 12
    height: int = 8
    range: str = ""
    refresh_s: int = 2
    step_s: int = 60
    stacked: bool = True
    look: Literal["table", "checks", "alerts", "moves", "gaps"] = "table"

    def column(self, role: Role) -> Column | None:
        """The first column of a role."""
        return next((column for column in self.columns if column.role == role), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotation:
    """Instants to mark on a board's time series: rows of (time, text)."""

    id: str
    title: str
    sql: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """A dashboard. `status` names the panel whose column of unit status makes the badge in the page's header."""

    id: str
    title: str
    description: str
    panels: tuple[Panel, ...]
    annotations: tuple[Annotation, ...] = ()
    range: str = "1h"
    status: str = ""
    tags: tuple[str, ...] = field(default=("gpuledger",))

    def __post_init__(self) -> None:
        if found := list(problems(self)):
            raise PanelError("; ".join(found))


_LEDGER_VIEWS = re.compile(
    r"\bv_(ledger_minute|gpu_minute|gpu_hour|job_hour|charges|asset_cost|recomputes|cost_minute|gpus_minute|money"
    r"|minute_state|live_now|running_jobs)\b"
)
_TABLES = re.compile(r"\b(?:FROM|JOIN)\s+(?!v_|\()(\w+)", re.IGNORECASE)


def problems(board: Board) -> Iterator[str]:
    """What is wrong with a board, each starting with the panel's id. The rules hold for every board."""
    ids = [panel.id for panel in board.panels] + [annotation.id for annotation in board.annotations]
    titles = [panel.title for panel in board.panels]
    for name in sorted({name for name in ids if ids.count(name) > 1}):
        yield f"{name}: two panels have this id; make it unique"
    for title in sorted({title for title in titles if titles.count(title) > 1}):
        yield f"{title!r}: two panels have this title; make it unique"
    if board.status and board.status not in ids:
        yield f"status: names {board.status!r}, which is no panel of {board.id}"
    for panel in board.panels:
        yield from (f"{panel.id}: {problem}" for problem in _panel_problems(panel))


def _panel_problems(panel: Panel) -> Iterator[str]:
    names = [column.name for column in panel.columns]
    if len(panel.description) < 40:
        yield "description: say what it shows, what a bad value means and what to do"
    if not panel.empty:
        yield "empty: say what to do when there are no rows"
    if not panel.unit and panel.kind != "table":
        yield f"unit: missing, and a {panel.kind} needs one"
    if panel.range and panel.range not in RANGES:
        yield f"range: {panel.range!r} is unknown; expected one of {', '.join(RANGES)}"
    for name in panel.key:
        if name not in names:
            yield f"key: {name!r} is no column of the panel"
    if panel.kind in ("timeseries", "statetimeline"):
        if not panel.key:
            yield "key: a panel over time needs one; its rows are sent by difference"
        if panel.column("time") is None or panel.column("series") is None:
            yield "columns: a panel over time needs one of role time and one of role series"
    if panel.kind != "table" and panel.column("value") is None:
        yield "columns: one must have the role value"
    if _LEDGER_VIEWS.search(panel.sql) and not re.search(r"\$__(timeFilter|fromTime|toTime)", panel.sql):
        yield "sql: reads the ledger without a time macro ($__timeFilter(minute) or $__fromTime and $__toTime)"
    for table in _TABLES.findall(panel.sql):
        yield f"sql: reads {table}; a panel reads v_… views only"
