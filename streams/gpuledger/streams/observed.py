"""Stored fragments to observed segments that do not overlap: which run is believed at each instant. Pure.

Where several runs cover an instant the smallest (run start, run id) wins, so the answer depends on what was sent and
not on when it arrived.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

__all__ = ["FRAGMENT_COLUMNS", "Observed", "observed"]

Ints = NDArray[np.int64]

#: The columns of `fragments` that the ledger reads.
FRAGMENT_COLUMNS = (
    "minute",
    "gpu",
    "instance",
    "run_start_ms",
    "run_id",
    "seq",
    "epoch_ms",
    "segment_start_ms",
    "segment_duration_ms",
    "segment_activity",
    "segment_energy_from_mj",
    "segment_energy_to_mj",
)


@dataclass(frozen=True, slots=True)
class Observed:
    """Segments [start, end) of (gpu, instance), UTC milliseconds, sorted by (gpu, instance, start), disjoint there.

    Energy is linear from `energy_from` at `line_start` to `energy_to` at `line_end` (the segment as it was stored, of
    which [start, end) is the believed part); -1 where it is not known or the instance is not the whole GPU.
    `epoch` is when the MIG instance was made, 0 where that is not known.
    """

    gpu: Ints
    instance: Ints
    epoch: Ints
    start: Ints
    end: Ints
    activity: Ints
    line_start: Ints
    line_end: Ints
    energy_from: Ints
    energy_to: Ints

    def __len__(self) -> int:
        return len(self.gpu)

    def take(self, rows: Ints) -> Observed:
        """The segments with these indexes."""
        return Observed(*(getattr(self, name)[rows] for name in Observed.__slots__))


def _flat(table: pa.Table, name: str, null: int) -> Ints:
    values = pc.call_function("list_flatten", [table.column(name).combine_chunks()])
    return values.fill_null(null).to_numpy(zero_copy_only=False).astype(np.int64)


def _gpu_codes(table: pa.Table, gpus: Mapping[str, int]) -> Ints:
    """Index of each fragment's GPU, -1 for one that is not of the pool."""
    encoded = table.column("gpu").combine_chunks().dictionary_encode()
    codes = np.array([gpus.get(name, -1) for name in encoded.dictionary.to_pylist()], dtype=np.int64)
    return codes[encoded.indices.to_numpy()] if len(codes) else np.empty(0, np.int64)


def _run_ranks(table: pa.Table) -> Ints:
    """Rank of each fragment's (run start, run id, seq): the smaller is believed."""
    run = table.column("run_id").combine_chunks().dictionary_encode()
    names = run.dictionary.to_pylist()
    by_name = np.empty(len(names), dtype=np.int64)
    by_name[np.array(sorted(range(len(names)), key=names.__getitem__), dtype=np.int64)] = np.arange(len(names))
    run_code = by_name[run.indices.to_numpy()] if names else np.empty(0, np.int64)
    start = table.column("run_start_ms").to_numpy()
    seq = table.column("seq").to_numpy().astype(np.int64)
    order = np.lexsort((seq, run_code, start))
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    return rank


def _believe(segments: Observed, rank: Ints) -> Observed:
    """Resolves the overlaps of one device: at each instant the segment of the smallest rank."""
    cuts = np.unique(np.concatenate([segments.start, segments.end]))
    rows: list[int] = []
    starts: list[int] = []
    ends: list[int] = []
    for lo, hi in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
        here = np.flatnonzero((segments.start <= lo) & (segments.end > lo))
        if len(here) == 0:
            continue
        best = int(here[np.argmin(rank[here])])
        if rows and rows[-1] == best and ends[-1] == lo:
            ends[-1] = hi
        else:
            rows.append(best)
            starts.append(lo)
            ends.append(hi)
    taken = segments.take(np.array(rows, dtype=np.int64))
    return Observed(
        taken.gpu,
        taken.instance,
        taken.epoch,
        np.array(starts, dtype=np.int64),
        np.array(ends, dtype=np.int64),
        taken.activity,
        taken.line_start,
        taken.line_end,
        taken.energy_from,
        taken.energy_to,
    )


def _concatenate(parts: list[Observed]) -> Observed:
    return Observed(*(np.concatenate([getattr(part, name) for part in parts]) for name in Observed.__slots__))


def observed(table: pa.Table, gpus: Mapping[str, int]) -> Observed:
    """All segments of the fragments (columns `FRAGMENT_COLUMNS`) whose GPU is in `gpus` (name to index)."""
    gpu = _gpu_codes(table, gpus)
    count = pc.call_function("list_value_length", [table.column("segment_start_ms")]).to_numpy().astype(np.int64)
    fragment = np.repeat(np.arange(table.num_rows), count)
    minute = table.column("minute").cast(pa.int64()).to_numpy()
    instance = table.column("instance").to_numpy().astype(np.int64)
    rank = _run_ranks(table)
    start = minute[fragment] + _flat(table, "segment_start_ms", 0)
    end = start + _flat(table, "segment_duration_ms", 0)
    energy_from, energy_to = _flat(table, "segment_energy_from_mj", -1), _flat(table, "segment_energy_to_mj", -1)
    known = (energy_from >= 0) & (energy_to >= 0) & (instance[fragment] == 0)
    segments = Observed(
        gpu=gpu[fragment],
        instance=instance[fragment],
        epoch=table.column("epoch_ms").to_numpy().astype(np.int64)[fragment],
        start=start,
        end=end,
        activity=_flat(table, "segment_activity", 0),
        line_start=start,
        line_end=end,
        energy_from=np.where(known, energy_from, -1),
        energy_to=np.where(known, energy_to, -1),
    )
    rank = rank[fragment]
    order = np.lexsort((rank, segments.start, segments.instance, segments.gpu))
    order = order[(segments.gpu[order] >= 0) & (segments.end[order] > segments.start[order])]
    segments, rank = segments.take(order), rank[order]
    return _without_overlaps(segments, rank)


def _without_overlaps(segments: Observed, rank: Ints) -> Observed:
    """`segments` sorted by (gpu, instance, start). Devices without an overlap, nearly all, are taken as they are."""
    if len(segments) == 0:
        return segments
    same = (segments.gpu[1:] == segments.gpu[:-1]) & (segments.instance[1:] == segments.instance[:-1])
    device = np.append(0, np.cumsum(~same))
    # The running maximum of the ends, per device: offset by device so that it restarts there.
    base = int(segments.start.min())
    width = int(segments.end.max()) - base + 1
    reach = np.maximum.accumulate(device * width + segments.end - base)
    overlap = np.zeros(len(segments), dtype=bool)
    overlap[1:] = same & (reach[:-1] > device[1:] * width + segments.start[1:] - base)
    if not overlap.any():
        return segments
    torn = np.unique(device[overlap])
    clean = segments.take(np.flatnonzero(~np.isin(device, torn)))
    parts = [clean]
    for n in torn.tolist():
        rows = np.flatnonzero(device == n)
        parts.append(_believe(segments.take(rows), rank[rows]))
    joined = _concatenate(parts)
    return joined.take(np.lexsort((joined.start, joined.instance, joined.gpu)))
