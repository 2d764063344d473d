"""`gpuledger ledger explain`: why the ledger says what it says of one GPU in one minute."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from gpuledger.cli.broker_offsets import BrokerAway
from gpuledger.cli.database import data_option
from gpuledger.cli.exceptions import CommandError
from gpuledger.cli.ledger_store import Access, opened
from gpuledger.cli.moments import MOMENT_MS
from gpuledger.cli.session import Session, pass_session
from gpuledger.schemas.config import Kafka

if TYPE_CHECKING:
    from gpuledger.cli.batch_samples import Sample
    from gpuledger.streams.explain import VersionMarks
    from gpuledger.streams.explanation import Explanation, Mark, MinuteVersion

__all__ = ["explain"]


@click.command()
@click.argument("gpu")
@click.argument("minute_ms", type=MOMENT_MS, metavar="MINUTE")
@click.option("--marks", is_flag=True, help="Ask the broker when and why each computation of the minute was made.")
@click.option("--samples", is_flag=True, help="Ask the broker for the samples that the fragments were made from.")
@click.option("--full", is_flag=True, help="Every line, however many.")
@click.option("--json", "as_json", is_flag=True, help="All of it as one JSON object; exact numbers as text.")
@data_option
@pass_session
def explain(
    session: Session,
    gpu: str,
    minute_ms: int,
    marks: bool,
    samples: bool,
    full: bool,
    as_json: bool,
    data: Path | None,
) -> None:
    """Show why the ledger says what it says of GPU in the minute that starts at MINUTE (ISO 8601 with a zone).

    The segments and that they sum to the GPU's time; the allocations, account map rules, placements and fragments
    they come from; gaps and conflicts; every older revision of these facts and every computation of the minute that
    is still stored; and the price interval's money with the minute's share. It says plainly what is not known.
    """
    with opened(session, data) as access, _broker(session, access, data, marks or samples) as kafka:
        # Here and not above: numpy and pyarrow take a second, which `--help` should not.
        from gpuledger.cli.explain_text import as_json as to_json
        from gpuledger.cli.explain_text import as_text
        from gpuledger.streams.explain import UnknownGPU
        from gpuledger.streams.explain import explain as explained

        try:
            now_ms = time.time_ns() // 1_000_000
            asking = _asking(kafka) if marks and kafka is not None else None
            found = explained(access.store, access.rules, gpu, minute_ms, now_ms=now_ms, marks=asking)
        except UnknownGPU as error:
            close = f"; similar names: {', '.join(error.close)}" if error.close else "; no GPU is known yet"
            raise CommandError(f"GPU: nothing that is stored names {gpu!r}{close}") from error
        read = _samples(kafka, found) if samples and kafka is not None else None
    if as_json:
        answer = to_json(found) | ({} if read is None else {"samples": to_json(read)})
        click.echo(json.dumps(answer, indent=2, ensure_ascii=False))
    else:
        for line in as_text(found, full=full, samples=read):
            click.echo(line)


@contextmanager
def _broker(session: Session, access: Access, data: Path | None, wanted: bool) -> Generator[Kafka | None]:
    """The broker to ask; None where it is not wanted or there is none. One of a directory on which nothing runs is
    started for the call."""
    if not wanted:
        yield None
    elif access.kafka is not None:
        yield access.kafka
    elif data is not None and (data / "kafka").is_dir():
        # Here and not above: only a directory on which nothing runs needs a broker of our own.
        from gpuledger.local.kafka import EmbeddedKafka

        with EmbeddedKafka(data / "kafka") as broker:
            yield msgspec.structs.replace(session.config.kafka, bootstrap=broker.bootstrap)
    else:
        click.echo("note: no broker is known; it cannot be asked", err=True)
        yield None


def _samples(kafka: Kafka, found: Explanation) -> list[Sample]:
    from gpuledger.cli.batch_samples import batch_samples

    try:
        return batch_samples(kafka, found.gpu, found.fragments)
    except BrokerAway as error:
        click.echo(f"note: {error}; samples cannot be shown", err=True)
        return []


def _asking(kafka: Kafka) -> VersionMarks:
    def ask(pool: str, minute_ms: int, versions: Sequence[MinuteVersion]) -> Mapping[int, list[Mark]]:
        from gpuledger.cli.marks_of_versions import marks_of_versions

        try:
            return marks_of_versions(kafka, pool, minute_ms, [each.offset for each in versions])
        except BrokerAway as error:
            click.echo(f"note: {error}; when and why each computation was made cannot be told", err=True)
            return {}

    return ask
