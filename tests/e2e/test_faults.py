"""Kills, rebalances: whatever happens to workers, the ledger is the one of a run to which nothing happened."""

import time

import pytest

from tests.e2e.load import Load
from tests.e2e.pipeline import Digest, Installation, differences

pytestmark = pytest.mark.services


def held_us(digest: Digest) -> tuple[int, int]:
    """(observed, all) held GPU-microseconds."""
    held = [row for row in digest["v_ledger_minute"] if row[3] == "held"]
    return sum(row[5] for row in held if row[4] in ("active", "idle", "down")), sum(row[5] for row in held)


def test_the_undisturbed_run_has_everything_in_it(undisturbed: Digest, load: Load) -> None:
    assert all(undisturbed[view] for view in undisturbed if view != "v_conflicts")
    during = [row for row in undisturbed["v_ledger_minute"] if row[1].timestamp() * 1000 < load.end_ms]
    assert {row[3] for row in during} >= {"held", "reserved_unused", "free"}
    assert {row[4] for row in during} >= {"active", "idle", "down", "unobserved"}
    assert {row[2] for row in during} >= {"north", "south", "campus"}
    assert {row[7] for row in undisturbed["v_ledger_minute"]} == {1}, "not every minute is complete"
    observed, held = held_us({"v_ledger_minute": during})
    assert observed > held * 0.9, f"{observed} of {held} us observed"


def test_three_kills_under_load_change_nothing(pipeline: Installation, load: Load, undisturbed: Digest) -> None:
    sending = pipeline.publish(load.ticks, over_s=30)
    for kill in (("telemetry", "stored", 4), ("telemetry", "marked", 3), ("dirty", "read", 2)):
        pipeline.start_worker(kill).killed()
        print(kill, "sending" if not sending.done() else "sent", time.monotonic())
    pipeline.start_worker()
    pipeline.settle(load, sending.result())
    assert not differences(pipeline.digest(load), undisturbed)
