"""An order-free hash of ledger rows that numpy and ClickHouse compute alike: at write time and in an audit.

Every column of a row goes into one 64-bit number; the numbers of a minute (hour, interval) are added up modulo 2^64 and
kept in its marker. A row that is lost, doubled or changed then changes the sum, whichever column it is in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

__all__ = ["DIGESTED", "ROWS_HASH", "digested", "row_hash_sql", "row_hashes", "string_hashes"]

Hashes = NDArray[np.uint64]

ROWS_HASH = "rows_hash"

#: What SQL and numpy make a number of: text by its hash, integers as they are, decimals in nano-units, times in ms.
_TEXT, _INTEGER, _DECIMAL, _TIME = "text", "integer", "decimal", "time"
_AMOUNTS = {"gpu_us": _INTEGER, "energy_mj": _INTEGER}
#: Of each table the columns that are hashed: all but the pool and the time, by which the sums are kept, the version,
#: and the sum itself.
DIGESTED: Mapping[str, Mapping[str, str]] = {
    "ledger_minute": {
        **dict.fromkeys(("tenant", "kind", "activity"), _TEXT),
        **_AMOUNTS,
        **dict.fromkeys(("complete", "fragments", "fragments_hash", "facts_hash", "facts_formula"), _INTEGER),
    },
    "ledger_gpu_minute": {
        **dict.fromkeys(("gpu", "tenant", "job_id", "kind", "activity"), _TEXT),
        "instance": _INTEGER,
        **_AMOUNTS,
    },
    "ledger_gpu_hour": {
        **dict.fromkeys(("gpu", "tenant", "job_id", "kind", "activity"), _TEXT),
        "instance": _INTEGER,
        **_AMOUNTS,
    },
    "ledger_job_hour": {**dict.fromkeys(("tenant", "job_id", "user", "kind", "activity"), _TEXT), **_AMOUNTS},
    "charges": {
        "interval_end": _TIME,
        **dict.fromkeys(("tenant", "job_id", "kind", "activity", "payer", "asset_currency"), _TEXT),
        **dict.fromkeys(("charge_currency", "rate_card"), _TEXT),
        **_AMOUNTS,
        **dict.fromkeys(("asset_cost", "energy_cost", "charge"), _DECIMAL),
        **dict.fromkeys(("estimate", "incomplete", "rates_hash"), _INTEGER),
    },
}
#: Instead of a value that is not known: no amount is this number.
_NULL = 0x9E3779B97F4A7C15

_M = 0xC6A4A7935BD1E995
_MASK = (1 << 64) - 1


# ------------------------------------------------------------------------------------------------- numpy


def digested(table: str, rows: pa.Table, time: str) -> pa.Table:
    """The rows with a column `rows_hash`: in markers the sum over the rows of their `time`, 0 elsewhere. Rows are
    sorted by `time`, each with one marker."""
    hashes = row_hashes(table, rows)
    at = rows.column(time).cast(pa.int64()).to_numpy()
    first = np.flatnonzero(np.append(True, np.diff(at) != 0)) if len(at) else np.zeros(0, np.int64)
    sums = np.zeros(len(at), dtype=np.uint64)
    if len(at):
        size = np.diff(np.append(first, len(at)))
        kinds = _plain(rows.column("kind")).combine_chunks().dictionary_encode()
        marker = np.array([name == "marker" for name in kinds.dictionary.to_pylist()])[kinds.indices.to_numpy()]
        sums = np.where(marker, np.repeat(np.add.reduceat(hashes, first), size), np.uint64(0))
    return rows.append_column(ROWS_HASH, pa.array(sums, type=pa.uint64()))


def row_hashes(table: str, rows: pa.Table) -> Hashes:
    """The hash of every row."""
    total = np.zeros(rows.num_rows, dtype=np.uint64)
    for name, kind in DIGESTED[table].items():
        total += np.uint64(_factor(name)) * _numbers(rows.column(name), kind)
    return _mixed(total)


def _numbers(column: pa.ChunkedArray, kind: str) -> Hashes:
    if kind == _TEXT:
        values = _plain(column).combine_chunks()
        encoded = values.dictionary_encode()
        if len(encoded) == 0:
            return np.zeros(0, dtype=np.uint64)
        return string_hashes(encoded.dictionary.to_pylist())[encoded.indices.to_numpy()]
    known = column.is_valid().to_numpy()
    if kind == _DECIMAL:
        array = column.combine_chunks()
        words = np.frombuffer(array.buffers()[1], dtype=np.uint64).reshape(-1, 2)
        numbers = words[array.offset : array.offset + len(array), 0]
    elif column.type == pa.uint64():
        numbers = column.fill_null(0).to_numpy()
    else:
        # Two's complement, as ClickHouse's toUInt64 has it.
        numbers = column.cast(pa.int64()).fill_null(0).to_numpy().astype(np.int64).view(np.uint64)
    return np.where(known, numbers, np.uint64(_NULL))


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _mixed(values: Hashes) -> Hashes:
    """ClickHouse's intHash64."""
    x = values ^ np.uint64(0x4CF2D2BAAE6DA887)
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        x ^= x >> np.uint64(33)
        x *= np.uint64(factor)
    return x ^ x >> np.uint64(33)


def string_hashes(names: Sequence[str]) -> Hashes:
    """ClickHouse's murmurHash2_64 of each name."""
    out = np.zeros(len(names), dtype=np.uint64)
    by_length: dict[int, list[int]] = {}
    encoded = [name.encode() for name in names]
    for n, data in enumerate(encoded):
        by_length.setdefault(len(data), []).append(n)
    for length, rows in by_length.items():
        joined = b"".join(encoded[n].ljust(-(-length // 8) * 8, b"\0") for n in rows)
        words = np.frombuffer(joined, dtype="<u8").reshape(len(rows), -1)
        out[rows] = _murmur(words, length)
    return out


def _murmur(words: Hashes, length: int) -> Hashes:
    """MurmurHash64A with seed 0 of texts of one length, as rows of little-endian words padded with zeros."""
    m, r = np.uint64(_M), np.uint64(47)
    h = np.full(len(words), length * _M & _MASK, dtype=np.uint64)
    for n in range(length // 8):
        k = words[:, n] * m
        k ^= k >> r
        h = (h ^ k * m) * m
    if length % 8:
        h = (h ^ words[:, -1]) * m
    h ^= h >> r
    h *= m
    return h ^ h >> r


@lru_cache
def _factor(name: str) -> int:
    """An odd 64-bit number for a column: two columns that change at once do not cancel out."""
    return int(string_hashes([f"column {name}"])[0]) | 1


# ------------------------------------------------------------------------------------------------- ClickHouse


def row_hash_sql(table: str) -> str:
    """An expression that is the same hash of a row of `table`."""
    terms = [f"{_factor(name)} * {_number_sql(name, kind)}" for name, kind in DIGESTED[table].items()]
    return f"intHash64({' + '.join(terms)})"


def _number_sql(name: str, kind: str) -> str:
    if kind == _TEXT:
        return f"murmurHash2_64({name})"
    number: dict[str, Any] = {
        _INTEGER: f"toUInt64({name})",
        _DECIMAL: f"reinterpretAsUInt64({name})",
        _TIME: f"toUInt64(toUnixTimestamp64Milli({name}))",
    }
    nullable = name in ("energy_mj", "asset_cost", "energy_cost", "charge")
    return f"ifNull({number[kind]}, {_NULL})" if nullable else number[kind]
