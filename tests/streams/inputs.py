"""A world as the product's own inputs: events, Kafka messages, and the tables that the store would read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import pyarrow as pa

from gpuledger.agents.batch import encode_batch
from gpuledger.schemas.events import (
    AccountRule,
    Allocation,
    Commitment,
    Fact,
    Geometry,
    Instance,
    Job,
    Placement,
    Tenant,
    Transfer,
)
from gpuledger.schemas.telemetry import BatchHeader, Device, DownCause
from gpuledger.streams.observed import FRAGMENT_COLUMNS
from gpuledger.streams.pool_facts import PoolFacts

__all__ = ["Message", "boots", "empty_fragments", "events", "facts", "message", "namings"]

SHARE = {"active": 0.9, "idle": 0.0, "down": None, "unobserved": None}


class Message(NamedTuple):
    value: bytes
    headers: tuple[tuple[str, bytes], ...]
    timestamp_ms: int


# ------------------------------------------------------------------------------------------------- events


def events(w: dict[str, Any]) -> list[Fact]:
    """Every revision of every fact."""
    claimed: dict[str, Any] = {"claimed_at_ms": w["from_ms"] - 3_600_000}
    found: list[Fact] = [Placement(**p) for p in w["placements"]]
    found += [Allocation(**claimed, **a) for a in w["allocations"]]
    for fact in w["geometries"]:
        cut: dict[str, Any] = claimed | fact
        cut["instances"] = [Instance(**instance) for instance in fact["instances"]]
        found.append(Geometry(**cut))
    found += [Job(**claimed, **j) for j in w["jobs"]]
    found += [Commitment(**claimed, **c) for c in w["commitments"]]
    found += [Transfer(**claimed, **x) for x in w["transfers"]]
    for fact in w["tenants"]:
        found.append(Tenant(**claimed, id=fact["id"], revision=fact["revision"], rules=_rules(fact)))
    return found


def _rules(tenant: dict[str, Any]) -> list[AccountRule]:
    return [AccountRule(**rule) for rule in tenant["rules"]]


def message(batch: dict[str, Any]) -> Message:
    """The Kafka message of a batch."""
    rows = sorted((s[0], n, s[1], s[2]) for n, device in enumerate(batch["devices"]) for s in device["samples"])
    devices = [
        Device(d["gpu"], d["instance"], d["previous_ts_ms"], d["previous_energy_mj"], epoch_ms=d.get("epoch_ms", 0))
        for d in batch["devices"]
    ]
    header = BatchHeader(
        node=batch["node"],
        boot_id=batch.get("boot_id", "boot"),
        boot_start_ms=batch.get("boot_start_ms", batch["run_start_ms"] - 7_200_000),
        run_id=batch["run_id"],
        run_start_ms=batch["run_start_ms"],
        seq=batch["seq"],
        period_ms=batch["period_ms"],
        anchor_wall_ms=0,
        anchor_boottime_ms=0,
        devices=devices,
        running=batch.get("running", []),
    )
    columns = {
        "ts_ms": [row[0] for row in rows],
        "device": [row[1] for row in rows],
        "down_cause": [int(DownCause.LOST) if row[2] == "down" else None for row in rows],
        "sm_active": [SHARE[row[2]] for row in rows],
        "energy_mj": [row[3] for row in rows],
    }
    made = encode_batch(header, columns)
    appended_ms = batch.get("appended_ms", max((row[0] for row in rows), default=0) + 1000)
    return Message(made.value, tuple(made.headers), appended_ms)


# ------------------------------------------------------------------------------------------------- tables


def _current(facts: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    best: dict[str, dict[str, Any]] = {}
    for fact in facts:
        if fact["id"] not in best or fact["revision"] > best[fact["id"]]["revision"]:
            best[fact["id"]] = fact
    return [fact for fact in best.values() if not fact.get("void")]


def _table(rows: list[dict[str, Any]], **types: pa.DataType) -> pa.Table:
    return pa.table({name: pa.array([row[name] for row in rows], type=type_) for name, type_ in types.items()})


def _believable(w: dict[str, Any]) -> list[dict[str, Any]]:
    """The batches that the worker would not quarantine."""
    return [
        b
        for b in w["batches"]
        if all(s[0] <= b["appended_ms"] + w["ahead_ms"] for d in b["devices"] for s in d["samples"])
    ]


def namings(w: dict[str, Any]) -> dict[str, int]:
    """The latest naming of every allocation."""
    named: dict[str, int] = {}
    for b in _believable(w):
        last = max(s[0] for d in b["devices"] for s in d["samples"])
        for id_ in b["running"]:
            named[id_] = max(named.get(id_, 0), last)
    return named


def boots(w: dict[str, Any]) -> list[dict[str, Any]]:
    """The boots of every node, each with the smallest start that was given for it."""
    starts: dict[tuple[str, str], int] = {}
    for b in _believable(w):
        key = (b["node"], b["boot_id"])
        starts[key] = min(b["boot_start_ms"], starts.get(key, 1 << 60))
    return [{"node": node, "boot_id": boot, "start_ms": start} for (node, boot), start in starts.items()]


_TEXT, _WHOLE, _SMALL = pa.string(), pa.int64(), pa.uint32()
_INTERVAL = {"start_ms": _WHOLE, "end_ms": _WHOLE}


def _allocations(w: dict[str, Any], gpus: set[str]) -> pa.Table:
    named = namings(w)
    ended = {job["id"]: job["ended_ms"] for job in _current(w["jobs"])}
    rows = [
        {**a, "named_ms": named.get(a["id"]), "job_ended_ms": ended.get(a["job_id"])}
        for a in _current(w["allocations"])
        if a["gpu"] in gpus
    ]
    names = ("source", "account", "user", "namespace", "tenant")
    return _table(
        rows,
        **dict.fromkeys(("id", "node", "boot_id", "gpu"), _TEXT),
        instance=pa.uint16(),
        epoch_ms=_WHOLE,
        job_id=_TEXT,
        **dict.fromkeys(names, _TEXT),
        weight_num=_SMALL,
        weight_den=_SMALL,
        **_INTERVAL,
        named_ms=_WHOLE,
        job_ended_ms=_WHOLE,
    )


def facts(w: dict[str, Any], pool: str) -> PoolFacts:
    """What the store would read for a pool."""
    gpus = {p["gpu"] for p in w["placements"] if p["pool"] == pool}
    placed = [{**p, "claimed_at": p["claimed_at_ms"]} for p in _current(w["placements"]) if p["gpu"] in gpus]
    cut = [
        {**g, "sliced": sum(i["slices"] for i in g["instances"])} for g in _current(w["geometries"]) if g["gpu"] in gpus
    ]
    promised = [c for c in _current(w["commitments"]) if c["pool"] == pool]
    moved = [x for x in _current(w["transfers"]) if x["pool"] == pool]
    claimed_at = pa.timestamp("ms", tz="UTC")
    tenants = [fact for fact in events({**w, "tenants": _current(w["tenants"])}) if isinstance(fact, Tenant)]
    return PoolFacts(
        pool=pool,
        placements=_table(placed, id=_TEXT, claimed_at=claimed_at, gpu=_TEXT, node=_TEXT, pool=_TEXT, **_INTERVAL),
        allocations=_allocations(w, gpus),
        geometries=_table(cut, id=_TEXT, node=_TEXT, gpu=_TEXT, **_INTERVAL, slices=_SMALL, sliced=_SMALL),
        boots=_table(boots(w), node=_TEXT, boot_id=_TEXT, start_ms=_WHOLE),
        commitments=_table(promised, tenant=_TEXT, gpus=_SMALL, **_INTERVAL, state=_TEXT),
        transfers=_table(moved, from_tenant=_TEXT, to_tenant=_TEXT, gpus=_SMALL, **_INTERVAL, state=_TEXT),
        tenants=tenants,
    )


def empty_fragments() -> pa.Table:
    """A table of no fragments."""
    lists = {"segment_start_ms": pa.uint16(), "segment_duration_ms": pa.uint16(), "segment_activity": pa.uint8()}
    plain = {
        "minute": pa.timestamp("ms", tz="UTC"),
        "gpu": pa.string(),
        "instance": pa.uint16(),
        "epoch_ms": pa.int64(),
        "run_start_ms": pa.int64(),
    }
    plain |= {"run_id": pa.string(), "seq": pa.uint32()}
    types = [plain.get(name) or pa.list_(lists.get(name, pa.int64())) for name in FRAGMENT_COLUMNS]
    return pa.schema(list(zip(FRAGMENT_COLUMNS, types, strict=True))).empty_table()
