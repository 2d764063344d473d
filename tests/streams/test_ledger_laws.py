"""The ledger's laws, on random worlds, against the naive oracle."""

from __future__ import annotations

import random
from collections import defaultdict
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuledger.schemas.telemetry import Activity
from gpuledger.streams.decode import decode_block
from gpuledger.streams.fragments import fragments
from gpuledger.streams.observed import FRAGMENT_COLUMNS
from gpuledger.streams.recompute import Amounts, Ledger, Window, kinds, recompute
from tests.streams import worlds
from tests.streams.oracle import ledger as oracle

seeds = st.integers(0, 10**6)


def stored(batches: list[dict[str, Any]], w: dict[str, Any]) -> pa.Table:
    """The fragments of the batches inside the window, each once, as the store would read them."""
    found = fragments(decode_block([worlds.message(b) for b in batches]))
    if found is None:
        return worlds.empty_fragments()
    table = found.table.select(list(FRAGMENT_COLUMNS))
    minute = table.column("minute").cast(pa.int64())
    return table.filter(pc.and_(pc.greater_equal(minute, w["from_ms"]), pc.less(minute, w["to_ms"])))


def compute(
    w: dict[str, Any], pool: str, table: pa.Table | None = None, bounds: tuple[int, int] | None = None
) -> Ledger:
    from_ms, to_ms = bounds or (w["from_ms"], w["to_ms"])
    table = stored(w["batches"], w) if table is None else table
    minute = table.column("minute").cast(pa.int64())
    table = table.filter(pc.and_(pc.greater_equal(minute, from_ms), pc.less(minute, to_ms)))
    window = Window(from_ms, to_ms, w["complete_until_ms"], w["confirm_ms"], np.array([from_ms, to_ms]))
    return recompute(worlds.facts(w, pool), table, window)


def minutes(found: Ledger) -> tuple[dict[Any, int], dict[Any, int]]:
    """(GPU-us, mJ) by (minute, tenant, kind, activity), as the oracle has them."""
    us: dict[Any, int] = defaultdict(int)
    mj: dict[Any, int] = defaultdict(int)
    names = [*found.accounts, ("", False)]
    kind = kinds(found.accounts)
    amounts = found.by_minute
    for minute, account, activity, time, energy in zip(
        *(k.tolist() for k in amounts.keys), amounts.us.tolist(), amounts.energy_mj.tolist(), strict=True
    ):
        key = (
            found.window.from_ms + minute * 60_000,
            names[account][0],
            kind[account],
            Activity(activity).name.lower(),
        )
        us[key] += time
        mj[key] += energy
    unheld = found.unheld
    for m in range(found.window.minutes):
        at = found.window.from_ms + m * 60_000
        us[at, "", "free", ""] += int(unheld.free_us[m])
        for n, tenant in enumerate(unheld.tenants):
            us[at, tenant, "reserved_unused", ""] += int(unheld.reserved_us[n, m])
            us[at, tenant, "overcommitted", ""] += int(unheld.overcommitted_us[n, m])
    return {k: v for k, v in us.items() if v}, {k: v for k, v in mj.items() if v}


def differences(got: dict[Any, int], want: dict[Any, Fraction], tolerance: int, *kinds_: str) -> dict[Any, Any]:
    """Keys (of these kinds; none given: of all) whose values differ by more than the tolerance."""
    keys = {key for key in set(got) | set(want) if not kinds_ or key[2] in kinds_}
    return {k: (got.get(k), want.get(k)) for k in keys if abs(got.get(k, 0) - want.get(k, Fraction(0))) > tolerance}


@settings(max_examples=120, deadline=None)
@given(seeds)
def test_whole_gpus_agree_with_the_oracle_to_the_microsecond(seed: int) -> None:
    w = worlds.world(seed, whole_gpus=True)
    for pool in worlds.POOLS:
        us, mj, _ = oracle(w, pool)
        got_us, got_mj = minutes(compute(w, pool))
        assert differences(got_us, us, 0, "held", "unconfirmed", "unallocated", "free") == {}
        # Where more was promised than there is, its division is rounded once per stretch between two facts.
        assert differences(got_us, us, 20) == {}
        # Energy is cut by floor at every boundary: at most one millijoule for each.
        assert differences(got_mj, mj, 40) == {}


@settings(max_examples=120, deadline=None)
@given(seeds)
def test_shared_gpus_agree_with_the_oracle_up_to_rounding(seed: int) -> None:
    w = worlds.world(seed)
    for pool in worlds.POOLS:
        us, mj, _ = oracle(w, pool)
        got_us, got_mj = minutes(compute(w, pool))
        assert differences(got_us, us, 60) == {}
        assert differences(got_mj, mj, 90) == {}


@settings(max_examples=80, deadline=None)
@given(seeds)
def test_every_minute_sums_to_the_time_in_service(seed: int) -> None:
    w = worlds.world(seed)
    for pool in worlds.POOLS:
        found = compute(w, pool)
        us, _, _ = oracle(w, pool)
        service = defaultdict(Fraction)
        for (minute, _, kind, _), amount in us.items():
            if kind in ("held", "unconfirmed", "unallocated"):
                service[minute] += amount
        got = minutes(found)[0]
        for m in range(found.window.minutes):
            at = w["from_ms"] + m * 60_000
            held = sum(v for k, v in got.items() if k[0] == at and k[2] in ("held", "unconfirmed"))
            rest = sum(v for k, v in got.items() if k[0] == at and k[2] in ("reserved_unused", "free"))
            nobody = sum(v for k, v in got.items() if k[0] == at and k[2] == "unallocated")
            assert held + rest == held + nobody == int(found.service_us[m]) == service[at]
            assert all(v >= 0 for k, v in got.items() if k[0] == at)


def sums(amounts: Amounts, *keep: int) -> dict[Any, tuple[int, int]]:
    out: dict[Any, tuple[int, int]] = {}
    columns = [amounts.keys[k].tolist() for k in keep]
    for *key, us, mj in zip(*columns, amounts.us.tolist(), amounts.energy_mj.tolist(), strict=True):
        before = out.get(tuple(key), (0, 0))
        out[tuple(key)] = (before[0] + us, before[1] + mj)
    return {k: v for k, v in out.items() if v != (0, 0)}


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_minutes_hours_and_jobs_are_sums_of_the_same_time(seed: int) -> None:
    w = worlds.world(seed)
    found = compute(w, "a")
    total = sums(found.by_minute)
    assert sums(found.by_gpu_hour) == total == sums(found.by_job)
    by_account = sums(found.by_minute, 2)
    assert sums(found.by_gpu_hour, 3) == by_account == sums(found.by_job, 2)


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(1, worlds.MINUTES - 1))
def test_splitting_the_range_changes_nothing(seed: int, at: int) -> None:
    w = worlds.world(seed)
    middle = w["from_ms"] + at * 60_000
    whole = minutes(compute(w, "a"))
    first = minutes(compute(w, "a", bounds=(w["from_ms"], middle)))
    second = minutes(compute(w, "a", bounds=(middle, w["to_ms"])))
    assert whole == (first[0] | second[0], first[1] | second[1])


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_order_and_cutting_of_blocks_change_no_fragment(seed: int) -> None:
    w = worlds.world(seed)
    r = random.Random(seed)
    batches = list(w["batches"])
    key = [(name, "ascending") for name in ("gpu", "instance", "minute", "run_id", "seq")]
    whole = stored(batches, w).sort_by(key)
    r.shuffle(batches)
    at = r.randrange(len(batches) + 1)
    parts = pa.concat_tables([stored(batches[:at], w), stored(batches[at:], w)]).sort_by(key)
    assert parts.to_pylist() == whole.to_pylist()


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_held_time_comes_from_intervals_whatever_telemetry_says(seed: int) -> None:
    w = worlds.world(seed)
    with_telemetry, without = minutes(compute(w, "a"))[0], minutes(compute(w, "a", worlds.empty_fragments()))[0]

    def held(rows: dict[Any, int]) -> dict[Any, int]:
        out: dict[Any, int] = defaultdict(int)
        for (minute, tenant, kind, _), us in rows.items():
            out[minute, tenant, kind] += us
        return out

    assert held(with_telemetry) == held(without)
