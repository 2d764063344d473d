"""The page "Why you can trust a number" adds up: its tables, the amounts between them, and the commands it names."""

from __future__ import annotations

import re
from decimal import Decimal
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from gpuledger.agents.simulator.fleet import seeded_uuid
from gpuledger.agents.simulator.scenario import demo_scenario_path
from tests.docs.test_documents import commands

PAGE = Path(__file__).parents[2] / "docs" / "trust.md"
TEXT = PAGE.read_text(encoding="utf-8")
NUMBER = re.compile(r"-?[\d,]+(?:\.\d+)?")

Table = list[dict[str, str]]


def tables() -> dict[str, Table]:
    """The tables that end with a sum, by their first column's heading."""
    found: dict[str, Table] = {}
    for block in re.findall(r"(?:^\|.*\n)+", TEXT, re.MULTILINE):
        head, _, *rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in block.splitlines()]
        table = [dict(zip(head, row, strict=True)) for row in rows]
        if table[-1][head[0]] == "sum":
            found[head[0]] = table
    return found


def amount(cell: str) -> Decimal:
    assert NUMBER.fullmatch(cell), cell
    return Decimal(cell.replace(",", ""))


def total(table: Table, column: str) -> Decimal:
    return amount(table[-1][column])


def cell(table: Table, row: str, column: str) -> Decimal:
    """The amount in the row that begins with `row`."""
    (found,) = [each for each in table if next(iter(each.values())).startswith(row)]
    return amount(found[column])


@pytest.mark.parametrize("name", tables())
def test_every_table_with_a_sum_adds_up(name: str) -> None:
    *rows, last = tables()[name]
    summed = [column for column, text in last.items() if text and text != "sum"]
    assert summed
    for column in summed:
        assert sum(amount(row[column]) for row in rows if row[column]) == amount(last[column]), column


def test_samples_are_differences_of_the_counter() -> None:
    *rows, _ = tables()["sample, UTC"]
    counters = [amount(row["energy counter, mJ"]) for row in rows]
    told = [amount(row["since the one before, mJ"]) for row in rows[1:]]
    assert told == [after - before for before, after in pairwise(counters)]


def test_the_amounts_of_each_step_are_those_of_the_step_before() -> None:
    found = tables()
    fragments, minutes, charges, payers = (found[name] for name in ("seen", "minute", "job did", "who"))
    activities = ("active", "idle", "unobserved")
    # Fragments to the minute, and the counter's two ends that the text names.
    assert total(fragments, "GPU-us") == 60_000_000
    for activity in ("active", "idle"):
        assert cell(fragments, activity, "GPU-us") == cell(minutes, "11:58", f"{activity}, GPU-us")
    assert total(fragments, "mJ") == cell(minutes, "11:58", "known energy, mJ")
    first, last = re.findall(r"counter went from ([\d,]+) to ([\d,]+) mJ", TEXT)[0]
    assert amount(last) - amount(first) == total(fragments, "mJ")
    # Each minute is whole, but the first: the GPU came into service six seconds before its end.
    for row, whole in (("11:57", 6_000_000), ("11:58", 60_000_000), ("11:59", 60_000_000)):
        assert sum(cell(minutes, row, f"{activity}, GPU-us") for activity in activities) == whole
    # Minutes to the price interval.
    for activity in activities:
        assert total(minutes, f"{activity}, GPU-us") == cell(charges, activity, "GPU-us")
    assert sum(total(minutes, f"{activity}, GPU-us") for activity in activities) == total(charges, "GPU-us")
    # The interval's row of the tenant holds the job's.
    assert total(charges, "charge, EUR") < cell(payers, "skald-studio", "charge, EUR")


def test_the_charge_is_time_times_the_rate_cards_price() -> None:
    scenario = yaml.safe_load(demo_scenario_path().read_text(encoding="utf-8"))
    (card,) = [card for card in scenario["rate_cards"] if card["pool"] == "narvik-h100" and "tenant" not in card]
    charges, payers = tables()["job did"], tables()["who"]
    price = Decimal(str(card["per_gpu_hour"]))
    assert f"EUR {price} per GPU-hour" in TEXT
    assert total(charges, "charge, EUR") == total(charges, "GPU-us") * price / 3_600_000_000
    assert TEXT.count(f"{total(charges, 'charge, EUR'):f}") == 3
    # What nobody reserved is charged by the same card, so that the tenant's sum is too.
    tenant = cell(payers, "skald-studio", "GPU-us") * price / 3_600_000_000
    assert abs(cell(payers, "skald-studio", "charge, EUR") - tenant) < Decimal("0.00000003")


def test_the_asset_cost_is_the_demos() -> None:
    scenario = yaml.safe_load(demo_scenario_path().read_text(encoding="utf-8"))
    (cost,) = [cost for cost in scenario["asset_costs"] if cost["pool"] == "narvik-h100"]
    (pool,) = [pool for pool in scenario["pools"] if pool["name"] == "narvik-h100"]
    payers, charges = tables()["who"], tables()["job did"]
    fixed = Decimal(str(cost["period_cost"])) * 3 / (cost["period_days"] * 24 * 60)
    assert f"{fixed:.9f} for these three" in " ".join(TEXT.split())
    energy = Decimal(re.findall(r"fixed and ([\d.]+) for energy", TEXT)[0])
    assert fixed + energy == total(payers, "asset cost, EUR")
    gpus = pool["nodes"] * pool["gpus_per_node"]
    assert f"{gpus} GPUs for 126 seconds" in TEXT
    assert total(payers, "GPU-us") == gpus * total(charges, "GPU-us")
    share = fixed * total(charges, "GPU-us") / total(payers, "GPU-us")
    mine = total(charges, "asset cost, EUR") - total(charges, "of it energy, EUR")
    assert abs(mine - share) < Decimal("0.000000003")


def test_the_gpu_is_one_of_the_demos() -> None:
    scenario = yaml.safe_load(demo_scenario_path().read_text(encoding="utf-8"))
    (name,) = set(re.findall(r"GPU-[0-9a-f-]{36}", TEXT))
    assert name in {f"GPU-{seeded_uuid(scenario['seed'], 'narvik-h100-0015', index)}" for index in range(8)}


def test_it_names_the_commands_that_show_each_step() -> None:
    named = {" ".join(line.split()[1:3]) for line in commands(TEXT)}
    assert {"up --data", "ledger explain", "ledger show", "cost --pool"} <= named
    assert "`gpuledger audit`" in TEXT


def test_it_is_linked_from_where_people_look() -> None:
    root = PAGE.parents[1]
    for path in (root / "README.md", root / "docs" / "README.md", root / "docs" / "user-guide.md"):
        assert "trust.md" in path.read_text(encoding="utf-8"), path
