"""Law 7: what is divided sums exactly, and ties fall the same way: a GPU over its holders, money over everybody.

Prices are written in local time, so that the days on which clocks change and the leap day are in them; what they mean
is worked out here on its own, minute by minute and in fractions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from typing import Any
from zoneinfo import ZoneInfo

from hypothesis import strategies as st

from gpuledger.finance.charges import Charges, charge_interval
from gpuledger.finance.price_series import SeriesFormat, parse_series
from gpuledger.finance.rates import price_intervals, rates_from
from gpuledger.schemas.events import AssetCost, EnergyTariff, RateCard
from gpuledger.streams import ledger_rows
from tests.streams.chance import Chance, Drawn
from tests.streams.computed import compute, figures, stored
from tests.streams.story import World
from tests.streams.worlds import BASES, POOLS

__all__ = ["Prices", "hamilton", "money", "prices", "shared_gpu", "shared_gpus", "shares"]

MINUTE_MS = 60_000
NANO = 10**9
ZONES = ("Europe/Oslo", "America/New_York", "UTC")
COSTS = ("960", "777.777777777", "-0.000000007", "1234567.89", "13000000000000")
PER_KWH = ("0.11", "-0.02", "0.3", "0", "0.123456789012", "7")


def hamilton(total: int, weights: Sequence[int | Fraction]) -> list[int]:
    """Largest remainder as a person would do it: floors, then one each to the largest fractions, earlier ones first."""
    whole = sum(weights)
    if not whole:
        return [0] * len(weights)
    shares = [Fraction(abs(total) * weight) / whole for weight in weights]
    parts = [share.numerator // share.denominator for share in shares]
    order = sorted(range(len(shares)), key=lambda n: (parts[n] - shares[n], n))
    for n in order[: abs(total) - sum(parts)]:
        parts[n] += 1
    return parts if total >= 0 else [-part for part in parts]


# ------------------------------------------------------------------------------------------------- a GPU


def _allocation(n: int, base: dict[str, Any], from_ms: int, to_ms: int) -> dict[str, Any]:
    fields = {"id": f"al{n}", "revision": 1, "node": "n0", "boot_id": "", "gpu": "g0", "epoch_ms": 0, "source": "slurm"}
    fields |= {"account": "", "namespace": "", "start_ms": from_ms, "end_ms": to_ms, "void": False}
    return fields | base


def shared_gpu(chance: Chance) -> World:
    """One GPU that several hold for whole minutes, and perhaps a geometry that leaves some of it to no instance."""
    from_ms = chance.one_of(BASES)
    to_ms = from_ms + MINUTE_MS * chance.integer(1, 2)
    den = chance.one_of([3, 7, 6, 1000, 13])
    holders: list[dict[str, Any]] = []
    for n in range(chance.integer(1, 8)):
        who = {
            "tenant": chance.one_of("XYZ"),
            "job_id": f"j{chance.integer(0, 3)}-{n}",
            "user": chance.one_of(["", "u"]),
        }
        part = {"weight_num": chance.integer(1, max(1, den // 3)), "weight_den": chance.one_of([den, den, 2 * den])}
        holders.append(_allocation(n, who | part | {"instance": chance.integer(0, 2)}, from_ms, to_ms))
    sliced = chance.integer(0, 7)
    cut: dict[str, Any] = {
        "id": "m",
        "revision": 1,
        "gpu": "g0",
        "node": "n0",
        "start_ms": from_ms,
        "end_ms": None,
        "slices": 7,
    }
    cut["instances"] = [{"instance": 1, "epoch_ms": from_ms, "slices": sliced, "profile": "m"}] if sliced else []
    placed = {"id": "p", "revision": 1, "gpu": "g0", "node": "n0", "pool": "a", "start_ms": from_ms, "end_ms": None}
    empty = ("jobs", "commitments", "transfers", "tenants", "batches", "happened")
    return World(
        {name: [] for name in empty},
        from_ms=from_ms,
        to_ms=to_ms,
        tick_ms=1000,
        ahead_ms=0,
        confirm_ms=0,
        complete_until_ms=to_ms,
        placements=[placed | {"claimed_at_ms": from_ms}],
        allocations=holders,
        geometries=chance.one_of([[], [cut]]),
    )


@st.composite
def shared_gpus(draw: st.DrawFn) -> World:
    """Such worlds, from hypothesis."""
    return shared_gpu(Drawn(draw))


def shares(w: World) -> None:
    """A minute of a shared GPU is divided by largest remainder: in the order of tenant, job, user and instance, then
    what nobody holds, then what no instance has."""
    rows = sorted(w["allocations"], key=lambda a: (a["tenant"], a["job_id"], a["user"], a["instance"]))
    weights = [Fraction(a["weight_num"], a["weight_den"]) for a in rows]
    left = max(Fraction(0), 1 - sum(weights))
    cut: dict[str, Any] = w["geometries"][0] if w["geometries"] else {"slices": 1, "instances": [{"slices": 1}]}
    unsliced = min(left, 1 - Fraction(sum(i["slices"] for i in cut["instances"]), cut["slices"]))
    parts = hamilton(MINUTE_MS * 1000, [*weights, left - unsliced, unsliced])
    names = [(a["tenant"], a["job_id"], a["instance"], "held", "unobserved") for a in rows]
    names += [("", "", 0, "unallocated", "unobserved"), ("", "", 0, "unsliced", "unobserved")]
    want = {name: part for name, part in zip(names, parts, strict=True) if part}
    for at in range(w["from_ms"], w["to_ms"], MINUTE_MS):
        found = figures(compute(w, "a", bounds=(at, at + MINUTE_MS)))
        assert {key[2:]: us for key, (us, _) in found.gpu_hours.items()} == want


# ------------------------------------------------------------------------------------------------- prices


@dataclass(frozen=True)
class Prices:
    """What a pool costs and what its tenants pay. `per_kwh` has a price for every step of `step_ms` from `since_ms`."""

    cost: AssetCost
    tariff: EnergyTariff
    cards: list[RateCard]
    interval_minutes: int
    since_ms: int
    step_ms: int
    per_kwh: list[Decimal]

    def price(self, at_ms: int) -> Fraction:
        return Fraction(self.per_kwh[(at_ms - self.since_ms) // self.step_ms])

    def card(self, tenant: str, at_ms: int) -> RateCard | None:
        here = [c for c in self.cards if c.start_ms <= at_ms and (c.end_ms is None or at_ms < c.end_ms)]
        own = [c for c in here if c.tenant == tenant] or [c for c in here if not c.tenant]
        return max(own, key=lambda c: (c.start_ms, c.id)) if tenant and own else None


def _midnight(at: datetime, zone: ZoneInfo, days: int) -> datetime:
    """Midnight of the local day that is so many days after that of `at`, in UTC."""
    day = at.astimezone(zone).date() + timedelta(days=days)
    return datetime(day.year, day.month, day.day, tzinfo=zone).astimezone(UTC)


def _ms(moment: datetime) -> int:
    return int(moment.timestamp()) * 1000


def prices(chance: Chance, w: World, pool: str) -> Prices:
    """Prices around a world: a period of one or more local days, a series of local times, cards that change in it."""
    at = datetime.fromtimestamp(w["from_ms"] / 1000, UTC)
    zone = ZoneInfo(chance.one_of(ZONES))
    common: dict[str, Any] = {"revision": 1, "claimed_at_ms": w["from_ms"], "currency": "EUR"}
    minutes = chance.one_of([60, 30, 15])
    since, until = _midnight(at, zone, -2), _midnight(at, zone, 3)
    steps = (_ms(until) - _ms(since)) // (minutes * MINUTE_MS)
    cycle = chance.shuffled(PER_KWH)[: chance.integer(1, len(PER_KWH))]
    per_kwh = [Decimal(cycle[n % len(cycle)]) for n in range(steps)]
    local = [(since + timedelta(minutes=minutes * n)).astimezone(zone).replace(tzinfo=None) for n in range(steps)]
    csv = "time,price\n" + "".join(f"{t.isoformat()},{p}\n" for t, p in zip(local, per_kwh, strict=True))
    points, end_ms = parse_series(csv, SeriesFormat(resolution_minutes=minutes, zone=zone))
    assert [p.start_ms for p in points] == [_ms(since) + n * minutes * MINUTE_MS for n in range(steps)]
    assert end_ms == _ms(until)
    last_day = chance.integer(1, 2)
    cost = AssetCost(
        **common,
        id="cost",
        pool=pool,
        period_cost=Decimal(chance.one_of(COSTS)),
        start_ms=_ms(_midnight(at, zone, -chance.integer(0, 1))),
        end_ms=_ms(_midnight(at, zone, last_day)),
        pue=Decimal(chance.one_of(["1", "1.37"])),
        node_energy_factor=Decimal(chance.one_of(["1", "1.083"])),
        tariff="power",
    )
    change = w["from_ms"] + MINUTE_MS * chance.integer(0, 3)
    terms: list[dict[str, Any]] = [
        {"id": "all", "per_gpu_hour": Decimal("2.35"), "end_ms": change},
        {"id": "dearer", "per_gpu_hour": Decimal("2.350000001"), "start_ms": change},
        {"id": "own", "tenant": "X", "per_gpu_hour": Decimal("0.333333333")},
        {"id": "kept", "tenant": "Y", "per_gpu_hour": Decimal(3), "reserved_unused_per_gpu_hour": Decimal("1.1")},
        {"id": "free", "tenant": "Z", "per_gpu_hour": Decimal(0), "reserved_unused_payer": "operator"},
    ]
    base: dict[str, Any] = {**common, "pool": pool, "start_ms": w["from_ms"] - 86_400_000}
    cards = [RateCard(**{**base, **each}) for each in terms[: chance.integer(0, len(terms))]]
    tariff = EnergyTariff(**common, id="power", prices=points, end_ms=end_ms)
    return Prices(cost, tariff, cards, chance.one_of([15, 5, 1]), _ms(since), minutes * MINUTE_MS, per_kwh)


# ------------------------------------------------------------------------------------------------- money


def fixed_nano(cost: AssetCost, start_ms: int, end_ms: int) -> int:
    """The cost of the period that falls on these minutes, minute by minute."""
    total = int(cost.period_cost * NANO)
    minutes = (cost.end_ms - cost.start_ms) // MINUTE_MS
    spent = 0
    for at in range(start_ms, end_ms, MINUTE_MS):
        k = (at - cost.start_ms) // MINUTE_MS
        spent += total * (k + 1) // minutes - total * k // minutes
    return spent


def money(w: World, chance: Chance) -> None:
    """Every price interval's cost is borne by its rows to the nano-unit, divided by largest remainder; intervals sum to
    the period; a charge is rounded once per tenant, job and kind; each row has the payer that the rules name."""
    table = stored(w)
    for pool in POOLS:
        p = prices(chance, w, pool)
        rates = rates_from([p.cost, p.tariff, *p.cards])
        step = p.interval_minutes * MINUTE_MS
        bounds = (w["from_ms"] // step * step, -(-w["to_ms"] // step) * step)
        intervals = price_intervals(pool, *bounds, rates, p.interval_minutes)
        assert [intervals[0][0], intervals[-1][1]] == list(bounds)
        assert all(a[1] == b[0] for a, b in pairwise(intervals))
        ledger = compute(w, pool, table, bounds, [start for start, _ in intervals])
        quantities = ledger_rows.quantities(ledger)
        starts = ledger.window.buckets_ms.tolist()
        spent = 0
        for start, end in intervals:
            inside = [quantities[n] for n, at in enumerate(starts[:-1]) if start <= at < end]
            charges = charge_interval(pool, start, end, ledger_rows.merge(inside), rates)
            if p.cost.start_ms <= start < p.cost.end_ms:
                spent += _cost_is_borne(charges, p)
            else:
                assert not charges.asset_known.any()
            _charges_are_rounded_once(charges, p)
            _payers(charges, p)
        first, last = max(bounds[0], p.cost.start_ms), min(bounds[1], p.cost.end_ms)
        assert spent == fixed_nano(p.cost, first, last)


def _cost_is_borne(charges: Charges, p: Prices) -> int:
    """Returns the interval's fixed cost."""
    for at in range(charges.start_ms, charges.end_ms, MINUTE_MS):
        assert p.price(at) == p.price(charges.start_ms)
    kinds = charges.kind[:-1].tolist()
    bears = [kind != "overcommitted" for kind in kinds]
    us = [amount * bear for amount, bear in zip(charges.gpu_us[:-1].tolist(), bears, strict=True)]
    fixed = fixed_nano(p.cost, charges.start_ms, charges.end_ms)
    assert sum(us) == int(charges.gpu_us[-1])
    known = charges.energy_known[:-1].tolist()
    mj = [e * (k and bear) for e, k, bear in zip(charges.energy_mj[:-1].tolist(), known, bears, strict=True)]
    price = p.price(charges.start_ms) * Fraction(p.cost.pue) * Fraction(p.cost.node_energy_factor)
    energy = round(sum(mj) * price * NANO / 3_600_000_000)
    assert int(charges.asset_cost[-1]) == fixed + energy == sum(charges.asset_cost[:-1].tolist())
    assert charges.energy_cost[:-1].tolist() == hamilton(energy, mj)
    whole = us if any(us) else [int(kind == "free") for kind in kinds]
    rows = zip(charges.asset_cost[:-1].tolist(), charges.energy_cost[:-1].tolist(), strict=True)
    assert [asset - power for asset, power in rows] == hamilton(fixed, whole)
    unknown = [not k and bear for k, bear in zip(known, bears, strict=True)]
    assert charges.incomplete.tolist() == [*map(int, unknown), int(any(unknown))]
    return fixed


def _charges_are_rounded_once(charges: Charges, p: Prices) -> None:
    jobs: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    names = zip(charges.tenant[:-1].tolist(), charges.job_id[:-1].tolist(), charges.kind[:-1].tolist(), strict=True)
    for n, key in enumerate(names):
        jobs[key].append(n)
    for (tenant, _, kind), rows in jobs.items():
        card = p.card(tenant, charges.start_ms)
        assert [bool(charges.charge_known[n]) for n in rows] == [card is not None] * len(rows)
        if card is None:
            continue
        rate = {"held": card.per_gpu_hour, "reserved_unused": card.reserved_unused_per_gpu_hour}.get(kind) or Decimal(0)
        us = [int(charges.gpu_us[n]) for n in rows]
        amount = round(Fraction(sum(us)) * Fraction(rate) * NANO / 3_600_000_000)
        assert [int(charges.charge[n]) for n in rows] == hamilton(amount, us)


def _payers(charges: Charges, p: Prices) -> None:
    for tenant, kind, payer in zip(charges.tenant[:-1], charges.kind[:-1], charges.payer[:-1], strict=True):
        card = p.card(tenant, charges.start_ms)
        operator = kind in ("free", "unsliced")
        operator |= kind == "reserved_unused" and card is not None and card.reserved_unused_payer == "operator"
        want = "" if operator else "unattributed" if kind == "unconfirmed" else tenant
        assert payer == want, (tenant, kind)
