"""Through the command line and the real broker: what was in the CSV is on the topics; twice changes nothing."""

import asyncio
import csv
import json
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from gpuledger.agents.exceptions import MessageRejected
from gpuledger.agents.messages import Message
from gpuledger.agents.publisher import Delivered
from gpuledger.agents.replay.facts import JobReplay, Scope
from gpuledger.agents.replay.place import place
from gpuledger.agents.replay.replayer import send
from gpuledger.agents.replay.trace import Fleet, Node, TraceJob
from gpuledger.cli.main import cli
from gpuledger.schemas.events import Allocation, Inventory, Job, Tenant, decode_event
from tests.replay.topics import make_topics, read_topic

T0_S = 1_600_000_000


def write_trace(directory: Path, broken: bool = False) -> None:
    with (directory / "TRACE.csv").open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(("job_id", "account", "user", "gpu_milli", "start", "end", "state"))
        for n in range(200):
            milli = (250, 500, 1000, 3000)[n % 4]
            start = T0_S + 37 * n
            writer.writerow((f"j{n}", f"t{n % 3}", "u", milli, start, f"{start + 500 + n}.{n:03d}", "COMPLETED"))
        if broken:
            writer.writerow(("bad", "t1", "u", "many", T0_S, T0_S + 1, ""))
        # More than the fleet has: shown as a conflict, never dropped.
        writer.writerow(("huge", "t0", "u", 40_000, T0_S, T0_S + 10, "COMPLETED"))
    (directory / "FLEET.csv").write_text(
        "node,gpus,model,pool,site\n" + "".join(f"n{n},8,H100,p,s\n" for n in range(4))
    )


def invoke(directory: Path, kafka: str, prefix: str, *arguments: str) -> Result:
    command = ["replay", "jobs", str(directory / "TRACE.csv"), "--fleet", str(directory / "FLEET.csv")]
    report = ["--report", str(directory / "report.csv"), "--bootstrap", kafka]
    environment = {"GPULEDGER_KAFKA__TOPIC_PREFIX": prefix}
    return CliRunner().invoke(cli, [*command, *report, *arguments], env=environment)


@pytest.mark.services
def test_a_trace_is_on_the_topics_and_twice_is_once(kafka: str, tmp_path: Path) -> None:
    write_trace(tmp_path)
    by_job: Counter[str] = Counter()
    by_tenant: Counter[str] = Counter()
    with (tmp_path / "TRACE.csv").open() as text:
        for row in csv.DictReader(text):
            seconds, _, millis = row["end"].partition(".")
            held_ms = (int(seconds) - int(row["start"])) * 1000 + int(millis or 0)
            by_job[row["job_id"]] += held_ms * int(row["gpu_milli"])
            by_tenant[row["account"]] += held_ms * int(row["gpu_milli"])

    prefix = make_topics(kafka)
    result = invoke(tmp_path, kafka, prefix, "--format", "json")
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    assert {row["tenant"]: int(row["held_gpu_us"]) for row in shown} == by_tenant
    assert "not placed: huge (40 GPUs): no GPU of the fleet is free for it" in result.stderr
    assert "201 jobs, 32 GPUs" in result.stderr

    told: Counter[str] = Counter()
    gpus: defaultdict[str, list[str]] = defaultdict(list)
    allocations = read_topic(kafka, prefix, "allocations")
    for key, value in allocations:
        event = decode_event(value)
        assert isinstance(event, Allocation) and event.end_ms is not None and key == event.node
        told[event.job_id] += (event.end_ms - event.start_ms) * 1000 * event.weight_num // event.weight_den
        gpus[event.job_id].append(event.gpu)
    assert told == by_job
    assert len(gpus["huge"]) == 40 and all(gpu.startswith("unplaced/huge/") for gpu in gpus["huge"])
    known: set[str] = set()
    for key, value in read_topic(kafka, prefix, "inventory"):
        event = decode_event(value)
        assert isinstance(event, Inventory) and key == event.node
        known |= {placement.gpu for placement in event.placements}
    assert len(known) == 32
    assert all(set(held) <= known for job, held in gpus.items() if job != "huge")
    jobs = [decode_event(value) for _, value in read_topic(kafka, prefix, "jobs")]
    assert {job.id for job in jobs if isinstance(job, Job)} == set(by_job)
    tenants = [decode_event(value) for _, value in read_topic(kafka, prefix, "rates")]
    assert {tenant.id for tenant in tenants if isinstance(tenant, Tenant)} == {"t0", "t1", "t2"}

    assert invoke(tmp_path, kafka, prefix).exit_code == 0
    again = Counter(read_topic(kafka, prefix, "allocations"))
    assert again == Counter({record: 2 * n for record, n in Counter(allocations).items()})


@pytest.mark.services
def test_the_wait_ends_when_facts_are_stored_and_marks_worked_off(kafka: str, tmp_path: Path) -> None:
    prefix = make_topics(kafka)
    child = Path(__file__).parent / "ledger_child.py"
    command = [sys.executable, str(child), kafka, prefix, str(tmp_path / "engine")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["topics"] == ["allocations", "inventory", "jobs", "rates"]
    assert said["first"].startswith("gave up waiting for facts to be stored (")
    assert "jobs/0: 1 behind" in said["first"]
    facts = [behind for what, behind in said["seen"] if what == "facts to be stored"]
    marks = [behind for what, behind in said["seen"] if what == "minutes to be computed"]
    assert facts[0] > 0 and facts[-1] == 0 and facts == sorted(facts, reverse=True)
    assert marks[0] == 2 and marks[-1] == 0 and marks == sorted(marks, reverse=True)
    assert len(read_topic(kafka, prefix, "dirty")) == 2  # one of our own per pool


def test_skipped_rows_and_unplaced_jobs_are_listed(tmp_path: Path) -> None:
    write_trace(tmp_path, broken=True)
    stopped = invoke(tmp_path, "127.0.0.1:1", "", "--dry-run")
    assert stopped.exit_code == 2
    assert 'TRACE.csv:202: gpu_milli: expected a whole number from 0 to 100000000, got "many"' in stopped.stderr
    assert not (tmp_path / "report.csv").exists()
    skipped = invoke(tmp_path, "127.0.0.1:1", "", "--dry-run", "--on-error", "skip")
    assert skipped.exit_code == 0, skipped.output
    assert "1 rows skipped, 1 jobs not placed: listed in" in skipped.stderr
    rows = list(csv.DictReader((tmp_path / "report.csv").open()))
    assert [(row["what"], row["file"], row["line"], row["field"], row["value"]) for row in rows] == [
        ("skipped", "TRACE.csv", "202", "gpu_milli", "many"),
        ("unplaced", "", "", "job_id", "huge"),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from", "2020-05-02", "--dry-run"], "has no zone; write 2020-05-02T00:00:00Z"),
        (["--from", "1600000010", "--to", "1600000010", "--dry-run"], "--to: must be after --from"),
        (["--clip", "--dry-run"], "--clip: needs --from or --to"),
        (["--wait", "--dry-run"], "--wait: nothing is sent"),
        (["--name", "x" * 65, "--dry-run"], "--name: expected 1 to 64 printable characters"),
    ],
)
def test_options_that_contradict_each_other_are_refused(tmp_path: Path, arguments: list[str], message: str) -> None:
    write_trace(tmp_path)
    result = invoke(tmp_path, "127.0.0.1:1", "", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


class _FailsAt:
    """A sink whose n-th batch is refused; no broker can be told to refuse exactly that."""

    def __init__(self, refused: int) -> None:
        self.refused = refused
        self.batches = 0
        self.running = 0

    async def publish_many(self, messages: Iterable[Message], /) -> list[Delivered]:
        self.batches += 1
        number = self.batches
        self.running += 1
        try:
            await asyncio.sleep(0.01)
            if number == self.refused:
                raise MessageRejected("no")
            return [Delivered(message.topic, 0, number, 0) for message in messages]
        finally:
            self.running -= 1


def test_a_refused_batch_ends_the_replay_with_nothing_left_running() -> None:
    fleet = Fleet((Node("n0", 1, "", "p"),))
    jobs = [TraceJob(f"j{n}", "a", "u", 1, 1000, T0_S * 1000 + n, T0_S * 1000 + n + 1) for n in range(50)]
    replay = JobReplay(place(jobs, fleet), fleet, Scope("t"))
    sink = _FailsAt(3)
    with pytest.raises(MessageRejected):
        asyncio.run(send(replay, sink, batch=10))
    assert sink.running == 0 and sink.batches == 4
    seen: list[tuple[int, int]] = []
    sent = asyncio.run(send(replay, _FailsAt(0), lambda done, expected: seen.append((done, expected)), batch=10))
    assert sent.events == 102 and seen[0] == (10, 102) and seen[-1] == (102, 102)
    assert max(sent.last_offsets.values()) == 11
