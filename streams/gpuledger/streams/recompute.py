"""The ledger of one pool over whole minutes, from facts and fragments: the one function that serves live, late,
corrected and back-filled data.

Everything is counted as not observed first; then each observed segment moves time from there to active, idle or down
by telescoping differences, so that no cut of segments, minutes or ranges changes a sum. Pure: arrays in, arrays out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gpuledger.finance.apportion import apportion_groups
from gpuledger.schemas.telemetry import Activity
from gpuledger.streams.counters import linear
from gpuledger.streams.holders import Spans, spans
from gpuledger.streams.observed import Observed, observed
from gpuledger.streams.pieces import MINUTE_MS, Pieces, expand, pieces
from gpuledger.streams.pool_facts import Conflict, PoolFacts
from gpuledger.streams.reserved import Unheld, unheld

__all__ = ["Amounts", "Ledger", "Window", "kinds", "recompute"]

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Window:
    """Minutes [from_ms, to_ms) to compute. Minutes before `complete_until_ms` are complete: what nobody saw there is
    unobserved, after it pending. `buckets_ms` are the bounds (first = from_ms, last = to_ms) of the intervals for which
    job rows are made: price intervals, cut at hours."""

    from_ms: int
    to_ms: int
    complete_until_ms: int
    confirm_ms: int
    buckets_ms: Ints

    def __post_init__(self) -> None:
        if self.from_ms % MINUTE_MS or self.to_ms % MINUTE_MS or self.from_ms >= self.to_ms:
            raise ValueError(f"window: expected whole minutes in order, got [{self.from_ms}, {self.to_ms})")

    @property
    def minutes(self) -> int:
        return (self.to_ms - self.from_ms) // MINUTE_MS


@dataclass(frozen=True, slots=True)
class Amounts:
    """Sums by key, sorted by key. `keys` are integer code columns; `us` GPU-microseconds, `energy_mj` millijoules.

    `blind_us`: the part of `us` whose energy is not known. Where nothing is known (`energy_known` is False) the energy
    is NULL, not 0.
    """

    keys: tuple[Ints, ...]
    us: Ints
    energy_mj: Ints
    blind_us: Ints

    @property
    def energy_known(self) -> NDArray[np.bool_]:
        return (self.us > self.blind_us) | (self.energy_mj != 0)

    def __len__(self) -> int:
        return len(self.us)

    def take(self, rows: Ints) -> Amounts:
        """The rows with these indexes."""
        keys = tuple(key[rows] for key in self.keys)
        return Amounts(keys, self.us[rows], self.energy_mj[rows], self.blind_us[rows])


@dataclass(frozen=True, slots=True)
class Ledger:
    """What `recompute` found. Keys of the amounts (codes):

    by_minute: (minute of the window, account, activity); by_gpu_minute: (minute, gpu, use, activity), only where
    fragments exist; by_gpu_hour: (hour, gpu, use, activity); by_job: (bucket, job, activity).
    `accounts` are (tenant, unconfirmed), `jobs` (tenant, job, user, unconfirmed), `uses` (tenant, job, instance,
    unconfirmed); two more codes of each are what nobody holds: unallocated, and unsliced. `unheld` divides their time;
    `unallocated_mj` is their energy per minute.
    """

    pool: str
    window: Window
    spans: Spans
    accounts: list[tuple[str, bool]]
    jobs: list[tuple[str, str, str, bool]]
    uses: list[tuple[str, str, int, bool]]
    service_us: Ints
    by_minute: Amounts
    by_gpu_minute: Amounts
    by_gpu_hour: Amounts
    by_job: Amounts
    unheld: Unheld
    unallocated_mj: Ints
    unallocated_blind_us: Ints
    conflicts: list[Conflict]


@dataclass(frozen=True, slots=True)
class _Moves:
    """Observed time: entry `entry` did `activity` for `us` in `minute`, using `energy` (negative: not known)."""

    entry: Ints
    minute: Ints
    activity: Ints
    us: Ints
    energy: Ints


@dataclass(frozen=True, slots=True)
class _Cells:
    """One row per piece and minute in which the GPU has fragments: [start, end) in milliseconds."""

    piece: Ints
    minute: Ints
    start: Ints
    end: Ints


def _sum(keys: tuple[Ints, ...], us: Ints, energy: Ints, blind: Ints) -> Amounts:
    """Sums rows of equal keys, exactly, and drops the rows of which nothing is left."""
    combined = np.ravel_multi_index(keys, [int(key.max(initial=0)) + 1 for key in keys])
    unique, first, inverse = np.unique(combined, return_index=True, return_inverse=True)
    sums = [np.zeros(len(unique), dtype=np.int64) for _ in range(3)]
    for total, values in zip(sums, (us, energy, blind), strict=True):
        np.add.at(total, inverse, values)
    kept = np.flatnonzero(np.any(sums, axis=0))
    rows = first[kept]
    return Amounts(tuple(key[rows] for key in keys), *(total[kept] for total in sums))


def _stacked(parts: Sequence[Amounts]) -> tuple[tuple[Ints, ...], Ints, Ints, Ints]:
    """The rows of all parts, one after the other: keys, us, energy, blind."""
    keys = tuple(np.concatenate(columns) for columns in zip(*(part.keys for part in parts), strict=True))
    us, energy, blind = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("us", "energy_mj", "blind_us")
    )
    return keys, us, energy, blind


# ------------------------------------------------------------------------------------------------- telemetry


def _cells(seen: Observed, cut: Pieces, window: Window) -> _Cells:
    """The pieces' minutes in which their GPU has observed segments."""
    base, width = window.from_ms // MINUTE_MS, window.minutes
    cells = np.unique(seen.gpu * width + seen.start // MINUTE_MS - base)
    first = np.searchsorted(cells, cut.gpu * width + cut.minute - base)
    last = np.searchsorted(cells, cut.gpu * width + cut.minute + cut.count - base)
    piece, position = expand(last - first)
    minute = cells[first[piece] + position] % width + base
    start = np.maximum(cut.start[piece], minute * MINUTE_MS)
    return _Cells(piece, minute, start, start + cut.length[piece])


def _match(seen: Observed, cells: _Cells, gpu_of_cell: Ints, window: Window) -> tuple[Ints, Ints]:
    """(segment, cell) for every pair of one GPU that overlaps in time. Cells are sorted by (gpu, start), disjoint."""
    width = window.to_ms - window.from_ms
    cell_base, base = gpu_of_cell * width - window.from_ms, seen.gpu * width - window.from_ms
    # Segments lie in minutes of the window, because fragments of other minutes are not read.
    first = np.searchsorted(cell_base + cells.end, base + seen.start, side="right")
    last = np.searchsorted(cell_base + cells.start, base + seen.end, side="left")
    segment, position = expand(last - first)
    return segment, first[segment] + position


def _line(seen: Observed, segment: Ints, at: Ints) -> Ints:
    """floor of the energy counter at `at`, linear between the segment's two readings."""
    line = seen.line_start, seen.line_end, seen.energy_from, seen.energy_to
    return linear(at, *(column[segment] for column in line))


@dataclass(frozen=True, slots=True)
class _Energy:
    """Energy of whole GPUs: `entry` used `mj` in `minute` while it did `activity`."""

    entry: Ints
    minute: Ints
    activity: Ints
    mj: Ints


def _energy_moves(
    seen: Observed, segment: Ints, cell: Ints, cells: _Cells, cut: Pieces, of_entry: _Uses, window: Window
) -> _Energy:
    """The energy of each segment within each cell, by weight to all entries there; of the entries on a MIG instance to
    what the instance was seen doing meanwhile, and to unobserved or pending where it was not seen."""
    begin = np.maximum(seen.start[segment], cells.start[cell])
    finish = np.minimum(seen.end[segment], cells.end[cell])
    known = np.flatnonzero(seen.energy_from[segment] >= 0)
    total = _line(seen, segment[known], finish[known]) - _line(seen, segment[known], begin[known])
    piece = cells.piece[cell[known]]
    row, position = expand(cut.offsets[piece + 1] - cut.offsets[piece])
    entry = cut.offsets[piece[row]] + position
    share = apportion_groups(total, row.astype(np.intp), cut.weight[entry])
    minute = cells.minute[cell[known[row]]]
    whole = of_entry.instance[entry] == 0
    alone = _Energy(entry[whole], minute[whole], seen.activity[segment[known[row[whole]]]], share[whole])
    if whole.all():
        return alone
    part = np.flatnonzero(~whole)
    at = known[row[part]]
    shared = _Shares(cut.gpu[piece[row[part]]], entry[part], begin[at], finish[at], share[part])
    owner, activity, mj = _by_instance(seen, of_entry, shared, window)
    rest = share[part]
    np.subtract.at(rest, owner, mj)
    unseen = _base(minute[part], window)
    return _Energy(
        entry=np.concatenate([alone.entry, entry[part][owner], entry[part]]),
        minute=np.concatenate([alone.minute, minute[part][owner], minute[part]]),
        activity=np.concatenate([alone.activity, activity, unseen]),
        mj=np.concatenate([alone.mj, mj, rest]),
    )


@dataclass(frozen=True, slots=True)
class _Shares:
    """Energy `mj` that `entry` of a GPU used in [begin, finish)."""

    gpu: Ints
    entry: Ints
    begin: Ints
    finish: Ints
    mj: Ints


def _by_instance(seen: Observed, of_entry: _Uses, shares: _Shares, window: Window) -> tuple[Ints, Ints, Ints]:
    """(row, activity, millijoules) of the stretches of the shares in which the instance of each was seen: its energy
    by time, in differences that telescope."""
    device = seen.gpu << 16 | seen.instance
    wanted = shares.gpu << 16 | of_entry.instance[shares.entry]
    place = np.searchsorted(device, wanted)
    there = np.flatnonzero(np.append(device, -1)[place] == wanted)
    width = window.to_ms - window.from_ms
    at = np.searchsorted(device, device) * width - window.from_ms
    of_row = place[there] * width - window.from_ms
    first = np.searchsorted(at + seen.end, of_row + shares.begin[there], side="right")
    last = np.searchsorted(at + seen.start, of_row + shares.finish[there], side="left")
    row, position = expand(last - first)
    segment, row = first[row] + position, there[row]
    mine = np.flatnonzero(_same_epoch(of_entry.epoch[shares.entry[row]], seen.epoch[segment]))
    segment, row = segment[mine], row[mine]
    begin, finish, nothing = shares.begin[row], shares.finish[row], np.zeros(len(row), dtype=np.int64)
    line = begin, finish, nothing, shares.mj[row]
    until = linear(np.minimum(seen.end[segment], finish), *line)
    return row, seen.activity[segment], until - linear(np.maximum(seen.start[segment], begin), *line)


@dataclass(frozen=True, slots=True)
class _Uses:
    """Instance and epoch of every entry."""

    instance: Ints
    epoch: Ints


def _same_epoch(a: Ints, b: Ints) -> NDArray[np.bool_]:
    """Whether two epochs of one instance number can be the same instance; 0 is not known."""
    return (a == b) | (a == 0) | (b == 0)


def _moves(seen: Observed, cut: Pieces, cells: _Cells, spans_: Spans, window: Window) -> _Moves:
    segment, cell = _match(seen, cells, cut.gpu[cells.piece], window)
    piece = cells.piece[cell]
    begin = np.maximum(seen.start[segment], cells.start[cell])
    finish = np.minimum(seen.end[segment], cells.end[cell])
    pair, position = expand(cut.offsets[piece + 1] - cut.offsets[piece])
    entry = cut.offsets[piece[pair]] + position
    nobody = np.zeros(2, dtype=np.int64)  # unallocated and unsliced: the whole GPU
    of_entry = _Uses(
        instance=np.append(spans_.holders.instance, nobody)[cut.holder],
        epoch=np.append(spans_.holders.epoch, nobody)[cut.holder],
    )
    mine = of_entry.instance[entry] == seen.instance[segment[pair]]
    mine &= _same_epoch(of_entry.epoch[entry], seen.epoch[segment[pair]])
    pair, entry = pair[mine], entry[mine]
    start, length = cells.start[cell[pair]], cut.length[piece[pair]]
    amount = cut.amount[entry]
    us = amount * (finish[pair] - start) // length - amount * (begin[pair] - start) // length
    activity, minute = seen.activity[segment[pair]], cells.minute[cell[pair]]

    # A slice's share of the GPU's energy is known even where what the slice did is not.
    energy = _energy_moves(seen, segment, cell, cells, cut, of_entry, window)
    return _Moves(
        entry=np.concatenate([entry, energy.entry]),
        minute=np.concatenate([minute, energy.minute]),
        activity=np.concatenate([activity, energy.activity]),
        us=np.concatenate([us, np.zeros(len(energy.mj), dtype=np.int64)]),
        energy=np.concatenate([np.minimum(seen.energy_from[segment[pair]], 0), energy.mj]),
    )


# ------------------------------------------------------------------------------------------------- sums


@dataclass(frozen=True, slots=True)
class _Entries:
    """Entries of pieces with what sums are made by."""

    minute: Ints
    count: Ints
    amount: Ints
    gpu: Ints
    holder: Ints
    base: Ints


def _entries(cut: Pieces, window: Window) -> _Entries:
    minute = cut.minute[cut.piece] - window.from_ms // MINUTE_MS
    return _Entries(
        minute=minute,
        count=cut.count[cut.piece],
        amount=cut.amount,
        gpu=cut.gpu[cut.piece],
        holder=cut.holder,
        base=_base(cut.minute[cut.piece], window),
    )


def _base(minute: Ints, window: Window) -> Ints:
    """What is not seen in these minutes (since 1970): unobserved where they are complete, else pending."""
    complete = minute * MINUTE_MS < window.complete_until_ms // MINUTE_MS * MINUTE_MS
    return np.where(complete, int(Activity.UNOBSERVED), int(Activity.PENDING))


def _unseen(keys: tuple[Ints, ...], base: Ints, us: Ints) -> Amounts:
    """Rows of time as if nobody had seen it; `activity` becomes the last key."""
    return Amounts((*keys, base), us, np.zeros(len(us), dtype=np.int64), us)


def _seen(moved_keys: tuple[Ints, ...], moves: _Moves, moved_base: Ints) -> Amounts:
    """What was observed, less what was therefore not unobserved; `activity` becomes the last key."""
    known = moves.energy >= 0
    back = np.zeros(len(moves.us), dtype=np.int64)
    return _sum(
        (
            *(np.concatenate([moved, moved]) for moved in moved_keys),
            np.concatenate([moves.activity, moved_base]),
        ),
        np.concatenate([moves.us, -moves.us]),
        np.concatenate([np.where(known, moves.energy, 0), back]),
        np.concatenate([np.where(known, 0, moves.us), -moves.us]),
    )


def _per_bucket(entries: _Entries, bounds: Ints) -> tuple[Ints, Ints, Ints]:
    """(entry, bucket, GPU-us): each entry's amount in every bucket [bounds[b], bounds[b+1]) of minutes it touches."""
    first = np.searchsorted(bounds, entries.minute, side="right") - 1
    last = np.searchsorted(bounds, entries.minute + entries.count, side="left")
    entry, position = expand(last - first)
    bucket = first[entry] + position
    begin = np.maximum(entries.minute[entry], bounds[bucket])
    finish = np.minimum(entries.minute[entry] + entries.count[entry], bounds[bucket + 1])
    return entry, bucket, entries.amount[entry] * (finish - begin)


def _minute_matrix(entries: _Entries, account: Ints, accounts: int, minutes: int) -> Ints:
    steps = np.zeros((accounts, minutes + 1), dtype=np.int64)
    np.add.at(steps, (account, entries.minute), entries.amount)
    np.add.at(steps, (account, entries.minute + entries.count), -entries.amount)
    return np.cumsum(steps, axis=1)[:, :-1]


def _by_minute(entries: _Entries, account: Ints, accounts: int, window: Window) -> tuple[Amounts, Ints]:
    """Rows by (minute, account, activity) as if nothing had been seen, and GPU-us in service per minute."""
    matrix = _minute_matrix(entries, account, accounts, window.minutes)
    row, minute = np.nonzero(matrix)
    first_open = (window.complete_until_ms // MINUTE_MS * MINUTE_MS - window.from_ms) // MINUTE_MS
    base = np.where(minute < first_open, int(Activity.UNOBSERVED), int(Activity.PENDING))
    return _unseen((minute, row), base, matrix[row, minute]), matrix.sum(axis=0)


T = TypeVar("T", bound=tuple[object, ...])


def _code(names: Sequence[T]) -> tuple[Ints, list[T]]:
    """The code of every holder's name and, last, of nobody (unallocated, unsliced); what the codes mean, sorted."""
    distinct = sorted(set(names))
    code = {name: n for n, name in enumerate(distinct)}
    return np.array([code[name] for name in names] + [len(distinct), len(distinct) + 1], dtype=np.int64), distinct


def _hours(window: Window) -> Ints:
    """Bounds of the window's hours, in minutes of the window."""
    hour_ms = 60 * MINUTE_MS
    inner = np.arange((window.from_ms // hour_ms + 1) * hour_ms, window.to_ms, hour_ms)
    return (np.concatenate([[window.from_ms], inner, [window.to_ms]]) - window.from_ms) // MINUTE_MS


@dataclass(frozen=True, slots=True)
class _Sums:
    """What a ledger is summed up in; keys as in `Ledger`."""

    by_minute: Amounts
    by_gpu_minute: Amounts
    by_gpu_hour: Amounts
    by_job: Amounts


@dataclass(frozen=True, slots=True)
class _Frame:
    """What facts alone decide: the pieces with their entries, what sums are made by, and the bounds of hours and of
    buckets in minutes of the window."""

    window: Window
    spans: Spans
    cut: Pieces
    entries: _Entries
    account: Ints
    job: Ints
    use: Ints
    hours: Ints
    buckets: Ints

    def unseen(self, accounts: int) -> tuple[_Sums, Ints]:
        """The sums as if nothing had been seen, and GPU-us in service per minute."""
        entries = self.entries
        by_minute, service_us = _by_minute(entries, self.account, accounts, self.window)
        entry, hour, us = _per_bucket(entries, self.hours)
        by_gpu_hour = _unseen((hour, entries.gpu[entry], self.use[entry]), entries.base[entry], us)
        entry, bucket, us = _per_bucket(entries, self.buckets)
        by_job = _unseen((bucket, self.job[entry]), entries.base[entry], us)
        none = np.empty(0, dtype=np.int64)
        nothing = Amounts((none, none, none, none), none, none, none)
        return _Sums(by_minute, nothing, by_gpu_hour, by_job), service_us

    def seen(self, fragments: pa.Table) -> _Sums:
        """What these fragments change in the sums; `by_gpu_minute` is whole for their minutes."""
        window, entries = self.window, self.entries
        seen = observed(fragments, {gpu: n for n, gpu in enumerate(self.spans.gpus)})
        cells = _cells(seen, self.cut, window)
        found = _moves(seen, self.cut, cells, self.spans, window)
        minute = found.minute - window.from_ms // MINUTE_MS
        moves = _Moves(found.entry, minute, found.activity, found.us, found.energy)
        base = entries.base[moves.entry]
        return _Sums(
            by_minute=_seen((moves.minute, self.account[moves.entry]), moves, base),
            by_gpu_minute=_by_gpu_minute(entries, self.use, self.cut, cells, moves, window),
            by_gpu_hour=_seen(_moved(self.hours, moves, entries.gpu, self.use), moves, base),
            by_job=_seen(_moved(self.buckets, moves, self.job), moves, base),
        )


def _total(parts: Iterable[_Sums]) -> _Sums:
    """The sums of all parts; only what they come to is kept of the parts before."""
    kept: _Sums | None = None
    minutes: list[Amounts] = []
    for part in parts:
        minutes.append(part.by_gpu_minute)
        if kept is None:
            kept = part
            continue
        by_minute, by_gpu_hour, by_job = (
            _sum(*_stacked([getattr(kept, name), getattr(part, name)]))
            for name in ("by_minute", "by_gpu_hour", "by_job")
        )
        kept = _Sums(by_minute, part.by_gpu_minute, by_gpu_hour, by_job)
    assert kept is not None
    by_gpu_minute = Amounts(*_stacked(minutes))
    by_minute, by_gpu_hour, by_job = (
        _sum(each.keys, each.us, each.energy_mj, each.blind_us)
        for each in (kept.by_minute, kept.by_gpu_hour, kept.by_job)
    )
    return _Sums(by_minute, by_gpu_minute, by_gpu_hour, by_job)


def recompute(facts: PoolFacts, fragments: pa.Table | Iterable[pa.Table], window: Window) -> Ledger:
    """The ledger of a pool over the window.

    `fragments`: rows of the table `fragments` (at least `FRAGMENT_COLUMNS`) with minutes inside the window, each once;
    of GPUs that are not of the pool too, they are left out. Or parts of them in the order of time, each with all that
    there is of its minutes: a part is let go before the next is asked for, so memory is that of the largest part.
    """
    found = spans(facts, window.from_ms, window.to_ms, window.confirm_ms)
    cut = pieces(found, window.complete_until_ms)
    entries = _entries(cut, window)
    holders, unconfirmed = found.holders, found.holders.unconfirmed.tolist()
    account_of, accounts = _code(list(zip(holders.tenant, unconfirmed, strict=True)))
    job_of, jobs = _code(list(zip(holders.tenant, holders.job_id, holders.user, unconfirmed, strict=True)))
    instances = holders.instance.tolist()
    use_of, uses = _code(list(zip(holders.tenant, holders.job_id, instances, unconfirmed, strict=True)))
    account, job, use = (code[entries.holder] for code in (account_of, job_of, use_of))
    buckets = (window.buckets_ms - window.from_ms) // MINUTE_MS
    frame = _Frame(window, found, cut, entries, account, job, use, _hours(window), buckets)

    unseen, service_us = frame.unseen(len(accounts) + 2)
    parts = [fragments] if isinstance(fragments, pa.Table) else fragments
    sums = _total(chain([unseen], map(frame.seen, parts)))
    conflicts = list(found.conflicts)
    by_minute = sums.by_minute
    nobody = by_minute.keys[1] >= len(accounts)
    unallocated_mj = np.zeros(window.minutes, dtype=np.int64)
    blind = np.zeros(window.minutes, dtype=np.int64)
    np.add.at(unallocated_mj, by_minute.keys[0][nobody], by_minute.energy_mj[nobody])
    np.add.at(blind, by_minute.keys[0][nobody], by_minute.blind_us[nobody])
    return Ledger(
        pool=facts.pool,
        window=window,
        spans=found,
        accounts=accounts,
        jobs=jobs,
        uses=uses,
        service_us=service_us,
        by_minute=by_minute,
        by_gpu_minute=sums.by_gpu_minute,
        by_gpu_hour=sums.by_gpu_hour,
        by_job=sums.by_job,
        unheld=unheld(facts, found, cut, window.from_ms, window.to_ms, conflicts),
        unallocated_mj=unallocated_mj,
        unallocated_blind_us=blind,
        conflicts=conflicts,
    )


def _moved(bounds: Ints, moves: _Moves, *codes: Ints) -> tuple[Ints, ...]:
    bucket = np.searchsorted(bounds, moves.minute, side="right") - 1
    return bucket, *(code[moves.entry] for code in codes)


def _by_gpu_minute(entries: _Entries, use: Ints, cut: Pieces, cells: _Cells, moves: _Moves, window: Window) -> Amounts:
    """Rows by (minute, gpu, use, activity) of the minutes in which the GPU has fragments."""
    row, position = expand(cut.offsets[cells.piece + 1] - cut.offsets[cells.piece])
    entry = cut.offsets[cells.piece[row]] + position
    minute = cells.minute[row] - window.from_ms // MINUTE_MS
    unseen = _unseen((minute, entries.gpu[entry], use[entry]), entries.base[entry], entries.amount[entry])
    keys = moves.minute, entries.gpu[moves.entry], use[moves.entry]
    return _sum(*_stacked([unseen, _seen(keys, moves, entries.base[moves.entry])]))


def kinds(names: Sequence[tuple[str, bool]]) -> list[str]:
    """The `kind` of accounts: held, unconfirmed, and unallocated and unsliced for the last codes."""
    return ["unconfirmed" if unconfirmed else "held" for _, unconfirmed in names] + ["unallocated", "unsliced"]
