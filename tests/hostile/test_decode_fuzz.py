"""Twenty thousand attacks on the decoding of every topic, in a process of their own: a crash would end it."""

import json
import subprocess
import sys

from tests.e2e.pipeline import REPOSITORY

ATTACKS = 20_000


def test_nothing_but_a_reason_comes_of_an_attack() -> None:
    argv = [sys.executable, "-m", "tests.hostile.decode_fuzz", str(ATTACKS), "20261124"]
    done = subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3_000:]
    seen = json.loads(done.stdout)
    assert seen["attacks"] == ATTACKS and seen["kinds"] > 150
    # Chance makes a valid message now and then; a fuzzer whose messages are mostly valid would prove nothing.
    assert seen["valid_by_chance"] < ATTACKS // 20
    assert seen["peak_mib"] - seen["peak_mib_of_first_quarter"] < 150
