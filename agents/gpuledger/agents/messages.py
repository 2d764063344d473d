"""One message to the broker, before any producer: what the agents, the simulator, the replayer and the CLI hand over.

Which topic an event belongs to and what its key is are the contract's (`gpuledger.schemas.topics`); here is the one
place where an event becomes a message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gpuledger.schemas.events import (
    Alert,
    Allocation,
    AssetCost,
    Commitment,
    Dirty,
    EnergyTariff,
    Event,
    Inventory,
    Job,
    RateCard,
    Tenant,
    Transfer,
    encode_event,
)

__all__ = ["Message", "event_message"]

Headers = Sequence[tuple[str, bytes]]


@dataclass(frozen=True, slots=True)
class Message:
    """`topic` is the name of the contract, without the installation's prefix; `key` is the text of its UTF-8 key."""

    topic: str
    key: str
    value: bytes
    headers: Headers = ()


def _address(event: Event) -> tuple[str, str]:
    """The topic and key of an event."""
    match event:
        case Allocation():
            return "allocations", event.node
        case Inventory():
            return "inventory", event.node
        case Job():
            return "jobs", event.id
        case Commitment() | Transfer():
            return "capacity", event.pool
        case AssetCost() | EnergyTariff() | RateCard() | Tenant():
            return "rates", event.id
        case Dirty():
            return "dirty", event.pool
        case Alert():
            return "alerts", event.id
        case _:
            raise TypeError(f"{type(event).__name__}: travels in no topic of its own")


def event_message(event: Event) -> Message:
    """The event as a message of its topic.

    Raises:
        TypeError: the event travels only inside another (a placement in its inventory) or needs a place as its key.
    """
    topic, key = _address(event)
    return Message(topic, key, encode_event(event))
