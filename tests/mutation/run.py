"""Runs the tests of a module against its mutants: each in a process forked from one in which pytest has collected the
tests, with the mutated text put in place of the loaded module. The files are never touched.

So a mutant costs little more than the first test that notices it. Limits are in CPU seconds, so that a busy machine
decides nothing.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import resource
import select
import signal
import sys
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import hypothesis
import pytest

from tests.mutation.operators import Mutant, apply, difference, mutants

__all__ = ["TARGETS", "BaselineError", "Outcome", "Target", "candidates", "run"]

ROOT = Path(__file__).parents[2]
#: A mutant may use this many times the CPU seconds of the unchanged module, and this many more: one that asks for
#: more never ends.
_CPU_FACTOR, _CPU_EXTRA_S = 3, 10
#: A mutant that waits for ever uses no CPU.
_WALL_FACTOR, _WALL_EXTRA_S = 20, 120
#: A mutant may ask for an array of any size; the machine belongs to others too.
_MAX_MEMORY_BYTES = 8 << 30


class BaselineError(RuntimeError):
    """The tests fail without a mutation: nothing can be said about mutants."""


@dataclass(frozen=True, slots=True)
class Target:
    """A module, its file below the root, and the test files that must hold it, the quick ones first."""

    name: str
    module: str
    path: str
    tests: tuple[str, ...]

    @property
    def source(self) -> str:
        return (ROOT / self.path).read_text(encoding="utf-8")


TARGETS = (
    Target(
        "apportion",
        "gpuledger.finance.apportion",
        "finance/gpuledger/finance/apportion.py",
        ("tests/finance/test_apportion.py",),
    ),
    Target(
        "fragments",
        "gpuledger.streams.fragments",
        "streams/gpuledger/streams/fragments.py",
        ("tests/streams/test_fragments.py",),
    ),
    Target(
        "recompute",
        "gpuledger.streams.recompute",
        "streams/gpuledger/streams/recompute.py",
        ("tests/streams/test_recompute.py",),
    ),
)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A mutant of a target, and the lines that it changes."""

    target: Target
    mutant: Mutant
    was: str
    becomes: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """`killed_by`: the first test that failed, or how the process ended; empty where all tests passed."""

    candidate: Candidate
    killed_by: str


def candidates(targets: Sequence[Target]) -> list[Candidate]:
    """All mutants of these modules."""
    found: list[Candidate] = []
    for target in targets:
        source = target.source
        found += [Candidate(target, mutant, *difference(source, mutant)) for mutant in mutants(source)]
    return found


# ------------------------------------------------------------------------------------------- in the child


def _replace(module: types.ModuleType, source: str, path: str) -> None:
    """Gives a loaded module another text, in this process: itself, and what other modules have imported from it."""
    before = {name: value for name, value in vars(module).items() if not name.startswith("__")}
    for name in before:
        delattr(module, name)
    exec(compile(source, path, "exec"), vars(module))  # noqa: S102 (our own source with one change)
    for other in list(sys.modules.values()):
        if other is module or other.__name__.partition(".")[0] not in ("gpuledger", "tests"):
            continue
        for name, value in list(vars(other).items()):
            if name in before and value is before[name]:
                setattr(other, name, getattr(module, name))


def _child(session: pytest.Session, target: Target, source: str, cpu_s: int, pipe: int) -> None:
    """Runs the tests, writes the name of the first that failed to the pipe, and ends the process."""
    status = 1
    try:
        silent = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(silent, descriptor)
        if cpu_s:
            resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))
        resource.setrlimit(resource.RLIMIT_AS, (_MAX_MEMORY_BYTES, _MAX_MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.write(pipe, _first_failure(session, target, source).encode()[:2000])
        status = 0
    finally:
        os._exit(status)


def _first_failure(session: pytest.Session, target: Target, source: str) -> str:
    """What failed first, empty when all passed."""
    try:
        _replace(sys.modules[target.module], source, target.path)
    except Exception as error:
        return f"import: {error!r}"
    reports = _Reports()
    session.config.pluginmanager.register(reports)
    # Examples before properties, which cost more.
    items = sorted(session.items, key=lambda item: getattr(getattr(item, "obj", None), "is_hypothesis_test", False))
    for item in items:
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
        if reports.failed:
            return reports.failed
    return ""


class _Reports:
    """A pytest plugin that remembers what failed first."""

    failed = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed = self.failed or report.nodeid


# ------------------------------------------------------------------------------------------- in the parent


@dataclass(slots=True)
class _Running:
    pid: int
    pipe: int
    until: float
    candidate: Candidate | None
    said: bytes = field(default=b"")


def _end(child: _Running) -> str:
    """Reaps a child that has closed its pipe, or ends one that is out of time. What killed it."""
    late = time.monotonic() >= child.until
    if late:
        os.kill(child.pid, signal.SIGKILL)
    _, status = os.waitpid(child.pid, 0)
    os.close(child.pipe)
    if late:
        return "out of time"
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return "out of CPU time" if number in (signal.SIGXCPU, signal.SIGKILL) else signal.Signals(number).name
    return child.said.decode() or ("the process failed" if os.WEXITSTATUS(status) else "")


def _wait(children: list[_Running]) -> tuple[_Running, str]:
    """The first child that ends, taken out of the list."""
    while True:
        wait = max(0.0, min(child.until for child in children) - time.monotonic())
        ready, _, _ = select.select([child.pipe for child in children], [], [], wait)
        for child in list(children):
            done = time.monotonic() >= child.until
            if child.pipe in ready:
                more = os.read(child.pipe, 4096)
                child.said += more
                done |= not more
            if done:
                children.remove(child)
                return child, _end(child)


class _Loop:
    """A pytest plugin that, instead of the collected tests, runs them once for each mutant, in forked processes."""

    def __init__(self, target: Target, chosen: Sequence[Candidate], processes: int) -> None:
        self.target, self.chosen, self.processes = target, chosen, processes
        self.source = target.source
        self.error = "pytest collected nothing"
        self.tell: Callable[[Outcome], None] = lambda _: None

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.testsfailed or not session.items:
            return True
        cpu_s, failed = self._baseline(session)
        self.error = failed and f"the tests fail without a mutation: {failed}"
        if failed:
            return True
        limits = int(cpu_s * _CPU_FACTOR) + _CPU_EXTRA_S, cpu_s * _WALL_FACTOR + _WALL_EXTRA_S
        children: list[_Running] = []
        for candidate in self.chosen:
            if len(children) == self.processes:
                self._reap(children)
            children.append(self._start(session, candidate, *limits))
        while children:
            self._reap(children)
        return True

    def _baseline(self, session: pytest.Session) -> tuple[float, str]:
        """CPU seconds of the unchanged module's tests, and which failed."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        _, failed = _wait([self._start(session, None, 0, 600)])
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, failed

    def _reap(self, children: list[_Running]) -> None:
        child, killed_by = _wait(children)
        assert child.candidate is not None
        self.tell(Outcome(child.candidate, killed_by))

    def _start(self, session: pytest.Session, candidate: Candidate | None, cpu_s: int, wall_s: float) -> _Running:
        source = self.source if candidate is None else apply(self.source, candidate.mutant)
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            _child(session, self.target, source, cpu_s, writing)
        os.close(writing)
        return _Running(pid, reading, time.monotonic() + wall_s, candidate)


def run(chosen: Sequence[Candidate], processes: int, tell: Callable[[Outcome], None]) -> None:
    """Tells the outcome of every mutant, as they end; `processes` at a time.

    Raises:
        BaselineError: the tests of a module cannot be collected, or fail without a mutation.
    """
    os.chdir(ROOT)
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    with contextlib.suppress(ImportError):
        importlib.import_module("pandas")  # pyarrow loads it when it is first used, where it is installed
    # The same examples every time, no search for a smaller one: only whether a test fails is asked.
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    hypothesis.settings.register_profile("mutation", derandomize=True, database=None, phases=phases)
    hypothesis.settings.load_profile("mutation")
    # No plugins, no fixtures of the project, nothing written: a test that needs more does not belong here.
    arguments = [
        "-s",
        "--noconftest",
        "--assert=plain",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:terminal",
        "-o",
        "addopts=",
    ]
    for target in TARGETS:
        mine = [one for one in chosen if one.target == target]
        if mine:
            loop = _Loop(target, mine, processes)
            loop.tell = tell
            pytest.main([*arguments, *target.tests], plugins=[loop])
            if loop.error:
                raise BaselineError(f"{target.name}: {loop.error}; run: pytest {' '.join(target.tests)}")
