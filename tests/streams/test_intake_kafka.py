"""The intake on a real broker: nothing lost, nothing acknowledged before it is safe, whatever dies."""

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer

from tests.streams.harness import Bench, Worker, bench, wait_until

pytestmark = pytest.mark.services

#: One poll yields at most this many records, so that a test has many blocks to cut between.
SMALL_BLOCKS = {"broker_max_poll_records": 50}


def all_stored(made: Bench, count: int) -> None:
    wait_until(lambda: made.stored() >= count, f"{count} rows are stored")


def all_committed(made: Bench, offset: int) -> None:
    ends = dict.fromkeys(range(made.partitions), offset)
    wait_until(lambda: made.committed() == ends, f"offset {offset} is committed in every partition")


def expected_rows(made: Bench, count: int) -> dict[int, list[tuple[int, bytes]]]:
    return {p: [(n, f"{p}-{n}".encode()) for n in range(count)] for p in range(made.partitions)}


def committed_is_stored(made: Bench) -> None:
    """What is committed was stored before: the rows below it have no hole."""
    for partition, committed in made.committed().items():
        below = made.query("select count(*) from rows where p = ? and o < ?", partition, committed or 0)
        assert (below[0][0] if below else 0) == (committed or 0), f"partition {partition} lost rows below {committed}"


def marked_up_to(made: Bench) -> dict[int, int]:
    marks = [(int(partition), int(offset)) for partition, offset in made.read(made.marks)]
    return {p: max(offset for q, offset in marks if q == p) for p, _ in marks}


def test_every_record_arrives_once_and_in_order(kafka: str, tmp_path: Path) -> None:
    with bench(kafka, tmp_path) as made:
        made.send(made.numbered(2_000))
        worker = made.start()
        all_stored(made, 8_000)
        made.send(made.numbered(500, start=2_000))
        all_committed(made, 2_500)

        assert worker.stop()[0] == 0
        assert made.rows() == expected_rows(made, 2_500)
        for partition in range(made.partitions):
            seen = [o for (o,) in made.query("select o from seen where p = ? order by rowid", partition)]
            assert seen == list(range(2_500))
        stats = worker.stats()
        assert (stats["records"], stats["stored"], stats["dropped"], stats["retries"]) == (10_000, 10_000, 0, 0)
        assert stats["last_offset"] == {str(p): 2_499 for p in range(made.partitions)}
        assert stats["blocks"] < 100, "records must come merged, not one by one"
        assert marked_up_to(made) == dict.fromkeys(range(made.partitions), 2_499)


def test_an_outage_of_the_store_is_waited_for(kafka: str, tmp_path: Path) -> None:
    with bench(kafka, tmp_path) as made:
        made.outage.touch()
        made.send(made.numbered(300))
        worker = made.start()
        wait_until(lambda: worker.log().count("the store is away") >= 4, "the store was tried again and again")
        assert worker.process.poll() is None
        assert set(made.committed().values()) == {None}
        made.outage.unlink()
        all_committed(made, 300)

        assert worker.stop()[0] == 0
        assert made.rows() == expected_rows(made, 300)
        assert made.read(made.letters) == []
        assert worker.stats()["retries"] >= 4


def test_a_block_is_prepared_while_the_one_before_is_stored(kafka: str, tmp_path: Path) -> None:
    """One block ahead and no more: each is stored, marked and acknowledged in its turn."""
    with bench(kafka, tmp_path, partitions=1) as made:
        made.send(made.numbered(1_000))
        worker = made.start(store_ms=100, faust=SMALL_BLOCKS, limits={"max_records": 100})
        all_committed(made, 1_000)
        assert worker.stop()[0] == 0
        seen = [o for (o,) in made.query("select o from seen order by rowid")]
        assert seen == list(range(1_000))
        assert marked_up_to(made) == {0: 999}
        stats = worker.stats()
        assert 1 <= stats["ahead"] < stats["blocks"]


@pytest.mark.parametrize("plain", [False, True], ids=["prepared", "plain"])
def test_bad_records_are_dead_lettered_and_their_neighbours_stored(kafka: str, tmp_path: Path, plain: bool) -> None:
    with bench(kafka, tmp_path, partitions=2) as made:
        values = made.numbered(400)
        values[0][17] = b"poison pill"
        values[0][399] = b"bad record"
        values[1][0] = b"reject me"
        values[1][200] = b"poison again"
        made.send(values)
        worker = made.start(plain=plain)
        all_committed(made, 400)

        assert worker.stop()[0] == 0
        bad = {(0, 17), (0, 399), (1, 0), (1, 200)}
        assert {(p, o) for p, rows in made.rows().items() for o, _ in rows} == {
            (p, o) for p in range(2) for o in range(400)
        } - bad
        letters = dict(made.read(made.letters))
        assert letters == {
            "0/17": "ValueError: cannot read b'poison pill' at offset 17",
            "0/399": "bad by name",
            "1/0": "rejected by the sink",
            "1/200": "ValueError: cannot read b'poison again' at offset 200",
        }
        stats = worker.stats()
        assert (stats["stored"], stats["dead_letters"], stats["retries"]) == (796, 4, 0)


def test_a_topic_of_nothing_but_bad_records_moves_on(kafka: str, tmp_path: Path) -> None:
    with bench(kafka, tmp_path, partitions=1) as made:
        made.send(made.numbered(60))
        made.start(all_bad=True)
        all_committed(made, 60)
        assert {key for key, _ in made.read(made.letters)} == {f"0/{n}" for n in range(60)}


def test_a_fault_of_our_own_empties_no_topic_into_the_dead_letters(kafka: str, tmp_path: Path) -> None:
    with bench(kafka, tmp_path, partitions=2) as made:
        made.send(made.numbered(100))
        broken = made.start("broken", broken=True)
        wait_until(lambda: broken.log().count("AttributeError: our own mistake") >= 3, "the store was tried again")
        assert broken.stop()[0] == 0
        assert made.read(made.letters) == []
        assert set(made.committed().values()) == {None}

        made.start("repaired")
        all_committed(made, 100)
        assert made.rows() == expected_rows(made, 100)


@pytest.mark.parametrize("at", [("stored", 1), ("marked", 1), ("stored", 4), ("marked", 4)], ids=str)
def test_kill_9_between_the_steps_loses_nothing(kafka: str, tmp_path: Path, at: tuple[str, int]) -> None:
    with bench(kafka, tmp_path) as made:
        made.send(made.numbered(500))
        limits = {"max_records": 200, "linger_ms": 500}
        doomed = made.start("doomed", kill_at=at, faust=SMALL_BLOCKS, limits=limits)
        assert doomed.wait() == -9
        assert made.stored() < 2_000
        committed_is_stored(made)
        if at[1] == 1:
            assert set(made.committed().values()) == {None}

        made.start("heir")
        all_committed(made, 500)
        assert made.rows() == expected_rows(made, 500)
        assert marked_up_to(made) == dict.fromkeys(range(made.partitions), 499)
        assert made.query("select count(*) from seen")[0][0] > 2_000, "what was in flight must come again"


def test_workers_that_join_and_leave_lose_nothing(kafka: str, tmp_path: Path) -> None:
    with bench(kafka, tmp_path) as made:
        slow = {"store_ms": 60, "faust": SMALL_BLOCKS, "limits": {"max_records": 100}}

        def stores(name: str) -> None:
            count = "select count(*) from seen where worker = ?"
            before = made.query(count, name)
            wait_until(lambda: made.query(count, name) > max(before, [(0,)]), f"worker {name} stores")

        with made.feed(per_second=300) as fed:
            first = made.start("first", **slow)
            stores("first")
            second = made.start("second", **slow)
            stores("second")
            stores("first")
            committed_is_stored(made)
            assert first.stop()[0] == 0
            committed_is_stored(made)
            made.start("third", **slow)
            stores("third")
            second.kill()
            committed_is_stored(made)
            time.sleep(1)
        all_committed(made, fed["sent"])
        assert made.rows() == expected_rows(made, fed["sent"])
        assert made.read(made.letters) == []


def test_a_block_in_flight_across_a_rebalance_is_not_acknowledged(kafka: str, tmp_path: Path) -> None:
    with bench(kafka, tmp_path) as made:
        made.send(made.numbered(1_000))
        first = made.start("first", hold_at=("marked", 2), faust=SMALL_BLOCKS, limits={"max_records": 100})
        wait_until(first.ready.exists, "a block is held in flight")
        second = made.start("second")
        wait_until(lambda: "Worker ready" in second.log(), "the second worker has joined")
        wait_until(lambda: first.log().count("Worker ready") == 2, "the first worker has shared its partitions")
        first.release()
        all_committed(made, 1_000)
        assert first.stop()[0] == 0
        assert first.stats()["dropped"] > 0
        assert made.rows() == expected_rows(made, 1_000)


def test_the_committed_offset_follows_the_last_acknowledged_block(kafka: str, tmp_path: Path) -> None:
    with bench(kafka, tmp_path, partitions=1) as made:
        made.send(made.numbered(1_000))
        worker = made.start(hold_at=("marked", 3), faust=SMALL_BLOCKS, limits={"max_records": 100})
        wait_until(worker.ready.exists, "the third block is held")
        marks = [int(offset) for _, offset in made.read(made.marks)]
        assert len(marks) == 3
        wait_until(lambda: made.committed() == {0: marks[1] + 1}, "two blocks are committed")
        time.sleep(2.5)  # further commits must not move it
        assert made.committed() == {0: marks[1] + 1}


def test_holes_in_the_log_are_crossed_and_nothing_else(kafka: str, tmp_path: Path) -> None:
    async def send_in_transactions() -> None:
        producer = AIOKafkaProducer(bootstrap_servers=kafka, transactional_id=made.topic)
        async with producer:
            for n in range(20):
                async with producer.transaction():
                    for m in range(5):
                        await producer.send(made.topic, f"{n}-{m}".encode(), partition=0)

    with bench(kafka, tmp_path, partitions=1) as made:
        asyncio.run(send_in_transactions())
        worker = made.start(faust={"broker_max_poll_records": 7})
        # Each transaction leaves a marker, an offset without a record: 20 * 6 offsets, the last of them a marker.
        all_committed(made, 119)
        assert worker.stop()[0] == 0
        assert [value for _, value in made.rows()[0]] == [f"{n}-{m}".encode() for n in range(20) for m in range(5)]
        assert made.query("select count(*) from seen")[0][0] == 100


def test_a_fetched_block_that_got_lost_on_the_way_is_fetched_again(kafka: str, tmp_path: Path) -> None:
    with bench(kafka, tmp_path, partitions=1) as made:
        made.send(made.numbered(500))
        worker = made.start(forgetful=True, faust=SMALL_BLOCKS)
        all_committed(made, 500)
        assert worker.stop()[0] == 0
        assert made.rows() == expected_rows(made, 500)


def test_a_seek_brings_the_records_again_and_disowns_the_block_in_flight(kafka: str, tmp_path: Path) -> None:
    with bench(kafka, tmp_path, partitions=1) as made:
        made.send(made.numbered(400))
        worker = made.start(seek_at=("marked", 2), faust=SMALL_BLOCKS, limits={"max_records": 100})
        all_committed(made, 400)
        assert worker.stop()[0] == 0
        assert made.rows() == expected_rows(made, 400)
        assert made.query("select count(*) from seen where o = 0")[0][0] == 2
        assert worker.stats()["dropped"] > 0


def test_a_slow_store_holds_fetching_back_and_the_membership_lasts(kafka: str, tmp_path: Path) -> None:
    with bench(kafka, tmp_path, partitions=2) as made:
        made.outage.touch()
        made.send({p: [b"x" * 1_000] * 1_000 for p in range(2)})
        worker = made.start(held_bytes=100_000, faust={**SMALL_BLOCKS, "broker_max_poll_interval": 2})
        wait_until(lambda: worker.log().count("the store is away") >= 12, "the outage outlasts the poll interval")
        made.outage.unlink()
        all_committed(made, 1_000)
        assert worker.stop()[0] == 0
        assert made.query("select count(*) from seen")[0][0] == 2_000, "a lost membership would deliver twice"
        assert worker.log().count("Executing _on_partitions_assigned") == 1


def test_an_outage_does_not_fill_the_memory(kafka: str, tmp_path: Path) -> None:
    with bench(kafka, tmp_path, partitions=2) as made:
        made.outage.touch()
        made.send({p: [b"x" * 1_000] * 1_000 for p in range(2)})
        worker = made.start(held_bytes=100_000, faust=SMALL_BLOCKS, limits={"max_records": 100})
        wait_until(lambda: worker.log().count("the store is away") >= 6, "fetching had the time to go on")
        assert worker.stop()[0] == 0
        # A block of 50 records is 65 kB; each partition may pass the limit by one.
        assert 0 < worker.stats()["held_bytes"] < 250_000


def stops_in_time(worker: Worker) -> None:
    status, seconds = worker.stop()
    assert status == 0
    assert seconds < 10, "SIGTERM must end a worker within the promised ten seconds"


def test_sigterm_finishes_the_block_in_flight(kafka: str, tmp_path: Path) -> None:
    with bench(kafka, tmp_path, partitions=1) as made:
        made.send(made.numbered(100))
        worker = made.start(store_ms=2_000)
        wait_until(lambda: "Worker ready" in worker.log(), "the worker has joined")
        time.sleep(0.8)  # well inside the two seconds of the store call
        assert made.stored() == 0
        stops_in_time(worker)
        assert made.committed() == {0: 100}
        assert made.rows() == expected_rows(made, 100)


@pytest.mark.parametrize("how", [{"hold_at": ("stored", 1)}, {"store_hangs": True}], ids=["held", "hung store"])
def test_sigterm_leaves_a_block_that_does_not_end(kafka: str, tmp_path: Path, how: dict[str, Any]) -> None:
    with bench(kafka, tmp_path, partitions=1) as made:
        made.send(made.numbered(100))
        worker = made.start(**how)
        wait_until(worker.ready.exists, "the block is stuck")
        stops_in_time(worker)
        assert made.committed() == {0: None}
