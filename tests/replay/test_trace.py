"""Malformed traces and fleets: each fault names file, line, field, value and fix; good rows arrive exactly."""

import gzip
from pathlib import Path

import pytest

from gpuledger.agents.replay.exceptions import TraceError
from gpuledger.agents.replay.rows import parse_time_ms
from gpuledger.agents.replay.trace import Node, TraceJob, read_fleet, read_jobs

NOW_MS = 1_700_000_000_000
HEADER = "job_id,account,user,gpus,gpu_milli,start,end,node,gpu_index,submitted,model,state\n"


def write(directory: Path, text: str, name: str = "TRACE.csv") -> Path:
    path = directory / name
    path.write_bytes(text.encode("utf-8", errors="surrogateescape"))
    return path


def one_error(path: Path) -> TraceError:
    with pytest.raises(TraceError) as caught:
        list(read_jobs(path, NOW_MS))
    return caught.value


def test_a_row_arrives_with_all_its_columns(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        HEADER
        + '7,physics,ana,3,,1600000000,2020-09-13T14:26:40.250+01:00,n1;n2,"0-1;5",1599999999.5,H100,COMPLETED\n',
    )
    assert list(read_jobs(path, NOW_MS)) == [
        TraceJob(
            job_id="7",
            account="physics",
            user="ana",
            gpus=3,
            milli=1000,
            start_ms=1_600_000_000_000,
            end_ms=1_600_003_600_250,
            nodes=("n1", "n2"),
            indexes=((0, 1), (5,)),
            submitted_ms=1_599_999_999_500,
            model="H100",
            state="COMPLETED",
        )
    ]


def test_gzip_a_byte_order_mark_empty_lines_and_other_columns_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "t.csv.gz"
    path.write_bytes(
        gzip.compress("\ufeffend,start,extra,user,account,job_id,gpu_milli\r\n\r\n20e,,x,u,a,j,2000\r\n".encode())
    )
    with pytest.raises(TraceError, match=r't\.csv\.gz:3: end: expected Unix seconds .* got "20e"'):
        list(read_jobs(path, NOW_MS))
    path.write_bytes(
        gzip.compress("\ufeffend,start,extra,user,account,job_id,gpu_milli\r\n\r\n,,x,u,a,j,2000\r\n".encode())
    )
    (job,) = read_jobs(path, NOW_MS)
    assert (job.gpus, job.milli, job.start_ms, job.end_ms) == (2, 1000, None, None)


@pytest.mark.parametrize(
    ("row", "field", "text"),
    [
        ("j,a,u,2.5,,1600000000,1600000001,,,,,", "gpus", 'expected a whole number, got "2.5"; use gpu_milli'),
        ("j,a,u,-1,,1600000000,1600000001,,,,,", "gpus", "from 0 to 100000, got -1"),
        ("j,a,u,1e9,,1600000000,1600000001,,,,,", "gpus", 'got "1e9"'),
        ("j,a,u,,,1600000000,1600000001,,,,,", "gpus", "is empty, and so is gpu_milli"),
        ("j,a,u,1,500,1600000000,1600000001,,,,,", "gpu_milli", "fill in one of the two"),
        ("j,a,u,,1500,1600000000,1600000001,,,,,", "gpu_milli", "nor a multiple of 1000"),
        (",a,u,1,,1600000000,1600000001,,,,,", "job_id", "is empty"),
        ("j" * 129 + ",a,u,1,,1600000000,1600000001,,,,,", "job_id", "129 characters; at most 128"),
        ("j,a\x07,u,1,,1600000000,1600000001,,,,,", "account", "cannot be printed"),
        ("j,a\udcff,u,1,,1600000000,1600000001,,,,,", "account", "cannot be printed"),
        ("j,a,u,1,,1600000002,1600000001,,,,,", "end", '"1600000001" is before start "1600000002"'),
        ("j,a,u,1,,1600000000000,,,,,,", "start", "looks like milliseconds; give Unix seconds (1600000000)"),
        ("j,a,u,1,,2020-09-13T12:26:40,,,,,,", "start", "has no zone; write 2020-09-13T12:26:40Z"),
        ("j,a,u,1,,2020-09-13,,,,,,", "start", "write 2020-09-13T00:00:00Z"),
        ("j,a,u,1,,1600000000.0005,,,,,,", "start", "finer than a millisecond"),
        ("j,a,u,1,,2020-09-13T12:26:40.0005Z,,,,,,", "start", "finer than a millisecond"),
        ("j,a,u,1,,2020-09-13T12:26:40.0000005Z,,,,,,", "start", "finer than a millisecond"),
        ("j,a,u,1,,5,,,,,,", "start", "not between 2000 and 2200"),
        ("j,a,u,1,,nan,,,,,,", "start", 'got "nan"'),
        ("j,a,u,1,,1600000000,1800000000,,,,,", "end", "later than now"),
        ("j,a,u,1,,1600000000,1600000001,n1;n1,,,,", "node", "names a node twice"),
        ("j,a,u,1,,1600000000,1600000001,n1;,,,,", "node", "separated by semicolons"),
        ("j,a,u,1,,1600000000,1600000001,,0,,,", "gpu_index", "has 1 groups for 0 nodes"),
        ("j,a,u,2,,1600000000,1600000001,n1,0,,,", "gpu_index", "names 1 GPUs where the job has 2"),
        ("j,a,u,2,,1600000000,1600000001,n1,0 0,,,", "gpu_index", "names a GPU twice"),
        ("j,a,u,2,,1600000000,1600000001,n1,3-2,,,", "gpu_index", "runs backwards"),
        ("j,a,u,2,,1600000000,1600000001,n1,a-b,,,", "gpu_index", 'got "a-b"'),
        ("j,a,u,1,,1600000000,1600000001,,", "", "has 9 cells where the header has 12"),
        ('j,"a"b,u,1,,1600000000,1600000001,,,,,', "", "is not CSV"),
    ],
)
def test_each_malformed_row_names_line_field_value_and_fix(tmp_path: Path, row: str, field: str, text: str) -> None:
    good = "ok,a,u,1,,1600000000,1600000001,,,,,\n"
    error = one_error(write(tmp_path, HEADER + good + row + "\n"))
    assert (error.file, error.line, error.field) == ("TRACE.csv", 3, field)
    assert text in str(error)
    assert str(error).startswith("TRACE.csv:3: " + (f"{field}: " if field else ""))


def test_skipped_rows_are_told_one_by_one_and_the_others_arrive(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        HEADER
        + "a,x,u,1,,1600000000,1600000001,,,,,\n"
        + "b,x,u,one,,1600000000,1600000001,,,,,\n"
        + "c,x\n"
        + "a,x,u,1,,1600000000,1600000001,,,,,\n"
        + "d,x,u,1,,1600000000,1600000001,,,,,\n",
    )
    rejected: list[TraceError] = []
    assert [job.job_id for job in read_jobs(path, NOW_MS, rejected.append)] == ["a", "d"]
    assert [(error.line, error.field) for error in rejected] == [(3, "gpus"), (4, ""), (5, "job_id")]
    assert 'is on line 2 too; give each run its own id, for instance "a-2"' in str(rejected[2])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "TRACE.csv: is empty; the first line must name the columns"),
        ("job_id,account,user,gpus,start\n", "TRACE.csv:1: end: the header lacks the column end"),
        ("job_id,account,user,start,end\n", "TRACE.csv:1: gpus: the header lacks gpus or gpu_milli"),
        ("job_id,job_id,account,user,gpus,start,end\n", "TRACE.csv:1: job_id: the header names this column twice"),
    ],
)
def test_a_wrong_header_stops_under_every_policy(tmp_path: Path, text: str, message: str) -> None:
    rejected: list[TraceError] = []
    with pytest.raises(TraceError) as caught:
        list(read_jobs(write(tmp_path, text), NOW_MS, rejected.append))
    assert message in str(caught.value)
    assert not rejected


def test_a_file_that_ends_in_the_middle_stops_under_every_policy(tmp_path: Path) -> None:
    rows = HEADER + "".join(f"j{n},a,u,1,,1600000000,1600000001,,,,,\n" for n in range(20_000))
    path = tmp_path / "cut.csv.gz"
    path.write_bytes(gzip.compress(rows.encode())[:-2000])
    with pytest.raises(TraceError, match=r"cut\.csv\.gz:\d+: cannot be read further"):
        list(read_jobs(path, NOW_MS, lambda error: None))
    with pytest.raises(TraceError, match=r"none\.csv: cannot be opened: No such file"):
        list(read_jobs(tmp_path / "none.csv", NOW_MS))


@pytest.mark.parametrize(
    ("text", "time_ms"),
    [
        ("1600000000", 1_600_000_000_000),
        ("1600000000.001", 1_600_000_000_001),
        # As a float this would be .4399998…
        ("1600000000.44", 1_600_000_000_440),
        ("1600000000.120000000000000000000", 1_600_000_000_120),
        ("2020-09-13T12:26:40Z", 1_600_000_000_000),
        ("2020-09-13 14:26:40.123+02:00", 1_600_000_000_123),
        ("2020-09-13T12:26:40.123000Z", 1_600_000_000_123),
    ],
)
def test_times_are_exact(text: str, time_ms: int) -> None:
    assert parse_time_ms(text) == time_ms


def test_a_fleet_keeps_its_order_and_refuses_what_is_wrong(tmp_path: Path) -> None:
    header = "node,gpus,model,pool,site\n"
    fleet = read_fleet(write(tmp_path, header + "b,8,H100,p,no1\na,4,,q,\n", "FLEET.csv"))
    assert fleet.nodes == (Node("b", 8, "H100", "p", "no1"), Node("a", 4, "", "q", ""))
    assert fleet.gpus == 12
    for rows, message in (
        ("b,8,H,p,\nb,8,H,p,\n", 'FLEET.csv:3: node: "b" is on line 2 too'),
        ("b,eight,H,p,\n", 'FLEET.csv:2: gpus: expected a whole number from 0 to 1024, got "eight"'),
        ("b,8,H,,\n", "FLEET.csv:2: pool: is empty"),
        ("unplaced,8,H,p,\n", "is the name of what cannot be placed"),
        ("b,0,H,p,\n", "FLEET.csv: gpus: no node has a GPU"),
    ):
        with pytest.raises(TraceError) as caught:
            read_fleet(write(tmp_path, header + rows, "FLEET.csv"))
        assert message in str(caught.value)
