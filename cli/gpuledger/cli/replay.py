"""`gpuledger replay`: what happened on a real cluster, through the same topics and workers as live telemetry.

Totals per tenant go to standard output (a table, JSON or CSV); progress, rate and what did not fit to standard error.
"""

from __future__ import annotations

import asyncio
import csv
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from gpuledger.agents.messages import Message
from gpuledger.agents.publisher import Delivered, Publisher
from gpuledger.agents.replay.complete import wait_for_ledger
from gpuledger.agents.replay.exceptions import TraceError
from gpuledger.agents.replay.facts import JobReplay, Replay, Scope, Window
from gpuledger.agents.replay.helios import HeliosReplay, read_helios
from gpuledger.agents.replay.openb import read_openb_fleet, read_openb_jobs
from gpuledger.agents.replay.place import place
from gpuledger.agents.replay.replayer import Sent, Sink, send
from gpuledger.agents.replay.rows import parse_time_ms
from gpuledger.agents.replay.trace import Fleet, TraceJob, read_fleet, read_jobs
from gpuledger.cli.database import data_option, database, read_running
from gpuledger.cli.exceptions import CommandError
from gpuledger.cli.output import Column, Format, format_option, write_rows
from gpuledger.cli.replay_progress import Bar, Lines
from gpuledger.cli.session import Session, pass_session
from gpuledger.schemas.config import Kafka
from gpuledger.schemas.events import Source

__all__ = ["replay"]

F = TypeVar("F", bound=Callable[..., Any])

_GPU_HOUR_US = 3_600_000_000
#: Of a list of jobs on standard error; the report has them all.
_SHOWN = 5
_NAME_LIMIT = 64
_COLUMNS = (Column("tenant"), Column("held_gpu_us", exact=True), Column("committed_gpu_us", exact=True))


class _Moment(click.ParamType):
    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return parse_time_ms(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


@dataclass(slots=True)
class _Options:
    """What all three commands share."""

    session: Session
    name: str
    from_ms: int | None
    to_ms: int | None
    clip: bool
    revision: int
    tenants: bool
    on_error: str
    report: Path | None
    bootstrap: str | None
    data: Path | None
    dry_run: bool
    wait: bool
    wait_timeout_s: int
    layout: Format
    rejected: list[TraceError] = field(default_factory=list[TraceError])

    def prepare(self) -> None:
        """Raises CommandError where options contradict each other."""
        if not self.name.isprintable() or not 0 < len(self.name) <= _NAME_LIMIT:
            raise CommandError(f"--name: expected 1 to {_NAME_LIMIT} printable characters, got {self.name[:80]!r}")
        if self.from_ms is not None and self.to_ms is not None and self.to_ms <= self.from_ms:
            raise CommandError("--to: must be after --from")
        if self.clip and self.from_ms is None and self.to_ms is None:
            raise CommandError("--clip: needs --from or --to")
        if self.wait and self.dry_run:
            raise CommandError("--wait: nothing is sent in a --dry-run; leave out one of them")

    def scope(self, source: Source, as_it_happened: bool = False) -> Scope:
        window = Window(self.from_ms, self.to_ms, self.clip)
        return Scope(self.name, source, self.revision, window, self.tenants, as_it_happened)

    def on_reject(self, error: TraceError) -> None:
        if self.on_error == "stop":
            raise error
        self.rejected.append(error)

    def write_report(self, unplaced: Sequence[tuple[str, str]]) -> None:
        """Lists what was skipped and what fits nowhere; writes no file where there is nothing to say."""
        if not self.rejected and not unplaced:
            return
        path = self.report if self.report is not None else Path(f"gpuledger-replay-{self.name.replace('/', '_')}.csv")
        try:
            with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as out:
                writer = csv.writer(out)
                writer.writerow(("what", "file", "line", "field", "value", "problem"))
                for error in self.rejected:
                    writer.writerow(("skipped", error.file, error.line, error.field, error.value, error.problem))
                writer.writerows(("unplaced", "", "", "job_id", job_id, problem) for job_id, problem in unplaced)
        except OSError as error:
            raise CommandError(f"--report: cannot write {path}: {error.strerror or error}") from error
        click.echo(
            f"{len(self.rejected):,} rows skipped, {len(unplaced):,} jobs not placed: listed in {path}", err=True
        )

    def kafka(self) -> Kafka:
        settings = self.session.config.kafka
        if self.bootstrap is not None:
            return msgspec.structs.replace(settings, bootstrap=self.bootstrap)
        if self.data is None:
            return settings
        running = read_running(self.data)
        if running is None:
            raise CommandError(f"--data: nothing runs on {self.data}; start it with: gpuledger up --data {self.data}")
        return msgspec.structs.replace(settings, bootstrap=running.kafka_bootstrap)


def _common(command: F) -> F:
    """The options of all replays: a command takes them as keyword arguments and hands them to `_Options`."""
    moment = _Moment()
    for option in reversed(
        (
            click.option("--name", default="", metavar="NAME", help="Begins every id.  [default: the trace's name]"),
            click.option("--from", "from_ms", type=moment, metavar="TIME", help="ISO 8601 with zone or Unix seconds."),
            click.option("--to", "to_ms", type=moment, metavar="TIME", help="What overlaps [from, to) is sent, whole."),
            click.option("--clip", is_flag=True, help="Cut it to the window; for a ledger without the whole replay."),
            click.option("--revision", default=1, type=click.IntRange(0, 2**40), help="Raise it to correct a replay."),
            click.option("--tenants/--no-tenants", default=True, help="Each account is a tenant; no: use the map."),
            click.option("--on-error", type=click.Choice(["stop", "skip"]), default="stop", show_default=True),
            click.option(
                "--report",
                type=click.Path(dir_okay=False, path_type=Path),
                metavar="FILE",
                help="CSV of skipped rows and unplaced jobs, if any.  [default: gpuledger-replay-NAME.csv]",
            ),
            click.option("--bootstrap", metavar="HOST:PORT", help="Kafka; overrides the configuration."),
            data_option,
            click.option("--dry-run", is_flag=True, help="Read, place and total; send nothing."),
            click.option("--wait", is_flag=True, help="Return only when the ledger holds all of it."),
            click.option("--wait-timeout", "wait_timeout_s", default=1200, type=click.IntRange(1), metavar="SECONDS"),
            format_option,
        )
    ):
        command = option(command)
    return command


@click.group()
def replay() -> None:
    """Publish a real cluster trace. Running it twice changes nothing."""


@replay.command()
@click.argument("trace", type=click.Path(path_type=Path))
@click.option("--fleet", "fleet_path", type=click.Path(path_type=Path), required=True, metavar="FLEET.csv")
@click.option("--source", type=click.Choice(["slurm", "kubernetes", "manual"]), default="manual", show_default=True)
@click.option("--as-it-happened", is_flag=True, help="Send each start, then its end as a correction.")
@_common
@pass_session
def jobs(session: Session, trace: Path, fleet_path: Path, source: Source, as_it_happened: bool, **shared: Any) -> None:
    """Replay a job trace.

    TRACE is CSV (or .csv.gz): job_id, account, user, start, end, and gpus or gpu_milli (thousandths of one GPU, or of
    several in multiples of 1000); optionally node, gpu_index, submitted, model, state. Times are Unix seconds or ISO
    8601 with a zone. An empty end: it still runs; an empty start: it never ran. Several nodes and their GPU indexes
    are separated by semicolons: "n1;n2" and "0-3;0,1".

    FLEET.csv: node, gpus, model, pool, site. Jobs without a node are placed first-fit in its order.
    """
    options = _Options(session, **_named(shared, trace.name.removesuffix(".gz").removesuffix(".csv")))
    options.prepare()
    scope = options.scope(source, as_it_happened)
    fleet = read_fleet(fleet_path, options.on_reject)
    _replay_jobs(options, scope, fleet, read_jobs(trace, int(time.time() * 1000), options.on_reject))


@replay.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@_common
@pass_session
def openb(session: Session, folder: Path, **shared: Any) -> None:
    """Replay Alibaba's openb trace of 2023: FOLDER holds openb_node_list_gpu_node.csv and openb_pod_list_default.csv.

    Second 0 is 2023-01-01T00:00:00Z; tenant is the pod's qos; one pool per GPU model.
    """
    options = _Options(session, **_named(shared, "openb"))
    options.prepare()
    scope = options.scope("kubernetes")
    fleet = read_openb_fleet(folder, options.on_reject)
    _replay_jobs(options, scope, fleet, read_openb_jobs(folder, options.on_reject))


@replay.command()
@click.argument("file", type=click.Path(exists=True, path_type=Path))
@click.option("--usage/--no-usage", default=True, help="Also the GPUs that ran, as one job per virtual cluster.")
@_common
@pass_session
def helios(session: Session, file: Path, usage: bool, **shared: Any) -> None:
    """Replay the capacity of Helios' virtual clusters: FILE is vc_5min.csv or .csv.gz, or its folder.

    Tenant is the virtual cluster; what one loses while another gains is a transfer. Times are taken as UTC.
    """
    options = _Options(session, **_named(shared, "helios-earth"))
    options.prepare()
    scope = options.scope("slurm")
    trace = read_helios(file, options.on_reject)
    if trace.gaps:
        click.echo(f"{trace.gaps} readings hold for longer than a step: the next one is missing", err=True)
    told = HeliosReplay(trace, scope, usage)
    click.echo(f"{len(told.facts.commitments)} commitments, {len(told.facts.transfers)} transfers", err=True)
    _run(options, told)


def _named(shared: dict[str, Any], default: str) -> dict[str, Any]:
    return {**shared, "name": shared["name"] or default}


def _replay_jobs(options: _Options, scope: Scope, fleet: Fleet, jobs: Iterable[TraceJob]) -> None:
    placement = place(jobs, fleet)
    told = JobReplay(placement, fleet, scope)
    if told.oversubscribed:
        shown = ", ".join(told.oversubscribed[:_SHOWN])
        click.echo(
            f"{len(told.oversubscribed)} jobs name a GPU that was full (conflicts in the ledger): {shown}", err=True
        )
    for placed in told.unplaced[:_SHOWN]:
        click.echo(f"not placed: {placed.job.job_id} ({placed.job.gpus} GPUs): {placed.problem}", err=True)
    _run(options, told, [(placed.job.job_id, placed.problem) for placed in told.unplaced])


def _run(options: _Options, told: Replay, unplaced: Sequence[tuple[str, str]] = ()) -> None:
    # Before anything is sent: what does not fit is known by now, and a broker that fails must not hide it.
    options.write_report(unplaced)
    sent = asyncio.run(_send(options, told))
    totals = sent.totals
    verb = "counted" if options.dry_run else "sent"
    click.echo(
        f"{verb} {sent.events:,} events in {sent.seconds:.1f} s ({sent.events_per_second:,} per second): "
        f"{len(totals.job_ids):,} jobs, {totals.gpus:,} GPUs, {totals.events['allocation']:,} allocations",
        err=True,
    )
    if totals.open_ended:
        click.echo(f"{totals.open_ended:,} allocations have no end and are in no total", err=True)
    if totals.unplaced_gpu_us:
        hours = totals.unplaced_gpu_us.total() // _GPU_HOUR_US
        click.echo(f"{len(totals.unplaced_gpu_us):,} jobs on no known GPU, {hours:,} GPU-hours of the total", err=True)
    tenants = sorted(totals.held_gpu_us.keys() | totals.committed_gpu_us.keys())
    rows = [
        {
            "tenant": tenant,
            "held_gpu_us": totals.held_gpu_us[tenant],
            "committed_gpu_us": totals.committed_gpu_us[tenant],
        }
        for tenant in tenants
    ]
    write_rows(_COLUMNS, rows, options.layout, title=options.name)


class _Nowhere:
    """The sink of a dry run."""

    async def publish_many(self, messages: Iterable[Message], /) -> list[Delivered]:
        return [Delivered(message.topic, 0, 0, 0) for message in messages]


async def _send(options: _Options, told: Replay) -> Sent:
    if options.dry_run:
        return await send(told, _Nowhere())
    async with Publisher(options.kafka(), client_id="gpuledger-replay") as publisher:
        with Bar(options.name) as bar:
            sent = await send(told, publisher, bar.show)
        if options.wait:
            await _wait(options, sent, publisher)
    return sent


async def _wait(options: _Options, sent: Sent, sink: Sink) -> None:
    lines = Lines()
    with database(options.session, options.data) as client:
        seconds = await wait_for_ledger(
            client,
            sent,
            sink,
            timeout_s=options.wait_timeout_s,
            waiting=lambda what, behind: lines.show(f"waiting for {what}: {behind:,} messages before it"),
        )
    click.echo(f"the ledger is complete after {seconds:.1f} s more", err=True)
