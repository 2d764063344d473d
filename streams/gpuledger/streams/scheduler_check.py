"""The ledger against the scheduler's own accounts: GPU time of each job and account, and why it differs.

Slurm's accounting and the ledger learn of a job on two paths that share nothing, so what they agree on was told right;
where they differ, the job's allocations say what most likely went wrong.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

from gpuledger.streams.pool_facts import OPEN_END_MS
from gpuledger.streams.sacct import JobRun
from gpuledger.streams.store import Store

__all__ = ["ROUNDING_S", "AccountDifference", "Claim", "JobDifference", "SchedulerReport"]
__all__ += ["against_scheduler", "causes", "totals"]

#: sacct cuts both ends of a run to whole seconds, so a run is known to less than this.
ROUNDING_S = 1
_US = 1_000_000

_HELD = """
    SELECT job_id, tenant, sumIf(toInt128(gpu_us), kind = 'held') AS held,
        sumIf(toInt128(gpu_us), kind = 'unconfirmed') AS unconfirmed
    FROM ledger_job_hour
    WHERE (pool, hour, version) IN (
            SELECT pool, hour, max(version) FROM ledger_job_hour WHERE $range GROUP BY pool, hour)
        AND $range AND kind IN ('held', 'unconfirmed')
    GROUP BY job_id, tenant ORDER BY job_id, tenant
""".replace(
    "$range",
    "hour >= fromUnixTimestamp64Milli({from_ms:Int64}, 'UTC') "
    "AND hour < fromUnixTimestamp64Milli({to_ms:Int64}, 'UTC') AND ({all:UInt8} OR pool IN {pools:Array(String)})",
)
_CLAIMS = """
    SELECT job_id, account, source, gpu, node, weight_num, weight_den, start_ms, end_ms,
        gpu IN (SELECT gpu FROM placements FINAL WHERE void = 0) AS placed
    FROM allocations FINAL
    WHERE void = 0 AND start_ms < {to_ms:Int64} AND (end_ms IS NULL OR end_ms > {from_ms:Int64})
    ORDER BY job_id, start_ms, gpu, id
"""
_NODES = """
    SELECT DISTINCT node FROM placements FINAL
    WHERE void = 0 AND pool IN {pools:Array(String)} AND start_ms < {to_ms:Int64}
        AND (end_ms IS NULL OR end_ms > {from_ms:Int64})
"""


@dataclass(frozen=True, slots=True)
class Claim:
    """An allocation as far as a comparison needs it; `end_ms` None where it has not been told."""

    gpu: str
    node: str
    weight: Fraction
    start_ms: int
    end_ms: int | None
    placed: bool


@dataclass(frozen=True, slots=True)
class JobDifference:
    """A job whose GPU time differs by more than is allowed; amounts are GPU-microseconds inside the range."""

    job_id: str
    account: str
    tenants: tuple[str, ...]
    state: str
    scheduler_us: int
    held_us: int
    unconfirmed_us: int
    allowed_us: int
    causes: tuple[str, ...]

    @property
    def difference_us(self) -> int:
        """What the ledger has more than the scheduler."""
        return self.held_us + self.unconfirmed_us - self.scheduler_us


@dataclass(slots=True)
class AccountDifference:
    """The jobs of an account together, those that agree among them."""

    account: str
    tenants: tuple[str, ...] = ()
    jobs: int = 0
    scheduler_us: int = 0
    held_us: int = 0
    unconfirmed_us: int = 0
    allowed_us: int = 0

    @property
    def difference_us(self) -> int:
        """What the ledger has more than the scheduler."""
        return self.held_us + self.unconfirmed_us - self.scheduler_us


@dataclass(slots=True)
class SchedulerReport:
    """`jobs` were compared, of which `differences` differ (the largest first). `accounts`: all of them, by name.

    Left out: `elsewhere` jobs of the file that ran on nodes of no pool asked for, or only partly on them, and
    `other_sources` jobs of the ledger that this scheduler never knew (Kubernetes, processes, by hand).
    """

    from_ms: int
    to_ms: int
    tolerance_s: int
    jobs: int = 0
    elsewhere: int = 0
    other_sources: int = 0
    differences: list[JobDifference] = field(default_factory=list[JobDifference])
    accounts: list[AccountDifference] = field(default_factory=list[AccountDifference])

    @property
    def agrees(self) -> bool:
        return not self.differences


@dataclass(slots=True)
class _Job:
    runs: list[JobRun] = field(default_factory=list[JobRun])
    claims: list[Claim] = field(default_factory=list[Claim])
    sources: set[str] = field(default_factory=set[str])
    tenants: list[str] = field(default_factory=list[str])
    account: str = ""
    held_us: int = 0
    unconfirmed_us: int = 0


def against_scheduler(
    store: Store,
    runs: Iterable[JobRun],
    from_ms: int,
    to_ms: int,
    *,
    tolerance_s: int = 0,
    pools: Sequence[str] | None = None,
) -> SchedulerReport:
    """Compares runs of jobs with the ledger's held and unconfirmed time over [from_ms, to_ms), whole hours that are
    complete. A job may differ by `tolerance_s` + ROUNDING_S seconds for each GPU of each of its runs.
    """
    report = SchedulerReport(from_ms, to_ms, tolerance_s)
    jobs: dict[str, _Job] = defaultdict(_Job)
    where = {"from_ms": from_ms, "to_ms": to_ms, "pools": list(pools or ()), "all": int(pools is None)}
    nodes = None if pools is None else {str(node) for (node,) in store.rows(_NODES, where)}
    elsewhere: set[str] = set()
    for run in runs:
        if nodes is not None and not nodes.issuperset(run.nodes):
            elsewhere.add(run.job_id)
        elif _clipped_ms(run, from_ms, to_ms) > 0:
            jobs[run.job_id].runs.append(run)
    for job_id, tenant, held, unconfirmed in store.rows(_HELD, where):
        job = jobs[job_id]
        job.tenants.append(tenant)
        job.held_us += int(held)
        job.unconfirmed_us += int(unconfirmed)
    for job_id, account, source, gpu, node, num, den, start, end, placed in store.rows(_CLAIMS, where):
        if job_id in jobs:
            job = jobs[job_id]
            job.account = job.account or account
            job.sources.add(source)
            ends = None if end is None else int(end)
            job.claims.append(Claim(gpu, node, Fraction(int(num), int(den)), int(start), ends, bool(placed)))
    report.elsewhere = len(elsewhere)
    accounts: dict[str, AccountDifference] = {}
    for job_id in sorted(jobs):
        job = jobs[job_id]
        if job_id in elsewhere:
            continue
        if not job.runs and job.sources and "slurm" not in job.sources:
            report.other_sources += 1
            continue
        _add(report, accounts, job_id, job)
    report.differences.sort(key=lambda each: (-abs(each.difference_us), each.job_id))
    report.accounts = [accounts[name] for name in sorted(accounts)]
    return report


def _add(report: SchedulerReport, accounts: dict[str, AccountDifference], job_id: str, job: _Job) -> None:
    bounds = report.from_ms, report.to_ms
    scheduler_us = sum(run.gpus * _clipped_ms(run, *bounds) * 1000 for run in job.runs)
    allowed_us = sum(run.gpus for run in job.runs) * (report.tolerance_s + ROUNDING_S) * _US
    account = job.runs[0].account if job.runs else job.account
    found = JobDifference(
        job_id=job_id,
        account=account,
        tenants=tuple(job.tenants),
        state=job.runs[-1].state if job.runs else "",
        scheduler_us=scheduler_us,
        held_us=job.held_us,
        unconfirmed_us=job.unconfirmed_us,
        allowed_us=allowed_us,
        causes=(),
    )
    report.jobs += 1
    row = accounts.setdefault(account, AccountDifference(account))
    row.jobs += 1
    row.tenants = tuple(sorted({*row.tenants, *job.tenants}))
    row.scheduler_us += scheduler_us
    row.held_us += job.held_us
    row.unconfirmed_us += job.unconfirmed_us
    row.allowed_us += allowed_us
    if abs(found.difference_us) > allowed_us:
        why = causes(job.runs, job.claims, report.tolerance_s + ROUNDING_S, *bounds)
        report.differences.append(replace(found, causes=tuple(why)))


def _clipped_ms(run: JobRun, from_ms: int, to_ms: int) -> int:
    end = to_ms if run.end_ms is None else run.end_ms
    return max(0, min(end, to_ms) - max(run.start_ms, from_ms))


# ------------------------------------------------------------------------------------------------- why


def causes(runs: Sequence[JobRun], claims: Sequence[Claim], allowed_s: int, from_ms: int, to_ms: int) -> list[str]:
    """What most likely makes a job differ, the likeliest first; never empty. `claims`: its allocations in the range."""
    if not runs:
        return ["the scheduler's file does not have the job: another cluster's, or the file covers less than the range"]
    if not claims:
        nodes = ", ".join(sorted({node for run in runs for node in run.nodes})) or "its nodes"
        return [f"no allocation known: no prolog of the job was heard from {nodes}"]
    found: list[str] = []
    unplaced = sorted({claim.gpu for claim in claims if not claim.placed})
    if unplaced:
        found.append(f"unplaced: {_names(unplaced)} in no placement, so the time counts nowhere")
    found += _counts(runs, claims)
    found += _ends(runs, claims, allowed_s * 1000, from_ms, to_ms)
    return found or [
        "its allocations agree with the scheduler: the ledger was computed from others, or a GPU was out of service or "
        "overcommitted; see gpuledger audit and gpuledger ledger show --rows conflict"
    ]


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"GPU{'s' if len(names) > 1 else ''} {', '.join(names[:3])}{more}"


def _counts(runs: Sequence[JobRun], claims: Sequence[Claim]) -> list[str]:
    """GPUs of the scheduler's largest run against the most that the allocations have at once."""
    most = Fraction(0)
    for at in {claim.start_ms for claim in claims}:
        here = (c.weight for c in claims if c.start_ms <= at < (OPEN_END_MS if c.end_ms is None else c.end_ms))
        most = max(most, sum(here, Fraction(0)))
    expected = max(run.gpus for run in runs)
    if most == expected:
        return []
    shared = "" if most.denominator == 1 else "; shared GPUs and MIG instances count in full with the scheduler"
    missing = sorted({node for run in runs for node in run.nodes} - {claim.node for claim in claims})
    lacking = f"; none on {', '.join(missing[:5])}" if missing and most < expected else ""
    return [f"GPU count differs: the scheduler has {expected}, the allocations {most}{shared}{lacking}"]


def _ends(runs: Sequence[JobRun], claims: Sequence[Claim], allowed_ms: int, from_ms: int, to_ms: int) -> list[str]:
    """Where allocations begin or end otherwise than the job; ends outside the range make no difference in it."""
    last = to_ms if any(run.end_ms is None for run in runs) else max(run.end_ms or 0 for run in runs)
    first = min(run.start_ms for run in runs)
    ends = [to_ms if claim.end_ms is None else claim.end_ms for claim in claims]
    late_ms = min(max(ends), to_ms) - max(min(last, to_ms), from_ms)
    early_ms = min(last, to_ms) - max(min(min(ends), to_ms), from_ms)
    before_ms = min(max(first, from_ms), to_ms) - max(min(claim.start_ms for claim in claims), from_ms)
    after_ms = max(max(claim.start_ms for claim in claims), from_ms) - max(first, from_ms)
    found: list[str] = []
    if late_ms > allowed_ms:
        open_ = sum(claim.end_ms is None for claim in claims)
        which = f"{open_} without an end, " if open_ else ""
        found.append(f"lost epilog: an allocation ends {_seconds(late_ms)} later than the job ({which}as far as told)")
    if before_ms > allowed_ms:
        found.append(f"an allocation starts {_seconds(before_ms)} earlier than the job")
    if len(runs) == 1 and early_ms > allowed_ms:
        found.append(f"an allocation ends {_seconds(early_ms)} earlier than the job")
    if len(runs) == 1 and after_ms > allowed_ms:
        found.append(f"an allocation starts {_seconds(after_ms)} later than the job: a late prolog")
    return found


def _seconds(ms: int) -> str:
    return f"{ms // 1000:,} s" if ms % 1000 == 0 else f"{ms // 1000:,}.{ms % 1000:03d} s"


def totals(accounts: Iterable[AccountDifference]) -> Mapping[str, int]:
    """Sums over accounts, in GPU-microseconds."""
    names = ("scheduler_us", "held_us", "unconfirmed_us")
    rows = list(accounts)
    return {name: sum(getattr(row, name) for row in rows) for name in names}
