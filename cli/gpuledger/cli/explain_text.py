"""An explanation as text for people (at most about 110 columns) and as JSON for scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from gpuledger.cli.explain_words import At, changed, clock, cost, cut, number, ranges, table, wrapped
from gpuledger.streams.explain_facts import moment
from gpuledger.streams.explain_seen import counter_mj
from gpuledger.streams.explanation import (
    Claim,
    Explanation,
    FactHistory,
    MinuteVersion,
    PoolMinute,
    Revision,
    Seen,
    SeenPart,
    Segment,
)

if TYPE_CHECKING:
    from gpuledger.cli.batch_samples import Sample

__all__ = ["as_json", "as_text"]

#: Lines of one kind beyond this are counted, not shown; `--full` shows them.
_MOST = 12


def as_json(value: Any) -> Any:
    """Dataclasses as objects: moments (`…_ms`) as ISO 8601 under the name without `_ms`, amounts (`…_us`, `…_mj`) and
    money as text, because they may pass 2^53."""
    if is_dataclass(value) and not isinstance(value, type):
        out: dict[str, Any] = {}
        for field in fields(value):
            item = getattr(value, field.name)
            if field.name.endswith("_ms"):
                out[field.name.removesuffix("_ms")] = None if item is None else moment(item)
            elif field.name.endswith(("_us", "_mj")) or field.name == "random":
                out[field.name] = None if item is None else str(item)
            elif field.name in ("serves", "counts", "believed") and isinstance(item, list):
                out[field.name] = [[moment(start), moment(end)] for start, end in item]
            else:
                out[field.name] = as_json(item)
        if isinstance(value, PoolMinute):
            out["segments_us"] = str(value.segments_us)
        return out
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return format(value, "f") if isinstance(value, Decimal) else value


def as_text(found: Explanation, *, full: bool, samples: Sequence[Sample] | None = None) -> list[str]:
    """The lines to print. Without `full` long lists are cut, and say so. `samples` are shown where they were asked."""
    most = 1_000_000 if full else _MOST
    at = clock(found.minute_ms)
    pools = " and ".join(f"pool {pool.pool}" for pool in found.pools) or "in no pool"
    out = [f"GPU {found.gpu}, minute {moment(found.minute_ms)}, {pools}"]
    out += wrapped(f"! {note}" for note in found.notes)
    histories = {(each.kind, each.id): each for each in found.facts}
    labels = {claim.id: _label(n) for n, claim in enumerate(found.claims)}
    for pool in found.pools:
        out += _segments(pool, labels)
    out += wrapped(_claims(found.claims, labels, histories, at))
    out += wrapped(_placements(found, histories, at))
    out += wrapped(_seen(found.fragments, most, at))
    if samples is not None:
        out += _samples(samples, most, at)
    if found.gaps:
        out += ["", "Dropped batches, as the agents state"]
        out += wrapped(
            f"  node {gap.node}, run {gap.run_id[:8]}: {gap.batches} batches ({gap.first_seq} to {gap.last_seq}), "
            f"{at(gap.from_ms)} to {at(gap.to_ms)}: {gap.reason}"
            for gap in found.gaps
        )
    if found.conflicts:
        out += ["", "Conflicts"]
        out += wrapped(
            f"  {odd.kind}: {odd.subject} against {odd.other}, {at(odd.from_ms)} to {at(odd.to_ms)}: {odd.detail}"
            for odd in found.conflicts
        )
    out += wrapped(_superseded(found, most, at))
    for pool in found.pools:
        out += _money(pool, at)
    return out


# -- segments -------------------------------------------------------------------------------------------------------


def _label(n: int) -> str:
    """A to Z for the allocations, because their ids are long."""
    return chr(ord("A") + n) if n < 26 else f"A{n}"


def _segments(pool: PoolMinute, labels: Mapping[str, str]) -> list[str]:
    if not pool.segments:
        return ["", f"Segments in pool {pool.pool}: none ({pool.why_not})"]
    again = {True: "; computed again now they are the same", False: "; COMPUTED AGAIN NOW THEY DIFFER", None: ""}
    how = f"the stored rows{again[pool.agrees]}" if pool.stored else "computed for this answer"
    out = ["", f"Segments in pool {pool.pool}: {how}"]
    if pool.why_not:
        out.append(f"  ({pool.why_not})")
    head = ("kind", "tenant", "job", "inst", "activity", "GPU-us", "mJ", "from")
    rows = [_segment_row(each, labels) for each in pool.segments]
    right = "= its time in service" if pool.segments_us == pool.service_us else f"BUT {pool.service_us:,} in service"
    energies = [each.energy_mj for each in pool.segments if each.energy_mj is not None]
    rows.append(("sum", "", "", "", "", number(pool.segments_us), number(sum(energies)) if energies else "–", right))
    out += table(head, rows, (3, 5, 6))
    if any(each.kind not in ("held", "unconfirmed") for each in pool.segments) and pool.unheld:
        out.append("  what nobody holds, all GPUs of the pool in this minute:")
        out += [f"    {row.kind} {row.tenant}".rstrip() + f" {row.gpu_us:,} GPU-us" for row in pool.unheld]
    return out


def _segment_row(each: Segment, labels: Mapping[str, str]) -> tuple[str, ...]:
    count = len(each.fragments)
    source = f"{count} fragment{'' if count == 1 else 's'}" if count else "no fragment covers it"
    if each.facts:
        source = f"allocation {', '.join(labels[id_] for id_ in each.facts)}; {source}"
    inst = str(each.instance) if each.instance else ""
    kind = (each.kind, each.tenant or "–", each.job_id or "–", inst, each.activity)
    return (*kind, number(each.gpu_us), number(each.energy_mj), source)


# -- facts ----------------------------------------------------------------------------------------------------------


def _claims(
    all_claims: Sequence[Claim], labels: Mapping[str, str], histories: Mapping[tuple[str, str], FactHistory], at: At
) -> list[str]:
    out = ["", "Who held it"] if all_claims else ["", "Who held it: no allocation touches this minute"]
    for claim in all_claims:
        instance = f", instance {claim.instance}" if claim.instance else ""
        epoch = f" made {moment(claim.epoch_ms)}" if claim.epoch_ms else ""
        out.append(
            f"  {labels[claim.id]}  allocation {claim.id}: job {claim.job_id}, {claim.source}, "
            f"weight {claim.weight}{instance}{epoch}, node {claim.node}"
        )
        out.append(f"    {at(claim.start_ms)} {_end(claim, at)}")
        for part in claim.tenants:
            when = "" if len(claim.tenants) == 1 else f" {at(part.start_ms)} to {at(part.end_ms)}"
            out.append(f"    tenant {part.tenant}{when}: {part.because}")
        counts = f"counts {ranges(claim.counts, at)}" if claim.counts else "does not count"
        why = f"; {claim.not_counted}" if claim.not_counted else ""
        out.append(f"    {counts}{why}")
        out += _learnt(histories.get(("allocation", claim.id)), at)
    return out


def _end(claim: Claim, at: At) -> str:
    if claim.end_ms is not None:
        return f"to {at(claim.end_ms)}, as its source says"
    named = "named by no batch" if claim.named_ms is None else f"last named {at(claim.named_ms)}"
    confirmed = f"confirmed until {at(claim.confirmed_until_ms)} ({named})"
    if claim.ends_ms is None:
        return f"on, without an end; {confirmed}"
    return f"to {at(claim.ends_ms)}, ended by {claim.ended_by}: its source told no end; {confirmed}"


def _learnt(history: FactHistory | None, at: At) -> list[str]:
    if history is None:
        return []
    last = history.current
    of = f"{len(history.revisions)} revisions, the last: " if len(history.revisions) > 1 else "one revision: "
    return [f"    {of}{_revision(last, at)}"]


def _revision(each: Revision, at: At) -> str:
    where = f"{each.topic}/{each.partition} offset {each.offset}"
    return f"{each.revision}, claimed {at(each.claimed_ms)}, learnt {at(each.learnt_ms)} ({where})"


def _placements(found: Explanation, histories: Mapping[tuple[str, str], FactHistory], at: At) -> list[str]:
    out = ["", "Where it was"] if found.placements else ["", "Where it was: no placement touches this minute"]
    for each in found.placements:
        until = "on" if each.end_ms is None else f"to {at(each.end_ms)}"
        out.append(f"  placement {each.id}: node {each.node}, pool {each.pool}, {at(each.start_ms)} {until}")
        if each.beaten_by:
            serves = f"serves {ranges(each.serves, at)}" if each.serves else "serves nowhere in this minute"
            out.append(f"    {serves}: {each.beaten_by} has the newer claim")
        out += _learnt(histories.get(("placement", each.id)), at)
    for (kind, id_), history in histories.items():
        if kind == "geometry":
            out += [f"  geometry {id_}: {history.about}", *_learnt(history, at)]
    return out


# -- telemetry ------------------------------------------------------------------------------------------------------


def _seen(fragments: Sequence[Seen], most: int, at: At) -> list[str]:
    if not fragments:
        return ["", "What was seen: nothing"]
    out = ["", "What was seen"]
    counter = counter_mj(fragments)
    if counter is not None:
        out.append(f"  energy counter {counter[0]:,} to {counter[1]:,} mJ: {counter[1] - counter[0]:,} mJ")
    runs: dict[tuple[int, int, str], list[Seen]] = {}
    for each in fragments:
        runs.setdefault((each.instance, each.run_start_ms, each.run_id), []).append(each)
    for (instance, start_ms, run_id), of_run in runs.items():
        what = f"instance {instance}, " if instance else ""
        out.append(
            f"  {what}run {run_id}, started {at(start_ms)}, node {of_run[0].node}: {len(of_run)} fragments, "
            f"{sum(each.samples for each in of_run)} samples"
        )
        lines = [line for each in of_run for line in _fragment(each, at)]
        out += cut(lines, most, "segments of fragments")
    return out


def _fragment(each: Seen, at: At) -> list[str]:
    epoch = f" epoch {moment(each.epoch_ms)}" if each.epoch_ms else ""
    head = f"    seq {each.seq}{epoch}, stored {at(each.appended_ms)}"
    return [f"{head}: {_part(part, at)}" for part in each.parts]


def _part(part: SeenPart, at: At) -> str:
    energy = ""
    if part.energy_from_mj is not None and part.energy_to_mj is not None:
        energy = f", {part.energy_to_mj - part.energy_from_mj:,} mJ"
    text = f"{at(part.start_ms)} to {at(part.end_ms)} {part.activity}{energy}"
    if part.believed == [(part.start_ms, part.end_ms)]:
        return text
    believed = f"believed {ranges(part.believed, at)}" if part.believed else "not believed"
    return f"{text}; {believed}: {part.instead} comes first"


def _samples(samples: Sequence[Sample], most: int, at: At) -> list[str]:
    if not samples:
        return ["", "Samples: the broker has none of these batches any more"]
    rows = [
        (
            f"{each.run_id[:8]}/{each.seq}",
            str(each.instance or ""),
            at(each.at_ms),
            "–" if each.sm_active is None else f"{each.sm_active:.3f}",
            "–" if each.gpu_util_pct is None else f"{each.gpu_util_pct:.0f}",
            "–" if each.power_mw is None else f"{each.power_mw:,.0f}",
            number(each.counter_mj),
        )
        for each in samples
    ]
    head = ("run/seq", "inst", "time", "SM active", "utilisation %", "power mW", "counter mJ")
    title, *lines = table(head, rows, (1, 3, 4, 5, 6))
    return ["", "Samples, as the broker still has them", title, *cut(lines, most, "samples")]


# -- what superseded what -------------------------------------------------------------------------------------------


def _superseded(found: Explanation, most: int, at: At) -> list[str]:
    out = ["", "What superseded what"]
    corrected = [each for each in found.facts if len(each.revisions) > 1]
    for each in corrected:
        out.append(f"  {each.kind} {each.id} ({each.about})")
        out += cut([line for one in each.revisions for line in _superseding(one, at)], 2 * most, "lines")
    once = [each for each in found.facts if len(each.revisions) == 1]
    lines = [f"    {each.kind} {each.id} ({each.about}), learnt {at(each.current.learnt_ms)}" for each in once]
    if once:
        out += ["  never corrected", *cut(lines, most, "facts")]
    for pool in found.pools:
        out.append(f"  computations of the minute of pool {pool.pool} that are still stored, oldest first")
        newest = [row for each in pool.versions if each.counts for row in each.gpu_rows]
        out += [line for each in pool.versions[-most:] for line in _version(each, newest, at)]
        if len(pool.versions) > most:
            out.append(f"    … and {len(pool.versions) - most} older ones: --full")
    return out


def _superseding(each: Revision, at: At) -> list[str]:
    state = {"counts": "counts", "superseded": "superseded", "late": "came after a newer one, never counted"}
    out = [f"    {_revision(each, at)}: {state[each.state]}"]
    for change in each.changes:
        out.append(f"      {change.field}: {changed(change.before, change.after)}")
    return out


def _version(each: MinuteVersion, newest: Sequence[Segment], at: At) -> list[str]:
    fragments = "" if each.fragments is None else f", {number(each.fragments)} fragments of the pool read"
    complete = "" if each.complete is None else f", {'complete' if each.complete else 'open'}"
    state = f"{'counts' if each.counts else 'superseded'}{complete}{fragments}"
    out = [f"    version {each.epoch}/{each.offset}/{each.random}: {state}"]
    for mark in (each.marks or [])[-3:]:
        why = f"because of {mark.why or 'a mark'}, marked {at(mark.appended_ms)}"
        out.append(f"      {why} (dirty offset {mark.offset})")
    return out + [f"      {_left(row)}" for row in each.gpu_rows if not each.counts and row not in newest]


def _left(row: Segment) -> str:
    return f"it said: {row.kind} {row.tenant or '–'} {row.job_id or '–'} {row.activity} {row.gpu_us:,} GPU-us"


# -- money ----------------------------------------------------------------------------------------------------------


def _money(pool: PoolMinute, at: At) -> list[str]:
    if not pool.money:
        return ["", f"Money of pool {pool.pool}: no charges are stored for the price interval of this minute"]
    first = pool.money[0]
    span = f"{at(first.interval_start_ms)} to {at(first.interval_end_ms)}"
    out = ["", f"Money of pool {pool.pool}: price interval {span}{', an estimate still' if first.estimate else ''}"]
    rows: list[tuple[str, ...]] = []
    for each in pool.money:
        names = each.kind, each.tenant or "–", each.job_id or "–", each.activity
        booked = number(each.row_us), cost(each.row_asset_cost), cost(each.row_charge)
        share = number(each.share_us), cost(each.share_asset_cost), cost(each.share_charge)
        rows += [(*names, "booked", *booked), ("", "", "", "", "share", *share)]
    head = ("kind", "tenant", "job", "activity", "", "GPU-us", "asset cost", "charge")
    out += table(head, rows, (5, 6, 7))
    cards = sorted({each.rate_card for each in pool.money if each.rate_card})
    currencies = sorted({each.asset_currency for each in pool.money} | {each.charge_currency for each in pool.money})
    out.append(f"  in {' and '.join(filter(None, currencies))}; rate card: {', '.join(cards) or 'none'}")
    out.append(
        "  booked: the row of the whole interval. share: this GPU's part in this minute, shown and never booked,"
    )
    out.append("  because cost follows per interval; energy cost by energy, the rest by GPU time.")
    if any(each.incomplete for each in pool.money):
        out.append("  incomplete: energy or its price is not known for some of it, and the cost lacks it")
    return out
