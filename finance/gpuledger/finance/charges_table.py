"""Charges as Arrow, ready for ClickHouse: the one place where nano-units become Decimal(38, 9) by the column."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gpuledger.finance.charges import Charges

__all__ = ["charges_table", "decimal_array"]

_DECIMAL = pa.decimal128(38, 9)


def decimal_array(nano: NDArray[Any], known: NDArray[np.bool_]) -> pa.Array:
    """Nano-units (int64, or Python integers below 10^38) as Decimal(38, 9); NULL where not `known`."""
    words = np.empty((len(nano), 2), dtype=np.int64)
    if nano.dtype == object:
        for n, value in enumerate(nano.tolist()):
            low = value & (2**64 - 1)
            words[n] = low - 2**64 if low >= 2**63 else low, value >> 64
    else:
        words[:, 0] = nano
        words[:, 1] = nano >> 63
    valid = pa.py_buffer(np.packbits(known, bitorder="little").tobytes())
    return pa.Array.from_buffers(_DECIMAL, len(nano), [valid, pa.py_buffer(words.tobytes())])


def charges_table(
    charges: Sequence[Charges], estimate: Sequence[bool], rates_hash: Sequence[int] | None = None
) -> pa.Table:
    """The rows of many intervals with the columns of the table `charges`, except `version` and `rows_hash`; one
    `estimate` and one `rates_hash` (0: not known) for each interval, the latter in its marker."""
    sizes = [len(each) for each in charges]

    def of_interval(values: list[Any], kind: pa.DataType) -> pa.Array:
        return pa.array(values, type=kind).take(pa.array(np.repeat(np.arange(len(sizes)), sizes)))

    def rows(name: str) -> NDArray[Any]:
        return np.concatenate([getattr(each, name) for each in charges])

    time = pa.timestamp("ms", tz="UTC")
    # The marker is the last row of an interval.
    hashes = np.zeros(sum(sizes), dtype=np.uint64)
    hashes[np.cumsum(np.array(sizes, dtype=np.int64)) - 1] = np.array(rates_hash or [0] * len(sizes), dtype=np.uint64)
    return pa.table(
        {
            "pool": of_interval([each.pool for each in charges], pa.string()),
            "interval_start": of_interval([each.start_ms for each in charges], time),
            "interval_end": of_interval([each.end_ms for each in charges], time),
            **{name: pa.array(rows(name), pa.string()) for name in ("tenant", "job_id", "kind", "activity", "payer")},
            "gpu_us": pa.array(rows("gpu_us")),
            "energy_mj": pa.array(rows("energy_mj"), mask=~rows("energy_known")),
            "asset_cost": decimal_array(rows("asset_cost"), rows("asset_known")),
            "energy_cost": decimal_array(rows("energy_cost"), rows("energy_cost_known")),
            "asset_currency": of_interval([each.asset_currency for each in charges], pa.string()),
            "charge": decimal_array(rows("charge"), rows("charge_known")),
            "charge_currency": pa.array(rows("charge_currency"), pa.string()),
            "rate_card": pa.array(rows("rate_card"), pa.string()),
            "estimate": of_interval([int(each) for each in estimate], pa.uint8()),
            "incomplete": pa.array(rows("incomplete"), pa.uint8()),
            "rates_hash": pa.array(hashes),
        }
    )
