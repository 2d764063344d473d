"""The environment of the peers: made once, beside the project's own and never part of its locks."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

__all__ = ["peers_environment"]

_PINS = Path(__file__).with_name("peers.txt")
#: The work itself must run on the same numpy and pyarrow on both sides.
_SAME = ("numpy", "pyarrow")


def _default_directory(name: str) -> Path:
    cache = os.environ.get("GPULEDGER_CACHE_DIR") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "gpuledger"
    return Path(cache).expanduser() / "benchmarks" / name


def peers_environment(directory: Path | None = None, install: bool = True) -> Path | None:
    """The Python of the peers' environment, made where it is missing; None where it is and `install` is False.

    Raises subprocess.CalledProcessError where it cannot be made.
    """
    wanted = [line for line in _PINS.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    wanted += [f"{name}=={version(name)}" for name in _SAME]
    digest = hashlib.sha256("\n".join([*wanted, sys.version]).encode()).hexdigest()[:12]
    place = directory or _default_directory(f"peers-{digest}")
    python, done = place / "bin" / "python", place / f"complete-{digest}"
    if done.exists():
        return python
    if not install:
        return None
    print(f"installing the peers in {place}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(place)], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", *wanted], check=True)
    done.touch()
    return python
