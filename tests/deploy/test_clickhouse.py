"""ClickHouse as a server: the tables are plain, and the rights of the deployment's users suffice and no more.

The engine is the embedded one, which is the server's own; it runs with the rights and profiles of the users file.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from gpuledger.dashboards.boards import BOARDS
from gpuledger.dashboards.macros import TimeRange, expand
from gpuledger.schemas.migrate import migrate, migrations, statements, views
from tests.deploy.conftest import DEPLOY

ROOT = DEPLOY.parent
Statement = tuple[str, Mapping[str, object]]


def as_user(directory: Path, user: str, asked: Sequence[Statement]) -> list[str]:
    """ "ok" or the error of each statement."""
    lines = [json.dumps({"sql": sql, "parameters": {k: str(v) for k, v in given.items()}}) for sql, given in asked]
    done = subprocess.run(
        [sys.executable, "-m", "tests.deploy.clickhouse_as_user", str(directory), user],
        input="\n".join(lines) + "\n",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def migration_statements() -> list[Statement]:
    """What `gpuledger db migrate` runs on an empty server, in order."""
    said: list[Statement] = [("CREATE DATABASE IF NOT EXISTS gpuledger", {}), ("USE gpuledger", {})]

    def execute(sql: str, parameters: dict[str, object] | None = None, /) -> object:
        said.append((sql, parameters or {}))
        return None

    migrate(lambda sql: [], execute)
    return said


def panel_statements() -> list[Statement]:
    """Every query of every board, over the last hour."""
    now = datetime.now(UTC)
    hour = TimeRange(now - timedelta(hours=1), now)
    items = [item for board in BOARDS.values() for item in (*board.panels, *board.annotations)]
    return [("USE gpuledger", {}), *((expand(item.sql, hour), {}) for item in items)]


def failed(asked: Sequence[Statement], answers: Sequence[str]) -> list[tuple[str, str]]:
    assert len(answers) == len(asked)
    return [(sql[:80], answer) for (sql, _), answer in zip(asked, answers, strict=True) if answer != "ok"]


def test_tables_are_of_engines_that_every_server_has() -> None:
    """Nothing of the embedded engine alone, no Kafka engine, no replication that would tie the DDL to one cluster."""
    engines = {
        engine
        for migration in migrations()
        for statement in statements(migration.sql)
        for engine in re.findall(r"\bENGINE = (\w+)", statement)
    }
    assert engines == {"MergeTree", "ReplacingMergeTree", "AggregatingMergeTree"}
    for name, sql in views():
        for statement in statements(sql):
            assert statement.startswith("CREATE OR REPLACE VIEW v_"), f"{name}: {statement[:60]}"
            assert not re.search(r"\b(file|url|s3|remote|chdb)\s*\(|\bSETTINGS\b", statement), (
                f"{name}: {statement[:60]}"
            )


def test_an_acknowledged_block_is_on_disk() -> None:
    root = ElementTree.parse(DEPLOY / "clickhouse" / "config.d" / "gpuledger.xml").getroot()
    assert root.findtext("merge_tree/fsync_after_insert") == "1"
    assert root.findtext("merge_tree/fsync_part_directory") == "1"


def test_the_passwords_come_from_the_environment() -> None:
    root = ElementTree.parse(DEPLOY / "clickhouse" / "users.d" / "gpuledger.xml").getroot()
    compose = (DEPLOY / "compose.yaml").read_text(encoding="utf-8")
    for name, variable in (("gpuledger", "GPULEDGER_WRITER_SHA256"), ("grafana", "GPULEDGER_READER_SHA256")):
        password = root.find(f"users/{name}/password_sha256_hex")
        assert password is not None and password.get("from_env") == variable and not password.text
        assert f'{variable}="$$(sum ' in compose


@pytest.mark.services
def test_the_writers_rights_suffice_for_the_tables_and_the_readers_for_every_panel(
    tmp_path: Path,
) -> None:
    first = migration_statements()
    worker: list[Statement] = [
        (
            "INSERT INTO epochs (epoch, started_at, why) SELECT {epoch:UInt32}, now64(3), {why:String}",
            {"epoch": 1, "why": ""},
        ),
        ("ALTER TABLE progress DELETE WHERE topic = 'dirty' SETTINGS mutations_sync = 1", {}),
        ("SELECT getSetting('async_insert') = 0 OR throwIf(1, 'inserts are gathered')", {}),
    ]
    # Migrating again is what every start of a new version does.
    asked = [*first, *worker, *first, *panel_statements()]
    assert failed(asked, as_user(tmp_path, "gpuledger", asked)) == []

    panels = panel_statements()
    assert failed(panels, as_user(tmp_path, "grafana", panels)) == []


@pytest.mark.services
def test_nobody_can_do_more(tmp_path: Path) -> None:
    as_user(tmp_path, "gpuledger", migration_statements())
    beyond_writing: list[Statement] = [
        ("CREATE DATABASE elsewhere", {}),
        ("CREATE USER somebody", {}),
        ("SELECT * FROM file('/etc/passwd', 'LineAsString')", {}),
        ("SELECT * FROM url('http://127.0.0.1:1/', 'LineAsString')", {}),
        ("SYSTEM SHUTDOWN", {}),
    ]
    beyond_reading: list[Statement] = [
        ("INSERT INTO gpuledger.epochs SELECT 9, now64(3), ''", {}),
        ("ALTER TABLE gpuledger.epochs DELETE WHERE 1", {}),
        ("DROP TABLE gpuledger.epochs", {}),
        ("SET readonly = 0", {}),
        ("SET max_memory_usage = 100000000000", {}),
    ]
    for user, asked in (("gpuledger", beyond_writing), ("grafana", beyond_writing + beyond_reading)):
        answers = as_user(tmp_path, user, asked)
        refused = re.compile(r"Not enough privileges|in readonly mode|shouldn't be (greater|less) than|ACCESS_")
        wrong = [(sql, answer) for (sql, _), answer in zip(asked, answers, strict=True) if not refused.search(answer)]
        assert wrong == [], user
