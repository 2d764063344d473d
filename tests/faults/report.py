"""The report of a run: a page for people, an object for scripts."""

from __future__ import annotations

import os
import platform
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tests.faults.run import Outcome, Side, Struck

__all__ = ["as_json", "as_markdown"]


def as_json(outcome: Outcome) -> dict[str, Any]:
    """Everything that was counted; `identical` is the result."""
    return {
        "identical": not outcome.problems,
        "kills": len(outcome.struck),
        "wanted": outcome.kills,
        "seed": outcome.seed,
        "seconds": round(outcome.took_s, 1),
        "gpus": outcome.load.gpus,
        "messages": outcome.load.messages,
        "waves": len(outcome.load.episodes),
        "disk_full_by": outcome.disks,
        "faults": [
            {
                "victim": struck.fault.victim,
                "how": struck.fault.how,
                "place": struck.fault.place,
                "pool": struck.fault.pool or None,
                "wave": struck.wave,
                "seconds": round(struck.took_s, 2),
            }
            for struck in outcome.struck
        ],
        "workers_joined": outcome.joined,
        "workers_left": outcome.left,
        "starts": outcome.starts,
        "unexpected_ends": outcome.unexpected,
        "undisturbed": _side_json(outcome.calm),
        "disturbed": _side_json(outcome.rough),
        "problems": outcome.problems,
    }


def _side_json(side: Side | None) -> dict[str, Any] | None:
    if side is None:
        return None
    return {
        "rows": {view: len(rows) for view, rows in side.digest.items()},
        "observed_us": str(side.observed_us),
        "held_us": str(side.held_us),
        "dead_letters": side.dead_letters,
        "messages": side.topics.messages,
        "duplicates_of_the_load": side.topics.planned,
        "resent": side.topics.resent,
        "missing": side.topics.missing,
        "audit": {"balanced": side.audit.balanced, "minutes": side.audit.minutes, "looks": side.audit.looks},
        "seconds": round(side.took_s, 1),
    }


def as_markdown(outcome: Outcome) -> str:
    """A section for docs/figures.md."""
    load = outcome.load
    lines = [
        f"`scripts/faults --kills {outcome.kills} --seed {outcome.seed}`: {_result(outcome)}",
        "",
        f"{load.gpus:,} simulated GPUs, {load.messages:,} messages in {len(load.episodes)} waves; "
        f"{len(outcome.struck)} faults, {outcome.joined} workers joined and {outcome.left} left under load; "
        f"{outcome.took_s / 60:.1f} minutes on {os.cpu_count()} cores, Python {platform.python_version()}. "
        f"Full disks by {outcome.disks}.",
        "",
        *_table(("fault", "times", "median, s", "longest, s"), _kinds(outcome.struck)),
        "",
        *_table(("where", "faults"), _places(outcome.struck)),
        "",
        *_table(("", "undisturbed", "disturbed"), _sides(outcome.calm, outcome.rough)),
    ]
    if outcome.starts:
        starts = ", ".join(f"{name} {count}" for name, count in outcome.starts.items())
        lines += ["", f"Starts: {starts}. Processes that ended by themselves: {len(outcome.unexpected)}."]
        lines += [f"- {what}" for what in outcome.unexpected]
    if outcome.problems:
        lines += ["", "```", *outcome.problems, "```"]
    return "\n".join(lines) + "\n"


def _result(outcome: Outcome) -> str:
    if outcome.problems:
        return "**NOT PROVED**"
    return "**identical**, every view bit for bit"


def _kinds(struck: Sequence[Struck]) -> Iterable[tuple[str, ...]]:
    took: Mapping[str, list[float]] = defaultdict(list)
    for each in struck:
        took[f"{each.fault.victim}: {each.fault.how}"].append(each.took_s)
    for kind, seconds in sorted(took.items()):
        yield kind, str(len(seconds)), f"{sorted(seconds)[len(seconds) // 2]:.1f}", f"{max(seconds):.1f}"


def _places(struck: Sequence[Struck]) -> Iterable[tuple[str, ...]]:
    places: dict[str, int] = defaultdict(int)
    for each in struck:
        places[each.fault.place] += 1
    for place, count in sorted(places.items()):
        yield place, str(count)


def _sides(*sides: Side | None) -> Iterable[tuple[str, ...]]:
    def row(name: str, of: Any) -> tuple[str, ...]:
        return name, *("–" if side is None else of(side) for side in sides)

    yield row("messages of the load at the broker", lambda s: f"{s.topics.messages - s.topics.missing:,}")
    yield row("of these lost", lambda s: f"{s.topics.missing:,}")
    yield row("duplicates in the load itself", lambda s: f"{s.topics.planned:,}")
    yield row("duplicates by sending again", lambda s: f"{s.topics.resent:,}")
    yield row("dead letters", lambda s: f"{s.dead_letters:,}")
    yield row("held time observed", lambda s: f"{100 * s.observed_us / s.held_us:.2f} %")
    yield row("rows compared", lambda s: f"{sum(map(len, s.digest.values())):,}")
    yield row("audit", lambda s: f"{'balanced' if s.audit.balanced else 'NOT BALANCED'}, {s.audit.minutes:,} minutes")
    yield row("seconds", lambda s: f"{s.took_s:.0f}")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
