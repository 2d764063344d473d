"""The benchmarks that people run by hand still run: tiny sizes, and no word about how fast they are."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> dict[str, Any]:
    """The JSON of a benchmark's last line."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.services
def test_the_hot_path_reads_every_message_both_ways() -> None:
    """Peers that are not installed are skipped, as they are in CI."""
    size = ("--messages", "80", "--flushes", "4", "--runs", "1")
    told = run("benchmarks/hot_path", *size, "--no-install", "--peers", "no-such-directory")
    assert (told["benchmark"], told["messages"]) == ("hot_path", 80)
    ours, whole = told["consumers"]
    assert ours["consumer"].startswith("GPULedger") and whole["ratio"] > 0
    assert ours["samples_per_s"] > 0 and whole["samples_per_s"] > 0


@pytest.mark.services
def test_a_small_fleet_is_sent_looked_at_and_judged() -> None:
    told = run("benchmarks/fleet.py", "--gpus", "80", "--pools", "2", "--warm", "3", "--seconds", "12")
    assert (told["benchmark"], told["gpus"], told["pools"]) == ("fleet", 80, 2)
    assert set(told["verdict"]) >= {"lag flat", "memory flat", "ledger right"}
    assert told["cpu_cores"]["worker"] > 0 and told["rss_mib"]["clickhouse"] > 0
