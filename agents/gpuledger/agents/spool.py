"""The agent's spool: what was measured is on disk before it is sent, and leaves it when the broker has it.

A damaged file is set aside with its reason; where the disk cannot be written, memory takes over under a new run while
what the disk holds is still sent. Both are told by `SpoolChanged`, because numbers must then begin afresh.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path

from gpuledger.agents.exceptions import SpoolChanged, SpoolError
from gpuledger.agents.messages import Message
from gpuledger.agents.publisher import MAX_IN_FLIGHT, MAX_IN_FLIGHT_BYTES, SpooledMessage
from gpuledger.agents.spool_store import BuildBatch, SpoolStats, SpoolStore
from gpuledger.schemas.events import Placement

__all__ = ["Spool"]

log = logging.getLogger(__name__)

FILE_NAME = "spool.db"
#: Bound of the memory that takes over from a disk: over an hour of 8 GPUs at 1 Hz, flushed every 5 s.
MEMORY_MAX_BYTES = 16 << 20
#: How often a disk that could not be written is tried again.
_RETRY_DISK_MS = 60_000
_SAY_DROPPED_EVERY_MS = 60_000
#: What is on its way is dropped last, so it may be this part of a spool at most, or new batches would find no room.
_WINDOW_SHARE = 4


class Spool:
    """Messages in order, bounded, on disk while it can be written. Thread-safe; calls may block on the disk.

    Numbers given by `take` are even for the disk and odd for memory.
    """

    def __init__(self, directory: Path, max_bytes: int, max_age_ms: int, now_ms: int) -> None:
        """Opens the spool; never fails: where the disk does not work, memory does, and the log says why."""
        self._path = directory / FILE_NAME
        self._max_bytes = max_bytes
        self._max_age_ms = max_age_ms
        self._lock = threading.RLock()
        self._disk: SpoolStore | None = None
        self._memory: SpoolStore | None = None
        self._taken: set[int] = set()
        self._in_doubt: set[int] = set()
        #: The broker has them, and they are not deleted yet.
        self._sent: set[int] = set()
        #: The broker will never take them, for this reason, and they are not set aside yet.
        self._refused: dict[int, str] = {}
        self._retry_ms = 0
        self._say_dropped_ms = 0
        self._dropping = False
        self.dropped = 0
        self.trouble = ""
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._disk = self._open(now_ms)
            self._disk.probe()
        except (OSError, sqlite3.Error) as error:
            self._fall_back(error, now_ms)

    def _open(self, now_ms: int) -> SpoolStore:
        """The store of the file; a damaged file is set aside first.

        The process before this one may have been killed while its oldest messages were on their way.
        """
        try:
            store = SpoolStore(self._path)
            window = store.first_numbers(MAX_IN_FLIGHT, min(MAX_IN_FLIGHT_BYTES, self._max_bytes // _WINDOW_SHARE))
            self._in_doubt = {number for number in self._in_doubt if number & 1} | {number << 1 for number in window}
            return store
        except sqlite3.Error as error:
            if not _is_damage(error):
                raise
            self._set_aside(error, now_ms)
            return SpoolStore(self._path)

    def _set_aside(self, error: sqlite3.Error, now_ms: int) -> None:
        """Renames the file and what belongs to it, and writes down why."""
        aside = self._path.with_name(f"{FILE_NAME}.damaged-{now_ms}")
        for suffix in ("", "-wal", "-shm"):
            part = self._path.with_name(FILE_NAME + suffix)
            if part.exists():
                part.rename(aside.with_name(aside.name + suffix))
        aside.with_name(aside.name + ".reason.txt").write_text(f"{error}\n", encoding="utf-8")
        log.error("the spool %s is damaged (%s); set aside as %s, a new one begins", self._path, error, aside.name)

    def _fall_back(self, error: Exception, now_ms: int) -> None:
        if self._memory is None:
            self._memory = SpoolStore(None)
        self._retry_ms = now_ms + _RETRY_DISK_MS
        self.trouble = f"{self._path} cannot be written: {error}"
        log.error(
            "%s; batches wait in memory (at most %d MB) and are lost if the agent ends before they are sent",
            self.trouble,
            MEMORY_MAX_BYTES >> 20,
        )

    def close(self) -> None:
        with self._lock:
            for store in (self._disk, self._memory):
                if store is not None:
                    store.close()
            self._disk = self._memory = None

    @property
    def in_memory(self) -> bool:
        """Whether what is sealed now would not outlive this process."""
        return self._memory is not None

    # -- sealing ----------------------------------------------------------------------------------------------------

    def seal_batch(self, run_id: str, from_ms: int, to_ms: int, now_ms: int, build: BuildBatch) -> int:
        """Numbers and stores the batch of [from_ms, to_ms); the number. `build` gets it and the gaps to tell.

        Raises:
            SpoolChanged: the numbers of this run are lost; begin a new run and seal again.
            SpoolError: nothing can be stored at all.
        """
        with self._lock:
            self._return_to_disk(now_ms)
            store = self._writable()
            try:
                # A batch that is dropped gives its gaps back: while batches are dropped, gaps wait and merge instead.
                seq = store.seal_batch(run_id, from_ms, to_ms, now_ms, build, tell_gaps=not self._dropping)
                self._bound(store, now_ms)
            except sqlite3.Error as error:
                raise self._replace(store, error, now_ms) from error
            return seq

    def seal_event(self, message: Message, now_ms: int) -> None:
        """Stores an event, in order with the batches.

        Raises:
            SpoolChanged: as for `seal_batch`; the event was not stored.
        """
        with self._lock:
            store = self._writable()
            try:
                store.seal_event(message, now_ms)
                self._bound(store, now_ms)
            except sqlite3.Error as error:
                raise self._replace(store, error, now_ms) from error

    def _writable(self) -> SpoolStore:
        store = self._memory if self._memory is not None else self._disk
        if store is None:
            raise SpoolError("spool: is closed")
        return store

    def _bound(self, store: SpoolStore, now_ms: int) -> None:
        odd = int(store is not self._disk)
        keep, in_doubt = (
            {number >> 1 for number in numbers if number & 1 == odd} for numbers in (self._taken, self._in_doubt)
        )
        dropped = store.shrink(self._limit(store), now_ms - self._max_age_ms, keep, in_doubt)
        self._in_doubt.difference_update(number << 1 | odd for number in dropped)
        self._dropping = bool(dropped)
        if dropped:
            self.dropped += len(dropped)
            if now_ms >= self._say_dropped_ms:
                self._say_dropped_ms = now_ms + _SAY_DROPPED_EVERY_MS
                log.warning("the spool is over its bounds: %d oldest messages dropped so far, as gaps", self.dropped)

    def _limit(self, store: SpoolStore | None) -> int:
        """The bound in bytes of a store."""
        return min(self._max_bytes, MEMORY_MAX_BYTES) if store is self._memory else self._max_bytes

    def _replace(self, store: SpoolStore, error: sqlite3.Error, now_ms: int) -> SpoolChanged | SpoolError:
        """After an error in sealing: a new file in place of a damaged one, memory in place of a disk."""
        if store is self._memory:
            return SpoolError(f"spool: memory refuses: {error}")
        if _is_damage(error):
            store.close()
            self._disk = None
            # What is on its way now is acknowledged by its number, which must not be another message's by then.
            last = max((number >> 1 for number in self._taken if not number & 1), default=0)
            self._taken = {number for number in self._taken if number & 1}
            self._in_doubt = {number for number in self._in_doubt if number & 1}
            self._sent = {number for number in self._sent if number & 1}
            self._refused = {number: reason for number, reason in self._refused.items() if number & 1}
            try:
                self._set_aside(error, now_ms)
                self._disk = SpoolStore(self._path)
                self._disk.number_after(last)
                return SpoolChanged(f"the file was damaged ({error}) and set aside")
            except (OSError, sqlite3.Error) as second:
                error = sqlite3.OperationalError(str(second))
        self._fall_back(error, now_ms)
        return SpoolChanged(self.trouble)

    def _return_to_disk(self, now_ms: int) -> None:
        """Once memory is empty and the disk can be written again, batches go there again, under a new run."""
        if self._memory is None or now_ms < self._retry_ms:
            return
        self._retry_ms = now_ms + _RETRY_DISK_MS
        if self._memory.stats().messages:
            return
        try:
            if self._disk is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._disk = self._open(now_ms)
            self._disk.probe()
        except (OSError, sqlite3.Error):
            return
        self._memory.close()
        self._memory = None
        self.trouble = ""
        log.warning("the spool %s can be written again; batches go to disk", self._path)
        raise SpoolChanged("the disk can be written again")

    # -- sending (Outbox) -------------------------------------------------------------------------------------------

    def take(self, max_messages: int, max_bytes: int) -> list[SpooledMessage]:
        """The oldest messages not taken yet, those on disk before those in memory."""
        with self._lock:
            self._delete_sent(logging.DEBUG)
            self._set_refused_aside(logging.DEBUG)
            for store, odd in ((self._disk, 0), (self._memory, 1)):
                if store is None:
                    continue
                skip = {number >> 1 for number in self._taken if number & 1 == odd}
                try:
                    found = store.oldest(max_messages, min(max_bytes, self._limit(store) // _WINDOW_SHARE), skip)
                except sqlite3.Error as error:
                    log.error("the spool cannot be read: %s", error)
                    continue
                if found:
                    taken = [SpooledMessage(spooled.number << 1 | odd, spooled.message) for spooled in found]
                    self._taken.update(spooled.number for spooled in taken)
                    return taken
            return []

    def acknowledge(self, numbers: Sequence[int]) -> None:
        """Deletes what the broker has. Where the disk refuses, that is tried again with every `take`."""
        with self._lock:
            self._sent.update(numbers)
            self._delete_sent(logging.WARNING)

    def _delete_sent(self, level: int) -> None:
        for store, odd in ((self._disk, 0), (self._memory, 1)):
            mine = {number for number in self._sent if number & 1 == odd}
            if store is None or not mine:
                continue
            try:
                store.delete([number >> 1 for number in mine])
            except sqlite3.Error as error:
                # Still taken, so not sent again by this process; after a restart it is, and replaces itself.
                log.log(level, "%d sent messages stay in the spool for now: %s", len(mine), error)
                continue
            for known in (self._sent, self._taken, self._in_doubt):
                known -= mine

    def give_back(self, numbers: Sequence[int]) -> None:
        """They will be taken again. The broker may have them all the same: its answer may be what got lost."""
        with self._lock:
            self._taken.difference_update(numbers)
            self._in_doubt.update(numbers)

    def reject(self, number: int, reason: str) -> None:
        """Sets aside what can never be sent. Where the disk refuses, that is tried again with every `take`."""
        with self._lock:
            self._refused[number] = reason
            self._set_refused_aside(logging.WARNING)

    def _set_refused_aside(self, level: int) -> None:
        for number, reason in list(self._refused.items()):
            store = self._memory if number & 1 else self._disk
            if store is None:
                continue
            try:
                store.set_aside(number >> 1, reason)
            except sqlite3.Error as error:
                log.log(level, "a message that can never be sent stays in the spool for now: %s", error)
                continue
            del self._refused[number]
            self._taken.discard(number)
            self._in_doubt.discard(number)

    # -- the rest ---------------------------------------------------------------------------------------------------

    def placements(self) -> list[Placement]:
        """The placements last saved."""
        with self._lock:
            try:
                return self._disk.placements() if self._disk is not None else []
            except sqlite3.Error as error:
                log.warning("placements of the last start cannot be read: %s", error)
                return []

    def save_placements(self, placements: Sequence[Placement]) -> None:
        with self._lock:
            try:
                self._writable().save_placements(placements)
            except sqlite3.Error as error:
                log.warning("placements are not kept for the next start: %s", error)

    def forget_runs(self, keep: str) -> None:
        """Forgets the numbers of every run but `keep`."""
        with self._lock:
            try:
                self._writable().forget_runs(keep)
            except sqlite3.Error as error:
                log.warning("numbers of earlier runs are not forgotten yet: %s", error)

    def stats(self) -> SpoolStats:
        """What waits, on disk and in memory together."""
        with self._lock:
            parts: list[SpoolStats] = []
            for store in (self._disk, self._memory):
                try:
                    if store is not None:
                        parts.append(store.stats())
                except sqlite3.Error:
                    continue
            oldest = [part.oldest_ms for part in parts if part.oldest_ms is not None]
            return SpoolStats(
                sum(part.messages for part in parts),
                sum(part.bytes for part in parts),
                min(oldest, default=None),
                sum(part.gaps for part in parts),
                sum(part.rejected for part in parts),
            )


def _is_damage(error: sqlite3.Error) -> bool:
    """Whether the file itself is wrong, and not the disk, its rights or another process."""
    if isinstance(error, sqlite3.OperationalError):
        return getattr(error, "sqlite_errorcode", None) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
    return type(error) is sqlite3.DatabaseError
