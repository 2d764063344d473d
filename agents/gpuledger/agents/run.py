"""The identity of an agent run: its random id, and its one anchor between the wall clock and CLOCK_BOOTTIME.

All durations of a run come from CLOCK_BOOTTIME, which neither NTP nor an operator moves; when the wall clock has
stepped away from it, the run is over and a new one begins.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

__all__ = ["MAX_WALL_STEP_MS", "Clock", "Run", "RunKeeper", "SystemClock", "random_run_id", "read_boot_id"]

#: A wall clock further than this from the run's anchor has stepped (or drifted that far): a new run begins.
MAX_WALL_STEP_MS = 1_000


class Clock(Protocol):
    """Both clocks in milliseconds, as arguments to everything that needs time."""

    def wall_ms(self) -> int:
        """UTC milliseconds since 1970; may step."""
        ...

    def boottime_ms(self) -> int:
        """Milliseconds since boot, suspend included; never steps."""
        ...


class SystemClock:
    """The clocks of this machine."""

    def wall_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def boottime_ms(self) -> int:
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


@dataclass(frozen=True, slots=True)
class Run:
    """One run: fixed until the agent ends, the wall clock steps, or the spool is lost."""

    run_id: str
    start_ms: int
    anchor_wall_ms: int
    anchor_boottime_ms: int

    def ts_ms(self, boottime_ms: int) -> int:
        """The UTC time of an instant of CLOCK_BOOTTIME, as this run knows it."""
        return self.anchor_wall_ms + (boottime_ms - self.anchor_boottime_ms)


def random_run_id() -> str:
    """A new run id: random, so that no two starts of any agent share one."""
    return uuid.uuid4().hex


def read_boot_id(path: Path = Path("/proc/sys/kernel/random/boot_id")) -> str:
    """The kernel's id of this boot."""
    return path.read_text().strip()


class RunKeeper:
    """Holds the current run and says when it must end."""

    def __init__(self, clock: Clock, new_id: Callable[[], str] = random_run_id) -> None:
        self._clock = clock
        self._new_id = new_id
        self.run = self._begin()

    def _begin(self) -> Run:
        wall = self._clock.wall_ms()
        return Run(self._new_id(), wall, wall, self._clock.boottime_ms())

    def renew(self) -> Run:
        """Begins a new run now, whatever the clocks say."""
        self.run = self._begin()
        return self.run

    def rename(self, start_ms: int) -> Run:
        """A new run whose clock is the present one's, for rows measured since `start_ms` whose numbers were lost."""
        self.run = replace(self.run, run_id=self._new_id(), start_ms=start_ms)
        return self.run

    def wall_step_ms(self) -> int:
        """How far the wall clock is ahead of this run's time (negative: behind)."""
        return self._clock.wall_ms() - self.run.ts_ms(self._clock.boottime_ms())

    def check(self) -> bool:
        """Begins a new run where the wall clock has stepped; True when it did. Call before each sample."""
        if abs(self.wall_step_ms()) <= MAX_WALL_STEP_MS:
            return False
        self.renew()
        return True
