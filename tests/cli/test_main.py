"""The command's skeleton: every command is listed whatever is installed, and an error is one line that helps."""

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from gpuledger.cli.main import COMMANDS, cli
from gpuledger.schemas.exceptions import GPULedgerError

#: What a node agent's machine has not got. A finder that refuses them stands for their absence.
BLOCKED = """
import sys

class Absent:
    names = {names!r}
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
from gpuledger.cli.main import main
sys.argv = ["gpuledger", *{arguments!r}]
try:
    main()
finally:
    print("IMPORTED", *sorted(m for m in sys.modules if m in {watched!r}))
"""
HEAVY = (
    "faust",
    "chdb",
    "pyarrow",
    "numpy",
    "clickhouse_connect",
    "grafanalib",
    "rich",
    "aiokafka",
    "starlette",
    "jgo",
)


def run_without(names: tuple[str, ...], *arguments: str) -> subprocess.CompletedProcess[str]:
    code = BLOCKED.format(names=set(names), arguments=arguments, watched=set(HEAVY))
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False, env={"PATH": "/usr/bin"}
    )


def test_help_lists_every_command_without_any_extra() -> None:
    result = run_without(HEAVY, "--help")
    assert result.returncode == 0, result.stderr
    for name, entry in COMMANDS.items():
        assert f"  {name} " in result.stdout
        assert entry.help in result.stdout


def test_help_imports_nothing_heavy() -> None:
    result = run_without((), "--help")
    assert result.stdout.splitlines()[-1] == "IMPORTED", result.stdout


def test_config_needs_no_extra() -> None:
    result = run_without(HEAVY, "config", "check")
    assert result.returncode == 0, result.stderr
    assert "ok:" in result.stdout


def test_a_missing_extra_is_named_with_what_to_install() -> None:
    result = run_without(("clickhouse_connect",), "db", "status")
    assert result.returncode == 2
    assert result.stderr == (
        "error: gpuledger db: the Python module clickhouse_connect is not installed; "
        "run: pip install 'gpuledger[streams]'\n"
    )


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_listed_command_is_there(name: str) -> None:
    result = CliRunner().invoke(cli, [name, "--help"])
    assert result.exit_code == 0, result.output
    assert "Usage: " in result.output


def test_every_extra_is_one_of_the_project() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    extras = {*project["project"]["optional-dependencies"], ""}
    assert {entry.extra for entry in COMMANDS.values()} <= extras


def test_an_unknown_command_gets_a_guess() -> None:
    result = CliRunner().invoke(cli, ["stats"])
    assert result.exit_code == 2
    assert "Did you mean status?" in result.stderr


def test_an_error_is_one_line_and_exit_status_2(tmp_path: Path) -> None:
    file = tmp_path / "gpuledger.yaml"
    file.write_text("clickhouse: {url: localhost}\n")
    result = CliRunner().invoke(cli, ["--config", str(file), "config", "check"])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr == (
        'error: clickhouse.url: expected http(s)://host:port, got "localhost"; write "http://127.0.0.1:8123"\n'
    )


def test_debug_shows_where_an_error_came_from(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["--debug", "--config", str(tmp_path / "absent"), "config", "check"])
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: --config: cannot read")


def test_the_errors_of_the_embedded_services_are_ours() -> None:
    from gpuledger.local.exceptions import LocalError

    assert issubclass(LocalError, GPULedgerError)


def test_the_file_may_be_named_by_a_variable(tmp_path: Path) -> None:
    file = tmp_path / "gpuledger.yaml"
    file.write_text("page: {title: Ours}\n")
    result = CliRunner().invoke(cli, ["config", "show"], env={"GPULEDGER_CONFIG": str(file)})
    assert result.exit_code == 0, result.output
    assert "title: Ours" in result.stdout


def test_show_masks_secrets_and_reads_back() -> None:
    import json

    import yaml

    environ = {"GPULEDGER_CLICKHOUSE__PASSWORD": "hush-hush"}
    as_json = CliRunner().invoke(cli, ["config", "show", "--format", "json"], env=environ)
    as_yaml = CliRunner().invoke(cli, ["config", "show"], env=environ)
    assert "hush" not in as_json.output + as_yaml.output
    shown = json.loads(as_json.stdout)
    assert shown["clickhouse"]["password"] == "***"
    assert yaml.safe_load(as_yaml.stdout) == shown


def test_defaults_explain_every_setting() -> None:
    result = CliRunner().invoke(cli, ["config", "show", "--defaults"])
    assert result.exit_code == 0
    assert "- setting: ledger.price_interval_minutes" in result.stdout


def test_the_log_level_of_the_command_line_wins() -> None:
    result = CliRunner().invoke(cli, ["--log-level", "debug", "config", "show"], env={"GPULEDGER_LOG__LEVEL": "error"})
    assert "level: debug" in result.stdout


def test_the_version_is_the_distribution_s() -> None:
    from importlib.metadata import version

    result = CliRunner().invoke(cli, ["--version"])
    assert result.stdout.strip().endswith(version("gpuledger"))
