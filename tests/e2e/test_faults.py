"""Kills and rebalances: whatever happens to workers, the ledger is the one of a run to which nothing happened."""

import pytest

from gpuledger.streams.app import rules_of
from gpuledger.streams.audit import audit
from gpuledger.streams.store import Store
from tests.e2e.load import Load
from tests.e2e.orders import Order
from tests.e2e.pipeline import Digest, Installation, differences, same

pytestmark = pytest.mark.services


def held_us(rows: list[tuple[object, ...]]) -> tuple[int, int]:
    """(observed, all) held GPU-microseconds of rows of v_ledger_minute."""
    held = [row for row in rows if row[3] == "held"]
    observed = [row for row in held if row[4] in ("active", "idle", "down")]
    return sum(int(str(row[5])) for row in observed), sum(int(str(row[5])) for row in held)


def during(digest: Digest, load: Load) -> list[tuple[object, ...]]:
    """Its rows of v_ledger_minute in the minutes of the load itself."""
    return [row for row in digest["v_ledger_minute"] if load.start_ms <= row[1].timestamp() * 1000 < load.end_ms]


def test_the_undisturbed_run_has_everything_in_it(undisturbed: Digest, load: Load) -> None:
    assert all(undisturbed[view] for view in undisturbed if view != "v_conflicts")
    rows = during(undisturbed, load)
    assert {row[3] for row in rows} >= {"held", "reserved_unused", "free"}
    assert {row[4] for row in rows} >= {"active", "idle", "unobserved"}
    assert {row[2] for row in rows} >= {"north", "south", "campus"}
    assert {row[7] for row in undisturbed["v_ledger_minute"]} == {1}, "not every minute is complete"
    observed, held = held_us(rows)
    assert observed > held * 0.9, f"{observed} of {held} us observed"


@pytest.mark.timeout(180)
def test_kills_change_nothing(pipeline: Installation, load: Load, undisturbed: Digest) -> None:
    """kill -9 between store and mark, between mark and commit, and in a recompute between its reads and its writes.

    The first two fall into the load. The last two hit one batch that nothing comes after: later marks of the same hour
    would heal what a lost one left wrong.
    """
    first, (*second, tail) = load.cut(0.5)
    *rest, batch = tail
    assert batch.topic == "telemetry"
    sending = pipeline.publish(first, over_s=8)
    pipeline.start_worker(Order("telemetry", "stored")).killed()
    sent = [sending.result()]
    sending = pipeline.publish([*second, rest], over_s=8)
    pipeline.start_worker(Order("telemetry", "marked")).killed()
    last = pipeline.start_worker()
    sent.append(sending.result())
    pipeline.settle(load, *sent)
    last.order(Order("telemetry", "stored"))
    sent.append(pipeline.publish([[batch]], over_s=0).result())
    last.killed()
    pipeline.start_worker(Order("dirty", "read")).killed()
    pipeline.start_worker()
    pipeline.settle(load, *sent)
    found = pipeline.digest(load)
    same(found, undisturbed)
    observed, held = held_us(during(found, load))
    assert observed > held * 0.9


def test_a_worker_joins_and_another_leaves_under_load(pipeline: Installation, load: Load, undisturbed: Digest) -> None:
    before, between, after = load.cut(0.3, 0.6)
    sending = pipeline.publish(before, over_s=3)
    first = pipeline.start_worker()
    sent = [sending.result()]
    pipeline.wait_until(lambda: pipeline.number("SELECT count() FROM fragments"), "the first worker stores")
    sending = pipeline.publish(between, over_s=6)
    second = pipeline.start_worker()
    pipeline.wait_until(second.ready, "the second worker has partitions")
    sent.append(sending.result())
    sending = pipeline.publish(after, over_s=6)
    assert first.stop() == 0, first.log()[-3000:]
    sent.append(sending.result())
    pipeline.settle(load, *sent)
    same(pipeline.digest(load), undisturbed)


def test_a_commit_before_the_store_is_noticed(pipeline: Installation, load: Load, undisturbed: Digest) -> None:
    """The order is what the other tests hold: with offsets committed first, one kill loses marks, and both the
    comparison and the audit say so."""
    (*ticks, tail) = load.ticks
    *rest, batch = tail
    sending = pipeline.publish([*ticks, rest], over_s=3)
    wrong = pipeline.start_worker(None, "--wrong", "commit-first")
    sent = [sending.result()]
    pipeline.settle(load, *sent)
    wrong.order(Order("telemetry", "stored"))
    sent.append(pipeline.publish([[batch]], over_s=0).result())
    wrong.killed()
    pipeline.start_worker()
    pipeline.settle(load, *sent)
    assert differences(pipeline.digest(load), undisturbed)
    config = pipeline.config
    store = Store(config.clickhouse)
    report = audit(store, rules_of(config, config.kafka.partitions), *load.hours, sample=0, pauses_s=())
    store.close()
    assert {finding.check for finding in report.findings} >= {"fingerprint: fragments"}, report.findings
