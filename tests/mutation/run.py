"""Runs the tests of a module against its mutants: each in a process forked from one that has numpy, Arrow, Hypothesis
and pytest loaded, with the mutated text given to the import system from memory. The files are never touched.

Forking makes a mutant cost about as much as the first test that notices it. Limits are in CPU seconds, so that a busy
machine decides nothing.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import resource
import select
import signal
import sys
import time
import types
from collections.abc import Iterator, Sequence
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


class _FromMemory(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives one module another text."""

    def __init__(self, target: Target, source: str) -> None:
        self.target, self.source = target, source

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.target.module:
            return None
        return importlib.util.spec_from_loader(fullname, self, origin=str(ROOT / self.target.path))

    def exec_module(self, module: types.ModuleType) -> None:
        code = compile(self.source, str(ROOT / self.target.path), "exec")
        exec(code, module.__dict__)  # noqa: S102 (our own source with one change)


class _FirstFailure:
    """A pytest plugin that runs examples before properties, which cost more, and remembers what failed first."""

    name = ""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: getattr(getattr(item, "obj", None), "is_hypothesis_test", False))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.name = self.name or report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.name = self.name or f"import of {report.nodeid}"


def _child(target: Target, source: str, cpu_s: int, pipe: int) -> None:
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
        sys.meta_path.insert(0, _FromMemory(target, source))
        os.write(pipe, _tests_fail(target).encode()[:2000])
        status = 0
    finally:
        os._exit(status)


def _tests_fail(target: Target) -> str:
    """What failed first, empty when all passed."""
    # The same examples every time, no search for a smaller one: only whether a test fails is asked.
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    hypothesis.settings.register_profile("mutation", derandomize=True, database=None, phases=phases)
    hypothesis.settings.load_profile("mutation")
    first = _FirstFailure()
    # No plugins, no fixtures of the project, nothing written: a test that needs more does not belong here.
    arguments = ["-x", "-q", "--noconftest", "--assert=plain", "-p", "no:cacheprovider", "-o", "addopts="]
    code = int(pytest.main([*arguments, *target.tests], plugins=[first]))
    if code == 0:
        return ""
    return first.name or f"pytest ended with {code}"


# ------------------------------------------------------------------------------------------- in the parent


def _load(targets: Sequence[Target]) -> None:
    """Loads what the tests import, then forgets all of the project, so that a child imports only that again."""
    with contextlib.suppress(ImportError):
        importlib.import_module("pandas")  # pyarrow loads it when it is first used, where it is installed
    for target in targets:
        for path in target.tests:
            importlib.import_module(path.removesuffix(".py").replace("/", "."))
    keep = __name__.rpartition(".")[0]
    for name in list(sys.modules):
        ours = name.split(".")[0] in ("gpuledger", "tests")
        if ours and name != "tests" and not name.startswith(keep):
            del sys.modules[name]


@dataclass(slots=True)
class _Running:
    pid: int
    pipe: int
    until: float
    candidate: Candidate | None
    said: bytes = field(default=b"")


def _start(target: Target, source: str, cpu_s: int, wall_s: float, candidate: Candidate | None) -> _Running:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _child(target, source, cpu_s, writing)
    os.close(writing)
    return _Running(pid, reading, time.monotonic() + wall_s, candidate)


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


def _baseline(target: Target) -> float:
    """CPU seconds of the unchanged module's tests.

    Raises:
        BaselineError: they fail.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    _, failed = _wait([_start(target, target.source, 0, 600, None)])
    if failed:
        raise BaselineError(f"{target.name}: the tests fail without a mutation: {failed}; run: pytest {failed}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def run(chosen: Sequence[Candidate], processes: int) -> Iterator[Outcome]:
    """The outcome of every mutant, as they end; `processes` at a time.

    Raises:
        BaselineError: the tests of a module fail without a mutation.
    """
    os.chdir(ROOT)
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    targets = [target for target in TARGETS if any(one.target == target for one in chosen)]
    sources = {target.name: target.source for target in targets}
    _load(targets)
    cpu_s = {target.name: _baseline(target) for target in targets}
    children: list[_Running] = []
    for candidate in chosen:
        if len(children) == processes:
            child, killed_by = _wait(children)
            assert child.candidate is not None
            yield Outcome(child.candidate, killed_by)
        target = candidate.target
        text = apply(sources[target.name], candidate.mutant)
        cpu_limit = int(cpu_s[target.name] * _CPU_FACTOR) + _CPU_EXTRA_S
        wall_limit = cpu_s[target.name] * _WALL_FACTOR + _WALL_EXTRA_S
        children.append(_start(target, text, cpu_limit, wall_limit, candidate))
    while children:
        child, killed_by = _wait(children)
        assert child.candidate is not None
        yield Outcome(child.candidate, killed_by)
