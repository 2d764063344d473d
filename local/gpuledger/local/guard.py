"""Starts processes that do not outlive this one, however it ends: kill -9 included.

The kernel sends SIGKILL to them when their parent dies (PR_SET_PDEATHSIG), so no watchdog can be killed first.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from typing import IO

__all__ = ["spawn"]

# Runs between fork and exec as a process of its own: code run in the forked copy of a threaded process can deadlock.
# The parent may have died before prctl was called, so its pid is compared afterwards; Python ignores SIGPIPE and
# SIGXFSZ, which the program to be started must not inherit.
_SHIM = """
import ctypes, os, signal, sys
if ctypes.CDLL(None, use_errno=True).prctl(1, int(signal.SIGKILL), 0, 0, 0):
    sys.exit("cannot tie this process to its parent: " + os.strerror(ctypes.get_errno()))
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
try:
    os.execvp(sys.argv[2], sys.argv[2:])
except OSError as error:
    sys.exit(f"cannot run {sys.argv[2]}: {error.strerror}")
"""


class _Spawner:
    """One thread that lives as long as the process and does every fork.

    To the kernel a child's parent is the *thread* that forked it: children started from a thread that ends, such as
    one of an executor, would be killed with that thread.
    """

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._requests: SimpleQueue[tuple[Callable[[], subprocess.Popen[bytes]], Future[subprocess.Popen[bytes]]]] = (
            SimpleQueue()
        )
        threading.Thread(target=self._serve, name="spawner", daemon=True).start()

    def call(self, start: Callable[[], subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
        future: Future[subprocess.Popen[bytes]] = Future()
        self._requests.put((start, future))
        return future.result()

    def _serve(self) -> None:
        while True:
            start, future = self._requests.get()
            try:
                future.set_result(start())
            except BaseException as error:  # whoever waits must get it, whatever it is
                future.set_exception(error)


_spawner: _Spawner | None = None
_spawner_lock = threading.Lock()


def spawn(
    argv: Sequence[str],
    *,
    output: IO[bytes] | int,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> subprocess.Popen[bytes]:
    """Starts `argv` in a session of its own, without standard input; stdout and stderr go to `output`.

    Its own session keeps a Ctrl-C at the terminal from reaching it: its parent decides the order of stopping. `env`
    None inherits ours. A program that cannot be run ends with status 1 and says why in `output`.
    """
    global _spawner
    with _spawner_lock:
        # A forked copy of this process has the object but not its thread.
        if _spawner is None or _spawner.pid != os.getpid():
            _spawner = _Spawner()
        spawner = _spawner
    command = [sys.executable, "-I", "-S", "-c", _SHIM, str(os.getpid()), *argv]
    return spawner.call(
        lambda: subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=None if env is None else dict(env),
            cwd=cwd,
            start_new_session=True,
        )
    )
