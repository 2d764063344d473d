"""Our side of the hot path: one program, the Faust block consumer and `intake` as a worker has them.

`fold` does the equal work in the place of the sink; `whole` is the product: fragments stored, marks acknowledged,
progress written, offsets committed. Its argument is a JSON object; its last line of output is the result.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import faust
from work import Clock, Fold

from gpuledger.agents.messages import event_message
from gpuledger.agents.publisher import Publisher
from gpuledger.schemas.config import ClickHouse, Kafka, Worker
from gpuledger.schemas.events import Dirty
from gpuledger.streams.blocks import Record, block_topic, faust_settings
from gpuledger.streams.intake import IntakeLimits, Stored, intake
from gpuledger.streams.recomputer import LedgerRules
from gpuledger.streams.sinks import Followup, TelemetrySink
from gpuledger.streams.store import Store, is_io_error

#: Messages folded together: so many fit a processor's cache, and a block of two thousand does not.
_AT_ONCE = 64


class FoldSink:
    """The equal work as a sink: nothing is stored, nothing follows."""

    def __init__(self) -> None:
        self.fold = Fold()

    @property
    def messages(self) -> int:
        return self.fold.messages

    def store(self, records: Sequence[Record]) -> Stored[None]:
        for start in range(0, len(records), _AT_ONCE):
            part = records[start : start + _AT_ONCE]
            self.fold.add([record.key or b"" for record in part], [record.value or b"" for record in part])
        return Stored(None)

    async def after(self, stored: Stored[None]) -> None:
        """Nothing follows."""

    def result(self) -> dict[str, object]:
        return self.fold.result()


class WholeSink:
    """The product's sink, and when its first block came and its last was marked."""

    def __init__(self, sink: TelemetrySink, samples_per_message: int) -> None:
        self._sink = sink
        self._samples = samples_per_message
        self.messages = 0
        self._clock = Clock()

    def store(self, records: Sequence[Record]) -> Stored[Followup]:
        return self.prepare(records)()

    def prepare(self, records: Sequence[Record]) -> Callable[[], Stored[Followup]]:
        self._clock.begin()
        step = self._sink.prepare(records)

        def rest() -> Stored[Followup]:
            stored = step()
            if stored.rejected:
                raise SystemExit(f"rejected: {stored.rejected[0].reason}")
            self._stored = len(records)
            return stored

        return rest

    async def after(self, stored: Stored[Followup]) -> None:
        await self._sink.after(stored)
        self.messages += self._stored
        self._clock.end()

    def result(self) -> dict[str, object]:
        samples = self.messages * self._samples
        return {"messages": self.messages, "samples": samples, **self._clock.result()}


async def _all_committed(app: faust.App, job: dict[str, Any]) -> None:
    """Returns once the broker has the offsets of all messages: they are part of what has to be right."""
    consumer: Any = app.consumer
    while True:
        await asyncio.sleep(0.1)
        if sum(offset or 0 for offset in consumer._committed_offset.values()) >= job["messages"]:
            return


def make_app(job: dict[str, Any], datadir: Path) -> faust.App:
    kafka = Kafka(bootstrap=job["bootstrap"], topic_prefix=job["prefix"])
    app = faust.App(**faust_settings(job["group"], [job["bootstrap"]], datadir, session_timeout_s=6))
    publisher = Publisher(kafka, client_id=f"{job['group']}-worker")

    async def mark(event: Dirty) -> None:
        await publisher.publish_many([event_message(event)])

    async def dead_letter(record: Record, reason: str) -> None:
        raise SystemExit(f"dead letter: {reason}")

    sink: Any = FoldSink()
    if job["mode"] == "whole":
        store = Store(ClickHouse(url=job["clickhouse"], database=job["database"]))
        rules = LedgerRules(grace_ms=60_000, confirm_ms=600_000, price_interval_minutes=15)
        sink = WholeSink(TelemetrySink(store, mark, rules), job["samples_per_message"])
    usual = Worker()
    limits = IntakeLimits(max_records=usual.batch_max_records, linger_ms=usual.batch_linger_ms)

    async def agent(stream: Any) -> None:
        await intake(stream, sink=sink, dead_letter=dead_letter, is_io_error=is_io_error, limits=limits)

    app.agent(block_topic(app, job["topic"]), name="telemetry")(agent)

    @app.task
    async def stop_when_done() -> None:
        await _all_committed(app, job)
        print(json.dumps(sink.result() | {"committed": job["messages"]}), flush=True)
        # A clean stop would be waited for by the next contender.
        os._exit(0)

    del stop_when_done
    return app


def main() -> None:
    job = json.loads(sys.argv[1])
    with tempfile.TemporaryDirectory() as datadir:
        worker = faust.Worker(make_app(job, Path(datadir)), loglevel="WARN", quiet=True)
        worker.spinner = None
        worker.execute_from_commandline()


if __name__ == "__main__":
    main()
