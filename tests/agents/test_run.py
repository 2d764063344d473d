"""A run has one anchor; only a step of the wall clock ends it."""

from __future__ import annotations

import itertools

from gpuledger.agents.run import RunKeeper, SystemClock, read_boot_id


class ManualClock:
    def __init__(self) -> None:
        self.wall = 1_790_000_000_000
        self.boot = 5_000

    def wall_ms(self) -> int:
        return self.wall

    def boottime_ms(self) -> int:
        return self.boot

    def pass_ms(self, ms: int, step_ms: int = 0) -> None:
        self.boot += ms
        self.wall += ms + step_ms


def _keeper(clock: ManualClock) -> RunKeeper:
    numbers = itertools.count()
    return RunKeeper(clock, lambda: f"run-{next(numbers)}")


def test_time_comes_from_boottime_and_not_from_the_wall() -> None:
    clock = ManualClock()
    keeper = _keeper(clock)
    clock.pass_ms(10_000, step_ms=900)
    assert not keeper.check()
    assert keeper.run.ts_ms(clock.boot) == 1_790_000_010_000


def test_a_step_in_either_direction_begins_a_new_run_with_a_new_anchor() -> None:
    for step_ms in (1_001, -1_001, 10 * 365 * 86_400_000):
        clock = ManualClock()
        keeper = _keeper(clock)
        clock.pass_ms(60_000, step_ms)
        assert keeper.check()
        assert (keeper.run.run_id, keeper.run.start_ms) == ("run-1", clock.wall)
        assert keeper.run.ts_ms(clock.boot) == clock.wall
        assert not keeper.check()


def test_a_renamed_run_keeps_its_clock() -> None:
    clock = ManualClock()
    keeper = _keeper(clock)
    clock.pass_ms(1_000)
    before = keeper.run
    after = keeper.rename(1_790_000_000_400)
    assert after.run_id != before.run_id
    assert after.start_ms == 1_790_000_000_400
    assert after.ts_ms(clock.boot) == before.ts_ms(clock.boot)


def test_run_ids_are_random_and_the_boot_id_is_the_kernels() -> None:
    assert RunKeeper(SystemClock()).run.run_id != RunKeeper(SystemClock()).run.run_id
    assert read_boot_id() == read_boot_id() != ""
