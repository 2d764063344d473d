"""One hostile message, and the seeded choice of many: changes of valid ones, each change a named kind."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from gpuledger.agents.messages import Message
from gpuledger.schemas.exceptions import MessageError
from gpuledger.streams.blocks import Record
from gpuledger.streams.decode import decode_block
from gpuledger.streams.dirty_agent import dirty_marks
from gpuledger.streams.facts import decode_facts
from gpuledger.streams.letters import decode_letter

__all__ = ["Attack", "Kind", "Kinds", "attacks", "verdict"]

Headers = tuple[tuple[bytes, bytes | None], ...]


@dataclass(frozen=True, slots=True)
class Attack:
    """A message that must be refused with a reason that holds `reason`; its topic is the contract's name.

    Where it is not `certain`, chance made it, and it may happen to be valid.
    """

    topic: str
    kind: str
    key: bytes | None
    value: bytes | None
    headers: Headers = ()
    reason: str = ""
    certain: bool = True

    def record(self, offset: int, timestamp_ms: int) -> Record:
        """As a worker would see it."""
        headers = tuple((name.decode(errors="backslashreplace"), value) for name, value in self.headers)
        return Record(self.topic, 0, offset, timestamp_ms, self.key, self.value, headers)


#: Makes an attack out of a valid message of its topic.
Kind = Callable[[random.Random, Message], Attack]


@dataclass(slots=True)
class Kinds:
    """The kinds of attack by topic."""

    by_topic: dict[str, list[Kind]] = field(default_factory=dict[str, list[Kind]])

    def add(self, topic: str, kind: Kind) -> None:
        self.by_topic.setdefault(topic, []).append(kind)


def verdict(record: Record) -> str | None:
    """The reason for which the worker's decoding refuses the record; None where it takes it."""
    if record.topic == "telemetry":
        rejected = decode_block([record]).rejected
        return rejected[0][1] if rejected else None
    try:
        if record.topic == "dirty":
            dirty_marks(record)
        elif record.topic == "deadletter":
            letter = decode_letter(record)
            return letter.reason if letter.topic == record.topic else None
        else:
            decode_facts(record.topic, record.value)
    except MessageError as error:
        return str(error)
    return None


def attacks(
    rng: random.Random, kinds: Kinds, valid: Mapping[str, Sequence[Message]], topics: Sequence[str], now_ms: int
) -> Iterator[Attack]:
    """Attacks without end, their topics drawn from `topics`. What chance made and is valid is thrown away."""
    while True:
        topic = rng.choice(topics)
        attack = rng.choice(kinds.by_topic[topic])(rng, rng.choice(valid[topic]))
        reason = verdict(attack.record(0, now_ms))
        if reason is None and not attack.certain:
            continue
        assert reason is not None and attack.reason in reason, (attack.kind, attack.reason, reason, attack.value)
        yield attack
