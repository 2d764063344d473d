"""What people have applied so far: rates, capacity and tenants, read back from the database as the events they were."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from gpuledger.schemas.events import Commitment, Fact, Transfer, decode_event

if TYPE_CHECKING:
    from clickhouse_connect.driver.client import Client

__all__ = ["Applied", "applied", "known_pools", "not_stored"]

Applied = dict[tuple[str, str], Fact]

# rank = revision * 2^20 + bits of the content's hash (migration 0001).
_RATES = "SELECT document FROM rates FINAL WHERE kind IN {kinds:Array(String)} ORDER BY kind, id"
_COMMITMENTS = """
SELECT id, toInt64(bitShiftRight(rank, 20)) AS revision, toInt64(toUnixTimestamp64Milli(claimed_at)) AS claimed_at_ms,
    pool, tenant, gpus, start_ms, end_ms, state, contract, by, why
FROM commitments FINAL ORDER BY pool, id"""
_TRANSFERS = """
SELECT id, toInt64(bitShiftRight(rank, 20)) AS revision, toInt64(toUnixTimestamp64Milli(claimed_at)) AS claimed_at_ms,
    pool, gpus, from_tenant, to_tenant, start_ms, end_ms, state, by, why
FROM transfers FINAL ORDER BY pool, id"""
_STORED: dict[str, str] = {
    "rates": "SELECT kind, id, bitShiftRight(max(rank), 20) FROM rates "
    "WHERE id IN {ids:Array(String)} GROUP BY kind, id",
    "commitments": "SELECT 'commitment', id, bitShiftRight(max(rank), 20) FROM commitments "
    "WHERE id IN {ids:Array(String)} GROUP BY id",
    "transfers": "SELECT 'transfer', id, bitShiftRight(max(rank), 20) FROM transfers "
    "WHERE id IN {ids:Array(String)} GROUP BY id",
}
_TABLES = {"commitment": "commitments", "transfer": "transfers"}


def applied(client: Client, kinds: Sequence[str]) -> Applied:
    """The facts of these kinds that hold now, by (kind, id)."""
    facts: list[Fact] = []
    documents = [kind for kind in kinds if kind not in _TABLES]
    if documents:
        rows = client.query(_RATES, parameters={"kinds": documents}).result_rows
        # The table holds what was decoded before it was stored.
        facts += [fact for (document,) in rows if isinstance(fact := decode_event(document.encode()), Fact)]
    if "commitment" in kinds:
        facts += [Commitment(**row) for row in _rows(client, _COMMITMENTS)]
    if "transfer" in kinds:
        facts += [Transfer(**row) for row in _rows(client, _TRANSFERS)]
    return {(fact.kind, fact.id): fact for fact in facts}


def known_pools(client: Client) -> set[str]:
    """Pools that have GPUs, now or earlier."""
    return {pool for (pool,) in client.query("SELECT DISTINCT pool FROM v_placements").result_rows}


def not_stored(client: Client, facts: Iterable[Fact]) -> list[Fact]:
    """Those of the facts that the database does not have yet, in this revision or a later one."""
    waiting = list(facts)
    stored: dict[tuple[str, str], int] = {}
    for table in {_TABLES.get(fact.kind, "rates") for fact in waiting}:
        ids = [fact.id for fact in waiting if _TABLES.get(fact.kind, "rates") == table]
        for kind, name, revision in client.query(_STORED[table], parameters={"ids": ids}).result_rows:
            stored[kind, name] = int(revision)
    return [fact for fact in waiting if stored.get((fact.kind, fact.id), -1) < fact.revision]


def _rows(client: Client, sql: str) -> list[dict[str, Any]]:
    return list(client.query(sql).named_results())
