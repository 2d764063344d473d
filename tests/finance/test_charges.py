"""What an interval costs is borne to the nano-unit, and each tenant pays by its card."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuledger.finance.charges import KINDS, Charges, Quantities, charge_interval, no_charges
from gpuledger.finance.charges_table import charges_table
from gpuledger.finance.exact import from_nano
from gpuledger.finance.rates import Rate, price_intervals, rates_from
from tests.finance.builders import asset_cost, ms, rate_card, tariff

QUARTER = 15 * 60 * 10**6  # GPU-microseconds of one GPU in 15 minutes
T0, T1 = ms("2026-01-01T00:00"), ms("2026-01-01T00:15")
KWH = 3_600_000_000  # millijoules

Row = tuple[str, str, str, str, int, int | None]


def quantities(rows: Sequence[Row]) -> Quantities:
    """(tenant, job_id, kind, activity, gpu_us, energy_mj or None) in any order."""
    rows = sorted(rows, key=lambda row: row[:4])
    tenant, job_id, kind, activity, gpu_us, energy = zip(*rows, strict=True) if rows else ((),) * 6
    return Quantities(
        *(np.array(column, dtype=object) for column in (tenant, job_id, kind, activity)),
        gpu_us=np.array(gpu_us, dtype=np.int64),
        energy_mj=np.array([each or 0 for each in energy], dtype=np.int64),
        energy_known=np.array([each is not None for each in energy], dtype=np.bool_),
    )


def charge(rows: Sequence[Row], *events: Rate, start_ms: int = T0, end_ms: int = T1) -> Charges:
    return charge_interval("p", start_ms, end_ms, quantities(rows), rates_from(events))


def table(charges: Charges) -> dict[tuple[str, str, str, str], dict[str, Any]]:
    """Rows as ClickHouse will have them, by (tenant, job_id, kind, activity)."""
    rows = charges_table([charges], [False]).to_pylist()
    return {(row["tenant"], row["job_id"], row["kind"], row["activity"]): row for row in rows}


def test_one_interval_by_hand() -> None:
    # EUR 960 a day are 10 per quarter hour. 4 GPUs: a holds 2 (1.5 busy), 1 is reserved by b and idle, 1 is free.
    # Energy 2 + 1 + 0 + 1 kWh at 0.30 x PUE 1.2 x factor 1.0 = 1.44; per kWh 0.36.
    rows = table(
        charge(
            [
                ("a", "j1", "held", "active", 3 * QUARTER // 2, 2 * KWH),
                ("a", "j1", "held", "idle", QUARTER // 2, KWH),
                ("b", "", "reserved_unused", "", QUARTER, 0),
                ("", "", "free", "", QUARTER, KWH),
            ],
            asset_cost(tariff="power", pue=Decimal("1.2")),
            tariff({"2026-01-01": "0.30"}, "2026-01-02"),
            rate_card(reserved_unused_per_gpu_hour=Decimal("1.5")),
        )
    )
    active, idle = rows["a", "j1", "held", "active"], rows["a", "j1", "held", "idle"]
    reserved, free, marker = rows["b", "", "reserved_unused", ""], rows["", "", "free", ""], rows["", "", "marker", ""]
    assert [row["asset_cost"] for row in (active, idle, reserved, free)] == [
        Decimal("3.75") + Decimal("0.72"),
        Decimal("1.25") + Decimal("0.36"),
        Decimal("2.5"),
        Decimal("2.5") + Decimal("0.36"),
    ]
    assert [row["payer"] for row in (active, idle, reserved, free)] == ["a", "a", "b", ""]
    # 2 per GPU-hour: 1.5 GPUs for a quarter are 0.75; b pays 1.5 / 4 for what it kept; nobody pays for what is free.
    assert [row["charge"] for row in (active, idle, reserved, free)] == [
        Decimal("0.75"),
        Decimal("0.25"),
        Decimal("0.375"),
        None,
    ]
    assert marker["asset_cost"] == Decimal("11.44") and marker["energy_cost"] == Decimal("1.44")
    assert marker["gpu_us"] == 4 * QUARTER and marker["energy_mj"] == 4 * KWH
    assert not any(row["incomplete"] for row in rows.values())
    assert (active["rate_card"], active["charge_currency"], active["asset_currency"]) == ("card", "EUR", "EUR")
    assert (free["rate_card"], free["charge_currency"]) == ("", "")


def test_each_kind_has_its_payer_and_its_charge() -> None:
    rows = table(
        charge(
            [
                ("a", "j", "unconfirmed", "", QUARTER, None),
                ("a", "", "reserved_unused", "", QUARTER, None),
                ("a", "", "overcommitted", "", QUARTER, None),
                ("unattributed", "k", "held", "unobserved", QUARTER, None),
            ],
            asset_cost(),
            rate_card(reserved_unused_payer="operator"),
        )
    )
    got = {key: (row["payer"], row["asset_cost"], row["charge"]) for key, row in rows.items()}
    third = Decimal("3.333333333")
    assert got == {
        ("a", "", "overcommitted", ""): ("a", Decimal(0), Decimal(0)),  # a quantity, no cost
        ("a", "", "reserved_unused", ""): ("", third + Decimal("1e-9"), Decimal(0)),  # the card states no price for it
        ("a", "j", "unconfirmed", ""): ("unattributed", third, Decimal(0)),
        ("unattributed", "k", "held", "unobserved"): ("unattributed", third, Decimal("0.5")),
        ("", "", "marker", ""): ("", Decimal(10), None),
    }


def test_without_gpus_in_service_the_operator_bears_it_all() -> None:
    for given_rows in ([], [("a", "", "overcommitted", "", QUARTER, None)]):
        rows = table(charge(given_rows, asset_cost()))
        free = rows["", "", "free", ""]
        assert (free["gpu_us"], free["asset_cost"], free["payer"]) == (0, Decimal(10), "")
        assert rows["", "", "marker", ""]["asset_cost"] == Decimal(10)
        assert rows["", "", "marker", ""]["gpu_us"] == 0


def test_what_is_not_known_is_null_and_says_so() -> None:
    held: list[Row] = [("a", "j", "held", "active", QUARTER, KWH), ("a", "j", "held", "unobserved", QUARTER, None)]
    unpriced = table(charge(held))
    assert all(row["asset_cost"] is None and row["charge"] is None for row in unpriced.values())
    assert ("", "", "free", "") not in unpriced

    power = tariff({"2026-01-01": "0.36"}, "2026-01-02")
    partly = table(charge(held, asset_cost(tariff="power"), power))
    known, unknown = partly["a", "j", "held", "active"], partly["a", "j", "held", "unobserved"]
    marker = partly["", "", "marker", ""]
    assert (known["energy_cost"], known["asset_cost"], known["incomplete"]) == (Decimal("0.36"), Decimal("5.36"), 0)
    assert (unknown["energy_cost"], unknown["asset_cost"], unknown["incomplete"]) == (None, Decimal(5), 1)
    assert (marker["asset_cost"], marker["incomplete"]) == (Decimal("10.36"), 1)

    gap = tariff({"2026-01-01T00:15": "0.36"}, "2026-01-02")
    dollars = tariff({"2026-01-01": "0.36"}, "2026-01-02", currency="USD")
    for events in (
        [asset_cost(tariff="power"), gap],
        [asset_cost(tariff="power")],
        [asset_cost(tariff="power"), dollars],
    ):
        rows = table(charge(held, *events))
        assert all(row["energy_cost"] is None and row["incomplete"] == 1 for row in rows.values())
        assert rows["", "", "marker", ""]["asset_cost"] == Decimal(10)

    flat = table(charge(held, asset_cost()))  # no tariff: energy is part of the period's cost
    assert all(row["energy_cost"] == 0 and row["incomplete"] == 0 for row in flat.values())


def test_a_negative_price_pays_the_holders() -> None:
    power = tariff({"2026-01-01": "-0.5"}, "2026-01-02")
    rows = table(charge([("a", "j", "held", "active", QUARTER, 3 * KWH)], asset_cost(tariff="power"), power))
    assert rows["a", "j", "held", "active"]["asset_cost"] == Decimal("8.5")


def test_a_charge_rounds_once_per_job_and_interval() -> None:
    # 1 nano-unit per GPU-hour, two activities of 0.25 and 0.5 GPU-hours: 0.75 rounds to 1, held by the larger part;
    # rounding each would make 0 + 0. 0.5 of a nano-unit alone goes to the even 0.
    rows: list[Row] = [
        ("a", "j", "held", "active", QUARTER, None),
        ("a", "j", "held", "idle", 2 * QUARTER, None),
        ("a", "k", "held", "idle", 2 * QUARTER, None),
    ]
    charges = charge(rows, rate_card(per_gpu_hour=Decimal("1e-9")))
    assert charges.charge.tolist() == [0, 1, 0, 0]


def test_a_rate_change_inside_an_hour() -> None:
    # 2 per GPU-hour until 00:20, then 3; one GPU held the whole hour: 2/3 + 2 = 2.666666667, in two roundings.
    events: list[Rate] = [
        rate_card(end_ms=ms("2026-01-01T00:20")),
        rate_card(id="dearer", per_gpu_hour=Decimal(3), start_ms=ms("2026-01-01T00:20")),
    ]
    rates = rates_from(events)
    cut = price_intervals("p", T0, ms("2026-01-01T01:00"), rates, 60)
    assert len(cut) == 2
    paid = []
    for start, end in cut:
        held: list[Row] = [("a", "j", "held", "active", (end - start) * 1000, None)]
        paid.append(table(charge(held, *events, start_ms=start, end_ms=end))["a", "j", "held", "active"])
    assert [row["charge"] for row in paid] == [Decimal("0.666666667"), Decimal(2)]
    assert [row["rate_card"] for row in paid] == ["card", "dearer"]
    with pytest.raises(ValueError, match="rate card of p changes inside"):
        charge([], *events, start_ms=T0, end_ms=ms("2026-01-01T01:00"))


def test_an_interval_that_was_not_cut_is_refused() -> None:
    hour = ms("2026-01-01T01:00")
    with pytest.raises(ValueError, match="asset cost of p changes inside"):
        charge([], asset_cost(end_ms=T1), end_ms=hour)
    power = tariff({"2026-01-01": "0.1", "2026-01-01T00:15": "0.2"}, "2026-01-02")
    with pytest.raises(ValueError, match="energy price of p changes inside"):
        charge([], asset_cost(tariff="power"), power, end_ms=hour)


def test_amounts_beyond_64_bits_stay_exact() -> None:
    # 9.6e19 a day in some small currency: 1e18 a quarter, 1e27 nano-units; a GPU-hour costs 4e19, a quarter of it 1e19.
    held: list[Row] = [(t, "j", "held", "active", QUARTER, None) for t in "abc"]
    events: list[Rate] = [asset_cost(period_cost=Decimal("9.6e19")), rate_card(per_gpu_hour=Decimal("4e19"))]
    rows = table(charge([*held, ("c", "j", "held", "idle", QUARTER // 2, None)], *events))
    whole, half = Decimal("285714285714285714.285714286"), Decimal("142857142857142857.142857143")
    keys = [("a", "active"), ("b", "active"), ("c", "active"), ("c", "idle")]
    costs = [rows[t, "j", "held", activity]["asset_cost"] for t, activity in keys]
    assert sum(costs) == rows["", "", "marker", ""]["asset_cost"] == Decimal("1e18")
    # 2/7 leave 5/7 of a nano-unit each, 1/7 leaves 6/7: three are missing, the half gets one, then the first two.
    assert costs == [whole, whole, whole - Decimal("1e-9"), half]
    assert [rows[t, "j", "held", a]["charge"] for t, a in keys] == [Decimal("1e19")] * 3 + [Decimal("5e18")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": np.array(["held", "hold"], dtype=object)}, "'hold'; expected one of held"),
        ({"job_id": np.array(["k", "j"], dtype=object)}, "not sorted"),
        ({"job_id": np.array(["j", "j"], dtype=object)}, "twice"),
        ({"gpu_us": np.array([1, -1])}, "-1 is negative"),
        ({"kind": np.array(["held", "overcommitted"], dtype=object)}, "no energy"),
    ],
)
def test_wrong_quantities_are_refused(change: dict[str, Any], message: str) -> None:
    columns: dict[str, Any] = {
        "tenant": np.array(["a", "a"], dtype=object),
        "job_id": np.array(["j", "k"], dtype=object),
        "kind": np.array(["held", "held"], dtype=object),
        "activity": np.array(["", ""], dtype=object),
        "gpu_us": np.array([1, 1]),
        "energy_mj": np.array([1, 1]),
        "energy_known": np.array([True, True]),
    }
    with pytest.raises(ValueError, match=message):
        charge_interval("p", T0, T1, Quantities(**(columns | change)), rates_from([asset_cost()]))


def test_a_marker_alone_replaces_what_is_no_interval_any_more() -> None:
    (row,) = charges_table([no_charges("p", T0, T1)], [False]).to_pylist()
    assert (row["kind"], row["asset_cost"], row["gpu_us"], row["charge"]) == ("marker", None, 0, None)


text = st.sampled_from(["", "a", "b", "c"])
kinds = st.sampled_from(KINDS)
activities = st.sampled_from(["", "active", "idle"])
keys = st.tuples(text, text, kinds, activities)
amounts = st.one_of(st.integers(0, 5), st.integers(0, 10**15))
energies = st.one_of(st.none(), st.integers(0, 10**14))
money = st.decimals("-10000000", "10000000", places=9)


@st.composite
def row_lists(draw: st.DrawFn) -> list[Row]:
    chosen = draw(st.lists(keys, unique=True, max_size=12))
    return [(*key, draw(amounts), None if key[2] == "overcommitted" else draw(energies)) for key in chosen]


@settings(max_examples=300, deadline=None)
@given(rows=row_lists(), cost=money, price=money, held=money, unused=st.one_of(st.none(), money))
def test_laws_of_an_interval(
    rows: list[Row], cost: Decimal, price: Decimal, held: Decimal, unused: Decimal | None
) -> None:
    charges = charge(
        rows,
        asset_cost(period_cost=cost, tariff="power", pue=Decimal("1.37")),
        tariff({"2026-01-01": str(price)}, "2026-01-02"),
        rate_card(per_gpu_hour=held, reserved_unused_per_gpu_hour=unused),
    )
    body = slice(0, -1)
    assert charges.kind[-1] == "marker"
    # Everything given is there, once, and a row is added only where nobody could bear the cost.
    given_keys = {row[:4] for row in rows}
    keys_out = list(
        zip(*(c[body].tolist() for c in (charges.tenant, charges.job_id, charges.kind, charges.activity)), strict=True)
    )
    assert given_keys <= set(keys_out) <= given_keys | {("", "", "free", "")}
    assert len(keys_out) == len(set(keys_out))
    # Conservation, to the nano-unit.
    fixed = Fraction(cost) * 10**9 / 96
    energy = sum(row[5] or 0 for row in rows)
    assert sum(charges.asset_cost[body].tolist()) == int(charges.asset_cost[-1])
    assert sum(charges.energy_cost[body].tolist()) == int(charges.energy_cost[-1])
    assert int(charges.energy_cost[-1]) == round(energy * Fraction(price) * Fraction("1.37") * 10**9 / KWH)
    assert abs(int(charges.asset_cost[-1]) - int(charges.energy_cost[-1]) - fixed) < 1
    # One rounding per (tenant, job): against fractions.
    spent: defaultdict[tuple[str, str, str], int] = defaultdict(int)
    for tenant, job_id, kind, _, gpu_us, _ in rows:
        spent[tenant, job_id, kind] += gpu_us
    paid: defaultdict[tuple[str, str, str], int] = defaultdict(int)
    for key, amount, known in zip(
        keys_out, charges.charge[body].tolist(), charges.charge_known[body].tolist(), strict=True
    ):
        assert known is (key[0] != "")
        paid[key[:3]] += amount
    for (tenant, job_id, kind), gpu_us in spent.items():
        per_hour = {"held": held, "reserved_unused": unused or Decimal(0)}.get(kind, Decimal(0))
        expected = round(gpu_us * Fraction(per_hour) * 10**9 / 3_600_000_000) if tenant else 0
        assert paid[tenant, job_id, kind] == expected


def test_a_day_with_rate_changes_sums_to_the_period() -> None:
    """A period over the end of summer time with two changes of price: every unit of it lands in some interval."""
    start, end = ms("2026-10-25T00:00"), ms("2026-10-26T00:00")
    events: list[Rate] = [
        asset_cost(period_cost=Decimal("777.777777777"), start_ms=start, end_ms=end, tariff="power"),
        tariff(
            {"2026-10-25T00:00": "0.11", "2026-10-25T00:52": "-0.02", "2026-10-25T13:01": "0.3"}, "2026-10-26T00:00"
        ),
        rate_card(start_ms=ms("2026-10-25T07:07")),
    ]
    intervals = price_intervals("p", start, end, rates_from(events))
    assert len(intervals) == 96 + 3
    assert all(a[1] == b[0] for a, b in pairwise(intervals))
    totals = [charge([("a", "j", "held", "active", 7, 10)], *events, start_ms=a, end_ms=b) for a, b in intervals]
    assert sum(int(each.asset_cost[-1] - each.energy_cost[-1]) for each in totals) == 777_777_777_777
    assert from_nano(sum(int(each.asset_cost[0] - each.energy_cost[0]) for each in totals)) == Decimal("777.777777777")
