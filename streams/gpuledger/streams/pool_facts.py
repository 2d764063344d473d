"""What is known of a pool, as it was read, and how its tables are turned into arrays. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gpuledger.schemas.events import Tenant

__all__ = ["OPEN_END_MS", "Conflict", "PoolFacts", "codes", "strings", "times"]

Ints = NDArray[np.int64]

#: The end of what has none.
OPEN_END_MS = 1 << 46


@dataclass(frozen=True, slots=True)
class Conflict:
    """Something that does not fit, over [from_ms, to_ms)."""

    kind: str
    subject: str
    other: str
    from_ms: int
    to_ms: int
    detail: str


@dataclass(frozen=True, slots=True)
class PoolFacts:
    """What was read for one pool and range, as tables with the columns of the ClickHouse tables, voids left out.

    `placements`: every placement of every GPU that any placement of the pool names. `allocations`: of those GPUs, with
    `named_ms` (latest naming, NULL for none) and `job_ended_ms` (when their job ended, NULL where that is not known).
    `geometries` of those GPUs. `boots`: node, boot_id, start_ms. `commitments` and `transfers` of the pool. `tenants`:
    the account map.
    """

    pool: str
    placements: pa.Table
    geometries: pa.Table
    allocations: pa.Table
    boots: pa.Table
    commitments: pa.Table
    transfers: pa.Table
    tenants: Sequence[Tenant] = ()


def strings(table: pa.Table, name: str) -> list[str]:
    """The strings of a column."""
    return table.column(name).to_pylist()


def times(table: pa.Table, name: str, null: int) -> Ints:
    """The integers of a column, `null` where there is none."""
    return table.column(name).fill_null(null).to_numpy().astype(np.int64)


def codes(values: pa.Array | pa.ChunkedArray) -> tuple[Ints, list[str]]:
    """Codes that sort as the strings do, and the strings by code."""
    column = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    encoded = column.dictionary_encode()
    names: list[str] = encoded.dictionary.to_pylist()
    order = sorted(range(len(names)), key=names.__getitem__)
    rank = np.empty(len(names), dtype=np.int64)
    rank[order] = np.arange(len(names))
    return rank[encoded.indices.to_numpy()] if names else np.empty(0, np.int64), [names[n] for n in order]
