"""Processes on GPUs as allocations of source ``process``: the least sure of all sources, and the only one everywhere.

A process is known by (pid, start time since boot), because pids come back; its job is the process itself.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import psutil

from gpuledger.schemas.events import Allocation

__all__ = ["ProcessAllocations", "ProcessFacts", "look_up"]

log = logging.getLogger(__name__)

#: Another source that names the same GPU is surer: a process only says that somebody is there.
CONFIDENCE_PCT = 60


@dataclass(frozen=True, slots=True)
class ProcessFacts:
    """What the machine says of a process; its start in milliseconds of CLOCK_BOOTTIME, which never moves."""

    start_boottime_ms: int
    user: str = ""


def look_up(pid: int, proc: Path = Path("/proc")) -> ProcessFacts | None:
    """The process, None when it has ended or cannot be seen from here (another pid namespace)."""
    try:
        stat = (proc / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
        # The name may hold spaces and brackets; the fields after it are counted from its last bracket.
        ticks = int(stat.rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None
    try:
        user = psutil.Process(pid).username()
    except (psutil.Error, OSError, KeyError):
        user = ""
    return ProcessFacts(ticks * 1000 // os.sysconf("SC_CLK_TCK"), user)


class ProcessAllocations:
    """Turns successive process lists into allocations that start and end."""

    def __init__(self, node: str, boot_id: str, find: Callable[[int], ProcessFacts | None] = look_up) -> None:
        self._node = node
        self._boot_id = boot_id
        self._find = find
        self._running: dict[tuple[str, int, int], Allocation] = {}
        self._unseen: set[int] = set()

    def running(self) -> list[Allocation]:
        """What runs, by id."""
        return sorted(self._running.values(), key=lambda allocation: allocation.id)

    def update(
        self, processes: Mapping[str, Sequence[int]], to_utc_ms: Callable[[int], int], now_ms: int
    ) -> list[Allocation]:
        """The allocations that began or ended since the last list.

        `processes` maps a GPU to its pids; what runs on a GPU that is absent there goes on. `to_utc_ms` turns
        CLOCK_BOOTTIME into the run's time.
        """
        changed: list[Allocation] = []
        present: set[tuple[str, int, int]] = set()
        for gpu, pids in processes.items():
            for pid in pids:
                facts = self._find(pid)
                if facts is None:
                    self._say_unseen(pid)
                    continue
                key = (gpu, pid, facts.start_boottime_ms)
                present.add(key)
                if key not in self._running:
                    self._running[key] = self._begin(gpu, pid, facts, to_utc_ms(facts.start_boottime_ms))
                    changed.append(self._running[key])
        for key in [key for key in self._running if key[0] in processes and key not in present]:
            started = self._running.pop(key)
            end_ms = max(now_ms, started.start_ms)
            ended = {"end_ms": end_ms, "revision": max(now_ms, started.revision + 1), "claimed_at_ms": now_ms}
            changed.append(msgspec.structs.replace(started, **ended))
        return changed

    def _say_unseen(self, pid: int) -> None:
        if pid not in self._unseen:
            self._unseen.add(pid)
            log.warning(
                "process %d is on a GPU but not visible here, so it has no allocation; run the agent in the host's pid "
                "namespace",
                pid,
            )

    def _begin(self, gpu: str, pid: int, facts: ProcessFacts, start_ms: int) -> Allocation:
        job = f"{self._node}/{pid}@{facts.start_boottime_ms}"
        return Allocation(
            id=f"process:{self._boot_id[:8]}:{job}:{gpu}",
            # When the process began, never when we saw it: an agent that starts again claims the same allocation.
            revision=start_ms,
            claimed_at_ms=start_ms,
            node=self._node,
            boot_id=self._boot_id,
            gpu=gpu,
            job_id=job,
            source="process",
            user=facts.user,
            start_ms=start_ms,
            confidence_pct=CONFIDENCE_PCT,
        )
