"""The Alibaba openb trace of 2023 (kubernetes-scheduler-simulator) as jobs and a fleet.

Its seconds count from an unnamed origin; `ORIGIN_MS` gives them a fixed date in the past. A pod's GPUs are held from
`scheduled_time` to `deletion_time`; the trace names no nodes, so pods are placed first-fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gpuledger.agents.replay.exceptions import TraceError
from gpuledger.agents.replay.rows import OnReject, Row, open_table, reject, show
from gpuledger.agents.replay.trace import Fleet, Node, TraceJob

__all__ = ["NODES_FILE", "ORIGIN_MS", "PODS_FILE", "find", "read_openb_fleet", "read_openb_jobs"]

#: 2023-01-01T00:00:00Z, second 0 of the trace; its last second is then 2023-05-30T08:02:40Z.
ORIGIN_MS = 1_672_531_200_000
NODES_FILE = "openb_node_list_gpu_node.csv"
PODS_FILE = "openb_pod_list_default.csv"
SITE = "openb"
_NODE_COLUMNS = ("sn", "gpu", "model")
_POD_COLUMNS = (
    "name",
    "num_gpu",
    "gpu_milli",
    "gpu_spec",
    "qos",
    "pod_phase",
    "creation_time",
    "deletion_time",
    "scheduled_time",
)
_NAME = 128
_MAX_SECONDS = 100 * 366 * 86_400


def find(folder: Path, name: str) -> Path:
    """`name` in `folder`, plain or with ``.gz``.

    Raises:
        TraceError: neither is there.
    """
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise TraceError(str(folder), 0, "", "", f"holds neither {name} nor {name}.gz; give the folder of the trace")


def read_openb_fleet(folder: Path, on_reject: OnReject = reject) -> Fleet:
    """The 1,213 GPU nodes, one pool per GPU model (``openb-v100m32``), in the file's order.

    Raises:
        TraceError: a file or its header, or a row unless `on_reject` takes it.
    """
    _, rows = open_table(find(folder, NODES_FILE), _NODE_COLUMNS, ("cpu_milli", "memory_mib"), on_reject)
    nodes: dict[str, Node] = {}
    for row in rows:
        try:
            model = row.text("model", _NAME)
            node = Node(row.text("sn", _NAME), row.integer("gpu", 0, 1024), model, f"openb-{model.lower()}", SITE)
            if node.name in nodes:
                raise row.error("sn", f"{show(node.name)} is there twice; give each node one row")
        except TraceError as error:
            on_reject(error)
            continue
        nodes[node.name] = node
    return Fleet(tuple(nodes.values()))


def read_openb_jobs(folder: Path, on_reject: OnReject = reject) -> Iterator[TraceJob]:
    """Each pod as a job of the account `qos`, in the file's order.

    A pod without `scheduled_time` never ran. One without `deletion_time` is held to the last second of the trace,
    where those that were still running when it was taken end too. `gpu_spec` (``A|B``) restricts the model.

    Raises:
        TraceError: a file or its header, or a row unless `on_reject` takes it.
    """
    path = find(folder, PODS_FILE)
    last_s = _last_second(path)
    _, rows = open_table(path, _POD_COLUMNS, ("cpu_milli", "memory_mib"), on_reject)
    seen: set[str] = set()
    for row in rows:
        try:
            job = _job(row, last_s)
            if job.job_id in seen:
                raise row.error("name", f"{show(job.job_id)} is there twice; give each pod its own name")
        except TraceError as error:
            on_reject(error)
            continue
        seen.add(job.job_id)
        yield job


def _last_second(path: Path) -> int:
    """The greatest second of the trace; faults of rows are reported by the reading that follows."""
    last_s = 0
    _, rows = open_table(path, _POD_COLUMNS, (), lambda error: None)
    for row in rows:
        for field in ("creation_time", "scheduled_time", "deletion_time"):
            value = row.get(field)
            if value.isascii() and value.isdecimal() and int(value) <= _MAX_SECONDS:
                last_s = max(last_s, int(value))
    return last_s


def _job(row: Row, last_s: int) -> TraceJob:
    gpus = row.integer("num_gpu", 0, 1024)
    milli = row.integer("gpu_milli", 0, 1000)
    if gpus and not milli:
        raise row.error("gpu_milli", f"0 where num_gpu is {gpus}; expected 1 to 1000 (1000 is one GPU)")
    if gpus > 1 and milli != 1000:
        raise row.error("gpu_milli", f"{milli} where num_gpu is {gpus}; several GPUs are whole ones (1000)")
    created_ms, start_ms = _time_ms(row, "creation_time"), _time_ms(row, "scheduled_time")
    end_ms = _time_ms(row, "deletion_time")
    if end_ms is None and start_ms is not None:
        end_ms = ORIGIN_MS + 1000 * last_s
    if start_ms is not None and end_ms is not None and end_ms < start_ms:
        raise row.error(
            "deletion_time", f"{row.get('deletion_time')} is before scheduled_time {row.get('scheduled_time')}"
        )
    return TraceJob(
        job_id=row.text("name", _NAME),
        account=row.text("qos", _NAME),
        user="",
        gpus=gpus,
        milli=milli if gpus else 1000,
        start_ms=start_ms,
        end_ms=end_ms,
        submitted_ms=created_ms,
        model=row.text("gpu_spec", _NAME, required=False).strip("|"),
        state=row.text("pod_phase", _NAME, required=False),
    )


def _time_ms(row: Row, field: str) -> int | None:
    return ORIGIN_MS + 1000 * row.integer(field, 0, _MAX_SECONDS) if row.get(field) else None
