"""A driver at the ABI, built by the tests that need one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


def build_driver(folder: Path) -> Path:
    """The folder that holds a fresh ``libnvidia-ml.so.1``; skips where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler: the driver at the ABI cannot be built")
    source = Path(__file__).with_name("nvml.c")
    command = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", str(folder / "libnvidia-ml.so.1"), source]
    subprocess.run(command, check=True)
    return folder
