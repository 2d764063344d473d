"""A ledger computed from parts of the fragments, one after the other, is the ledger of all of them at once."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from numpy.typing import NDArray

from gpuledger.schemas.config import ClickHouse
from gpuledger.streams import ledger_rows, store
from gpuledger.streams.recompute import recompute
from tests.fixtures.clickhouse import ClickHouseDatabase
from tests.streams.computed import compute, figures, stored
from tests.streams.inputs import facts
from tests.streams.small_ledger import END_MS, H100, HOUR_MS, START_MS, SmallLedger
from tests.streams.worlds import POOLS, World, asked, worlds

MINUTE_MS = 60_000


def minutes_of(table: pa.Table) -> NDArray[np.int64]:
    return table.column("minute").cast(pa.int64()).to_numpy() // MINUTE_MS


def cut(table: pa.Table, r: random.Random) -> list[pa.Table]:
    """The table in parts of whole minutes, in the order of time; some may be empty."""
    minutes = minutes_of(table)
    edges = sorted(r.choice(minutes) for _ in range(r.randint(1, 6))) if len(minutes) else [0]
    bounds = [-1, *edges, 1 << 40]
    return [table.filter(pa.array((minutes >= first) & (minutes < last))) for first, last in pairwise(bounds)]


@asked()
@given(worlds())
def test_parts_of_the_fragments_add_up_to_the_whole(w: World) -> None:
    r = random.Random(w["salt"])
    table = stored(w)
    for pool in POOLS:
        whole = compute(w, pool, table)
        assert figures(recompute(facts(w, pool), cut(table, r), whole.window)) == figures(whole)


VIEWS = {
    "v_ledger_minute": "*",
    "v_gpu_minute": "*",
    "v_gpu_hour": "*",
    "v_job_hour": "*",
    "v_charges": "*",
    "v_recomputes": "* EXCEPT version",
}


@pytest.mark.services
def test_what_is_read_and_written_in_parts_is_the_same(
    clickhouse_database: ClickHouseDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reads of the store are whole minutes in the order of time and leave nothing out, and so are the rows written."""
    made = SmallLedger(ClickHouse(url=clickhouse_database.url, database=clickhouse_database.name))
    made.build()

    def rows() -> dict[str, list[tuple[object, ...]]]:
        return {view: made.store.rows(f"SELECT {columns} FROM {view} ORDER BY ALL") for view, columns in VIEWS.items()}

    before = rows()
    whole = made.store.fragments(H100, START_MS, END_MS)
    monkeypatch.setattr(store, "PART_FRAGMENTS", 15)
    monkeypatch.setattr(ledger_rows, "GPU_ROWS", 7)
    parts = list(made.store.fragment_parts(H100, START_MS, END_MS))
    assert len(parts) > 3
    assert all(0 < part.num_rows <= 15 for part in parts)
    read = [minute for part in parts for minute in sorted(set(minutes_of(part).tolist()))]
    assert read == sorted(set(minutes_of(whole).tolist()))
    key = [(name, "ascending") for name in ("minute", "gpu", "run_id", "seq")]
    assert pa.concat_tables(parts).sort_by(key).equals(whole.sort_by(key))
    assert list(made.store.fragment_parts(H100, START_MS + 2 * HOUR_MS, END_MS)) == []
    made.compute()
    assert rows() == before
