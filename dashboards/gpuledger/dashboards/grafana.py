"""The boards as Grafana dashboards: grafanalib makes them of the same panels that our page draws, then what its output
has from Grafana's past is taken out.

Two things differ from the page, because Grafana has nothing for them: a Sankey is a table of the same rows, and amounts
have one currency for the whole dashboard, chosen when it is built.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from grafanalib import core
from grafanalib._gen import DashboardEncoder

from gpuledger.dashboards.panels import Annotation, Board, Column, Panel, Threshold, Unit

#: grafanalib's classes are made by attrs in a way that type checkers cannot follow.
gl = cast("Any", core)

__all__ = ["DATA_SOURCE_TYPE", "PLUGIN_VERSION", "SCHEMA_VERSION", "dashboard"]

DATA_SOURCE_TYPE = "grafana-clickhouse-datasource"
PLUGIN_VERSION = "4.20.0"
#: Grafana 11's; 12 migrates it upwards by itself, a newer number would not load cleanly in 11.
SCHEMA_VERSION = 39
_DATA_SOURCE = {"type": DATA_SOURCE_TYPE, "uid": "${datasource}"}
_TIME_SERIES, _TABLE = 0, 1
_STATUS_COLOURS = {
    "ok": "green", "complete": "green", "done": "green", "info": "blue", "open": "blue", "planned": "blue",
    "warn": "orange", "warning": "orange", "bad": "red", "critical": "red", "unbalanced": "red", "unknown": "text",
}  # fmt: skip
_TIME_FROM = {"today": "now/d", "24h": "24h", "6h": "6h", "1h": "1h"}


class ClickHouseTarget(core.SqlTarget):
    """A query of Grafana's ClickHouse plugin; `layout` is the plugin's `format`: 0 time series, 1 table."""

    def __init__(self, sql: str, layout: int) -> None:
        super().__init__()
        self.rawSql = sql
        self.layout = layout

    def to_json_data(self) -> dict[str, Any]:
        return {
            "refId": "A",
            "datasource": _DATA_SOURCE,
            "editorType": "sql",
            "rawSql": self.rawSql,
            "format": self.layout,
            "queryType": "table" if self.layout == _TABLE else "timeseries",
            "pluginVersion": PLUGIN_VERSION,
        }


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a panel stands, and the currency of its amounts ("" unknown)."""

    number: int
    x: int
    y: int
    currency: str


def dashboard(board: Board, currency: str = "") -> dict[str, Any]:
    """The JSON document of a board. `currency` is the ISO code that amounts are shown in; "" shows bare numbers."""
    panels = [_panel(panel, place) for panel, place in _places(board, currency)]
    made = gl.Dashboard(
        title=board.title,
        description=board.description,
        uid=f"gpuledger-{board.id}",
        tags=list(board.tags),
        timezone="utc",
        refresh="5s",
        graphTooltip=gl.GRAPH_TOOLTIP_MODE_SHARED_CROSSHAIR,
        time=gl.Time(f"now-{board.range}", "now"),
        panels=panels,
    )
    document = json.loads(json.dumps(made.to_json_data(), cls=DashboardEncoder))
    return _modern(document, board)


def _places(board: Board, currency: str) -> Iterator[tuple[Panel, _Place]]:
    """Panels side by side in their order, a new row where the next does not fit into 24."""
    x = y = row_height = 0
    for number, panel in enumerate(board.panels, start=1):
        if x + panel.width > 24:
            x, y, row_height = 0, y + row_height, 0
        yield panel, _Place(number, x, y, currency)
        x, row_height = x + panel.width, max(row_height, panel.height)


def _panel(panel: Panel, place: _Place) -> Any:
    layout = _TIME_SERIES if panel.kind == "timeseries" else _TABLE
    common: dict[str, Any] = {
        "title": panel.title,
        "description": panel.description,
        "dataSource": _DATA_SOURCE,
        "targets": [ClickHouseTarget(panel.sql, layout)],
        "id": place.number,
        "gridPos": gl.GridPos(h=panel.height, w=panel.width, x=place.x, y=place.y),
        "maxDataPoints": 1000,
    }
    if panel.range:
        common |= {"timeFrom": _TIME_FROM[panel.range]}
    return _KINDS[panel.kind](panel, place, common)


def _names(panel: Panel, *roles: str) -> list[str]:
    return [column.name for column in panel.columns if column.role in roles]


def _only(names: list[str]) -> dict[str, Any]:
    """Keeps these columns; panels may share a query and use part of it."""
    return {"id": "filterFieldsByName", "options": {"include": {"names": names}}}


def _unit(unit: Unit, currency: str) -> str:
    if unit.startswith("money"):
        per = {"money_per_second": "/s", "money_per_hour": "/h"}.get(unit, "")
        if per:
            return f"suffix: {currency}{per}"
        return f"currency:{currency} " if currency else "short"
    return {"share": "percentunit", "time": "dateTimeAsIso", "": "none", "status": "string"}.get(unit, "short")


def _value_unit(panel: Panel, currency: str) -> str:
    value = panel.column("value")
    return _unit(panel.unit if value is None else value.unit or panel.unit, currency)


def _extra(unit: str, options: dict[str, Any] | None = None, **defaults: Any) -> dict[str, Any]:
    """What grafanalib's classes have no argument for."""
    return {"fieldConfig": {"defaults": {"unit": unit, **defaults}}, "options": options or {}}


def _timeseries(panel: Panel, place: _Place, common: dict[str, Any]) -> Any:
    (series,) = _names(panel, "series")
    return gl.TimeSeries(
        **common,
        unit=_value_unit(panel, place.currency),
        stacking={"mode": "normal" if panel.stacked else "none", "group": "A"},
        fillOpacity=50 if panel.stacked else 0,
        lineInterpolation="stepAfter",
        showPoints="never",
        tooltipMode="multi",
        tooltipSort="desc",
        legendDisplayMode="table",
        legendPlacement="right",
        legendCalcs=["lastNotNull"],
        colorMode="palette-classic-by-name",
        axisSoftMin=0,
        extraJson={"fieldConfig": {"defaults": {"displayName": f"${{__field.labels.{series}}}"}}},
    )


def _stat(panel: Panel, place: _Place, common: dict[str, Any]) -> Any:
    (value,) = _names(panel, "value")
    return gl.Stat(
        **common,
        format=_value_unit(panel, place.currency),
        fields=f"/^{value}$/",
        reduceCalc="lastNotNull",
        graphMode="none",
        colorMode="none",
        noValue=panel.empty,
        transformations=[_only([value])],
    )


def _bargauge(panel: Panel, place: _Place, common: dict[str, Any]) -> Any:
    (category,), (value,) = _names(panel, "category"), _names(panel, "value")
    return gl.BarGauge(
        **common,
        displayMode="gradient",
        max=None,
        allValues=True,
        transformations=[_only([category, value])],
        extraJson=_extra(
            _value_unit(panel, place.currency),
            {"reduceOptions": {"calcs": ["lastNotNull"], "fields": f"/^{value}$/", "values": True}},
            noValue=panel.empty,
            color={"mode": "palette-classic-by-name"},
        ),
    )


def _barchart(panel: Panel, place: _Place, common: dict[str, Any]) -> Any:
    (category,) = _names(panel, "category")
    return gl.BarChart(
        **common,
        orientation="horizontal",
        showValue="always",
        overrides=_overrides(panel, place.currency),
        transformations=[_only([category, *_names(panel, "value", "second")])],
        extraJson=_extra(_value_unit(panel, place.currency), {"xField": category}, noValue=panel.empty),
    )


def _donut(panel: Panel, place: _Place, common: dict[str, Any]) -> Any:
    (category,), (value,) = _names(panel, "category"), _names(panel, "value")
    return gl.PieChartv2(
        **common,
        pieType="donut",
        unit=_value_unit(panel, place.currency),
        colorMode="palette-classic-by-name",
        legendDisplayMode="table",
        legendValues=["value", "percent"],
        reduceOptionsFields=f"/^{value}$/",
        reduceOptionsValues=True,
        transformations=[_only([category, value])],
        extraJson={"fieldConfig": {"defaults": {"noValue": panel.empty}}},
    )


def _statetimeline(panel: Panel, place: _Place, common: dict[str, Any]) -> Any:
    (series,) = _names(panel, "series")
    return gl.StateTimeline(
        **common,
        showValue="never",
        mappings=_status_mappings(),
        transformations=[{"id": "partitionByValues", "options": {"fields": [series], "keepFields": False}}],
        extraJson=_extra("string", displayName=f"${{__field.labels.{series}}}", noValue=panel.empty),
    )


def _table(panel: Panel, place: _Place, common: dict[str, Any]) -> Any:
    return gl.Table(
        **common,
        filterable=True,
        overrides=_overrides(panel, place.currency),
        extraJson=_extra("none", noValue=panel.empty),
    )


_KINDS: dict[str, Callable[[Panel, _Place, dict[str, Any]], Any]] = {
    "timeseries": _timeseries,
    "stat": _stat,
    "bargauge": _bargauge,
    "barchart": _barchart,
    "donut": _donut,
    "statetimeline": _statetimeline,
    "table": _table,
    # Grafana has no Sankey of its own; a plugin would be one more thing to install and to trust.
    "sankey": _table,
}


def _status_mappings() -> list[dict[str, Any]]:
    return [
        {
            "type": "value",
            "options": {
                status: {"color": colour, "index": n} for n, (status, colour) in enumerate(_STATUS_COLOURS.items())
            },
        }
    ]


def _overrides(panel: Panel, currency: str) -> list[dict[str, Any]]:
    return [
        {"matcher": {"id": "byName", "options": column.name}, "properties": list(_properties(column, currency))}
        for column in panel.columns
    ]


def _properties(column: Column, currency: str) -> Iterator[dict[str, Any]]:
    yield {"id": "displayName", "value": column.title}
    if column.unit == "status":
        yield {"id": "mappings", "value": _status_mappings()}
        yield {"id": "custom.cellOptions", "value": {"type": "color-text"}}
    elif column.unit:
        yield {"id": "unit", "value": _unit(column.unit, currency)}


_PANEL_KEYS = (
    "type",
    "id",
    "title",
    "description",
    "transparent",
    "datasource",
    "gridPos",
    "links",
    "targets",
    "maxDataPoints",
    "transformations",
    "interval",
    "timeFrom",
    "timeShift",
    "hideTimeOverride",
    "options",
    "fieldConfig",
)


def _modern(document: dict[str, Any], board: Board) -> dict[str, Any]:
    """What Grafana 11 and 12 read: no keys of older versions, no nulls, its own schema version."""
    kept = {
        name: document[name]
        for name in ("uid", "title", "description", "tags", "timezone", "editable", "graphTooltip", "time", "refresh")
    }
    made = cast("list[dict[str, Any]]", document["panels"])
    panels = [{name: part for name, part in panel.items() if name in _PANEL_KEYS} for panel in made]
    return _without_nulls(
        {
            **kept,
            "schemaVersion": SCHEMA_VERSION,
            "version": 1,
            "fiscalYearStartMonth": 0,
            "liveNow": True,
            "weekStart": "",
            "links": [],
            "panels": [
                _with_thresholds(panel, definition.thresholds)
                for panel, definition in zip(panels, board.panels, strict=True)
            ],
            "templating": {"list": [_data_source_variable()]},
            "annotations": {"list": [_annotation(annotation) for annotation in board.annotations]},
            "timepicker": {},
        }
    )


def _with_thresholds(panel: dict[str, Any], thresholds: tuple[Threshold, ...]) -> dict[str, Any]:
    """The panel with its definition's thresholds; without any, the one step that Grafana itself writes."""
    steps: list[dict[str, Any]] = [{"value": None, "color": "green"}]
    steps += [{"value": step.value, "color": _STATUS_COLOURS[step.status]} for step in thresholds]
    panel["fieldConfig"]["defaults"]["thresholds"] = {"mode": "absolute", "steps": steps}
    panel["fieldConfig"].setdefault("overrides", [])
    return panel


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        pairs = cast("dict[str, Any]", value).items()
        # The first step of a threshold has the value null: minus infinity.
        return {name: _without_nulls(part) for name, part in pairs if part is not None or name == "value"}
    if isinstance(value, list):
        return [_without_nulls(part) for part in cast("list[Any]", value)]
    return value


def _data_source_variable() -> dict[str, Any]:
    return {
        "type": "datasource",
        "name": "datasource",
        "label": "ClickHouse",
        "query": DATA_SOURCE_TYPE,
        "refresh": 1,
        "hide": 0,
        "multi": False,
        "includeAll": False,
        "regex": "",
        "options": [],
        "current": {"text": "GPULedger", "value": "gpuledger"},
    }


def _annotation(annotation: Annotation) -> dict[str, Any]:
    return {
        "name": annotation.title,
        "datasource": _DATA_SOURCE,
        "enable": True,
        "hide": False,
        "iconColor": "blue",
        "target": ClickHouseTarget(annotation.sql, _TABLE).to_json_data(),
    }
