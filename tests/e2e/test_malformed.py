"""What cannot be read ends as a dead letter with its reason, and everything around it is counted."""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import pytest

from gpuledger.agents.batch import encode_batch
from gpuledger.agents.messages import Message
from gpuledger.schemas.telemetry import HEADER_KEY, decode_header, encode_header
from tests.e2e.load import Load
from tests.e2e.pipeline import Digest, Installation, same
from tests.hostile.stand import stand

pytestmark = pytest.mark.services

IN_2036_MS = 2_082_758_400_000
#: Of the siege; `scripts/hostile` does the same with 100,000.
ATTACKS = 3_000


@dataclass(frozen=True, slots=True)
class Bad:
    """A message and a part of the reason for which it is refused; its key is its own, and names its dead letter."""

    topic: str
    key: str
    value: bytes
    reason: str
    headers: Sequence[tuple[str, bytes]] = ()

    @property
    def message(self) -> Message:
        return Message(self.topic, self.key, self.value, self.headers)


def bad_telemetry(good: Message) -> list[Bad]:
    """Variations of a batch that was valid."""
    header = decode_header(dict(good.headers)[HEADER_KEY])
    fresh = [msgspec.structs.replace(device, previous_ts_ms=None) for device in header.devices]
    later = msgspec.structs.replace(header, run_id="clock-of-2036", devices=fresh)

    def rows(**columns: list[int | float | None]) -> tuple[bytes, Sequence[tuple[str, bytes]]]:
        made = encode_batch(later, columns)
        return made.value, made.headers

    def bad(name: str, value: bytes, reason: str, headers: Sequence[tuple[str, bytes]]) -> Bad:
        return Bad("telemetry", f"bad-{name}", value, reason, headers)

    def with_header(text: bytes) -> Sequence[tuple[str, bytes]]:
        return [(HEADER_KEY, text)]

    future = rows(ts_ms=[IN_2036_MS], device=[0])
    fewer = encode_header(msgspec.structs.replace(later, devices=fresh[:2]))
    stranger = rows(ts_ms=[header.run_start_ms], device=[7])
    twice = rows(ts_ms=[header.run_start_ms] * 2, device=[0, 0])
    negative = rows(ts_ms=[header.run_start_ms], device=[0], energy_mj=[-5])
    endless = encode_header(msgspec.structs.replace(later, boot_id="endless", boot_start_ms=1 << 70))
    return [
        bad("torn", good.value[: len(good.value) // 2], "value: ", good.headers),
        bad("flipped", good.value[:200] + b"\xff" * 400 + good.value[600:], "value: ", good.headers),
        bad("no-arrow", b"these are not the bytes of an Arrow stream", "not an Arrow IPC stream", good.headers),
        bad("empty", b"", "value: is empty", good.headers),
        bad("no-header", good.value, f"header {HEADER_KEY}: is missing", ()),
        bad("header-garbage", good.value, f"header {HEADER_KEY}: ", with_header(b"\x00\xff{")),
        bad("header-short", good.value, "missing required field", with_header(b'{"node": "n"}')),
        bad(
            "header-version",
            good.value,
            "this worker reads 1, got 99",
            with_header(encode_header(msgspec.structs.replace(header, version=99))),
        ),
        bad("2036", future[0], "quarantine: ts_ms", future[1]),
        bad("stranger", stranger[0], "device: 7 is not an index into the header's 2 devices", with_header(fewer)),
        bad("twice", twice[0], "two samples of one device have the same time", twice[1]),
        bad("negative", negative[0], "energy_mj: expected 0..2^53", negative[1]),
        # Only the database's own types would refuse it, after the fragments are in.
        bad("endless", good.value, "boot_start_ms: expected", with_header(endless)),
    ]


def bad_events() -> list[Bad]:
    """Garbage for every topic of events, and what is JSON but wrong."""
    topics = ("allocations", "inventory", "jobs", "capacity", "rates", "alerts", "dirty", "deadletter")
    out = [Bad(topic, f"bad-garbage-{topic}", b'{"type": "all', "Input data was truncated") for topic in topics]
    out += [Bad(topic, f"bad-empty-{topic}", b"", "") for topic in topics]
    out += [Bad(topic, f"bad-bytes-{topic}", b"\xff\xfe\x00\x01", "") for topic in topics]
    allocation = (
        b'{"type":"allocation","id":"x","revision":1,"claimed_at_ms":1700000000000,"node":"n","gpu":"g",'
        b'"job_id":"j","source":"slurm","start_ms":1700000000000%s}'
    )
    inventory = (
        b'{"type":"inventory","node":"n","claimed_at_ms":1700000000000,"placements":[{"type":"placement","id":"p",'
        b'"revision":1,"claimed_at_ms":1700000000000,"gpu":"g","node":"%s","pool":"large","start_ms":1700000000000%s}]}'
    )
    mark = b'{"type":"dirty","pool":"large","from_ms":%d,"to_ms":%d}'
    hour = 1_700_000_000_000
    return [
        *out,
        Bad("allocations", "bad-type", b'{"type":"job","id":"j"}', "revision"),
        Bad("allocations", "bad-end", allocation % b',"end_ms":1600000000000', "end_ms: 1600000000000 is before"),
        Bad("allocations", "bad-weight", allocation % b',"weight_num":3,"weight_den":2', "more than the whole GPU"),
        Bad("allocations", "bad-field", allocation % b',"weight_den":"two"', "weight_den"),
        Bad("jobs", "bad-topic", allocation % b"", "allocation does not belong on topic jobs"),
        Bad("inventory", "bad-node", inventory % (b"m", b""), "is on node m, the inventory is of node n"),
        Bad(
            "inventory",
            "bad-index",
            inventory % (b"n", b',"index":99999999999'),
            "index: expected 0 to 2147483647, got 99999999999",
        ),
        Bad("dirty", "bad-order", mark % (hour, hour), "is not after from_ms"),
        Bad("dirty", "bad-time", mark % (1, hour), "from_ms"),
    ]


def test_malformed_messages_are_dead_letters_and_nothing_else_is_lost(
    pipeline: Installation, load: Load, undisturbed: Digest
) -> None:
    of_eight_gpus = next(batch for batch in load.telemetry()[40:] if batch.key.startswith("large"))
    bad = [*bad_telemetry(of_eight_gpus), *bad_events()]
    assert len({each.key for each in bad}) == len(bad)
    # Between the valid ones, from the first tick on.
    ticks = [list(tick) for tick in load.ticks]
    for n, each in enumerate(bad):
        tick = ticks[n * (len(ticks) - 1) // len(bad)]
        tick.insert(len(tick) // 2, each.message)
    sending = pipeline.publish(ticks, over_s=4)
    worker = pipeline.start_worker()
    pipeline.settle(load, sending.result())
    assert worker.running
    letters = "SELECT key, topic, reason FROM v_dead_letters"
    pipeline.wait_until(lambda: len(pipeline.rows(letters)) >= len(bad), "the dead letters are stored", 30)
    found = {key: (topic, reason) for key, topic, reason in pipeline.rows(letters)}
    assert len(found) == len(pipeline.rows(letters)) and set(found) == {each.key for each in bad}
    prefix = pipeline.config.kafka.topic_prefix
    for each in bad:
        topic, reason = found[each.key]
        assert topic == prefix + each.topic and reason and each.reason in reason, (each.key, topic, reason)
    same(pipeline.digest(load), undisturbed)


@pytest.mark.timeout(1_800)  # under a minute, but for a machine that does much else
def test_every_message_of_a_siege_is_accounted_for(pipeline: Installation, load: Load, undisturbed: Digest) -> None:
    seen = stand(pipeline, load, undisturbed, ATTACKS, seed=7)
    assert not seen.wrong, "\n".join(seen.wrong[:20])
    figures = seen.figures()
    assert figures["messages"] >= ATTACKS and figures["kinds"] > 100
    assert figures["bombs"] > 0 and sum(figures["refused_by_broker"].values()) > 0
    assert set(figures["letters_by_topic"]) == set(pipeline.config.kafka.partitions)
    assert seen.same_process
    assert seen.rss_most - seen.rss_before < 500, "MiB"
