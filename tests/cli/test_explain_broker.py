"""What `gpuledger ledger explain` asks a real broker: the samples behind fragments, and the marks behind versions."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence

import pytest

from gpuledger.agents.batch import encode_batch
from gpuledger.agents.broker_topics import create_topics
from gpuledger.agents.messages import Message, event_message
from gpuledger.agents.publisher import Delivered, Publisher
from gpuledger.cli.batch_samples import Sample, batch_samples
from gpuledger.cli.broker_offsets import BrokerAway, ends
from gpuledger.cli.explain_text import as_text
from gpuledger.cli.marks_of_versions import marks_of_versions
from gpuledger.local.ports import free_port
from gpuledger.schemas.config import Kafka
from gpuledger.schemas.events import Dirty
from gpuledger.schemas.telemetry import BatchHeader, Device
from gpuledger.streams.explain_facts import moment
from gpuledger.streams.explanation import Explanation, Mark, Seen

pytestmark = pytest.mark.services

MINUTE_MS = 60_000
T0 = 1_795_000_020_000


@pytest.fixture(scope="module")
def broker(kafka: str) -> Kafka:
    """The shared broker, with topics of our own."""
    made = Kafka(bootstrap=kafka, topic_prefix=f"explain-{uuid.uuid4().hex[:8]}.")
    asyncio.run(create_topics(made))
    return made


def publish(broker: Kafka, messages: Sequence[Message]) -> list[Delivered]:
    """Sends them one after another; where and when the broker has them."""

    async def send() -> list[Delivered]:
        async with Publisher(broker, "test") as publisher:
            return [each for message in messages for each in await publisher.publish_many([message])]

    return asyncio.run(send())


def batch(gpus: Sequence[str], node: str, seq: int) -> Message:
    """Two seconds of the GPUs."""
    header = BatchHeader(
        node=node,
        boot_id="boot",
        boot_start_ms=T0 - 3_600_000,
        run_id="run",
        run_start_ms=T0,
        seq=seq,
        period_ms=1000,
        anchor_wall_ms=T0,
        anchor_boottime_ms=0,
        devices=[Device(gpu, 0, T0 + 2000 * seq, 1_000) for gpu in gpus],
    )
    rows = [(T0 + 2000 * seq + 1000 * step, device) for device in range(len(gpus)) for step in (1, 2)]
    columns = {
        "ts_ms": [at for at, _ in rows],
        "device": [device for _, device in rows],
        "sm_active": [0.25 * (device + 1) for _, device in rows],
        "energy_mj": [at - T0 + 10**6 * device for at, device in rows],
    }
    made = encode_batch(header, columns)
    return Message("telemetry", node, made.value, tuple(made.headers))


def seen(seq: int, appended_ms: int, node: str = "n1") -> Seen:
    return Seen(0, 0, "run", T0, seq, node, appended_ms, 2, [])


def test_samples_of_a_fragment_are_read_back(broker: Kafka) -> None:
    messages = [batch(["g0", "g1"], "n1", seq) for seq in range(4)]
    messages.insert(2, Message("telemetry", "n1", b"not a batch"))
    times = [each.timestamp_ms for each in publish(broker, [*messages, batch(["g1"], "n2", 0)])]
    found = batch_samples(broker, "g1", [seen(1, times[1]), seen(2, times[3])])
    expected = [
        Sample("run", seq, T0 + 2000 * seq + 1000 * step, 0, 0.5, None, None, 10**6 + 2000 * seq + 1000 * step)
        for seq in (1, 2)
        for step in (1, 2)
    ]
    assert found == expected
    assert batch_samples(broker, "g1", [seen(3, max(times) + 3_600_000)]) == []
    nothing = Explanation("g1", T0, 0, "", [], [], [], [], [], [], [], [])
    lines = as_text(nothing, full=False, samples=found)
    head = lines.index("Samples, as the broker still has them")
    assert lines[head + 2].split() == ["run/1", moment(T0 + 3_000)[11:-1], "0.500", "–", "–", "1,003,000"]
    assert "Samples: the broker has none of these batches any more" in as_text(nothing, full=False, samples=[])


def test_marks_that_led_to_versions_are_found_by_their_offsets(broker: Kafka) -> None:
    minute_ms = T0 // MINUTE_MS * MINUTE_MS

    def mark(pool: str, start: int, end: int, why: str) -> Message:
        times = {"from_ms": minute_ms + start * MINUTE_MS, "to_ms": minute_ms + end * MINUTE_MS}
        return event_message(Dirty(pool=pool, why=why, **times))

    first, elsewhere, second, third = publish(
        broker,
        [
            mark("p", 0, 1, "telemetry"),
            mark("p", 50, 51, "telemetry"),
            mark("p", -1, 2, "allocation"),
            mark("p", -9, 90, "job"),
        ],
    )
    publish(broker, [mark("other", 0, 90, "telemetry")])
    found = marks_of_versions(broker, "p", minute_ms, [elsewhere.offset, third.offset])
    assert found == {
        elsewhere.offset: [Mark(first.offset, first.timestamp_ms, "telemetry")],
        third.offset: [
            Mark(second.offset, second.timestamp_ms, "allocation"),
            Mark(third.offset, third.timestamp_ms, "job"),
        ],
    }
    assert marks_of_versions(broker, "p", minute_ms, []) == {}
    # A version whose marks are not there (they were another broker's) has none.
    assert marks_of_versions(broker, "p", minute_ms, [third.offset, 900])[900] == []


def test_a_broker_that_is_away_is_named() -> None:
    away = Kafka(bootstrap=f"127.0.0.1:{free_port()}")
    for ask in (lambda: ends(away), lambda: batch_samples(away, "g", [seen(0, T0)])):
        with pytest.raises(BrokerAway, match="no broker answered at"):
            ask()
