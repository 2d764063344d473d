"""The Faust app: the whole topology on one screen.

telemetry                                    → TelemetrySink → fragments            ┐
allocations inventory jobs capacity rates    → FactsSink     → facts, typed tables  ├→ dirty
dirty                                        → DirtyQueue    → ledger, charges      ┘
alerts                                       → FactsSink     → alerts
deadletter                                   → DeadLetterSink → dead_letters
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import faust
from faust.types import TP

from gpuledger.agents.messages import Message, event_message
from gpuledger.agents.publisher import Publisher
from gpuledger.schemas.config import Config
from gpuledger.schemas.events import Alert, Dirty, encode_event
from gpuledger.schemas.topics import TOPICS, topic_name
from gpuledger.streams.alert_watch import AlertWatch
from gpuledger.streams.blocks import Record, block_topic, faust_settings
from gpuledger.streams.brokers import Ticker, faust_credentials
from gpuledger.streams.dirty import Pace
from gpuledger.streams.dirty_agent import DirtyStats, take_dirty
from gpuledger.streams.frontier import Frontier, FrontierStats
from gpuledger.streams.intake import Barrier, IntakeLimits, IntakeStats, intake, no_barrier
from gpuledger.streams.letters import letter_of
from gpuledger.streams.recomputer import LedgerRules, Recomputer
from gpuledger.streams.sinks import AlertsSink, DeadLetterSink, FactsSink, TelemetrySink
from gpuledger.streams.store import Store, is_io_error
from gpuledger.streams.webhook import WebhookSender

__all__ = ["Pipeline", "make_pipeline", "rules_of"]

log = logging.getLogger(__name__)

FACT_TOPICS = ("allocations", "inventory", "jobs", "capacity", "rates")
_WATCH_EVERY_S = 5.0
GATES = tuple(name for name, topic in TOPICS.items() if topic.gates)


def rules_of(config: Config, partitions: dict[str, int]) -> LedgerRules:
    """What all processes of the ledger agree on; `partitions` of each topic as the broker has them."""
    return LedgerRules(
        grace_ms=config.ledger.grace_s * 1000,
        confirm_ms=config.ledger.confirm_window_s * 1000,
        price_interval_minutes=config.ledger.price_interval_minutes,
        gates={name: partitions[name] for name in GATES},
        ahead_ms=config.ledger.max_clock_ahead_s * 1000,
    )


@dataclass(slots=True)
class Pipeline:
    """The app and what /metrics reads of it."""

    app: faust.App
    publisher: Publisher
    intake: dict[str, IntakeStats] = field(default_factory=dict[str, IntakeStats])
    dirty: DirtyStats = field(default_factory=DirtyStats)
    frontier: FrontierStats = field(default_factory=FrontierStats)
    ticks_failed: int = 0
    alerts_published: int = 0
    alerts_failed: int = 0


def make_pipeline(
    config: Config,
    rules: LedgerRules,
    epoch: int,
    dirty_partitions: int,
    datadir: Path,
    barrier: Callable[[str], Barrier] | None = None,
) -> Pipeline:
    """Puts the app together; nothing connects before it runs.

    `dirty_partitions`: how many the topic of marks has. `barrier` gives for each agent a hook that fault tests wait in
    (see `intake.Barrier`).
    """
    kafka, worker = config.kafka, config.worker
    settings = faust_settings(worker.group, kafka.bootstrap.split(","), datadir, **faust_credentials(kafka))
    app = faust.App(**settings)
    publisher = Publisher(kafka, client_id=f"{worker.group}-worker")
    pipeline = Pipeline(app, publisher)
    hook = barrier or (lambda _: no_barrier)
    limits = IntakeLimits(max_records=worker.batch_max_records, linger_ms=worker.batch_linger_ms)

    async def mark(event: Dirty) -> None:
        await publisher.publish_many([event_message(event)])

    async def dead_letter(record: Record, reason: str) -> None:
        letter = letter_of(record, reason)
        key = f"{letter.topic}/{letter.partition}/{letter.offset}"
        await publisher.publish_many([Message("deadletter", key, encode_event(letter))])

    def consume(name: str, make_sink: Callable[[], Any]) -> None:
        stats = pipeline.intake[name] = IntakeStats()

        async def agent(stream: Any) -> None:
            await intake(
                stream,
                sink=make_sink(),
                dead_letter=dead_letter,
                is_io_error=is_io_error,
                limits=limits,
                stats=stats,
                barrier=hook(name),
            )

        app.agent(block_topic(app, topic_name(kafka.topic_prefix, name)), name=name)(agent)

    consume("telemetry", lambda: TelemetrySink(Store(config.clickhouse), mark, rules))
    for name in FACT_TOPICS:
        consume(name, lambda name=name: FactsSink(Store(config.clickhouse), name, mark, rules.ahead_ms))
    hooks = [WebhookSender(webhook) for webhook in config.alerts.webhooks]
    consume("alerts", lambda: AlertsSink(Store(config.clickhouse), mark, rules.ahead_ms, lambda a: _tell(hooks, a)))
    consume("deadletter", lambda: DeadLetterSink(Store(config.clickhouse)))

    dirty_topic = block_topic(app, topic_name(kafka.topic_prefix, "dirty"))
    pace = Pace(rules.unit_ms, live_every_ms=worker.live_every_ms, slice_ms=worker.slice_ms)

    @app.agent(dirty_topic, name="dirty")
    async def dirty(stream: Any) -> None:
        store = Store(config.clickhouse)
        await take_dirty(
            stream,
            store=store,
            recomputer=Recomputer(store, rules),
            pace=pace,
            epoch=lambda: epoch,
            partitions=dirty_partitions,
            dead_letter=dead_letter,
            stats=pipeline.dirty,
            barrier=hook("dirty"),
        )

    frontier = Frontier(Store(config.clickhouse), rules, mark)
    frontier.stats = pipeline.frontier
    ticker = Ticker(kafka, rules.gates)
    leads = TP(topic_name(kafka.topic_prefix, "dirty"), 0)

    @app.timer(interval=worker.live_every_ms / 1000)
    async def advance() -> None:
        if leads in app.consumer.assignment():
            await frontier.advance(time.time_ns() // 1_000_000)

    @app.timer(interval=1.0)
    async def tick() -> None:
        if leads in app.consumer.assignment():
            try:
                await ticker.tick()
            except Exception as error:
                pipeline.ticks_failed += 1
                log.warning("ticks not sent: %s", error)

    watch = AlertWatch(
        Store(config.clickhouse),
        rules,
        config.alerts.reserved_unused,
        lambda alert: publisher.publish_many([event_message(alert)]),
    )

    @app.timer(interval=_WATCH_EVERY_S)
    async def look_for_under_use() -> None:
        if leads in app.consumer.assignment():
            await watch.look()
            pipeline.alerts_published, pipeline.alerts_failed = watch.published, watch.failures

    @app.task
    async def close_with_the_app() -> None:
        for sender in hooks:
            sender.start()
        try:
            await asyncio.Event().wait()
        finally:
            closing = [ticker.stop(), publisher.close(), *(sender.close() for sender in hooks)]
            await asyncio.gather(*closing, return_exceptions=True)

    # Faust registers by decoration.
    del dirty, advance, tick, look_for_under_use, close_with_the_app
    return pipeline


def _tell(senders: Sequence[WebhookSender], alert: Alert) -> None:
    for sender in senders:
        sender.offer(alert)
