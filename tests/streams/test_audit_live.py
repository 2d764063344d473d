"""An audit beside a worker that crosses an hour: no false alarm between any two of its writes, and nothing missed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pytest

from gpuledger.cli.database import migrate_database
from gpuledger.schemas.config import ClickHouse
from gpuledger.streams.audit import AuditReport, audit
from gpuledger.streams.ledger_rows import Version
from gpuledger.streams.marks import Marks, Ranges
from gpuledger.streams.recomputer import Recomputer
from tests.fixtures.clickhouse import ClickHouseDatabase
from tests.streams.small_ledger import (
    B200,
    END_MS,
    H100,
    HOUR_MS,
    MINUTE_MS,
    RULES,
    SEEN,
    START_MS,
    SmallLedger,
    batches,
    minute,
    world,
)

pytestmark = pytest.mark.services

#: The boundary: hour 0 ends, hour 1 begins.
BOUNDARY = minute(60)
POOLS = (B200, H100)


class Worker(Recomputer):
    """The recomputer, which calls `written` after every insert: the states that another process can see."""

    def __init__(self, ledger: SmallLedger) -> None:
        super().__init__(ledger.store, RULES)
        self.written: Callable[[], None] = lambda: None

    def _insert(self, table: str, column: str, rows: pa.Table, version: Version, *, by_day: bool = False) -> int:
        count = super()._insert(table, column, rows, version, by_day=by_day)
        self.written()
        return count


class Live:
    """A worker's time: what it has stored, marked and computed by then."""

    def __init__(self, ledger: SmallLedger) -> None:
        self.ledger = ledger
        self.worker = Worker(ledger)
        self.marked: dict[str, Ranges] = {}
        self.offset = 0
        self._unsent = later(batches(), 55 - SEEN[0])
        self._complete_ms = START_MS

    def until(self, now_ms: int, written: Callable[[], None] = lambda: None) -> None:
        """Everything that happens up to `now_ms`; `written` is called after every insert of the last pass."""
        ready = [batch for batch in self._unsent if last_ms(batch) <= now_ms]
        self._unsent = [batch for batch in self._unsent if last_ms(batch) > now_ms]
        marks = Marks()
        if ready:
            self.ledger.add_batches(ready)
            marks.add(
                H100, min(first_ms(batch) for batch in ready), max(last_ms(batch) for batch in ready), "telemetry"
            )
        open_ms = now_ms // MINUTE_MS * MINUTE_MS
        self.ledger.stored_until(now_ms)
        complete_ms = self.worker.complete_until_ms()
        for pool in POOLS:
            marks.add(pool, self._complete_ms, complete_ms, "complete")
            marks.add(pool, open_ms, open_ms + MINUTE_MS, "open")
        self._complete_ms = complete_ms
        self.marked = marks.merged()
        self.worker.written = written
        written()
        for pool, ranges in self.marked.items():
            self._compute(pool, ranges, open_ms + MINUTE_MS)
        # Acknowledged only now, as the dirty agent does it.
        self.marked, self.worker.written = {}, lambda: None

    def _compute(self, pool: str, ranges: Ranges, end_ms: int) -> None:
        """The newest minutes first and alone, then whole hours, the open one up to the end of its open minute."""
        self.offset += 1
        version = Version(1, self.offset, 5)
        self.worker.minutes(pool, max(START_MS, end_ms - 2 * MINUTE_MS), end_ms, version)
        for start, stop in ranges.widen(HOUR_MS):
            for hour in range(start, stop, HOUR_MS):
                self.worker.hours(pool, hour, min(hour + HOUR_MS, end_ms), version)

    def audited(self, *, waiting: bool = True, **options: Any) -> AuditReport:
        """As from another process: marks that are not acknowledged can be read from the broker."""
        known = dict(self.marked)
        defaults: dict[str, Any] = {"sample": 4, "pauses_s": (), "waiting": (lambda: known) if waiting else None}
        return audit(self.ledger.store, RULES, START_MS, END_MS, **{**defaults, **options})


def first_ms(batch: dict[str, Any]) -> int:
    return batch["devices"][0]["samples"][0][0] - batch["period_ms"]


def last_ms(batch: dict[str, Any]) -> int:
    return batch["devices"][0]["samples"][-1][0]


def later(some: list[dict[str, Any]], minutes: int) -> list[dict[str, Any]]:
    """The batches some minutes later."""

    def moved(device: dict[str, Any]) -> dict[str, Any]:
        before = device["previous_ts_ms"]
        samples = [(t + minutes * MINUTE_MS, *rest) for t, *rest in device["samples"]]
        return {**device, "previous_ts_ms": before and before + minutes * MINUTE_MS, "samples": samples}

    return [{**batch, "devices": [moved(device) for device in batch["devices"]]} for batch in some]


@pytest.fixture
def live(clickhouse_database: ClickHouseDatabase) -> Iterator[Live]:
    ledger = SmallLedger(ClickHouse(url=clickhouse_database.url, database=clickhouse_database.name))
    migrate_database(ledger.settings)
    ledger.add(*world())
    made = Live(ledger)
    made.until(BOUNDARY - 90_000)
    yield made
    ledger.store.close()


def tampered(live: Live, hour_min: int) -> AuditReport:
    """The audit of a ledger in which one row of a complete minute is changed; it is put right again afterwards."""
    where = f"pool = 'h100' AND minute = fromUnixTimestamp64Milli({minute(hour_min)}, 'UTC') AND kind = 'held'"
    live.ledger.sql(f"ALTER TABLE ledger_minute UPDATE gpu_us = gpu_us + 1 WHERE {where} AND tenant = 'acme'")
    report = live.audited()
    live.ledger.sql(f"ALTER TABLE ledger_minute UPDATE gpu_us = gpu_us - 1 WHERE {where} AND tenant = 'acme'")
    return report


def test_an_hour_is_crossed_without_a_false_alarm_and_nothing_is_missed(live: Live) -> None:
    """At every state between two inserts, before, at and after the boundary, and after each pass without its marks."""
    looks = 0

    def look() -> None:
        nonlocal looks
        looks += 1
        if looks % 4 == 1:  # the states before and after each insert come up in one of the passes
            assert live.audited(sample=0).findings == []

    complete: list[int] = []
    for second in (-20, 10, 75, 200):
        live.until(BOUNDARY + second * 1000, look if second in (10, 75) else lambda: None)
        report = live.audited(waiting=False)
        assert report.findings == [], f"{second} s after the boundary"
        complete.append(report.hours)
    assert looks > 20
    assert complete[0] == 0 and complete[-1] == len(POOLS), "the hour was never audited as a whole"
    assert live.ledger.store.rows("SELECT count() FROM v_gpu_minute")[0][0] > 20
    assert next((f.pool, f.at_ms) for f in tampered(live, 40).findings) == (H100, minute(40))


@pytest.mark.parametrize("second", [-20, 10, 75])
def test_what_is_wrong_is_named_on_either_side_of_the_boundary(live: Live, second: int) -> None:
    """Also while the open hour's marks wait, of which there always are some."""
    live.until(BOUNDARY + second * 1000)
    live.marked = {pool: Ranges([(BOUNDARY - MINUTE_MS, BOUNDARY + MINUTE_MS)]) for pool in POOLS}
    report = tampered(live, 40)
    assert not report.balanced and (report.findings[0].pool, report.findings[0].at_ms) == (H100, minute(40))
    assert live.audited().balanced


def test_a_worker_that_stops_before_the_hours_is_named_once_its_marks_are_gone(live: Live) -> None:
    """Minutes were written and the hour was not: while the marks wait nothing is said, lost they are a finding."""
    live.until(BOUNDARY + 200_000)
    before = f"< fromUnixTimestamp64Milli({BOUNDARY}, 'UTC')"
    live.ledger.sql(f"ALTER TABLE charges DELETE WHERE interval_start {before}")
    found = live.audited().findings
    assert {(f.pool, f.check) for f in found} == {(H100, "price interval")}
    assert [f.at_ms for f in found] == [minute(n) for n in (0, 15, 20, 30, 45)]
    for table in ("ledger_gpu_hour", "ledger_job_hour"):
        live.ledger.sql(f"ALTER TABLE {table} DELETE WHERE hour {before}")
    live.marked = {pool: Ranges([(BOUNDARY - MINUTE_MS, BOUNDARY)]) for pool in POOLS}
    assert live.audited().balanced
    live.marked = {}
    assert {(B200, "hour"), (H100, "hour")} <= {(f.pool, f.unit) for f in live.audited().findings}
