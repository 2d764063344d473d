"""The worker's side of ClickHouse: idempotent inserts, and the reads of facts and fragments.

One `Store` belongs to one thread. Every insert is one block inside one partition; repeating it writes the same rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import clickhouse_connect
import numpy as np
import pyarrow as pa
from clickhouse_connect.driver.exceptions import DatabaseError, OperationalError
from urllib3.exceptions import HTTPError

from gpuledger.schemas.config import ClickHouse
from gpuledger.schemas.events import AssetCost, EnergyTariff, RateCard, Tenant, decode_event
from gpuledger.streams.pool_facts import OPEN_END_MS, PoolFacts

__all__ = ["FRAGMENT_HASH", "KEPT_MS", "PART_FRAGMENTS", "Rate", "Store", "is_io_error"]

Rate = AssetCost | EnergyTariff | RateCard

#: Arrow input is lenient by default: NULL becomes 0 and unknown columns vanish. Not for a ledger. Recent servers gather
#: inserts into blocks of their own (`async_insert`); ours are blocks already, and wait for nobody else's.
_INSERT_SETTINGS = {"input_format_null_as_default": 0, "input_format_skip_unknown_fields": 0, "async_insert": 0}
#: An insert above this may be cut into several parts, of which a crash could leave some.
MAX_BLOCK_ROWS = 500_000
#: Fragments that one read brings, about. What a slice holds in memory must depend neither on the length of its range
#: nor on how far the open hour has come; more in one read makes no slice quicker.
PART_FRAGMENTS = 10_000
_MINUTE_MS = 60_000
#: Fragments and GPU minutes are deleted after 90 days, some hours before or after.
KEPT_MS = 89 * 86_400_000
#: Names in one bound array parameter.
_MAX_NAMES = 5_000
#: ClickHouse codes that are a matter of load or of being away, not of the data.
_TRANSIENT_CODES = ("159", "160", "164", "202", "209", "210", "241", "242", "252", "319", "394", "425", "999")
_CODE = re.compile(r"Code: (\d+)\.")
#: What a full disk looks like: no reservation, or a write, sync, close, truncation or new directory that fails.
_DISK_CODES = ("75", "77", "88", "172", "204", "243", "294")
_DISK_TEXTS = ("No space left on device", "File too large")

_EXTENTS = """
    SELECT pool, min(start), max(end) FROM (
        SELECT pool, start_ms AS start, ifNull(end_ms, {open:Int64}) AS end FROM placements
        UNION ALL SELECT pool, start_ms, ifNull(end_ms, {open:Int64}) FROM commitments
        UNION ALL SELECT pool, JSONExtractInt(document, 'start_ms'), JSONExtractInt(document, 'end_ms') FROM rates
            WHERE kind = 'asset_cost')
    GROUP BY pool
"""
_PLACEMENTS = """
    SELECT id, claimed_at, gpu, node, pool, start_ms, end_ms, cityHash64(id, rank) AS hash
    FROM placements FINAL
    WHERE void = 0 AND gpu IN (SELECT gpu FROM placements WHERE pool = {pool:String})
"""
_GEOMETRIES = """
    SELECT id, node, gpu, start_ms, end_ms, slices, sliced, cityHash64(id, rank) AS hash FROM geometries FINAL
    WHERE void = 0 AND start_ms < {to_ms:Int64} AND (end_ms IS NULL OR end_ms > {from_ms:Int64})
        AND gpu IN (SELECT gpu FROM placements WHERE pool = {pool:String})
"""
_ALLOCATIONS = """
    SELECT id, node, boot_id, gpu, instance, epoch_ms, job_id, source, account, user, namespace, tenant, weight_num,
        weight_den, start_ms, end_ms, named_ms, job_ended_ms, cityHash64(id, rank) AS hash
    FROM allocations FINAL
    LEFT JOIN (
        SELECT allocation_id, max(named_ms) AS named_ms FROM confirmed WHERE allocation_id IN (
            SELECT id FROM allocations FINAL WHERE void = 0 AND end_ms IS NULL)
        GROUP BY allocation_id
    ) AS c ON c.allocation_id = id
    LEFT JOIN (
        SELECT id AS ended_id, ended_ms AS job_ended_ms FROM jobs FINAL WHERE id IN (
            SELECT job_id FROM allocations FINAL WHERE void = 0 AND end_ms IS NULL)
    ) AS j ON j.ended_id = job_id
    WHERE void = 0 AND start_ms < {to_ms:Int64} AND (end_ms IS NULL OR end_ms > {from_ms:Int64})
        AND gpu IN (SELECT gpu FROM placements WHERE pool = {pool:String})
    SETTINGS join_use_nulls = 1
"""
_UNPLACED = """
    SELECT id, gpu, job_id, weight_num, weight_den, start_ms, end_ms FROM allocations FINAL
    WHERE void = 0 AND start_ms < {to_ms:Int64} AND (end_ms IS NULL OR end_ms > {from_ms:Int64})
        AND gpu NOT IN (SELECT gpu FROM placements)
"""
_BOOTS = "SELECT node, boot_id, min(start_ms) AS start_ms FROM boots GROUP BY node, boot_id"
_COMMITMENTS = """
    SELECT id, tenant, gpus, start_ms, end_ms, state, cityHash64(id, rank) AS hash FROM commitments FINAL
    WHERE pool = {pool:String} AND start_ms < {to_ms:Int64} AND (end_ms IS NULL OR end_ms > {from_ms:Int64})
"""
_TRANSFERS = """
    SELECT id, from_tenant, to_tenant, gpus, start_ms, end_ms, state, cityHash64(id, rank) AS hash FROM transfers FINAL
    WHERE pool = {pool:String} AND start_ms < {to_ms:Int64} AND (end_ms IS NULL OR end_ms > {from_ms:Int64})
"""
_FRAGMENT_COLUMNS = """minute, gpu, instance, run_start_ms, run_id, seq, segment_start_ms, segment_duration_ms,
        segment_activity, segment_energy_from_mj, segment_energy_to_mj"""
_FRAGMENTS_OF = """
    FROM fragments FINAL
    WHERE minute >= fromUnixTimestamp64Milli({from_ms:Int64}, 'UTC')
        AND minute < fromUnixTimestamp64Milli({to_ms:Int64}, 'UTC')
        AND gpu IN (SELECT gpu FROM placements WHERE pool = {pool:String})"""
#: An epoch that is not known adds nothing: fragments from before there were epochs keep the hash they were read with.
FRAGMENT_HASH = f"bitXor(cityHash64({_FRAGMENT_COLUMNS}), if(epoch_ms = 0, 0, cityHash64(epoch_ms)))"
_FRAGMENTS = f"""
    SELECT {_FRAGMENT_COLUMNS}, epoch_ms, {FRAGMENT_HASH} AS hash
    {_FRAGMENTS_OF}
    SETTINGS do_not_merge_across_partitions_select_final = 1
"""
#: How many there are, or a few more: versions of one row that were not merged yet count each.
_FRAGMENT_COUNTS = f"""
    SELECT toUnixTimestamp64Milli(minute) AS at_ms, count() {_FRAGMENTS_OF.replace("FINAL", "")}
    GROUP BY minute ORDER BY minute
"""
#: The hash of each minute's fragments, added up by the server: an audit of a day must not fetch the day.
_FRAGMENT_PRINTS = f"""
    SELECT toUnixTimestamp64Milli(minute) AS at_ms, count() AS fragments, sum({FRAGMENT_HASH}) AS hash
    {_FRAGMENTS_OF}
    GROUP BY minute ORDER BY minute
    SETTINGS do_not_merge_across_partitions_select_final = 1
"""


def is_io_error(error: Exception) -> bool:
    """True for what another attempt may heal: the server is away, slow, full or restarting."""
    if isinstance(error, (ConnectionError, TimeoutError, HTTPError, OSError)):
        return True
    if isinstance(error, OperationalError):
        return True
    if isinstance(error, DatabaseError):
        text = str(error)
        code = getattr(error, "code", None) or (found[1] if (found := _CODE.search(text)) else None)
        return str(code) in (*_TRANSIENT_CODES, *_DISK_CODES) or any(told in text for told in _DISK_TEXTS)
    return False


class Store:
    """A connection. All times in parameters and answers are UTC milliseconds."""

    def __init__(self, config: ClickHouse) -> None:
        self._config = config
        self._client: Any = None

    @property
    def client(self) -> Any:
        """The driver's client, connected on first use."""
        if self._client is None:
            self._client = clickhouse_connect.get_client(
                **self._config.client_arguments(), autogenerate_session_id=False, form_encode_query_params=True
            )
        return self._client

    @property
    def database(self) -> str:
        return self._config.database

    def another(self) -> Store:
        """A connection to the same database, for another thread."""
        return Store(self._config)

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    # -- generic

    def insert(self, table: str, rows: pa.Table) -> None:
        """One insert of at most MAX_BLOCK_ROWS rows of one partition (the caller's duty), durable when it returns."""
        if rows.num_rows:
            self.client.insert_arrow(table, rows.combine_chunks(), settings=_INSERT_SETTINGS)

    def insert_by_day(self, table: str, rows: pa.Table, column: str) -> None:
        """Inserts rows in blocks of one UTC day each, for tables partitioned by the day of `column`."""
        day = rows.column(column).cast(pa.int64()).to_numpy() // 86_400_000
        for value in np.unique(day).tolist():
            part = rows.filter(pa.array(day == value))
            for start in range(0, part.num_rows, MAX_BLOCK_ROWS):
                self.insert(table, part.slice(start, MAX_BLOCK_ROWS))

    def rows(self, sql: str, parameters: Mapping[str, Any] | None = None) -> list[tuple[Any, ...]]:
        """Rows of a small query."""
        return list(self.client.query(sql, parameters=dict(parameters or {})).result_rows)

    def table(self, sql: str, parameters: Mapping[str, Any] | None = None) -> pa.Table:
        """A result as Arrow; strings as strings."""
        settings = {"output_format_arrow_string_as_string": 1, "output_format_arrow_low_cardinality_as_dictionary": 0}
        return self.client.query_arrow(sql, parameters=dict(parameters or {}), settings=settings)

    # -- facts

    def pool_facts(self, pool: str, from_ms: int, to_ms: int) -> PoolFacts:
        """What decides who held what in the pool over [from_ms, to_ms). Tables also have a column `hash` (UInt64)."""
        p = {"pool": pool, "from_ms": from_ms, "to_ms": to_ms}
        return PoolFacts(
            pool=pool,
            placements=self.table(_PLACEMENTS, p),
            geometries=self.table(_GEOMETRIES, p),
            allocations=self.table(_ALLOCATIONS, p),
            boots=self.table(_BOOTS),
            commitments=self.table(_COMMITMENTS, p),
            transfers=self.table(_TRANSFERS, p),
            tenants=self.tenants(),
        )

    def unplaced_allocations(self, from_ms: int, to_ms: int) -> pa.Table:
        """Allocations on GPUs that no placement has ever named."""
        return self.table(_UNPLACED, {"from_ms": from_ms, "to_ms": to_ms})

    def tenants(self) -> list[Tenant]:
        """The account map."""
        documents = self.rows("SELECT document FROM rates FINAL WHERE kind = 'tenant' ORDER BY id")
        return [fact for (text,) in documents if isinstance(fact := decode_event(text.encode()), Tenant)]

    def rates(self, pool: str) -> list[Rate]:
        """Asset costs and rate cards of the pool, and all tariffs."""
        documents = self.rows(
            "SELECT document FROM rates FINAL WHERE kind IN ('asset_cost', 'rate_card') AND pool = {pool:String} "
            "OR kind = 'energy_tariff'",
            {"pool": pool},
        )
        return [fact for (text,) in documents if isinstance(fact := decode_event(text.encode()), Rate)]

    def pools(self) -> list[str]:
        """Every pool that any fact names."""
        sql = (
            "SELECT DISTINCT pool FROM placements UNION DISTINCT SELECT DISTINCT pool FROM commitments "
            "UNION DISTINCT SELECT DISTINCT pool FROM rates WHERE pool != ''"
        )
        return sorted(pool for (pool,) in self.rows(sql))

    def extents(self) -> dict[str, tuple[int, int]]:
        """From when to when each pool can have anything to account: service, commitments or asset cost."""
        return {pool: (int(start), int(end)) for pool, start, end in self.rows(_EXTENTS, {"open": OPEN_END_MS})}

    def pools_of(self, gpus: Iterable[str]) -> dict[str, set[str]]:
        """Every pool in which any stored revision of any placement puts each GPU."""
        out: dict[str, set[str]] = {}
        for names in _chunks(sorted(set(gpus))):
            sql = "SELECT DISTINCT gpu, pool FROM placements WHERE gpu IN {gpus:Array(String)}"
            for gpu, pool in self.rows(sql, {"gpus": names}):
                out.setdefault(gpu, set()).add(pool)
        return out

    # -- fragments

    def fragments(self, pool: str, from_ms: int, to_ms: int) -> pa.Table:
        """Fragments of the pool's GPUs with minutes in [from_ms, to_ms), each once, and their `hash`."""
        return self.table(_FRAGMENTS, {"pool": pool, "from_ms": from_ms, "to_ms": to_ms})

    def fragment_parts(self, pool: str, from_ms: int, to_ms: int) -> Iterator[pa.Table]:
        """The same in the order of time, in parts of whole minutes that hold about `PART_FRAGMENTS` rows; nothing is
        read of minutes that had none when the first part was asked for."""
        parameters = {"pool": pool, "from_ms": from_ms, "to_ms": to_ms}
        start_ms, end_ms, rows = from_ms, from_ms, 0
        for at_ms, count in self.rows(_FRAGMENT_COUNTS, parameters):
            if rows and rows + int(count) > PART_FRAGMENTS:
                yield self.fragments(pool, start_ms, end_ms)
                rows = 0
            start_ms = start_ms if rows else int(at_ms)
            end_ms, rows = int(at_ms) + _MINUTE_MS, rows + int(count)
        if rows:
            yield self.fragments(pool, start_ms, end_ms)

    def fragment_prints(self, pool: str, from_ms: int, to_ms: int) -> pa.Table:
        """Of each minute that has fragments: at_ms, their number, and the sum of their hashes modulo 2^64."""
        return self.table(_FRAGMENT_PRINTS, {"pool": pool, "from_ms": from_ms, "to_ms": to_ms})

    # -- how far everything has been stored

    def stored_until_ms(self, gates: Mapping[str, int]) -> int:
        """The smallest append time that every partition of the gating topics (name: partitions) has stored; 0 when
        one has stored nothing yet."""
        sql = "SELECT topic, partition, max(appended_ms) FROM progress GROUP BY topic, partition"
        known = {(topic, int(partition)): int(ms) for topic, partition, ms in self.rows(sql)}
        return min((known.get((topic, n), 0) for topic, count in gates.items() for n in range(count)), default=0)


def _chunks(names: Sequence[str]) -> Iterable[list[str]]:
    for start in range(0, len(names), _MAX_NAMES):
        yield list(names[start : start + _MAX_NAMES])
