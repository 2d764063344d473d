"""`gpuledger audit`: the proof, for people and for scripts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.exceptions import Exit

from gpuledger.cli.broker_offsets import BrokerAway, waiting_marks
from gpuledger.cli.database import data_option
from gpuledger.cli.exceptions import CommandError
from gpuledger.cli.ledger_store import Access, opened
from gpuledger.cli.moments import iso, range_options, time_range
from gpuledger.cli.scheduler_check import compare_with_scheduler, zone_of
from gpuledger.cli.session import Session, pass_session
from gpuledger.schemas.config import Config

if TYPE_CHECKING:
    from gpuledger.streams.audit import AuditReport, Finding
    from gpuledger.streams.marks import Ranges

__all__ = ["audit"]


@click.command()
@range_options
@click.option("--pool", "pools", multiple=True, metavar="POOL", help="Only this pool; repeat for more.")
@click.option("--sample", default=20, show_default=True, type=click.IntRange(0), help="Minutes to compute again.")
@click.option("--seed", default=0, show_default=True, type=int, help="Which minutes: the same seed draws the same.")
@click.option(
    "--against-scheduler",
    "accounts",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Compare with what sacct prints instead: sacct -P -o JobIDRaw,Account,User,State,Start,End,AllocTRES,NodeList,"
    "ElapsedRaw (or CSV with these columns).",
)
@click.option(
    "--tolerance",
    "tolerance_s",
    default=0,
    show_default=True,
    type=click.IntRange(0),
    metavar="SECONDS",
    help="By how much each GPU of a job may differ from the scheduler, beyond the second that sacct rounds away.",
)
@click.option("--timezone", metavar="ZONE", help="Zone of the file's times, as Europe/Oslo.  [default: this machine's]")
@click.option("--utc", is_flag=True, help="The file's times are UTC (sacct ran with TZ=UTC).")
@click.option("--json", "as_json", is_flag=True, help="The report as one JSON object; exact numbers as text.")
@data_option
@pass_session
def audit(
    session: Session,
    from_ms: int | None,
    to_ms: int | None,
    pools: tuple[str, ...],
    sample: int,
    seed: int,
    accounts: Path | None,
    tolerance_s: int,
    timezone: str | None,
    utc: bool,
    as_json: bool,
    data: Path | None,
) -> None:
    """Prove that every GPU-second of a range is accounted exactly once.

    Checks that the segments of every complete minute sum to the GPU time in service; that GPU minutes, hours, jobs
    and charges are sums of the same time; that asset costs are divided to the last nano-unit; that every row is as it
    was written; that every minute was computed from all that is stored by now; and a sample row by row. Open minutes
    and hours are left out, and counted.

    Exit status 0 when all is right, 1 when not: then the first failing pool, GPU and minute are named.

    With --against-scheduler the GPU time of each job and account is compared with the scheduler's own accounts
    instead, over whole hours, and what differs is printed with its likely cause. Exit status 1 where anything does.
    """
    bounds = time_range(from_ms, to_ms)
    zone = zone_of(timezone, utc)
    if accounts is None and (zone is not None or tolerance_s):
        raise CommandError("--tolerance, --timezone and --utc say how to compare; they need --against-scheduler FILE")
    with opened(session, data) as access:
        from gpuledger.streams.audit import PAUSES_S
        from gpuledger.streams.audit import audit as prove

        _check_pools(access, pools)
        if accounts is not None:
            if not compare_with_scheduler(access, accounts, bounds, pools, zone, tolerance_s, as_json):
                raise Exit(1)
            return
        # Where nothing runs, nothing is being computed either: there is nothing to wait for.
        report = prove(
            access.store,
            access.rules,
            *bounds,
            sample=sample,
            seed=seed,
            pools=pools or None,
            waiting=_waiting(session.config, access, data),
            pauses_s=() if access.kafka is None else PAUSES_S,
        )
    if as_json:
        click.echo(json.dumps(_as_json(report), indent=2, ensure_ascii=False))
    else:
        _print(report)
    if not report.balanced:
        raise Exit(1)


def _check_pools(access: Access, pools: tuple[str, ...]) -> None:
    known = access.store.pools()
    for pool in pools:
        if pool not in known:
            raise CommandError(f"--pool: there is no pool {pool!r}; known: {', '.join(known) or 'none yet'}")


def _waiting(config: Config, access: Access, data: Path | None) -> Callable[[], Mapping[str, Ranges]]:
    """Asked only when something is found: what is marked, and waits for a worker, is no lost mark."""

    def read() -> Mapping[str, Ranges]:
        rows = access.store.rows("SELECT partition, max(offset) FROM progress WHERE topic = 'dirty' GROUP BY partition")
        done = {int(partition): int(offset) for partition, offset in rows}
        try:
            if access.kafka is not None:
                return waiting_marks(access.kafka, done)
            if data is None or not (data / "kafka").is_dir():
                return {}
            # Here and not above: only a directory on which nothing runs needs a broker of our own.
            import msgspec

            from gpuledger.local.kafka import EmbeddedKafka

            with EmbeddedKafka(data / "kafka") as broker:
                return waiting_marks(msgspec.structs.replace(config.kafka, bootstrap=broker.bootstrap), done)
        except BrokerAway as error:
            click.echo(f"note: {error}; findings may be marks that are still on their way", err=True)
            return {}

    return read


def _print(report: AuditReport) -> None:
    pools = f"{len(report.pools)} pool{'s' if len(report.pools) != 1 else ''}"
    counts = (
        f"{report.minutes:,} minutes, {report.hours:,} hours and {report.intervals:,} price intervals of {pools}, "
        f"{report.sampled:,} minutes computed again"
    )
    skipped = [
        text
        for count, text in (
            (report.pending_minutes, f"{report.pending_minutes:,} minutes not complete yet"),
            (report.open_hours, f"{report.open_hours:,} open hours"),
            (report.waiting, f"{report.waiting:,} places whose marks wait for the worker"),
            (report.unhashed, f"the hashes of {report.unhashed:,} minutes written before rows had any"),
        )
        if count
    ]
    rest = f"\nleft out: {', '.join(skipped)}" if skipped else ""
    span = f"{iso(report.from_ms)} to {iso(report.to_ms)}"
    if report.balanced:
        word = "balanced" if report.minutes else "nothing to audit: no complete minute"
        click.echo(f"{word}, {span}\nchecked: {counts}{rest}")
        return
    first = report.findings[0]
    click.echo(f"NOT BALANCED, {span}: {report.found:,} findings\nfirst: {_line(first)}")
    for finding in report.findings[1:]:
        click.echo(f"  then {_line(finding)}")
    if report.found > len(report.findings):
        click.echo(f"  and {report.found - len(report.findings):,} more")
    click.echo(f"checked: {counts}{rest}")
    until = iso(first.at_ms + (60_000 if first.unit == "minute" else 3_600_000))
    redo = f"gpuledger ledger recompute --pool {first.pool} --from {iso(first.at_ms)} --to {until}"
    click.echo(f"Where gpuledger status shows no backlog, compute it again and see whether it stays: {redo}")


def _line(finding: Finding) -> str:
    gpu = finding.gpu or "–"
    about = f" ({finding.subject})" if finding.subject else ""
    return (
        f"pool {finding.pool}, GPU {gpu}, {finding.unit} {iso(finding.at_ms)}: {finding.check}{about}: "
        f"expected {finding.expected}, found {finding.found}"
    )


def _as_json(report: AuditReport) -> dict[str, Any]:
    return {
        "balanced": report.balanced,
        "from": iso(report.from_ms),
        "to": iso(report.to_ms),
        "complete_until": iso(report.complete_until_ms),
        "pools": report.pools,
        "minutes": report.minutes,
        "hours": report.hours,
        "price_intervals": report.intervals,
        "sampled_minutes": report.sampled,
        "pending_minutes": report.pending_minutes,
        "open_hours": report.open_hours,
        "unhashed_minutes": report.unhashed,
        "waiting": report.waiting,
        "looks": report.looks,
        "findings_total": report.found,
        "findings": [
            {
                "pool": finding.pool,
                "gpu": finding.gpu or None,
                "minute": iso(finding.at_ms),
                "unit": finding.unit,
                "check": finding.check,
                "subject": finding.subject,
                "expected": finding.expected,
                "found": finding.found,
            }
            for finding in report.findings
        ],
    }
