"""An explanation as text for people (at most about 110 columns) and as JSON for scripts."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, is_dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

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

_MINUTE_MS = 60_000
_DAY_MS = 86_400_000
#: Lines of one kind beyond this are counted, not shown; `--full` shows them.
_MOST = 12
_MOST_VALUE = 60
_WIDTH = 110

At = Callable[[int | None], str]


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
    at = _clock(found.minute_ms)
    pools = " and ".join(f"pool {pool.pool}" for pool in found.pools) or "in no pool"
    out = [f"GPU {found.gpu}, minute {moment(found.minute_ms)}, {pools}"]
    for note in found.notes:
        out += textwrap.wrap(note, _WIDTH, initial_indent="! ", subsequent_indent="  ", break_on_hyphens=False)
    histories = {(each.kind, each.id): each for each in found.facts}
    for pool in found.pools:
        out += _segments(pool)
    out += _claims(found.claims, histories, at)
    out += _placements(found, histories, at)
    out += _seen(found.fragments, most, at)
    if samples is not None:
        out += _samples(samples, most, at)
    if found.gaps:
        out += ["", "Dropped batches, as the agents state"]
        out += [
            f"  node {gap.node}, run {gap.run_id[:8]}: {gap.batches} batches ({gap.first_seq} to {gap.last_seq}), "
            f"{at(gap.from_ms)} to {at(gap.to_ms)}: {gap.reason}"
            for gap in found.gaps
        ]
    if found.conflicts:
        out += ["", "Conflicts"]
        out += [
            f"  {odd.kind}: {odd.subject} against {odd.other}, {at(odd.from_ms)} to {at(odd.to_ms)}: {odd.detail}"
            for odd in found.conflicts
        ]
    out += _superseded(found, most, at)
    for pool in found.pools:
        out += _money(pool, at)
    return out


# -- words ----------------------------------------------------------------------------------------------------------


def _clock(minute_ms: int) -> At:
    """Moments of the minute's day as times, others whole; all UTC."""
    day = minute_ms // _DAY_MS

    def at(ms: int | None) -> str:
        if ms is None:
            return "–"
        text = moment(ms)
        return text[11:].removesuffix("Z") if ms // _DAY_MS == day else text

    return at


def _number(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _cost(value: Decimal | None) -> str:
    return "–" if value is None else f"{value:f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int]) -> list[str]:
    """Aligned columns, indented by two."""
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[n]) for line in lines) for n in range(len(head))]
    return [
        "  "
        + "  ".join(
            text.rjust(width) if n in right else text.ljust(width)
            for n, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def _cut(lines: list[str], most: int, what: str) -> list[str]:
    if len(lines) <= most + 1:
        return lines
    return [
        *lines[:most],
        f"{lines[most - 1][: _indent(lines[most - 1])]}… and {len(lines) - most} more {what}: --full",
    ]


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _ranges(ranges: Iterable[tuple[int, int]], at: At) -> str:
    return ", ".join(f"{at(start)} to {at(end)}" for start, end in ranges)


# -- segments -------------------------------------------------------------------------------------------------------


def _segments(pool: PoolMinute) -> list[str]:
    if not pool.segments:
        return ["", f"Segments in pool {pool.pool}: none ({pool.why_not})"]
    again = {True: "; computed again now they are the same", False: "; COMPUTED AGAIN NOW THEY DIFFER", None: ""}
    how = f"the stored rows{again[pool.agrees]}" if pool.stored else "computed for this answer"
    out = ["", f"Segments in pool {pool.pool}: {how}"]
    if pool.why_not:
        out.append(f"  ({pool.why_not})")
    head = ("kind", "tenant", "job", "inst", "activity", "GPU-us", "mJ", "from")
    rows = [_segment_row(each) for each in pool.segments]
    right = "= its time in service" if pool.segments_us == pool.service_us else f"BUT {pool.service_us:,} in service"
    energies = [each.energy_mj for each in pool.segments if each.energy_mj is not None]
    rows.append(("sum", "", "", "", "", _number(pool.segments_us), _number(sum(energies)) if energies else "–", right))
    out += _table(head, rows, (3, 5, 6))
    if any(each.kind not in ("held", "unconfirmed") for each in pool.segments) and pool.unheld:
        out.append("  what nobody holds, all GPUs of the pool in this minute:")
        out += [f"    {row.kind} {row.tenant}".rstrip() + f" {row.gpu_us:,} GPU-us" for row in pool.unheld]
    return out


def _segment_row(each: Segment) -> tuple[str, ...]:
    source = ", ".join(each.facts)
    count = len(each.fragments)
    source += "; " if source else ""
    source += f"{count} fragment{'' if count == 1 else 's'}" if count else "no fragment covers it"
    inst = str(each.instance) if each.instance else ""
    kind = (each.kind, each.tenant or "–", each.job_id or "–", inst, each.activity)
    return (*kind, _number(each.gpu_us), _number(each.energy_mj), source)


# -- facts ----------------------------------------------------------------------------------------------------------


def _claims(all_claims: Sequence[Claim], histories: dict[tuple[str, str], FactHistory], at: At) -> list[str]:
    out = ["", "Who held it"] if all_claims else ["", "Who held it: no allocation touches this minute"]
    for claim in all_claims:
        instance = f", instance {claim.instance}" if claim.instance else ""
        epoch = f" made {moment(claim.epoch_ms)}" if claim.epoch_ms else ""
        out.append(
            f"  allocation {claim.id}: job {claim.job_id}, {claim.source}, weight {claim.weight}{instance}{epoch}, "
            f"node {claim.node}"
        )
        out.append(f"    {at(claim.start_ms)} {_end(claim, at)}")
        for part in claim.tenants:
            when = "" if len(claim.tenants) == 1 else f" {at(part.start_ms)} to {at(part.end_ms)}"
            out.append(f"    tenant {part.tenant}{when}: {part.because}")
        counts = f"counts {_ranges(claim.counts, at)}" if claim.counts else "does not count"
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


def _placements(found: Explanation, histories: dict[tuple[str, str], FactHistory], at: At) -> list[str]:
    out = ["", "Where it was"] if found.placements else ["", "Where it was: no placement touches this minute"]
    for each in found.placements:
        until = "on" if each.end_ms is None else f"to {at(each.end_ms)}"
        out.append(f"  placement {each.id}: node {each.node}, pool {each.pool}, {at(each.start_ms)} {until}")
        if each.beaten_by:
            serves = f"serves {_ranges(each.serves, at)}" if each.serves else "serves nowhere in this minute"
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
        out += _cut(lines, most, "segments of fragments")
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
    believed = f"believed {_ranges(part.believed, at)}" if part.believed else "not believed"
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
            _number(each.counter_mj),
        )
        for each in samples
    ]
    head = ("run/seq", "inst", "time", "SM active", "utilisation %", "power mW", "counter mJ")
    title, *lines = _table(head, rows, (1, 3, 4, 5, 6))
    return ["", "Samples, as the broker still has them", title, *_cut(lines, most, "samples")]


# -- what superseded what -------------------------------------------------------------------------------------------


def _superseded(found: Explanation, most: int, at: At) -> list[str]:
    out = ["", "What superseded what"]
    corrected = [each for each in found.facts if len(each.revisions) > 1]
    for each in corrected:
        out.append(f"  {each.kind} {each.id} ({each.about})")
        out += _cut([line for one in each.revisions for line in _superseding(one, at)], 2 * most, "lines")
    once = [each for each in found.facts if len(each.revisions) == 1]
    lines = [f"    {each.kind} {each.id} ({each.about}), learnt {at(each.current.learnt_ms)}" for each in once]
    if once:
        out += ["  never corrected", *_cut(lines, most, "facts")]
    for pool in found.pools:
        out.append(f"  computations of the minute of pool {pool.pool} that are still stored, oldest first")
        out += [line for each in pool.versions[-most:] for line in _version(each, at)]
        if len(pool.versions) > most:
            out.append(f"    … and {len(pool.versions) - most} older ones: --full")
    return out


def _superseding(each: Revision, at: At) -> list[str]:
    state = {"counts": "counts", "superseded": "superseded", "late": "came after a newer one, never counted"}
    out = [f"    {_revision(each, at)}: {state[each.state]}"]
    for change in each.changes:
        before, after = (_value(value) for value in (change.before, change.after))
        out.append(f"      {change.field}: {before} → {after}")
    return out


def _value(value: str | None) -> str:
    if value is None:
        return "none"
    return value if len(value) <= _MOST_VALUE else f"{value[:_MOST_VALUE]}…"


def _version(each: MinuteVersion, at: At) -> list[str]:
    name = f"{each.epoch}/{each.offset}/{each.random}"
    if each.complete is None:
        state = "superseded; rows that no later one replaced are left"
    else:
        state = f"{'counts' if each.counts else 'superseded'}; {'complete' if each.complete else 'open'}"
        state += f", {_number(each.fragments)} fragments of the pool read"
    out = [f"    version {name}: {state}"]
    if each.marks is None and not each.counts:
        out += [f"      {_left(row)}" for row in each.gpu_rows]
        return out
    for mark in (each.marks or [])[-3:]:
        out.append(
            f"      because of {mark.why or 'a mark'}, marked {at(mark.appended_ms)} (dirty offset {mark.offset})"
        )
    if not each.counts:
        out += [f"      {_left(row)}" for row in each.gpu_rows]
    return out


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
        booked = _number(each.row_us), _cost(each.row_asset_cost), _cost(each.row_charge)
        share = _number(each.share_us), _cost(each.share_asset_cost), _cost(each.share_charge)
        rows += [(*names, "booked", *booked), ("", "", "", "", "share", *share)]
    head = ("kind", "tenant", "job", "activity", "", "GPU-us", "asset cost", "charge")
    out += _table(head, rows, (5, 6, 7))
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
