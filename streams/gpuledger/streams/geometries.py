"""How GPUs are cut into MIG instances, and what no instance has. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuledger.streams.pool_facts import OPEN_END_MS, PoolFacts, strings, times

__all__ = ["Geometries", "geometries_of", "slices_at"]

Ints = NDArray[np.int64]


@dataclass(slots=True)
class Geometries:
    """Which geometry is in force, sorted by (gpu, start), disjoint. `unsliced` of `slices` belong to no instance."""

    gpu: Ints
    start: Ints
    end: Ints
    slices: Ints
    unsliced: Ints


def geometries_of(facts: PoolFacts, gpus: Mapping[str, int], from_ms: int, to_ms: int) -> Geometries:
    """Of those in force at an instant the latest start counts, then the smaller node, then the smaller id."""
    table = facts.geometries
    columns = (
        strings(table, "gpu"),
        times(table, "start_ms", 0).tolist(),
        times(table, "end_ms", OPEN_END_MS).tolist(),
        strings(table, "node"),
        strings(table, "id"),
        table.column("slices").to_pylist(),
        table.column("sliced").to_pylist(),
    )
    by_gpu: dict[int, list[tuple[Any, ...]]] = defaultdict(list)
    for gpu, start, end, *rest in zip(*columns, strict=True):
        if gpu in gpus and start < min(end, to_ms) and end > from_ms:
            by_gpu[gpus[gpu]].append((start, end, *rest))
    out: list[tuple[int, ...]] = []
    for gpu in sorted(by_gpu):
        known = by_gpu[gpu]
        cuts = {t for start, end, *_ in known for t in (start, end) if from_ms < t < to_ms}
        for begin, finish in pairwise(sorted({from_ms, to_ms} | cuts)):
            here = [each for each in known if each[0] <= begin < each[1]]
            if here:
                *_, slices, sliced = min(here, key=lambda each: (-each[0], *each[2:4]))
                out.append((gpu, begin, finish, slices, max(0, slices - sliced)))
    return Geometries(*np.array(out, dtype=np.int64).reshape(-1, 5).T)


def slices_at(shapes: Geometries, begin: Ints, finish: Ints, cuts: Ints) -> tuple[Ints, Ints]:
    """(slices, unsliced of them) of the geometry in force from each of `cuts`; (1, 0) where there is none."""
    if len(begin) == 0:
        return np.ones(len(cuts), dtype=np.int64), np.zeros(len(cuts), dtype=np.int64)
    at = np.maximum(np.searchsorted(begin, cuts, side="right") - 1, 0)
    inside = (begin[at] <= cuts) & (cuts < finish[at])
    return np.where(inside, shapes.slices[at], 1), np.where(inside, shapes.unsliced[at], 0)
