"""What the fault suite draws: the same for the same seed, half of it at barriers, nothing left out."""

from collections import Counter

import pytest

from tests.faults.drawing import POOLS, draw


def test_the_same_seed_draws_the_same() -> None:
    assert draw(50, 3) == draw(50, 3)
    assert draw(50, 3) != draw(50, 4)


@pytest.mark.parametrize("kills", [1, 7, 20, 45, 200])
def test_half_strike_at_barriers_each_in_a_pool_of_its_own(kills: int) -> None:
    waves = draw(kills, 1)
    assert sum(len(wave.faults) for wave in waves) == kills
    assert sum(len(wave.barred) for wave in waves) == -(-kills // 2)
    for wave in waves:
        pools = [fault.pool for fault in wave.barred]
        assert len(set(pools)) == len(pools)
        assert set(pools) <= set(POOLS)
        assert not any(fault.agent for fault in wave.free)


def test_two_hundred_leave_nothing_out() -> None:
    faults = [fault for wave in draw(200, 1) for fault in wave.faults]
    kinds = Counter((fault.victim, fault.how) for fault in faults)
    assert kinds.keys() >= {(victim, "kill -9") for victim in ("agent", "broker", "worker", "clickhouse")}
    assert kinds.keys() >= {(victim, "disk full") for victim in ("agent", "broker", "clickhouse")}
    assert kinds.keys() >= {(victim, "network cut") for victim in ("broker", "clickhouse")}
    assert kinds["worker", "stopped past its session"] > 5
    assert kinds["worker", "overtaken"] == 10
    steps = {(fault.agent, fault.point) for fault in faults if fault.agent}
    assert {agent for agent, _ in steps} == {"telemetry", "allocations", "dirty", "sender"}
    assert len(steps) == 13
