"""A Faust worker for the intake tests: what arrives goes to SQLite, marks and dead letters go to Kafka.

Started as `python -m tests.streams.intake_worker CONFIG.json`; the configuration says how its sink misbehaves.
"""

import asyncio
import json
import os
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import faust
from faust.types import TP

from gpuledger.streams.blocks import BlockConsumer, BlockTransport, Record, block_topic, faust_settings
from gpuledger.streams.exceptions import DataError
from gpuledger.streams.intake import IntakeLimits, IntakeStats, Rejected, Stored, intake


class PlainSqliteSink:
    """Rows keyed by (partition, offset), so that a redelivered record replaces itself; `seen` counts deliveries."""

    #: Blocks that were prepared while another was being stored.
    ahead = 0

    def __init__(self, config: dict[str, Any], marks: Any) -> None:
        self.config = config
        self.marks = marks
        self.database = sqlite3.connect(config["database"], timeout=30, check_same_thread=False)
        self.database.execute("pragma journal_mode = wal")
        self.database.execute("create table if not exists rows (p int, o int, value blob, primary key (p, o))")
        self.database.execute("create table if not exists seen (p int, o int, worker text)")
        self.storing = False

    def store(self, records: Sequence[Record]) -> Stored[dict[int, int]]:
        return self._store(records, self._kept(records))

    def _kept(self, records: Sequence[Record]) -> list[Record]:
        keep = [record for record in records if not (record.value or b"").startswith(b"reject")]
        for record in keep:
            if (record.value or b"").startswith(b"poison"):
                raise ValueError(f"cannot read {record.value!r} at offset {record.offset}")
            if (record.value or b"").startswith(b"bad") or self.config.get("all_bad"):
                raise DataError("bad by name")
            if self.config.get("broken"):
                raise AttributeError("our own mistake")
        return keep

    def _store(self, records: Sequence[Record], keep: Sequence[Record]) -> Stored[dict[int, int]]:
        self.storing = True
        try:
            return self._write(records, keep)
        finally:
            self.storing = False

    def _write(self, records: Sequence[Record], keep: Sequence[Record]) -> Stored[dict[int, int]]:
        if Path(self.config["outage"]).exists():
            raise ConnectionError("the store is away")
        if self.config.get("store_hangs"):
            Path(self.config["ready"]).touch()
            time.sleep(3600)
        time.sleep(self.config.get("store_ms", 0) / 1000)
        with self.database:
            self.database.executemany(
                "insert or replace into rows values (?, ?, ?)", [(r.partition, r.offset, r.value) for r in keep]
            )
            self.database.executemany(
                "insert into seen values (?, ?, ?)", [(r.partition, r.offset, self.config["name"]) for r in keep]
            )
        rejected = [Rejected(record, "rejected by the sink") for record in records if record not in keep]
        return Stored({record.partition: record.offset for record in keep}, rejected)

    async def after(self, stored: Stored[dict[int, int]]) -> None:
        for partition, offset in stored.marks.items():
            sent = await self.marks.send(key=str(partition).encode(), value=str(offset).encode())
            await sent


class SqliteSink(PlainSqliteSink):
    """The same in two steps: records are looked at ahead, which is where bad ones are found."""

    def prepare(self, records: Sequence[Record]) -> Callable[[], Stored[dict[int, int]]]:
        self.ahead += self.storing
        keep = self._kept(records)
        return lambda: self._store(records, keep)


class ForgetfulConsumer(BlockConsumer):
    """Throws the third block away after it was fetched, as a rebalance at the wrong moment would."""

    fetched = 0

    async def _next_block(self, tp: TP, batch: Sequence[Any]) -> Any:
        self.fetched += 1
        return None if self.fetched == 3 else await super()._next_block(tp, batch)


def write(path: str, text: str) -> None:
    Path(path).write_text(text)


def make_app(config: dict[str, Any]) -> faust.App:
    settings = faust_settings(
        config["group"], [config["bootstrap"]], Path(config["datadir"]), session_timeout_s=6, **config.get("faust", {})
    )
    app = faust.App(**settings)
    source = block_topic(app, config["topic"])
    marks = block_topic(app, config["marks"])
    letters = block_topic(app, config["letters"])
    if config.get("forgetful"):
        BlockTransport.Consumer = ForgetfulConsumer
    BlockConsumer.topic_held_bytes = config.get("held_bytes", BlockConsumer.topic_held_bytes)
    stats = IntakeStats()
    passed: dict[str, int] = {}

    async def dead_letter(record: Record, reason: str) -> None:
        sent = await letters.send(key=f"{record.partition}/{record.offset}".encode(), value=reason.encode())
        await sent

    async def barrier(name: str) -> None:
        passed[name] = passed.get(name, 0) + 1
        if config.get("kill_at") == [name, passed[name]]:
            os.kill(os.getpid(), signal.SIGKILL)
        if config.get("hold_at") == [name, passed[name]]:
            released = asyncio.Event()
            asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, released.set)
            write(config["ready"], "held")
            await released.wait()
        if config.get("seek_at") == [name, passed[name]]:
            await app.consumer.seek_wait({TP(config["topic"], 0): 0})

    @app.agent(source)
    async def consume(stream: Any) -> None:
        sink = (PlainSqliteSink if config.get("plain") else SqliteSink)(config, marks)
        limits = IntakeLimits(**({"linger_ms": 20, "backoff_first_ms": 20, "backoff_max_ms": 500} | config["limits"]))
        try:
            await intake(stream, sink=sink, dead_letter=dead_letter, limits=limits, stats=stats, barrier=barrier)
        finally:
            report = asdict(stats) | {
                "ahead": sink.ahead,
                "last_offset": {p: o for (_, p), o in stats.last_offset.items()},
                "held_bytes": stream.app.consumer.held_bytes(config["topic"]),
            }
            write(config["report"], json.dumps(report))

    return app


if __name__ == "__main__":
    faust.Worker(make_app(json.loads(Path(sys.argv[1]).read_text())), loglevel="INFO").execute_from_commandline()
