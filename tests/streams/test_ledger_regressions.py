"""Worlds that once broke a law, shrunk to what mattered."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pyarrow as pa

from gpuledger.streams.holders import spans
from tests.streams import inputs

T0 = 4_000_000_020_000


def placement(id_: str, node: str, pool: str, claimed_at_ms: int) -> dict[str, Any]:
    fields = {"id": id_, "gpu": "g0", "node": node, "pool": pool, "revision": 1, "end_ms": None}
    return fields | {"claimed_at_ms": claimed_at_ms, "start_ms": T0}


def world(**tables: Any) -> dict[str, Any]:
    empty = ("placements", "allocations", "geometries", "jobs", "commitments", "transfers", "tenants", "batches")
    return {**{name: [] for name in empty}, "from_ms": T0, "ahead_ms": 0, **tables}


def test_of_three_claims_the_best_that_was_beaten_is_named_whatever_was_read_first() -> None:
    """Law 2: a GPU that went from b to a on another node and back again, none of it ended."""
    claims = [placement("p", "n0", "b", T0 - 9), placement("q", "n8", "a", T0), placement("r", "n0", "a", T0)]
    facts = inputs.facts(world(placements=claims), "a")
    said: list[Any] = []
    for order in ([0, 1, 2], [2, 1, 0]):
        mixed = replace(facts, placements=facts.placements.take(pa.array(order)))
        said.append(spans(mixed, T0, T0 + 60_000, 0).conflicts)
    assert said[0] == said[1]
    assert [(each.other, each.detail) for each in said[0]] == [("q", "n0 in a (newer claim) against n8 in a")]
