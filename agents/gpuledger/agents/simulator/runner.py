"""Runs a simulated site against a real broker: paced by the wall clock, saved so that a later start goes on.

Event time never passes wall time: a scenario with `speed` above 1 starts `start_back_s` in the past, catches up, and
then goes at the speed of the clock.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from gpuledger.agents.exceptions import BrokerUnavailable, ScenarioError
from gpuledger.agents.messages import Message
from gpuledger.agents.run import Clock, SystemClock
from gpuledger.agents.simulator.scenario import Scenario
from gpuledger.agents.simulator.world import World, WorldState

__all__ = ["STATE_FILE", "Progress", "Sink", "load_state", "run_simulation", "save_state"]

log = logging.getLogger(__name__)

STATE_FILE = "simulator.json"
#: Counters are saved this often; allocations whenever they change, before the broker hears of them.
_SAVE_EVERY_MS = 5_000
#: A tick may be this late before the delay is logged: the fleet is too large for the machine or the broker too slow.
_LATE_MS = 5_000


#: Waits so many seconds, or less once the event is set.
Pause = Callable[[asyncio.Event, float], Awaitable[None]]


class Sink(Protocol):
    """Where messages go; a `Publisher` is one."""

    async def publish_many(self, messages: Sequence[Message]) -> object: ...


@dataclass(frozen=True, slots=True)
class Progress:
    """Where the simulation is, for those who show it. `behind_ms` is what it lags behind the time it should show."""

    event_ms: int
    messages: int
    bytes: int
    behind_ms: int


def load_state(path: Path, scenario: Scenario) -> WorldState | None:
    """The saved state, None where there is none.

    Raises:
        ScenarioError: the file is not readable, or belongs to another scenario or seed.
    """
    try:
        state = msgspec.json.decode(path.read_bytes(), type=WorldState)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise ScenarioError(f"{path}: cannot be read: {error}; remove it to start the site anew") from error
    if (state.scenario, state.seed) != (scenario.name, scenario.seed):
        raise ScenarioError(
            f"{path}: is of scenario {state.scenario}, seed {state.seed}, not {scenario.name}, seed {scenario.seed}; "
            "use another data directory for another site"
        )
    return state


def save_state(path: Path, state: WorldState) -> None:
    """Replaces the file in one step, so that a kill leaves the old state or the new one."""
    draft = path.with_name(path.name + ".new")
    draft.write_bytes(msgspec.json.encode(state))
    draft.replace(path)


@dataclass(slots=True)
class _Pace:
    """Maps wall time to the event time that should have been published by then."""

    event_ms: int
    wall_ms: int
    speed: int

    def due_ms(self, wall_ms: int) -> int:
        return min(wall_ms, self.event_ms + (wall_ms - self.wall_ms) * self.speed)

    def wait_ms(self, event_ms: int, wall_ms: int) -> int:
        """How long until event time `event_ms` is due, 0 when it is."""
        by_speed = -(-(event_ms - self.event_ms) // self.speed) + self.wall_ms
        return max(0, max(by_speed, event_ms) - wall_ms)


async def run_simulation(
    scenario: Scenario,
    sink: Sink,
    stop: asyncio.Event,
    *,
    state_path: Path | None = None,
    for_ms: int | None = None,
    clock: Clock | None = None,
    pause: Pause | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> World:
    """Simulates until `stop` is set or `for_ms` of wall time have passed, then sends what is measured and saves.

    While the broker is away it waits, and catches up afterwards. Without `state_path` nothing is remembered; `clock`
    and `pause` are the machine's unless given.

    Raises:
        ScenarioError: the saved state cannot be used.
        MessageRejected: the broker refuses a message for good.
    """
    clock = clock or SystemClock()
    pause = pause or _pause
    state = load_state(state_path, scenario) if state_path is not None else None
    begun_ms = clock.wall_ms()
    start_ms = begun_ms - (scenario.start_back_s * 1000 if state is None else 0)
    world = World(scenario, start_ms, state)
    pace = _Pace(world.now_ms, begun_ms, scenario.speed)
    until_ms = None if for_ms is None else begun_ms + for_ms
    sent = sent_bytes = 0
    saved_ms = 0
    warned = False
    while not stop.is_set() and (until_ms is None or clock.wall_ms() < until_ms):
        wait_ms = pace.wait_ms(world.now_ms + scenario.period_ms, clock.wall_ms())
        if until_ms is not None:
            wait_ms = min(wait_ms, max(0, until_ms - clock.wall_ms()))
        if wait_ms:
            await pause(stop, wait_ms / 1000)
            continue
        messages = world.tick()
        if state_path is not None and (
            world.now_ms - saved_ms >= _SAVE_EVERY_MS or any(message.topic == "allocations" for message in messages)
        ):
            save_state(state_path, world.state())
            saved_ms = world.now_ms
        await _send(sink, messages, stop, pause)
        sent += len(messages)
        sent_bytes += sum(len(message.value) for message in messages)
        behind_ms = pace.due_ms(clock.wall_ms()) - world.now_ms
        if behind_ms > _LATE_MS and scenario.speed == 1 and not warned:
            log.warning("the simulation is %d ms behind: fewer GPUs or a longer flush_ms would keep up", behind_ms)
        warned = behind_ms > _LATE_MS
        if on_progress is not None:
            on_progress(Progress(world.now_ms, sent, sent_bytes, behind_ms))
        if behind_ms > 0:
            await asyncio.sleep(0)
    if state_path is not None:
        save_state(state_path, world.state())
    await _send(sink, world.finish(), stop, pause)
    return world


async def _send(sink: Sink, messages: Sequence[Message], stop: asyncio.Event, pause: Pause) -> None:
    """Sends, again and again while the broker is away; a stop gives up at the next failure."""
    while messages:
        try:
            await sink.publish_many(messages)
        except BrokerUnavailable as error:
            if stop.is_set():
                log.warning("%d messages were not sent at the end: %s", len(messages), error)
                return
            log.warning("the simulation waits for the broker: %s", error)
            await pause(stop, 1.0)
        else:
            return


async def _pause(stop: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await stop.wait()
    except TimeoutError:
        pass
