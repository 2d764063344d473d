"""How commands reach ClickHouse, and what they say when they do not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from gpuledger.cli.database import RUN_FILE_NAME, database, read_running
from gpuledger.cli.exceptions import CommandError, DatabaseError
from gpuledger.cli.main import cli
from gpuledger.cli.session import Session
from gpuledger.local.ports import free_port


def write_run_file(data: Path, pid: int, port: int) -> None:
    run = {
        "pid": pid,
        "clickhouse_url": f"http://127.0.0.1:{port}",
        "kafka_bootstrap": "127.0.0.1:9092",
        "page_url": "http://127.0.0.1:8470",
    }
    (data / RUN_FILE_NAME).write_text(json.dumps(run))


def ended_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_server_that_is_not_there_is_named() -> None:
    port = free_port()
    result = CliRunner().invoke(cli, ["db", "status"], env={"GPULEDGER_CLICKHOUSE__URL": f"http://127.0.0.1:{port}"})
    assert result.exit_code == 2
    assert result.stderr == (
        f"error: clickhouse.url: cannot use http://127.0.0.1:{port}: connection refused; "
        "is the server running, and is the address right?\n"
    )


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["db", "status", "--data", str(tmp_path / "absent")])
    assert result.exit_code == 2
    assert "--data: there is no directory" in result.stderr
    assert "gpuledger up --data" in result.stderr


def test_a_running_up_is_used(tmp_path: Path) -> None:
    port = free_port()
    write_run_file(tmp_path, os.getpid(), port)
    with pytest.raises(DatabaseError, match=f"cannot use http://127.0.0.1:{port}"), database(Session(), tmp_path):
        pass


def test_the_file_of_a_killed_up_says_nothing(tmp_path: Path) -> None:
    write_run_file(tmp_path, ended_pid(), free_port())
    assert read_running(tmp_path) is None


def test_a_broken_run_file_is_named(tmp_path: Path) -> None:
    (tmp_path / RUN_FILE_NAME).write_text("{")
    with pytest.raises(CommandError, match=r"run\.json: cannot be read: "):
        read_running(tmp_path)


@pytest.mark.services
def test_db_migrate_brings_the_embedded_engine_up_to_date(tmp_path: Path) -> None:
    """In processes of their own, as a user runs them: each opens the engine on the directory and lets it go."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        code = "from gpuledger.cli.main import main; main()"
        command = [sys.executable, "-c", code, *arguments, "--data", str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    before = run("db", "status")
    assert before.returncode == 1
    assert "gpuledger db migrate" in before.stderr

    first = run("db", "migrate")
    assert first.returncode == 0, first.stderr
    assert "applied 0001_" in first.stdout

    again = run("db", "migrate")
    assert again.returncode == 0, again.stderr
    assert "applied" not in again.stdout

    after = run("db", "status", "--format", "json")
    assert after.returncode == 0, after.stderr
    assert {row["state"] for row in json.loads(after.stdout)} == {"applied"}
