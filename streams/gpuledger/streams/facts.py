"""Events to rows of the fact tables, and the intervals that each fact touches. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from gpuledger.schemas.events import (
    Alert,
    Allocation,
    AssetCost,
    Commitment,
    EnergyTariff,
    Event,
    Fact,
    Geometry,
    Inventory,
    Job,
    Placement,
    RateCard,
    Tenant,
    Transfer,
    decode_event,
    encode_event,
)
from gpuledger.schemas.exceptions import MessageError
from gpuledger.schemas.texts import check_texts
from gpuledger.schemas.topics import TOPICS

__all__ = ["StoredFact", "decode_facts", "documents", "fact_rows", "rank_of", "table_of", "touched"]

_STRING, _INT64, _UINT8, _UINT32 = pa.string(), pa.int64(), pa.uint8(), pa.uint32()
_TIME = pa.timestamp("ms", tz="UTC")
_COMMON = {"id": _STRING, "rank": pa.uint64(), "claimed_at": _TIME, "recorded_at": _TIME}
_INTERVAL = {"start_ms": _INT64, "end_ms": _INT64}

_TABLES: dict[str, dict[str, pa.DataType]] = {
    "placements": _COMMON
    | dict.fromkeys(("gpu", "node", "pool", "site", "model"), _STRING)
    | {"gpu_index": pa.int32()}
    | _INTERVAL
    | {"void": _UINT8},
    "allocations": _COMMON
    | {"node": _STRING, "boot_id": _STRING, "gpu": _STRING, "instance": pa.uint16(), "epoch_ms": _INT64}
    | {"job_id": _STRING}
    | dict.fromkeys(("source", "account", "user", "namespace", "tenant"), _STRING)
    | {"weight_num": _UINT32, "weight_den": _UINT32}
    | _INTERVAL
    | {"confidence_pct": _UINT8, "void": _UINT8},
    "geometries": _COMMON
    | {"gpu": _STRING, "node": _STRING, "slices": pa.uint16(), "sliced": pa.uint16()}
    | {"instances": pa.list_(pa.uint16()), "epochs_ms": pa.list_(_INT64), "instance_slices": pa.list_(pa.uint16())}
    | {"profiles": pa.list_(_STRING)}
    | _INTERVAL
    | {"void": _UINT8},
    "jobs": _COMMON
    | dict.fromkeys(("source", "cluster", "name", "account", "user", "tenant", "queue"), _STRING)
    | {"gpus": _UINT32, "submitted_ms": _INT64, "started_ms": _INT64, "ended_ms": _INT64, "state": _STRING}
    | {"tags": pa.map_(_STRING, _STRING)},
    "commitments": _COMMON
    | {"pool": _STRING, "tenant": _STRING, "gpus": _UINT32}
    | _INTERVAL
    | dict.fromkeys(("state", "contract", "by", "why"), _STRING),
    "transfers": _COMMON
    | {"pool": _STRING, "gpus": _UINT32, "from_tenant": _STRING, "to_tenant": _STRING}
    | _INTERVAL
    | dict.fromkeys(("state", "by", "why"), _STRING),
    "rates": {"kind": _STRING} | _COMMON | {"pool": _STRING, "document": _STRING},
    "alerts": _COMMON
    | dict.fromkeys(("rule", "status", "severity", "pool", "tenant"), _STRING)
    | {"started_at": _TIME, "ended_at": _TIME, "money_per_hour": pa.decimal128(38, 9)}
    | dict.fromkeys(("currency", "summary", "action"), _STRING)
    | {"evidence": pa.map_(_STRING, _STRING)},
    "nodes": {"node": _STRING, "claimed_at_ms": _INT64, "recorded_at": _TIME}
    | {"boot_id": _STRING, "agent_version": _STRING, "driver_version": _STRING, "cuda_version": _STRING}
    | {"config_hash": _STRING, "health": _STRING, "gpus": _UINT32},
    "facts": {"kind": _STRING, "id": _STRING, "revision": pa.uint64(), "rank": pa.uint64(), "claimed_at": _TIME}
    | {"recorded_at": _TIME, "topic": _STRING, "partition": _UINT32, "offset": pa.uint64(), "document": _STRING},
}

_TABLE_OF: dict[type[Event], str] = {
    Placement: "placements",
    Geometry: "geometries",
    Allocation: "allocations",
    Job: "jobs",
    Commitment: "commitments",
    Transfer: "transfers",
    Tenant: "rates",
    AssetCost: "rates",
    EnergyTariff: "rates",
    RateCard: "rates",
    Alert: "alerts",
}


@dataclass(frozen=True, slots=True)
class StoredFact:
    """A fact and where on the broker it was read."""

    fact: Fact
    rank: int
    topic: str
    partition: int
    offset: int
    appended_ms: int


def rank_of(fact: Fact) -> int:
    """revision x 2^20 + 20 bits of the content's hash: of equal revisions, content decides, never arrival."""
    digest = hashlib.blake2b(encode_event(fact), digest_size=4).digest()
    return fact.revision << 20 | int.from_bytes(digest, "big") >> 12


def table_of(fact: Fact) -> str:
    """The typed table that holds a fact's current state."""
    return _TABLE_OF[type(fact)]


def decode_facts(topic: str, value: bytes | None) -> tuple[Sequence[Fact], Inventory | None]:
    """The facts of one message of `topic` (an inventory holds many placements and geometries).

    Raises:
        MessageError: it cannot be read, or its type does not belong on the topic.
    """
    if not value:
        raise MessageError('value: is empty; expected a JSON object with a field "type"')
    event = decode_event(value)
    check_texts(event, value)
    if event.kind not in TOPICS[topic].types:
        raise MessageError(
            f"type: {event.kind} does not belong on topic {topic}; expected {', '.join(TOPICS[topic].types)}"
        )
    if isinstance(event, Inventory):
        facts = [*event.placements, *event.geometries]
        wrong = next((fact for fact in facts if fact.node != event.node), None)
        if wrong is not None:
            raise MessageError(
                f"{wrong.kind}: {wrong.id} is on node {wrong.node}, the inventory is of node {event.node}"
            )
        large = next((p for p in event.placements if p.index is not None and not 0 <= p.index < 1 << 31), None)
        if large is not None:
            raise MessageError(f"placements: {large.id}: index: expected 0 to {(1 << 31) - 1}, got {large.index}")
        return facts, event
    if not isinstance(event, Fact):
        raise MessageError(f"type: {event.kind} is not a fact")
    _check_durations(event)
    return [event], None


def _check_durations(fact: Fact) -> None:
    """Raises MessageError where something ends before it begins. Here and not in the contract: what is stored already
    must stay readable."""
    if isinstance(fact, Job):
        spans = [("", fact.started_ms, fact.ended_ms)]
    elif isinstance(fact, Tenant):
        spans = [(f"rules[{n}].", rule.start_ms, rule.end_ms) for n, rule in enumerate(fact.rules)]
    else:
        return
    for path, start, end in spans:
        if start is not None and end is not None and end < start:
            raise MessageError(f"{path}end: {end} is before its start {start}; an interval is [start, end)")


def _row(stored: StoredFact) -> dict[str, Any]:
    fact = stored.fact
    row: dict[str, Any] = {field: getattr(fact, field) for field in fact.__struct_fields__}
    row |= {"rank": stored.rank, "claimed_at": fact.claimed_at_ms, "recorded_at": stored.appended_ms}
    row |= {"kind": fact.kind, "document": None}
    match fact:
        case Placement():
            row |= {"gpu_index": fact.index, "void": int(fact.void)}
        case Allocation():
            row["void"] = int(fact.void)
        case Geometry():
            names = (("instances", "instance"), ("epochs_ms", "epoch_ms"), ("instance_slices", "slices"))
            for column, name in (*names, ("profiles", "profile")):
                row[column] = [getattr(each, name) for each in fact.instances]
            row |= {"sliced": fact.sliced, "void": int(fact.void)}
        case Job():
            row["tags"] = list(fact.tags.items())
        case Alert():
            row |= {"started_at": fact.started_at_ms, "ended_at": fact.ended_at_ms}
            row["evidence"] = list(fact.evidence.items())
        case _:
            row.setdefault("pool", "")
            row["document"] = encode_event(fact).decode()
    return row


def _arrow(table: str, rows: Sequence[dict[str, Any]]) -> pa.Table:
    columns = {name: pa.array([row[name] for row in rows], type=type_) for name, type_ in _TABLES[table].items()}
    return pa.table(columns)


def fact_rows(stored: Iterable[StoredFact], inventories: Iterable[tuple[Inventory, int]]) -> dict[str, pa.Table]:
    """Rows of every table that the facts go to. `inventories` are (inventory, broker append time)."""
    by_table: dict[str, list[dict[str, Any]]] = {}
    for item in stored:
        row = _row(item)
        by_table.setdefault(table_of(item.fact), []).append(row)
        journal = {"revision": item.fact.revision, "topic": item.topic, "partition": item.partition}
        journal |= {"offset": item.offset, "document": row["document"] or encode_event(item.fact).decode()}
        by_table.setdefault("facts", []).append({**row, **journal})
    for inventory, appended_ms in inventories:
        row = {field: getattr(inventory, field) for field in inventory.__struct_fields__}
        row |= {"recorded_at": appended_ms, "gpus": len(inventory.placements)}
        by_table.setdefault("nodes", []).append(row)
    return {table: _arrow(table, rows) for table, rows in by_table.items()}


def touched(fact: Fact, now_ms: int) -> tuple[int, int]:
    """[start, end) that a fact says something about, up to `now_ms`: what comes later is computed then."""
    match fact:
        case Placement() | Geometry() | Allocation() | Commitment() | Transfer() | RateCard() | AssetCost():
            return fact.start_ms, min(now_ms, now_ms if fact.end_ms is None else fact.end_ms)
        case EnergyTariff():
            return fact.prices[0].start_ms, min(now_ms, fact.end_ms)
        case Tenant():
            starts = [rule.start_ms for rule in fact.rules]
            return (0 if any(start is None for start in starts) else min(filter(None, starts), default=now_ms)), now_ms
        case _:
            return now_ms, now_ms


def documents(rows: Iterable[str]) -> list[Fact]:
    """Facts from their stored JSON."""
    return [fact for fact in map(decode_event, map(str.encode, rows)) if isinstance(fact, Fact)]
