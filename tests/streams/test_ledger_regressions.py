"""Worlds that once broke a law, shrunk to what mattered."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pyarrow as pa

from gpuledger.streams.fingerprints import facts_hashes
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


def test_a_boot_before_an_allocation_is_in_no_earlier_minute_of_its_fingerprint() -> None:
    """Law 9: a boot's start moved to an earlier minute; no row of that minute changed, nothing marked it, and the
    fingerprint that an audit compares was another all the same."""
    allocation = {"id": "al", "revision": 1, "node": "n0", "boot_id": "old", "gpu": "g0", "instance": 0, "epoch_ms": 0}
    allocation |= dict.fromkeys(("account", "user", "namespace"), "") | {
        "job_id": "j",
        "source": "slurm",
        "tenant": "X",
    }
    allocation |= {"weight_num": 1, "weight_den": 1, "start_ms": T0 + 130_000, "end_ms": None}
    tables = {"placements": [placement("p", "n0", "a", T0)], "allocations": [allocation]}

    def hashes(new_boot_ms: int) -> list[int]:
        boots = {"node": ["n0", "n0"], "boot_id": ["old", "new"], "start_ms": [T0 - 9, new_boot_ms]}
        facts = inputs.facts(world(**tables), "a")
        names = ("placements", "geometries", "allocations", "commitments", "transfers")
        hashed = {n: getattr(facts, n) for n in names}
        with_hash = {
            n: t.append_column("hash", pa.array([7] * t.num_rows, type=pa.uint64())) for n, t in hashed.items()
        }
        known = replace(facts, boots=pa.table(boots), **with_hash)
        return facts_hashes(known, T0, T0 + 240_000, 600_000).tolist()

    early, late = hashes(T0 + 50_000), hashes(T0 + 70_000)
    assert early[:2] == late[:2] and early[2:] != late[2:]
