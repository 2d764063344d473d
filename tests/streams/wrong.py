"""Deliberate mistakes in the product, one for each way in which a law could break: the table of what the laws catch.

A mistake replaces one function of the product by a variant that somebody could have written. The tests see the law fail
on it, and hold on the product as it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from numpy.typing import NDArray

from gpuledger.finance import charges
from gpuledger.finance.apportion import apportion_groups
from gpuledger.schemas.events import AssetCost
from gpuledger.streams import fragments, observed, pieces, recompute, reserved, service, sinks
from gpuledger.streams.fragments import Fragments
from gpuledger.streams.observed import Observed
from gpuledger.streams.pool_facts import PoolFacts
from gpuledger.streams.sinks import FactsSink, TelemetrySink
from gpuledger.streams.store import Store
from tests.streams import computed
from tests.streams import disturbances as d
from tests.streams.fleet import Plan

__all__ = ["IN_THE_STORE", "MISTAKES", "InTheStore", "Mistake"]

Ints = NDArray[np.int64]
Patch = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Mistake:
    """`what` is wrong, and `law` must notice: the name of a function of `laws` or `laws_money`."""

    law: str
    what: str
    make: Patch

    def __str__(self) -> str:
        return f"{self.law}: {self.what}"


def put(target: Any, name: str, wrong: Callable[[Any], Any]) -> Patch:
    """Replaces an attribute by what `wrong` makes of it."""

    def make(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(target, name, wrong(getattr(target, name)))

    return make


# ------------------------------------------------------------------------------------------------- apportioning


def floors_only(_: Any) -> Any:
    def parts(totals: Ints, group: NDArray[np.intp], weights: Ints) -> Ints:
        """Shares cut off, the rest of them forgotten."""
        sums = np.zeros(len(totals), dtype=np.int64)
        np.add.at(sums, group, weights)
        return totals[group] * weights // np.maximum(sums[group], 1)

    return parts


def ties_to_the_last(_: Any) -> Any:
    def parts(totals: Ints, group: NDArray[np.intp], weights: Ints) -> Ints:
        """The last of equal remainders gets the microsecond."""
        mirrored = (len(totals) - 1 - group)[::-1]
        return apportion_groups(totals[::-1], mirrored, weights[::-1])[::-1]

    return parts


def in_floats(_: Any) -> Any:
    def parts(total: int, weights: Ints) -> Ints:
        """Money through floats, each part rounded."""
        return np.rint(total * (weights / max(int(weights.sum()), 1))).astype(np.int64)

    return parts


def the_same_every_minute(_: Any) -> Any:
    def fixed(cost: AssetCost, from_ms: int, to_ms: int) -> int:
        """A period's cost divided by its minutes, the rest forgotten."""
        total = int(cost.period_cost * 10**9)
        return total // ((cost.end_ms - cost.start_ms) // 60_000) * ((to_ms - from_ms) // 60_000)

    return fixed


# ------------------------------------------------------------------------------------------------- telemetry


def as_they_came(_: Any) -> Any:
    def ranks(table: pa.Table) -> Ints:
        """The run that arrived first is believed."""
        return np.arange(table.num_rows)

    return ranks


def the_latest_run(right: Any) -> Any:
    return lambda table: -right(table)


def everybody_counts(_: Any) -> Any:
    def overlaps(segments: Observed, rank: Ints) -> Observed:
        """Where two runs saw a GPU, both are added."""
        return segments

    return overlaps


def any_epoch(_: Any) -> Any:
    return lambda a, b: np.ones(len(a), dtype=bool)


def numbered_by_block(right: Any) -> Any:
    def wrong(block: Any) -> Fragments | None:
        """A fragment is named by its place in the block it came in."""
        found = right(block)
        if found is None:
            return None
        at = found.table.schema.get_field_index("seq")
        numbers = pa.array(np.arange(found.table.num_rows), type=pa.uint32())
        return replace(found, table=found.table.set_column(at, "seq", numbers))

    return wrong


def no_reset(right: Any) -> Any:
    def line(at: Ints, start: Ints, end: Ints, first: Ints, last: Ints) -> Ints:
        """The energy of an interval is spread over its first half."""
        return right(np.minimum(start + 2 * (at - start), end), start, end, first, last)

    return line


def from_what_is_believed(_: Any) -> Any:
    def line(seen: Observed, segment: Ints, at: Ints) -> Ints:
        """The energy between two readings is taken for that of the part that is believed."""
        first, last = seen.energy_from[segment], seen.energy_to[segment]
        start, end = seen.start[segment], seen.end[segment]
        return first + (last - first) * (at - start) // np.maximum(end - start, 1)

    return line


# ------------------------------------------------------------------------------------------------- ledger


def only_what_was_seen(right: Any) -> Any:
    def wrong(facts: PoolFacts, table: pa.Table, window: Any) -> Any:
        """What no telemetry was ever seen of is held by nobody."""
        seen = facts.allocations.filter(pc.field("gpu").isin(table.column("gpu").combine_chunks()))
        return right(replace(facts, allocations=seen), table, window)

    return wrong


def promised_here(right: Any) -> Any:
    def levels(facts: PoolFacts, from_ms: int, to_ms: int, conflicts: Any) -> Any:
        """Only what is promised inside the window counts."""
        recent = pc.field("start_ms") >= from_ms
        known = replace(facts, commitments=facts.commitments.filter(recent), transfers=facts.transfers.filter(recent))
        return right(known, from_ms, to_ms, conflicts)

    return levels


def first_come(_: Any) -> Any:
    return property(lambda claim: (0, "", ""))


def confirmed_by_samples(right: Any) -> Any:
    def spans(facts: PoolFacts, from_ms: int, to_ms: int, confirm_ms: int) -> Any:
        """An allocation without an end holds until its node last named it."""
        named = facts.allocations.column("named_ms")
        end = pc.coalesce(facts.allocations.column("end_ms"), named)  # pyright: ignore[reportAttributeAccessIssue]
        at = facts.allocations.schema.get_field_index("end_ms")
        return right(
            replace(facts, allocations=facts.allocations.set_column(at, "end_ms", end)), from_ms, to_ms, confirm_ms
        )

    return spans


def no_geometry(right: Any) -> Any:
    def spans(facts: PoolFacts, *window: int) -> Any:
        """What no MIG instance has is sold as if somebody could have it."""
        return right(replace(facts, geometries=facts.geometries.slice(0, 0)), *window)

    return spans


def no_job_ends(right: Any) -> Any:
    def spans(facts: PoolFacts, *window: int) -> Any:
        """A lost epilog holds a GPU for ever."""
        at = facts.allocations.schema.get_field_index("job_ended_ms")
        unknown = pa.nulls(facts.allocations.num_rows, pa.int64())
        return right(replace(facts, allocations=facts.allocations.set_column(at, "job_ended_ms", unknown)), *window)

    return spans


#: What each law caught. Every line is asked by `test_ledger_laws_fail.py`.
MISTAKES: tuple[Mistake, ...] = (
    Mistake("agreement", "the later run is believed", put(observed, "_run_ranks", the_latest_run)),
    Mistake("agreement", "instances of other epochs are the same", put(recompute, "_same_epoch", any_epoch)),
    Mistake("agreement", "unsliced capacity is unallocated", put(recompute, "spans", no_geometry)),
    Mistake("agreement", "a job's end ends nothing", put(recompute, "spans", no_job_ends)),
    Mistake("conservation", "remainders are dropped", put(pieces, "apportion_groups", floors_only)),
    Mistake("order_and_repetition", "the first row read wins a GPU", put(service.Claim, "rank", first_come)),
    Mistake("order_and_repetition", "the run that came first wins", put(observed, "_run_ranks", as_they_came)),
    Mistake("replay", "fragments are named by their block", put(computed, "fragments", numbered_by_block)),
    Mistake("additivity", "promises begin with the window", put(reserved, "levels", promised_here)),
    Mistake("held_time", "what nobody sees is not held", put(computed, "recompute", only_what_was_seen)),
    Mistake("held_time", "held until last named", put(recompute, "spans", confirmed_by_samples)),
    Mistake("unobserved", "two runs count twice", put(observed, "_without_overlaps", everybody_counts)),
    Mistake("shares", "ties go to the last", put(pieces, "apportion_groups", ties_to_the_last)),
    Mistake("money", "money is divided in floats", put(charges, "largest_remainder", in_floats)),
    Mistake("money", "a period costs the same every minute", put(charges, "fixed_cost_nano", the_same_every_minute)),
    Mistake("energy", "remainders of energy are dropped", put(recompute, "apportion_groups", floors_only)),
    Mistake("energy", "a part is taken for the whole", put(recompute, "_line", from_what_is_believed)),
    Mistake("energy", "energy is spent early", put(fragments, "linear", no_reset)),
)


# ------------------------------------------------------------------------------------------------- in the store


def arrival_ranks(_: Any) -> Any:
    numbers = itertools.count(1)
    return lambda fact: next(numbers)


def remembers_too_soon(right: Any) -> Any:
    def store(self: TelemetrySink, records: Sequence[Any]) -> Any:
        """What is still to be marked is remembered as marked."""
        stored = right(self, records)
        self._boots.update(stored.marks.boots)  # pyright: ignore[reportPrivateUsage]
        self._named.update(stored.marks.named)  # pyright: ignore[reportPrivateUsage]
        return stored

    return store


def only_the_new(_: Any) -> Any:
    def revisions(self: FactsSink, facts: Sequence[Any]) -> list[Any]:
        """Only the revision that came marks its pools and its range."""
        return [fact.fact for fact in facts]

    return revisions


def no_marks(_: Any) -> Any:
    return lambda self, *_: {}


def where_it_is_now(_: Any) -> Any:
    def pools_of(self: Store, gpus: Any) -> dict[str, set[str]]:
        """Only the pools in which a GPU is now are marked."""
        sql = "SELECT gpu, argMax(pool, rank) FROM placements WHERE gpu IN {gpus:Array(String)} GROUP BY gpu"
        return {gpu: {pool} for gpu, pool in self.rows(sql, {"gpus": sorted(set(gpus))})}

    return pools_of


@dataclass(frozen=True)
class InTheStore:
    """A mistake that law `mistake.law` (its number) notices through the store, on the world of `seed` in which only
    these disturbances happen."""

    mistake: Mistake
    kinds: tuple[Callable[[Plan], str], ...]
    seed: int

    def __str__(self) -> str:
        return str(self.mistake)


#: What the laws caught through the store.
IN_THE_STORE: tuple[InTheStore, ...] = (
    InTheStore(
        Mistake("2", "of two revisions the one that came last counts", put(sinks, "rank_of", arrival_ranks)),
        (d.corrected, d.pool_changes),
        0,
    ),
    InTheStore(
        Mistake("3", "remembered before the marks were out", put(TelemetrySink, "store", remembers_too_soon)),
        (d.reboot, d.late),
        259,
    ),
    InTheStore(
        Mistake("9", "only the new revision marks", put(FactsSink, "_revisions", only_the_new)), (d.corrected,), 0
    ),
    InTheStore(
        Mistake("9", "only the pool of now is marked", put(Store, "pools_of", where_it_is_now)),
        (d.pool_changes, d.late),
        1,
    ),
    InTheStore(
        Mistake("9", "a naming marks nothing", put(TelemetrySink, "_mark_confirmations", no_marks)),
        (d.late, d.lost),
        86,
    ),
    InTheStore(
        Mistake("9", "a boot marks nothing", put(TelemetrySink, "_mark_boots", no_marks)), (d.reboot, d.late), 1
    ),
    InTheStore(
        Mistake("9", "the end of a job marks nothing", put(FactsSink, "_mark_job_ends", no_marks)), (d.no_epilog,), 1
    ),
)
