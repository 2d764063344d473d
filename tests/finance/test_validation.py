"""Rates that would make wrong money are refused, with the place and the fix."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest

from gpuledger.finance.rates import Rate, rates_from
from gpuledger.finance.validation import prices_end, validate
from tests.finance.builders import asset_cost, ms, rate_card, tariff

POWER = tariff({"2026-01-01": "0.1"}, "2026-01-02")


def problems(*events: Rate, **options: Any) -> list[str]:
    return validate(rates_from(events), **options)


def test_good_rates_have_no_problem() -> None:
    later = asset_cost(id="later", start_ms=ms("2026-01-02"), end_ms=ms("2026-01-03"))
    own = rate_card(id="own", tenant="a", end_ms=ms("2026-02-01"))
    assert problems(asset_cost(tariff="power"), POWER, later, rate_card(), own, pools=["p"]) == []


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        (
            [asset_cost(), asset_cost(id="b", start_ms=ms("2026-01-01T23:59"), end_ms=ms("2026-01-03"))],
            "asset_costs['b'].start: 2026-01-01T23:59Z is before the end (2026-01-02T00:00Z) of asset_costs['cost'] "
            "for pool p; end that one at 2026-01-01T23:59Z, or begin this one later",
        ),
        (
            [rate_card(), rate_card(id="b", start_ms=ms("2027-01-01"))],
            "rate_cards['b'].start: 2027-01-01T00:00Z is before the end (further notice) of rate_cards['card'] for "
            "pool p, everybody; end that one at 2027-01-01T00:00Z, or begin this one later",
        ),
        (
            [asset_cost(tariff="powr"), POWER],
            "asset_costs['cost'].tariff: there is no energy tariff 'powr'; known: power",
        ),
        (
            [asset_cost(tariff="power"), tariff({"2026-01-01T06:00": "1"}, "2026-01-02")],
            "asset_costs['cost'].tariff: power has no price from 2026-01-01T00:00Z to 2026-01-01T06:00Z; "
            "add prices from 2026-01-01T00:00Z on",
        ),
        (
            [asset_cost(tariff="power"), tariff({"2026-01-01": "1"}, "2026-01-01T06:00")],
            "asset_costs['cost'].tariff: power has no price from 2026-01-01T06:00Z to 2026-01-02T00:00Z; "
            "add prices up to 2026-01-02T00:00Z",
        ),
        (
            [asset_cost(tariff="power", currency="USD"), POWER],
            "asset_costs['cost'].tariff: power is in EUR and the asset cost in USD; give both in one currency",
        ),
        (
            [rate_card(per_gpu_hour=Decimal("2000000000"))],
            "rate_cards['card'].per_gpu_hour: 2000000000 is beyond 1000000000; check the decimal point and the unit",
        ),
    ],
)
def test_each_problem_names_place_value_and_fix(events: list[Rate], expected: str) -> None:
    assert problems(*events) == [expected]


def test_two_tenants_may_have_cards_at_one_time() -> None:
    assert problems(rate_card(id="a", tenant="a"), rate_card(id="b", tenant="b"), rate_card(id="q", pool="q")) == []


def test_unknown_pools_where_a_list_is_given() -> None:
    place = {("rate_card", "card"): "rates.yaml: rate_cards[0]"}
    expected = ["rates.yaml: rate_cards[0].pool: there is no pool 'p'; known: h100, h200"]
    assert problems(rate_card(), pools=["h200", "h100"], positions=place) == expected
    assert problems(rate_card()) == []


def test_prices_of_the_future_may_follow_later() -> None:
    events: list[Rate] = [asset_cost(tariff="power"), tariff({"2026-01-01": "1"}, "2026-01-01T06:00")]
    assert problems(*events, now_ms=ms("2026-01-01T06:00")) == []
    assert prices_end(rates_from(events), ms("2026-01-01T06:00")) == {"power": ms("2026-01-01T06:00")}
    (problem,) = problems(*events, now_ms=ms("2026-01-01T07:00"))
    assert "no price from 2026-01-01T06:00Z to 2026-01-01T07:00Z" in problem
