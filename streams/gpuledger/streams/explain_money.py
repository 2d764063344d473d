"""The price interval around a minute of a GPU, and the minute's share of its rows. Pure.

Money is made once per interval, so a share is never booked; shares of all GPUs and minutes of a row sum to it, but for
rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from decimal import ROUND_HALF_EVEN, Decimal
from fractions import Fraction
from typing import Any

from gpuledger.finance.apportion import largest_remainder_exact
from gpuledger.streams.explanation import ChargeShare, Segment

__all__ = ["UNHELD_KINDS", "shares"]

#: What the pool's rows divide the time into that no GPU row attributes.
UNHELD_KINDS = ("reserved_unused", "free", "unsliced")
_HELD_KINDS = ("held", "unconfirmed")
_NANO = Decimal("0.000000001")


def _part(amount: Decimal | None, part: int, whole: int) -> Decimal | None:
    if amount is None or whole == 0:
        return None
    exact = Fraction(amount) * part / whole
    return (Decimal(exact.numerator) / Decimal(exact.denominator)).quantize(_NANO, ROUND_HALF_EVEN)


def _asset_cost(row: Mapping[str, Any], us: int, mj: int | None) -> Decimal | None:
    """Fixed cost by GPU time, energy cost by energy; by time too where the energy is not known."""
    cost, energy = row["asset_cost"], row["energy_cost"]
    if cost is None or not energy or not mj or not row["energy_mj"]:
        return _part(cost, us, row["gpu_us"])
    fixed, by_energy = _part(cost - energy, us, row["gpu_us"]), _part(energy, mj, row["energy_mj"])
    return None if fixed is None or by_energy is None else fixed + by_energy


def shares(rows: Iterable[Mapping[str, Any]], segments: Sequence[Segment]) -> list[ChargeShare]:
    """The rows of `v_charges` of one interval (with `start_ms` and `end_ms`) that the segments are part of."""
    rows = list(rows)
    held = {
        (segment.tenant, segment.job_id, segment.kind, segment.activity): segment
        for segment in _merged(segments)
        if segment.kind in _HELD_KINDS
    }
    nobody = [segment for segment in segments if segment.kind not in _HELD_KINDS]
    unheld = [row for row in rows if row["kind"] in UNHELD_KINDS]
    parts = _divided(sum(segment.gpu_us for segment in nobody), [row["gpu_us"] for row in unheld])
    energies = _divided(sum(segment.energy_mj or 0 for segment in nobody), [row["energy_mj"] or 0 for row in unheld])
    of_row = {id(row): amounts for row, *amounts in zip(unheld, parts, energies, strict=True)}
    out: list[ChargeShare] = []
    for row in rows:
        segment = held.get((row["tenant"], row["job_id"], row["kind"], row["activity"]))
        us, mj = of_row.get(id(row), (0, 0)) if segment is None else (segment.gpu_us, segment.energy_mj)
        if us:
            out.append(_share(row, us, mj))
    return out


def _divided(total: int, weights: Sequence[int]) -> list[int]:
    """By largest remainder; nothing where there is nothing to divide it by."""
    return largest_remainder_exact(total, weights) if any(weights) else [0] * len(weights)


def _merged(segments: Iterable[Segment]) -> list[Segment]:
    """One for each key of charges: a job may hold two instances of a GPU."""
    by_key: dict[tuple[str, ...], Segment] = {}
    for segment in segments:
        key = segment.tenant, segment.job_id, segment.kind, segment.activity
        before = by_key.get(key)
        if before is not None:
            known = [mj for mj in (before.energy_mj, segment.energy_mj) if mj is not None]
            total = sum(known) if known else None
            us = before.gpu_us + segment.gpu_us
            segment = Segment(segment.kind, segment.tenant, segment.job_id, 0, segment.activity, us, total, [], [])
        by_key[key] = segment
    return list(by_key.values())


def _share(row: Mapping[str, Any], us: int, mj: int | None) -> ChargeShare:
    return ChargeShare(
        interval_start_ms=row["start_ms"],
        interval_end_ms=row["end_ms"],
        tenant=row["tenant"],
        job_id=row["job_id"],
        kind=row["kind"],
        activity=row["activity"],
        payer=row["payer"],
        row_us=row["gpu_us"],
        row_asset_cost=row["asset_cost"],
        row_charge=row["charge"],
        asset_currency=row["asset_currency"],
        charge_currency=row["charge_currency"],
        rate_card=row["rate_card"],
        estimate=bool(row["estimate"]),
        incomplete=bool(row["incomplete"]),
        share_us=us,
        share_asset_cost=_asset_cost(row, us, mj),
        share_charge=_part(row["charge"], us, row["gpu_us"]),
    )
