"""The agent of a node: collectors → samples → batches → spool → Kafka.

Everything that may block has its own thread (the driver, the disk), so the event loop only decides when; nothing that
was sealed is lost by a stop, a broker that is away, or a kill.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import msgspec

from gpuledger.agents.batch import encode_batch
from gpuledger.agents.collectors.absent import AbsentDriver
from gpuledger.agents.collectors.host import HostCollector
from gpuledger.agents.collectors.interface import GpuCollector
from gpuledger.agents.collectors.nvml import NvmlCollector, NvmlUnavailable
from gpuledger.agents.collectors.processes import ProcessAllocations
from gpuledger.agents.exceptions import AgentError, SpoolChanged
from gpuledger.agents.health import HealthServer, Metric, prometheus_text
from gpuledger.agents.messages import Message, event_message
from gpuledger.agents.placements import place_devices
from gpuledger.agents.publisher import Publisher
from gpuledger.agents.run import Clock, Run, RunKeeper, SystemClock, random_run_id, read_boot_id
from gpuledger.agents.sampler import Sampler, Segment
from gpuledger.agents.spool import Spool
from gpuledger.schemas.config import Agent as AgentSettings
from gpuledger.schemas.config import Config, parse_listen
from gpuledger.schemas.events import Event, Inventory
from gpuledger.schemas.settings import to_builtins
from gpuledger.schemas.telemetry import BatchHeader, Device, Gap, HostReading

__all__ = ["Agent", "agent_version", "open_gpu_collectors"]

log = logging.getLogger(__name__)

_HOUR_MS = 3_600_000
#: The parts of a stop; together they stay under the ten seconds that a service manager gives.
_STOP_SAMPLING_S = 1.0
_STOP_SEAL_S = 2.0
_STOP_DRAIN_S = 4.5
_STOP_CLOSE_S = 1.5


def agent_version() -> str:
    """The version of this installation, as inventories and batches tell it."""
    return metadata.version("gpuledger")


def open_gpu_collectors(settings: AgentSettings, level: int = logging.WARNING) -> list[GpuCollector]:
    """The GPU collectors that work here, of those the settings name; another vendor's is a few more lines here.

    What does not work is logged at `level`, with the reason.
    """
    collectors: list[GpuCollector] = []
    if "nvml" in settings.collectors:
        try:
            collectors.append(NvmlCollector())
        except NvmlUnavailable as error:
            log.log(level, "no NVIDIA GPUs are read: %s", error)
    return collectors


@dataclass(frozen=True, slots=True)
class _Identity:
    """What of this process and machine goes into every batch."""

    node: str
    boot_id: str
    version: str
    config_hash: str


class Agent:
    """One agent; `run` returns when it has been told to stop and has handed over what it could."""

    def __init__(self, config: Config, clock: Clock | None = None) -> None:
        self._config = config
        self._settings = config.agent
        self._clock = clock or SystemClock()
        self._me = _Identity(
            node=config.agent.node or socket.gethostname(),
            boot_id=read_boot_id(),
            version=agent_version(),
            config_hash=hashlib.sha256(msgspec.json.encode(to_builtins(config.agent))).hexdigest()[:12],
        )
        self._keeper = RunKeeper(self._clock)
        self._renamed: dict[str, Run] = {}
        self._host = HostCollector() if "host" in config.agent.collectors else None
        self._told: Inventory | None = None
        self._told_ms = 0
        self._sealed_batches = 0
        self._lost_flushes = 0
        self._sealed_runs: set[str] = set()
        self._measured_since_ms = self._keeper.run.start_ms
        self._last_flush_boottime_ms: int | None = None
        self._wake = asyncio.Event()
        self._reloaded = False

    async def run(self, stop: asyncio.Event) -> None:
        """Works until `stop` is set, then drains for less than ten seconds.

        A driver that hangs may keep a daemon thread alive: the caller ends the process with os._exit.

        Raises:
            AgentError: the health address cannot be listened on.
        """
        settings = self._settings
        self._spool = await asyncio.to_thread(
            Spool,
            Path(settings.spool_dir),
            settings.spool_max_bytes,
            settings.spool_max_age_hours * _HOUR_MS,
            self._clock.wall_ms(),
        )
        self._placements = await asyncio.to_thread(self._spool.placements)
        self._sampler = await asyncio.to_thread(self._make_sampler)
        self._publisher = Publisher(self._config.kafka, f"gpuledger-agent-{self._me.node}")
        health = HealthServer(self._healthy, self._ready, self._metrics)
        host, port = await health.start(*parse_listen(settings.listen))
        log.info("agent of node %s, health on http://%s:%d", self._me.node, host, port)
        self._sampler.start()
        end_of_drain = asyncio.Event()
        drain = asyncio.create_task(self._publisher.drain(self._spool, self._wake, end_of_drain))
        try:
            await self._flush_until(stop, drain)
        finally:
            await self._stop(drain, end_of_drain, health)

    def _make_sampler(self) -> Sampler:
        processes = None
        if "processes" in self._settings.collectors:
            processes = ProcessAllocations(self._me.node, self._me.boot_id)
        collectors = open_gpu_collectors(self._settings)
        absent = not collectors and any(placement.end_ms is None for placement in self._placements)
        if absent:
            log.error("this node has GPUs, but no driver answers: they are reported down")
        return Sampler(
            collectors or [AbsentDriver(self._placements)],
            self._keeper,
            self._clock,
            self._settings.period_ms,
            processes,
            self._reload_absent if not collectors else lambda: None,
        )

    def _reload_absent(self) -> Sequence[GpuCollector] | None:
        """Collectors that work by now, where none did at the start; once found they are not looked for again."""
        if not self._reloaded and "nvml" in self._settings.collectors:
            found = open_gpu_collectors(self._settings, logging.DEBUG)
            self._reloaded = bool(found)
            return found or None
        return None

    # -- flushing ---------------------------------------------------------------------------------------------------

    async def _flush_until(self, stop: asyncio.Event, drain: asyncio.Task[None]) -> None:
        flush_s = self._settings.flush_ms / 1000
        # 10,000 nodes started by one command must not flush in the same millisecond for ever.
        pause_s = min(flush_s, self._settings.period_ms / 1000 + random.random() * flush_s)
        loop = asyncio.get_running_loop()
        due = loop.time() + pause_s
        stopped = asyncio.create_task(stop.wait())
        try:
            while not stop.is_set():
                await asyncio.wait(
                    (stopped, drain), timeout=max(0.0, due - loop.time()), return_when=asyncio.FIRST_COMPLETED
                )
                if drain.done():
                    drain.result()  # it ends by itself only with an error that must be seen
                if stop.is_set():
                    return
                try:
                    await asyncio.to_thread(self.flush)
                except AgentError as error:
                    self._lost_flushes += 1
                    log.error("a flush failed, what it held is lost: %s", error)
                self._wake.set()
                due = max(due + flush_s, loop.time())
        finally:
            stopped.cancel()

    def flush(self) -> None:
        """Seals what was seen since the last flush: changed facts first, then the batches."""
        segments, allocations = self._sampler.take()
        now_ms = self._clock.wall_ms()
        self._measured_since_ms = min(segment.span_ms(now_ms)[0] for segment in segments)
        inventory = self._inventory(now_ms)
        events: list[Event] = [*([inventory] if inventory is not None else []), *allocations]
        if inventory is not None and self._told is not None:
            # Whoever missed a start hears hourly of what runs.
            changed = {allocation.id for allocation in allocations}
            events += [one for one in self._sampler.running() if one.id not in changed]
        for event in events:
            self._seal_event(event_message(event), now_ms)
        if inventory is not None:
            self._told, self._told_ms = inventory, now_ms
        for segment in segments:
            last = segment is segments[-1]
            if segment.rows or (last and not segment.devices):
                self._seal_batch(segment, now_ms, last)
        self._last_flush_boottime_ms = self._clock.boottime_ms()

    def _seal_event(self, message: Message, now_ms: int) -> None:
        try:
            self._spool.seal_event(message, now_ms)
        except SpoolChanged as changed:
            self._begin_run(changed)
            self._spool.seal_event(message, now_ms)

    def _seal_batch(self, segment: Segment, now_ms: int, last: bool) -> None:
        """The batch of a segment; the last one of a flush tells of the node itself."""
        host = None
        if last and self._host is not None:
            host = self._host.read(segment.run.ts_ms(self._clock.boottime_ms()))
        try:
            self._seal_under(self._run_of(segment), segment, host, now_ms)
        except SpoolChanged as changed:
            self._begin_run(changed)
            self._seal_under(self._run_of(segment), segment, host, now_ms)

    def _seal_under(self, run: Run, segment: Segment, host: HostReading | None, now_ms: int) -> None:
        devices = segment.devices
        if run.run_id not in self._sealed_runs:
            # The first batch of a run: nothing of it came before, even where its rows go on from a lost run.
            devices = [Device(device.gpu, device.instance) for device in devices]
        columns = segment.columns()

        def build(seq: int, gaps: list[Gap]) -> Message:
            header = BatchHeader(
                node=self._me.node,
                boot_id=self._me.boot_id,
                boot_start_ms=run.anchor_wall_ms - run.anchor_boottime_ms,
                run_id=run.run_id,
                run_start_ms=run.start_ms,
                seq=seq,
                period_ms=self._settings.period_ms,
                anchor_wall_ms=run.anchor_wall_ms,
                anchor_boottime_ms=run.anchor_boottime_ms,
                devices=devices,
                active_threshold=self._settings.active_threshold,
                running=segment.running,
                host=host,
                gaps=gaps,
                agent_version=self._me.version,
            )
            return encode_batch(header, columns)

        from_ms, to_ms = segment.span_ms(now_ms)
        self._spool.seal_batch(run.run_id, from_ms, to_ms, now_ms, build)
        self._sealed_runs.add(run.run_id)
        self._sealed_batches += 1

    def _run_of(self, segment: Segment) -> Run:
        """The run under which a segment is sent: its own, or the one that took over when its numbers were lost."""
        run = segment.run
        while run.run_id in self._renamed:
            run = self._renamed[run.run_id]
        return run

    def _begin_run(self, changed: SpoolChanged) -> None:
        """After the spool lost its numbers: what is measured and not sealed goes on under new runs."""
        log.warning("%s", changed)
        current = self._keeper.run
        for run_id in self._sealed_runs - set(self._renamed) - {current.run_id}:
            old = replace(current, run_id=random_run_id(), start_ms=self._measured_since_ms)
            self._renamed[run_id] = old
        self._renamed[current.run_id] = self._keeper.rename(self._measured_since_ms)

    # -- facts ------------------------------------------------------------------------------------------------------

    def _inventory(self, now_ms: int) -> Inventory | None:
        """The inventory, where it is due: at the start, when something changed, hourly."""
        settings = self._settings
        devices = self._sampler.devices()
        placements = place_devices(
            devices, self._placements, self._me.node, settings.pool, settings.site, self._keeper.run.start_ms
        )
        if placements != self._placements:
            self._spool.save_placements(placements)
            self._placements = placements
        versions = self._sampler.versions()
        down = self._sampler.down()
        inventory = Inventory(
            node=self._me.node,
            claimed_at_ms=now_ms,
            boot_id=self._me.boot_id,
            agent_version=self._me.version,
            driver_version=versions.get("driver"),
            cuda_version=versions.get("cuda"),
            config_hash=self._me.config_hash,
            health=f"{down} of {len(devices)} devices down" if down else "ok",
            placements=placements,
        )
        if self._told is None or now_ms - self._told_ms >= _HOUR_MS:
            return inventory
        same = _claimed_at(inventory, self._told.claimed_at_ms) == self._told
        return None if same else inventory

    # -- the end ----------------------------------------------------------------------------------------------------

    async def _stop(self, drain: asyncio.Task[None], end_of_drain: asyncio.Event, health: HealthServer) -> None:
        """Within ten seconds: the last samples are sealed, what the broker takes is sent, the rest stays on disk."""
        log.info("stopping")
        await asyncio.to_thread(self._sampler.stop, _STOP_SAMPLING_S)
        try:
            async with asyncio.timeout(_STOP_SEAL_S):
                await asyncio.to_thread(self.flush)
        except (TimeoutError, AgentError) as error:
            log.error("the last batch was not sealed: %s", error or "the disk does not answer")
        end_of_drain.set()
        begun = asyncio.get_running_loop().time()
        await asyncio.wait((drain,), timeout=_STOP_DRAIN_S)
        drain.cancel()
        await asyncio.gather(drain, return_exceptions=True)
        left_s = _STOP_DRAIN_S - (asyncio.get_running_loop().time() - begun)
        if not await self._publisher.drain_all(self._spool, max(0.0, left_s)):
            log.warning("%d messages stay in the spool for the next start", self._spool.stats().messages)
        await self._publisher.close(_STOP_CLOSE_S)
        await health.close()
        self._spool.close()

    # -- how it is --------------------------------------------------------------------------------------------------

    def _healthy(self) -> tuple[bool, str]:
        silent_ms = self._clock.boottime_ms() - self._sampler.last_sample_boottime_ms
        if silent_ms > max(30_000, 10 * self._settings.period_ms):
            return False, f"no sample for {silent_ms} ms"
        return True, "ok"

    def _ready(self) -> tuple[bool, str]:
        """Ready: samples are sealed. The broker may be away; that is what the spool is for."""
        if self._last_flush_boottime_ms is None:
            return False, "nothing sealed yet"
        silent_ms = self._clock.boottime_ms() - self._last_flush_boottime_ms
        if silent_ms > 3 * self._settings.flush_ms + 10_000:
            return False, f"nothing sealed for {silent_ms} ms"
        return True, f"ok, but {self._spool.trouble}" if self._spool.in_memory else "ok"

    def _metrics(self) -> str:
        spool = self._spool.stats()
        oldest = None if spool.oldest_ms is None else max(0, self._clock.wall_ms() - spool.oldest_ms) / 1000
        name = "gpuledger_agent_"
        rows: list[tuple[str, str, str, int | float | None]] = [
            ("samples_total", "counter", "Samples of all GPUs together.", self._sampler.samples),
            ("sample_errors_total", "counter", "Samples that failed.", self._sampler.errors),
            ("devices", "gauge", "GPUs and instances of this node.", len(self._sampler.devices())),
            ("devices_down", "gauge", "Those that did not answer the last sample.", self._sampler.down()),
            ("batches_sealed_total", "counter", "Batches numbered and stored.", self._sealed_batches),
            ("flushes_lost_total", "counter", "Flushes that could not be sealed.", self._lost_flushes),
            ("messages_sent_total", "counter", "Messages the broker acknowledged.", self._publisher.sent_messages),
            ("bytes_sent_total", "counter", "Their bytes before compression.", self._publisher.sent_bytes),
            ("send_failures_total", "counter", "Attempts to send that failed.", self._publisher.failures),
            ("kafka_connected", "gauge", "1 while a broker answers.", int(self._publisher.connected)),
            ("spool_messages", "gauge", "Messages that wait.", spool.messages),
            ("spool_bytes", "gauge", "Their bytes.", spool.bytes),
            ("spool_oldest_seconds", "gauge", "Age of the oldest of them.", oldest),
            ("spool_dropped_total", "counter", "Messages dropped because of the bounds.", self._spool.dropped),
            ("spool_rejected", "gauge", "Messages set aside because they can never be sent.", spool.rejected),
            ("spool_in_memory", "gauge", "1 while the disk cannot be written.", int(self._spool.in_memory)),
        ]
        return prometheus_text(Metric(name + what, kind, text, value) for what, kind, text, value in rows)


def _claimed_at(inventory: Inventory, claimed_at_ms: int) -> Inventory:
    """The inventory as if told at another time, to see whether anything but the time differs."""
    return msgspec.structs.replace(inventory, claimed_at_ms=claimed_at_ms)
