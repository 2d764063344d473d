"""Job traces and fleets as CSV: what `gpuledger replay jobs` reads.

A trace has one row per job, in any order; a fleet one row per node, and its order is the order of placement.
Nothing is guessed: a malformed row is an error that names line, field, value and fix, or is skipped and counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from gpuledger.agents.replay.exceptions import TraceError
from gpuledger.agents.replay.rows import OnReject, Row, open_table, reject, show

__all__ = [
    "FLEET_COLUMNS",
    "MAX_GPUS_PER_JOB",
    "TRACE_COLUMNS",
    "UNPLACED_NODE",
    "Fleet",
    "Node",
    "TraceJob",
    "read_fleet",
    "read_jobs",
]

TRACE_COLUMNS = ("job_id", "account", "user", "start", "end")
_OPTIONAL = ("gpus", "gpu_milli", "node", "gpu_index", "submitted", "model", "state")
FLEET_COLUMNS = ("node", "gpus", "model", "pool", "site")
#: The node of what could not be placed; no placement names it, so the ledger shows a conflict.
UNPLACED_NODE = "unplaced"
#: More is a typing mistake; each GPU of a job becomes one allocation.
MAX_GPUS_PER_JOB = 100_000
_MAX_GPUS_PER_NODE = 1024
_NAME = 128
_RANGE = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?")


class TraceJob(NamedTuple):
    """One job: `milli` thousandths of each of `gpus` GPUs over [start_ms, end_ms), UTC milliseconds.

    `start_ms` None: it never ran. `end_ms` None: it still runs. `gpus` 0: it asked for no GPU. `nodes` are those the
    trace names and `indexes` the GPU indexes on each of them, () where it does not say. `model` is the GPU model it
    needs, ``A|B`` one of several, "" any.
    """

    job_id: str
    account: str
    user: str
    gpus: int
    milli: int
    start_ms: int | None
    end_ms: int | None
    nodes: tuple[str, ...] = ()
    indexes: tuple[tuple[int, ...], ...] = ()
    submitted_ms: int | None = None
    model: str = ""
    state: str = ""

    @property
    def held_gpu_us(self) -> int | None:
        """GPU-microseconds held, exactly; 0 for a job that never ran, None for one without an end."""
        if self.start_ms is None:
            return 0
        if self.end_ms is None:
            return None
        # thousandths of a GPU x milliseconds = GPU-microseconds
        return self.gpus * self.milli * (self.end_ms - self.start_ms)


@dataclass(frozen=True, slots=True)
class Node:
    name: str
    gpus: int
    model: str
    pool: str
    site: str = ""

    def gpu(self, index: int) -> str:
        """The name of one GPU, as placements and allocations of a replay spell it."""
        return f"{self.name}/{index}"


@dataclass(frozen=True, slots=True)
class Fleet:
    """Nodes in the order in which placement fills them."""

    nodes: tuple[Node, ...]

    @property
    def gpus(self) -> int:
        return sum(node.gpus for node in self.nodes)


def read_fleet(path: Path, on_reject: OnReject = reject) -> Fleet:
    """The fleet of a CSV file with the columns of `FLEET_COLUMNS` (`site` may be left out or empty).

    Raises:
        TraceError: the file or its header, a row unless `on_reject` takes it, or no node with a GPU at all.
    """
    _, rows = open_table(path, FLEET_COLUMNS[:4], FLEET_COLUMNS[4:], on_reject)
    nodes: dict[str, Node] = {}
    lines: dict[str, int] = {}
    for row in rows:
        try:
            node = Node(
                name=row.text("node", _NAME),
                gpus=row.integer("gpus", 0, _MAX_GPUS_PER_NODE),
                model=row.text("model", _NAME, required=False),
                pool=row.text("pool", _NAME),
                site=row.text("site", _NAME, required=False),
            )
            if node.name == UNPLACED_NODE:
                raise row.error("node", f"{show(node.name)} is the name of what cannot be placed; rename the node")
            if node.name in nodes:
                raise row.error("node", f"{show(node.name)} is on line {lines[node.name]} too; give each node one row")
        except TraceError as error:
            on_reject(error)
            continue
        nodes[node.name] = node
        lines[node.name] = row.line
    fleet = Fleet(tuple(nodes.values()))
    if not fleet.gpus:
        raise TraceError(path.name, 0, "gpus", "", "no node has a GPU; list the nodes that the jobs ran on")
    return fleet


def read_jobs(path: Path, now_ms: int, on_reject: OnReject = reject) -> Iterator[TraceJob]:
    """The jobs of a CSV file, one by one, in the file's order.

    Columns: `TRACE_COLUMNS`, one of `gpus` and `gpu_milli`, and optionally node, gpu_index, submitted, model, state.
    Nothing may start or end after `now_ms`: the ledger does not hold the future.

    Raises:
        TraceError: the file or its header, or a row unless `on_reject` takes it.
    """
    table, rows = open_table(path, TRACE_COLUMNS, _OPTIONAL, on_reject)
    if not {"gpus", "gpu_milli"} & table.columns.keys():
        raise TraceError(path.name, 1, "gpus", "", "the header lacks gpus or gpu_milli; one of them must be there")
    seen: dict[str, int] = {}
    for row in rows:
        try:
            job = _job(row, now_ms)
            if job.job_id in seen:
                raise row.error(
                    "job_id",
                    f"{show(job.job_id)} is on line {seen[job.job_id]} too; give each run its own id, "
                    f"for instance {show(job.job_id + '-2')}",
                )
        except TraceError as error:
            on_reject(error)
            continue
        seen[job.job_id] = row.line
        yield job


def _job(row: Row, now_ms: int) -> TraceJob:
    gpus, milli = _request(row)
    start_ms, end_ms, submitted_ms = row.time_ms("start"), row.time_ms("end"), row.time_ms("submitted")
    for field, time_ms in (("start", start_ms), ("end", end_ms), ("submitted", submitted_ms)):
        if time_ms is not None and time_ms > now_ms:
            raise row.error(field, f"{show(row.get(field))} is later than now; leave end empty where a job still runs")
    if start_ms is not None and end_ms is not None and end_ms < start_ms:
        raise row.error("end", f"{show(row.get('end'))} is before start {show(row.get('start'))}; correct one of them")
    nodes = _nodes(row)
    return TraceJob(
        job_id=row.text("job_id", _NAME),
        account=row.text("account", _NAME, required=False),
        user=row.text("user", _NAME, required=False),
        gpus=gpus,
        milli=milli,
        start_ms=start_ms,
        end_ms=end_ms,
        nodes=nodes,
        indexes=_indexes(row, nodes, gpus),
        submitted_ms=submitted_ms,
        model=row.text("model", _NAME, required=False),
        state=row.text("state", _NAME, required=False),
    )


def _request(row: Row) -> tuple[int, int]:
    """GPUs, and thousandths of each, from `gpus` (whole ones) or `gpu_milli` (thousandths in all)."""
    whole, milli = row.get("gpus"), row.get("gpu_milli")
    if whole and milli:
        raise row.error("gpu_milli", f"{show(milli)} beside gpus {show(whole)}; fill in one of the two")
    if not whole and not milli:
        raise row.error("gpus", "is empty, and so is gpu_milli; fill in one of the two (0 for a job without GPUs)")
    if whole:
        if "." in whole:
            raise row.error("gpus", f"expected a whole number, got {show(whole)}; use gpu_milli for parts of a GPU")
        return row.integer("gpus", 0, MAX_GPUS_PER_JOB), 1000
    total = row.integer("gpu_milli", 0, MAX_GPUS_PER_JOB * 1000)
    if total <= 1000:
        return (1, total) if total else (0, 1000)
    if total % 1000:
        raise row.error("gpu_milli", f"{total} is neither a part of one GPU (up to 1000) nor a multiple of 1000")
    return total // 1000, 1000


def _nodes(row: Row) -> tuple[str, ...]:
    value = row.get("node")
    if not value:
        return ()
    names = tuple(name.strip() for name in value.split(";"))
    for name in names:
        if not name or len(name) > _NAME or not name.isprintable():
            raise row.error("node", f"expected node names separated by semicolons, got {show(value)}")
    if len(set(names)) < len(names):
        raise row.error("node", f"{show(value)} names a node twice")
    return names


def _indexes(row: Row, nodes: tuple[str, ...], gpus: int) -> tuple[tuple[int, ...], ...]:
    """GPU indexes per node: nodes separated by semicolons, indexes by commas or spaces, ranges such as 0-3."""
    value = row.get("gpu_index")
    if not value:
        return ()
    groups = value.split(";")
    if len(groups) != len(nodes):
        raise row.error(
            "gpu_index",
            f"{show(value)} has {len(groups)} groups for {len(nodes)} nodes; give one per node, separated by ;",
        )
    result = tuple(tuple(_group(row, value, group)) for group in groups)
    count = sum(len(group) for group in result)
    if count != gpus:
        raise row.error("gpu_index", f"{show(value)} names {count} GPUs where the job has {gpus}")
    if any(len(set(group)) < len(group) for group in result):
        raise row.error("gpu_index", f"{show(value)} names a GPU twice")
    return result


def _group(row: Row, value: str, group: str) -> Iterator[int]:
    for part in group.replace(",", " ").split():
        match = _RANGE.fullmatch(part)
        if not match:
            raise row.error("gpu_index", f"expected indexes such as 0,1 or 0-3 in {show(value)}, got {show(part)}")
        first = int(match[1])
        last = int(match[2] or match[1])
        if last < first:
            raise row.error("gpu_index", f"the range {show(part)} in {show(value)} runs backwards")
        yield from range(first, last + 1)
