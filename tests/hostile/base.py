"""The valid messages that attacks are changes of: a simulated site, and one of each that no simulator sends."""

from __future__ import annotations

import time
from collections.abc import Iterable
from decimal import Decimal

from gpuledger.agents.messages import Message, event_message
from gpuledger.schemas.events import Alert, DeadLetter, Dirty, encode_event
from tests.hostile.attack import Kinds
from tests.hostile.on_events import add_event_kinds
from tests.hostile.on_telemetry import add_telemetry_kinds

__all__ = ["all_kinds", "by_topic", "of_every_topic"]

_HOUR_MS = 3_600_000


def all_kinds(large: bool = True) -> Kinds:
    """Every kind of attack on every topic."""
    kinds = Kinds()
    add_telemetry_kinds(kinds, large)
    add_event_kinds(kinds, large)
    return kinds


def of_every_topic(messages: Iterable[Message]) -> dict[str, list[Message]]:
    """The messages by topic, and some of the topics that are missing among them."""
    found = by_topic(messages)
    hour = time.time_ns() // 1_000_000 // _HOUR_MS * _HOUR_MS - _HOUR_MS
    alert = Alert(
        id="reserved-unused:large:north",
        revision=hour,
        claimed_at_ms=hour,
        rule="reserved_unused",
        status="firing",
        pool="large",
        tenant="north",
        started_at_ms=hour,
        money_per_hour=Decimal("12.5"),
        currency="EUR",
        summary="north leaves 5 GPUs unused",
        evidence={"gpus": "5"},
    )
    letter = DeadLetter(
        topic="jobs", partition=0, offset=7, appended_at_ms=hour, reason="no reason", key=b"k", value=b"v"
    )
    found["alerts"] = [event_message(alert)]
    found["dirty"] = [event_message(Dirty(pool="large", from_ms=hour, to_ms=hour + 60_000, why="by hand"))]
    found["deadletter"] = [Message("deadletter", "jobs/0/7", encode_event(letter))]
    return found


def by_topic(messages: Iterable[Message]) -> dict[str, list[Message]]:
    """The messages of each topic; telemetry that has rows only."""
    found: dict[str, list[Message]] = {}
    for message in messages:
        if message.topic != "telemetry" or len(message.value) > 4_000:
            found.setdefault(message.topic, []).append(message)
    return found
