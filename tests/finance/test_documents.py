"""Files that people write become events, or errors that name the place, the value and what to write."""

from __future__ import annotations

import gzip
from decimal import Decimal
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import msgspec
import pytest

from gpuledger.finance.documents import Document, diff, parse_capacity, parse_rates, parse_tenants
from gpuledger.finance.price_series import SeriesFormat, parse_series
from gpuledger.finance.rates import rates_from
from gpuledger.finance.validation import validate
from gpuledger.schemas.events import AccountRule, AssetCost, Commitment, EnergyTariff, RateCard, Tenant, Transfer
from gpuledger.schemas.exceptions import DocumentError
from tests.finance.builders import ms

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"
PRICES = ROOT.parent / "shared" / "data" / "electricity-prices"
NOW = ms("2026-02-01")

COST = """asset_costs:
  - {pool: p, currency: EUR, period_cost: "10", start: 2026-01-01T00:00Z, end: 2027-01-01T00:00Z}
"""


def rates(text: str, files: dict[str, str] | None = None) -> Document:
    def read_text(name: str) -> str:
        try:
            return (files or {})[name]
        except KeyError:
            raise FileNotFoundError(2, "No such file or directory", name) from None

    return parse_rates(text, "rates.yaml", NOW, read_text)


def read_example(name: str) -> str:
    return (EXAMPLES / name).read_text(encoding="utf-8")


def test_the_example_rates_are_valid() -> None:
    document = parse_rates(read_example("rates.yaml"), "rates.yaml", NOW, read_example)
    everything = rates_from([e for e in document.events if isinstance(e, AssetCost | EnergyTariff | RateCard)])
    assert validate(everything, ["h100-oslo", "a100-bergen"], document.positions) == []
    # Midnight in Oslo: 23:00 UTC of the day before in winter, 22:00 in summer.
    own = everything.rate_card("h100-oslo", "acme", ms("2026-06-30T21:59"))
    later = everything.rate_card("h100-oslo", "acme", ms("2026-06-30T22:00"))
    assert own is not None and later is not None
    assert (own.per_gpu_hour, later.per_gpu_hour) == (Decimal("24.00"), Decimal("22.75"))
    spot = everything.tariffs["no2-spot"]
    assert spot.price(ms("2026-01-01T02:30")) == Decimal("-0.0024")


def test_the_example_capacity_and_tenants() -> None:
    capacity = parse_capacity(read_example("capacity.yaml"), "capacity.yaml", NOW)
    *commitments, transfer = capacity.events
    assert [e.state for e in commitments if isinstance(e, Commitment)] == ["active", "active", "proposed"]
    assert isinstance(transfer, Transfer)
    assert (transfer.from_tenant, transfer.to_tenant, transfer.start_ms) == ("acme", "nordlys", ms("2026-06-01T06:00"))
    tenants = parse_tenants(read_example("tenants.yaml"), "tenants.yaml", NOW)
    nordlys = tenants.events[1]
    assert isinstance(nordlys, Tenant)
    assert nordlys.rules[1] == AccountRule("account", "vision", start_ms=ms("2026-05-31T22:00"))


def test_applying_twice_changes_nothing_and_a_correction_replaces() -> None:
    known = {(e.kind, e.id): e for e in rates(COST).events}
    again = parse_rates(COST, "rates.yaml", NOW + 5, read_example)
    assert diff(known, again) == []
    (change,) = diff(known, rates(COST.replace('"10"', '"12.5"')))
    assert (change.action, change.fields) == ("changed", (("period_cost", Decimal(10), Decimal("12.5")),))
    assert change.event.revision == NOW + 1, "a correction made within the same millisecond still wins"
    ahead = {key: msgspec.structs.replace(e, revision=NOW + 10**6) for key, e in known.items()}
    assert diff(ahead, rates(COST.replace('"10"', '"12.5"')))[0].event.revision == NOW + 10**6 + 1
    assert [c.action for c in diff({}, rates(COST))] == ["new"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('"10"', "2.5"), 'rates.yaml: asset_costs[0].period_cost: expected a decimal string, got 2.5; write "2.5"'),
        (('"10"', "2.50"), 'asset_costs[0].period_cost: expected a decimal string, got 2.50; write "2.50"'),
        (('"10"', '"2,50"'), 'asset_costs[0].period_cost: expected a decimal with a point, got "2,50"; write "2.50"'),
        (('"10"', '"1.234,50"'), 'write "1234.50"'),
        (('"10"', '"1,234,567"'), 'write "1234567"'),
        (('"10"', '"ten"'), 'expected a decimal string, got "ten"'),
        (('"10"', "NaN"), "expected a decimal string, got"),
        (('"10"', '"inf"'), "expected a decimal string"),
        (('"10"', '"0.1234567891"'), "asset_costs[0]: period_cost: 0.1234567891 has more than 9 decimals; round it"),
        (('"10"', '"1e21"'), "asset_costs[0]: period_cost: 1E+21 is too large; check the decimal point"),
        (("2026-01-01T00:00Z", "2026-01-01"), "asset_costs[0].start: 2026-01-01T00:00:00 has no time zone; write"),
        (("2026-01-01T00:00Z", "soon"), "asset_costs[0].start: expected a time, got soon"),
        (("2026-01-01T00:00Z", "2026-01-01T00:00:30Z"), "asset_costs[0]: start: 1767225630000 is not on a UTC minute"),
        (("2026-01-01T00:00Z", "2028-01-01T00:00Z"), "asset_costs[0]: end: 1798761600000 is before start"),
        (("currency: EUR", "currency: euro"), "asset_costs[0]: "),
        (("currency: EUR, ", ""), "rates.yaml: asset_costs[0].currency: is missing"),
        (("currency", "curency"), "asset_costs[0].curency: there is no such field; write currency"),
        (("asset_costs:", "assets:"), "rates.yaml: assets: there is no such field; write asset_costs"),
        (("pool: p", "pool: 7"), 'asset_costs[0].pool: expected text, got 7; write "7"'),
        (("asset_costs:", "timezone: Oslo\nasset_costs:"), 'timezone: expected the name of a time zone, got \'Oslo\''),
        ((COST, ""), "rates.yaml: expected fields, got None"),
        ((COST, "asset_costs: []"), "rates.yaml: there is nothing in it"),
        ((COST, "asset_costs: 3"), "asset_costs: expected a list, got 3"),
        ((COST, "a: [\n"), "rates.yaml:2:1: "),
    ],
)  # fmt: skip
def test_wrong_values_are_named(change: tuple[str, str], message: str) -> None:
    assert change[0] in COST
    with pytest.raises(DocumentError) as caught:
        rates(COST.replace(*change))
    assert message in str(caught.value)


def test_all_problems_are_shown_at_once() -> None:
    with pytest.raises(DocumentError) as caught:
        rates(COST.replace('"10"', "1.5").replace("pool: p, ", ""))
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("time", "message"),
    [
        ("2026-03-29T02:30", "does not exist in Europe/Oslo: clocks were set forward"),
        ("2026-10-25T02:30", "comes twice in Europe/Oslo: clocks were set back"),
    ],
)
def test_hours_that_clocks_skip_or_repeat(time: str, message: str) -> None:
    with pytest.raises(DocumentError, match=message):
        rates("timezone: Europe/Oslo\n" + COST.replace("2026-01-01T00:00Z", time))
    offset = rates(COST.replace("2026-01-01T00:00Z", "2026-10-25T02:30+01:00")).events[0]
    assert isinstance(offset, AssetCost) and offset.start_ms == ms("2026-10-25T01:30")


def test_two_entries_about_the_same() -> None:
    two = COST + COST.splitlines()[1] + "\n"
    with pytest.raises(DocumentError, match=r"asset_costs\[1\]: is about the same as rates.yaml: asset_costs\[0\]"):
        rates(two)


def test_rules_of_tenants() -> None:
    text = "tenants:\n  - {id: a, rules: [{account: x, user: y}]}\n"
    with pytest.raises(DocumentError, match=r"tenants\[0\].rules\[0\]: expected one of .* got account and user"):
        parse_tenants(text, "tenants.yaml", NOW)
    with pytest.raises(DocumentError, match=r"tenants\[0\]: .*slrum"):
        parse_tenants("tenants:\n  - {id: a, rules: [{account: x, source: slrum}]}\n", "tenants.yaml", NOW)


def test_capacity_between_one_tenant_is_refused() -> None:
    text = "transfers:\n  - {pool: p, gpus: 1, from: a, to: a, start: 2026-01-01T00:00Z}\n"
    with pytest.raises(DocumentError, match=r"transfers\[0\]: to: is from \(a\)"):
        parse_capacity(text, "capacity.yaml", NOW)


# -- price series ---------------------------------------------------------------------------------------------------


def series(rows: list[str], zone: str | None = "Europe/Berlin", **form: Any) -> list[tuple[int, Decimal]]:
    text = "time,price\n" + "\n".join(rows)
    points, end = parse_series(text, SeriesFormat(zone=ZoneInfo(zone) if zone else None, **form))
    assert end > points[-1].start_ms
    return [(point.start_ms, point.per_kwh) for point in points]


def test_a_day_of_23_and_a_day_of_25_hours() -> None:
    # 2026-03-29: 02:00 does not exist, so 01:00 CET (00:00 UTC) is followed by 03:00 CEST (01:00 UTC).
    spring = series([f"2026-03-29T{h:02d}:00,{h}" for h in range(24) if h != 2])
    assert len(spring) == 23
    assert [start for start, _ in spring] == list(range(ms("2026-03-28T23:00"), ms("2026-03-29T22:00"), 3_600_000))
    # 2026-10-25: 02:00 comes twice, in CEST (00:00 UTC) and in CET (01:00 UTC).
    autumn = series([f"2026-10-25T{h:02d}:00,{n}" for n, h in enumerate([0, 1, 2, *range(2, 24)])])
    assert len(autumn) == 25
    assert autumn[2] == (ms("2026-10-25T00:00"), Decimal(2)) and autumn[3] == (ms("2026-10-25T01:00"), Decimal(3))
    assert autumn[-1][0] == ms("2026-10-25T22:00")


def test_quarter_hours_through_the_repeated_hour() -> None:
    twice = [f"02:{m:02d}" for m in (0, 15, 30, 45)] * 2
    found = series([f"2026-10-25T{time},1" for time in ["01:45", *twice, "03:00"]], resolution_minutes=15)
    assert [start for start, _ in found] == list(range(ms("2026-10-24T23:45"), ms("2026-10-25T02:15"), 900_000))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            ["2026-01-01T00:00Z,1", "2026-01-01T02:00Z,1"],
            "line 3: no price from 2026-01-01T01:00Z to 2026-01-01T02:00Z",
        ),
        (["2026-01-01T00:00Z,1", "2026-01-01T00:00Z,1"], "line 3: 2026-01-01T00:00Z is there twice"),
        (["2026-10-25T02:00,1", "2026-10-25T03:00,1"], "line 3: no price from 2026-10-25T01:00Z to 2026-10-25T02:00Z"),
        (["2026-03-29T01:00,1", "2026-03-29T02:00,1"], "line 3: 2026-03-29T02:00:00 does not exist"),
        (['2026-01-01T00:00Z,"1,5"'], 'line 2: expected a decimal with a point, got "1,5"; write "1.5"'),
        (["2026-01-01T00:00Z"], "line 2: expected a decimal string, got None"),
        (["noon,1"], "line 2: Invalid isoformat string"),
        ([], "line 1: there are no prices"),
    ],
)
def test_what_is_wrong_with_a_series(rows: list[str], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        series(rows)
    assert message in str(caught.value)


def test_units_are_exact() -> None:
    assert series(["2026-01-01T00:00Z,-13.78"], None, unit="per_mwh")[0][1] == Decimal("-0.01378")
    assert series(["2026-01-01T00:00Z,15.2"], None, unit="cents_per_kwh")[0][1] == Decimal("0.152")


def test_a_series_in_a_rates_file() -> None:
    tariff = "energy_tariffs:\n  - {id: t, currency: EUR, prices_csv: p.csv, timezone: Europe/Berlin}\n"
    (event,) = rates(tariff, {"p.csv": "time,price\n2026-01-01T00:00,0.1\n2026-01-01T01:00,0.2\n"}).events
    assert isinstance(event, EnergyTariff)
    assert (event.prices[0].start_ms, event.end_ms) == (ms("2025-12-31T23:00"), ms("2026-01-01T01:00"))
    with pytest.raises(DocumentError, match=r"energy_tariffs\[0\].prices_csv: cannot read p.csv: No such file"):
        rates(tariff)
    with pytest.raises(DocumentError, match=r"energy_tariffs\[0\].prices_csv: p.csv, line 1: there is no column price"):
        rates(tariff, {"p.csv": "time,eur\n"})
    with pytest.raises(DocumentError, match="either `prices` or `prices_csv`"):
        rates("energy_tariffs:\n  - {id: t, currency: EUR}\n")
    with pytest.raises(DocumentError, match="end: is missing"):
        rates('energy_tariffs:\n  - {id: t, currency: EUR, prices: [{start: 2026-01-01T00:00Z, per_kwh: "1"}]}\n')
    with pytest.raises(DocumentError, match="unit: expected one of per_kwh"):
        rates(tariff.replace("prices_csv", "unit: EUR/MWh, prices_csv"))


@pytest.mark.realdata
def test_a_real_series_of_finland() -> None:
    file = PRICES / "fi_hourly_2023-01_2024-02.csv.gz"
    if not file.exists():
        pytest.skip(f"{file.name} is not beside the project")
    text = gzip.decompress(file.read_bytes()).decode()
    form = SeriesFormat(time_column="hour", price_column="price", unit="cents_per_kwh")
    points, end = parse_series(text, form)
    assert points[0].start_ms == ms("2023-01-01")
    assert (end - points[0].start_ms) // 3_600_000 == len(points) == text.count("\n") - 1 + (not text.endswith("\n"))
    assert min(point.per_kwh for point in points) < 0


@pytest.mark.realdata
def test_a_real_series_that_hides_the_change_of_clocks_is_refused() -> None:
    file = PRICES / "epex_de_2016_2017.csv.gz"
    if not file.exists():
        pytest.skip(f"{file.name} is not beside the project")
    form = SeriesFormat("time_local", "eur_per_mwh", "per_mwh", zone=ZoneInfo("Europe/Berlin"))
    with pytest.raises(ValueError, match="2016-03-27T02:00:00 does not exist in Europe/Berlin"):
        parse_series(gzip.decompress(file.read_bytes()).decode(), form)
