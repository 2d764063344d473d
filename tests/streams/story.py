"""A world told in a few lines, so that a failing example can be read."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

__all__ = ["World", "story"]

MINUTE_MS = 60_000


class World(dict[str, Any]):
    """A world that prints as its story."""

    def __repr__(self) -> str:
        return "\n" + "\n".join(story(self))


def _clock(w: World, ms: int | None) -> str:
    """Seconds from the beginning of the window; `...` for no end."""
    if ms is None:
        return "..."
    seconds = (ms - w["from_ms"]) / 1000
    return f"{seconds:+g}s" if abs(seconds) < 86_400 else f"{seconds / 86_400:+.1f}d"


def _span(w: World, fact: dict[str, Any]) -> str:
    return f"[{_clock(w, fact['start_ms'])}, {_clock(w, fact['end_ms'])})" + (" VOID" if fact.get("void") else "")


def _seen(w: World, batches: Sequence[dict[str, Any]]) -> list[str]:
    """What a run saw of each device: how often it saw which activity, and until when."""
    series: dict[tuple[str, int, int], list[tuple[int, str, int | None]]] = {}
    for b in batches:
        for d in b["devices"]:
            series.setdefault((d["gpu"], d["instance"], d["epoch_ms"]), []).extend(d["samples"])
    lines: list[str] = []
    for (gpu, instance, epoch_ms), samples in series.items():
        said: list[list[Any]] = []
        for ts, activity, _ in samples:
            if said and said[-1][1] == activity:
                said[-1] = [said[-1][0] + 1, activity, ts]
            else:
                said.append([1, activity, ts])
        name = f"{gpu}/{instance}@{_clock(w, epoch_ms)}" if instance else gpu
        spans = ", ".join(f"{count} {activity} to {_clock(w, ts)}" for count, activity, ts in said)
        lines.append(f"    {name} from {_clock(w, samples[0][0])}: {spans}; {samples[0][2]}..{samples[-1][2]} mJ")
    return lines


def _run_lines(w: World) -> list[str]:
    runs: dict[str, list[dict[str, Any]]] = {}
    for b in w["batches"]:
        runs.setdefault(b["run_id"], []).append(b)
    lines: list[str] = []
    for run_id, sent in runs.items():
        first = sent[0]
        named = {id_: b["seq"] for b in sent for id_ in b["running"]}
        late = [b["seq"] for b in sent if b["late"]]
        said = ", ".join(f"{id_} until #{seq}" for id_, seq in named.items()) or "nothing"
        lines.append(
            f"  run {run_id} of {first['node']} ({first['boot_id']} since {_clock(w, first['boot_start_ms'])}) started "
            f"{_clock(w, first['run_start_ms'])}, a sample every {first['period_ms'] / 1000:g}s, batches "
            f"{','.join(str(b['seq']) for b in sent)}{f' (late: {late})' if late else ''} came "
            f"{_clock(w, first['appended_ms'])}..{_clock(w, sent[-1]['appended_ms'])}; it names {said}"
        )
        lines += _seen(w, sorted(sent, key=lambda b: b["seq"]))
    return lines


def story(w: World) -> list[str]:
    """What a world is, a line per fact and batch; times are seconds from the beginning of its window."""
    base = datetime.fromtimestamp(w["from_ms"] / 1000, UTC).strftime("%Y-%m-%dT%H:%MZ")
    lines = [
        f"{base}, {(w['to_ms'] - w['from_ms']) // MINUTE_MS} minutes in ticks of {w['tick_ms']} ms, complete until "
        f"{_clock(w, w['complete_until_ms'])}, confirmed for {w['confirm_ms'] // 1000}s",
        *(f"  {what}" for what in w["happened"] if what != "nothing"),
    ]
    for p in w["placements"]:
        claimed = _clock(w, p["claimed_at_ms"])
        lines.append(
            f"  {p['id']} r{p['revision']} claimed {claimed}: {p['gpu']} {p['node']} {p['pool']} {_span(w, p)}"
        )
    for a in w["allocations"]:
        who = a["tenant"] or "/".join(filter(None, (a["account"], a["namespace"], a["user"])))
        part = f"/{a['instance']}@{_clock(w, a['epoch_ms']) if a['epoch_ms'] else '?'}" if a["instance"] else ""
        lines.append(
            f"  {a['id']} r{a['revision']} {a['source']} {a['job_id']} of {who} on {a['gpu']}{part} ({a['node']} "
            f"{a['boot_id'] or '-'}) {a['weight_num']}/{a['weight_den']} {_span(w, a)}"
        )
    for g in w["geometries"]:
        cut = " ".join(f"{i['instance']}@{_clock(w, i['epoch_ms'])}:{i['slices']}" for i in g["instances"])
        lines.append(f"  {g['id']} r{g['revision']} {g['gpu']} ({g['node']}) [{cut}] of {g['slices']} {_span(w, g)}")
    lines += [f"  job {j['id']} r{j['revision']} ended {_clock(w, j['ended_ms'])}" for j in w["jobs"]]
    for c in w["commitments"]:
        lines.append(
            f"  {c['id']} r{c['revision']} {c['gpus']} of {c['pool']} to {c['tenant']} {c['state']} {_span(w, c)}"
        )
    for x in w["transfers"]:
        who = f"{x['from_tenant']}->{x['to_tenant']}"
        lines.append(f"  {x['id']} r{x['revision']} {x['gpus']} of {x['pool']} {who} {x['state']} {_span(w, x)}")
    for t in w["tenants"]:
        rules = "; ".join(f"{r['match']} {r['value']} {r['source'] or 'any'} {_span(w, r)}" for r in t["rules"])
        lines.append(f"  tenant {t['id']} r{t['revision']}: {rules}")
    return lines + _run_lines(w)
