"""One SQLite file (or the memory of this process) holding what was not sent yet, in order and numbered.

Sealing takes the next number of the run and stores the message in one transaction, so a number is never used for two
messages, whatever kills the process; what is dropped leaves a gap record in the transaction that drops it.
"""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from gpuledger.agents.messages import Message
from gpuledger.agents.publisher import SpooledMessage
from gpuledger.schemas.events import Placement
from gpuledger.schemas.telemetry import Gap

__all__ = ["PERHAPS_SENT", "BuildBatch", "SpoolStats", "SpoolStore"]

#: Ends the reason of a gap whose batches may have arrived: they were sent, and no answer came before they were dropped.
PERHAPS_SENT = ", perhaps sent"

#: Makes the message of a batch from its number in the run and the gaps it must tell.
BuildBatch = Callable[[int, list[Gap]], Message]

_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE runs (run_id TEXT PRIMARY KEY, next_seq INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE messages (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    sealed_ms INTEGER NOT NULL,
    bytes INTEGER NOT NULL,
    crc INTEGER NOT NULL,
    own_gap BLOB,
    told_gaps BLOB,
    topic TEXT NOT NULL,
    key TEXT NOT NULL,
    headers BLOB NOT NULL,
    value BLOB NOT NULL
);
CREATE TABLE gaps (number INTEGER PRIMARY KEY AUTOINCREMENT, gap BLOB NOT NULL);
CREATE TABLE rejected (number INTEGER PRIMARY KEY, reason TEXT NOT NULL, topic TEXT, key TEXT, value BLOB);
CREATE TABLE placements (id TEXT PRIMARY KEY, placement BLOB NOT NULL) WITHOUT ROWID;
"""
#: Gap records of one run that one batch tells; the rest waits for the next batch.
_MAX_GAPS_TOLD = 32
#: Rejected messages that are kept for a person to look at.
_MAX_REJECTED = 100
#: What a message costs beside its bytes, so that a million empty ones are bounded too.
_OVERHEAD_BYTES = 200

_gap_decoder = msgspec.json.Decoder(Gap)
_gaps_decoder = msgspec.json.Decoder(list[Gap])


@dataclass(frozen=True, slots=True)
class SpoolStats:
    """What waits: `oldest_ms` is None when nothing does; `gaps` are dropped spans not told to anyone yet."""

    messages: int
    bytes: int
    oldest_ms: int | None
    gaps: int
    rejected: int


def merge_gap(gaps: Sequence[Gap], new: Gap) -> list[Gap]:
    """The gaps with `new`, joined with one of the same run and reason that touches it; nothing is ever lost."""
    merged = new
    kept: list[Gap] = []
    for gap in gaps:
        touches = gap.first_seq <= merged.last_seq + 1 and merged.first_seq <= gap.last_seq + 1
        if (gap.run_id, gap.reason) == (merged.run_id, merged.reason) and touches:
            merged = Gap(
                gap.run_id,
                min(gap.first_seq, merged.first_seq),
                max(gap.last_seq, merged.last_seq),
                min(gap.from_ms, merged.from_ms),
                max(gap.to_ms, merged.to_ms),
                gap.batches + merged.batches,
                gap.reason,
            )
        else:
            kept.append(gap)
    return [*kept, merged]


class SpoolStore:
    """The messages of one file. Not thread-safe: `Spool` holds a lock around every call.

    Every method raises sqlite3.Error when the disk or the file is not what it should be; nothing is half done then.
    """

    def __init__(self, path: Path | None) -> None:
        """Opens or makes the file; None: in memory."""
        self._db = sqlite3.connect(path if path is not None else ":memory:", check_same_thread=False, timeout=5.0)
        try:
            self._db.isolation_level = None
            if path is not None:
                self._db.execute("PRAGMA journal_mode=WAL")
                # A power cut must not take back a number that was used: every commit reaches the disk.
                self._db.execute("PRAGMA synchronous=FULL")
                self._db.execute("PRAGMA journal_size_limit=4194304")
            self._db.execute("PRAGMA cache_size=-1024")
            if path is not None:
                self._check()
            self._migrate()
            (self._bytes,) = self._db.execute("SELECT coalesce(sum(bytes), 0) FROM messages").fetchone()
        except BaseException:
            self._db.close()
            raise

    def _check(self) -> None:
        problems = self._db.execute("PRAGMA quick_check(1)").fetchone()
        if problems[0] != "ok":
            raise sqlite3.DatabaseError(f"damaged: {problems[0]}")

    def _migrate(self) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version == _SCHEMA_VERSION:
            return
        if version != 0:
            raise sqlite3.DatabaseError(f"made by another version of the agent (layout {version})")
        self._db.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version={_SCHEMA_VERSION}; COMMIT")

    def close(self) -> None:
        self._db.close()

    def _transaction(self) -> _Transaction:
        return _Transaction(self._db)

    # -- sealing ----------------------------------------------------------------------------------------------------

    def seal_batch(
        self, run_id: str, from_ms: int, to_ms: int, now_ms: int, build: BuildBatch, tell_gaps: bool = True
    ) -> int:
        """Numbers and stores one batch of [from_ms, to_ms) in one transaction; the number of the batch in its run."""
        with self._transaction():
            row = self._db.execute("SELECT next_seq FROM runs WHERE run_id = ?", (run_id,)).fetchone()
            seq = 0 if row is None else int(row[0])
            waiting = self._db.execute(
                "SELECT number, gap FROM gaps ORDER BY number LIMIT ?", (_MAX_GAPS_TOLD if tell_gaps else 0,)
            ).fetchall()
            gaps = [_gap_decoder.decode(gap) for _, gap in waiting]
            message = build(seq, gaps)
            own = Gap(run_id, seq, seq, from_ms, to_ms, 1)
            size = self._insert(message, now_ms, own, gaps)
            self._db.executemany("DELETE FROM gaps WHERE number = ?", [(number,) for number, _ in waiting])
            self._db.execute(
                "INSERT INTO runs VALUES (?, ?) ON CONFLICT (run_id) DO UPDATE SET next_seq = excluded.next_seq",
                (run_id, seq + 1),
            )
        self._bytes += size
        return seq

    def seal_event(self, message: Message, now_ms: int) -> None:
        """Stores a message that has no number of its own."""
        with self._transaction():
            size = self._insert(message, now_ms, None, [])
        self._bytes += size

    def _insert(self, message: Message, now_ms: int, own: Gap | None, told: list[Gap]) -> int:
        headers = _pack_headers(message)
        size = len(message.value) + len(headers) + _OVERHEAD_BYTES
        self._db.execute(
            "INSERT INTO messages (sealed_ms, bytes, crc, topic, key, value, headers, own_gap, told_gaps) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                now_ms,
                size,
                _crc(message.value, headers),
                message.topic,
                message.key,
                message.value,
                headers,
                None if own is None else msgspec.json.encode(own),
                msgspec.json.encode(told) if told else None,
            ),
        )
        return size

    # -- bounds -----------------------------------------------------------------------------------------------------

    def shrink(self, max_bytes: int, oldest_ms: int, keep: set[int], in_doubt: set[int]) -> list[int]:
        """Drops the oldest until at most `max_bytes` are left and none is older than `oldest_ms`; their numbers.

        Batches go before events: they are nearly all of the bytes, and a lost end of an allocation costs more. Those
        in `keep` are on their way and stay. Those in `in_doubt` may have reached the broker without its word: they go
        after the other batches, and their gap says so, for a gap that names what arrived would be wrong. Each dropped
        batch becomes part of a gap record in the same transaction, and so do the gaps it would have told.
        """
        first = self._db.execute("SELECT sealed_ms FROM messages ORDER BY number LIMIT 1").fetchone()
        if first is None or (self._bytes <= max_bytes and first[0] >= oldest_ms):
            return []
        dropped: list[int] = []
        freed = 0
        with self._transaction():
            gaps = self._all_gaps()
            for events, doubtful in ((False, False), (False, True), (True, False)):
                for number, sealed_ms, size, own, told in self._db.execute(
                    "SELECT number, sealed_ms, bytes, own_gap, told_gaps FROM messages "
                    "WHERE (own_gap IS NULL) = ? ORDER BY number",
                    (events,),
                ):
                    too_old = sealed_ms < oldest_ms
                    if self._bytes - freed <= max_bytes and not too_old:
                        break
                    if number in keep or (not events and (number in in_doubt) != doubtful):
                        continue
                    reason = "spool: too old" if too_old else "spool full"
                    gaps = _with_gaps_of(gaps, own, told, f"{reason}{PERHAPS_SENT}" if doubtful else reason)
                    dropped.append(number)
                    freed += size
            self._db.executemany("DELETE FROM messages WHERE number = ?", [(number,) for number in dropped])
            self._store_gaps(gaps)
        self._bytes -= freed
        return dropped

    def _all_gaps(self) -> list[Gap]:
        return [_gap_decoder.decode(gap) for (gap,) in self._db.execute("SELECT gap FROM gaps ORDER BY number")]

    def _store_gaps(self, gaps: list[Gap]) -> None:
        self._db.execute("DELETE FROM gaps")
        self._db.executemany("INSERT INTO gaps (gap) VALUES (?)", [(msgspec.json.encode(gap),) for gap in gaps])

    # -- sending ----------------------------------------------------------------------------------------------------

    def oldest(self, max_messages: int, max_bytes: int, skip: set[int]) -> list[SpooledMessage]:
        """The oldest messages in order, at least one if there is any, without those in `skip`.

        A message whose check sum is wrong is set aside and leaves a gap; the others go on.
        """
        found: list[SpooledMessage] = []
        damaged: list[int] = []
        size = 0
        for number, crc, topic, key, value, headers in self._db.execute(
            "SELECT number, crc, topic, key, value, headers FROM messages ORDER BY number"
        ):
            if number in skip:
                continue
            if _crc(value, headers) != crc:
                damaged.append(number)
                continue
            if found and (len(found) >= max_messages or size + len(value) > max_bytes):
                break
            size += len(value)
            found.append(SpooledMessage(number, Message(topic, key, value, _unpack_headers(headers))))
        for number in damaged:
            self.set_aside(number, "spool: the check sum of the stored message is wrong")
        return found

    def first_numbers(self, max_messages: int, max_bytes: int) -> set[int]:
        """The numbers of the oldest messages, as many as `oldest` would give with nothing to skip."""
        found: set[int] = set()
        size = 0
        for number, length in self._db.execute("SELECT number, length(value) FROM messages ORDER BY number"):
            if found and (len(found) >= max_messages or size + length > max_bytes):
                break
            found.add(number)
            size += length
        return found

    def number_after(self, last: int) -> None:
        """Messages of a new store get numbers from `last` + 1 on."""
        with self._transaction():
            self._db.execute("INSERT INTO sqlite_sequence (name, seq) VALUES ('messages', ?)", (last,))

    def delete(self, numbers: Sequence[int]) -> None:
        """Forgets messages that the broker has."""
        freed = 0
        with self._transaction():
            for number in numbers:
                row = self._db.execute("DELETE FROM messages WHERE number = ? RETURNING bytes", (number,)).fetchone()
                freed += row[0] if row is not None else 0
        self._bytes -= freed

    def set_aside(self, number: int, reason: str) -> None:
        """Moves a message that can never be sent out of the way; a batch leaves a gap with the reason."""
        with self._transaction():
            row = self._db.execute(
                "DELETE FROM messages WHERE number = ? RETURNING bytes, topic, key, value, own_gap, told_gaps",
                (number,),
            ).fetchone()
            if row is None:
                return
            size, topic, key, value, own, told = row
            self._store_gaps(_with_gaps_of(self._all_gaps(), own, told, reason[:200]))
            self._db.execute("INSERT INTO rejected VALUES (?, ?, ?, ?, ?)", (number, reason, topic, key, value))
            self._db.execute(
                "DELETE FROM rejected WHERE number NOT IN (SELECT number FROM rejected ORDER BY number DESC LIMIT ?)",
                (_MAX_REJECTED,),
            )
        self._bytes -= size

    # -- the rest ---------------------------------------------------------------------------------------------------

    def forget_runs(self, keep: str) -> None:
        """Numbers of earlier runs are needed no more: a run id never comes back."""
        with self._transaction():
            self._db.execute("DELETE FROM runs WHERE run_id <> ?", (keep,))

    def placements(self) -> list[Placement]:
        """The placements that were told, so that a restart does not place the GPUs anew; by id."""
        rows = self._db.execute("SELECT placement FROM placements ORDER BY id").fetchall()
        return [msgspec.json.decode(data, type=Placement) for (data,) in rows]

    def save_placements(self, placements: Sequence[Placement]) -> None:
        """Keeps exactly these."""
        with self._transaction():
            self._db.execute("DELETE FROM placements")
            self._db.executemany(
                "INSERT INTO placements VALUES (?, ?)",
                [(placement.id, msgspec.json.encode(placement)) for placement in placements],
            )

    def probe(self) -> None:
        """Raises where nothing can be written now."""
        with self._transaction():
            self._db.execute("INSERT INTO runs VALUES ('probe', 0)")
            self._db.execute("DELETE FROM runs WHERE run_id = 'probe'")

    def stats(self) -> SpoolStats:
        count, oldest = self._db.execute("SELECT count(*), min(sealed_ms) FROM messages").fetchone()
        (gaps,) = self._db.execute("SELECT count(*) FROM gaps").fetchone()
        (rejected,) = self._db.execute("SELECT count(*) FROM rejected").fetchone()
        return SpoolStats(count, self._bytes, oldest, gaps, rejected)


class _Transaction:
    """BEGIN IMMEDIATE … COMMIT, or ROLLBACK on any exception."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            try:
                self._db.execute("COMMIT")
                return
            except sqlite3.Error:
                self._rollback()
                raise
        self._rollback()

    def _rollback(self) -> None:
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")


def _with_gaps_of(gaps: list[Gap], own: bytes | None, told: bytes | None, reason: str) -> list[Gap]:
    """The gaps with those that a removed message leaves: its own, and the ones it would have told."""
    for gap in _gaps_decoder.decode(told) if told is not None else []:
        gaps = merge_gap(gaps, gap)
    if own is not None:
        gaps = merge_gap(gaps, msgspec.structs.replace(_gap_decoder.decode(own), reason=reason))
    return gaps


def _crc(value: bytes, headers: bytes) -> int:
    return zlib.crc32(headers, zlib.crc32(value))


def _pack_headers(message: Message) -> bytes:
    return json.dumps([[key, value.decode("latin-1")] for key, value in message.headers]).encode()


def _unpack_headers(data: bytes) -> tuple[tuple[str, bytes], ...]:
    return tuple((key, value.encode("latin-1")) for key, value in json.loads(data))
