"""The tests of apportion, fragments and recompute notice at least 90 % of a fixed sample of wrong versions of them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MUTANTS, SEED = 60, 4


@pytest.mark.timeout(600)
def test_the_tests_notice_wrong_versions() -> None:
    command = [
        sys.executable,
        "-m",
        "tests.mutation",
        "--sample",
        str(MUTANTS),
        "--seed",
        str(SEED),
        "--processes",
        "1",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr)
    assert done.returncode == 0, done.stdout + done.stderr
    total = re.search(r"^all +(\d+) +(\d+) ", done.stdout, flags=re.MULTILINE)
    assert total is not None
    assert int(total[1]) == MUTANTS
    # None is called equivalent here, and each of the three modules has its part.
    assert int(total[2]) >= 0.9 * MUTANTS
    assert all(
        re.search(rf"^{name} +\d", done.stdout, flags=re.MULTILINE) for name in ("apportion", "fragments", "recompute")
    )
