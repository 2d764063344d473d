"""`gpuledger cost`, `ledger`, `audit` and `status` on a small ledger in the real engine and, for marks, a real broker.

Expected amounts are worked out here from the world's intervals, by code that shares nothing with the product.
"""

from __future__ import annotations

import asyncio
import csv
import io
import json
import subprocess
import sys
import uuid
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer
from click.testing import CliRunner, Result

from gpuledger.agents.broker_topics import create_topics
from gpuledger.agents.messages import event_message
from gpuledger.agents.publisher import Publisher
from gpuledger.cli.main import cli
from gpuledger.cli.moments import iso
from gpuledger.local.clickhouse import EmbeddedClickHouse
from gpuledger.local.ports import free_port
from gpuledger.schemas.config import ClickHouse, Kafka
from gpuledger.schemas.events import Dirty
from tests.fixtures.clickhouse import ClickHouse as Server
from tests.fixtures.clickhouse import ClickHouseDatabase
from tests.streams.small_ledger import B200, END_MS, H100, SmallLedger, allocation, minute

pytestmark = pytest.mark.services

BOUNDS = ("--from", iso(minute(0)), "--to", iso(END_MS))
US = 1000
#: Held GPU-us by (pool, tenant, job) over the three hours, from the times in `world`.
HELD = {
    (H100, "acme", "job-a0"): (minute(75) + 567 - minute(5) - 1234) * US,
    (H100, "acme", "job-a1"): (minute(170) + 567 - minute(0) - 1234) * US / 3,
    (H100, "nord", "job-a2"): (minute(130) + 567 - minute(12) - 1234) * US / 3,
    (H100, "nord", "job-a3"): (minute(40) + 567 - minute(8) - 1234) * US,
    (B200, "nord", "job-b0"): (minute(90) + 567 - minute(30) - 1234) * US,
}
#: GPU time in service.
SERVICE = {
    H100: (4 * 180 * 60_000 + END_MS - minute(15) - 20_000 + END_MS - minute(70) - 30_000) * US,
    B200: (180 * 60_000 + minute(70) + 30_000 - minute(0)) * US,
}


@pytest.fixture(scope="module")
def ledger(clickhouse: Server) -> Iterator[SmallLedger]:
    """One that no test of this module changes."""
    name = f"test_{uuid.uuid4().hex}"
    made = SmallLedger(ClickHouse(url=clickhouse.url, database=name))
    made.build()
    yield made
    made.store.client.command(f"DROP DATABASE {name} SYNC")
    made.store.close()


def env(ledger: SmallLedger, **more: str) -> dict[str, str]:
    bootstrap = {"GPULEDGER_KAFKA__BOOTSTRAP": f"127.0.0.1:{free_port()}"}
    where = {
        "GPULEDGER_CLICKHOUSE__URL": ledger.settings.url,
        "GPULEDGER_CLICKHOUSE__DATABASE": ledger.settings.database,
    }
    # One partition, as in `small_ledger.GATES`; a worker would have told.
    return bootstrap | where | more


def run(environment: dict[str, str], *arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], env=environment)


def rows(ledger: SmallLedger, *arguments: str) -> list[dict[str, Any]]:
    result = run(env(ledger), *arguments, "--format", "json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


# -- cost -----------------------------------------------------------------------------------------------------------

KEYS = {
    *("held_gpu_us", "active_gpu_us", "idle_gpu_us", "unobserved_gpu_us", "down_gpu_us", "pending_gpu_us"),
    *("unconfirmed_gpu_us", "reserved_unused_gpu_us", "free_gpu_us", "unsliced_gpu_us", "energy_mj"),
    *("asset_cost", "asset_currency", "charge", "charge_currency", "estimate", "incomplete"),
}


def test_cost_by_tenant_agrees_with_the_intervals(ledger: SmallLedger) -> None:
    found = {row["tenant"]: row for row in rows(ledger, "cost", "--by", "tenant", *BOUNDS)}
    assert set(found) == {"acme", "nord", "(operator)"}
    assert set(found["acme"]) == KEYS | {"tenant"}
    for tenant in ("acme", "nord"):
        expected = sum(us for (_, who, _), us in HELD.items() if who == tenant)
        # A third of a GPU is rounded to the microsecond once a piece.
        assert abs(int(found[tenant]["held_gpu_us"]) - expected) <= 10
        parts = ("active", "idle", "unobserved", "down", "pending")
        assert sum(int(found[tenant][f"{part}_gpu_us"]) for part in parts) == int(found[tenant]["held_gpu_us"])
    assert int(found["acme"]["active_gpu_us"]) > 0 and int(found["acme"]["idle_gpu_us"]) > 0
    names = ("held_gpu_us", "unconfirmed_gpu_us", "reserved_unused_gpu_us", "free_gpu_us", "unsliced_gpu_us")
    assert sum(int(row[name]) for row in found.values() for name in names) == sum(SERVICE.values())
    # A flat rate on all held time of the pool with a card.
    assert found["acme"]["charge_currency"] == "EUR"
    price = Decimal("2.35") * int(found["acme"]["held_gpu_us"]) / 3_600_000_000
    assert abs(Decimal(found["acme"]["charge"]) - price) < Decimal("0.0000001")
    assert found["(operator)"]["charge"] is None


def test_asset_cost_is_all_given_to_somebody(ledger: SmallLedger) -> None:
    by = {name: rows(ledger, "cost", "--by", name, *BOUNDS) for name in ("tenant", "pool", "job")}
    sums = {name: sum(Decimal(row["asset_cost"] or 0) for row in found) for name, found in by.items()}
    assert sums["tenant"] == sums["pool"] == sums["job"]
    charged = {name: sum(Decimal(row["charge"] or 0) for row in found) for name, found in by.items()}
    assert charged["tenant"] == charged["pool"] == charged["job"] > 0
    # The period's cost by the minute, and on top what energy cost (and, at negative prices, gave back).
    (energy,) = ledger.store.rows("SELECT sum(energy_cost) FROM v_asset_cost")[0]
    fixed = Decimal("1234.56") * 180 / 1440
    assert abs(sums["pool"] - energy - fixed) < Decimal("0.000001")
    held = {name: sum(int(row["held_gpu_us"]) for row in found) for name, found in by.items()}
    assert held["tenant"] == held["pool"] == held["job"]


def test_cost_by_job_and_pool(ledger: SmallLedger) -> None:
    jobs = {(row["pool"], row["tenant"], row["job_id"]): row for row in rows(ledger, "cost", "--by", "job", *BOUNDS)}
    for key, expected in HELD.items():
        assert abs(int(jobs[key]["held_gpu_us"]) - expected) <= 10, key
    assert jobs[B200, "nord", "job-b0"]["asset_cost"] is None
    assert jobs[B200, "nord", "job-b0"]["incomplete"] is True, "no asset cost was applied for the pool"
    assert int(jobs[H100, "(operator)", ""]["free_gpu_us"]) > 0
    pools = {row["pool"]: row for row in rows(ledger, "cost", "--by", "pool", *BOUNDS)}
    assert set(pools) == {H100, B200}
    names = ("held_gpu_us", "unconfirmed_gpu_us", "reserved_unused_gpu_us", "free_gpu_us", "unsliced_gpu_us")
    assert {pool: sum(int(row[name]) for name in names) for pool, row in pools.items()} == SERVICE


def test_whole_intervals_are_exact_and_cut_ones_are_estimates(ledger: SmallLedger) -> None:
    whole = rows(ledger, "cost", "--by", "pool", "--pool", H100, "--from", iso(minute(30)), "--to", iso(minute(45)))
    assert [row["estimate"] for row in whole] == [False]
    cut = rows(ledger, "cost", "--by", "pool", "--pool", H100, "--from", iso(minute(30)), "--to", iso(minute(35)))
    assert [row["estimate"] for row in cut] == [True]
    third = Decimal(whole[0]["asset_cost"]) / 3
    assert abs(Decimal(cut[0]["asset_cost"]) - third) < Decimal("0.00000001")
    by_job = rows(ledger, "cost", "--by", "job", "--pool", H100, "--from", iso(minute(90)), "--to", iso(minute(95)))
    assert {row["estimate"] for row in by_job} == {True}


def test_filters_and_csv(ledger: SmallLedger) -> None:
    (row,) = rows(ledger, "cost", "--tenant", "nord", *BOUNDS)
    assert row["tenant"] == "nord"
    assert {row["tenant"] for row in rows(ledger, "cost", "--by", "job", "--tenant", "nord", *BOUNDS)} == {"nord"}
    result = run(env(ledger), "cost", "--by", "pool", *BOUNDS, "--format", "csv")
    found = {row["pool"]: row for row in csv.DictReader(io.StringIO(result.stdout))}
    assert set(found) == {H100, B200} and set(found[H100]) == KEYS | {"pool"}


def test_the_table_has_totals_and_says_what_its_labels_mean(ledger: SmallLedger) -> None:
    result = run(env(ledger), "cost", *BOUNDS)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == f"{BOUNDS[1]} to {BOUNDS[3]}" and lines[-1].startswith("total")
    assert "pending" not in lines[1], "a column in which nothing is says nothing"
    assert "incomplete: the cost lacks" in result.stderr and "estimate:" not in result.stderr
    held = Decimal(sum(int(row["held_gpu_us"]) for row in rows(ledger, "cost", *BOUNDS))) / 3_600_000_000
    assert f"{held:,.2f}" in lines[-1]


def test_an_empty_range_says_so(ledger: SmallLedger) -> None:
    result = run(env(ledger), "cost", "--from", "2020-01-01", "--to", "2020-01-02")
    assert result.exit_code == 0 and "no ledger rows in this range" in result.stderr
    assert json.loads(run(env(ledger), "cost", "--to", "2020-01-02", "--format", "json").stdout) == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--from", "2026-01-02", "--to", "2026-01-01"), "--from: 2026-01-02T00:00:00Z is not before --to"),
        (("--from", "2026-01-01T00:00:30Z"), "expected a whole minute"),
        (("--from", "2026-01-01T00:00"), "2026-01-01T00:00"),
        (("--from", "yesterday"), "yesterday"),
    ],
)
def test_wrong_times_are_named(ledger: SmallLedger, arguments: tuple[str, ...], text: str) -> None:
    result = run(env(ledger), "cost", *arguments)
    assert result.exit_code == 2
    assert text in result.stderr and "Traceback" not in result.stderr


# -- ledger ---------------------------------------------------------------------------------------------------------


def test_show_has_the_rows_of_the_views(ledger: SmallLedger) -> None:
    span = ("--from", iso(minute(15)), "--to", iso(minute(16)))
    found = rows(ledger, "ledger", "show", "--pool", H100, *span)
    assert sum(int(row["gpu_us"]) for row in found if row["kind"] != "overcommitted") == 4 * 60_000_000 + 40_000_000
    gpu = rows(ledger, "ledger", "show", "--rows", "gpu-minute", "--pool", H100, "--gpu", "g0", *span)
    assert sum(int(row["gpu_us"]) for row in gpu) == 60_000_000
    assert {(row["gpu"], row["job_id"]) for row in gpu} == {("g0", "job-a0")}
    jobs = rows(ledger, "ledger", "show", "--rows", "job-hour", "--job", "job-b0", *BOUNDS)
    assert sum(int(row["gpu_us"]) for row in jobs) == HELD[B200, "nord", "job-b0"]
    charges = rows(ledger, "ledger", "show", "--rows", "charge", "--kind", "free", *BOUNDS)
    assert {row["payer"] for row in charges} == {""} and all(Decimal(row["asset_cost"]) > 0 for row in charges)


def test_show_says_when_it_does_not_show_all(ledger: SmallLedger) -> None:
    result = run(env(ledger), "ledger", "show", *BOUNDS, "--limit", "3", "--format", "json")
    assert len(json.loads(result.stdout)) == 3
    assert "only the first 3 rows" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--rows", "gpu-minute"), "--pool: missing"),
        (("--rows", "gpu-minute", "--pool", H100, "--from", "2026-01-01", "--to", "2026-01-03"), "more than a day"),
        (("--rows", "minute", "--gpu", "g0"), "--gpu: rows of minute have none"),
        (("--rows", "minute", "--job", "j"), "--job: rows of minute have none"),
    ],
)
def test_show_refuses_what_makes_no_sense(ledger: SmallLedger, arguments: tuple[str, ...], text: str) -> None:
    result = run(env(ledger), "ledger", "show", *arguments)
    assert (result.exit_code, text in result.stderr) == (2, True), result.output


@pytest.fixture
def broker(kafka: str) -> Kafka:
    """The shared broker, with topics of our own."""
    made = Kafka(bootstrap=kafka, topic_prefix=f"cli-{uuid.uuid4().hex[:8]}.")
    asyncio.run(create_topics(made))
    return made


def broker_env(broker: Kafka) -> dict[str, str]:
    return {"GPULEDGER_KAFKA__BOOTSTRAP": broker.bootstrap, "GPULEDGER_KAFKA__TOPIC_PREFIX": broker.topic_prefix}


def test_recompute_marks_where_a_worker_runs(ledger: SmallLedger, broker: Kafka) -> None:
    span = ("--from", iso(minute(3)), "--to", iso(minute(5)))
    result = run(env(ledger, **broker_env(broker)), "ledger", "recompute", "--pool", H100, *span)
    assert result.exit_code == 0, result.output
    assert f"marked {span[1]} to {span[3]} of h100" in result.stdout

    async def read() -> list[bytes]:
        topic = f"{broker.topic_prefix}dirty"
        async with AIOKafkaConsumer(
            topic, bootstrap_servers=broker.bootstrap, auto_offset_reset="earliest"
        ) as consumer:
            return [(await asyncio.wait_for(consumer.getone(), 20)).value]

    (value,) = asyncio.run(read())
    mark = json.loads(value)
    assert (mark["pool"], mark["from_ms"], mark["to_ms"]) == (H100, minute(3), minute(5))


def test_recompute_knows_its_pools(ledger: SmallLedger) -> None:
    result = run(env(ledger), "ledger", "recompute", "--pool", "h1OO")
    assert result.stderr == "error: --pool: there is no pool 'h1OO'; known: b200, h100\n"


# -- audit ----------------------------------------------------------------------------------------------------------


def test_audit_of_a_ledger_that_is_right(ledger: SmallLedger) -> None:
    result = run(env(ledger), "audit", *BOUNDS, "--sample", "3")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"balanced, {BOUNDS[1]} to {BOUNDS[3]}\nchecked: 360 minutes, 6 hours")
    report = json.loads(run(env(ledger), "audit", *BOUNDS, "--pool", B200, "--json").stdout)
    assert (report["balanced"], report["minutes"], report["findings"]) == (True, 180, [])


def test_audit_of_nothing_says_so(ledger: SmallLedger) -> None:
    result = run(env(ledger), "audit", "--from", "2020-01-01", "--to", "2020-01-02")
    assert result.exit_code == 0
    assert result.stdout.startswith("nothing to audit: no complete minute")


@pytest.fixture
def wrong(clickhouse_database: ClickHouseDatabase, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallLedger]:
    """A ledger in which an allocation was stored whose mark was lost."""
    made = SmallLedger(ClickHouse(url=clickhouse_database.url, database=clickhouse_database.name))
    made.build()
    made.add(allocation("late", "b1", "acme", 95, 97, node="n2"))
    monkeypatch.setattr("gpuledger.streams.audit.time.sleep", lambda _: None)
    yield made
    made.store.close()


def test_audit_names_the_first_pool_gpu_and_minute_and_fails(wrong: SmallLedger, broker: Kafka) -> None:
    result = run(env(wrong), "audit", *BOUNDS, "--sample", "0")
    assert result.exit_code == 1, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == f"NOT BALANCED, {BOUNDS[1]} to {BOUNDS[3]}: 3 findings"
    assert lines[1].startswith(f"first: pool b200, GPU b1, minute {iso(minute(95))}: fingerprint: facts: expected ")
    assert "no broker answered" in result.stderr

    report = run(env(wrong, **broker_env(broker)), "audit", *BOUNDS, "--sample", "0", "--json")
    assert report.exit_code == 1
    found = json.loads(report.stdout)["findings"]
    assert [(f["pool"], f["gpu"], f["minute"]) for f in found][:1] == [(B200, "b1", iso(minute(95)))]

    async def mark() -> None:
        async with Publisher(broker, "test") as publisher:
            event = Dirty(pool=B200, from_ms=minute(95), to_ms=minute(98), why="test")
            await publisher.publish_many([event_message(event)])

    asyncio.run(mark())
    result = run(env(wrong, **broker_env(broker)), "audit", *BOUNDS, "--sample", "0")
    assert result.exit_code == 0, result.output
    assert "places whose marks wait for the worker" in result.stdout


# -- status ---------------------------------------------------------------------------------------------------------


def test_status_tells_progress_lag_and_trouble(
    clickhouse_database: ClickHouseDatabase, broker: Kafka, ledger: SmallLedger
) -> None:
    made = SmallLedger(ClickHouse(url=clickhouse_database.url, database=clickhouse_database.name))
    made.build()
    made.sql(
        "INSERT INTO dead_letters (topic, partition, offset, appended_at, reason) "
        "VALUES ('jobs', 0, 12345678901234567890, now64(3), 'gpus: expected int')"
    )
    made.sql("INSERT INTO gaps VALUES ('n0', 'run', 3, 9, 1767225600000, 1767225660000, 7, 'age')")
    for node, first, last, ago_ms in (("n1", 0, 4, 900_000), ("n1", 0, 9, 600_000), ("n2", 5, 5, 700_000)):
        made.sql(
            "INSERT INTO gaps SELECT {node:String}, 'later', {first:UInt32}, {last:UInt32}, at - 900000, at, "
            "{batches:UInt32}, 'spool full' FROM (SELECT toUnixTimestamp64Milli(now64(3)) - {ago:Int64} AS at)",
            **{"node": node, "first": first, "last": last, "batches": last - first + 1, "ago": ago_ms},
        )

    async def mark() -> None:
        async with Publisher(broker, "test") as publisher:
            events = [Dirty(pool=B200, from_ms=minute(n), to_ms=minute(n + 1)) for n in range(5)]
            await publisher.publish_many([event_message(event) for event in events])

    asyncio.run(mark())
    result = run(env(made, **broker_env(broker)), "status", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["backlog_marks"] == 5 and found["broker"].startswith("answers at")
    stored = {(row["topic"], row["partition"]): row for row in found["topics"]}
    assert stored["capacity", 0]["stored_offset"] == "7" and stored["capacity", 0]["lag"] == 0
    assert found["complete_until"] == iso(END_MS + 9 * 60_000)
    assert found["held_back_by"] == "allocations/0"
    assert found["dead_letters"] == 1
    assert found["last_dead_letters"][0]["offset"] == "12345678901234567890"
    # n1's second gap has grown out of its first, which is told no more.
    assert (found["gaps"], found["gap_batches"]) == (3, 18)
    assert found["gaps_last_day"] == {"gaps": 2, "batches": 11, "nodes": 2}
    assert [(gap["node"], gap["last_seq"], gap["reason"]) for gap in found["last_gaps"]] == [
        ("n1", 9, "spool full"),
        ("n2", 5, "spool full"),
        ("n0", 9, "age"),
    ]
    assert {pool["pool"]: pool["complete_until"] for pool in found["pools"]} == {H100: iso(END_MS), B200: iso(END_MS)}
    told = run(env(made), "status").stdout
    assert "telemetry gaps of the last day: 2 on 2 nodes, 11 batches dropped by spools; 1 before" in told
    made.store.close()

    text = run(env(ledger), "status")
    assert text.exit_code == 0, text.output
    assert "no broker answered" in text.stdout and "complete until: " in text.stdout
    assert "telemetry gaps of the last day: none\n" in text.stdout


# -- with --data and nothing running --------------------------------------------------------------------------------


def test_all_of_it_on_a_data_directory_in_processes_of_their_own(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    with EmbeddedClickHouse(data / "clickhouse") as engine:
        made = SmallLedger(ClickHouse(url=engine.url))
        made.build()
        made.add(allocation("late", "b1", "acme", 95, 97, node="n2"))
        made.store.close()

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "gpuledger.cli", *arguments, *BOUNDS, "--data", str(data)]
        return subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)

    audit = command("audit", "--sample", "2")
    assert audit.returncode == 1, audit.stderr
    assert f"first: pool b200, GPU b1, minute {iso(minute(95))}" in audit.stdout
    done = command("ledger", "recompute", "--pool", B200)
    assert done.returncode == 0, done.stderr
    assert f"computed {BOUNDS[1]} to {BOUNDS[3]} of b200" in done.stdout
    again = command("audit", "--sample", "2")
    assert again.returncode == 0, again.stdout + again.stderr
    cost = command("cost", "--by", "pool", "--format", "json")
    assert {row["pool"] for row in json.loads(cost.stdout)} == {H100, B200}
