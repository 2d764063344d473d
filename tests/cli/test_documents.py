"""`gpuledger rates|capacity|tenants` against the real broker and the real engine, with a worker's part played by a few
lines that store what the topics carry.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer
from click.testing import CliRunner, Result

from gpuledger.cli import documents
from gpuledger.cli.database import connect, migrate_database
from gpuledger.cli.main import cli
from gpuledger.schemas.config import ClickHouse
from gpuledger.schemas.events import Commitment, Placement
from gpuledger.streams.facts import StoredFact, decode_facts, fact_rows, rank_of
from tests.fixtures.clickhouse import ClickHouseDatabase

pytestmark = pytest.mark.services

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
PREFIX = "cli-documents."
T0 = 1_767_225_600_000

RATES = """
rate_cards:
  - {pool: h100, currency: EUR, per_gpu_hour: "2.50", start: 2026-01-01T00:00Z}
"""


@pytest.fixture
def settings(clickhouse_database: ClickHouseDatabase) -> ClickHouse:
    settings = ClickHouse(url=clickhouse_database.url, database=clickhouse_database.name)
    migrate_database(settings)
    return settings


@pytest.fixture
def env(kafka: str, settings: ClickHouse) -> dict[str, str]:
    """Variables that point the command at the services; the tables are empty."""
    return {
        "GPULEDGER_CLICKHOUSE__URL": settings.url,
        "GPULEDGER_CLICKHOUSE__DATABASE": settings.database,
        "GPULEDGER_KAFKA__BOOTSTRAP": kafka,
        "GPULEDGER_KAFKA__TOPIC_PREFIX": PREFIX,
    }


def run(env: dict[str, str], *arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], env=env)


def listed(env: dict[str, str], group: str) -> list[dict[str, Any]]:
    result = run(env, group, "list", "--format", "json")
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


@contextmanager
def storing(env: dict[str, str], settings: ClickHouse) -> Generator[None]:
    """Stores what is published from now on, as a worker does, until the block ends."""
    stop, ready = threading.Event(), threading.Event()

    async def store() -> None:
        consumer = AIOKafkaConsumer(bootstrap_servers=env["GPULEDGER_KAFKA__BOOTSTRAP"], auto_offset_reset="latest")
        await consumer.start()
        client = connect(settings)
        try:
            consumer.subscribe([PREFIX + "rates", PREFIX + "capacity"])
            while not consumer.assignment():
                await consumer.getmany(timeout_ms=50)
            for partition in consumer.assignment():
                await consumer.position(partition)
            ready.set()
            while not stop.is_set():
                for partition, records in (await consumer.getmany(timeout_ms=50)).items():
                    topic = partition.topic.removeprefix(PREFIX)
                    facts = [
                        StoredFact(fact, rank_of(fact), topic, partition.partition, record.offset, record.timestamp)
                        for record in records
                        for fact in decode_facts(topic, record.value)[0]
                    ]
                    for table, rows in fact_rows(facts, []).items():
                        client.insert_arrow(table, rows)
        finally:
            client.close()
            await consumer.stop()

    thread = threading.Thread(target=lambda: asyncio.run(store()), daemon=True)
    thread.start()
    assert ready.wait(30)
    try:
        yield
    finally:
        stop.set()
        thread.join(30)


@pytest.fixture
def topics(env: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Makes the topics, by a command that publishes into the void."""
    monkeypatch.setattr(documents, "_WAIT_S", 0.0)
    file = tmp_path / "void.yaml"
    file.write_text("tenants:\n  - {id: nobody}\n")
    result = run(env, "tenants", "apply", file)
    assert result.exit_code == 0, result.output
    assert "published 1; 1 are not in the database after 0 s. Is a worker running?" in result.stderr
    monkeypatch.undo()


@pytest.mark.usefixtures("topics")
def test_the_examples_are_applied_listed_and_applied_again(env: dict[str, str], settings: ClickHouse) -> None:
    dry = run(env, "rates", "apply", EXAMPLES / "rates.yaml", "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert "8 of 8 entries change, 0 do not" in dry.output and "nothing was published" in dry.output
    assert listed(env, "rates") == []

    with storing(env, settings):
        for group, entries in (("rates", 8), ("capacity", 4), ("tenants", 3)):
            first = run(env, group, "apply", EXAMPLES / f"{group}.yaml")
            assert (first.exit_code, f"applied {entries}\n" in first.output) == (0, True), first.output
            again = run(env, group, "apply", EXAMPLES / f"{group}.yaml")
            assert again.output.endswith(f"nothing to do: all {entries} entries are applied already\n"), again.output

    cards = [row for row in listed(env, "rates") if row["kind"] == "rate_card" and row["tenant"] == "acme"]
    assert [(row["per_gpu_hour"], row["start"], row["end"]) for row in cards] == [
        ("24.00", "2025-12-31T23:00:00Z", "2026-06-30T22:00:00Z"),
        ("22.75", "2026-06-30T22:00:00Z", None),
    ]
    (transfer,) = [row for row in listed(env, "capacity") if row["kind"] == "transfer"]
    assert (transfer["from_tenant"], transfer["to_tenant"], transfer["gpus"]) == ("acme", "nordlys", 128)
    rules = [(row["tenant"], row["match"], row["value"]) for row in listed(env, "tenants")]
    assert ("nordlys", "account", "vision") in rules


@pytest.mark.usefixtures("topics")
def test_a_correction_shows_before_and_after(env: dict[str, str], settings: ClickHouse, tmp_path: Path) -> None:
    file = tmp_path / "rates.yaml"
    with storing(env, settings):
        file.write_text(RATES)
        assert run(env, "rates", "apply", file).exit_code == 0
        file.write_text(RATES.replace('"2.50"', '"2.75"'))
        result = run(env, "rates", "apply", file)
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("changed")]
    assert line.split()[1:] == ["rate_card", "h100/*/2026-01-01T00:00:00Z", "per_gpu_hour", "2.50", "2.75"]
    assert [row["per_gpu_hour"] for row in listed(env, "rates")] == ["2.75"]


def insert(settings: ClickHouse, *facts: Placement | Commitment) -> None:
    client = connect(settings)
    stored = [StoredFact(fact, rank_of(fact), "inventory", 0, n, T0) for n, fact in enumerate(facts)]
    for table, rows in fact_rows(stored, []).items():
        client.insert_arrow(table, rows)
    client.close()


def test_a_file_is_held_to_the_pools_that_exist(env: dict[str, str], settings: ClickHouse, tmp_path: Path) -> None:
    insert(settings, Placement(id="x", revision=1, claimed_at_ms=T0, gpu="G", node="n", pool="h200", start_ms=T0))
    file = tmp_path / "rates.yaml"
    file.write_text(RATES)
    result = run(env, "rates", "apply", file, "--dry-run")
    assert result.exit_code == 2
    assert result.stderr == "error: rates.yaml: rate_cards[0].pool: there is no pool 'h100'; known: h200\n"
    assert run(env, "rates", "apply", file, "--dry-run", "--new-pools").exit_code == 0
    file.write_text("commitments:\n  - {pool: h1OO, tenant: a, gpus: 1, start: 2026-01-01T00:00Z}\n")
    result = run(env, "capacity", "apply", file, "--dry-run")
    assert result.stderr == "error: rates.yaml: commitments[0].pool: there is no pool 'h1OO'; known: h200\n"


@pytest.mark.usefixtures("topics")
def test_what_does_not_fit_what_holds_is_refused(env: dict[str, str], settings: ClickHouse, tmp_path: Path) -> None:
    file = tmp_path / "rates.yaml"
    with storing(env, settings):
        file.write_text(RATES)
        assert run(env, "rates", "apply", file).exit_code == 0
    file.write_text(RATES.replace("2026-01-01", "2026-07-01"))
    result = run(env, "rates", "apply", file)
    assert result.exit_code == 2
    assert result.stderr == (
        "error: rates.yaml: rate_cards[0].start: 2026-07-01T00:00Z is before the end (further notice) of applied rate "
        "card h100/*/2026-01-01T00:00:00Z for pool h100, everybody; end that one at 2026-07-01T00:00Z, or begin this "
        "one later\n"
    )
    file.write_text(RATES.replace("}", ", end: 2026-07-01T00:00Z}") + RATES.splitlines()[2].replace("01-01", "07-01"))
    assert run(env, "rates", "apply", file, "--dry-run").exit_code == 0


def test_wrong_files_are_named(env: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "rates.yaml"
    file.write_text(RATES.replace('"2.50"', "2.50"))
    result = run(env, "rates", "apply", file)
    assert (result.exit_code, result.stderr) == (
        2,
        'error: rates.yaml: rate_cards[0].per_gpu_hour: expected a decimal string, got 2.50; write "2.50"\n',
    )


def test_with_data_and_nothing_running_the_services_are_started_for_the_call(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    file = tmp_path / "rates.yaml"
    file.write_text(RATES)
    result = run({}, "rates", "apply", file, "--data", data)
    assert result.exit_code == 0, result.output
    assert "published 1; nothing runs here that stores them" in result.output
    assert run({}, "rates", "list", "--data", data, "--format", "json").output == "[\n]\n"
