"""`gpuledger status`: how far everything has come, and what needs a look."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gpuledger.cli.broker_offsets import BrokerAway, ends
from gpuledger.cli.database import data_option
from gpuledger.cli.ledger_store import Access, opened
from gpuledger.cli.moments import MINUTE_MS, iso
from gpuledger.cli.output import Column, write_rows
from gpuledger.cli.session import Session, pass_session

if TYPE_CHECKING:
    from gpuledger.streams.store import Store

__all__ = ["status"]

_DAY_MS = 86_400_000
_LAST = 5
#: Topics that a worker writes down its progress for; the others only carry.
_LETTERS = "deadletter"

_PROGRESS = "SELECT topic, partition, max(offset), max(appended_ms) FROM progress GROUP BY topic, partition"
_FRAGMENT = """
    SELECT max(appended_at), toUnixTimestamp64Milli(max(appended_at)) FROM fragments
    WHERE minute >= (SELECT max(minute) FROM fragments) - INTERVAL 10 MINUTE"""
_GAPS = """
    SELECT count(), sum(batches), countIf(recent), sumIf(batches, recent), uniqExactIf(node, recent)
    FROM (SELECT *, to_at >= fromUnixTimestamp64Milli({since_ms:Int64}, 'UTC') AS recent FROM v_gaps)"""
_GAP_ROWS = """
    SELECT node, run_id, first_seq, last_seq, toUnixTimestamp64Milli(from_at), toUnixTimestamp64Milli(to_at), batches,
        reason
    FROM v_gaps ORDER BY to_at DESC, node, run_id, first_seq LIMIT {last:UInt32}"""
_LETTER_ROWS = """
    SELECT topic, partition, offset, toUnixTimestamp64Milli(appended_at) AS appended_ms, reason FROM v_dead_letters
    ORDER BY appended_at DESC, topic, partition, offset DESC LIMIT {last:UInt32}"""
_CONFLICTS = """
    SELECT kind, count() FROM v_conflicts WHERE hour >= fromUnixTimestamp64Milli({since_ms:Int64}, 'UTC')
    GROUP BY kind ORDER BY kind"""
_POOLS = """
    SELECT pool, toUnixTimestamp64Milli(max(minute)) AS newest,
        toUnixTimestamp64Milli(maxIf(minute, complete = 1)) AS done,
        countIf(complete = 0 AND minute < fromUnixTimestamp64Milli({complete_ms:Int64}, 'UTC')) AS behind
    FROM v_recomputes WHERE minute >= fromUnixTimestamp64Milli({since_ms:Int64}, 'UTC') GROUP BY pool ORDER BY pool"""


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object with stable keys; times are ISO 8601 in UTC.")
@data_option
@pass_session
def status(session: Session, as_json: bool, data: Path | None) -> None:
    """Show how far each topic is stored, how fresh and how complete the ledger is, and what went wrong.

    Lag is in messages between what the broker has and what is stored (for topic dirty: computed); it is not known
    where no broker answers. Minutes before `complete_until` are complete: every partition of telemetry, allocations,
    inventory and capacity has stored something appended after them.
    """
    with opened(session, data) as access:
        found = _read(access, time.time_ns() // 1_000_000)
    if as_json:
        click.echo(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        _print(found)


def _read(access: Access, now_ms: int) -> dict[str, Any]:
    from gpuledger.streams.recomputer import Recomputer

    store = access.store
    complete_ms = Recomputer(store, access.rules).complete_until_ms()
    marked = store.rows("SELECT max(marked_until_ms) FROM frontier")[0][0]
    fragment_ms = _one(store, "SELECT count() FROM fragments") and int(store.rows(_FRAGMENT)[0][1])
    topics, broker = _topics(access)
    since = {"since_ms": now_ms - _DAY_MS, "complete_ms": complete_ms, "last": _LAST}
    open_ms = now_ms // MINUTE_MS * MINUTE_MS
    pools = [
        {
            "pool": pool,
            "newest_minute": iso(int(newest)),
            "complete_until": iso(int(done) + MINUTE_MS) if int(done) else None,
            "open_minute_live": int(newest) >= open_ms,
            "minutes_behind": int(behind),
        }
        for pool, newest, done, behind in store.rows(_POOLS, since)
    ]
    gaps, gap_batches, recent_gaps, recent_batches, recent_nodes = map(int, store.rows(_GAPS, since)[0])
    return {
        "now": iso(now_ms // 1000 * 1000),
        "broker": broker,
        "topics": topics,
        "backlog_marks": _sum(row["lag"] for row in topics if row["topic"] == "dirty"),
        "complete_until": iso(complete_ms) if complete_ms else None,
        "complete_lag_s": (now_ms - complete_ms) // 1000 if complete_ms else None,
        "held_back_by": _held_back(access, topics),
        "marked_until": iso(int(marked)) if marked else None,
        "newest_fragment": iso(fragment_ms) if fragment_ms else None,
        "fragment_age_s": (now_ms - fragment_ms) // 1000 if fragment_ms else None,
        "open_minute": iso(open_ms),
        "pools": pools,
        "dead_letters": _one(store, "SELECT count() FROM v_dead_letters"),
        "last_dead_letters": [
            {"topic": topic, "partition": partition, "offset": str(offset), "appended": iso(int(ms)), "reason": reason}
            for topic, partition, offset, ms, reason in store.rows(_LETTER_ROWS, since)
        ],
        "gaps": gaps,
        "gap_batches": gap_batches,
        "gaps_last_day": {"gaps": recent_gaps, "batches": recent_batches, "nodes": recent_nodes},
        "last_gaps": [
            {"node": node, "run_id": run, "first_seq": first, "last_seq": last}
            | {"from": iso(int(from_ms)), "to": iso(int(to_ms)), "batches": batches, "reason": reason}
            for node, run, first, last, from_ms, to_ms, batches, reason in store.rows(_GAP_ROWS, since)
        ],
        "conflicts_last_day": {kind: int(count) for kind, count in store.rows(_CONFLICTS, since)},
    }


def _one(store: Store, sql: str) -> int:
    return int(store.rows(sql)[0][0] or 0)


def _sum(values: Any) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _topics(access: Access) -> tuple[list[dict[str, Any]], str]:
    """A row per topic and partition, and what there is to say about the broker."""
    stored = {(topic, int(n)): (int(offset), int(ms)) for topic, n, offset, ms in access.store.rows(_PROGRESS)}
    there: dict[tuple[str, int], tuple[int, int]] = {}
    broker = "not running"
    if access.kafka is not None:
        try:
            there, broker = ends(access.kafka), f"answers at {access.kafka.bootstrap}"
        except BrokerAway as error:
            broker = str(error)
    rows: list[dict[str, Any]] = []
    for topic, partition in sorted({*stored, *there}):
        if topic == _LETTERS:
            continue
        offset, appended_ms = stored.get((topic, partition), (None, None))
        first, end = there.get((topic, partition), (None, None))
        lag = None
        if first is not None and end is not None:
            # What the broker has deleted by age was stored long ago, or is lost: it is not waiting.
            lag = max(0, end - max(first, -1 if offset is None else offset + 1, 0))
        rows.append(
            {
                "topic": topic,
                "partition": partition,
                "stored_offset": None if offset is None else str(offset),
                "stored_appended": None if appended_ms is None else iso(appended_ms),
                "end_offset": None if end is None else str(end),
                "lag": lag,
            }
        )
    return rows, broker


def _held_back(access: Access, topics: list[dict[str, Any]]) -> str | None:
    """The partition that completeness waits for: the one whose newest stored record is the oldest."""
    times = {(row["topic"], row["partition"]): row["stored_appended"] or "" for row in topics}
    gates = [(topic, n) for topic, count in access.rules.gates.items() for n in range(count)]
    topic, partition = min(gates, key=lambda gate: (times.get(gate, ""), gate))
    return f"{topic}/{partition}"


def _print(found: Mapping[str, Any]) -> None:
    columns = ("topic", "partition", "stored_offset", "stored_appended", "end_offset", "lag")
    write_rows([Column(key, key.replace("_", " ")) for key in columns], found["topics"], "table")
    click.echo(f"broker: {found['broker']}")
    if found["backlog_marks"] is not None:
        click.echo(f"backlog: {found['backlog_marks']:,} dirty marks")
    complete = _ago(found["complete_until"], found["complete_lag_s"])
    click.echo(f"complete until: {complete}, held back by {found['held_back_by']}")
    click.echo(f"marked until: {found['marked_until'] or 'nothing yet'}")
    click.echo(f"newest fragment stored: {_ago(found['newest_fragment'], found['fragment_age_s'])}")
    for pool in found["pools"]:
        live = "live" if pool["open_minute_live"] else "not live"
        behind = f", {pool['minutes_behind']:,} minutes not completed" if pool["minutes_behind"] else ""
        done = pool["complete_until"] or "nothing"
        click.echo(
            f"pool {pool['pool']}: newest minute {pool['newest_minute']} ({live}), complete until {done}{behind}"
        )
    click.echo(f"dead letters: {found['dead_letters']:,}")
    for letter in found["last_dead_letters"]:
        where = f"{letter['topic']}/{letter['partition']} offset {letter['offset']}"
        click.echo(f"  {letter['appended']} {where}: {letter['reason']}")
    click.echo(f"telemetry gaps of the last day: {_gaps_text(found)}")
    for gap in found["last_gaps"]:
        click.echo(f"  {gap['from']} to {gap['to']} {gap['node']}: {gap['batches']:,} batches, {gap['reason']}")
    conflicts = ", ".join(f"{count:,} {kind}" for kind, count in found["conflicts_last_day"].items())
    click.echo(f"conflicts of the last day: {conflicts or 'none'}")


def _gaps_text(found: Mapping[str, Any]) -> str:
    """What spools dropped in the last day, and before it; the rows of the latest follow."""
    recent = found["gaps_last_day"]
    told = "none"
    if recent["gaps"]:
        told = f"{recent['gaps']:,} on {recent['nodes']:,} nodes, {recent['batches']:,} batches dropped by spools"
    earlier = found["gaps"] - recent["gaps"]
    return f"{told}; {earlier:,} before" if earlier else told


def _ago(at: str | None, seconds: int | None) -> str:
    return "nothing yet" if at is None or seconds is None else f"{at} ({seconds:,} s ago)"
