"""One process at a time per data directory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpuledger.local.exceptions import DirectoryInUse
from gpuledger.local.lock import DirectoryLock

HOLD = """
import sys
from pathlib import Path
from gpuledger.local.lock import DirectoryLock
DirectoryLock(Path(sys.argv[1]), "engine").acquire()
print("held", flush=True)
sys.stdin.read()
"""


def hold_elsewhere(directory: Path) -> subprocess.Popen[str]:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def test_the_error_names_directory_holder_and_service(tmp_path: Path) -> None:
    with hold_elsewhere(tmp_path) as holder:
        with pytest.raises(DirectoryInUse) as caught:
            DirectoryLock(tmp_path, "engine").acquire()
        holder.kill()
    assert caught.value.pid == holder.pid
    assert str(caught.value).startswith(f"engine: {tmp_path} is in use by process {holder.pid};")


def test_a_killed_holder_frees_the_directory(tmp_path: Path) -> None:
    with hold_elsewhere(tmp_path) as holder:
        holder.kill()
        holder.wait()
    with DirectoryLock(tmp_path, "engine") as lock:
        assert lock.held
        # The pid on disk is ours again, not the dead one's.
        with pytest.raises(DirectoryInUse) as caught:
            DirectoryLock(tmp_path, "engine").acquire()
    assert caught.value.pid == os.getpid()


def test_released_and_taken_again(tmp_path: Path) -> None:
    lock = DirectoryLock(tmp_path / "new" / "directory", "engine")
    lock.acquire()
    lock.acquire()
    lock.release()
    lock.release()
    assert not lock.held
    with DirectoryLock(lock.path, "engine"):
        pass


def test_a_child_process_does_not_keep_the_lock(tmp_path: Path) -> None:
    with DirectoryLock(tmp_path, "engine"):
        child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    try:
        DirectoryLock(tmp_path, "engine").acquire()
    finally:
        child.kill()
        child.wait()
