"""The rules that every definition keeps, and that a broken one is named."""

import re
from dataclasses import replace
from importlib.resources import files

import pytest

from gpuledger.dashboards.boards import BOARDS
from gpuledger.dashboards.boards.live import COST_BY_TENANT, COST_RATE, LIVE
from gpuledger.dashboards.exceptions import PanelError
from gpuledger.dashboards.panels import Board, Column, Panel, problems


@pytest.mark.parametrize("board", BOARDS.values(), ids=BOARDS)
def test_the_boards_keep_the_rules(board: Board) -> None:
    assert list(problems(board)) == []
    assert all(panel.unit or panel.kind == "table" for panel in board.panels)


BROKEN: dict[str, tuple[Panel, str]] = {
    "a ledger panel without time filter": (
        replace(COST_RATE, id="x", title="x", sql="SELECT cost FROM v_live_now"),
        "x: sql: reads the ledger without a time macro",
    ),
    "a panel on a table": (
        replace(COST_RATE, id="x", title="x", sql="SELECT 1 FROM charges WHERE $__timeFilter(interval_start)"),
        "x: sql: reads charges; a panel reads v_",
    ),
    "no description": (replace(COST_RATE, id="x", title="x", description=""), "x: description: say what it shows"),
    "nothing to say when empty": (replace(COST_RATE, id="x", title="x", empty=""), "x: empty: say what to do"),
    "no unit": (replace(COST_RATE, id="x", title="x", unit=""), "x: unit: missing"),
    "an unknown range": (replace(COST_RATE, id="x", title="x", range="2w"), "x: range: '2w' is unknown"),
    "a key that is no column": (
        replace(COST_BY_TENANT, id="x", title="x", key=("nope",)),
        "x: key: 'nope' is no column",
    ),
    "a time series without key": (replace(COST_BY_TENANT, id="x", title="x", key=()), "x: key: a panel over time"),
    "no value": (replace(COST_RATE, id="x", title="x", columns=(Column("a", "A"),)), "x: columns: one must have"),
    "an id twice": (replace(COST_RATE, title="x"), "cost-rate: two panels have this id"),
    "a title twice": (replace(COST_RATE, id="x"), "'Cost per second': two panels have this title"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_panel_is_refused_by_name(case: str) -> None:
    panel, text = BROKEN[case]
    with pytest.raises(PanelError) as caught:
        replace(LIVE, panels=(*LIVE.panels, panel))
    assert text in str(caught.value)


def test_every_state_of_the_fleet_has_a_colour_in_both_themes_and_a_name() -> None:
    """A state without them would be shown by its key, in the grey of what nobody bears."""
    (listed,) = re.findall(r"indexOf\(\[([^\]]*)\], state\)", next(p.sql for p in LIVE.panels if p.id == "fleet-now"))
    states = set(re.findall(r"'(\w+)'", listed))
    assert "unsliced" in states
    text = files("gpuledger.dashboards").joinpath("page/static/colours.js").read_text(encoding="utf-8")
    light, dark = (re.search(rf"^  {theme}: \{{ active.*$", text, re.MULTILINE) for theme in ("light", "dark"))
    names = re.search(r"const LABELS = \{(.*?)\};", text, re.DOTALL)
    for part in (light, dark, names):
        assert part is not None
        assert states <= set(re.findall(r"(\w+): \"", part[0]))
