"""A pool of a few GPUs as the pure core takes it, and a ledger as dictionaries: for examples worked by hand.

Times are milliseconds after `H`, a full hour. A fact that is not given is the plainest one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from gpuledger.schemas.telemetry import Activity
from gpuledger.streams.observed import FRAGMENT_COLUMNS
from gpuledger.streams.pool_facts import PoolFacts
from gpuledger.streams.recompute import Amounts, Ledger, Window, kinds

H = 1_700_002_800_000
S, MINUTE, HOUR = 1000, 60_000, 3_600_000
POOL = "p"
Segment = tuple[int, int, str, int | None, int | None]
#: (GPU-us, mJ, GPU-us without known energy)
Cell = tuple[int, int, int]

_TEXT, _WHOLE, _SMALL = pa.string(), pa.int64(), pa.uint32()
_INTERVAL = {"start_ms": _WHOLE, "end_ms": _WHOLE}
_TYPES: dict[str, dict[str, pa.DataType]] = {
    "placements": {
        **dict.fromkeys(("id", "gpu", "node", "pool"), _TEXT),
        "claimed_at": pa.timestamp("ms", tz="UTC"),
        **_INTERVAL,
    },
    "allocations": {
        **dict.fromkeys(("id", "node", "boot_id", "gpu", "job_id", "source", "account"), _TEXT),
        **dict.fromkeys(("user", "namespace", "tenant"), _TEXT),
        **dict.fromkeys(("weight_num", "weight_den"), _SMALL),
        "instance": pa.uint16(),
        **dict.fromkeys(("epoch_ms", "named_ms", "job_ended_ms"), _WHOLE),
        **_INTERVAL,
    },
    "geometries": {**dict.fromkeys(("id", "node", "gpu"), _TEXT), "slices": _SMALL, "sliced": _SMALL, **_INTERVAL},
    "boots": {"node": _TEXT, "boot_id": _TEXT, "start_ms": _WHOLE},
    "commitments": {"tenant": _TEXT, "gpus": _SMALL, "state": _TEXT, **_INTERVAL},
    "transfers": {**dict.fromkeys(("from_tenant", "to_tenant", "state"), _TEXT), "gpus": _SMALL, **_INTERVAL},
}
_FRAGMENT_TYPES: dict[str, pa.DataType] = {
    "minute": pa.timestamp("ms", tz="UTC"),
    "gpu": _TEXT,
    "instance": pa.uint16(),
    "run_start_ms": _WHOLE,
    "run_id": _TEXT,
    "seq": _SMALL,
    "epoch_ms": _WHOLE,
    "segment_start_ms": pa.list_(pa.uint16()),
    "segment_duration_ms": pa.list_(pa.uint16()),
    "segment_activity": pa.list_(pa.uint8()),
    "segment_energy_from_mj": pa.list_(_WHOLE),
    "segment_energy_to_mj": pa.list_(_WHOLE),
}


def _table(rows: Sequence[dict[str, Any]], types: dict[str, pa.DataType]) -> pa.Table:
    return pa.table({name: pa.array([row[name] for row in rows], type=type_) for name, type_ in types.items()})


def _interval(start: int, end: int | None) -> dict[str, Any]:
    return {"start_ms": H + start, "end_ms": None if end is None else H + end}


@dataclass
class Pool:
    """Facts, added one by one."""

    rows: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {name: [] for name in _TYPES})

    def gpu(self, name: str = "g", start: int = -HOUR, end: int | None = None) -> Pool:
        """A GPU in service of the pool."""
        place = {"id": f"p-{name}", "gpu": name, "node": "n", "pool": POOL, "claimed_at": H}
        self.rows["placements"].append(place | _interval(start, end))
        return self

    def held(self, tenant: str, start: int, end: int | None, gpu: str = "g", job: str = "job", **more: Any) -> Pool:
        """An allocation; `more` are columns of the table."""
        plain = {"node": "n", "boot_id": "", "user": "", "account": "", "namespace": "", "source": "slurm"}
        counts = {"weight_num": 1, "weight_den": 1, "instance": 0, "epoch_ms": 0, "named_ms": None}
        row = {"id": f"a{len(self.rows['allocations'])}", "gpu": gpu, "tenant": tenant, "job_id": job}
        self.rows["allocations"].append(row | plain | counts | {"job_ended_ms": None} | _interval(start, end) | more)
        return self

    def geometry(self, slices: int, sliced: int, gpu: str = "g", start: int = -HOUR, end: int | None = None) -> Pool:
        """`sliced` of the GPU's slices belong to instances."""
        row = {"id": f"m{len(self.rows['geometries'])}", "node": "n", "gpu": gpu, "slices": slices, "sliced": sliced}
        self.rows["geometries"].append(row | _interval(start, end))
        return self

    def committed(self, tenant: str, gpus: int, start: int = -HOUR, end: int | None = None) -> Pool:
        """GPUs promised to a tenant."""
        self.rows["commitments"].append({"tenant": tenant, "gpus": gpus, "state": "active"} | _interval(start, end))
        return self

    @property
    def facts(self) -> PoolFacts:
        return PoolFacts(pool=POOL, **{name: _table(rows, _TYPES[name]) for name, rows in self.rows.items()})


def fragment(
    minute: int, *segments: Segment, gpu: str = "g", instance: int = 0, epoch: int = 0, seq: int = 0
) -> dict[str, Any]:
    """What one batch saw in one minute: (from, to, activity, counter at the start, counter at the end), from and to
    in milliseconds of the minute."""
    codes = [int(Activity[activity.upper()]) for _, _, activity, _, _ in segments]
    return {
        "minute": H + minute,
        "gpu": gpu,
        "instance": instance,
        "run_start_ms": H - HOUR,
        "run_id": "run",
        "seq": seq,
        "epoch_ms": epoch,
        "segment_start_ms": [start for start, *_ in segments],
        "segment_duration_ms": [end - start for start, end, *_ in segments],
        "segment_activity": codes,
        "segment_energy_from_mj": [before for *_, before, _ in segments],
        "segment_energy_to_mj": [after for *_, after in segments],
    }


def stored(*rows: dict[str, Any]) -> pa.Table:
    """The fragments as the store would read them."""
    return _table(rows, {name: _FRAGMENT_TYPES[name] for name in FRAGMENT_COLUMNS})


def window(from_ms: int, to_ms: int, complete: int | None = None, buckets: Iterable[int] = ()) -> Window:
    """All of it complete unless `complete` says until when; `buckets` are the inner bounds."""
    bounds = np.array([from_ms, *buckets, to_ms], dtype=np.int64) + H
    until = to_ms if complete is None else complete
    return Window(H + from_ms, H + to_ms, H + until, 10 * MINUTE, bounds)


def _cells(amounts: Amounts) -> list[tuple[tuple[int, ...], Cell]]:
    keys = list(zip(*(key.tolist() for key in amounts.keys), strict=True))
    values = list(zip(amounts.us.tolist(), amounts.energy_mj.tolist(), amounts.blind_us.tolist(), strict=True))
    assert keys == sorted(set(keys)), "sums are sorted by key, and each key is there once"
    return list(zip(keys, values, strict=True))


def _named(ledger: Ledger, names: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """What a code of holders means: (tenant, ..., kind), and (kind,) for nobody."""
    unconfirmed = kinds([("", bool(name[-1])) for name in names])
    held = [(*name[:-1], kind) for name, kind in zip(names, unconfirmed, strict=False)]
    return [*held, *((kind,) for kind in unconfirmed[len(names) :])]


def _activity(code: int) -> str:
    return Activity(code).name.lower()


def by_minute(ledger: Ledger) -> dict[tuple[Any, ...], Cell]:
    """(minute of the window, tenant, kind, activity) to its cell."""
    names = _named(ledger, ledger.accounts)
    return {(m, *names[account], _activity(a)): cell for (m, account, a), cell in _cells(ledger.by_minute)}


def by_gpu_minute(ledger: Ledger) -> dict[tuple[Any, ...], Cell]:
    """(minute, GPU, tenant, job, instance, kind, activity) to its cell."""
    return _by_gpu(ledger, ledger.by_gpu_minute)


def by_gpu_hour(ledger: Ledger) -> dict[tuple[Any, ...], Cell]:
    """(hour of the window, GPU, tenant, job, instance, kind, activity) to its cell."""
    return _by_gpu(ledger, ledger.by_gpu_hour)


def _by_gpu(ledger: Ledger, amounts: Amounts) -> dict[tuple[Any, ...], Cell]:
    names, gpus = _named(ledger, ledger.uses), ledger.spans.gpus
    return {(n, gpus[gpu], *names[use], _activity(a)): cell for (n, gpu, use, a), cell in _cells(amounts)}


def by_job(ledger: Ledger) -> dict[tuple[Any, ...], Cell]:
    """(bucket, tenant, job, user, kind, activity) to its cell."""
    names = _named(ledger, ledger.jobs)
    return {(n, *names[job], _activity(a)): cell for (n, job, a), cell in _cells(ledger.by_job)}
