"""Attacks on topics of events: JSON that is none, JSON that is wrong, and numbers and texts beyond all bounds."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any

from gpuledger.agents.messages import Message
from tests.hostile.attack import Attack, Kind, Kinds

__all__ = ["EVENT_TOPICS", "add_event_kinds"]

EVENT_TOPICS = ("allocations", "inventory", "jobs", "capacity", "rates", "alerts", "dirty", "deadletter")

_REQUIRED = {
    "allocation": ("id", "revision", "claimed_at_ms", "node", "gpu", "job_id", "source", "start_ms"),
    "inventory": ("node", "claimed_at_ms"),
    "job": ("id", "revision", "claimed_at_ms", "source"),
    "commitment": ("id", "revision", "claimed_at_ms", "pool", "tenant", "gpus", "start_ms"),
    "transfer": ("id", "revision", "pool", "gpus", "from_tenant", "to_tenant", "start_ms"),
    "tenant": ("id", "revision", "claimed_at_ms"),
    "asset_cost": ("id", "pool", "currency", "period_cost", "start_ms", "end_ms"),
    "energy_tariff": ("id", "currency", "prices", "end_ms"),
    "rate_card": ("id", "pool", "currency", "per_gpu_hour", "start_ms"),
    "alert": ("id", "revision", "rule", "status", "started_at_ms"),
    "dirty": ("pool", "from_ms", "to_ms"),
    "dead_letter": ("topic", "partition", "offset", "appended_at_ms", "reason"),
}
_TIMES = ("claimed_at_ms", "start_ms", "end_ms", "started_at_ms", "from_ms", "to_ms", "submitted_ms", "started_ms")
_NAMES = ("id", "node", "gpu", "pool", "tenant", "job_id", "from_tenant", "to_tenant", "rule", "account", "user")
_NEVER_EMPTY = ("id", "node", "gpu", "job_id", "from_tenant", "to_tenant", "rule")
_DECIMALS = ("period_cost", "pue", "node_energy_factor", "per_gpu_hour", "money_per_hour")
_SPANS = (("start_ms", "end_ms"), ("started_ms", "ended_ms"), ("started_at_ms", "ended_at_ms"), ("from_ms", "to_ms"))
#: Years 1 and 9999, before 1970, the ends of 32, 53, 63 and 64 bits, and far beyond.
_TIMES_OF_NOBODY = (
    *(-62_135_596_800_000, 253_402_300_799_000, -1, 0, 946_684_799_999, 7_258_118_400_001),
    *(1 << 31, 1 << 53, (1 << 63) - 1, 1 << 63, 1 << 64, -(1 << 63), 10**30, 10**400),
)
_BOUNDS: dict[str, tuple[Any, ...]] = {
    "revision": (-1, 1 << 43, 1 << 63, 1 << 64, 10**4000, 1.5, "1"),
    "instance": (-1, 65_536, 1 << 31, 1 << 64),
    "weight_num": (-1, 1_000_001, 1 << 63),
    "weight_den": (-1, 0, 1_000_001, 1 << 63),
    "confidence_pct": (-1, 101, 256),
    "epoch_ms": (-1, 1 << 63),
    "gpus": (-1, 10_000_001, 1 << 32, 1 << 64),
    "partition": (-1, 1 << 32, 1 << 64),
    "offset": (-1, 1 << 63, 1 << 64),
    "appended_at_ms": (-1, 1 << 63),
    "value_bytes": (-1, 1 << 63),
}
_OF_KIND = {
    "allocation": ("revision", "instance", "weight_num", "weight_den", "confidence_pct", "epoch_ms"),
    "commitment": ("revision", "gpus"),
    "transfer": ("revision", "gpus"),
    "job": ("revision", "gpus"),
    "dead_letter": ("partition", "offset", "appended_at_ms", "value_bytes"),
    "inventory": (),
    "dirty": (),
}
_CONTROLS = ("\x00", "\x1b[31mred", "a\nb", "a\rb", "\x7f", "\u202egpj", "\u2066x", "\u0085", "\t")
_NOT_JSON = (
    *(
        b" ",
        b"{",
        b"}",
        b"[",
        b"null",
        b"true",
        b"0",
        b'"x"',
        b"[]",
        b"{}",
        b"\xef\xbb\xbf{}",
        b"\x00",
        b"\xff\xfe\x00\x01",
    ),
    *(b"{'type':'job'}", b'{"type":"all', b'{"type":}', b'{"type":"job",}', b"NaN", b"-", b"1e", b'{"a":1}{"b":2}'),
    *(
        b'{"type":[]}',
        b'{"type":null}',
        b'{"type":7}',
        b'{"type":"nothing"}',
        b"Obj\x01",
        b"\x1f\x8b\x08\x00",
        b"%PDF-1.4",
    ),
)


def _attack(message: Message, kind: str, value: bytes | None, reason: str = "", certain: bool = True) -> Attack:
    return Attack(message.topic, kind, message.key.encode(), value, (), reason, certain)


def _dump(event: dict[str, Any]) -> bytes:
    return json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")


def _changed(kind: str, change: Callable[[random.Random, dict[str, Any]], str | None]) -> Kind:
    """A kind that changes the event as JSON; None where it has nothing to change there: then the type goes."""

    def make(rng: random.Random, message: Message) -> Attack:
        event: dict[str, Any] = json.loads(message.value)
        reason = change(rng, event)
        if reason is None:
            event["type"] = rng.choice(["", "x" * rng.choice([1, 300, 100_000]), "Job", "job\x00"])
            return _attack(message, "type", _dump(event), "type")
        return _attack(message, kind, _dump(event), reason)

    return make


def _inner(rng: random.Random, event: dict[str, Any]) -> dict[str, Any]:
    """The event, or one of the placements of an inventory, or a price."""
    for name in ("placements", "prices"):
        if event.get(name) and rng.random() < 0.6:
            return rng.choice(event[name])
    return event


def _missing(rng: random.Random, event: dict[str, Any]) -> str | None:
    names = [name for name in _REQUIRED[event["type"]] if name in event]
    name = rng.choice(names)
    del event[name]
    return name


def _wrong_type(rng: random.Random, event: dict[str, Any]) -> str | None:
    inner = _inner(rng, event)
    names = [name for name, value in inner.items() if name != "type" and not isinstance(value, (dict, list))]
    name = rng.choice(names)
    inner[name] = rng.choice([{}, [], {"a": {}}, [[]], [1, 2]])
    return name


def _time(rng: random.Random, event: dict[str, Any]) -> str | None:
    inner = _inner(rng, event)
    names = [name for name in _TIMES if name in inner]
    if not names:
        return None
    name = rng.choice(names)
    inner[name] = rng.choice(_TIMES_OF_NOBODY)
    return name


def _text_for_time(rng: random.Random, event: dict[str, Any]) -> str | None:
    names = [name for name in _TIMES if name in event]
    if not names:
        return None
    name = rng.choice(names)
    event[name] = rng.choice(["2026-01-01", "now", "", 1.5, "1795514290000", 1e300, -0.1, True])
    return name


def _backwards(rng: random.Random, event: dict[str, Any]) -> str | None:
    for start, end in _SPANS:
        if start in event:
            event[end] = event[start] - rng.choice([60_000, 60_000 * 525_600])
            return "end" if end == "ended_ms" else ("from_ms" if event["type"] == "dirty" else end)
    return None


def _bound(rng: random.Random, event: dict[str, Any]) -> str | None:
    kind = event["type"]
    names = _OF_KIND.get(kind, ("revision",))
    if not names:
        return None
    name = rng.choice(names)
    event[name] = rng.choice(_BOUNDS[name])
    return name


def _weight(rng: random.Random, event: dict[str, Any]) -> str | None:
    if event["type"] != "allocation":
        return None
    event["weight_num"], event["weight_den"] = rng.randint(3, 1_000_000), 2
    return "more than the whole GPU"


def _name(rng: random.Random, event: dict[str, Any]) -> str | None:
    inner = _inner(rng, event)
    names = [name for name in _NAMES if name in inner]
    if not names or event["type"] == "dead_letter":
        return None
    name = rng.choice(names)
    wide = rng.choice(["x", "ä", "漢", "🔥"])
    inner[name] = rng.choice([wide * 257, wide * 70_000, *(f"{inner[name]}{c}" for c in _CONTROLS)])
    return name


def _empty_name(rng: random.Random, event: dict[str, Any]) -> str | None:
    names = [name for name in _NEVER_EMPTY if name in event]
    if not names or event["type"] == "dead_letter":
        return None
    name = rng.choice(names)
    event[name] = ""
    return name


def _surrogate(rng: random.Random, event: dict[str, Any]) -> str | None:
    names = [name for name in (*_NAMES, "topic") if name in event]
    event[rng.choice(names)] = "\ud800"
    return "utf-8"


def _decimal(rng: random.Random, event: dict[str, Any]) -> str | None:
    names = [name for name in _DECIMALS if name in event]
    if not names:
        return None
    name = rng.choice(names)
    hostile = ["NaN", "sNaN", "Infinity", "-Infinity", "1e999999", "1e21", "0." + "1" * 40, "1,50", "", "0x10", "1e"]
    event[name] = rng.choice([*hostile, "9" * rng.choice([21, 4_000, 100_000]), "1e999999999999999999"])
    return name


def _nested(rng: random.Random, message: Message) -> Attack:
    event: dict[str, Any] = json.loads(message.value)
    event["beyond"] = "@"
    depth = rng.choice([2_000, 20_000, 200_000])
    opening, closing = rng.choice([("[", "]"), ('{"a":', "}")])
    inner = opening * depth + "1" + closing * depth
    return _attack(message, "nested", _dump(event).replace(b'"@"', inner.encode()), "nested too deeply")


def _number(rng: random.Random, message: Message) -> Attack:
    """Numbers that are no JSON, or that no reader holds."""
    event: dict[str, Any] = json.loads(message.value)
    name = rng.choice([name for name, value in event.items() if isinstance(value, int)] or ["type"])
    event[name] = "@"
    literal = rng.choice(
        ["NaN", "Infinity", "-Infinity", "1e999", "-", "01", "0x1F", "1.", "+1", "9" * 100_000, "1_000"]
    )
    return _attack(message, "number", _dump(event).replace(b'"@"', literal.encode(), 1))


def _cut(rng: random.Random, message: Message) -> Attack:
    return _attack(message, "truncated", message.value[: rng.randrange(1, len(message.value))])


def _flip(rng: random.Random, message: Message) -> Attack:
    value = bytearray(message.value)
    for _ in range(rng.choice([1, 1, 2, 8, 40])):
        value[rng.randrange(len(value))] ^= 1 << rng.randrange(8)
    return _attack(message, "flipped", bytes(value), certain=False)


def _spliced(rng: random.Random, message: Message) -> Attack:
    value = message.value
    a, b = sorted((rng.randrange(len(value)), rng.randrange(len(value))))
    middle = rng.choice([b"", rng.randbytes(b - a), value[a:b] * 3, b"\x00" * (b - a)])
    return _attack(message, "spliced", value[:a] + middle + value[b:], certain=False)


def _bad_utf8(rng: random.Random, message: Message) -> Attack:
    at = message.value.index(b'":"') + 3
    wrong = rng.choice(
        [b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"\x80", b"\xe2\x82", b"\xf5\x80\x80\x80"]
    )
    at = rng.choice([n for n in range(at, len(message.value)) if message.value[n - 3 : n] == b'":"'])
    return _attack(message, "utf-8", message.value[:at] + wrong + message.value[at:])


def _garbage(rng: random.Random, message: Message) -> Attack:
    value = rng.choice([*_NOT_JSON, rng.randbytes(rng.randrange(1, 3_000)), message.value.decode().encode("utf-16")])
    return _attack(message, "no JSON", value, certain=False)


def _nothing(rng: random.Random, message: Message) -> Attack:
    return _attack(message, "no value", rng.choice([None, b""]))


def _wrong_topic(rng: random.Random, message: Message) -> Attack:
    if message.topic == "jobs":
        value = b'{"type":"tenant","id":"t","revision":1,"claimed_at_ms":1700000000000}'
    else:
        value = (
            b'{"type":"job","id":"j","revision":1,"claimed_at_ms":1700000000000,"source":"slurm","gpus":%d}'
            % rng.randrange(1_000)
        )
    return _attack(message, "wrong topic", value, "does not belong")


def _large(rng: random.Random, message: Message) -> Attack:
    event: dict[str, Any] = json.loads(message.value)
    event["beyond"] = "x" * ((8 << 20) + rng.randrange(1 << 20))
    return _attack(message, "large", _dump(event), "expected at most")


def _arrow(rng: random.Random, message: Message) -> Attack:
    return _attack(
        message, "Arrow", b"\xff\xff\xff\xff" + struct.pack("<i", rng.randrange(1 << 20)) + rng.randbytes(200)
    )


def _placement(rng: random.Random, event: dict[str, Any]) -> str | None:
    if not event.get("placements"):
        return None
    placement = rng.choice(event["placements"])
    if rng.random() < 0.5:
        placement["node"] = "another-node"
        return "is on node another-node"
    placement["index"] = rng.choice([-1, 1 << 31, 1 << 63])
    return "index"


_CHANGES: dict[str, Callable[[random.Random, dict[str, Any]], str | None]] = {
    "missing field": _missing,
    "wrong type": _wrong_type,
    "time out of bounds": _time,
    "no time": _text_for_time,
    "ends before it begins": _backwards,
    "number out of bounds": _bound,
    "weight above one": _weight,
    "name": _name,
    "empty name": _empty_name,
    "surrogate": _surrogate,
    "decimal": _decimal,
    "placement": _placement,
}
_MADE: tuple[Kind, ...] = (
    *(_cut, _cut, _flip, _flip, _spliced, _bad_utf8, _garbage, _nothing, _nested, _number, _wrong_topic, _arrow),
)


def add_event_kinds(kinds: Kinds, large: bool = True) -> None:
    """Every kind for every topic of events; `large` ones have megabytes each."""
    for topic in EVENT_TOPICS:
        for name, change in _CHANGES.items():
            kinds.add(topic, _changed(name, change))
        for made in _MADE:
            kinds.add(topic, made)
        if large and topic not in ("dirty", "deadletter"):
            kinds.add(topic, lambda rng, message: (_large if rng.random() < 0.02 else _cut)(rng, message))
