"""The fault suite itself, as CI runs it: 20 kills of one seed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.pipeline import REPOSITORY, plain_environment

pytestmark = pytest.mark.services

_TIMEOUT_S = 840


@pytest.mark.timeout(_TIMEOUT_S + 30)
def test_twenty_kills_change_nothing(tmp_path: Path) -> None:
    # Its own process: it mounts small disks, and ends whatever it has started with itself.
    command = [sys.executable, "-m", "tests.faults", "--kills", "20", "--seed", "1", "--limit-s", "600"]
    done = subprocess.run(
        [*command, "--keep", str(tmp_path / "run")],
        cwd=REPOSITORY,
        env=plain_environment(),
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-4000:]}"
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["identical"]
    assert report["kills"] == 20
    assert report["gpus"] == 2000
    assert {fault["victim"] for fault in report["faults"]} == {"agent", "broker", "worker", "clickhouse"}
    assert sum(fault["place"] != "any moment" for fault in report["faults"]) == 10
    assert report["disturbed"]["resent"] > 0
    for side in (report["undisturbed"], report["disturbed"]):
        assert side["audit"]["balanced"]
        assert side["missing"] == side["dead_letters"] == 0
        assert int(side["observed_us"]) * 10 > int(side["held_us"]) * 9
