"""Five minutes of the soak. It starts before all other tests (see tests/conftest.py), which go on beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fixtures.clickhouse import ClickHouse
from tests.soak.site import GPUS_PER_NODE
from tests.soak.soak import Plan, soak
from tests.soak.trend import flatness, medians

TOLERANCE = 0.10
MIB = 1 << 20
WARM_S = 90
WINDOW_S = 30


@pytest.mark.soak
@pytest.mark.services
@pytest.mark.timeout(600)
def test_five_minutes_of_load_leave_the_memory_of_a_worker_as_it_is(
    kafka: str, clickhouse: ClickHouse, tmp_path: Path
) -> None:
    """1,000 GPUs at 1 Hz, one node silent throughout, batches late and twice; `scripts/soak --for 1h` is the long one.

    Flushes every 10 s and a live minute every 2 s leave room for the tests beside it.
    """
    plan = Plan(gpus=1000, seconds=300, flush_ms=10_000, live_every_ms=2_000)
    with soak(kafka, clickhouse.url, tmp_path, plan) as run:
        run.watch()
        ((silent,),) = run.rows("SELECT uniqExact(gpu) FROM placements WHERE gpu NOT IN (SELECT gpu FROM fragments)")
        ((late,),) = run.rows("SELECT count() FROM fragments WHERE appended_at > minute + INTERVAL 150 SECOND")
    readings = [reading for reading in run.readings if reading.at_s >= WARM_S]
    memory = flatness(readings, WINDOW_S, lambda reading: reading.rss_bytes)
    shown = [round(level / MIB, 1) for _, level in medians(readings, WINDOW_S, lambda one: one.rss_bytes)]
    assert memory.within(TOLERANCE), f"RSS in MiB every {WINDOW_S} s: {shown}; {memory}"
    behind = [level for _, level in medians(readings, WINDOW_S, lambda reading: reading.behind_ms)]
    # A machine that does other work is late at times; a worker that cannot keep up is later and later.
    assert min(behind[-3:]) < 10_000, f"how far behind the broker, in ms, every {WINDOW_S} s: {behind}"
    assert silent == GPUS_PER_NODE
    assert late > 0
