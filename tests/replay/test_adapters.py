"""Faults in the two public formats: named like those of any trace."""

from pathlib import Path

import pytest

from gpuledger.agents.replay.exceptions import TraceError
from gpuledger.agents.replay.helios import read_helios
from gpuledger.agents.replay.openb import NODES_FILE, ORIGIN_MS, PODS_FILE, read_openb_fleet, read_openb_jobs
from gpuledger.agents.replay.place import place

POD = "name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec,qos,pod_phase,creation_time,deletion_time,scheduled_time\n"


def pods(folder: Path, rows: str) -> Path:
    (folder / NODES_FILE).write_text("sn,cpu_milli,memory_mib,gpu,model\nn0,1,1,1,T4\nn1,1,1,2,V100M16\n")
    (folder / PODS_FILE).write_text(POD + rows)
    return folder


def test_openb_honours_gpu_spec_and_ends_open_pods_with_the_trace(tmp_path: Path) -> None:
    folder = pods(
        tmp_path,
        "a,1,1,1,460,V100M16|V100M32,LS,Running,0,,10\n"
        "b,1,1,2,1000,,BE,Failed,0,100,50\n"
        "c,1,1,1,1000,,BE,Pending,5,60,\n",
    )
    fleet = read_openb_fleet(folder)
    assert [(node.pool, node.model) for node in fleet.nodes] == [("openb-t4", "T4"), ("openb-v100m16", "V100M16")]
    placement = place(read_openb_jobs(folder), fleet)
    a, b = placement.held
    assert (a.job.start_ms, a.job.end_ms, a.claims[0].gpu) == (ORIGIN_MS + 10_000, ORIGIN_MS + 100_000, "n1/0")
    assert [claim.gpu for claim in b.claims] == ["n0/0", "n1/1"]
    assert [job.job_id for job in placement.without_gpu] == ["c"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a,1,1,1,0,,LS,Running,0,9,1", "gpu_milli: 0 where num_gpu is 1"),
        ("a,1,1,2,500,,LS,Running,0,9,1", "gpu_milli: 500 where num_gpu is 2"),
        ("a,1,1,1,1000,,,Running,0,9,1", "qos: is empty"),
        ("a,1,1,1,1000,,LS,Running,0,1.5,1", 'deletion_time: expected a whole number from 0 to 3162240000, got "1.5"'),
        ("a,1,1,1,1000,,LS,Running,0,9,10", "deletion_time: 9 is before scheduled_time 10"),
    ],
)
def test_openb_faults_are_named(tmp_path: Path, row: str, message: str) -> None:
    with pytest.raises(TraceError) as caught:
        list(read_openb_jobs(pods(tmp_path, row + "\n")))
    assert f"{PODS_FILE}:2: {message}" in str(caught.value)


def test_openb_folder_without_its_files(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=f"holds neither {NODES_FILE} nor {NODES_FILE}.gz"):
        read_openb_fleet(tmp_path)


HELIOS = "time,vc,running_gpu_num,idle_gpu_num\n"


def test_helios_carries_a_missing_reading_and_counts_it(tmp_path: Path) -> None:
    path = tmp_path / "vc.csv"
    path.write_text(
        HELIOS
        + "2020-05-01 00:00:00,a,1,1\n2020-05-01 00:00:00,b,1,1\n2020-05-01 00:05:00,a,1,1\n"
        + "2020-05-01 00:10:00,a,1,1\n2020-05-01 00:10:00,b,2,1\n"
    )
    trace = read_helios(path)
    assert (trace.step_ms, trace.gaps, trace.end_ms - trace.start_ms) == (300_000, 1, 900_000)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            "2020-05-01 00:00:00,a,x,1\n",
            'vc.csv:2: running_gpu_num: expected a whole number from 0 to 1000000, got "x"',
        ),
        ("today,a,1,1\n", 'vc.csv:2: time: expected a time such as 2020-05-01 00:05:00, got "today"'),
        (
            "2020-05-01 00:00:00,a,1,1\n2020-05-01 00:00:00,a,1,1\n",
            'vc.csv:3: time: "2020-05-01 00:00:00" is there twice',
        ),
        ("2020-05-01 00:00:00,a,1,1\n", "vc.csv: time: has fewer than two instants"),
        ("2020-05-01 00:00:00,a,1,-1\n", "vc.csv:2: idle_gpu_num"),
    ],
)
def test_helios_faults_are_named(tmp_path: Path, rows: str, message: str) -> None:
    path = tmp_path / "vc.csv"
    path.write_text(HELIOS + rows)
    with pytest.raises(TraceError) as caught:
        read_helios(path)
    assert message in str(caught.value)
