"""Grafana's files: they follow Grafana's own schema and the rules of dashboard-linter that apply to SQL."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from jsonschema import Draft7Validator

from gpuledger.cli.main import cli
from gpuledger.dashboards.boards import BOARDS
from gpuledger.dashboards.grafana import dashboard
from gpuledger.dashboards.panels import Board
from gpuledger.dashboards.provisioning import DataSource, build_files

SHARED = Path(__file__).parents[3] / "shared" / "data" / "grafana-jsonschema"
EACH_BOARD = pytest.mark.parametrize("board", BOARDS.values(), ids=BOARDS)


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    path = SHARED / "dashboard.jsonschema.json.gz"
    if not path.exists():
        pytest.skip("Grafana's JSON Schema is not there: ../shared/data/grafana-jsonschema")
    found: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
    # Known false positives: both are `any` in Grafana (an override's matcher by name is a string, its value whatever
    # the property takes), and the generator of the schema made them objects.
    found["definitions"]["MatcherConfig"]["properties"]["options"] = {}
    found["definitions"]["DynamicConfigValue"]["properties"]["value"] = {}
    return found


def complaints(schema: dict[str, Any], document: dict[str, Any]) -> list[str]:
    errors = Draft7Validator(schema).iter_errors(document)
    return ["/".join(map(str, error.absolute_path)) + ": " + error.message[:200] for error in errors]


@pytest.mark.realdata
@pytest.mark.parametrize("currency", ["", "EUR"])
@EACH_BOARD
def test_each_dashboard_follows_grafanas_schema(board: Board, currency: str, schema: dict[str, Any]) -> None:
    assert complaints(schema, dashboard(board, currency)) == []


@pytest.mark.realdata
def test_the_schema_check_can_fail(schema: dict[str, Any]) -> None:
    document = dashboard(BOARDS["live"])
    document["panels"][0]["height"] = "200px"
    document["rows"] = []
    assert len(complaints(schema, document)) == 2


@EACH_BOARD
def test_ids_titles_descriptions_and_units(board: Board) -> None:
    document = dashboard(board, "EUR")
    panels = document["panels"]
    assert len(panels) == len(board.panels)
    for name in ("id", "title"):
        values = [panel[name] for panel in panels]
        assert len(set(values)) == len(values), name
    for panel in panels:
        assert len(panel["description"]) >= 40
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["maxDataPoints"] >= 1000
        assert panel["type"] != "sankey", "Grafana has none of its own"


@EACH_BOARD
def test_every_target_is_a_query_of_the_plugin_on_the_variable(board: Board) -> None:
    document = dashboard(board)
    (variable,) = document["templating"]["list"]
    assert (variable["type"], variable["name"]) == ("datasource", "datasource")
    source = {"type": "grafana-clickhouse-datasource", "uid": "${datasource}"}
    for panel, definition in zip(document["panels"], board.panels, strict=True):
        (target,) = panel["targets"]
        assert target["rawSql"] == definition.sql
        assert target["datasource"] == panel["datasource"] == source
        assert target["format"] == (0 if panel["type"] == "timeseries" else 1)
    assert [a["target"]["rawSql"] for a in document["annotations"]["list"]] == [a.sql for a in board.annotations]


@EACH_BOARD
def test_panels_do_not_overlap_and_fit_the_grid(board: Board) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard(board)["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells


@EACH_BOARD
def test_money_is_shown_in_the_currency_asked_for(board: Board) -> None:
    units = json.dumps(dashboard(board, "NOK"))
    assert "currency:NOK " in units
    assert "suffix: NOK/s" in units
    assert "currency:" not in json.dumps(dashboard(board))


def test_the_same_input_gives_the_same_bytes_and_no_password() -> None:
    source = DataSource("https://clickhouse.example:8443", "gpuledger", "grafana")
    files = build_files(BOARDS.values(), source, "EUR")
    assert files == build_files(BOARDS.values(), source, "EUR")
    (found,) = yaml.safe_load(files["datasources/gpuledger.yaml"])["datasources"]
    assert found["jsonData"] == {
        "host": "clickhouse.example", "port": 8443, "protocol": "http", "secure": True, "username": "grafana",
        "defaultDatabase": "gpuledger", "tlsSkipVerify": False,
    }  # fmt: skip
    assert found["secureJsonData"] == {"password": "$GPULEDGER_CLICKHOUSE_PASSWORD"}
    (provider,) = yaml.safe_load(files["dashboards/gpuledger.yaml"])["providers"]
    assert provider["options"]["path"].endswith("dashboards/json")


def test_the_command_writes_the_tree(tmp_path: Path) -> None:
    out = tmp_path / "grafana"
    result = CliRunner().invoke(cli, ["dashboards", "build", "--out", str(out), "--currency", "eur"])
    assert result.exit_code == 0, result.output
    written = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert written == {
        "datasources/gpuledger.yaml",
        "dashboards/gpuledger.yaml",
        *(f"dashboards/json/gpuledger-{name}.json" for name in BOARDS),
    }
    document = json.loads((out / "dashboards/json/gpuledger-live.json").read_text())
    assert document["title"] == BOARDS["live"].title


def test_the_command_says_what_is_wrong_with_a_currency(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["dashboards", "build", "--out", str(tmp_path), "--currency", "€"])
    assert result.exit_code != 0
    assert "--currency" in (result.output + str(result.exception))
