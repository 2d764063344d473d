"""What `sacct` prints is read to the second, whatever its zone, jobs, arrays, GPUs and node lists look like."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest

from gpuledger.streams.exceptions import AccountsError
from gpuledger.streams.sacct import JobRun, expand_nodes, gpus_of, read_sacct

HEADER = "JobIDRaw|Account|User|State|Start|End|AllocTRES|NodeList|ElapsedRaw"
#: As Slurm 22.05 printed it, shortened: a finished job with its steps, one cancelled by its user, one that never ran,
#: one that runs, a job without GPUs, an array's task and the second component of a het job.
REAL = f"""{HEADER}
101|physics|ada|COMPLETED|2026-11-20T08:00:00|2026-11-20T09:30:00|cpu=8,gres/gpu:h100=2,gres/gpu=2,mem=64G|gpu01|5400
101.batch|physics||COMPLETED|2026-11-20T08:00:00|2026-11-20T09:30:00|cpu=8,gres/gpu:h100=2,gres/gpu=2|gpu01|5400
101.extern|physics||COMPLETED|2026-11-20T08:00:00|2026-11-20T09:30:00|billing=8,cpu=8,gres/gpu=2,node=1|gpu01|5400
101.0|physics||COMPLETED|2026-11-20T08:00:01|2026-11-20T09:29:59|cpu=8,gres/gpu=2,node=1|gpu01|5398
102|physics|ada|CANCELLED by 1000|2026-11-20T08:10:00|2026-11-20T08:10:30|cpu=1,gres/gpu:h100=1,node=1|gpu02|30
103|biology|bo|CANCELLED by 0|None|2026-11-20T08:20:00||None assigned|0
104|biology|bo|PENDING|Unknown|Unknown||None assigned|0
105|biology|bo|RUNNING|2026-11-20T09:00:00|Unknown|billing=16,cpu=16,gres/gpu=16,node=2|gpu[03-04]|1800
106|biology|bo|COMPLETED|2026-11-20T09:00:00|2026-11-20T09:10:00|billing=4,cpu=4,mem=4G,node=1|gpu01|600
107_3|chem|cy|COMPLETED|2026-11-20T10:00:00|2026-11-20T10:01:00|cpu=1,gres/gpu:1g.10gb=1,node=1|gpu05|60
108+1|chem|cy|TIMEOUT|2026-11-20T10:00:00|2026-11-20T11:00:00|cpu=1,gres/gpu:h100=4,gres/gpu:a100=2,node=2|a1,gpu[01,7-8]|3600
"""


def utc(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()) * 1000


def runs(text: str, zone: ZoneInfo | None = None) -> list[JobRun]:
    return list(read_sacct(text.splitlines(keepends=True), zone or ZoneInfo("UTC")))


@pytest.fixture
def in_oslo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "Europe/Oslo")
    time.tzset()
    yield
    monkeypatch.undo()
    os.environ.pop("TZ", None)
    time.tzset()


def test_the_jobs_of_a_real_file() -> None:
    found = {run.job_id: run for run in runs(REAL)}
    assert list(found) == ["101", "102", "105", "106", "107_3", "108+1"]
    assert {name: run.gpus for name, run in found.items()} == {
        **{"101": 2, "102": 1, "105": 16, "106": 0},
        **{"107_3": 1, "108+1": 6},
    }
    first = found["101"]
    assert (first.account, first.user, first.state, first.line) == ("physics", "ada", "COMPLETED", 2)
    assert (first.start_ms, first.end_ms) == (utc("2026-11-20T08:00:00"), utc("2026-11-20T09:30:00"))
    assert found["102"].state == "CANCELLED"
    assert found["105"].end_ms is None and found["105"].nodes == ("gpu03", "gpu04")
    assert found["108+1"].nodes == ("a1", "gpu01", "gpu7", "gpu8")


def test_csv_and_a_separator_at_the_end_of_lines_give_the_same() -> None:
    rows = [line.split("|") for line in REAL.splitlines()]
    text = "\n".join(",".join(f'"{cell}"' if "," in cell else cell for cell in row) for row in rows)
    assert runs(text) == runs(REAL)
    assert runs("\n".join(f"{line}|" for line in REAL.splitlines()).replace("ElapsedRaw|", "ElapsedRaw")) == runs(REAL)
    assert runs("\ufeff" + REAL.replace("\n", "\r\n")) == runs(REAL)


def test_a_requeued_job_has_a_line_for_each_run() -> None:
    lines = (
        f"{HEADER}\n7|a|u|NODE_FAIL|2026-11-20T08:00:00|2026-11-20T08:01:00|gres/gpu=1|n1|60\n"
        "7|a|u|COMPLETED|2026-11-20T09:00:00|2026-11-20T09:02:00|gres/gpu=1|n2|120\n"
    )
    assert [(run.job_id, run.nodes) for run in runs(lines)] == [("7", ("n1",)), ("7", ("n2",))]


def test_times_are_of_the_zone_asked_for_or_of_the_machine(in_oslo: None) -> None:
    line = f"{HEADER}\n1|a|u|COMPLETED|2026-07-01T12:00:00|2026-07-01T13:00:00|gres/gpu=1|n|3600\n"
    assert runs(line, ZoneInfo("America/New_York"))[0].start_ms == utc("2026-07-01T16:00:00")
    assert next(read_sacct(line.splitlines())).start_ms == utc("2026-07-01T10:00:00")
    zoned = line.replace("2026-07-01T12:00:00", "2026-07-01T12:00:00+05:00").replace(
        "2026-07-01T13:00:00", "1782900000"
    )
    found = runs(zoned)[0]
    assert (found.start_ms, found.end_ms) == (utc("2026-07-01T07:00:00"), 1_782_900_000_000)


@pytest.mark.parametrize(
    ("start", "end", "elapsed", "expected"),
    [
        # The clocks of Oslo went back from 03:00 to 02:00 on 2026-10-25, at 01:00 UTC.
        ("02:30:00", "02:40:00", "600", ("00:30:00", "00:40:00")),
        ("02:30:00", "02:40:00", "4200", ("00:30:00", "01:40:00")),
        ("02:30:00", "02:10:00", "2400", ("00:30:00", "01:10:00")),
        ("01:30:00", "02:30:00", "7200", ("23:30:00", "01:30:00")),
        ("02:30:00", "03:30:00", "3600", ("01:30:00", "02:30:00")),
        ("02:30:00", "03:30:00", "7200", ("00:30:00", "02:30:00")),
    ],
)
def test_in_the_hour_that_clocks_repeat_the_elapsed_time_decides(
    start: str, end: str, elapsed: str, expected: tuple[str, str]
) -> None:
    line = f"{HEADER}\n1|a|u|COMPLETED|2026-10-25T{start}|2026-10-25T{end}|gres/gpu=1|n|{elapsed}\n"
    found = runs(line, ZoneInfo("Europe/Oslo"))[0]
    day = "2026-10-24" if expected[0] == "23:30:00" else "2026-10-25"
    assert (found.start_ms, found.end_ms) == (utc(f"{day}T{expected[0]}"), utc(f"2026-10-25T{expected[1]}"))


@pytest.mark.parametrize(
    ("tres", "gpus"),
    [
        ("", 0),
        ("cpu=4,mem=8G", 0),
        ("gres/gpu=3", 3),
        ("gres/gpu:h100=2,gres/gpu=2", 2),
        ("gres/gpu:h100=2,gres/gpu:a100=1", 3),
        ("gres/gpumem=80G,gres/gpuutil=50,gres/gpu=1", 1),
        ("gres/gpu=0", 0),
    ],
)
def test_gpus_of_a_tres_list(tres: str, gpus: int) -> None:
    assert gpus_of(tres) == gpus


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("", []),
        ("None assigned", []),
        ("n1", ["n1"]),
        ("gpu[001-003,7],login", ["gpu001", "gpu002", "gpu003", "gpu7", "login"]),
        ("r[1-2]n[08-10]", ["r1n08", "r1n09", "r1n10", "r2n08", "r2n09", "r2n10"]),
    ],
)
def test_node_lists(text: str, nodes: list[str]) -> None:
    assert expand_nodes(text) == nodes


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "line 1: the header lacks JobIDRaw, Account, Start, End, AllocTRES; write the file with sacct -P -o"),
        ("JobIDRaw|Account|Start|End\n", "line 1: the header lacks AllocTRES"),
        (f"{HEADER}\n1|a\n", "line 2: has 2 values, the header has 9 columns"),
        (f"{HEADER}\nx|a|u|S|1700000000|1700000100|||\n", 'line 2: JobIDRaw: expected a job id such as 1234, got "x"'),
        (f"{HEADER}\n1|a|u|S|yesterday|Unknown|||\n", "line 2: Start: expected a time such as"),
        (f"{HEADER}\n1|a|u|S|1700000100|1700000000|||\n", 'line 2: End: "1700000000" is before Start'),
        (f"{HEADER}\n1|a|u|S|1700000000|Unknown|gres/gpu=two||\n", "line 2: AllocTRES: expected gres/gpu=NUMBER"),
        (f"{HEADER}\n1|a|u|S|1700000000|Unknown||n[1-x]|\n", "line 2: NodeList: expected a node list such as"),
        (f"{HEADER}\n1|a|u|S|1700000000|Unknown||n[1-999999999]|\n", "is not a range of nodes"),
        (f"{HEADER}\n1|a|u|S|1700000000|Unknown|||1:00\n", 'ElapsedRaw: expected whole seconds, got "1:00"'),
    ],
)
def test_what_cannot_be_read_is_named(text: str, problem: str) -> None:
    with pytest.raises(AccountsError) as caught:
        runs(text)
    assert problem in str(caught.value)
