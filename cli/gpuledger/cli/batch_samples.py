"""The samples behind fragments: read back from the broker's telemetry topic, as long as it keeps them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from gpuledger.cli.broker_offsets import partitions_of, with_consumer
from gpuledger.schemas.config import Kafka
from gpuledger.streams.blocks import Record
from gpuledger.streams.decode import decode_block
from gpuledger.streams.explanation import Seen

__all__ = ["Sample", "batch_samples"]

#: A broker stamps a batch when it gets it; the stamp of a fragment is the same one.
_NO_LIMIT_MS = 1 << 62


@dataclass(frozen=True, slots=True)
class Sample:
    """One reading of the GPU (instance 0) or an instance, as its agent sent it. None: not read, or not supported."""

    run_id: str
    seq: int
    at_ms: int
    instance: int
    sm_active: float | None
    gpu_util_pct: float | None
    power_mw: float | None
    counter_mj: int | None


def batch_samples(kafka: Kafka, gpu: str, fragments: Iterable[Seen]) -> list[Sample]:
    """The GPU's samples of the batches that the fragments come from, in order of run, batch and time.

    Batches that the broker no longer has are missing. Raises BrokerAway.
    """
    by_node: dict[str, list[Seen]] = {}
    for each in fragments:
        by_node.setdefault(each.node, []).append(each)
    found: list[Sample] = []
    for node, of_node in by_node.items():
        found += with_consumer(kafka, lambda consumer, kafka, n=node, f=of_node: _read(consumer, kafka, gpu, n, f))
    return sorted(found, key=lambda sample: (sample.run_id, sample.seq, sample.instance, sample.at_ms))


async def _read(consumer: Any, kafka: Kafka, gpu: str, node: str, fragments: Sequence[Seen]) -> list[Sample]:
    from aiokafka.partitioner import DefaultPartitioner

    partitions = (await partitions_of(kafka)).get("telemetry", [])
    if not partitions:
        return []
    numbers = [tp.partition for tp in partitions]
    number = DefaultPartitioner()(node.encode(), numbers, numbers)
    tp = next(each for each in partitions if each.partition == number)
    first_ms, last_ms = min(f.appended_ms for f in fragments), max(f.appended_ms for f in fragments)
    start = (await consumer.offsets_for_times({tp: first_ms}))[tp]
    if start is None:
        return []
    consumer.assign([tp])
    consumer.seek(tp, start.offset)
    end = int((await consumer.end_offsets([tp]))[tp])
    wanted = {(each.run_id, each.seq) for each in fragments}
    found: list[Sample] = []
    while await consumer.position(tp) < end:
        records = (await consumer.getmany(tp, timeout_ms=500)).get(tp, [])
        mine = [each for each in records if each.key == node.encode() and each.timestamp <= last_ms]
        found += _samples(mine, gpu, wanted)
        if any(each.timestamp > last_ms for each in records):
            break
    return found


def _samples(records: Sequence[Any], gpu: str, wanted: set[tuple[str, int]]) -> list[Sample]:
    messages = [Record(r.topic, r.partition, r.offset, r.timestamp, r.key, r.value, tuple(r.headers)) for r in records]
    # Whatever the clocks said: the fragments are stored, so the worker took these batches.
    block = decode_block(messages, _NO_LIMIT_MS)
    found: list[Sample] = []
    for message, row in zip(block.message.tolist(), block.columns.to_pylist(), strict=True):
        header = block.headers[message]
        device = header.devices[row["device"]]
        if device.gpu == gpu and (header.run_id, header.seq) in wanted:
            values = (row[name] for name in ("sm_active", "gpu_util_pct", "power_mw", "energy_mj"))
            found.append(Sample(header.run_id, header.seq, row["ts_ms"], device.instance, *values))
    return found
