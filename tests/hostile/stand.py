"""One worker under siege: all is accounted for, the process the same, its memory bounded, the ledger untouched."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.e2e.load import Load
from tests.e2e.pipeline import Digest, Installation, WorkerProcess, differences
from tests.hostile.siege import Account, besiege, unaccounted

__all__ = ["Stand", "stand"]

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_LETTERS = "SELECT topic, partition, offset, last_offset, reason FROM dead_letters FINAL"
#: A letter's bytes are compared for so many attacks.
_COMPARED = 300


@dataclass(frozen=True, slots=True)
class Stand:
    """What was seen; `wrong` is what should not have been. Memory in MiB: before, the most, at the end,
    and at each tenth of the time."""

    account: Account
    letters: int
    wrong: list[str]
    same_process: bool
    rss_before: int
    rss_most: int
    rss_after: int
    rss_tenths: list[int]
    seconds: float

    def figures(self) -> dict[str, Any]:
        """As the script prints them."""
        buried = self.account.buried
        by_topic = Counter(each.topic for each in buried)
        return {
            "messages": self.account.attacks,
            "records_in_dead_letters": sum(each.count for each in buried),
            "letters": self.letters,
            "refused_by_broker": dict(self.account.refused),
            "letters_by_topic": dict(by_topic),
            "kinds": len({(each.topic, each.kind) for each in buried}),
            "bombs": sum(each.kind.startswith("bomb") for each in buried),
            "valid_between": len(self.account.valid),
            "same_process": self.same_process,
            "worker_rss_mib": {"before": self.rss_before, "most": self.rss_most, "after": self.rss_after},
            "worker_rss_mib_at_tenths": self.rss_tenths,
            "seconds": round(self.seconds, 1),
            "wrong": len(self.wrong),
        }


class _Memory:
    """Looks at the resident memory of a process twice a second."""

    def __init__(self, pid: int) -> None:
        self._file = Path(f"/proc/{pid}/statm")
        self._enough = threading.Event()
        self.first = self.last = self.most = self._now()
        self.seen = [self.first]
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _now(self) -> int:
        return int(self._file.read_text().split()[1]) * _PAGE_BYTES >> 20

    def _look(self) -> None:
        while not self._enough.wait(0.5):
            try:
                self.last = self._now()
            except OSError:
                return
            self.most = max(self.most, self.last)
            self.seen.append(self.last)

    def stop(self) -> None:
        self._enough.set()
        self._thread.join()

    def tenths(self) -> list[int]:
        """At each tenth of the time."""
        return [self.seen[(len(self.seen) - 1) * n // 10] for n in range(11)]


def stand(
    installation: Installation, load: Load, undisturbed: Digest, count: int, seed: int, patience_s: float = 600
) -> Stand:
    """Lets one worker stand `count` attacks of `seed`, and looks at everything afterwards."""
    began = time.monotonic()
    worker = installation.start_worker()
    installation.wait_until(worker.ready, "the worker is ready")
    pid = worker.process.pid
    memory = _Memory(pid)
    try:
        with ThreadPoolExecutor(1) as threads:
            sending = threads.submit(lambda: asyncio.run(besiege(installation.config.kafka, load, count, seed)))
            installation.wait_until(sending.done, "everything is sent", 40 * patience_s)
            account = sending.result()
        number = "SELECT count() FROM (SELECT DISTINCT topic, partition, offset FROM dead_letters)"
        expected = len(account.buried)
        installation.wait_until(lambda: installation.number(number) >= expected, f"{expected} letters", patience_s)
        installation.settle(load, account.last, timeout_s=patience_s)
        letters = installation.rows(_LETTERS)
        wrong = unaccounted(account, letters, installation.config.kafka.topic_prefix)
        wrong += _other_bytes(installation, account)
        wrong += differences(installation.digest(load), undisturbed)
    finally:
        memory.stop()
    return Stand(
        account=account,
        letters=len(letters),
        wrong=wrong,
        same_process=_same(worker, pid),
        rss_before=memory.first,
        rss_most=memory.most,
        rss_after=memory.last,
        rss_tenths=memory.tenths(),
        seconds=time.monotonic() - began,
    )


def _same(worker: WorkerProcess, pid: int) -> bool:
    return worker.running and worker.process.pid == pid


def _other_bytes(installation: Installation, account: Account) -> list[str]:
    """Letters of some attacks that do not hold their message."""
    wrong: list[str] = []
    prefix = installation.config.kafka.topic_prefix
    single = [each for each in account.buried if each.count == 1 and not each.kind.startswith("bomb")]
    for each in single[:: max(1, len(single) // _COMPARED)]:
        ((start, headers),) = installation.rows(
            "SELECT hex(substring(value, 1, 64)), headers FROM dead_letters FINAL WHERE topic = {topic:String} "
            "AND partition = {partition:UInt32} AND offset = {offset:UInt64}",
            topic=prefix + each.topic,
            partition=each.partition,
            offset=each.offset,
        )
        if bytes.fromhex(start) != each.value:
            wrong.append(f"{each.topic}/{each.partition} offset {each.offset} ({each.kind}): other bytes in its letter")
        whole = len(each.headers) <= 100 and sum(len(value or b"") for _, value in each.headers) < 60_000
        if whole and len(json.loads(headers)) != len(each.headers):
            wrong.append(f"{each.topic}/{each.partition} offset {each.offset} ({each.kind}): other headers")
    return wrong
