"""What one price interval of a pool cost, who bears it, and what each tenant pays: quantities and rates in, rows out.

Money is made once here, at the finest key, and every other figure is a sum of these rows. The rows' asset costs sum to
the interval's, to the nano-unit.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuledger.finance.apportion import apportion_groups, largest_remainder, largest_remainder_exact
from gpuledger.finance.asset_cost import fixed_cost_nano
from gpuledger.finance.energy import energy_cost_nano
from gpuledger.finance.exact import half_even, scale_half_even, to_nano
from gpuledger.finance.rate_cards import CardsInForce
from gpuledger.finance.rates import Rates
from gpuledger.schemas.events import AssetCost

__all__ = ["KINDS", "UNATTRIBUTED", "Charges", "Quantities", "charge_interval", "no_charges"]

KINDS = ("held", "unconfirmed", "reserved_unused", "free", "unsliced", "overcommitted")
_HELD, _UNCONFIRMED, _RESERVED_UNUSED, _FREE, _UNSLICED, _OVERCOMMITTED = range(6)
_CODE = {kind: code for code, kind in enumerate(KINDS)}
#: The tenant of time that nobody is known to hold: it is shown, never dropped.
UNATTRIBUTED = "unattributed"

#: GPU-microseconds in a GPU-hour.
_US_PER_HOUR = 3_600_000_000

Text = NDArray[Any]
Int64s = NDArray[np.int64]
Mask = NDArray[np.bool_]
#: Nano-units: int64, or Python integers (dtype object) where an amount exceeds 62 bits.
Nanos = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Quantities:
    """What the ledger says of one (pool, price interval): columns of n rows, sorted by the first four, no key twice.

    `activity` is '' for time that nobody holds. `energy_mj` counts only where `energy_known`.
    """

    tenant: Text
    job_id: Text
    kind: Text
    activity: Text
    gpu_us: Int64s
    energy_mj: Int64s
    energy_known: Mask

    def __len__(self) -> int:
        return len(self.gpu_us)


@dataclass(frozen=True, slots=True)
class Charges:
    """Rows of the table `charges` for one (pool, price interval), without `version` and `estimate`.

    All columns have the same length; the last row is the marker with the interval's totals. Money is in nano-units
    (`from_nano` or `charges_table` make decimals); a value whose mask is False is unknown (NULL) and 0 in the column.
    """

    pool: str
    start_ms: int
    end_ms: int
    tenant: Text
    job_id: Text
    kind: Text
    activity: Text
    payer: Text
    gpu_us: Int64s
    energy_mj: Int64s
    energy_known: Mask
    asset_cost: Nanos
    asset_known: Mask
    energy_cost: Nanos
    energy_cost_known: Mask
    asset_currency: str
    charge: Nanos
    charge_known: Mask
    charge_currency: Text
    rate_card: Text
    incomplete: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.gpu_us)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Quantities that have been checked.

    `keys`: tenant, job_id, kind and activity; `code`: the kind's place in KINDS; `bears`: rows that carry asset cost;
    `tenant_first`: first row of each tenant; `job_begins`: where (tenant, job_id, kind) differs from the row before.
    """

    keys: list[Text]
    code: NDArray[np.int8]
    gpu_us: Int64s
    energy_mj: Int64s
    energy_known: Mask
    bears: Mask
    tenant_first: NDArray[np.intp]
    job_begins: Mask

    def __len__(self) -> int:
        return len(self.gpu_us)


@dataclass(frozen=True, slots=True)
class _Costs:
    """Asset cost per row, and the interval's totals."""

    fixed: Nanos
    energy: Nanos
    known: bool
    energy_known: Mask
    incomplete: Mask
    total: int
    energy_total: int
    energy_total_known: bool
    currency: str


@dataclass(frozen=True, slots=True)
class _Prices:
    """What the rate cards say, per row."""

    card: Text
    currency: Text
    known: Mask
    held_nano: Nanos
    reserved_nano: Nanos
    operator_pays_unused: Mask


def charge_interval(pool: str, start_ms: int, end_ms: int, quantities: Quantities, rates: Rates) -> Charges:
    """Cost and charges of one price interval of a pool, as cut by `price_intervals`.

    - Fixed cost goes by GPU time over all rows but overcommitted ones, energy cost by known energy. Where no GPU was in
      service, one row of kind free and 0 GPU time carries all of it.
    - It is borne by: held, the tenant; unconfirmed, `unattributed`; reserved_unused, the tenant that reserved, unless
      its rate card says the operator; free and unsliced, the operator ("").
    - The charge is GPU time x price rounded half-even once per (tenant, job), then divided over the job's activities by
      GPU time. Unconfirmed and overcommitted time is charged 0; reserved_unused as the card says, 0 if it does not.
    - Unknown, thus NULL: asset cost without an asset cost for the pool, charge without a rate card. Where energy or its
      price is not known the cost lacks it and `incomplete` says so. Without a tariff energy costs 0.

    Raises:
        ValueError: not a price interval (rates change inside), rows not sorted, an unknown kind, negative quantities,
            overcommitted time with energy, or a rate with more than 9 decimals.
    """
    cost = _asset_cost(pool, start_ms, end_ms, rates)
    cards = _cards(pool, start_ms, end_ms, rates)
    rows = _rows(quantities, cost is not None)
    costs = _costs(cost, rates, start_ms, end_ms, rows)
    prices = _prices(cards, rows)
    charge = _charges(rows, prices)
    return _assemble(pool, (start_ms, end_ms), rows, costs, prices, charge)


def no_charges(pool: str, start_ms: int, end_ms: int) -> Charges:
    """A marker alone: replaces an interval that no longer is one, because a later change of rates moved its cut."""
    none = np.array([], dtype=object)
    zero = np.zeros(0, dtype=np.int64)
    empty = Quantities(none, none, none, none, zero, zero, np.zeros(0, dtype=np.bool_))
    return charge_interval(pool, start_ms, end_ms, empty, Rates())


def _asset_cost(pool: str, start_ms: int, end_ms: int, rates: Rates) -> AssetCost | None:
    costs = rates.asset_costs.get(pool)
    if costs is None:
        return None
    if costs.changes_inside(start_ms, end_ms):
        raise ValueError(f"[{start_ms}, {end_ms}): the asset cost of {pool} changes inside; cut with price_intervals")
    cost = costs.at(start_ms)
    tariff = rates.tariffs.get(cost.tariff) if cost else None
    if tariff and tariff.cuts(start_ms, end_ms):
        raise ValueError(f"[{start_ms}, {end_ms}): the energy price of {pool} changes inside; cut with price_intervals")
    return cost


def _cards(pool: str, start_ms: int, end_ms: int, rates: Rates) -> CardsInForce:
    cards = rates.cards_at(pool, start_ms)
    if cards.end_ms is not None and cards.end_ms < end_ms:
        raise ValueError(f"[{start_ms}, {end_ms}): a rate card of {pool} changes inside; cut with price_intervals")
    return cards


def _rows(quantities: Quantities, has_cost: bool) -> _Rows:
    """The quantities, refused where they would make wrong money; with a row that bears the cost where none can."""
    try:
        codes = [_CODE[kind] for kind in quantities.kind.tolist()]
    except KeyError as error:
        raise ValueError(f"kind: {error}; expected one of {', '.join(KINDS)}") from None
    code = np.array(codes, dtype=np.int8)
    if has_cost and not quantities.gpu_us[code != _OVERCOMMITTED].any() and not (code == _FREE).any():
        quantities = _with_free_row(quantities)
        code = np.insert(code, 0, _FREE)
    keys = [
        np.asarray(text, dtype=object)
        for text in (quantities.tenant, quantities.job_id, quantities.kind, quantities.activity)
    ]
    changes = _changes(keys)
    if len(code) and int(quantities.gpu_us.min()) < 0:
        raise ValueError(f"gpu_us: {int(quantities.gpu_us.min())} is negative")
    energy_mj = np.where(quantities.energy_known, quantities.energy_mj, 0)
    if energy_mj[code == _OVERCOMMITTED].any():
        raise ValueError("energy_mj: overcommitted time is no physical time and has no energy")
    return _Rows(
        keys=keys,
        code=code,
        gpu_us=quantities.gpu_us,
        energy_mj=energy_mj,
        energy_known=quantities.energy_known,
        bears=code != _OVERCOMMITTED,
        tenant_first=np.flatnonzero(changes[0]),
        job_begins=changes[2],
    )


def _changes(keys: list[Text]) -> list[Mask]:
    """Where the first key differs from the row before, the first two do, and so on; refuses rows out of order."""
    differs = np.zeros(len(keys[0]), dtype=np.bool_)
    differs[:1] = True
    changes: list[Mask] = []
    for key in keys:
        new = np.flatnonzero(~differs[1:] & (key[1:] != key[:-1]))
        if (key[new + 1] < key[new]).any():
            raise ValueError("quantities: rows are not sorted by (tenant, job_id, kind, activity)")
        differs = differs.copy()
        differs[new + 1] = True
        changes.append(differs)
    if not differs.all():
        raise ValueError("quantities: a key (tenant, job_id, kind, activity) is there twice")
    return changes


def _with_free_row(rows: Quantities) -> Quantities:
    """Rows of a pool without a GPU in service, with the row that carries its cost (first in the order of keys)."""
    return Quantities(
        np.insert(np.asarray(rows.tenant, dtype=object), 0, ""),
        np.insert(np.asarray(rows.job_id, dtype=object), 0, ""),
        np.insert(np.asarray(rows.kind, dtype=object), 0, "free"),
        np.insert(np.asarray(rows.activity, dtype=object), 0, ""),
        np.insert(rows.gpu_us, 0, 0),
        np.insert(rows.energy_mj, 0, 0),
        np.insert(rows.energy_known, 0, True),
    )


def _divide(total: int, weights: Int64s) -> Nanos:
    if abs(total) < 2**62:
        return largest_remainder(total, weights)
    return np.array(largest_remainder_exact(total, weights.tolist()), dtype=object)


def _costs(cost: AssetCost | None, rates: Rates, start_ms: int, end_ms: int, rows: _Rows) -> _Costs:
    zeros = np.zeros(len(rows), dtype=np.int64)
    nothing = np.zeros(len(rows), dtype=np.bool_)
    if cost is None:
        return _Costs(zeros, zeros, False, nothing, nothing, 0, 0, False, "")
    fixed_total = fixed_cost_nano(cost, start_ms, end_ms)
    weights = np.where(rows.bears, rows.gpu_us, 0)
    if not weights.any():
        weights = (rows.code == _FREE).astype(np.int64)
    fixed = _divide(fixed_total, weights)
    if not cost.tariff:
        return _Costs(fixed, zeros, True, ~nothing, nothing, fixed_total, 0, True, cost.currency)
    price = rates.energy_price(cost, start_ms)
    counted = rows.bears & rows.energy_known
    if price is None:
        return _Costs(fixed, zeros, True, ~rows.bears, rows.bears, fixed_total, 0, False, cost.currency)
    energy = np.where(counted, rows.energy_mj, 0)
    total = energy_cost_nano(sum(energy.tolist()), price, cost.pue, cost.node_energy_factor)
    divided = _divide(total, energy)
    known = counted | ~rows.bears
    return _Costs(fixed, divided, True, known, ~known, fixed_total + total, total, bool(counted.any()), cost.currency)


def _nano(price: Decimal | None) -> int:
    """A price per GPU-hour in nano-units; one that the card does not state charges nothing."""
    return 0 if price is None else to_nano(price)


def _prices(cards: CardsInForce, rows: _Rows) -> _Prices:
    """The card of each row's tenant. Rows are sorted by tenant, so each tenant is looked up once."""
    first = rows.tenant_first
    of_tenant = [cards.of(name) for name in rows.keys[0][first].tolist()]
    distinct = list({id(card): card for card in of_tenant}.values())
    position = {id(card): n for n, card in enumerate(distinct)}
    lengths = np.diff(np.append(first, len(rows)))
    which = np.repeat(np.array([position[id(card)] for card in of_tenant], dtype=np.intp), lengths)

    def per_row(values: list[Any], dtype: type) -> NDArray[Any]:
        return np.array(values, dtype=dtype)[which]

    return _Prices(
        card=per_row([card.id if card else "" for card in distinct], object),
        currency=per_row([card.currency if card else "" for card in distinct], object),
        known=per_row([card is not None for card in distinct], np.bool_),
        held_nano=per_row([_nano(card.per_gpu_hour) if card else 0 for card in distinct], object),
        reserved_nano=per_row([_nano(card.reserved_unused_per_gpu_hour) if card else 0 for card in distinct], object),
        operator_pays_unused=per_row(
            [card is not None and card.reserved_unused_payer == "operator" for card in distinct], np.bool_
        ),
    )


def _charges(rows: _Rows, prices: _Prices) -> Nanos:
    """Nano-units per row: one rounding per (tenant, job, kind), divided over its activities by GPU time."""
    if len(rows) == 0:
        return np.zeros(0, dtype=np.int64)
    first = np.flatnonzero(rows.job_begins)
    gpu_us = np.add.reduceat(rows.gpu_us, first)
    code = rows.code[first]
    rate = np.where(code == _HELD, prices.held_nano[first], 0)
    rate = np.where(code == _RESERVED_UNUSED, prices.reserved_nano[first], rate)
    try:
        amounts = scale_half_even(gpu_us, rate.astype(np.int64), _US_PER_HOUR)
    except OverflowError:
        return _charges_exact(rows, first, gpu_us, rate)
    return apportion_groups(amounts, np.cumsum(rows.job_begins) - 1, rows.gpu_us)


def _charges_exact(rows: _Rows, first: NDArray[np.intp], gpu_us: Int64s, rate: Nanos) -> Nanos:
    """The same for amounts that 64 bits cannot hold: a price that slipped must not stop the ledger of everybody."""
    charge: list[int] = []
    ends = [*first[1:].tolist(), len(rows)]
    for begin, end, whole, nano in zip(first.tolist(), ends, gpu_us.tolist(), rate.tolist(), strict=True):
        amount = half_even(whole * nano, _US_PER_HOUR)
        charge += largest_remainder_exact(amount, rows.gpu_us[begin:end].tolist())
    return np.array(charge, dtype=object)


def _payers(rows: _Rows, prices: _Prices) -> Text:
    payer = rows.keys[0].copy()
    payer[rows.code == _UNCONFIRMED] = UNATTRIBUTED
    payer[(rows.code == _RESERVED_UNUSED) & prices.operator_pays_unused] = ""
    payer[(rows.code == _FREE) | (rows.code == _UNSLICED)] = ""
    return payer


def _assemble(
    pool: str,
    interval: tuple[int, int],
    rows: _Rows,
    costs: _Costs,
    prices: _Prices,
    charge: Nanos,
) -> Charges:
    """The rows and, last, the marker: GPU time in service, the energy known, the whole cost."""
    counted = rows.bears & rows.energy_known

    def text(column: Text, marker: str) -> Text:
        return np.append(column, np.array([marker], dtype=object))

    def number(column: NDArray[Any], marker: int) -> NDArray[Any]:
        kind = object if abs(marker) >= 2**62 else column.dtype
        return np.append(column, np.array([marker], dtype=kind))

    return Charges(
        pool=pool,
        start_ms=interval[0],
        end_ms=interval[1],
        tenant=text(rows.keys[0], ""),
        job_id=text(rows.keys[1], ""),
        kind=text(rows.keys[2], "marker"),
        activity=text(rows.keys[3], ""),
        payer=text(_payers(rows, prices), ""),
        gpu_us=number(rows.gpu_us, sum(rows.gpu_us[rows.bears].tolist())),
        energy_mj=number(rows.energy_mj, sum(rows.energy_mj[counted].tolist())),
        energy_known=np.append(rows.energy_known, counted.any() or not rows.bears.any()),
        asset_cost=number(costs.fixed + costs.energy, costs.total),
        asset_known=np.full(len(rows) + 1, costs.known),
        energy_cost=number(costs.energy, costs.energy_total),
        energy_cost_known=np.append(costs.energy_known, costs.energy_total_known),
        asset_currency=costs.currency,
        charge=number(charge, 0),
        charge_known=np.append(prices.known, False),
        charge_currency=text(prices.currency, ""),
        rate_card=text(prices.card, ""),
        incomplete=np.append(costs.incomplete, costs.incomplete.any()).astype(np.uint8),
    )
