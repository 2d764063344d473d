"""The spool: no number twice, nothing lost without a gap record, whatever happens to process, file and disk."""

from __future__ import annotations

import logging
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from gpuledger.agents.exceptions import SpoolChanged
from gpuledger.agents.messages import Message
from gpuledger.agents.publisher import SpooledMessage
from gpuledger.agents.spool import FILE_NAME, Spool
from gpuledger.agents.spool_store import BuildBatch, merge_gap
from gpuledger.schemas.events import Placement
from gpuledger.schemas.telemetry import Gap

HOUR_MS = 3_600_000
NOW = 1_790_000_000_000


def _spool(folder: Path, max_bytes: int = 10_000_000, max_age_ms: int = HOUR_MS, now_ms: int = NOW) -> Spool:
    return Spool(folder, max_bytes, max_age_ms, now_ms)


def _batch(told: list[list[Gap]] | None = None, size: int = 1000) -> BuildBatch:
    """A batch whose value begins with its number; the gaps it got go to `told`."""

    def build(seq: int, gaps: list[Gap]) -> Message:
        if told is not None:
            told.append(gaps)
        return Message("telemetry", "n", f"{seq};".encode() + b"x" * size, (("h", b"\x00\xff\x80"),))

    return build


def _take_all(spool: Spool) -> list[SpooledMessage]:
    """Everything that waits, in order; one `take` gives a part of the spool at most."""
    taken: list[SpooledMessage] = []
    while found := spool.take(1000, 10**9):
        taken += found
    return taken


def _seqs(folder: Path) -> list[int]:
    """The numbers of the batches that wait on disk, in order, read beside the spool that holds them."""
    with closing(sqlite3.connect(f"file:{folder / FILE_NAME}?mode=ro", uri=True)) as db:
        rows = db.execute("SELECT value FROM messages WHERE topic = 'telemetry' ORDER BY number").fetchall()
    return [int(value.split(b";")[0]) for (value,) in rows]


def test_messages_come_back_in_order_and_whole(tmp_path: Path) -> None:
    spool = _spool(tmp_path)
    event = Message("allocations", "n", b"{}")
    for n in range(3):
        assert spool.seal_batch("run", n * 10, n * 10 + 10, NOW, _batch()) == n
        spool.seal_event(event, NOW)
    taken = spool.take(100, 10**9)
    assert [one.message.topic for one in taken] == ["telemetry", "allocations"] * 3
    assert taken[0].message == _batch()(0, [])
    assert taken[1].message == event
    assert spool.take(100, 10**9) == []  # on their way
    spool.acknowledge([one.number for one in taken[:2]])
    spool.give_back([one.number for one in taken[2:]])
    assert _seqs(tmp_path) == [1, 2]


def test_a_take_is_bounded_but_never_empty_while_something_waits(tmp_path: Path) -> None:
    spool = _spool(tmp_path)
    for _ in range(5):
        spool.seal_batch("run", 0, 1, NOW, _batch())
    assert len(spool.take(2, 10**9)) == 2
    assert len(spool.take(100, 1)) == 1


def test_numbers_go_on_after_a_restart_and_begin_anew_in_another_run(tmp_path: Path) -> None:
    spool = _spool(tmp_path)
    spool.seal_batch("run", 0, 1, NOW, _batch())
    spool.acknowledge([one.number for one in spool.take(9, 10**9)])
    spool.close()
    spool = _spool(tmp_path)
    assert spool.seal_batch("run", 1, 2, NOW, _batch()) == 1
    assert spool.seal_batch("other", 1, 2, NOW, _batch()) == 0


def test_a_batch_that_cannot_be_built_takes_no_number(tmp_path: Path) -> None:
    spool = _spool(tmp_path)

    def broken(seq: int, gaps: list[Gap]) -> Message:
        raise RuntimeError(f"batch {seq}, gaps {gaps}")

    with pytest.raises(RuntimeError):
        spool.seal_batch("run", 0, 1, NOW, broken)
    assert spool.seal_batch("run", 0, 1, NOW, _batch()) == 0


def test_when_full_the_oldest_go_as_one_gap_that_a_later_batch_tells(tmp_path: Path) -> None:
    told: list[list[Gap]] = []
    spool = _spool(tmp_path, max_bytes=20_000)
    for n in range(40):
        spool.seal_batch("run", n * 10, n * 10 + 10, NOW, _batch(told))
    waiting = _seqs(tmp_path)
    assert waiting == list(range(waiting[0], 40))
    assert 10 < len(waiting) < 20
    assert all(gaps == [] for gaps in told), "gaps wait while batches are dropped, or they would be dropped with them"
    spool.acknowledge([one.number for one in _take_all(spool)])
    for n in range(40, 43):
        spool.seal_batch("run", n * 10, n * 10 + 10, NOW, _batch(told))
    last = waiting[0] - 1
    gaps = [gap for gaps in told for gap in gaps]
    assert gaps == [Gap("run", 0, last, 0, last * 10 + 10, last + 1, "spool full")]
    assert spool.stats().gaps == 0


def test_dropped_sent_and_waiting_are_every_number_exactly_once(tmp_path: Path) -> None:
    """Through outages and recoveries, with a restart in each: gaps and messages tile the numbers of the run."""
    told: list[list[Gap]] = []
    sent: list[int] = []
    gaps: list[Gap] = []
    spool = _spool(tmp_path, max_bytes=12_000)
    count = 0
    for outage in (30, 3, 25, 40):
        for _ in range(outage):
            spool.seal_batch("run", count, count + 1, NOW, _batch(told))
            count += 1
        spool.close()
        spool = _spool(tmp_path, max_bytes=12_000)
        taken = _take_all(spool)
        sent += [int(one.message.value.split(b";")[0]) for one in taken]
        gaps += [gap for seq in sent[-len(taken) :] for gap in told[seq]]
        spool.acknowledge([one.number for one in taken])
    for _ in range(3):
        spool.seal_batch("run", count, count + 1, NOW, _batch(told))
        sent.append(count)
        gaps += told[count]
        count += 1
    dropped = [seq for gap in gaps for seq in range(gap.first_seq, gap.last_seq + 1)]
    assert sum(gap.batches for gap in gaps) == len(dropped)
    assert sorted(sent + dropped) == list(range(count))


def test_gaps_told_by_a_dropped_batch_are_told_again(tmp_path: Path) -> None:
    told: list[list[Gap]] = []
    spool = _spool(tmp_path, max_bytes=5_000)
    for n in range(10):
        spool.seal_batch("run", n, n + 1, NOW, _batch(told))
    spool.acknowledge([one.number for one in _take_all(spool)])
    for n in range(10, 12):
        spool.seal_batch("run", n, n + 1, NOW, _batch(told))
    teller = next(n for n, gaps in enumerate(told) if gaps)
    first = told[teller][0]
    for n in range(12, 30):
        spool.seal_batch("run", n, n + 1, NOW, _batch(told))
    assert teller not in _seqs(tmp_path)
    spool.acknowledge([one.number for one in _take_all(spool)])
    for n in range(30, 33):
        spool.seal_batch("run", n, n + 1, NOW, _batch(told))
    later = [gap for gaps in told[teller + 1 :] for gap in gaps]
    assert any(gap.first_seq == first.first_seq and gap.last_seq >= first.last_seq for gap in later)


def test_what_is_too_old_goes_with_its_reason(tmp_path: Path) -> None:
    told: list[list[Gap]] = []
    spool = _spool(tmp_path, max_age_ms=HOUR_MS)
    spool.seal_batch("run", 0, 10, NOW, _batch(told))
    spool.seal_batch("run", 10, 20, NOW + HOUR_MS + 1, _batch(told))
    for n in range(2, 4):
        spool.seal_batch("run", n * 10, n * 10 + 10, NOW + HOUR_MS + 2, _batch(told))
    assert _seqs(tmp_path) == [1, 2, 3]
    assert [gap for gaps in told for gap in gaps] == [Gap("run", 0, 0, 0, 10, 1, "spool: too old")]


def test_batches_are_dropped_before_events(tmp_path: Path) -> None:
    spool = _spool(tmp_path, max_bytes=8_000)
    spool.seal_event(Message("allocations", "n", b'{"end": 1}'), NOW)
    for n in range(30):
        spool.seal_batch("run", n, n + 1, NOW, _batch())
    assert spool.take(1, 10**9)[0].message.value == b'{"end": 1}'


def test_what_is_on_its_way_is_not_dropped(tmp_path: Path) -> None:
    spool = _spool(tmp_path, max_bytes=5_000)
    spool.seal_batch("run", 0, 1, NOW, _batch())
    taken = spool.take(1, 10**9)
    for n in range(1, 20):
        spool.seal_batch("run", n, n + 1, NOW, _batch())
    spool.give_back([taken[0].number])
    assert _seqs(tmp_path)[0] == 0


def test_what_was_sent_without_an_answer_is_dropped_last_and_its_gap_says_so(tmp_path: Path) -> None:
    """The broker may have it: a gap that says it is missing would be wrong."""
    told: list[list[Gap]] = []
    spool = _spool(tmp_path, max_bytes=20_000)
    for n in range(4):
        spool.seal_batch("run", n, n + 1, NOW, _batch(told))
    spool.give_back([one.number for one in spool.take(2, 10**9)])
    for n in range(4, 40):
        spool.seal_batch("run", n, n + 1, NOW, _batch(told))
    waiting = _seqs(tmp_path)
    assert waiting == [0, 1, *range(waiting[2], 40)]
    # So much later that only age can decide.
    for n in range(40, 44):
        spool.seal_batch("run", n, n + 1, NOW + 2 * HOUR_MS, _batch(told))
    gaps = {gap.reason: gap for gaps in told for gap in gaps}
    assert gaps["spool: too old, perhaps sent"] == Gap("run", 0, 1, 0, 2, 2, "spool: too old, perhaps sent")
    assert gaps["spool full"] == Gap("run", 2, waiting[2] - 1, 2, waiting[2], waiting[2] - 2, "spool full")
    assert gaps["spool: too old"].first_seq == waiting[2]


def test_what_a_killed_agent_had_on_its_way_is_in_doubt_after_the_restart(tmp_path: Path) -> None:
    spool = _spool(tmp_path, max_bytes=20_000)
    for n in range(10):
        spool.seal_batch("run", n, n + 1, NOW, _batch())
    on_its_way = {int(one.message.value.split(b";")[0]) for one in spool.take(1000, 10**9)}
    spool.close()  # as a kill leaves it: nothing acknowledged, nothing given back
    spool = _spool(tmp_path, max_bytes=20_000)
    for n in range(10, 60):
        spool.seal_batch("run", n, n + 1, NOW, _batch())
    waiting = _seqs(tmp_path)
    assert 0 < len(on_its_way) < 6, "at most a quarter of the spool is on its way at once"
    assert on_its_way <= set(waiting)
    assert waiting[-5:] == [55, 56, 57, 58, 59], "new batches find room beside what is in doubt"


def test_gaps_join_only_where_they_touch() -> None:
    gaps = merge_gap([], Gap("r", 0, 3, 0, 4, 4))
    gaps = merge_gap(gaps, Gap("r", 6, 6, 6, 7, 1))
    gaps = merge_gap(gaps, Gap("s", 4, 4, 4, 5, 1))
    assert len(gaps) == 3
    gaps = merge_gap(gaps, Gap("r", 4, 5, 4, 6, 2))
    assert sorted((gap.run_id, gap.first_seq, gap.last_seq, gap.batches) for gap in gaps) == [
        ("r", 0, 6, 7),
        ("s", 4, 4, 1),
    ]


def test_a_rejected_batch_is_set_aside_and_leaves_a_gap(tmp_path: Path) -> None:
    told: list[list[Gap]] = []
    spool = _spool(tmp_path)
    spool.seal_batch("run", 0, 10, NOW, _batch(told))
    spool.reject(spool.take(1, 10**9)[0].number, "broker: too large")
    spool.seal_batch("run", 10, 20, NOW, _batch(told))
    assert _seqs(tmp_path) == [1]
    assert told[1] == [Gap("run", 0, 0, 0, 10, 1, "broker: too large")]
    assert spool.stats().rejected == 1


# -- crashes -----------------------------------------------------------------------------------------------------------

_WRITER = """
import sys
from pathlib import Path
from gpuledger.agents.messages import Message
from gpuledger.agents.spool import Spool
spool = Spool(Path(sys.argv[1]), 10**9, 10**9, 0)
while True:
    seq = spool.seal_batch("run", 0, 1, 0, lambda seq, gaps: Message("telemetry", "n", b"%d;" % seq + b"x" * 20000))
    print(seq, flush=True)
"""


def test_kill_9_loses_no_sealed_batch_and_reuses_no_number(tmp_path: Path) -> None:
    sealed = -1
    for pause_s in (0.05, 0.11, 0.17, 0.23):
        writer = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert writer.stdout is not None
        first = int(writer.stdout.readline())
        assert first >= sealed + 1
        time.sleep(pause_s)
        writer.send_signal(signal.SIGKILL)
        rest = [line for line in writer.stdout.read().split("\n") if line]
        writer.wait()
        sealed = int(rest[-1]) if rest else first
        spool = _spool(tmp_path, max_bytes=10**9, max_age_ms=10**15)
        # At most the one batch whose number was not printed yet came on top.
        assert _seqs(tmp_path) in (list(range(sealed + 1)), list(range(sealed + 2)))
        sealed = _seqs(tmp_path)[-1]
        spool.close()


def test_a_damaged_file_is_set_aside_with_its_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spool = _spool(tmp_path)
    for n in range(50):
        spool.seal_batch("run", n, n + 1, NOW, _batch())
    spool.close()
    path = tmp_path / FILE_NAME
    data = bytearray(path.read_bytes())
    data[4096:40960] = b"\x5a" * (40960 - 4096)
    path.write_bytes(data)
    with caplog.at_level(logging.ERROR):
        spool = _spool(tmp_path)
    assert "damaged" in caplog.text
    assert not spool.in_memory
    assert spool.seal_batch("new", 0, 1, NOW, _batch()) == 0
    reasons = list(tmp_path.glob("*.reason.txt"))
    assert len(reasons) == 1
    assert reasons[0].read_text().strip() != ""
    assert (tmp_path / f"{FILE_NAME}.damaged-{NOW}").read_bytes() == bytes(data)


def test_no_database_at_all_is_set_aside_too(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"not a database, but long enough to be read as one" * 100)
    spool = _spool(tmp_path)
    assert spool.seal_batch("run", 0, 1, NOW, _batch()) == 0
    assert not spool.in_memory


def test_a_torn_tail_of_the_log_is_cut_off(tmp_path: Path) -> None:
    """A power cut in the middle of a commit: what was committed before is there, the torn commit is not."""
    spool = _spool(tmp_path)
    for n in range(3):
        spool.seal_batch("run", n, n + 1, NOW, _batch())
    before = (tmp_path / FILE_NAME).read_bytes(), (tmp_path / f"{FILE_NAME}-wal").read_bytes()
    spool.seal_batch("run", 3, 4, NOW, _batch())
    after = (tmp_path / f"{FILE_NAME}-wal").read_bytes()
    spool.close()
    for cut in (len(before[1]) + 100, (len(before[1]) + len(after)) // 2, len(after) - 1):
        copy = tmp_path / f"cut-{cut}"
        copy.mkdir()
        (copy / FILE_NAME).write_bytes(before[0])
        (copy / f"{FILE_NAME}-wal").write_bytes(after[:cut])
        torn = _spool(copy)
        assert _seqs(copy) == [0, 1, 2]
        assert torn.seal_batch("run", 3, 4, NOW, _batch()) == 3
        torn.close()


def test_a_message_with_a_wrong_check_sum_is_set_aside_alone(tmp_path: Path) -> None:
    told: list[list[Gap]] = []
    spool = _spool(tmp_path)
    for n in range(3):
        spool.seal_batch("run", n, n + 1, NOW, _batch(told))
    other = sqlite3.connect(tmp_path / FILE_NAME)
    other.execute("UPDATE messages SET value = x'00' WHERE number = 2")
    other.commit()
    other.close()
    assert [one.message.value[:2] for one in _take_all(spool)] == [b"0;", b"2;"]
    spool.seal_batch("run", 3, 4, NOW, _batch(told))
    assert [(gap.first_seq, gap.last_seq) for gap in told[3]] == [(1, 1)]
    assert "check sum" in told[3][0].reason


# -- disks -------------------------------------------------------------------------------------------------------------


def test_without_a_usable_directory_memory_takes_over_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.ERROR):
        spool = _spool(tmp_path / "file" / "spool")
    assert spool.in_memory
    assert "cannot be written" in caplog.text
    assert spool.seal_batch("run", 0, 1, NOW, _batch()) == 0
    taken = spool.take(10, 10**9)
    assert len(taken) == 1
    spool.acknowledge([taken[0].number])
    assert spool.stats().messages == 0


_FULL_DISK = """
import resource, sys
from pathlib import Path
from gpuledger.agents.exceptions import SpoolChanged
from gpuledger.agents.messages import Message
from gpuledger.agents.spool import Spool
folder = Path(sys.argv[1])
now = 0
spool = Spool(folder, 10**9, 10**9, now)
build = lambda seq, gaps: Message("telemetry", "n", b"%d;" % seq + b"x" * 50000)
for _ in range(4):
    spool.seal_batch("run", 0, 1, now, build)
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))   # from here on the files cannot grow: a full disk
for n in range(100):
    try:
        spool.seal_batch("run", 0, 1, now, build)
    except SpoolChanged as changed:
        print("changed after", 4 + n)
        break
assert spool.in_memory
assert spool.seal_batch("second", 0, 1, now, build) == 0
numbers = []
while True:
    taken = spool.take(100, 10**9)
    if not taken:
        break
    numbers += [int(one.message.value.split(b";")[0]) for one in taken]
    spool.acknowledge([one.number for one in taken])
print("sent", numbers)
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
try:
    spool.seal_batch("second", 0, 1, now + 61_000, build)
except SpoolChanged:
    assert not spool.in_memory
    assert spool.seal_batch("third", 0, 1, now + 61_000, build) == 0
    print("back on disk")
"""


def test_a_full_disk_falls_back_to_memory_still_drains_and_comes_back(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _FULL_DISK, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    sealed = int(lines[0].removeprefix("changed after "))
    assert sealed >= 4
    # All that the disk held, then what memory took over, in order.
    assert lines[1] == f"sent {[*range(sealed), 0]}"
    assert lines[2] == "back on disk"


_FULL_DISK_AT_THE_ACKNOWLEDGEMENT = """
import resource, sys
from pathlib import Path
from gpuledger.agents.messages import Message
from gpuledger.agents.spool import Spool
spool = Spool(Path(sys.argv[1]), 10**9, 10**9, 0)
build = lambda seq, gaps: Message("telemetry", "n", b"%d;" % seq)
for _ in range(4):
    spool.seal_batch("run", 0, 1, 0, build)
taken = spool.take(100, 10**9)
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
spool.acknowledge([one.number for one in taken])
print("full", spool.stats().messages, len(spool.take(100, 10**9)), spool.stats().messages)
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
print("free", len(spool.take(100, 10**9)), spool.stats().messages, spool.stats().bytes)
"""


def test_what_a_full_disk_kept_although_it_was_sent_goes_when_there_is_room(tmp_path: Path) -> None:
    """Or it would count as waiting, and fill the spool's bound, until the next start."""
    code = [sys.executable, "-c", _FULL_DISK_AT_THE_ACKNOWLEDGEMENT, str(tmp_path)]
    done = subprocess.run(code, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["full 4 0 4", "free 0 0 0"]


_FULL_DISK_AT_THE_REFUSAL = """
import resource, sys
from pathlib import Path
from gpuledger.agents.messages import Message
from gpuledger.agents.spool import Spool
spool = Spool(Path(sys.argv[1]), 10**9, 10**9, 0)
for _ in range(2):
    spool.seal_batch("run", 0, 1, 0, lambda seq, gaps: Message("telemetry", "n", b"%d;" % seq))
first, second = spool.take(100, 10**9)
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
spool.reject(first.number, "broker: too large")
spool.give_back([second.number])
taken = spool.take(100, 10**9)
print("full", [one.number == second.number for one in taken], spool.stats().messages, spool.stats().rejected)
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
print("free", len(spool.take(100, 10**9)), spool.stats().messages, spool.stats().rejected, spool.stats().gaps)
"""


def test_what_a_full_disk_kept_although_it_was_refused_is_set_aside_when_there_is_room(tmp_path: Path) -> None:
    code = [sys.executable, "-c", _FULL_DISK_AT_THE_REFUSAL, str(tmp_path)]
    done = subprocess.run(code, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["full [True] 2 0", "free 0 1 1 1"]


def _damage(path: Path) -> None:
    """The same file, with another page size behind the spool's back, is what SQLite calls malformed."""
    checkpoint = sqlite3.connect(path)
    checkpoint.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    checkpoint.close()
    with path.open("r+b") as file:
        file.write(b"\x00" * path.stat().st_size)
        os.fsync(file.fileno())


def test_damage_while_running_begins_a_new_file_and_a_new_run(tmp_path: Path) -> None:
    spool = _spool(tmp_path)
    for n in range(20):
        spool.seal_batch("run", n, n + 1, NOW, _batch(size=5000))
    _damage(tmp_path / FILE_NAME)
    with pytest.raises(SpoolChanged):
        for n in range(50):
            spool.seal_batch("run", n, n + 1, NOW, _batch(size=5000))
    assert spool.seal_batch("next", 0, 1, NOW, _batch()) == 0
    assert list(tmp_path.glob("*.damaged-*"))


def test_what_was_on_its_way_when_the_file_was_damaged_takes_nothing_of_the_new_one_along(tmp_path: Path) -> None:
    spool = _spool(tmp_path)
    for n in range(20):
        spool.seal_batch("run", n, n + 1, NOW, _batch(size=5000))
    first, second, *_ = (one.number for one in spool.take(5, 10**9))
    _damage(tmp_path / FILE_NAME)
    with pytest.raises(SpoolChanged):
        for n in range(50):
            spool.seal_batch("run", n, n + 1, NOW, _batch(size=5000))
    for n in range(10):
        spool.seal_batch("next", n, n + 1, NOW, _batch())
    spool.acknowledge([first])
    spool.reject(second, "broker: too large")
    assert (spool.stats().messages, spool.stats().rejected, len(spool.take(100, 10**9))) == (10, 0, 10)


def test_placements_are_kept_over_restarts(tmp_path: Path) -> None:
    placement = Placement(id="p", revision=1, claimed_at_ms=NOW, gpu="g", node="n", pool="q", start_ms=NOW)
    spool = _spool(tmp_path)
    spool.save_placements([placement])
    spool.close()
    assert _spool(tmp_path).placements() == [placement]
