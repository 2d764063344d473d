"""Children start in order, die with their parent, and stop in time."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from gpuledger.local.children import Child, ChildSpec, Supervisor, read_tail
from gpuledger.local.exceptions import ServiceFailed, StartCancelled
from gpuledger.local.guard import spawn
from tests.local.processes import ProcessHandle

# Says when it is there and when it was asked to end.
POLITE = """
import signal, sys, time
def end(number, frame):
    open(sys.argv[1], "a").write(sys.argv[2] + " ")
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
print("up", flush=True)
while True: signal.pause()
"""
STUBBORN = """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("up", flush=True)
while True: signal.pause()
"""
PARENT = """
import subprocess, sys, threading
from gpuledger.local.guard import spawn
children = []
def start():
    children.append(spawn([sys.executable, "-c", sys.argv[1]], output=subprocess.DEVNULL))
thread = threading.Thread(target=start)
thread.start()
thread.join()
print(children[0].pid, flush=True)
sys.stdin.read()
"""


def python_child(tmp_path: Path, name: str, code: str, *arguments: str, ready_timeout_s: float = 20.0) -> Child:
    log_file = tmp_path / f"{name}.log"
    return Child(
        ChildSpec(
            name=name,
            argv=[sys.executable, "-c", code, *arguments],
            log_file=log_file,
            ready=lambda: "up" in read_tail(log_file),
            ready_timeout_s=ready_timeout_s,
        )
    )


def test_killing_the_parent_ends_even_a_stubborn_child() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, STUBBORN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    with ProcessHandle(int(parent.stdout.readline())) as child:
        # The thread that asked for the child is over; the child is not.
        assert not child.ended(within_s=0.5)
        parent.kill()
        assert child.ended(within_s=10)
    parent.communicate()


def test_a_program_that_cannot_be_run_says_so(tmp_path: Path) -> None:
    child = Child(ChildSpec("ghost", ["/no/such/program"], tmp_path / "ghost.log", ready=lambda: False))
    with pytest.raises(ServiceFailed, match="ghost: ended with status 1 before it was ready") as caught:
        child.start()
    assert "cannot run /no/such/program: No such file or directory" in caught.value.log_tail


def test_a_child_gets_default_signals_and_its_own_session(tmp_path: Path) -> None:
    code = "import os; print(open('/proc/self/status').read()); print('session', os.getsid(0) == os.getpid())"
    with (tmp_path / "out").open("wb") as output:
        # Through cat, as Python itself ignores SIGPIPE again.
        status = spawn(["cat", "/proc/self/status"], output=output).wait()
        spawn([sys.executable, "-c", code], output=output).wait()
    text = (tmp_path / "out").read_text()
    ignored = next(line for line in text.splitlines() if line.startswith("SigIgn:"))
    assert status == 0
    assert int(ignored.split()[1], 16) & (1 << (signal.SIGPIPE - 1)) == 0
    assert "session True" in text


def test_stopped_in_reverse_order(tmp_path: Path) -> None:
    order = tmp_path / "order"
    with Supervisor() as supervisor:
        for name in ("first", "second", "third"):
            supervisor.start(python_child(tmp_path, name, POLITE, str(order), name))
    assert order.read_text() == "third second first "


def test_stubborn_children_are_killed_and_the_polite_one_still_gets_its_turn(tmp_path: Path) -> None:
    order = tmp_path / "order"
    with Supervisor(stop_timeout_s=4) as supervisor:
        polite = python_child(tmp_path, "polite", POLITE, str(order), "polite")
        stubborn = python_child(tmp_path, "stubborn", STUBBORN)
        supervisor.start(polite)
        supervisor.start(stubborn)
    assert stubborn.poll() == -signal.SIGKILL
    assert polite.poll() == 0
    assert order.read_text() == "polite "


def test_the_one_that_dies_is_named_with_its_last_words(tmp_path: Path) -> None:
    failing = "import sys; print('up', flush=True); sys.stdin.read(); print('the disk is full'); sys.exit(3)"
    with Supervisor(stop_timeout_s=1) as supervisor:
        supervisor.start(python_child(tmp_path, "well", STUBBORN))
        with pytest.raises(ServiceFailed, match="worker: ended with status 3; its log is") as caught:
            supervisor.start(python_child(tmp_path, "worker", failing))
            supervisor.wait(20)
    assert caught.value.what == "worker"
    assert caught.value.log_tail.endswith("the disk is full")


def test_not_ready_in_time_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    code = "import time; print('waiting for godot', flush=True); time.sleep(60)"
    child = python_child(tmp_path, "slow", code, ready_timeout_s=1.0)
    with pytest.raises(ServiceFailed, match=r"slow: not ready after 1 s.*") as caught:
        child.start()
    assert caught.value.log_tail == "waiting for godot"
    assert child.poll() == -signal.SIGKILL


@pytest.mark.timeout(60)
def test_wait_ends_with_the_time_or_the_signal(tmp_path: Path) -> None:
    with Supervisor(stop_timeout_s=3600) as supervisor:
        supervisor.start(python_child(tmp_path, "well", STUBBORN))
        assert supervisor.wait(0.1) is None
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        assert supervisor.wait(20) is signal.SIGTERM
        with pytest.raises(StartCancelled):
            supervisor.start(python_child(tmp_path, "late", STUBBORN))
        # A second signal ends the stubborn one without waiting for the hour.
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        supervisor.stop()


def test_a_signal_cancels_a_start(tmp_path: Path) -> None:
    with Supervisor() as supervisor:
        child = python_child(tmp_path, "slow", "import time; time.sleep(60)")
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(StartCancelled):
            supervisor.start(child)
    assert child.poll() == -signal.SIGKILL


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Supervisor():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_the_log_of_the_previous_run_is_kept(tmp_path: Path) -> None:
    child = python_child(tmp_path, "again", "import os, signal; print(f'up {os.getpid()}', flush=True); signal.pause()")
    pids: list[int] = []
    for _ in range(2):
        child.start()
        pids.append(child.pid)
        child.stop()
    assert read_tail(tmp_path / "again.log.1") == f"up {pids[0]}"
    assert read_tail(tmp_path / "again.log") == f"up {pids[1]}"
