"""Bytewax 0.21 as its documentation has it: a dataflow over KafkaSource, once in batches and once per message."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import Any

import bytewax.operators as op
from bytewax.connectors.kafka import KafkaSource, KafkaSourceMessage
from bytewax.dataflow import Dataflow
from bytewax.outputs import DynamicSink, StatelessSinkPartition
from bytewax.testing import cluster_main
from work import Fold

_BATCH = 1_000

Message = KafkaSourceMessage[Any, Any]


class _Nothing(StatelessSinkPartition[Any]):
    def write_batch(self, items: list[Any]) -> None:
        """Every dataflow needs an output; ours has nothing to write."""


class _NothingSink(DynamicSink[Any]):
    def build(self, step_id: str, worker_index: int, worker_count: int) -> _Nothing:
        return _Nothing()


def make_flow(job: dict[str, Any], fold: Fold) -> Dataflow:
    flow = Dataflow("hot_path")
    source = KafkaSource([job["bootstrap"]], [job["topic"]], tail=False, batch_size=_BATCH)
    messages = op.input("messages", flow, source)

    def fold_batch(batch: list[Message]) -> Iterable[int]:
        fold.add([message.key for message in batch], [message.value for message in batch])
        return ()

    def fold_one(message: Message) -> int:
        fold.add([message.key], [message.value])
        return 1

    if job["mode"] == "batches":
        op.output("out", op.flat_map_batch("fold", messages, fold_batch), _NothingSink())
    else:
        op.output("out", op.map("fold", messages, fold_one), _NothingSink())
    return flow


def main() -> None:
    job = json.loads(sys.argv[1])
    fold = Fold()
    cluster_main(make_flow(job, fold), [], 0, worker_count_per_proc=1)
    print(json.dumps(fold.result()), flush=True)


if __name__ == "__main__":
    main()
