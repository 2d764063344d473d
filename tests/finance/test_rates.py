"""Which price holds when: cards, tariffs, and the intervals inside which nothing changes."""

from __future__ import annotations

import itertools
from decimal import Decimal

import pytest

from gpuledger.finance.rates import Rate, newest, price_intervals, rates_from
from gpuledger.finance.tariffs import Tariff
from tests.finance.builders import asset_cost, ms, rate_card, tariff


def intervals(start: str, end: str, *events: Rate, minutes: int = 15) -> list[tuple[str, str]]:
    found = price_intervals("p", ms(start), ms(end), rates_from(events), minutes)
    names = {ms(f"2026-01-01T{h:02d}:{m:02d}"): f"{h:02d}:{m:02d}" for h in range(24) for m in range(60)}
    return [(names[a], names[b]) for a, b in found]


def test_own_card_beats_the_one_for_everybody() -> None:
    everybody, own = rate_card(), rate_card(id="own", tenant="a", start_ms=ms("2026-02-01"), end_ms=ms("2026-03-01"))
    rates = rates_from([own, everybody])
    assert rates.rate_card("p", "a", ms("2025-12-31")) is None
    assert rates.rate_card("p", "a", ms("2026-01-31")) is everybody
    assert rates.rate_card("p", "a", ms("2026-02-01")) is own
    assert rates.rate_card("p", "b", ms("2026-02-01")) is everybody
    assert rates.rate_card("p", "a", ms("2026-03-01")) is everybody
    assert rates.rate_card("q", "a", ms("2026-02-01")) is None
    assert rates.rate_card("p", "", ms("2026-02-01")) is None, "the operator pays nobody"


def test_a_card_withdrawn_by_an_empty_interval_prices_nothing() -> None:
    assert rates_from([rate_card(end_ms=ms("2026-01-01"))]).rate_card("p", "a", ms("2026-01-01")) is None


def test_the_greatest_revision_is_the_fact_in_any_order() -> None:
    old, new = rate_card(), rate_card(revision=2, per_gpu_hour=Decimal(3))
    tie = rate_card(revision=2, per_gpu_hour=Decimal(4))
    assert newest([old, new]) == newest([new, old]) == [new]
    assert newest([new, tie]) == newest([tie, new])


def test_prices_by_time_and_their_gaps() -> None:
    power = Tariff(tariff({"2026-01-01T01:00": "0.1", "2026-01-01T02:00": "-0.2"}, "2026-01-01T03:00"))
    assert power.price(ms("2026-01-01T00:59")) is None
    assert power.price(ms("2026-01-01T01:59")) == Decimal("0.1")
    assert power.price(ms("2026-01-01T02:00")) == Decimal("-0.2")
    assert power.price(ms("2026-01-01T03:00")) is None
    assert power.cuts(ms("2026-01-01"), ms("2026-01-02")) == [ms(f"2026-01-01T0{h}:00") for h in (1, 2, 3)]
    assert power.cuts(ms("2026-01-01T01:00"), ms("2026-01-01T03:00")) == [ms("2026-01-01T02:00")]


def test_equal_prices_in_a_row_make_no_cut() -> None:
    power = Tariff(
        tariff({"2026-01-01T00:00": "0.1", "2026-01-01T00:15": "0.10", "2026-01-01T00:30": "0.2"}, "2026-01-02")
    )
    assert power.cuts(ms("2026-01-01"), ms("2026-01-01T01:00")) == [ms("2026-01-01T00:30")]


def test_the_grid_alone_gives_whole_intervals() -> None:
    assert intervals("2026-01-01T00:07", "2026-01-01T00:31") == [
        ("00:00", "00:15"),
        ("00:15", "00:30"),
        ("00:30", "00:45"),
    ]
    assert intervals("2026-01-01T00:15", "2026-01-01T00:30") == [("00:15", "00:30")]
    assert intervals("2026-01-01T00:15", "2026-01-01T00:15") == []
    assert intervals("2026-01-01T00:15", "2026-01-01T00:16", minutes=60) == [("00:00", "01:00")]


def test_a_change_inside_an_hour_cuts_it() -> None:
    changes: list[Rate] = [
        asset_cost(start_ms=ms("2026-01-01T00:05"), tariff="power"),
        tariff({"2026-01-01T00:00": "0.1", "2026-01-01T00:20": "0.2"}, "2026-01-01T00:50"),
        rate_card(start_ms=ms("2026-01-01T00:31"), tenant="a"),
        rate_card(id="other pool", pool="q", start_ms=ms("2026-01-01T00:03")),
    ]
    edges = ["00:00", "00:05", "00:20", "00:31", "00:50", "01:00"]
    assert intervals("2026-01-01T00:00", "2026-01-01T01:00", *changes, minutes=60) == list(itertools.pairwise(edges))
    # A range in the middle is given by the intervals that it meets.
    assert intervals("2026-01-01T00:20", "2026-01-01T00:32", *changes, minutes=60) == [
        ("00:20", "00:31"),
        ("00:31", "00:50"),
    ]


def test_a_tariff_that_nothing_names_cuts_nothing() -> None:
    power = tariff({"2026-01-01T00:00": "0.1", "2026-01-01T00:20": "0.2"}, "2026-01-01T00:50")
    assert intervals("2026-01-01", "2026-01-01T01:00", asset_cost(), power, minutes=60) == [("00:00", "01:00")]


def test_no_interval_is_refused() -> None:
    with pytest.raises(ValueError, match="1 or more"):
        price_intervals("p", 0, 1, rates_from([]), 0)
