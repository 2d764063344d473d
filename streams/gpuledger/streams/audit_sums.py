"""What an audit reads of everything: each table once, added up by minute, hour or interval on the server.

Sums of single GPUs, tenants and jobs are compared without being fetched. Each amount is multiplied by a random odd
number of its key, and the products are added up modulo 2^64: two tables whose amounts are the same have the same sum,
and two that differ in one key never have. That several differences cancel out has a chance of about 1 in 2^64 for
amounts not made with the numbers known, and those are drawn anew for every audit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gpuledger.streams.ledger_digest import row_hash_sql
from gpuledger.streams.store import FRAGMENT_HASH, Store

__all__ = ["Grid", "Places", "Scope", "fragment_sums", "gpu_numbers", "no_sums", "read_sums"]

Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]

#: The random number of a key; odd, so that no amount times it is 0.
_WHO = "bitOr(cityHash64({salt:UInt64}, tenant, kind, activity), 1)"
_JOB = "bitOr(cityHash64({salt:UInt64}, tenant, $job, kind, activity), 1)"
_GPU = "bitOr(cityHash64({salt:UInt64}, gpu), 1)"
_US = "toUInt64(gpu_us)"
_HELD = "kind IN ('held', 'unconfirmed')"
_NOBODY = "kind IN ('unallocated', 'unsliced', 'reserved_unused', 'free')"
_SEEN = "activity IN ('active', 'idle', 'down')"
_ROWS = "kind != 'marker'"
_MARKER = "kind = 'marker'"


def _sum(number: str, condition: str) -> str:
    return f"sumIf({_US} * {number}, {condition})"


#: By table: its time, and what is added up. `least` is the smallest amount; `rows_hash` was kept, `rows_sum` is so now.
_COLUMNS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "ledger_minute": (
        "minute",
        {
            "service": f"maxIf(gpu_us, {_MARKER})",
            "segments": f"sumIf({_US}, kind IN ('held', 'unconfirmed', 'reserved_unused', 'free', 'unsliced'))",
            "held": _sum(_WHO, _HELD),
            "seen": _sum(_WHO, f"{_HELD} AND {_SEEN}"),
            "nobody": f"sumIf({_US}, {_NOBODY} OR kind = 'unsliced')",
            "unsliced": f"sumIf({_US}, kind = 'unsliced')",
            "rest": _sum(
                _JOB.replace("$job", "''"), "kind IN ('reserved_unused', 'free', 'unsliced', 'overcommitted')"
            ),
            "complete": "min(complete)",
            **{name: f"maxIf({name}, {_MARKER})" for name in ("fragments", "fragments_hash", "facts_hash")},
            "facts_formula": f"maxIf(facts_formula, {_MARKER})",
        },
    ),
    "ledger_gpu_minute": (
        "minute",
        {
            "gpus": _sum(_GPU, _ROWS),
            "held": _sum(_WHO, _HELD),
            "seen": _sum(_WHO, f"{_HELD} AND {_SEEN}"),
            "nobody": f"sumIf({_US}, {_NOBODY})",
        },
    ),
    "ledger_gpu_hour": (
        "hour",
        {
            "gpus": _sum(_GPU, _ROWS),
            "held": _sum(_WHO, _HELD),
            "jobs": _sum(_JOB.replace("$job", "job_id"), _HELD),
            "nobody": f"sumIf({_US}, {_NOBODY})",
            "unsliced": f"sumIf({_US}, kind = 'unsliced')",
        },
    ),
    "ledger_job_hour": (
        "hour",
        {"held": _sum(_WHO, _ROWS), "jobs": _sum(_JOB.replace("$job", "job_id"), _ROWS)},
    ),
    "charges": (
        "interval_start",
        {
            "end_ms": "toUnixTimestamp64Milli(max(interval_end))",
            "jobs": _sum(_JOB.replace("$job", "job_id"), _ROWS),
            "money_differs": f"""
                maxIf(gpu_us, {_MARKER}) != sumIf(toInt128(gpu_us), kind NOT IN ('marker', 'overcommitted'))
                OR ifNull(maxIf(asset_cost, {_MARKER}) != ifNull(sumIf(asset_cost, {_ROWS}), 0),
                    isNotNull(sumIf(asset_cost, {_ROWS})))
                OR ifNull(maxIf(energy_cost, {_MARKER}) != ifNull(sumIf(energy_cost, {_ROWS}), 0), 0)""",
            "rates_hash": f"maxIf(rates_hash, {_MARKER})",
        },
    ),
}
_EVERY = {
    "markers": f"countIf({_MARKER})",
    "least": f"minIf(gpu_us, {_ROWS})",
    "rows_hash": f"maxIf(rows_hash, {_MARKER})",
}
# By version and not by the newest one, which would be another pass: what is old is little, and falls out below.
_SQL = """
    SELECT pool, toUnixTimestamp64Milli($time) AS at_ms, $columns
    FROM $table
    WHERE $time >= fromUnixTimestamp64Milli({from_ms:Int64}, 'UTC')
        AND $time < fromUnixTimestamp64Milli({to_ms:Int64}, 'UTC') AND ({all:UInt8} OR pool IN {pools:Array(String)})
    GROUP BY pool, $time, version
    ORDER BY pool, $time, version DESC LIMIT 1 BY pool, $time
"""
# Without FINAL, for all pools together: a fragment that is there twice makes the count wrong, and then the minute is
# read as a recompute reads it. Blocks are larger than by default: a fifth less CPU for as many columns.
_FRAGMENTS = """
    SELECT toUnixTimestamp64Milli(minute) AS at_ms, count() AS fragments, sum($hash) AS hash,
        sumDistinctIf($gpu, notEmpty(segment_duration_ms)) AS gpus
    FROM fragments
    WHERE minute >= fromUnixTimestamp64Milli({from_ms:Int64}, 'UTC')
        AND minute < fromUnixTimestamp64Milli({to_ms:Int64}, 'UTC')
    GROUP BY minute ORDER BY minute
    SETTINGS preferred_block_size_bytes = 16000000
""".replace("$hash", FRAGMENT_HASH).replace("$gpu", _GPU)
_NUMBERS = "SELECT DISTINCT gpu, $gpu AS number FROM placements".replace("$gpu", _GPU)


@dataclass(frozen=True, slots=True)
class Scope:
    """What is read: [from_ms, to_ms) of `pools` (None: all), with the random numbers of `salt`."""

    from_ms: int
    to_ms: int
    pools: tuple[str, ...] | None
    salt: int

    @property
    def parameters(self) -> dict[str, object]:
        """For the queries."""
        bounds = {"from_ms": self.from_ms, "to_ms": self.to_ms, "salt": self.salt}
        return {**bounds, "pools": list(self.pools or ()), "all": int(self.pools is None)}


@dataclass(frozen=True, slots=True)
class Places:
    """The sums of one pool at the times where a table has rows: `at_ms` ascending, and columns of the same length."""

    at_ms: Ints
    columns: Mapping[str, NDArray[np.generic]]

    def __getitem__(self, name: str) -> NDArray[np.generic]:
        return self.columns[name]


class Grid:
    """Sums of one pool laid out by units of [from_ms, to_ms): 0 where there is nothing, `there` says where."""

    def __init__(self, places: Places, from_ms: int, to_ms: int, unit_ms: int) -> None:
        self._places = places
        self._size = max(0, to_ms - from_ms) // unit_ms
        inside = (places.at_ms >= from_ms) & (places.at_ms < from_ms + self._size * unit_ms)
        self._rows = np.flatnonzero(inside)
        self._at = (places.at_ms[self._rows] - from_ms) // unit_ms
        self.there = np.zeros(self._size, dtype=bool)
        self.there[self._at] = True

    def __getitem__(self, name: str) -> NDArray[np.generic]:
        values = self._places[name]
        out = np.zeros(self._size, dtype=values.dtype)
        out[self._at] = values[self._rows]
        return out


_NOWHERE = np.zeros(0, dtype=np.int64)


def read_sums(store: Store, table: str, scope: Scope) -> dict[str, Places]:
    """The newest version's sums of a table, by pool."""
    time, columns = _COLUMNS[table]
    every = {**columns, **_EVERY, "rows_sum": f"sum({row_hash_sql(table)})"}
    sql = _SQL.replace("$columns", ", ".join(f"{value} AS {name}_" for name, value in every.items()))
    found = store.table(sql.replace("$table", table).replace("$time", time), scope.parameters)
    return _by_pool(found, tuple(every))


def _by_pool(found: pa.Table, names: Sequence[str]) -> dict[str, Places]:
    """`found` is sorted by pool and time; its columns are called as `names` with an underscore: a name that is also a
    column's would hide it inside the query."""
    pools = found.column("pool").combine_chunks()
    pools = pools.cast(pa.string()).dictionary_encode()
    code = pools.indices.to_numpy()
    out: dict[str, Places] = {}
    at = found.column("at_ms").to_numpy()
    columns = {name: found.column(f"{name}_").to_numpy() for name in names}
    for n, pool in enumerate(pools.dictionary.to_pylist()):
        rows = np.flatnonzero(code == n)
        out[pool] = Places(at[rows], {name: values[rows] for name, values in columns.items()})
    return out


def no_sums(table: str) -> Places:
    """Of a pool without rows."""
    names = (*_COLUMNS[table][1], *_EVERY, "rows_sum")
    signed = ("least", "service", "end_ms")
    return Places(_NOWHERE, {name: np.zeros(0, np.int64 if name in signed else np.uint64) for name in names})


def fragment_sums(store: Store, scope: Scope) -> Places:
    """Of the fragments of all pools, by minute: how many `fragments`, the sum of their `hash`, and `gpus`, the sum of
    the numbers of the GPUs that were seen for any time."""
    found = store.table(_FRAGMENTS, scope.parameters)
    names = ("fragments", "hash", "gpus")
    return Places(found.column("at_ms").to_numpy(), {name: found.column(name).to_numpy() for name in names})


def gpu_numbers(store: Store, salt: int) -> dict[str, int]:
    """The random number of every GPU that has a placement."""
    return {str(gpu): int(number) for gpu, number in store.rows(_NUMBERS, {"salt": salt})}
