"""Attacks through the pure decoding of every topic, in this process: ``python -m tests.hostile.decode_fuzz N SEED``.

A process of its own, because a crash of a library is one of the things looked for. Prints one line of JSON. Valid
messages stand between the attacks in every block, and must come out as if they were alone.
"""

from __future__ import annotations

import json
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from gpuledger.agents.messages import Message
from gpuledger.schemas.exceptions import MessageError
from gpuledger.streams.blocks import Record
from gpuledger.streams.decode import decode_block
from gpuledger.streams.facts import StoredFact, decode_facts, fact_rows, rank_of, touched
from gpuledger.streams.fragments import fragments
from tests.e2e.load import record
from tests.hostile.attack import Attack, verdict
from tests.hostile.base import all_kinds, of_every_topic
from tests.hostile.on_events import EVENT_TOPICS

__all__ = ["main"]

_BLOCK = 40


def _record(message: Message, offset: int, now_ms: int) -> Record:
    return Record(message.topic, 0, offset, now_ms, message.key.encode(), message.value, tuple(message.headers))


def _fragments(records: Sequence[Record]) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """Rows of what is accepted, and the reasons of what is not."""
    block = decode_block(records)
    found = fragments(block)
    rows = [] if found is None else found.table.to_pylist()
    return sorted(rows, key=repr), dict(block.rejected)


def _telemetry(attacks: list[Attack], valid: Sequence[Message], rng: random.Random, now_ms: int) -> int:
    """One block of attacks between valid messages; how many attacks were taken for valid."""
    good = rng.sample(valid, min(4, len(valid)))
    mixed: list[Attack | Message] = [*attacks, *good]
    rng.shuffle(mixed)
    records = [
        each.record(n, now_ms) if isinstance(each, Attack) else _record(each, n, now_ms) for n, each in enumerate(mixed)
    ]
    rows, reasons = _fragments(records)
    for n, each in enumerate(mixed):
        if isinstance(each, Attack):
            assert n in reasons or not each.certain, f"taken for valid: {each.kind}"
            assert each.reason in reasons.get(n, each.reason), (each.kind, each.reason, reasons[n])
            assert reasons.get(n, "x").strip(), f"no reason: {each.kind}"
        else:
            assert n not in reasons, reasons[n]
    kept = [records[n] for n in range(len(records)) if n not in reasons]
    alone, none = _fragments(kept)
    assert not none and rows == alone, "the attacks have changed the rows of other messages"
    return sum(isinstance(each, Attack) and n not in reasons for n, each in enumerate(mixed))


def _event(attack: Attack, now_ms: int) -> int:
    """1 where chance has made a valid event, which then must be fit to be stored."""
    if verdict(attack.record(0, now_ms)) is not None:
        return 0
    assert not attack.certain, f"taken for valid: {attack.topic} {attack.kind} {attack.value!r}"
    if attack.topic not in ("dirty", "deadletter"):
        facts, inventory = decode_facts(attack.topic, attack.value)
        stored = [StoredFact(fact, rank_of(fact), attack.topic, 0, 0, now_ms) for fact in facts]
        fact_rows(stored, [] if inventory is None else [(inventory, now_ms)])
        for fact in facts:
            touched(fact, now_ms)
    return 1


def main(count: int, seed: int) -> dict[str, Any]:
    """Runs `count` attacks and says what was seen. Raises what the product raises, but for MessageError."""
    rng = random.Random(seed)
    load = record(ticks=60)
    valid = of_every_topic(message for tick in load.ticks for message in tick)
    kinds, now_ms = all_kinds(), time.time_ns() // 1_000_000
    seen: Counter[str] = Counter()
    accepted = 0
    waiting: list[Attack] = []
    started = time.monotonic()
    first_kib = 0
    for n in range(count):
        topic = "telemetry" if rng.random() < 0.4 else rng.choice(EVENT_TOPICS)
        attack = rng.choice(kinds.by_topic[topic])(rng, rng.choice(valid[topic]))
        seen[f"{topic}: {attack.kind}"] += 1
        if topic == "telemetry":
            waiting.append(attack)
            if len(waiting) == _BLOCK:
                accepted += _telemetry(waiting, valid["telemetry"], rng, now_ms)
                waiting = []
        else:
            try:
                accepted += _event(attack, now_ms)
            except MessageError as error:
                raise AssertionError(f"{attack.kind}: refused only later: {error}") from error
        if n == count // 4:
            first_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    accepted += _telemetry(waiting, valid["telemetry"], rng, now_ms)
    return {
        "attacks": count,
        "kinds": len(seen),
        "valid_by_chance": accepted,
        "seconds": round(time.monotonic() - started, 1),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "peak_mib_of_first_quarter": first_kib // 1024,
    }


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]))))
