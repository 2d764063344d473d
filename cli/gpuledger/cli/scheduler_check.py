"""`gpuledger audit --against-scheduler`: the ledger's held time beside the scheduler's, for people and for scripts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, tzinfo
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import click

from gpuledger.cli.exceptions import CommandError
from gpuledger.cli.ledger_store import Access
from gpuledger.cli.moments import iso

if TYPE_CHECKING:
    from gpuledger.streams.scheduler_check import AccountDifference, JobDifference, SchedulerReport

__all__ = ["compare_with_scheduler", "zone_of"]

_HOUR_MS = 3_600_000
#: Jobs that are listed for people; --json has them all.
_MOST_JOBS = 20


def zone_of(name: str | None, utc: bool) -> tzinfo | None:
    """The zone of sacct's times; None is this machine's. Raises CommandError."""
    if utc and name is not None:
        raise CommandError("--utc: is a time zone itself; leave --timezone out")
    if utc:
        return UTC
    try:
        return None if name is None else ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError) as error:
        raise CommandError(f"--timezone: there is no zone {name!r}; write one such as Europe/Oslo") from error


def compare_with_scheduler(
    access: Access,
    file: Path,
    bounds: tuple[int, int],
    pools: Sequence[str],
    zone: tzinfo | None,
    tolerance_s: int,
    as_json: bool,
) -> bool:
    """Prints how the file and the ledger differ over the complete hours of the range; True where they agree.

    Raises CommandError where the file cannot be read or the range has no complete hour.
    """
    from gpuledger.streams.exceptions import AccountsError
    from gpuledger.streams.recomputer import Recomputer
    from gpuledger.streams.sacct import read_sacct
    from gpuledger.streams.scheduler_check import against_scheduler

    complete_ms = Recomputer(access.store, access.rules).complete_until_ms()
    start = -(-bounds[0] // _HOUR_MS) * _HOUR_MS
    end = min(bounds[1], complete_ms) // _HOUR_MS * _HOUR_MS
    if start >= end:
        raise CommandError(
            f"--against-scheduler: no complete hour between {iso(bounds[0])} and {iso(bounds[1])}; jobs are compared "
            f"by whole hours, and the ledger is complete until {iso(complete_ms)}"
        )
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            runs = list(read_sacct(lines, zone))
    except AccountsError as error:
        raise CommandError(f"--against-scheduler: {file}: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"--against-scheduler: {file}: cannot be read: {error}") from error
    report = against_scheduler(access.store, runs, start, end, tolerance_s=tolerance_s, pools=pools or None)
    if as_json:
        click.echo(json.dumps(_as_json(report, len(runs)), indent=2, ensure_ascii=False))
    else:
        _print(report)
    return report.agrees


def _seconds(us: int) -> str:
    """GPU-seconds, exact."""
    sign, us = ("-" if us < 0 else ""), abs(us)
    text = f"{us // 1_000_000:,}.{us % 1_000_000:06d}".rstrip("0").rstrip(".")
    return sign + text


def _print(report: SchedulerReport) -> None:
    from gpuledger.streams.scheduler_check import ROUNDING_S, totals

    span = f"{iso(report.from_ms)} to {iso(report.to_ms)}"
    sums = totals(report.accounts)
    ledger_us = sums["held_us"] + sums["unconfirmed_us"]
    word = "agrees with the scheduler" if report.agrees else "DIFFERS FROM THE SCHEDULER"
    click.echo(f"{word}, {span}")
    click.echo(
        f"GPU-seconds: scheduler {_seconds(sums['scheduler_us'])}, ledger {_seconds(ledger_us)} "
        f"(of which unconfirmed {_seconds(sums['unconfirmed_us'])}), "
        f"difference {_seconds(ledger_us - sums['scheduler_us'])}"
    )
    click.echo(
        f"compared: {report.jobs:,} jobs of {len(report.accounts):,} accounts, of which {len(report.differences):,} "
        f"jobs differ by more than {report.tolerance_s} s + {ROUNDING_S} s (sacct's rounding) for each GPU and run"
    )
    for count, what in (
        (report.elsewhere, "jobs of the file that ran outside the pools asked for"),
        (report.other_sources, "jobs of the ledger that another source told"),
    ):
        if count:
            click.echo(f"left out: {count:,} {what}")
    if report.agrees:
        return
    click.echo("\naccount (tenant): scheduler, ledger, difference in GPU-seconds")
    for row in report.accounts:
        if row.difference_us:
            who = f"{row.account or '(no account)'} ({', '.join(row.tenants) or 'not in the ledger'})"
            ledger_us = row.held_us + row.unconfirmed_us
            click.echo(f"  {who}: {_seconds(row.scheduler_us)}, {_seconds(ledger_us)}, {_seconds(row.difference_us)}")
    click.echo("\njobs, the largest difference first")
    for job in report.differences[:_MOST_JOBS]:
        click.echo(f"  {_line(job)}")
    if len(report.differences) > _MOST_JOBS:
        click.echo(f"  and {len(report.differences) - _MOST_JOBS:,} more; --json has them all")


def _line(job: JobDifference) -> str:
    ledger_us = job.held_us + job.unconfirmed_us
    return (
        f"job {job.job_id}, account {job.account or '–'}: scheduler {_seconds(job.scheduler_us)}, ledger "
        f"{_seconds(ledger_us)}, difference {_seconds(job.difference_us)}: {'; '.join(job.causes)}"
    )


def _as_json(report: SchedulerReport, runs: int) -> dict[str, Any]:
    from gpuledger.streams.scheduler_check import ROUNDING_S, totals

    return {
        "agrees": report.agrees,
        "from": iso(report.from_ms),
        "to": iso(report.to_ms),
        "tolerance_s": report.tolerance_s,
        "rounding_s": ROUNDING_S,
        "runs_in_file": runs,
        "jobs": report.jobs,
        "jobs_elsewhere": report.elsewhere,
        "jobs_of_other_sources": report.other_sources,
        "totals": _amounts(totals(report.accounts)),
        "accounts": [{"account": row.account, **_row(row), "jobs": row.jobs} for row in report.accounts],
        "differences": [
            {"job_id": job.job_id, "account": job.account, "state": job.state, **_row(job), "causes": list(job.causes)}
            for job in report.differences
        ],
    }


def _row(row: AccountDifference | JobDifference) -> dict[str, Any]:
    names = ("scheduler_us", "held_us", "unconfirmed_us", "difference_us", "allowed_us")
    return {"tenants": list(row.tenants), **_amounts({name: getattr(row, name) for name in names})}


def _amounts(values: Any) -> dict[str, str]:
    """Integers as text: one day of a large fleet has more GPU-microseconds than a float can count."""
    return {name.replace("_us", "_gpu_us"): str(value) for name, value in values.items()}
