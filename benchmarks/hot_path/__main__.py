"""Our consuming helper against its peers, on the embedded Kafka: `python benchmarks/hot_path`.

(a) Equal work: decode and a one-minute fold of 28 metrics, by us (Faust in blocks), Bytewax in batches and per message,
Quix Streams per message, and a confluent-kafka loop in batches. (b) The whole path of the product: fragments stored in
the embedded ClickHouse, marks acknowledged, offsets committed. All read one topic that was loaded before; every run is
a process of its own, and the order is reversed from round to round. The peers live in an environment of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).parents[1]))

from installation import machine, print_result
from messages import messages, node_name
from peers import peers_environment
from profile_text import shown
from work import GPUS, SAMPLES

from gpuledger.agents.broker_topics import create_topics
from gpuledger.agents.messages import Message
from gpuledger.agents.publisher import Publisher
from gpuledger.cli.database import migrate_database
from gpuledger.local.clickhouse import EmbeddedClickHouse
from gpuledger.local.kafka import EmbeddedKafka
from gpuledger.schemas.config import ClickHouse, Kafka
from gpuledger.schemas.events import Inventory, Placement, encode_event
from gpuledger.streams.blocks import Record
from gpuledger.streams.sinks import FactsSink
from gpuledger.streams.store import Store

_HERE = Path(__file__).parent
_PREFIX = "bench."
_TOPIC = _PREFIX + "telemetry"
_AT_ONCE = 2_000
_LIMIT_S = 180
#: When the made nodes came into service.
_LONG_AGO_MS = 1_700_000_000_000
#: Less than this share of a run's time is not worth a line of the profile.
_LEAST_SHARE = 0.01


@dataclass(frozen=True)
class Contender:
    """`target`: what our own speed should be as a multiple of this one's."""

    name: str
    program: str
    mode: str
    target: float | None = None

    @property
    def is_ours(self) -> bool:
        return self.program == "ours.py"


OURS = Contender("GPULedger (Faust in blocks)", "ours.py", "fold")
WHOLE = Contender("GPULedger, whole path", "ours.py", "whole")
PEERS = (
    Contender("Bytewax, in batches", "peer_bytewax.py", "batches", 1.2),
    Contender("Bytewax, per message", "peer_bytewax.py", "messages", 2.5),
    Contender("Quix Streams, per message", "peer_quix.py", "messages", 3.0),
    Contender("confluent-kafka, in batches", "peer_confluent.py", "batches", 0.9),
    Contender("confluent-kafka, tuned", "peer_confluent.py", "tuned", 0.9),
)
#: The whole path as a share of our own equal work.
_WHOLE_TARGET = 0.4


@dataclass(frozen=True)
class Run:
    """GPU-samples per second, and what the consumer's process used of the CPU per message."""

    samples_per_s: float
    cpu_us: float


@dataclass
class Bench:
    """One broker with its loaded topic, and the Python of each side."""

    bootstrap: str
    directory: Path
    nodes: int
    count: int
    python: Path | None
    profile_s: int | None
    totals: list[float] | None = None

    def run(self, contender: Contender) -> Run:
        """One run of a contender, in a process of its own.

        Raises SystemExit where it did not read every message, or its sums are others than those before.
        """
        if contender is WHOLE:
            with EmbeddedClickHouse(self.directory / f"engine-{uuid.uuid4().hex[:6]}") as engine:
                return self._measured(contender, self._prepared(engine.url))
        return self._measured(contender, {})

    def _prepared(self, url: str) -> dict[str, Any]:
        """A database with the placements of all nodes, so that marks have pools to go to."""
        settings = ClickHouse(url=url, database="hot_path")
        migrate_database(settings)
        store = Store(settings)
        values = [encode_event(_inventory(node)) for node in range(self.nodes)]
        records = [Record("inventory", 0, n, 1, None, value) for n, value in enumerate(values)]
        stored = FactsSink(store, "inventory", _no_mark, 0).store(records)
        if stored.rejected:
            raise SystemExit(f"inventory: {stored.rejected[0].reason}")
        store.close()
        return {"clickhouse": url, "database": settings.database, "samples_per_message": GPUS * SAMPLES}

    def _measured(self, contender: Contender, more: Mapping[str, Any]) -> Run:
        job = {
            "bootstrap": self.bootstrap,
            "topic": _TOPIC,
            "prefix": _PREFIX,
            "group": f"run-{uuid.uuid4().hex[:8]}",
            "messages": self.count,
            "mode": contender.mode,
            **more,
        }
        result = self._child(contender, job)
        if result["messages"] != self.count or result["samples"] != self.count * GPUS * SAMPLES:
            raise SystemExit(f"{contender.name}: read {result['messages']} messages of {self.count}: {result}")
        if result.get("committed", self.count) != self.count:
            raise SystemExit(f"{contender.name}: committed {result['committed']} of {self.count}")
        self._check_totals(contender, result.get("totals"))
        return Run(result["samples"] / result["seconds"], result["cpu_seconds"] / self.count * 1e6)

    def _check_totals(self, contender: Contender, totals: list[float] | None) -> None:
        if totals is None:
            return
        self.totals = self.totals or totals
        for mine, first in zip(totals, self.totals, strict=True):
            if abs(mine - first) > 1e-9 * abs(first):
                raise SystemExit(f"{contender.name}: its sums differ: {mine} where the first run had {first}")

    def _child(self, contender: Contender, job: Mapping[str, Any]) -> dict[str, Any]:
        python = Path(sys.executable) if contender.is_ours else self.python
        argv = [str(python), str(_HERE / contender.program), json.dumps(job)]
        log = self.directory / "child.log"
        with log.open("wb") as errors:
            process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=errors)
            spy = self._spy(contender, process.pid) if contender.is_ours and self.profile_s else None
            try:
                out, _ = process.communicate(timeout=_LIMIT_S)
            finally:
                process.kill()
                process.wait()
                if spy is not None:
                    spy.wait(30)
        lines = out.decode().strip().splitlines()
        if not lines:
            raise SystemExit(f"{contender.name}: no result\n{log.read_text(errors='replace')[-2000:]}")
        return json.loads(lines[-1])

    def profile_file(self, contender: Contender) -> Path:
        return self.directory / f"profile-{contender.mode}.txt"

    def _spy(self, contender: Contender, pid: int) -> subprocess.Popen[bytes]:
        assert self.python is not None
        target = self.profile_file(contender)
        argv = [str(self.python.with_name("py-spy")), "record", "--pid", str(pid), "--format", "raw"]
        argv += ["--rate", "200", "--threads", "--duration", str(self.profile_s), "--output", str(target)]
        return subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


async def _no_mark(_: Any) -> None:
    """Nothing is marked while placements are made."""


def _inventory(node: int) -> Inventory:
    name = node_name(node)
    placements = [
        Placement(
            id=f"placement:{node}:{gpu}",
            revision=_LONG_AGO_MS,
            claimed_at_ms=_LONG_AGO_MS,
            gpu=f"GPU-{node:08x}-0000-4000-8000-{gpu:012x}",
            node=name,
            pool=f"pool-{node % 4}",
            site="bench",
            start_ms=_LONG_AGO_MS,
        )
        for gpu in range(GPUS)
    ]
    return Inventory(node=name, claimed_at_ms=_LONG_AGO_MS, placements=placements)


def _chunks(source: Iterator[Message]) -> Iterator[list[Message]]:
    while chunk := list(islice(source, _AT_ONCE)):
        yield chunk


async def _load(kafka: Kafka, source: Iterator[Message]) -> int:
    """Sends all of them as our agents would; the bytes of their values."""
    await create_topics(kafka)
    size = 0
    async with Publisher(kafka, "gpuledger-benchmark") as publisher:
        for chunk in _chunks(source):
            size += sum(len(message.value) for message in chunk)
            await publisher.publish_many(chunk)
    return size


def _rows(runs: Mapping[str, list[Run]]) -> list[dict[str, Any]]:
    speeds = {name: [run.samples_per_s for run in found] for name, found in runs.items()}
    ours = statistics.median(speeds[OURS.name])
    rows: list[dict[str, Any]] = []
    for contender in (OURS, *PEERS, WHOLE):
        if contender.name not in speeds:
            continue
        found = speeds[contender.name]
        median = statistics.median(found)
        row: dict[str, Any] = {
            "consumer": contender.name,
            "samples_per_s": round(median),
            "least": round(min(found)),
            "most": round(max(found)),
            "cpu_us_per_message": round(statistics.median(run.cpu_us for run in runs[contender.name]), 1),
            "ratio": None,
            "target": None,
        }
        if contender is WHOLE:
            row |= {"ratio": round(median / ours, 2), "target": _WHOLE_TARGET}
        elif contender is not OURS:
            row |= {"ratio": round(ours / median, 2), "target": contender.target}
        rows.append(row)
    return rows


def _told(row: Mapping[str, Any]) -> list[str]:
    thousands = [f"{row[name] / 1e3:,.0f}k" for name in ("samples_per_s", "least", "most")]
    thousands.append(str(row["cpu_us_per_message"]))
    if row["ratio"] is None:
        return [row["consumer"], *thousands, "", "", ""]
    verdict = "reached" if row["ratio"] >= row["target"] else "missed"
    what = "of (a)" if row["consumer"] == WHOLE.name else "ours / it"
    return [row["consumer"], *thousands, f"{row['ratio']:.2f} {what}", f">= {row['target']}", verdict]


def measure(arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    nodes = max(1, arguments.messages // arguments.flushes)
    count = nodes * arguments.flushes
    python = peers_environment(arguments.peers, install=arguments.install)
    contenders = [OURS, *(PEERS if python is not None else ()), *(() if arguments.no_whole else (WHOLE,))]
    if arguments.only:
        contenders = [one for one in contenders if one is OURS or any(word in one.name for word in arguments.only)]
    # Event times end a little before now: later ones would be quarantined.
    start_ms = (int(time.time()) - arguments.flushes * SAMPLES - 30) * 1000
    with EmbeddedKafka(directory / "kafka") as broker:
        began = time.monotonic()
        kafka = Kafka(bootstrap=broker.bootstrap, topic_prefix=_PREFIX)
        size = asyncio.run(_load(kafka, messages(nodes, arguments.flushes, start_ms)))
        print(
            f"{count} messages of {size // count} bytes from {nodes} nodes, loaded in {time.monotonic() - began:.0f} s",
            flush=True,
        )
        bench = Bench(broker.bootstrap, directory, nodes, count, python, arguments.profile)
        speeds: dict[str, list[Run]] = {one.name: [] for one in contenders}
        for round_ in range(arguments.runs):
            for contender in contenders if round_ % 2 == 0 else contenders[::-1]:
                found = bench.run(contender)
                speeds[contender.name].append(found)
                print(
                    f"round {round_ + 1}  {contender.name:30} {found.samples_per_s / 1e3:8,.0f}k samples/s"
                    f"  {found.cpu_us:6.1f} us CPU per message",
                    flush=True,
                )
        for contender in contenders if arguments.profile else ():
            if contender.is_ours:
                print(f"\nprofile of {contender.name}, last round")
                print(shown(bench.profile_file(contender), _LEAST_SHARE))
    rows = _rows(speeds)
    return {"messages": count, "bytes_per_message": size // count, "runs": arguments.runs, "consumers": rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="hot_path", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--messages", type=int, default=40_000, help="8 GPUs x 10 samples x 30 columns each")
    parser.add_argument("--flushes", type=int, default=100, help="messages of each node")
    parser.add_argument("--runs", type=int, default=5, help="of each; the median counts")
    parser.add_argument("--only", action="append", metavar="WORD", help="peers whose name has it; repeat")
    parser.add_argument("--no-whole", action="store_true", help="without (b)")
    parser.add_argument("--peers", type=Path, metavar="DIR", help="their environment; default: in the user's cache")
    parser.add_argument("--no-install", dest="install", action="store_false", help="skip peers that are not installed")
    parser.add_argument(
        "--profile", type=int, metavar="SECONDS", help="of our own runs, by py-spy from the peers' environment"
    )
    arguments = parser.parse_args()
    if arguments.messages < 1 or arguments.flushes < 1 or arguments.runs < 1:
        parser.error("--messages, --flushes and --runs: expected positive numbers")
    before = machine()["load_1m"]
    with tempfile.TemporaryDirectory() as temporary:
        result = measure(arguments, Path(temporary))
    headings = ["consumer", "samples/s", "least", "most", "CPU us/message", "ratio", "target", ""]
    told = [_told(row) for row in result["consumers"]]
    print_result("hot_path", headings, told, {"load_1m_before": before, **result})


if __name__ == "__main__":
    main()
