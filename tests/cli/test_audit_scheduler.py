"""`gpuledger audit --against-scheduler` on a small ledger in the real engine, with files as sacct writes them."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from gpuledger.cli.database import migrate_database
from gpuledger.schemas.config import ClickHouse
from gpuledger.schemas.events import Allocation, Placement
from tests.cli.test_ledger_commands import BOUNDS, env, run
from tests.fixtures.clickhouse import ClickHouse as Server
from tests.streams.small_ledger import END_MS, START_MS, SmallLedger, minute, world

pytestmark = pytest.mark.services

HEADER = "JobIDRaw|Account|User|State|Start|End|AllocTRES|NodeList|ElapsedRaw"


def claim(job: str, gpu: str, start_ms: int, end_ms: int | None, **fields: Any) -> Allocation:
    names: dict[str, Any] = {"node": "n0", "source": "slurm", "tenant": "acme", "account": "physics", "user": "ada"}
    return Allocation(
        id=f"{job}/{gpu}",
        revision=1,
        claimed_at_ms=START_MS,
        job_id=job,
        gpu=gpu,
        start_ms=start_ms,
        end_ms=end_ms,
        **{**names, **fields},
    )


def clock(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms // 1000, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def line(job: str, start_ms: int, end_ms: int | None, gpus: int, account: str = "physics", nodes: str = "n0") -> str:
    tres = f"billing=8,cpu=8,gres/gpu:h100={gpus},gres/gpu={gpus},mem=64G,node=1"
    end = "Unknown" if end_ms is None else clock(end_ms)
    elapsed = 0 if end_ms is None else end_ms // 1000 - start_ms // 1000
    state = "RUNNING" if end_ms is None else "COMPLETED"
    return f"{job}|{account}|ada|{state}|{clock(start_ms)}|{end}|{tres}|{nodes}|{elapsed}"


@pytest.fixture(scope="module")
def ledger(clickhouse: Server) -> Iterator[SmallLedger]:
    """Seven jobs: two that Slurm knows as we do, and five that were told wrong, each in its own way."""
    name = f"test_{uuid.uuid4().hex}"
    made = SmallLedger(ClickHouse(url=clickhouse.url, database=name))
    migrate_database(made.settings)
    made.add(*(fact for fact in world() if isinstance(fact, Placement)))
    made.add(
        # 100: as it was, on two GPUs, to the millisecond, across an hour.
        claim("100", "g0", minute(10) + 250, minute(70) + 900),
        claim("100", "g1", minute(10) + 250, minute(70) + 900),
        # 101: its epilog was lost; ten minutes later the next job's prolog ended it.
        claim("101", "g2", minute(5), minute(25)),
        # 102: one of two GPUs only.
        claim("102", "g3", minute(0), minute(30)),
        # 103: on a GPU that nobody has placed.
        claim("103", "g99", minute(0), minute(10), account="biology", tenant="nord"),
        # 104: begun early and late.
        claim("104", "g3", minute(40), minute(50), account="biology", tenant="nord"),
        # 106: of another source; 107: of a cluster that the file is not of.
        claim("106", "b1", minute(0), minute(10), source="kubernetes"),
        claim("107", "b1", minute(20), minute(30), account="chem", tenant="chem"),
        # 108: a third of a GPU, which Slurm counts as one.
        claim("108", "g2", minute(60), minute(90), weight_num=1, weight_den=3),
    )
    made.stored_until(END_MS + 10 * 60_000)
    made.compute()
    yield made
    made.store.client.command(f"DROP DATABASE {name} SYNC")
    made.store.close()


STEP = f"100.batch|physics||COMPLETED|{clock(START_MS)}|Unknown|gres/gpu=2|n0|9"
AS_IT_WAS = [line("100", minute(10), minute(70), 2), STEP]
OTHERS = [
    line("101", minute(5), minute(15), 1),
    line("102", minute(0), minute(30), 2, nodes="n[0-1]"),
    line("103", minute(0), minute(10), 1, "biology"),
    line("104", minute(41), minute(52), 1, "biology"),
    line("105", minute(100), None, 4, "chem", nodes="n7"),
    line("108", minute(60), minute(90), 1),
]


def compare(ledger: SmallLedger, file: Path, lines: Sequence[str], *options: str) -> tuple[int, Any]:
    file.write_text("\n".join([HEADER, *lines]) + "\n")
    result = run(env(ledger), "audit", *BOUNDS, "--against-scheduler", file, "--utc", "--json", *options)
    assert result.exit_code in (0, 1), result.output
    return result.exit_code, json.loads(result.stdout)


def test_jobs_that_agree_to_the_second(ledger: SmallLedger, tmp_path: Path) -> None:
    """The ledger knows milliseconds, sacct seconds: 0.65 s on each of two GPUs is within its rounding."""
    others = [line("107", minute(20), minute(30), 1, "chem"), line("104", minute(40), minute(50), 1, "biology")]
    others += [line("101", minute(5), minute(25), 1), line("102", minute(0), minute(30), 1)]
    without = [*AS_IT_WAS, *others]
    status, report = compare(ledger, tmp_path / "jobs.txt", without, "--pool", "h100", "--pool", "b200")
    # 108 is in the ledger and not in the file: that alone is left.
    assert [(each["job_id"], each["scheduler_gpu_us"]) for each in report["differences"]] == [("108", "0")]
    assert status == 1 and report["agrees"] is False
    without.append(line("108", minute(60), minute(70), 1))
    status, report = compare(ledger, tmp_path / "jobs.txt", without, "--tolerance", "1800")
    assert (status, report["agrees"], report["differences"]) == (0, True, [])
    physics = next(each for each in report["accounts"] if each["account"] == "physics")
    assert physics["tenants"] == ["acme"] and physics["jobs"] == 4
    job_100 = 2 * (minute(70) + 900 - minute(10) - 250) * 1000
    rest = (20 + 30 + 10) * 60_000_000
    assert physics["held_gpu_us"] == str(job_100 + rest)
    assert int(physics["difference_gpu_us"]) == 2 * 650_000


def test_each_difference_has_its_likely_cause(ledger: SmallLedger, tmp_path: Path) -> None:
    status, report = compare(ledger, tmp_path / "jobs.txt", [*AS_IT_WAS, *OTHERS])
    assert status == 1
    found = {each["job_id"]: each for each in report["differences"]}
    assert set(found) == {"101", "102", "103", "104", "105", "107", "108"}
    difference = {job: int(each["difference_gpu_us"]) / 60_000_000 for job, each in found.items()}
    assert difference == {"101": 10, "102": -30, "103": -10, "104": -1, "105": -320, "107": 10, "108": -20}
    causes = {job: each["causes"] for job, each in found.items()}
    assert causes["101"] == ["lost epilog: an allocation ends 600 s later than the job (as far as told)"]
    assert causes["102"] == ["GPU count differs: the scheduler has 2, the allocations 1; none on n1"]
    assert causes["103"] == ["unplaced: GPU g99 in no placement, so the time counts nowhere"]
    assert causes["104"] == [
        "an allocation starts 60 s earlier than the job",
        "an allocation ends 120 s earlier than the job",
    ]
    assert causes["105"] == ["no allocation known: no prolog of the job was heard from n7"]
    assert causes["107"][0].startswith("the scheduler's file does not have the job")
    assert causes["108"][0] == (
        "GPU count differs: the scheduler has 1, the allocations 1/3; shared GPUs and MIG instances count in full with "
        "the scheduler"
    )
    assert [each["job_id"] for each in report["differences"]][:2] == ["105", "102"], "the largest comes first"
    assert (report["jobs"], report["jobs_of_other_sources"]) == (8, 1)
    total = report["totals"]
    sums = [sum(int(each["scheduler_gpu_us"]) for each in report["accounts"]), int(total["scheduler_gpu_us"])]
    assert sums[0] == sums[1] == (120 + 10 + 60 + 10 + 11 + 320 + 30) * 60_000_000


def test_the_tolerance_is_for_each_gpu(ledger: SmallLedger, tmp_path: Path) -> None:
    def differ(start_ms: int, end_ms: int, gpus: int, tolerance: str) -> bool:
        lines = [line("100", start_ms, end_ms, gpus)]
        _, report = compare(ledger, tmp_path / "jobs.txt", lines, "--tolerance", tolerance)
        return "100" in {each["job_id"] for each in report["differences"]}

    assert not differ(minute(10), minute(70) + 1000, 2, "0")
    assert differ(minute(10), minute(70) + 2000, 2, "0")
    assert not differ(minute(10), minute(70) + 2000, 2, "1")
    assert differ(minute(10), minute(70) + 30_000, 2, "20")
    assert not differ(minute(10), minute(70) + 30_000, 2, "30")


def test_only_what_lies_inside_the_range_counts(ledger: SmallLedger, tmp_path: Path) -> None:
    """A job is cut at the range, so its end after it makes no difference in it; parts of hours are left out."""
    file = tmp_path / "jobs.txt"
    file.write_text("\n".join([HEADER, line("100", minute(10), minute(500), 2)]) + "\n")
    hour = ("--from", clock(minute(0)) + "Z", "--to", clock(minute(64)) + "Z")
    result = run(env(ledger), "audit", *hour, "--against-scheduler", file, "--utc", "--json")
    report = json.loads(result.stdout)
    assert report["to"] == clock(minute(60)) + "Z"
    assert "100" not in {each["job_id"] for each in report["differences"]}


def test_jobs_of_other_pools_are_left_out(ledger: SmallLedger, tmp_path: Path) -> None:
    lines = [line("107", minute(20), minute(30), 1, "chem", nodes="n2"), line("100", minute(10), minute(70), 2)]
    status, report = compare(ledger, tmp_path / "jobs.txt", lines, "--pool", "b200")
    assert (status, report["jobs"], report["jobs_elsewhere"]) == (0, 1, 1)


def test_what_people_read(ledger: SmallLedger, tmp_path: Path) -> None:
    file = tmp_path / "jobs.txt"
    file.write_text("\n".join([HEADER, *AS_IT_WAS, *OTHERS]) + "\n")
    result = run(env(ledger), "audit", *BOUNDS, "--against-scheduler", file, "--utc")
    assert result.exit_code == 1
    out = result.stdout
    assert out.startswith("DIFFERS FROM THE SCHEDULER, ")
    assert "job 101, account physics: scheduler 600, ledger 1,200, difference 600: lost epilog" in out
    assert "differ by more than 0 s + 1 s (sacct's rounding) for each GPU and run" in out
    assert "left out: 1 jobs of the ledger that another source told" in out


@pytest.mark.parametrize(
    ("text", "options", "problem"),
    [
        ("JobIDRaw|x\n", ("--utc",), "line 1: the header lacks Account, Start, End, AllocTRES"),
        (f"{HEADER}\n", ("--utc", "--timezone", "Europe/Oslo"), "--utc: is a time zone itself"),
        (f"{HEADER}\n", ("--timezone", "Mars"), "--timezone: there is no zone 'Mars'"),
        (f"{HEADER}\n", ("--from", "2020-01-01", "--to", "2020-01-02T00:01:00Z", "--pool", "none"), "there is no pool"),
    ],
)
def test_what_cannot_be_compared_is_said(
    ledger: SmallLedger, tmp_path: Path, text: str, options: Sequence[str], problem: str
) -> None:
    file = tmp_path / "jobs.txt"
    file.write_text(text)
    result = run(env(ledger), "audit", *BOUNDS, "--against-scheduler", file, *options)
    assert result.exit_code not in (0, 1) or "Error" in result.output or problem in result.output
    assert problem in result.output
