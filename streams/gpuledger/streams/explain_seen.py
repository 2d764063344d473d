"""The telemetry behind a minute of a GPU: which run was believed at each instant, and which fragments and facts each
segment comes from. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from gpuledger.schemas.telemetry import Activity
from gpuledger.streams.explain_facts import overlap
from gpuledger.streams.explanation import Claim, Seen, SeenPart, Segment

__all__ = ["counter_mj", "seen", "traced"]

Range = tuple[int, int]


@dataclass(slots=True)
class _Part:
    """A segment of fragment `fragment` while it is being decided where it is believed."""

    fragment: int
    rank: tuple[int, str, int]
    span: Range
    activity: int
    energy: tuple[int | None, int | None]
    believed: list[Range]
    instead: str


def seen(rows: Iterable[Mapping[str, Any]]) -> list[Seen]:
    """Rows of `fragments` of one GPU and minute (with `at_ms` and `appended_ms`), and what of each is believed: at
    every instant of an instance the smallest (run start, run id, sequence number)."""
    fragments = sorted(rows, key=lambda row: (row["instance"], row["run_start_ms"], row["run_id"], row["seq"]))
    parts: dict[int, list[_Part]] = defaultdict(list)
    for n, row in enumerate(fragments):
        columns = ("segment_start_ms", "segment_duration_ms", "segment_activity")
        energies = zip(row["segment_energy_from_mj"], row["segment_energy_to_mj"], strict=True)
        for start, length, activity, energy in zip(*(row[name] for name in columns), energies, strict=True):
            begin = row["at_ms"] + start
            rank = row["run_start_ms"], row["run_id"], row["seq"]
            parts[row["instance"]].append(_Part(n, rank, (begin, begin + length), activity, energy, [], ""))
    for of_instance in parts.values():
        _believe(of_instance)
    by_fragment: dict[int, list[SeenPart]] = defaultdict(list)
    for part in (part for of_instance in parts.values() for part in of_instance):
        name = Activity(part.activity).name.lower()
        by_fragment[part.fragment].append(SeenPart(*part.span, name, *part.energy, part.believed, part.instead))
    return [
        Seen(
            instance=row["instance"],
            epoch_ms=row["epoch_ms"],
            run_id=row["run_id"],
            run_start_ms=row["run_start_ms"],
            seq=row["seq"],
            node=row["node"],
            appended_ms=row["appended_ms"],
            samples=row["samples"],
            parts=by_fragment[n],
        )
        for n, row in enumerate(fragments)
    ]


def _believe(parts: list[_Part]) -> None:
    cuts = sorted({t for part in parts for t in part.span})
    by_start = sorted(parts, key=lambda part: part.span)
    for start, end in pairwise(cuts):
        here = [part for part in by_start if part.span[0] <= start < part.span[1]]
        if not here:
            continue
        best = min(here, key=lambda part: part.rank)
        if best.believed and best.believed[-1][1] == start:
            best.believed[-1] = (best.believed[-1][0], end)
        else:
            best.believed.append((start, end))
        for other in here:
            if other is not best:
                other.instead = f"{best.rank[1]}/{best.rank[2]}"


def counter_mj(fragments: Iterable[Seen]) -> tuple[int, int] | None:
    """The smallest and the greatest reading of the whole GPU's energy counter in the minute; None: there is none."""
    readings = [
        mj
        for each in fragments
        if each.instance == 0
        for part in each.parts
        for mj in (part.energy_from_mj, part.energy_to_mj)
        if mj is not None
    ]
    return (min(readings), max(readings)) if readings else None


# ------------------------------------------------------------------------------------------------- segments


def _unconfirmed(claim: Claim, part: Range) -> dict[bool, Range | None]:
    """The confirmed (False) and the unconfirmed (True) part of a stretch."""
    until = part[1] if claim.confirmed_until_ms is None else claim.confirmed_until_ms
    return {False: overlap(part, (part[0], until)), True: overlap(part, (until, part[1]))}


def _stretches(claim: Claim, segment: Segment, service: Sequence[Range]) -> list[Range]:
    """Where the claim is what the segment counts."""
    if (claim.job_id, claim.instance) != (segment.job_id, segment.instance):
        return []
    paid = [(part.start_ms, part.end_ms) for part in claim.tenants if part.tenant == segment.tenant]
    found = [
        _unconfirmed(claim, both)[segment.kind == "unconfirmed"]
        for count in claim.counts
        for served in service
        for owner in paid
        if (once := overlap(count, served)) is not None and (both := overlap(once, owner)) is not None
    ]
    return [each for each in found if each is not None]


def _fragments(segment: Segment, stretches: Sequence[Range], epochs: set[int], all_seen: Iterable[Seen]) -> list[Any]:
    return [
        (each.run_id, each.seq)
        for each in all_seen
        if each.instance == segment.instance and (each.epoch_ms == 0 or 0 in epochs or each.epoch_ms in epochs)
        if any(
            part.activity == segment.activity and overlap(believed, stretch) is not None
            for part in each.parts
            for believed in part.believed
            for stretch in stretches
        )
    ]


def traced(
    segments: Iterable[Segment], all_claims: Sequence[Claim], all_seen: Sequence[Seen], service: Sequence[Range]
) -> list[Segment]:
    """The segments with the allocations and fragments they come from. `service`: where the GPU serves their pool."""
    out: list[Segment] = []
    for segment in segments:
        if segment.kind not in ("held", "unconfirmed"):
            out.append(replace(segment, fragments=_fragments(segment, service, {0}, all_seen)))
            continue
        of_claims = {claim.id: found for claim in all_claims if (found := _stretches(claim, segment, service))}
        epochs = {claim.epoch_ms for claim in all_claims if claim.id in of_claims}
        stretches = [stretch for found in of_claims.values() for stretch in found]
        fragments = _fragments(segment, stretches, epochs, all_seen)
        out.append(replace(segment, facts=sorted(of_claims), fragments=fragments))
    return out
