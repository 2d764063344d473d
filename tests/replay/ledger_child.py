"""Run as a process of its own by test_complete: waits on the real engine's progress table (one engine per process).

Arguments: Kafka's bootstrap, topic prefix, a directory for the engine. Prints what was waited for, as JSON.
"""

import asyncio
import json
import sys
from collections.abc import Sequence

import clickhouse_connect

from gpuledger.agents.publisher import Publisher
from gpuledger.agents.replay.complete import wait_for_ledger
from gpuledger.agents.replay.exceptions import LedgerTimeout
from gpuledger.agents.replay.facts import JobReplay, Scope
from gpuledger.agents.replay.place import place
from gpuledger.agents.replay.replayer import send
from gpuledger.agents.replay.trace import Fleet, Node, TraceJob
from gpuledger.schemas.config import Kafka
from gpuledger.schemas.migrate import migrate

T0 = 1_600_000_000_000
FLEET = Fleet((Node("n0", 1, "", "p"), Node("n1", 1, "", "q")))
JOBS = [TraceJob("j", "a", "u", 2, 1000, T0, T0 + 60_000)]


async def main(bootstrap: str, prefix: str, directory: str) -> None:
    client = clickhouse_connect.get_client(interface="chdb", path=directory)

    def query(sql: str) -> Sequence[Sequence[object]]:
        return client.query(sql).result_rows

    def execute(sql: str, parameters: dict[str, object] | None = None, /) -> object:
        return client.command(sql, parameters=parameters)

    migrate(query, execute)

    def stored(topic: str, partition: int, offset: int) -> None:
        client.command(f"INSERT INTO progress VALUES ('{topic}', {partition}, {T0}, {offset})")

    async with Publisher(Kafka(bootstrap=bootstrap, topic_prefix=prefix)) as publisher:
        sent = await send(JobReplay(place(JOBS, FLEET), FLEET, Scope("t")), publisher)
        try:
            await wait_for_ledger(client, sent, publisher, timeout_s=0, poll_s=0.01)
        except LedgerTimeout as error:
            first = str(error)
        else:
            first = "nothing was waited for"

        seen: list[tuple[str, int]] = []

        def waiting(what: str, behind: int) -> None:
            """A worker that, at each look, stores one more topic; then works off the marks."""
            seen.append((what, behind))
            if what == "facts to be stored":
                (topic, partition), offset = sorted(sent.last_offsets.items())[
                    min(len(seen), len(sent.last_offsets)) - 1
                ]
                stored(topic, partition, offset)
            else:
                stored("dirty", 0, len(seen) - len(sent.last_offsets) - 2)

        await wait_for_ledger(client, sent, publisher, timeout_s=30, poll_s=0.01, waiting=waiting)
    print(json.dumps({"first": first, "seen": seen, "topics": sorted({topic for topic, _ in sent.last_offsets})}))


asyncio.run(main(*sys.argv[1:4]))
