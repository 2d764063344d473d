"""Six hours without a broker: within the spool's bound nothing is lost, beyond it exactly what gap records state."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition

from gpuledger.agents.messages import Message
from gpuledger.local.kafka import EmbeddedKafka
from gpuledger.local.ports import free_port
from gpuledger.schemas.config import Kafka
from gpuledger.schemas.telemetry import HEADER_KEY, BatchHeader, decode_header
from gpuledger.streams.brokers import end_offsets
from tests.e2e.load import HOUR_MS, Load, Offsets
from tests.e2e.outage import OUTAGE_HOURS, Batch, SpooledNode, batches, in_hours, outage_load, seal
from tests.e2e.pipeline import Digest, Installation, installation, same
from tests.fixtures.clickhouse import ClickHouse

pytestmark = [pytest.mark.services, pytest.mark.timeout(600)]

MINUTE_MS = 60_000
#: The first three minutes without a broker.
FIRST_TICKS = 18
#: Holds about a third of the six hours of one node.
TIGHT_BYTES = 1_400_000

Number = tuple[str, int]


class Gap(NamedTuple):
    """A row of v_gaps."""

    node: str
    run: str
    first: int
    last: int
    from_ms: int
    to_ms: int
    batches: int
    reason: str


class Quiet(NamedTuple):
    """The run to which nothing happened: its ledger, and its database."""

    digest: Digest
    made: Installation


@pytest.fixture(scope="module")
def load() -> Load:
    return outage_load()


@pytest.fixture(scope="module")
def quiet(kafka: str, clickhouse: ClickHouse, load: Load, tmp_path_factory: pytest.TempPathFactory) -> Generator[Quiet]:
    with installation(kafka, clickhouse.url, tmp_path_factory.mktemp("quiet")) as made:
        sending = made.publish(load.ticks, over_s=0)
        worker = made.start_worker()
        made.settle(load, sending.result())
        worker.stop()
        yield Quiet(made.digest(load), made)


@pytest.fixture
def broker(tmp_path: Path) -> Generator[EmbeddedKafka]:
    """One that may be killed and paused."""
    # A broker that was paused for longer than its session is without partitions for a moment, and refuses what came;
    # one that was killed has to wait for the end of that session.
    settings = {"broker.session.timeout.ms": 40_000}
    with EmbeddedKafka(tmp_path / "kafka", port=free_port(), settings=settings) as broker:
        try:
            yield broker
        finally:
            if broker.poll() is None:
                os.kill(broker.pid, signal.SIGCONT)


@contextmanager
def site(kafka: Kafka, folder: Path, load: Load, bounds: dict[str, int]) -> Generator[dict[str, SpooledNode]]:
    """The nodes of the load by name, and `control` for what is no node's; stopped afterwards."""
    nodes: dict[str, SpooledNode] = {}
    try:
        for name in sorted({message.key for message in load.telemetry()} | {"control"}):
            nodes[name] = SpooledNode(kafka, folder, name, load.start_ms, bounds.get(name, 1 << 30))
        yield nodes
    finally:
        for node in nodes.values():
            node.stop()


def sent_so_far(kafka: Kafka) -> Offsets:
    """The last offset of every partition that has one."""
    found: Offsets = {}
    for topic in ("telemetry", "allocations", "inventory", "jobs", "capacity", "rates"):
        ends = asyncio.run(end_offsets(kafka, topic, kafka.partitions[topic]))
        found |= {(topic, partition): end - 1 for partition, end in ends.items() if end}
    return found


Ticks = Sequence[tuple[int, Sequence[Message]]]


def live_through(
    made: Installation,
    load: Load,
    nodes: dict[str, SpooledNode],
    goes: Callable[[Ticks], None],
    comes_back: Callable[[], None],
) -> None:
    """An hour with a broker, six without, and one with; then everything is stored and computed. `goes` takes the broker
    away and seals the first minutes without it."""
    first, last = OUTAGE_HOURS
    worker = made.start_worker()
    made.wait_until(worker.ready, "the worker has partitions")
    seal(nodes, in_hours(load, 0, first))
    for node in nodes.values():
        node.wait_until_empty()
    without = in_hours(load, first, last)
    goes(without[:FIRST_TICKS])
    seal(nodes, without[FIRST_TICKS:])
    comes_back()
    for node in nodes.values():
        node.wait_until_empty()
    seal(nodes, in_hours(load, last, 99))
    for node in nodes.values():
        node.wait_until_empty()
    made.settle(load, sent_so_far(made.config.kafka))


def stored(made: Installation) -> set[Number]:
    """(run, number) of every batch that has fragments."""
    return {(str(run), int(seq)) for run, seq in made.rows("SELECT DISTINCT run_id, seq FROM fragments")}


def stated(made: Installation) -> list[Gap]:
    sql = (
        "SELECT node, run_id, first_seq, last_seq, toUnixTimestamp64Milli(from_at), toUnixTimestamp64Milli(to_at), "
        "batches, reason FROM v_gaps ORDER BY ALL"
    )
    return [Gap._make(row) for row in made.rows(sql)]


def headers_of(messages: Iterable[Message]) -> list[BatchHeader]:
    found = [dict(message.headers) for message in messages]
    return [decode_header(one[HEADER_KEY]) for one in found if HEADER_KEY in one]


async def arrivals(kafka: Kafka) -> Counter[Number]:
    """How often the broker has each batch."""
    topic = kafka.topic_prefix + "telemetry"
    partitions = [TopicPartition(topic, n) for n in range(kafka.partitions["telemetry"])]
    found: Counter[Number] = Counter()
    consumer = AIOKafkaConsumer(bootstrap_servers=kafka.bootstrap, auto_offset_reset="earliest")
    await consumer.start()
    try:
        consumer.assign(partitions)
        left = sum((await consumer.end_offsets(partitions)).values())
        async with asyncio.timeout(30):
            while left > 0:
                for records in (await consumer.getmany(timeout_ms=500)).values():
                    left -= len(records)
                    headers = [dict(record.headers) for record in records]
                    batches = [decode_header(one[HEADER_KEY]) for one in headers if HEADER_KEY in one]
                    found.update((batch.run_id, batch.seq) for batch in batches)
        return found
    finally:
        await consumer.stop()


def test_within_the_bound_a_killed_broker_costs_nothing(
    broker: EmbeddedKafka, clickhouse: ClickHouse, load: Load, quiet: Quiet, tmp_path: Path
) -> None:
    with installation(broker.bootstrap, clickhouse.url, tmp_path) as made:
        with site(made.config.kafka, tmp_path / "spools", load, {}) as nodes:

            def goes(ticks: Ticks) -> None:
                broker.kill()
                seal(nodes, ticks)

            live_through(made, load, nodes, goes, broker.start)
            assert all(node.spool.dropped == 0 for node in nodes.values())
        assert stored(made) == set(batches(load))
        assert stated(made) == []
        same(made.digest(load), quiet.digest)


def lose_an_answer(broker: EmbeddedKafka, kafka: Kafka, nodes: dict[str, SpooledNode], name: str, ticks: Ticks) -> None:
    """The broker is paused while this agent sends batches and is killed; then it takes what it was sent, tells nobody,
    and is paused for good. The agent starts again, and the rest of the ticks is sealed."""
    mine = [(at, [one for one in some if one.topic == "telemetry" and one.key == name]) for at, some in ticks]
    others = [(at, [one for one in some if one.topic != "telemetry" or one.key != name]) for at, some in ticks]
    sent = {(header.run_id, header.seq) for _, messages in mine for header in headers_of(messages)}
    os.kill(broker.pid, signal.SIGSTOP)
    taken = nodes[name].spool.taken
    seal(nodes, mine)
    deadline_s = time.monotonic() + 90
    while nodes[name].spool.taken == taken:
        assert time.monotonic() < deadline_s, "nothing was taken to be sent"
        time.sleep(0.05)
    time.sleep(1)  # so that it is not only taken, but with the kernel
    nodes[name].kill()
    os.kill(broker.pid, signal.SIGCONT)
    while not sent & set(asyncio.run(arrivals(kafka))):
        assert time.monotonic() < deadline_s, "what was on its way has not arrived"
        time.sleep(0.2)
    os.kill(broker.pid, signal.SIGSTOP)
    nodes[name].start(ticks[-1][0])
    seal(nodes, others)


def test_beyond_the_bound_exactly_the_stated_gap_is_missing(
    broker: EmbeddedKafka, clickhouse: ClickHouse, load: Load, quiet: Quiet, tmp_path: Path
) -> None:
    """The broker stands still. One spool holds it all, two are too small; one of these two agents sent batches that
    arrived, and was killed before it heard so."""
    known = batches(load)
    calm, killed, tight = sorted({batch.node for batch in known.values()})
    with installation(broker.bootstrap, clickhouse.url, tmp_path) as made:
        kafka = made.config.kafka
        with site(kafka, tmp_path / "spools", load, dict.fromkeys((killed, tight), TIGHT_BYTES)) as nodes:
            live_through(
                made,
                load,
                nodes,
                goes=lambda ticks: lose_an_answer(broker, kafka, nodes, killed, ticks),
                comes_back=lambda: os.kill(broker.pid, signal.SIGCONT),
            )
            assert nodes[calm].spool.dropped == 0
        missing, gaps, arrived = set(known) - stored(made), stated(made), asyncio.run(arrivals(kafka))
        assert {gap.node for gap in gaps} == {killed, tight}
        assert {gap.reason for gap in gaps} == {"spool full"}
        assert missing == set(known) - set(arrived)
        assert killed in {known[number].node for number, times in arrived.items() if times > 1 and number in known}
        check_to_the_batch(gaps, missing, known)
        check_ledger(made, quiet, gaps, load)


def check_to_the_batch(gaps: Iterable[Gap], missing: set[Number], known: dict[Number, Batch]) -> None:
    told: list[Number] = []
    for gap in gaps:
        inside = [(gap.run, seq) for seq in range(gap.first, gap.last + 1)]
        assert gap.batches == len(inside)
        assert {known[number].node for number in inside} == {gap.node}
        assert gap.from_ms == min(known[number].from_ms for number in inside)
        assert gap.to_ms == max(known[number].to_ms for number in inside)
        told += inside
    assert sorted(told) == sorted(missing)
    assert len(missing) > 300


def overlaps_us(spans: Iterable[tuple[int, int]], unit_ms: int) -> Counter[int]:
    """Start of each unit -> the microseconds of it that lie in the spans."""
    found: Counter[int] = Counter()
    for start, end in spans:
        for unit in range(start // unit_ms * unit_ms, end, unit_ms):
            found[unit] += (min(end, unit + unit_ms) - max(start, unit)) * 1000
    return found


def doing_us(made: Installation, load: Load, view: str, activities: list[str]) -> Counter[tuple[str, int]]:
    """(GPU, start of the minute or hour) -> the microseconds in which it did one of these, in the hours of the load."""
    column = "minute" if view == "v_gpu_minute" else "hour"
    sql = (
        f"SELECT gpu, toUnixTimestamp64Milli({column}) AS at_ms, sum(gpu_us) FROM {view} "
        f"WHERE activity IN {{activities:Array(String)}} AND at_ms >= {{from:Int64}} AND at_ms < {{to:Int64}} "
        f"GROUP BY ALL HAVING sum(gpu_us) > 0"
    )
    bounds = {"from": load.hours[0], "to": load.hours[1]}
    return Counter({(str(gpu), int(at)): int(us) for gpu, at, us in made.rows(sql, activities=activities, **bounds)})


def check_ledger(made: Installation, quiet: Quiet, gaps: Iterable[Gap], load: Load) -> None:
    """Who held what is as it was; what was seen is less by the gaps and what was not is more, to the microsecond."""
    spans: dict[str, list[tuple[int, int]]] = {}
    for gap in gaps:
        spans.setdefault(gap.node, []).append((gap.from_ms, gap.to_ms))
    node_of = dict(made.rows("SELECT gpu, node FROM v_placements"))
    for view, unit_ms in (("v_gpu_minute", MINUTE_MS), ("v_gpu_hour", HOUR_MS)):
        lost: Counter[tuple[str, int]] = Counter()
        for gpu, node in node_of.items():
            lost.update({(gpu, at): us for at, us in overlaps_us(spans.get(node, ()), unit_ms).items()})
        seen = ["active", "idle", "down"]
        assert doing_us(made, load, view, seen) == doing_us(quiet.made, load, view, seen) - lost
        if view == "v_gpu_hour":
            unseen = ["unobserved"]
            assert doing_us(made, load, view, unseen) == doing_us(quiet.made, load, view, unseen) + lost
    assert totals(made.digest(load)) == totals(quiet.digest)


def totals(digest: Digest) -> Counter[tuple[object, ...]]:
    """(pool, minute, tenant, kind) -> GPU-microseconds, whatever the GPUs did."""
    found: Counter[tuple[object, ...]] = Counter()
    for pool, minute, tenant, kind, _, us, *_ in digest["v_ledger_minute"]:
        found[pool, minute, tenant, kind] += us
    return found
