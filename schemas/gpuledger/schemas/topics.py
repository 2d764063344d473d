"""The Kafka topics: names, keys, retention, and which event types each may carry."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TOPICS", "Topic", "topic_configs", "topic_name"]

_HOUR_MS = 3_600_000
_DAY_MS = 24 * _HOUR_MS


@dataclass(frozen=True, slots=True)
class Topic:
    """`key` says what the UTF-8 key is; `retention_ms` None keeps for ever; `gates` topics hold back completeness."""

    name: str
    key: str
    types: tuple[str, ...]
    retention_ms: int | None
    compacted: bool = False
    gates: bool = False


TOPICS: dict[str, Topic] = {
    topic.name: topic
    for topic in (
        Topic("telemetry", "node", (), 6 * _HOUR_MS, gates=True),
        Topic("allocations", "node", ("allocation",), 28 * _DAY_MS, gates=True),
        Topic("inventory", "node", ("inventory",), None, compacted=True, gates=True),
        Topic("jobs", "job", ("job",), 28 * _DAY_MS),
        Topic("capacity", "pool", ("commitment", "transfer"), None, gates=True),
        Topic("rates", "name", ("asset_cost", "energy_tariff", "rate_card", "tenant"), None),
        Topic("dirty", "pool", ("dirty",), 14 * _DAY_MS),
        Topic("alerts", "alert", ("alert",), 28 * _DAY_MS),
        Topic("deadletter", "topic/partition/offset", ("dead_letter",), 28 * _DAY_MS),
    )
}


def topic_name(prefix: str, name: str) -> str:
    """The name on the broker: `prefix` (for instance ``gpuledger.``) and the topic's own name."""
    if name not in TOPICS:
        raise KeyError(f"{name}: not a topic of GPULedger; expected one of {', '.join(TOPICS)}")
    return prefix + name


def topic_configs(name: str) -> dict[str, str]:
    """Broker settings of a topic; timestamps are broker append time everywhere."""
    topic = TOPICS[name]
    return {
        "message.timestamp.type": "LogAppendTime",
        "cleanup.policy": "compact" if topic.compacted else "delete",
        "retention.ms": "-1" if topic.retention_ms is None else str(topic.retention_ms),
        "compression.type": "producer",
        "max.message.bytes": "16777216",
    }
