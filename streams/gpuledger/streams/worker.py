"""One worker process: what is done before the Faust app runs, its health endpoints, and its end."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faust

from gpuledger.agents.broker_topics import create_topics
from gpuledger.agents.health import HealthServer, Metric, prometheus_text
from gpuledger.schemas.config import Config, parse_listen
from gpuledger.schemas.migrate import pending
from gpuledger.streams.app import Pipeline, make_pipeline, rules_of
from gpuledger.streams.brokers import current_epoch, end_offsets, partition_counts
from gpuledger.streams.exceptions import NotMigrated
from gpuledger.streams.intake import Barrier
from gpuledger.streams.store import Store

__all__ = ["metrics_of", "run_worker"]

log = logging.getLogger(__name__)


async def _partitions(config: Config) -> tuple[dict[str, int], dict[int, int]]:
    await create_topics(config.kafka)
    counts = await partition_counts(config.kafka)
    return counts, await end_offsets(config.kafka, "dirty", counts["dirty"])


def run_worker(config: Config, datadir: Path, barrier: Callable[[str], Barrier] | None = None) -> None:
    """Consumes, stores and computes until SIGTERM; then finishes the block in flight within ten seconds.

    Raises:
        NotMigrated: the database lacks tables.
        BrokerUnavailable: no broker answered.
        SystemExit: at the end, by Faust; not 0 when the worker crashed.
    """
    partitions, dirty_ends = asyncio.run(_partitions(config))
    store = Store(config.clickhouse)
    todo = pending(lambda sql: store.rows(sql), lambda sql, parameters=None: store.client.command(sql, parameters))
    if todo:
        names = ", ".join(migration.name for migration in todo)
        raise NotMigrated(
            f"database {config.clickhouse.database}: not applied yet: {names}; run `gpuledger db migrate`"
        )
    epoch = current_epoch(store, dirty_ends)
    store.close()
    pipeline = make_pipeline(config, rules_of(config, partitions), epoch, partitions["dirty"], datadir, barrier)
    _serve_health(config, pipeline)
    log.info("worker starts", extra={"group": config.worker.group, "epoch": epoch, "partitions": partitions})
    worker = faust.Worker(pipeline.app, loglevel=None, override_logging=False, quiet=True)
    worker.spinner = None  # it writes terminal escapes into the log
    worker.execute_from_commandline()


def _serve_health(config: Config, pipeline: Pipeline) -> None:
    def ready() -> tuple[bool, str]:
        # Untyped: Faust gives the consumer after it has started.
        consumer: Any = pipeline.app.consumer
        assigned = len(consumer.assignment()) if consumer.started else 0
        return assigned > 0, f"{assigned} partitions assigned"

    server = HealthServer(
        healthy=lambda: (True, "alive"), ready=ready, metrics=lambda: prometheus_text(metrics_of(pipeline))
    )

    @pipeline.app.task
    async def health() -> None:
        host, port = await server.start(*parse_listen(config.worker.listen))
        log.info("health on %s:%d", host, port)
        try:
            await asyncio.Event().wait()
        finally:
            await server.close()

    del health


def metrics_of(pipeline: Pipeline) -> list[Metric]:
    """The pipeline's own figures, in Prometheus' units."""
    out: list[Metric] = []

    def add(name: str, kind: str, help_: str, value: int | float | None) -> None:
        out.append(Metric(f"gpuledger_worker_{name}", kind, help_, value))

    for topic, stats in pipeline.intake.items():
        add(f"{topic}_records_total", "counter", f"Records of {topic} taken.", stats.records)
        add(f"{topic}_stored_total", "counter", f"Records of {topic} stored.", stats.stored)
        add(f"{topic}_retries_total", "counter", f"Attempts repeated for {topic}.", stats.retries)
        add(f"{topic}_dead_letters_total", "counter", f"Records of {topic} dead-lettered.", stats.dead_letters)
        add(f"{topic}_store_seconds_total", "counter", f"Time in store for {topic}.", stats.store_us / 1e6)
    dirty, frontier = pipeline.dirty, pipeline.frontier
    add("dirty_marks_total", "counter", "Dirty marks taken.", dirty.marks)
    add("slices_total", "counter", "Slices of the ledger computed.", dirty.slices)
    add("ledger_rows_total", "counter", "Ledger rows written.", dirty.rows)
    add("slice_retries_total", "counter", "Slices that failed and were repeated.", dirty.retries)
    add("recompute_seconds_total", "counter", "Time in slices.", dirty.busy_ms / 1e3)
    add("last_live_seconds", "gauge", "What the last live slice took.", dirty.last_live_ms / 1e3)
    add("backlog_blocks", "gauge", "Blocks of marks not worked off.", dirty.backlog_blocks)
    add("backlog_minutes", "gauge", "Minutes (of all pools) still to compute.", dirty.backlog_minutes)
    complete = frontier.complete_until_ms
    lag = None if complete == 0 else (time.time_ns() // 1_000_000 - complete) / 1e3
    add("completeness_lag_seconds", "gauge", "Age of the newest complete minute's end.", lag)
    add("frontier_failures_total", "counter", "Passes of the frontier that failed.", frontier.failures)
    add("alerts_published_total", "counter", "Alerts that began or ended.", pipeline.alerts_published)
    add("alert_looks_failed_total", "counter", "Looks for under-use that failed.", pipeline.alerts_failed)
    add("ticks_failed_total", "counter", "Ticks that could not be sent.", pipeline.ticks_failed)
    return out
