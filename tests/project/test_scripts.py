"""What a stranger gets: locks whose every file has a sum, and scripts that name no machine and no mirror."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROLES = ("agent", "streams", "dashboards", "local", "test")
SCRIPTS = sorted(path for folder in ("scripts", ".ci") for path in (ROOT / folder).iterdir() if path.is_file())
LOCKS = [ROOT / "requirements" / f"{role}.txt" for role in ROLES]


def locked(role: str) -> dict[str, set[str]]:
    """Name to versions (more than one where they differ by Python or platform)."""
    text = (ROOT / "requirements" / f"{role}.txt").read_text(encoding="utf-8")
    found: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([a-z0-9][a-z0-9._-]*)==(\S+)", text, flags=re.MULTILINE):
        found.setdefault(name, set()).add(version)
    return found


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.stem)
def test_every_package_of_a_lock_has_a_sum(lock: Path) -> None:
    entries = re.split(r"\n(?=[a-z0-9])", lock.read_text(encoding="utf-8"))
    packages = [entry for entry in entries if not entry.startswith("#")]
    assert packages
    for entry in packages:
        assert re.match(r"[a-z0-9._-]+==\S+", entry), entry
        assert "--hash=sha256:" in entry, entry


@pytest.mark.parametrize("role", ROLES)
def test_a_lock_has_what_the_project_asks_for_and_what_builds_it(role: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = set(project["dependencies"])
    todo = [role]
    while todo:
        for requirement in extras[todo.pop()]:
            inner = re.fullmatch(r"gpuledger\[(\w+)\]", requirement)
            if inner:
                todo.append(inner[1])
            else:
                wanted.add(requirement)
    names = {re.split(r"[<>=\[]", requirement)[0].lower() for requirement in wanted} | {"hatchling", "editables"}
    assert names <= locked(role).keys()


@pytest.mark.parametrize("role", ROLES)
def test_all_roles_have_the_same_versions(role: str) -> None:
    tests = locked("test")
    assert {name: found for name, found in locked(role).items() if not found <= tests.get(name, set())} == {}


@pytest.mark.parametrize("path", [*SCRIPTS, *LOCKS], ids=lambda path: path.name)
def test_no_address_and_no_path_of_a_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert re.findall(r"(?:https?|ftp)://\S+", text) == []
    assert re.findall(r"(?<![\w.$}])/(?:work|root|home|opt|tmp)/\S*", text) == []
    assert "--index-url" not in text
    assert "--trusted-host" not in text


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_valid_and_can_be_run(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True, timeout=30)
    sourced = path.name in ("environment", "debian")
    assert bool(path.stat().st_mode & 0o100) is not sourced
    assert path.read_text(encoding="utf-8").startswith("#!/usr/bin/env bash\n") is not sourced


def environment(call: str, path: str) -> subprocess.CompletedProcess[str]:
    """A function of scripts/environment, run with nothing but `path` to find programs."""
    return subprocess.run(
        ["/bin/bash", "-c", f'set -euo pipefail; . "{ROOT}/scripts/environment"; {call}'],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env={"PATH": path},
        cwd="/",
    )


@pytest.fixture
def only_basics(tmp_path: Path) -> Path:
    """A folder of programs without any Python."""
    for name in ("dirname", "readlink", "sha256sum", "cut", "cat", "grep", "flock"):
        found = subprocess.run(["/bin/sh", "-c", f"command -v {name}"], capture_output=True, text=True, check=True)
        (tmp_path / name).symlink_to(found.stdout.strip())
    return tmp_path


def fake_python(folder: Path, version: str, has_venv: bool) -> None:
    program = folder / "python3"
    right = version in ("3.11", "3.12", "3.13")
    program.write_text(
        "#!/bin/sh\n"
        f'case "$2" in *version_info*) exit {0 if right else 1};; *ensurepip*) exit {0 if has_venv else 1};; esac\n'
        f'echo "Python {version}.0"\n'
    )
    program.chmod(0o755)


def test_a_missing_python_is_named_with_the_package(only_basics: Path) -> None:
    result = environment("find_python", str(only_basics))
    assert result.returncode == 2
    assert "needs Python 3.11, 3.12 or 3.13, found no python3" in result.stderr
    assert "apt-get install python3 python3-venv" in result.stderr


def test_an_old_python_is_named(only_basics: Path) -> None:
    fake_python(only_basics, "3.9", has_venv=True)
    result = environment("find_python", str(only_basics))
    assert result.returncode == 2
    assert "found Python 3.9.0" in result.stderr


def test_a_python_without_venv_is_named_with_the_package(only_basics: Path) -> None:
    fake_python(only_basics, "3.12", has_venv=False)
    result = environment("find_python", str(only_basics))
    assert result.returncode == 2
    assert "apt-get install python3-venv" in result.stderr


def test_a_fitting_python_is_found(only_basics: Path) -> None:
    fake_python(only_basics, "3.13", has_venv=True)
    result = environment("find_python", str(only_basics))
    assert (result.returncode, result.stdout.strip()) == (0, str(only_basics / "python3"))
