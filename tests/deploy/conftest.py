"""What the deployment tests share: where the files are, and whether a command line is one that `gpuledger` takes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["DEPLOY", "check_command_line"]

DEPLOY = Path(__file__).parents[2] / "deploy"


def check_command_line(arguments: Sequence[str]) -> None:
    """Has the installed program parse the arguments after ``gpuledger``. ``--help`` comes last, so nothing is run, but
    an unknown command or option is an error all the same.
    """
    done = subprocess.run(
        [sys.executable, "-m", "gpuledger.cli", *arguments, "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, f"gpuledger {' '.join(arguments)}: {done.stderr.strip()}"
    assert done.stdout.startswith("Usage: ")
