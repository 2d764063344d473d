"""How a command reaches the ledger: the worker's own `Store`, the rules that hold, and the broker where one runs."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from gpuledger.cli.database import connected, read_running, served_database
from gpuledger.cli.session import Session
from gpuledger.schemas.config import Config, Kafka

if TYPE_CHECKING:
    from gpuledger.streams.recomputer import LedgerRules
    from gpuledger.streams.store import Store

__all__ = ["Access", "opened"]


@dataclass(frozen=True, slots=True)
class Access:
    """`kafka` None: nothing runs on the data directory, so no worker computes and the directory is ours."""

    store: Store
    rules: LedgerRules
    kafka: Kafka | None


@contextmanager
def opened(session: Session, data: Path | None) -> Generator[Access]:
    """The ledger of the configured server, of a running `gpuledger up`, or of a directory on which nothing runs.

    Raises what `gpuledger.cli.database.database` raises.
    """
    # Here and not above: numpy, pyarrow and Faust take a second, which `--help` should not.
    from gpuledger.streams.store import Store

    config = session.config
    running = read_running(data) if data is not None else None
    with served_database(session, data) as settings, connected(settings):
        store = Store(settings)
        try:
            kafka: Kafka | None = config.kafka
            if running is not None:
                kafka = msgspec.structs.replace(config.kafka, bootstrap=running.kafka_bootstrap)
            elif data is not None:
                kafka = None
            yield Access(store, _rules(config, store), kafka)
        finally:
            store.close()


def _rules(config: Config, store: Store) -> LedgerRules:
    """As the worker has them. It ticks every partition that the broker has, so those that have told something are all;
    before it has run the configuration says."""
    from gpuledger.streams.app import rules_of

    rows = store.rows("SELECT topic, max(partition) + 1 FROM progress GROUP BY topic")
    return rules_of(config, config.kafka.partitions | {topic: int(count) for topic, count in rows})
