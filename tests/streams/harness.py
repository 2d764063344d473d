"""What the intake tests share: topics and records on the real broker, and workers as processes that may be killed."""

import asyncio
import json
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.structs import TopicPartition

REPOSITORY = Path(__file__).parents[2]


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 45) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"gave up waiting until {what}"
        time.sleep(0.1)


class Bench:
    """One topic with its marks, dead letters and store, and the workers of one consumer group on it."""

    def __init__(self, bootstrap: str, directory: Path, partitions: int = 4, configs: Mapping[str, str] | None = None):
        self.bootstrap = bootstrap
        self.directory = directory
        self.partitions = partitions
        unique = uuid.uuid4().hex[:8]
        self.topic, self.marks, self.letters = (f"{name}-{unique}" for name in ("source", "marks", "letters"))
        self.group = f"group-{unique}"
        self.database = directory / "store.db"
        self.outage = directory / "outage"
        self.workers: list[Worker] = []
        asyncio.run(self._create_topics(dict(configs or {})))

    async def _create_topics(self, configs: dict[str, str]) -> None:
        admin = AIOKafkaAdminClient(bootstrap_servers=self.bootstrap)
        await admin.start()
        try:
            await admin.create_topics(
                [
                    NewTopic(self.topic, self.partitions, 1, topic_configs=configs),
                    NewTopic(self.marks, 1, 1),
                    NewTopic(self.letters, 1, 1),
                ]
            )
        finally:
            await admin.close()

    # -- records in, records out

    def send(self, values: Mapping[int, Sequence[bytes | None]], keys: Mapping[int, Sequence[bytes]] | None = None):
        """Send `values` by partition, each partition in order."""

        async def send_all() -> None:
            async with AIOKafkaProducer(bootstrap_servers=self.bootstrap, linger_ms=5) as producer:
                pending = [
                    await producer.send(
                        self.topic,
                        value,
                        key=keys[partition][position] if keys else None,
                        partition=partition,
                        headers=[("n", b"1")],
                    )
                    for partition, of_partition in values.items()
                    for position, value in enumerate(of_partition)
                ]
                await asyncio.gather(*pending)

        asyncio.run(send_all())

    @contextmanager
    def feed(self, per_second: int) -> Generator[dict[str, int]]:
        """Send numbered records to every partition until left; "sent" then says how many each partition got."""
        count = {"sent": 0}
        enough = threading.Event()

        async def send_on() -> None:
            async with AIOKafkaProducer(bootstrap_servers=self.bootstrap) as producer:
                while not enough.is_set():
                    for partition, values in self.numbered(per_second // 10, start=count["sent"]).items():
                        for value in values:
                            await producer.send(self.topic, value, partition=partition)
                    count["sent"] += per_second // 10
                    await asyncio.sleep(0.1)

        feeder = threading.Thread(target=lambda: asyncio.run(send_on()))
        feeder.start()
        try:
            yield count
        finally:
            enough.set()
            feeder.join()

    def numbered(self, count: int, start: int = 0) -> dict[int, list[bytes | None]]:
        return {p: [f"{p}-{start + n}".encode() for n in range(count)] for p in range(self.partitions)}

    def committed(self) -> dict[int, int | None]:
        async def read() -> dict[int, int | None]:
            async with AIOKafkaConsumer(
                bootstrap_servers=self.bootstrap, group_id=self.group, enable_auto_commit=False
            ) as consumer:
                tps = {p: TopicPartition(self.topic, p) for p in range(self.partitions)}
                return {p: await consumer.committed(tp) for p, tp in tps.items()}

        return asyncio.run(read())

    def read(self, topic: str) -> list[tuple[str, str]]:
        """Every (key, value) of a topic with one partition."""

        async def read_all() -> list[tuple[str, str]]:
            async with AIOKafkaConsumer(bootstrap_servers=self.bootstrap, auto_offset_reset="earliest") as consumer:
                tp = TopicPartition(topic, 0)
                consumer.assign([tp])
                end = (await consumer.end_offsets([tp]))[tp]
                found: list[tuple[str, str]] = []
                while await consumer.position(tp) < end:
                    for record in (await consumer.getmany(tp, timeout_ms=500)).get(tp, []):
                        found.append(((record.key or b"").decode(), (record.value or b"").decode()))
                return found

        return asyncio.run(read_all())

    def query(self, sql: str, *parameters: object) -> list[tuple[Any, ...]]:
        if not self.database.exists():
            return []
        database = sqlite3.connect(self.database, timeout=30)
        try:
            return database.execute(sql, parameters).fetchall()
        except sqlite3.OperationalError:
            return []  # the worker has not made its tables yet
        finally:
            database.close()

    def stored(self) -> int:
        return self.query("select count(*) from rows")[0][0] if self.query("select count(*) from rows") else 0

    def rows(self) -> dict[int, list[tuple[int, bytes]]]:
        found: dict[int, list[tuple[int, bytes]]] = {}
        for partition, offset, value in self.query("select p, o, value from rows order by p, o"):
            found.setdefault(partition, []).append((offset, value))
        return found

    # -- workers

    def start(self, name: str = "a", **config: Any) -> "Worker":
        worker = Worker(self, name, config)
        self.workers.append(worker)
        return worker

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()


class Worker:
    """One worker process; its log is a file, its counters are a file written when its agent ends."""

    def __init__(self, bench: Bench, name: str, config: dict[str, Any]) -> None:
        directory = bench.directory / name
        directory.mkdir(exist_ok=True)
        self.log_file = directory / f"{uuid.uuid4().hex[:6]}.log"
        self.ready = directory / "ready"
        self.report = directory / "report.json"
        for stale in (self.ready, self.report):
            stale.unlink(missing_ok=True)
        everything = {
            "name": name,
            "bootstrap": bench.bootstrap,
            "group": bench.group,
            "topic": bench.topic,
            "marks": bench.marks,
            "letters": bench.letters,
            "database": str(bench.database),
            "outage": str(bench.outage),
            "datadir": str(directory / "faust"),
            "ready": str(self.ready),
            "report": str(self.report),
            "limits": {},
        } | config
        (directory / "config.json").write_text(json.dumps(everything))
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.streams.intake_worker", str(directory / "config.json")],
                cwd=REPOSITORY,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def wait(self, timeout_s: float = 30) -> int:
        return self.process.wait(timeout_s)

    def release(self) -> None:
        """Let a worker go on that holds at a barrier."""
        self.process.send_signal(signal.SIGUSR1)

    def stop(self) -> tuple[int, float]:
        """SIGTERM; returns the exit status and the seconds it took."""
        started_s = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(30)
        return status, time.monotonic() - started_s

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)

    def stats(self) -> dict[str, Any]:
        return json.loads(self.report.read_text())


@contextmanager
def bench(bootstrap: str, directory: Path, **options: Any) -> Generator[Bench]:
    made = Bench(bootstrap, directory, **options)
    try:
        yield made
    finally:
        made.close()
