"""The systemd units: systemd itself reads them, every command line exists, and the sandbox does not get weaker."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.conftest import DEPLOY, check_command_line

UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
PROGRAM = "/opt/gpuledger/bin/gpuledger"


def settings(unit: Path) -> list[tuple[str, str, str]]:
    """(section, name, value) of every line, in order; a name may come again."""
    section = ""
    found: list[tuple[str, str, str]] = []
    for line in unit.read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        if header := re.fullmatch(r"\[(\w+)\]", line):
            section = header[1]
            continue
        name, equals, value = line.partition("=")
        assert equals and section, f"{unit.name}: cannot be read: {line!r}"
        found.append((section, name, value))
    return found


def values(unit: Path, name: str) -> list[str]:
    return [value for _, key, value in settings(unit) if key == name]


def analyze() -> str:
    found = shutil.which("systemd-analyze")
    if found is None:
        pytest.skip("systemd-analyze is not installed (Debian: apt-get install systemd)")
    return found


def test_there_is_a_unit_for_each_process() -> None:
    assert [unit.stem for unit in UNITS] == ["gpuledger-agent", "gpuledger-page", "gpuledger-worker"]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_systemd_reads_the_unit_without_a_complaint(unit: Path, tmp_path: Path) -> None:
    program = analyze()
    # Programs must be where a unit says; here that is this environment.
    python = Path(sys.executable)
    text = unit.read_text(encoding="utf-8").replace(PROGRAM, str(python.with_name("gpuledger")))
    copy = tmp_path / unit.name
    copy.write_text(text, encoding="utf-8")
    done = subprocess.run(
        [program, "verify", "--man=no", str(copy)], capture_output=True, text=True, timeout=60, check=False
    )
    # It complains of this machine's other units too.
    complaints = [line for line in (done.stdout + done.stderr).splitlines() if unit.stem in line]
    assert (done.returncode, complaints) == (0, [])


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_the_sandbox_is_as_tight_as_it_was(unit: Path) -> None:
    program = analyze()
    arguments = [program, "security", "--offline=true", "--threshold=25", str(unit)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    if "unrecognized option" in done.stderr:
        pytest.skip("this systemd-analyze cannot judge files: it is older than 250")
    # The exposure level is ten times smaller than the threshold's scale: 2.5 of 10 at most.
    assert done.returncode == 0, done.stdout[-300:] + done.stderr


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_every_command_line_is_one_that_the_program_takes(unit: Path) -> None:
    commands = values(unit, "ExecStart") + values(unit, "ExecStartPre")
    assert commands
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == PROGRAM
        assert arguments[:2] == ["--config", "/etc/gpuledger/config.yaml"]
        check_command_line(arguments)


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_a_unit_drops_rights_is_bounded_and_comes_again(unit: Path) -> None:
    assert values(unit, "User")[0].startswith("gpuledger")
    assert values(unit, "NoNewPrivileges") == ["yes"]
    assert values(unit, "CapabilityBoundingSet") == [""]
    assert values(unit, "MemoryMax")
    assert values(unit, "Restart") == ["always"]
    # The programs drain for less than ten seconds.
    assert int(values(unit, "TimeoutStopSec")[0]) >= 10
    # The minus: a loopback installation has no secrets.
    assert values(unit, "EnvironmentFile")[0].startswith("-/etc/gpuledger/")


def test_no_unit_holds_a_secret() -> None:
    for unit in UNITS:
        assert not re.search(r"^Environment=.*(PASSWORD|SECRET)", unit.read_text(encoding="utf-8"), re.MULTILINE)
