"""Samples the GPUs once per period in a daemon thread, and hands over what was seen since the last flush.

A thread of its own, because a driver call may take its whole deadline; a daemon, because no driver may keep the agent
from ending.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from gpuledger.agents.batch import Cell
from gpuledger.agents.collectors.interface import DeviceInfo, GpuCollector, Row
from gpuledger.agents.collectors.processes import ProcessAllocations
from gpuledger.agents.run import Clock, Run, RunKeeper
from gpuledger.schemas.events import Allocation
from gpuledger.schemas.telemetry import Device

__all__ = ["Sampler", "Segment"]

log = logging.getLogger(__name__)

#: Process lists and device lists cost driver calls of their own and change seldom.
_PROCESSES_EVERY_MS = 5_000
_REFRESH_EVERY_MS = 60_000

Previous = dict[tuple[str, int], tuple[int, int | None]]


@dataclass(slots=True)
class Segment:
    """Rows of one run and one list of devices, as one batch will hold them; may have no rows."""

    run: Run
    devices: list[Device]
    ts_ms: list[Cell] = field(default_factory=list[Cell])
    device: list[Cell] = field(default_factory=list[Cell])
    rows: list[Row] = field(default_factory=list[Row])
    running: list[str] = field(default_factory=list[str])

    def columns(self) -> dict[str, list[Cell]]:
        """The rows as columns; a column that no row knows is left out."""
        columns: dict[str, list[Cell]] = {"ts_ms": self.ts_ms, "device": self.device}
        for name in dict.fromkeys(name for row in self.rows for name in row):
            columns[name] = [row.get(name) for row in self.rows]
        return columns

    def span_ms(self, now_ms: int) -> tuple[int, int]:
        """[first covered instant, last sample), for a gap record; `now_ms` where there is no row."""
        times = [ts for ts in self.ts_ms if isinstance(ts, int)]
        before = [device.previous_ts_ms for device in self.devices if device.previous_ts_ms is not None]
        if not times:
            return now_ms, now_ms
        return min([*before, *times]), max(times)


class Sampler:
    """`start` begins sampling; `take` gives what was seen since. All other methods are for its own thread."""

    def __init__(
        self,
        collectors: Sequence[GpuCollector],
        keeper: RunKeeper,
        clock: Clock,
        period_ms: int,
        processes: ProcessAllocations | None,
        reload: Callable[[], Sequence[GpuCollector] | None] = lambda: None,
    ) -> None:
        """`reload` is asked every minute for collectors to use instead, where drivers came back; None: go on."""
        self._collectors = list(collectors)
        self._keeper = keeper
        self._clock = clock
        self._period_ms = period_ms
        self._processes = processes
        self._reload = reload
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="sampler", daemon=True)
        self._previous: Previous = {}
        self._run = keeper.run
        self._infos = self._list_devices()
        self._finished: list[Segment] = []
        self._segment = self._new_segment()
        self._events: list[Allocation] = []
        self._down = 0
        self._next_processes_ms = 0
        self._next_refresh_ms = clock.boottime_ms() + _REFRESH_EVERY_MS
        self.samples = 0
        self.last_sample_boottime_ms = clock.boottime_ms()
        self.errors = 0

    # -- for the agent ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Ends sampling; waits for a sample under way, but not for a driver that hangs."""
        self._stop.set()
        self._thread.join(timeout_s)
        for collector in self._collectors:
            collector.close()

    def take(self) -> tuple[list[Segment], list[Allocation]]:
        """The segments since the last take (at least one, perhaps without rows), and the allocations that changed."""
        with self._lock:
            segments, self._finished = [*self._finished, self._segment], []
            self._segment = self._new_segment()
            events, self._events = self._events, []
            return segments, events

    def devices(self) -> list[DeviceInfo]:
        with self._lock:
            return list(self._infos)

    def versions(self) -> dict[str, str]:
        with self._lock:
            return {key: value for collector in self._collectors for key, value in collector.versions().items()}

    def down(self) -> int:
        """How many devices did not answer in the last sample."""
        return self._down

    def running(self) -> list[Allocation]:
        with self._lock:
            return self._processes.running() if self._processes is not None else []

    # -- the thread -------------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        due = self._clock.boottime_ms()
        while not self._stop.is_set():
            try:
                self.step()
            except Exception:
                # A defect in one collector must not end the telemetry of the node; it is counted and shown.
                self.errors += 1
                log.exception("a sample failed")
            due = max(due + self._period_ms, self._clock.boottime_ms())
            self._stop.wait(max(0, due - self._clock.boottime_ms()) / 1000)

    def step(self) -> None:
        """One sample of everything, and what is due beside it."""
        boottime_ms = self._clock.boottime_ms()
        if boottime_ms >= self._next_refresh_ms:
            self._next_refresh_ms = boottime_ms + _REFRESH_EVERY_MS
            self._refresh()
        stepped_ms = self._keeper.wall_step_ms()
        if self._keeper.check():
            log.warning("the wall clock stepped by %d ms; a new run begins", stepped_ms)
        boottime_ms = self._clock.boottime_ms()
        run = self._keeper.run
        rows = [row for collector in self._collectors for row in collector.sample()]
        self._add(run, run.ts_ms(boottime_ms), rows)
        if self._processes is not None and boottime_ms >= self._next_processes_ms:
            self._next_processes_ms = boottime_ms + _PROCESSES_EVERY_MS
            self._look_at_processes(run)
        self.samples += 1
        self.last_sample_boottime_ms = boottime_ms

    def _add(self, run: Run, ts_ms: int, rows: Sequence[Row]) -> None:
        with self._lock:
            if run.run_id != self._run.run_id:
                # Renamed (same anchor): the rows go on; anything else: its first sample covers nothing.
                if run.anchor_boottime_ms != self._run.anchor_boottime_ms:
                    self._previous = {}
                self._run = run
                self._cut()
            segment = self._segment
            for index, (info, row) in enumerate(zip(self._infos, rows, strict=True)):
                segment.ts_ms.append(ts_ms)
                segment.device.append(index)
                segment.rows.append(row)
                energy = row.get("energy_mj")
                self._previous[info.gpu, info.instance] = (ts_ms, energy if isinstance(energy, int) else None)
            segment.running = [one.id for one in self._processes.running()] if self._processes is not None else []
            self._down = sum(row.get("down_cause") is not None for row in rows)

    def _cut(self) -> None:
        if self._segment.rows:
            self._finished.append(self._segment)
        self._segment = self._new_segment()

    def _new_segment(self) -> Segment:
        devices: list[Device] = []
        for info in self._infos:
            ts_ms, energy = self._previous.get((info.gpu, info.instance), (None, None))
            devices.append(Device(info.gpu, info.instance, ts_ms, energy))
        return Segment(self._run, devices)

    def _list_devices(self) -> list[DeviceInfo]:
        return [info for collector in self._collectors for info in collector.devices()]

    def _refresh(self) -> None:
        replaced = self._reload()
        # A list, not a generator: every collector looks again.
        changed = [collector.refresh() for collector in self._collectors] if replaced is None else [True]
        if not any(changed):
            return
        with self._lock:
            if replaced is not None:
                self._collectors = list(replaced)
            self._infos = self._list_devices()
            self._cut()
        log.info("the devices of this node changed: %d now", len(self._infos))

    def _look_at_processes(self, run: Run) -> None:
        assert self._processes is not None
        lists: dict[str, Sequence[int]] = {}
        for collector in self._collectors:
            found: Mapping[str, Sequence[int]] = collector.processes()
            lists.update(found)
        with self._lock:
            self._events += self._processes.update(lists, run.ts_ms, run.ts_ms(self._clock.boottime_ms()))
            self._segment.running = [one.id for one in self._processes.running()]
